"""Row formats: the corpus of bad rows, and what good rows become."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from corpus.make_rows import ANSWER, GOOD, USER, Case, make
from pydantic import BaseModel, ValidationError

from lensmith.core.errors import DataError, Drop
from lensmith.core.sample import Conversation, Image, Message, Part, Sample, Text, ToolCall, Video
from lensmith.data.formats import (
    Alpaca,
    DocumentFormat,
    Format,
    Interleaved,
    Messages,
    ShareGPT,
    WebDataset,
    detect,
)
from lensmith.data.readers import open_rows


def outcome(case: Case) -> tuple[str, str]:
    """What became of a case's rows, up to the first one that is refused, and the error's text."""
    try:
        rows = open_rows(case.file)
        for ref in rows.scan():
            case.format.parse(rows.read(ref), rows.origin(ref))
    except DataError as error:
        return f"FAIL({error.code})", str(error)
    except Drop as drop:
        return f"SKIP({drop.reason})", str(drop)
    return "+".join(("OK", *rows.notes)), ""


def test_corpus(tmp_path: Path) -> None:
    cases = make(tmp_path)
    assert len({case.id for case in cases}) == len(cases) > 80
    wrong = []
    for case in cases:
        found, text = outcome(case)
        if found != case.expect or case.where not in text:
            wrong.append(f"{case.id}: expected {case.expect} at {case.where!r}, found {found}: {text}")
    assert not wrong, "\n".join(wrong)


def parse(layout: Any, row: dict[str, Any]) -> Sample:
    return layout.parse(row, "train.jsonl:17")


def talk(layout: Any, row: dict[str, Any]) -> Conversation:
    content = parse(layout, row).content
    assert isinstance(content, tuple) and len(content) == 1
    return content[0]


def refused(layout: Any, row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        parse(layout, row)
    assert caught.value.where.startswith("train.jsonl:17")
    return f"{caught.value.code} {caught.value.where} {caught.value.message}"


def user(*parts: Part) -> Message:
    return Message("user", parts)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_marks_take_the_images_in_order() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "<image> left,\n<image>right"},
            {"role": "assistant", "content": "Same."},
            {"role": "user", "content": "And<image>"},
            {"role": "assistant", "content": "No."},
        ],
        "images": ["1.jpg", {"bytes": b"\x89PNG", "path": "2.png"}, "https://x.org/3.jpg"],
        "id": 7,
    }
    sample = parse(Messages(), row)
    assert sample.content == (
        Conversation(
            (
                Message("system", (Text("Be brief."),)),
                user(Image(path="1.jpg"), Text(" left,\n"), Image(data=b"\x89PNG"), Text("right")),
                Message("assistant", (Text("Same."),)),
                user(Text("And"), Image(path="https://x.org/3.jpg")),
                Message("assistant", (Text("No."),)),
            )
        ),
    )
    assert (sample.origin, sample.id, sample.notes) == ("train.jsonl:17", "7", ())


def test_blocks() -> None:
    blocks = [
        {"type": "image", "text": None, "image": None},  # Parquet fills the keys that a block lacks
        {"type": "text", "text": "literal <image>"},
        {"type": "image", "image": {"bytes": None, "path": "own.jpg"}},
        {"type": "image", "image": b"GIF8"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
    ]
    row = {"messages": [{"role": "user", "content": blocks}, ANSWER], "images": "1.jpg"}
    assert talk(Messages(), row).messages[0] == user(
        Image(path="1.jpg"),
        Text("literal <image>"),
        Image(path="own.jpg"),
        Image(data=b"GIF8"),
        Image(path="data:image/png;base64,AAAA"),
    )
    blocks.append({"type": "audio", "audio": "x.wav"})
    assert "SCHEMA train.jsonl:17 messages[0].content[5].type: 'audio'" in refused(Messages(), row)


def test_columns_can_be_named() -> None:
    layout = Messages(messages_column="chat", images_column="image", system_column="sys", id_column="key")
    row = {"chat": [{**USER, "content": "<image>?"}, ANSWER], "image": b"\x89", "sys": "Be brief.", "key": "a"}
    sample = parse(layout, row)
    assert sample.id == "a" and sample.images() == [Image(data=b"\x89")]
    assert talk(layout, row).messages[0] == Message("system", (Text("Be brief."),))


def test_a_system_turn_goes_before_the_system_column() -> None:
    row = {"messages": [{"role": "system", "content": "turn"}, USER, ANSWER], "system": "column"}
    assert [m.parts for m in talk(Messages(), row).messages if m.role == "system"] == [(Text("turn"),)]


CALL = {"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": '{"x":  1}'}}


def test_tools() -> None:
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "crop", "arguments": {"ä": 2}}]},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
            {"role": "function", "content": "cat"},
            {**ANSWER, "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {"name": "zoom"}}, '{"name":"crop"}'],
    }
    found = talk(Messages(), row)
    assert found.messages[1] == Message("assistant", (), (ToolCall("zoom", '{"x":  1}'), ToolCall("crop", '{"ä": 2}')))
    assert [m.role for m in found.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found.tools == ('{"type": "function", "function": {"name": "zoom"}}', '{"name":"crop"}')
    as_text = {**row, "tools": json.dumps([{"name": "zoom"}])}
    assert talk(Messages(), as_text).tools == ('{"name": "zoom"}',)
    assert "JSON train.jsonl:17: tools" in refused(Messages(), {**row, "tools": "[{"})
    assert "messages[0].tool_calls: a user turn" in refused(
        Messages(), {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}
    )
    older = {"messages": [USER, {"role": "assistant", "function_call": {"name": "zoom", "arguments": "{}"}}]}
    assert talk(Messages(), older).messages[1].tool_calls == (ToolCall("zoom", "{}"),)


TURNS = [USER, ANSWER, USER, {**ANSWER, "train": True}, USER, ANSWER]


@pytest.mark.parametrize(
    ("train", "expected"),
    [("assistant", [1, 3, 5]), ("last", [3, 5]), ("all", [0, 1, 2, 3, 4, 5])],
)
def test_flags_of_a_turn_win_over_the_option(train: Any, expected: list[int]) -> None:
    messages = talk(Messages(train=train), {"messages": TURNS}).messages
    assert [i for i, message in enumerate(messages) if message.trained] == expected


def test_weight_is_another_word_for_train() -> None:
    row = {"messages": [USER, {**ANSWER, "weight": 0}, {**USER, "weight": None}, {**ANSWER, "weight": 1.0}]}
    assert [m.trained for m in talk(Messages(), row).messages] == [False, False, False, True]
    assert "NO_TARGET" in refused(Messages(), {"messages": [USER, {**ANSWER, "weight": 0}]})
    assert "messages[1].weight: is 0.5" in refused(Messages(), {"messages": [USER, {**ANSWER, "weight": 0.5}]})
    assert "both train and weight" in refused(Messages(), {"messages": [USER, {**ANSWER, "weight": 1, "train": True}]})
    assert "messages[1].train: is str" in refused(Messages(), {"messages": [USER, {**ANSWER, "train": "yes"}]})


def test_parts_of_a_turn_can_be_trained_alone() -> None:
    blocks = [{"type": "text", "text": "thinking", "train": False}, {"type": "text", "text": "answer"}]
    row = {"messages": [USER, {"role": "assistant", "content": blocks}]}
    assert talk(Messages(), row).messages[1].parts == (Text("thinking", False), Text("answer"))
    for block in blocks:
        block["train"] = False
    assert "NO_TARGET" in refused(Messages(), row)


def test_branches_share_images_and_messages() -> None:
    row = {
        "images": ["1.jpg"],
        "system": "Be brief.",
        "shared": [{"role": "user", "content": "<image>Name it."}],
        "branches": [[{"role": "assistant", "content": text}] for text in ("cat", "Katze")],
    }
    first, second = parse(Messages(), row).content  # type: ignore[misc]
    assert first.messages[:2] == second.messages[:2]
    assert first.messages[1] == user(Image(path="1.jpg"), Text("Name it."))
    assert [c.messages[2].parts for c in (first, second)] == [(Text("cat"),), (Text("Katze"),)]
    own = {"images": ["1.jpg"], "branches": [[{**USER, "content": f"{i}<image>"}, ANSWER] for i in range(3)]}
    assert parse(Messages(), own).images() == [Image(path="1.jpg")] * 3
    own["branches"][2][0]["content"] = "none"
    assert "IMAGE_COUNT train.jsonl:17 branches[2]: 0 image marks, 1 pictures" in refused(Messages(), own)
    assert "branches[1][0].content" in refused(Messages(), {"branches": [[USER, ANSWER], [{"role": "user"}]]})
    assert "NO_TARGET" in refused(Messages(), {"branches": [[USER, ANSWER], [USER]]})
    assert "has both" in refused(Messages(), {**GOOD, "branches": []})
    assert "branches: holds no branches" in refused(Messages(), {"branches": []})


def test_a_last_turn_without_answer_is_noted() -> None:
    assert parse(Messages(), {"messages": [USER, ANSWER, USER]}).notes == ("unanswered",)
    assert parse(Messages(train="all"), {"messages": [USER, ANSWER, USER]}).notes == ()


FOLLOWS = {"system": "^", "user": "^sa", "assistant": "ut", "tool": "at"}


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_every_order_of_roles(length: int) -> None:
    for roles in itertools.product(FOLLOWS, repeat=length):
        before = "^" + "".join(role[0] for role in roles)
        allowed = all(before[i] in FOLLOWS[role] for i, role in enumerate(roles))
        expected = "OK" if allowed and "assistant" in roles else "NO_TARGET" if allowed else "ROLE_ORDER"
        row = {"messages": [{"role": role, "content": "text"} for role in roles]}
        assert (parse(Messages(), row) and "OK") if expected == "OK" else refused(Messages(), row).startswith(expected)


@pytest.mark.parametrize("images", ["", [None], [3], [{"file": "x"}], [{"bytes": None, "path": None}]])
def test_images_that_are_none(images: object) -> None:
    row = {"messages": [{**USER, "content": "<image>"}, ANSWER], "images": images}
    assert "SCHEMA train.jsonl:17 images" in refused(Messages(), row)


@pytest.mark.parametrize("bad", [True, 1.5, ["a"]])
def test_ids_are_text_or_whole_numbers(bad: object) -> None:
    assert "SCHEMA train.jsonl:17 id" in refused(Messages(), {**GOOD, "id": bad})


# --- other formats ----------------------------------------------------------------------------------------------------


def test_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "<image>Zoom."},
            {"from": "function_call", "value": '{"name": "zoom", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "done"},
            {"from": "function_call", "value": '[{"name": "a", "arguments": "{}"}, {"name": "b"}]'},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "A cat."},
        ],
        "images": ["1.jpg"],
        "system": "Be brief.",
        "tools": '[{"name": "zoom"}]',
    }
    assert talk(ShareGPT(), row) == Conversation(
        (
            Message("system", (Text("Be brief."),)),
            user(Image(path="1.jpg"), Text("Zoom.")),
            Message("assistant", (), (ToolCall("zoom", '{"x": 1}'),)),
            Message("tool", (Text("done"),)),
            Message("assistant", (), (ToolCall("a", "{}"), ToolCall("b", "{}"))),
            Message("tool", (Text("done"),)),
            Message("assistant", (Text("A cat."),)),
        ),
        ('{"name": "zoom"}',),
    )
    row["conversations"][1]["value"] = "zoom(1)"
    assert refused(ShareGPT(), row).startswith("JSON train.jsonl:17: conversations[1].value")
    row["conversations"][1]["value"] = "{}"
    assert "SCHEMA train.jsonl:17 conversations[1].value[0].name: is missing" in refused(ShareGPT(), row)


def test_sharegpt_with_openai_tags_equals_messages() -> None:
    row = {"messages": [{**USER, "content": "<image>?"}, ANSWER], "images": ["1.jpg"]}
    tags = ShareGPT(
        messages_column="messages", role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant"
    )
    assert parse(tags, row) == parse(Messages(), row)
    assert "ROLE_ORDER train.jsonl:17 messages[0].role" in refused(tags, {"messages": [{**USER, "role": "human"}]})


def test_alpaca() -> None:
    row = {
        "instruction": "Name it.",
        "input": "<image>",
        "output": "A cat.",
        "system": "",
        "history": [["Hi", "Hello"], ["How are you?", "Fine"]],
        "images": ["1.jpg"],
    }
    messages = talk(Alpaca(), row).messages
    assert [m.role for m in messages] == ["user", "assistant"] * 3
    assert messages[4] == user(Text("Name it.\n"), Image(path="1.jpg"))
    assert [m.trained for m in messages] == [False, True] * 3
    assert [m.trained for m in talk(Alpaca(train="last"), row).messages] == [False] * 5 + [True]
    plain = talk(Alpaca(), {"instruction": "", "input": "x", "output": "y", "history": None})
    assert plain.messages[0] == user(Text("x"))
    assert "instruction: empty user turn" in refused(Alpaca(), {"instruction": "", "output": "y"})
    assert "history[0][1]: is null" in refused(Alpaca(), {**row, "history": [["a", None]]})
    assert "history[1]: is list" in refused(Alpaca(), {**row, "history": [["a", "b"], ["a"]]})


# --- videos -----------------------------------------------------------------------------------------------------------

FRAMES = Video(frames=(Image(path="1.jpg"), Image(data=b"\xff")))


def test_marks_take_images_and_videos_each_from_its_own_list() -> None:
    row = {
        "messages": [{**USER, "content": "<video>a<image><video>b<image><video>"}, ANSWER],
        "images": ["1.jpg", "2.jpg"],
        "videos": ["1.mp4", ["1.jpg", {"bytes": b"\xff", "path": "2.jpg"}], {"bytes": b"ftyp", "path": None}],
    }
    expected = user(
        Video(path="1.mp4"), Text("a"), Image(path="1.jpg"), FRAMES, Text("b"), Image(path="2.jpg"), Video(data=b"ftyp")
    )
    assert talk(Messages(), row).messages[0] == expected
    human = {"from": "human", "value": row["messages"][0]["content"]}
    turns = {**row, "conversations": [human, {"from": "gpt", "value": "A cat."}]}
    assert talk(ShareGPT(), turns).messages[0] == expected
    asked = {**row, "instruction": human["value"], "output": "A cat."}
    assert talk(Alpaca(), asked).messages[0] == expected
    assert parse(DocumentFormat(), {**row, "text": human["value"]}).parts() == list(expected.parts)


def test_video_blocks() -> None:
    blocks = [
        {"type": "video", "video": None, "fps": 2},
        {"type": "video", "video": "own.mp4", "fps": None},
        {"type": "video", "video": ["1.jpg", b"\xff"]},
        {"type": "video", "video": ["1.jpg", b"\xff"], "fps": 0.5},
        {"type": "video_url", "video_url": {"url": "far.mp4"}},
        {"type": "text", "text": "literal <video>"},
    ]
    row = {"messages": [{"role": "user", "content": blocks}, ANSWER], "video": "1.mp4"}
    assert talk(Messages(), row).messages[0] == user(
        Video(path="1.mp4", fps=2.0),
        Video(path="own.mp4"),
        FRAMES,
        Video(frames=FRAMES.frames, fps=0.5),
        Video(path="far.mp4"),
        Text("literal <video>"),
    )


def test_a_video_alone_is_a_turn() -> None:
    row = {"messages": [{**USER, "content": "<video>"}, {**ANSWER, "content": "A <video>"}], "videos": ["1.mp4"] * 2}
    video = Video(path="1.mp4")
    assert [m.parts for m in talk(Messages(), row).messages] == [(video,), (Text("A "), video)]


def test_branches_share_videos() -> None:
    row = {"videos": ["1.mp4"], "branches": [[{**USER, "content": f"{i}<video>"}, ANSWER] for i in range(2)]}
    assert parse(Messages(), row).videos() == [Video(path="1.mp4")] * 2
    row["branches"][1][0]["content"] = "none"
    assert "VIDEO_COUNT train.jsonl:17 branches[1]: 0 video marks, 1 videos" in refused(Messages(), row)


VIDEO_TURN = {**USER, "content": "<video>"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [VIDEO_TURN, ANSWER]},
            "VIDEO_COUNT train.jsonl:17 messages: 1 video marks, 0 videos in 'videos'",
        ),
        ({**GOOD, "videos": ["1.mp4", "2.mp4"]}, "VIDEO_COUNT train.jsonl:17 messages: 0 video marks, 2 videos"),
        ({**GOOD, "video": "1.mp4"}, "VIDEO_COUNT"),
        ({"messages": [VIDEO_TURN, ANSWER], "images": ["1.jpg"]}, "IMAGE_COUNT"),
        ({**GOOD, "videos": ["1.mp4"], "video": "2.mp4"}, "SCHEMA train.jsonl:17 video: there are other videos"),
        ({**GOOD, "videos": [[]]}, "SCHEMA train.jsonl:17 videos[0]: holds no frames"),
        ({**GOOD, "videos": [["1.jpg", 3]]}, "SCHEMA train.jsonl:17 videos[0][1]: is int"),
        ({**GOOD, "videos": [None]}, "SCHEMA train.jsonl:17 videos[0]: is null"),
        ({**GOOD, "videos": ""}, "SCHEMA train.jsonl:17 videos[0]: is empty, must name a video"),
        ({**GOOD, "audios": ["1.wav"]}, "MEDIA_KIND train.jsonl:17 audios"),
    ],
)
def test_videos_that_are_refused(row: dict[str, Any], expected: str) -> None:
    assert expected in refused(Messages(), row)


@pytest.mark.parametrize("fps", [0, -1, True, "2", float("inf")])
def test_fps_is_a_number_above_0(fps: object) -> None:
    blocks = [{"type": "video", "video": "1.mp4", "fps": fps}]
    row = {"messages": [{"role": "user", "content": blocks}, ANSWER]}
    assert "SCHEMA train.jsonl:17 messages[0].content[0].fps: is" in refused(Messages(), row)


# --- which format -----------------------------------------------------------------------------------------------------


class Source(BaseModel):
    format: Format | None = None


def test_a_format_is_named_by_kind_or_bare_name() -> None:
    assert Source.model_validate({"format": "messages"}).format == Messages()
    assert Source.model_validate({"format": {"kind": "alpaca", "train": "last"}}).format == Alpaca(train="last")
    assert Source.model_validate({"format": None}).format is None
    for wrong in (
        "mesages",
        {"kind": "alpaca", "role_tag": "x"},
        {"kind": "sharegpt", "user_tag": "gpt"},
        {"train": "last"},
        3,
    ):
        with pytest.raises(ValidationError):
            Source.model_validate({"format": wrong})
    assert "sharegpt" in json.dumps(Source.model_json_schema())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, Messages()),
        ({"branches": [[USER, ANSWER]]}, Messages()),
        ({"conversations": [USER, ANSWER]}, Messages(messages_column="conversations")),
        ({"conversations": [{"from": "human", "value": "x"}]}, ShareGPT()),
        ({"image": "1.jpg", "conversations": [{"from": "human", "value": "x"}]}, ShareGPT(images_column="image")),
        ({"instruction": "x", "output": "y", "text": "z"}, Alpaca()),
        ({"text": "x"}, DocumentFormat()),
        ({"text": None, "parts": []}, DocumentFormat()),
        ({"texts": ["a", None], "images": [None, "1.jpg"]}, Interleaved()),
        ({"text_list": ["a"], "image_info": []}, Interleaved()),
        ({"__key__": "000", "jpg": b"", "json": GOOD, "text": "x"}, WebDataset()),
    ],
)
def test_detect(row: dict[str, Any], expected: object) -> None:
    assert detect(row, "train.jsonl:1") == expected


@pytest.mark.parametrize(
    "row", [{"question": "x", "answer": "y"}, {"texts": ["x"]}, {**GOOD, "chosen": "x", "rejected": "y"}, {}]
)
def test_detect_names_what_it_found(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"\[UNKNOWN_FORMAT\] train.jsonl:1: .*") as caught:
        detect(row, "train.jsonl:1")
    assert "question, answer" in str(caught.value) or "question" not in row
