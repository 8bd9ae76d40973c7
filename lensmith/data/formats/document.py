"""Documents for continued pretraining: text with pictures and videos in reading order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from lensmith.core.sample import Document, Part, Sample, Text
from lensmith.data.formats.common import (
    Place,
    RowOptions,
    checked_list,
    checked_text,
    document,
    joined,
    required,
    row_id,
)
from lensmith.data.formats.marks import marked_pieces
from lensmith.data.formats.parts import MediaQueue, block_part, marked_parts


class DocumentFormat(RowOptions):
    """Rows of {text, images?, videos?} with `<image>` and `<video>` marks in the text, or of {parts: [{type: text |
    image | video, ...}], images?, videos?}.

    A list of texts is several documents on the same pictures (five captions of one photograph): each is trained by
    itself, and the pictures they share are computed once. All text is trained but parts with `train: false`; where
    `<trainable_text>...</trainable_text>` stands in a document, only what it encloses is trained. A document has no
    limit of its own below that of a row.
    """

    kind: Literal["document"] = "document"
    text_column: str = "text"
    """Key of the text."""
    parts_column: str = "parts"
    """Key of the list of parts, in rows that have no text of their own."""
    marks: bool = True
    """Whether `<trainable_text>` and `</trainable_text>` mark what is trained; if not, they are plain text."""

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises DataError SCHEMA, MARKS, IMAGE_COUNT, VIDEO_COUNT, NO_TARGET, MEDIA_KIND; Drop EMPTY."""
        place = Place(origin)
        queue = MediaQueue.of(row, self, place)
        return Sample(origin, self._content(row, queue, place), id=row_id(row, self.id_column, place))

    def _content(self, row: Mapping[str, Any], queue: MediaQueue, place: Place) -> Document | tuple[Document, ...]:
        if row.get(self.parts_column) is None:
            here = place.key(self.text_column)
            text = required(row, self.text_column, place)
            if isinstance(text, list) and text:
                return tuple(self._from_text(t, queue.again(), here.item(i)) for i, t in enumerate(text))
            return self._from_text(text, queue, here)
        if row.get(self.text_column) is not None:
            raise place.error("SCHEMA", f"the row has both {self.text_column!r} and {self.parts_column!r}")
        return self._from_parts(row[self.parts_column], queue, place.key(self.parts_column))

    def _from_text(self, value: object, queue: MediaQueue, place: Place) -> Document:
        text = checked_text(value, place, limit=None)
        pieces = marked_pieces(text, place) if self.marks else None
        if pieces is None:
            parts = marked_parts(text, queue)
        else:
            parts = joined([part for piece, train in pieces for part in marked_parts(piece, queue, train)])
        queue.settle(place)
        return document(parts, place)

    def _from_parts(self, value: object, queue: MediaQueue, place: Place) -> Document:
        parts: list[Part] = []
        any_marks = False
        for index, item in enumerate(checked_list(value, place)):
            here = place.item(index)
            part = block_part(item, queue, here, limit=None)
            pieces = marked_pieces(part.text, here.key("text")) if self.marks and isinstance(part, Text) else None
            if pieces is None:
                parts.append(part)
                continue
            if isinstance(part, Text) and part.train is not None:
                raise here.error("MARKS", "has both train and marks in its text", "keep one of the two")
            any_marks = True
            parts += joined([Text(piece, train) for piece, train in pieces if piece])
        if any_marks:
            parts = [replace(p, train=False) if isinstance(p, Text) and p.train is None else p for p in parts]
        queue.settle(place)
        return document([p for p in parts if not isinstance(p, Text) or p.text], place)
