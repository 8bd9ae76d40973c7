"""Documents for continued pretraining: text with pictures in reading order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lensmith.core.errors import Drop
from lensmith.core.sample import Document, Part, Sample, Text
from lensmith.data.formats.common import (
    ImageQueue,
    Place,
    RowOptions,
    block_parts,
    checked_text,
    marked_parts,
    required,
    row_id,
    row_images,
)


class DocumentFormat(RowOptions):
    """Rows of {text, images?} with `<image>` marks in the text, or of {parts: [{type: text | image, ...}], images?}.

    A list of texts is several documents on the same pictures (five captions of one photograph): each is trained by
    itself, and the pictures they share are computed once. All text is trained but parts with `train: false`. A
    document has no limit of its own below that of a row.
    """

    kind: Literal["document"] = "document"
    text_column: str = "text"
    """Key of the text."""
    parts_column: str = "parts"
    """Key of the list of parts, in rows that have no text of their own."""

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises DataError SCHEMA, IMAGE_COUNT, NO_TARGET, MEDIA_KIND; Drop EMPTY."""
        place = Place(origin)
        texts = row.get(self.text_column)
        if isinstance(texts, list) and texts:
            several = [{**row, self.text_column: text} for text in texts]
            documents = tuple(self._document(r, place.key(self.text_column).item(i)) for i, r in enumerate(several))
            return Sample(origin, documents, id=row_id(row, self.id_column, place))
        return Sample(origin, self._document(row, place), id=row_id(row, self.id_column, place))

    def _document(self, row: Mapping[str, Any], place: Place) -> Document:
        queue = ImageQueue(row_images(row, self.images_column, place), self.images_column)
        parts = self._parts(row, queue, place)
        queue.settle(place)
        texts = [part for part in parts if isinstance(part, Text) and part.text.strip()]
        if not texts:
            raise Drop("EMPTY", "the document has no text")
        if all(text.train is False for text in texts):
            raise place.key(self.parts_column).error("NO_TARGET", "no part of this document is trained")
        return Document(tuple(parts))

    def _parts(self, row: Mapping[str, Any], queue: ImageQueue, place: Place) -> Sequence[Part]:
        if row.get(self.parts_column) is None:
            text = required(row, self.text_column, place)
            return marked_parts(checked_text(text, place.key(self.text_column), limit=None), queue)
        if row.get(self.text_column) is not None:
            raise place.error("SCHEMA", f"the row has both {self.text_column!r} and {self.parts_column!r}")
        return block_parts(row[self.parts_column], queue, place.key(self.parts_column), limit=None)
