"""Rows of documents: marks of what is trained, web documents, rows of tar archives."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from lensmith.core.errors import DataError, Drop
from lensmith.core.sample import Conversation, Document, Image, Message, Part, Sample, Text, Video
from lensmith.data.formats import DocumentFormat, Format, Interleaved, WebDataset, detect

OPEN, CLOSE = "<trainable_text>", "</trainable_text>"
A, B, C = (Image(data=letter) for letter in (b"a", b"b", b"c"))


def parse(layout: Any, row: dict[str, Any]) -> Sample:
    return layout.parse(row, "pages.jsonl:17")


def parts(layout: Any, row: dict[str, Any]) -> list[Part]:
    content = parse(layout, row).content
    assert isinstance(content, Document)
    return list(content.parts)


def refused(layout: Any, row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        parse(layout, row)
    return str(caught.value)


# --- documents --------------------------------------------------------------------------------------------------------


def test_document() -> None:
    marked = parse(DocumentFormat(), {"text": "a<image>\nb", "images": ["1.jpg"], "id": "d"})
    assert marked.content == Document((Text("a"), Image(path="1.jpg"), Text("\nb"))) and marked.id == "d"
    pieces = [
        {"type": "text", "text": "a <image>", "train": False},
        {"type": "image"},
        {"type": "text", "text": ""},
        {"type": "video", "video": "1.mp4"},
        {"type": "text", "text": "b"},
    ]
    row = {"text": None, "parts": pieces, "images": ["1.jpg"]}
    expected = [Text("a <image>", False), Image(path="1.jpg"), Video(path="1.mp4"), Text("b")]
    assert parts(DocumentFormat(), row) == expected
    pieces[-1]["train"] = False
    assert "[NO_TARGET] pages.jsonl:17: parts: " in refused(DocumentFormat(), row)
    assert "has both" in refused(DocumentFormat(), {**row, "text": "x"})
    assert "[SCHEMA] pages.jsonl:17: parts[0].type: 'sound'" in refused(
        DocumentFormat(), {"parts": [{"type": "sound"}]}
    )


def test_a_list_of_texts_is_several_documents() -> None:
    sample = parse(DocumentFormat(), {"text": ["<image>a", f"b<image>{OPEN}c{CLOSE}"], "images": ["1.jpg"]})
    assert sample.content == (
        Document((Image(path="1.jpg"), Text("a"))),
        Document((Text("b", False), Image(path="1.jpg"), Text("c", True))),
    )
    assert "pages.jsonl:17: text[1]: is int" in refused(DocumentFormat(), {"text": ["a", 1]})
    assert "pages.jsonl:17: text[1]: 0 image" in refused(
        DocumentFormat(), {"text": ["<image>a", "b"], "image": "1.jpg"}
    )


# --- what is marked ---------------------------------------------------------------------------------------------------


def test_only_marked_text_is_trained() -> None:
    text = f"Q: <image> what?\n{OPEN}A <image>cat{CLOSE}, <video>or{OPEN}{CLOSE} {OPEN}not.{CLOSE}{OPEN}\n{CLOSE}"
    row = {"text": text, "images": ["1.jpg", "2.jpg"], "videos": ["1.mp4"]}
    assert parts(DocumentFormat(), row) == [
        Text("Q: ", False),
        Image(path="1.jpg"),
        Text(" what?\n", False),
        Text("A ", True),
        Image(path="2.jpg"),
        Text("cat", True),
        Text(", ", False),
        Video(path="1.mp4"),
        Text("or ", False),
        Text("not.\n", True),
    ]


def test_marks_in_parts() -> None:
    row = {
        "parts": [
            {"type": "text", "text": "intro "},
            {"type": "text", "text": f"a{OPEN}b <image>{CLOSE}"},
            {"type": "image", "image": "1.jpg"},
            {"type": "text", "text": "c", "train": True},
            {"type": "text", "text": f"{OPEN}{CLOSE}"},
        ]
    }
    assert parts(DocumentFormat(), row) == [
        Text("intro ", False),
        Text("a", False),
        Text("b <image>", True),
        Image(path="1.jpg"),
        Text("c", True),
    ]
    row["parts"][1]["train"] = False
    assert "[MARKS] pages.jsonl:17: parts[1]: has both train and marks" in refused(DocumentFormat(), row)
    row["parts"] = [{"type": "text", "text": f"ab{OPEN}c"}, {"type": "text", "text": f"d{CLOSE}"}]
    assert f"[MARKS] pages.jsonl:17: parts[0].text: {OPEN} at character 3 is never" in refused(DocumentFormat(), row)


def test_marks_that_are_plain_text() -> None:
    text = f"{CLOSE}a{OPEN}"
    assert parts(DocumentFormat(marks=False), {"text": text}) == [Text(text)]
    assert parts(DocumentFormat(marks=False), {"parts": [{"type": "text", "text": text}]}) == [Text(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"ab{OPEN}c", f"{OPEN} at character 3 is never closed: 'ab{OPEN}c'"),
        (f"äb{CLOSE}c", f"{CLOSE} at character 3 closes what was not opened: 'äb{CLOSE}c'"),
        (f"{OPEN}a{OPEN}b{CLOSE}{CLOSE}", f"{OPEN} at character 18 opens inside the region from character 1: "),
        (f"{OPEN}a{CLOSE}{CLOSE}", f"{CLOSE} at character 35 closes what was not opened"),
        ("x" * 50 + OPEN + "\n" * 50, f"{OPEN} at character 51 is never closed: '{'x' * 20}{OPEN}" + "\\n" * 20 + "'"),
    ],
)
def test_marks_that_do_not_pair(text: str, expected: str) -> None:
    error = refused(DocumentFormat(), {"text": text})
    assert f"[MARKS] pages.jsonl:17: text: {expected}" in error and "marks: false" in error
    assert "text[1]: " in refused(DocumentFormat(), {"text": ["fine", text]})


def test_marks_that_enclose_nothing_to_train() -> None:
    for text in (f"a{OPEN} \n{CLOSE}b", f"a{OPEN}{CLOSE}"):
        assert "[NO_TARGET] pages.jsonl:17: text: " in refused(DocumentFormat(), {"text": text})
    for text in (f"{OPEN} {CLOSE}", f"{OPEN}{CLOSE}", ""):
        with pytest.raises(Drop, match="EMPTY"):
            parse(DocumentFormat(), {"text": text})


Region = tuple[bool, str]
TEXTS = st.text(st.sampled_from("ab \n<>/é\u3000"), min_size=1, max_size=6)
REGIONS = st.lists(st.tuples(st.booleans(), st.lists(st.one_of(TEXTS, st.just("<image>")), max_size=4).map("".join)))


def written(regions: list[Region]) -> str:
    return "".join(f"{OPEN}{text}{CLOSE}" if trained else text for trained, text in regions)


def by_flag(pairs: list[Region]) -> list[Region]:
    """Characters with their flags; pictures, which have none, as borders."""
    letters = [(flag, c) for flag, text in pairs for c in re.split("(<image>)", text)]
    split = [(None if text == "<image>" else flag, text) for flag, text in letters if text]
    runs = [(flag, [text for _, text in run]) for flag, run in groupby(split, key=lambda pair: pair[0])]
    return [(flag, text) for flag, texts in runs for text in (texts if flag is None else ["".join(texts)])]  # type: ignore[misc]


@given(REGIONS.filter(lambda regions: any(t and text.replace("<image>", "").strip() for t, text in regions)))
def test_regions_come_back_as_they_were_written(regions: list[Region]) -> None:
    images = [f"{i}.jpg" for i in range(sum(text.count("<image>") for _, text in regions))]
    found = parts(DocumentFormat(), {"text": written(regions), "images": images})
    assert [part.path for part in found if isinstance(part, Image)] == images
    flat = [(part.train, part.text) if isinstance(part, Text) else (None, "<image>") for part in found]
    assert flat == by_flag(regions)


@given(REGIONS, st.data())
def test_a_mark_too_many_or_too_few_is_named_by_its_place(regions: list[Region], data: st.DataObject) -> None:
    text = written(regions)
    marks = [(m.start(), m[0]) for m in re.finditer(f"{OPEN}|{CLOSE}", text)]
    which = data.draw(st.integers(0, len(marks)))
    if which < len(marks) and data.draw(st.booleans()):  # one is lost
        start, mark = marks[which]
        text = text[:start] + text[start + len(mark) :]
        # without its opening the closing mark is stray; without the closing the next opening is nested, if there is one
        following = marks[which + 1][0] - len(mark) if which + 1 < len(marks) else marks[which - 1][0]
        expected = f"at character {following + 1} "
    else:  # one is added
        at = data.draw(st.integers(0, len(regions)))
        start = len(written(regions[:at]))
        mark = data.draw(st.sampled_from((OPEN, CLOSE)))
        text = text[:start] + mark + text[start:]
        later = [s for s, _ in marks if s >= start]
        following = start if mark == CLOSE or not later else later[0] + len(mark)
        expected = f"at character {following + 1} "
    images = ["1.jpg"] * text.count("<image>")
    error = refused(DocumentFormat(), {"text": text, "images": images})
    assert "[MARKS]" in error and expected in error


# --- OBELICS and MMC4 -------------------------------------------------------------------------------------------------


def test_obelics() -> None:
    row = {
        "texts": [None, "First.", "Second.", None, None, "Third <image>.", ""],
        "images": ["1.jpg", None, None, b"b", {"bytes": None, "path": "https://x.org/3.jpg"}, None, None],
        "id": 3,
    }
    expected = (
        Image(path="1.jpg"),
        Text("First.\n\nSecond."),
        B,
        Image(path="https://x.org/3.jpg"),
        Text("Third <image>."),
    )
    assert parse(Interleaved(), row) == Sample("pages.jsonl:17", Document(expected), id="3")
    assert detect(row, "pages.jsonl:1") == Interleaved()
    assert parts(Interleaved(joiner=" "), row)[1] == Text("First. Second.")


def test_obelics_with_flags() -> None:
    row = {"texts": ["a", "b", None, "c", "d"], "images": [None, None, b"a", None, None]}
    row["train"] = [False, True, True, None, False]  # type: ignore[assignment]
    assert parts(Interleaved(), row) == [
        Text("a", False),
        Text("\n\nb", True),
        A,
        Text("c"),
        Text("\n\nd", False),
    ]
    row["trained"], row["train"] = row["train"], "split"  # type: ignore[assignment]
    assert len(parts(Interleaved(train_column="trained"), row)) == 5
    row["train"] = [False] * 5
    assert "[NO_TARGET] pages.jsonl:17: texts: " in refused(Interleaved(), row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"texts": ["a"], "images": [None, "1.jpg"]}, "texts: has 1 slots, 'images' has 2"),
        ({"texts": ["a"]}, "texts: has 1 slots, 'images' has 0"),
        (
            {"texts": ["a", "b"], "images": [None, "1.jpg"]},
            "texts[1]: the slot has a text here and a picture in images[1]",
        ),
        ({"texts": ["a", None], "images": [None, None]}, "texts[1]: the slot is null here and in images[1]"),
        ({"texts": [1], "images": [None]}, "texts[0]: is int"),
        ({"texts": [None], "images": [1]}, "images[0]: is int"),
        ({"texts": "a", "images": [None]}, "texts: is str"),
        ({"images": [None]}, "texts: is missing"),
        ({"texts": ["a"], "images": [None], "train": [True, None]}, "train: has 2 entries for 1 texts"),
        ({"texts": ["a"], "images": [None], "train": ["yes"]}, "train[0]: is str"),
        ({"texts": ["a"], "images": [None], "text_list": ["a"]}, "has both"),
        ({"text_list": ["a"]}, "image_info: is missing"),
        ({"text_list": ["a"], "image_info": [{"image_name": "1.jpg"}]}, "image_info[0].matched_text_index: is missing"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "image_info[0].image_name: is missing"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": True}]}, "matched_text_index: is bool"),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 1}]},
            "matched_text_index: is 1, must be below the 1",
        ),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": -1}]}, "matched_text_index: is -1"),
    ],
)
def test_web_documents_that_are_refused(row: dict[str, Any], expected: str) -> None:
    error = refused(Interleaved(), row)
    assert error.startswith("[SCHEMA] pages.jsonl:17: ") and expected in error


def test_web_documents_without_text_or_with_other_media() -> None:
    for row in ({"texts": [None], "images": ["1.jpg"]}, {"text_list": [], "image_info": None}):
        with pytest.raises(Drop, match="EMPTY"):
            parse(Interleaved(), row)
    for key in ("videos", "video", "audios"):
        assert f"[MEDIA_KIND] pages.jsonl:17: {key}" in refused(Interleaved(), {"texts": [], "images": [], key: ["x"]})


def test_empty_slots_may_be_skipped() -> None:
    row = {"texts": ["a", None, "b"], "images": [None, None, None]}
    assert parts(Interleaved(empty_slots="skip"), row) == [Text("a\n\nb")]


MMC4 = {
    "text_list": ["One.", "Two.", "Three."],
    "image_info": [
        {"image_name": "c.jpg", "raw_url": "https://x.org/c", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "a.jpg", "raw_url": None, "matched_text_index": 1},
        {"image_name": None, "raw_url": "https://x.org/b.jpg", "matched_text_index": 1},
    ],
    "similarity_matrix": [[0.1]],
}


def test_mmc4() -> None:
    a, b, c = (Image(path=path) for path in ("a.jpg", "https://x.org/b.jpg", "c.jpg"))
    assert detect(MMC4, "pages.jsonl:1") == Interleaved()
    assert parts(Interleaved(), MMC4) == [Text("One."), a, b, Text("Two."), c, Text("Three.")]
    assert parts(Interleaved(place="after"), MMC4) == [Text("One. Two."), a, b, Text("Three."), c]
    plain = {**MMC4, "image_info": [], "train": [None, True, False]}
    assert parts(Interleaved(joiner="\n"), plain) == [Text("One."), Text("\nTwo.", True), Text("\nThree.", False)]


# --- rows of tar archives ---------------------------------------------------------------------------------------------


def test_webdataset_caption() -> None:
    row = {"__key__": "a/000123", "__url__": "0.tar", "jpg": b"a", "txt": "A cat.\n", "json": {"width": 2}, "cls": b"3"}
    assert parse(WebDataset(), row) == Sample("pages.jsonl:17", Document((A, Text("A cat.\n"))))
    assert parts(WebDataset(order="text_first"), row) == [Text("A cat.\n"), A]
    marked = {**row, "txt": f"A{OPEN} <image> cat{CLOSE}"}
    assert parts(WebDataset(), marked) == [Text("A", False), Text(" ", True), A, Text(" cat", True)]
    assert parse(WebDataset(id_column="__key__"), row).id == "a/000123"
    assert parse(WebDataset(), {**row, "json": {"id": 7}}).id == "7"
    assert parts(WebDataset(), {"__key__": "0", "caption": "Text alone."}) == [Text("Text alone.")]
    assert detect(row, "0.tar") == WebDataset()


def test_webdataset_media_stand_in_natural_order() -> None:
    row = {"__key__": "0", "10.jpg": b"c", "2.png": b"b", "1.MP4": b"v", "txt": "Cats."}
    assert parts(WebDataset(), row) == [Video(data=b"v"), B, C, Text("Cats.")]
    as_parquet = {"__key__": "0", "jpg": {"bytes": b"a", "path": "0.jpg"}, "png": None, "txt": "Cats.", "json": None}
    assert parts(WebDataset(), as_parquet) == [A, Text("Cats.")]


def test_webdataset_text_key() -> None:
    row = {"__key__": "0", "jpg": b"a", "txt": "long", "alt": "short", "json": {"caption": "held", "text": "own"}}
    assert parts(WebDataset(text_key="alt"), row)[-1] == Text("short")
    assert parts(WebDataset(text_key="text"), row)[-1] == Text("own")
    del row["txt"], row["json"]["text"]  # type: ignore[attr-defined]
    assert parts(WebDataset(), row) == [A, Text("held")]
    assert "[SCHEMA] pages.jsonl:17: there is no text (found: __key__" in refused(WebDataset(text_key="none"), row)
    assert "json.caption: is int" in refused(WebDataset(), {**row, "json": {"caption": 1}})
    with pytest.raises(ValidationError, match="set one of them"):
        WebDataset(text_key="txt", inner=DocumentFormat())
    with pytest.raises(Drop, match="EMPTY"):
        parse(WebDataset(), {"__key__": "0", "jpg": b"a", "txt": " "})


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}], **more}


def question(sample: Sample) -> tuple[Part, ...]:
    assert isinstance(sample.content, tuple)
    (talk,) = sample.content
    assert isinstance(talk, Conversation) and talk.messages[1] == Message("assistant", (Text("A cat."),))
    return talk.messages[0].parts


FILES = {"__key__": "d/07", "0.jpg": b"a", "1.jpg": b"b", "mp4": b"v", "txt": "not this"}
ASK = (B, Text("?"), A)


@pytest.mark.parametrize(
    "held",
    [
        chat("<image>?<image>", images=["1.jpg", "07.0.jpg"], videos=[]),
        chat("<image>?<image>", images=["d/07.1.jpg", "pictures/07.0.jpg"], videos=[]),
        chat([{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "?"},
              {"type": "image_url", "image_url": {"url": "07.0.jpg"}}]),
    ],
)  # fmt: skip
def test_webdataset_json_names_files(held: dict[str, Any]) -> None:
    assert question(parse(WebDataset(), {**FILES, "json": held})) == ASK


def test_webdataset_json_without_names_has_all_files() -> None:
    row = {**FILES, "json": chat("<image><video><image>?", id="x")}
    sample = parse(WebDataset(), row)
    assert question(sample) == (A, Video(data=b"v"), B, Text("?")) and sample.id == "x"
    blocks = [{"type": kind} for kind in ("image", "video", "image")]
    assert question(parse(WebDataset(), {**FILES, "json": chat(blocks)})) == (A, Video(data=b"v"), B)
    frames = [{"type": "video", "video": ["0.jpg", "1.jpg"], "fps": 2}]
    assert question(parse(WebDataset(), {**FILES, "json": chat(frames)})) == (Video(frames=(A, B), fps=2.0),)
    assert "[IMAGE_COUNT] pages.jsonl:17: messages: 1" in refused(WebDataset(), {**FILES, "json": chat("<image>?")})


def test_webdataset_json_of_each_layout() -> None:
    row = {"__key__": "07", "0.jpg": b"a", "1.jpg": b"b"}
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "A cat."}]
    assert question(parse(WebDataset(), {**row, "json": {"conversations": turns}})) == (A, B, Text("?"))
    asked = {"instruction": "<image><image>?", "output": "A cat."}
    assert question(parse(WebDataset(), {**row, "json": asked})) == (A, B, Text("?"))
    for held, expected in (
        ({"text": "Cats."}, [A, B, Text("Cats.")]),
        ({"text": "<image>Cats.<image>"}, [A, Text("Cats."), B]),
        ({"text": "Cat.<image>", "images": "1.jpg"}, [Text("Cat."), B]),
        ({"parts": [{"type": "image"}, {"type": "text", "text": "Cats."}, {"type": "image"}]}, [A, Text("Cats."), B]),
        ({"texts": [None, "Cats.", None]}, [A, Text("Cats."), B]),
        ({"texts": [None, "Cats."], "images": ["07.1.jpg", None]}, [B, Text("Cats.")]),
        (
            {"text_list": ["Cats."], "image_info": [{"image_name": "1.JPG", "matched_text_index": 0}]},
            [B, Text("Cats.")],
        ),
    ):
        assert parts(WebDataset(), {**row, "json": held}) == expected
    assert parse(WebDataset(), {**row, "json": {"text": ["One.", "Two."]}}).content == (
        Document((A, B, Text("One."))),
        Document((A, B, Text("Two."))),
    )
    error = refused(WebDataset(), {**row, "json": {"texts": ["Cats.", None]}})
    assert "[IMAGE_COUNT] pages.jsonl:17: 2 pictures for 1 slots" in error


def test_webdataset_inner_names_the_layout() -> None:
    layout = TypeAdapter(Format).validate_python(
        {"kind": "webdataset", "inner": {"kind": "document", "text_column": "body", "images_column": "files"}}
    )
    row = {"__key__": "07", "jpg": b"a", "txt": "not this", "json": {"body": "Cat."}}
    assert parts(layout, row) == [A, Text("Cat.")]
    assert parts(layout, {**row, "json": {"body": "Cat.<image>", "files": ["jpg"]}}) == [Text("Cat."), A]
    assert "[SCHEMA] pages.jsonl:17: json: is missing" in refused(layout, {"__key__": "07", "jpg": b"a"})
    bare = TypeAdapter(Format).validate_python({"kind": "webdataset", "inner": "messages"})
    assert "messages: is missing" in refused(bare, row)


def test_webdataset_refuses_what_it_cannot_use() -> None:
    row = {"__key__": "07", "0.jpg": b"a", "json": chat("<image>?", images=["9.jpg"])}
    error = refused(WebDataset(), row)
    assert "[MEDIA_MISSING] pages.jsonl:17: json: names '9.jpg', which the row lacks (files: 0.jpg)" in error
    assert "[MEDIA_KIND] pages.jsonl:17: wav: " in refused(WebDataset(), {**row, "wav": b"RIFF"})
    assert "[UNKNOWN_FORMAT]" in refused(WebDataset(), {**row, "json": {"chosen": "a", "rejected": "b"}})
    assert "json: is list" in refused(WebDataset(), {**row, "json": []})
    for far in ("https://x.org/1.jpg", "data:image/png;base64,AAAA"):  # refused or decoded when it is opened
        held = chat("<image>?", images=[far])
        assert question(parse(WebDataset(), {**row, "json": held})) == (Image(path=far), Text("?"))


def test_webdataset_frames_of_a_video_are_no_pictures() -> None:
    row = {
        "__key__": "a",
        "0.png": b"a",
        "1.png": b"b",
        "json": {"text": "<video>Cat.", "videos": [["0.png", "1.png"]]},
    }
    (video, text) = parse(WebDataset(), row).content.parts
    assert isinstance(video, Video) and [f.data for f in video.frames] == [b"a", b"b"] and text == Text("Cat.")
