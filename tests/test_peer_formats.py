"""Layouts of ms-swift and TRL: objects whose boxes move with the picture, query and response, prompt and completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from lensmith.core.encoded import Encoded
from lensmith.core.errors import DataError, Drop
from lensmith.core.sample import Conversation, Sample
from lensmith.data.encode import Encoder
from lensmith.data.formats import detect
from lensmith.data.formats.messages import Messages
from lensmith.data.load import said_by
from lensmith.data.tokenizer import TextTokenizer, tokenizer_text
from lensmith.family.registry import load_family

GROUNDED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "<image>Where is the <ref-object>?"},
        {"role": "assistant", "content": "<bbox> and <bbox>"},
    ],
    "images": ["a.png"],
    "objects": {"ref": ["sheep"], "bbox": [[20.0, 15.0, 100.0, 75.0], [0, 0, 200, 150]]},
}
SIZE = (200, 150)
"""Of the picture; shown as 196 x 140."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("peers") / "m", "qwen2_5_vl", max_pixels=12_845_056)


def encode(folder: Path, sample: Sample) -> tuple[Encoded, TextTokenizer]:
    tokenizer = TextTokenizer(tokenizer_text(folder))
    return Encoder(load_family(folder), tokenizer, lambda _: SIZE, 512).encode(sample), tokenizer


def answer(folder: Path, row: dict[str, Any], **options: Any) -> str:
    encoded, tokenizer = encode(folder, Messages(**options).parse(row, "r:1"))
    return tokenizer.decode(encoded.ids_L[encoded.trained_L].tolist()).removesuffix("<|im_end|>")


def test_boxes_are_in_pixels_of_the_shown_picture(folder: Path) -> None:
    # x: 20 / 200 * 196 = 19.6, 100 / 200 * 196 = 98; y: 15 / 150 * 140 = 14, 75 / 150 * 140 = 70
    encoded, _ = encode(folder, Messages(boxes="shown").parse(GROUNDED, "r:1"))
    assert (encoded.images[0].width, encoded.images[0].height) == (196, 140)
    assert answer(folder, GROUNDED, boxes="shown") == "[20, 14, 98, 70] and [0, 0, 196, 140]"


def test_boxes_in_thousandths(folder: Path) -> None:
    assert answer(folder, GROUNDED, boxes="thousandths") == "[100, 100, 500, 500] and [0, 0, 1000, 1000]"
    shares = {"ref": ["sheep"], "bbox": [[0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]], "bbox_type": "norm1"}
    row = {**GROUNDED, "objects": shares}
    assert answer(folder, row, boxes="thousandths") == "[100, 100, 500, 500] and [0, 0, 1000, 1000]"
    assert answer(folder, row, boxes="shown") == "[20, 14, 98, 70] and [0, 0, 196, 140]"


def test_names_stand_where_their_marks_are(folder: Path) -> None:
    encoded, tokenizer = encode(folder, Messages(boxes="shown").parse(GROUNDED, "r:1"))
    assert "Where is the sheep?" in tokenizer.decode(encoded.ids_L.tolist())


def test_other_boxes_are_another_sample() -> None:
    other = {**GROUNDED, "objects": {"ref": ["sheep"], "bbox": [[20.0, 15.0, 100.0, 75.0], [0, 0, 200, 149]]}}
    first, second = (Messages(boxes="shown").parse(row, "r:1") for row in (GROUNDED, other))
    assert said_by(first) != said_by(second)


