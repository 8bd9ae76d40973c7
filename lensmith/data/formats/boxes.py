"""Boxes of a row's objects, as ms-swift's rows have them, written in the coordinates of the picture that is shown.

{objects: {ref: [name], bbox: [[x1, y1, x2, y2]], bbox_type?: real | norm1, image_id?: [0]}}: every `<ref-object>` in
the texts is the next name, every `<bbox>` the next box. A box is of the original picture; what the model sees has
another size, so its text is made when that size is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lensmith.core.sample import Conversation, Image, Message, Part, Text
from lensmith.data.formats.common import ChatOptions, Place, RowOptions, checked_list, checked_object, checked_text

REF_MARK, BOX_MARK = "<ref-object>", "<bbox>"
OBJECT_MARKS = re.compile(f"({REF_MARK}|{BOX_MARK})")
Form = Literal["shown", "thousandths"]
Size = tuple[int, int]
Sizes = Callable[[Image, Form], tuple[Size, Size]]
"""Size of a picture as it came, and the coordinates of a form: as it is shown, or thousandths."""


@dataclass(frozen=True, slots=True)
class Box(Text):
    """x and y by turns, in pixels of picture number `picture` of the conversation or, with `shares`, of its sides.
    `text` says the same, for identity."""

    corners: tuple[float, ...] = ()
    picture: int = 0
    shares: bool = False
    form: Form = "shown"

    def written(self, size: Size, wanted: Size) -> str:
        sides = (1, 1) if self.shares else size
        found = [round(value / sides[n % 2] * wanted[n % 2]) for n, value in enumerate(self.corners)]
        return f"[{', '.join(map(str, found))}]"


class Objects:
    """Hands names and boxes of a row out, one for each mark."""

    def __init__(self, refs: Sequence[str], boxes: Sequence[Box]):
        self.refs, self.boxes = refs, boxes
        self.asked = {REF_MARK: 0, BOX_MARK: 0}

    @classmethod
    def of(cls, row: Mapping[str, Any], options: RowOptions, place: Place) -> Objects | None:
        """None for a row without objects. Raises DataError SCHEMA."""
        if not isinstance(options, ChatOptions) or not row.get(options.objects_column):
            return None
        here = place.key(options.objects_column)
        found = checked_object(row[options.objects_column], here)
        boxes = checked_list(found.get("bbox") or (), here.key("bbox"))
        if boxes and options.boxes is None:
            raise here.error("SCHEMA", "the row has boxes, and the format does not say in which coordinates they are "
                             "written", "set boxes of the format: shown (Qwen2.5-VL) or thousandths (Qwen2-VL, "
                             "Qwen3-VL)")  # fmt: skip
        kind, of = found.get("bbox_type", "real"), found.get("image_id") or [0] * len(boxes)
        if kind not in ("real", "norm1"):
            raise here.key("bbox_type").error("SCHEMA", f"is {kind!r}, must be real or norm1")
        if len(of) != len(boxes):
            raise here.key("image_id").error("SCHEMA", f"has {len(of)} entries for {len(boxes)} boxes")
        refs = checked_list(found.get("ref") or (), here.key("ref"))
        return cls(
            [checked_text(ref, here.key("ref").item(n)) for n, ref in enumerate(refs)],
            [_box(b, int(n), kind, options.boxes or "shown", here.key("bbox").item(i))
             for i, (b, n) in enumerate(zip(boxes, of, strict=True))],
        )  # fmt: skip

    def again(self) -> Objects:
        return Objects(self.refs, self.boxes)

    def parts(self, text: str, train: bool | None) -> list[Part]:
        """A text with its marks filled in."""
        found: list[Part] = []
        for piece in OBJECT_MARKS.split(text):
            if piece in self.asked:
                listed: Sequence[Any] = self.refs if piece == REF_MARK else self.boxes
                number = self.asked[piece]
                self.asked[piece] += 1
                if number < len(listed):
                    item = listed[number]
                    found.append(Text(item, train) if isinstance(item, str) else replace(item, train=train))
            elif piece:
                found.append(Text(piece, train))
        return found

    def settle(self, place: Place) -> None:
        """Raises DataError SCHEMA unless every box had its mark, and every mark a box or a name."""
        for mark, listed in ((BOX_MARK, self.boxes), (REF_MARK, self.refs)):
            if self.asked[mark] != len(listed) and (mark == BOX_MARK or self.asked[mark]):
                raise place.error("SCHEMA", f"{self.asked[mark]} marks {mark}, {len(listed)} in objects",
                                  f"write one {mark} for each")  # fmt: skip


def _box(value: object, picture: int, kind: str, form: Form, place: Place) -> Box:
    numbers = checked_list(value, place)
    if not numbers or len(numbers) % 2 or not all(isinstance(n, (int, float)) and n == n for n in numbers):
        raise place.error("SCHEMA", f"is {numbers!r}, must be x and y by turns")
    corners = tuple(float(n) for n in numbers)
    return Box(f"{kind} {picture} {form} {corners}", None, corners, picture, kind == "norm1", form)


def with_boxes(conversation: Conversation, sizes: Sizes) -> Conversation:
    """The conversation with every box as text."""
    if not any(isinstance(p, Box) for m in conversation.messages for p in m.parts):
        return conversation
    images = [p for m in conversation.messages for p in m.parts if isinstance(p, Image)]

    def written(message: Message) -> Message:
        parts = tuple(
            Text(p.written(*sizes(images[p.picture], p.form)), p.train) if isinstance(p, Box) else p
            for p in message.parts
        )
        return replace(message, parts=parts)

    return replace(conversation, messages=tuple(map(written, conversation.messages)))