def test_points_and_second_pictures(folder: Path) -> None:
    row = {**GROUNDED, "images": ["a.png", "b.png"], "objects": {"ref": [], "bbox": [[100, 75], [0, 0, 100, 75]],
                                                                 "image_id": [1, 0]}}  # fmt: skip
    row["messages"] = [{"role": "user", "content": "<image><image>Where?"}, GROUNDED["messages"][1]]
    assert answer(folder, row, boxes="thousandths") == "[500, 500] and [0, 0, 500, 500]"


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ({"ref": ["sheep"], "bbox": [[0, 0, 1, 1]]}, "2 marks <bbox>, 1 in objects"),
        ({"ref": [], "bbox": [[0, 0, 1, 1]] * 2}, "1 marks <ref-object>, 0 in objects"),
        ({"ref": ["s"], "bbox": [[0, 0, 1], [0, 0]]}, "must be x and y by turns"),
        ({"ref": ["s"], "bbox": [[0, 0]] * 2, "bbox_type": "cm"}, "must be real or norm1"),
        ({"ref": ["s"], "bbox": [[0, 0]] * 2, "image_id": [0]}, "1 entries for 2 boxes"),
        ({"ref": ["s"], "bbox": [[0, 0]] * 2, "image_id": [0, 4]}, "a picture that is not there"),
    ],
)
def test_objects_that_are_wrong(objects: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        Messages(boxes="shown").parse({**GROUNDED, "objects": objects}, "r:1")
    assert caught.value.code == "SCHEMA"


def test_rows_with_boxes_want_to_be_told_how() -> None:
    with pytest.raises(DataError, match="does not say in which coordinates") as caught:
        Messages().parse(GROUNDED, "r:1")
    assert "thousandths" in caught.value.remedy


def test_a_family_that_shows_parts_of_a_picture_has_no_pixels_to_write(folder: Path) -> None:
    from lensmith.data.encode import Placed

    family = load_family(folder)

    class Tiled:
        def __getattr__(self, name: str) -> Any:
            return getattr(family, name)

        def place_image(self, image: Any, width: int, height: int) -> list[Any]:
            return [piece for _ in range(2) for piece in family.place_image(image, width, height)]

    encoder = Encoder(Tiled(), TextTokenizer(tokenizer_text(folder)), lambda _: SIZE, 512)  # type: ignore[arg-type]
    assert all(isinstance(p, Placed) for p in Tiled().place_image(None, 200, 150))
    with pytest.raises(Drop, match="shows a picture in parts"):
        encoder.encode(Messages(boxes="shown").parse(GROUNDED, "r:1"))
    encoder.encode(Messages(boxes="thousandths").parse(GROUNDED, "r:1"))


# --- other layouts ----------------------------------------------------------------------------------------------------


def talk(row: dict[str, Any]) -> list[tuple[str, str, bool]]:
    sample = detect(row, "r:1").parse(row, "r:1")
    assert isinstance(sample.content, tuple) and isinstance(sample.content[0], Conversation)
    messages = sample.content[0].messages
    return [(m.role, "".join(getattr(p, "text", "<image>") for p in m.parts), m.trained) for m in messages]


def test_query_and_response() -> None:
    row = {"query": "<image>c", "response": "d", "history": [["a", "b"]], "system": "s", "images": ["x.png"]}
    assert talk(row) == [("system", "s", False), ("user", "a", False), ("assistant", "b", True),
                         ("user", "<image>c", False), ("assistant", "d", True)]  # fmt: skip


def test_prompt_and_completion() -> None:
    assert talk({"prompt": "a", "completion": "b"}) == [("user", "a", False), ("assistant", "b", True)]
    rows = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                       {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "completion": [{"role": "assistant", "content": "d"}]}  # fmt: skip
    assert talk(rows) == [("system", "s", False), ("user", "a", False), ("assistant", "b", False),
                          ("user", "c", False), ("assistant", "d", True)]  # fmt: skip


def test_pictures_of_a_prompt() -> None:
    row = {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}],
           "completion": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
           "images": ["x.png"]}  # fmt: skip
    assert talk(row) == [("user", "<image>a", False), ("assistant", "b", True)]


def test_a_conversation_without_its_last_answer() -> None:
    row = {"messages": [*GROUNDED["messages"], {"role": "user", "content": "More?"}]}
    row["messages"][0] = {"role": "user", "content": "a"}
    row["messages"][1] = {"role": "assistant", "content": "b"}
    assert Messages().parse(row, "r:1").notes == ("unanswered",)
    with pytest.raises(DataError, match="ends without an answer") as caught:
        Messages(unanswered="error").parse(row, "r:1")
    assert caught.value.code == "ROLE_ORDER"
