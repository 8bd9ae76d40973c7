"""Web documents as OBELICS and MMC4 store them: lists of texts and lists of the pictures between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lensmith.core.sample import Image, Part, Sample, Text
from lensmith.data.formats.common import (
    Place,
    RowOptions,
    checked_list,
    checked_object,
    checked_text,
    document,
    joined,
    required,
    row_id,
    wrong_type,
)
from lensmith.data.formats.parts import entries, image_ref

OBELICS_JOINER = "\n\n"
MMC4_JOINER = " "


class Interleaved(RowOptions):
    """Rows of {texts: [text | null], images: [picture | null]} (OBELICS: in each slot one of the two), or of
    {text_list: [sentence], image_info: [{image_name, matched_text_index}]} (MMC4).

    Texts stay as they are and `<image>` in them is plain text. Two texts that touch are joined by `joiner`; nothing is
    put between a text and a picture. All text is trained but what the list under `train_column` says false for.
    """

    kind: Literal["interleaved"] = "interleaved"
    texts_column: str = "texts"
    """Key of OBELICS' texts, as long as the list of pictures."""
    sentences_column: str = "text_list"
    """Key of MMC4's sentences."""
    image_info_column: str = "image_info"
    """Key of MMC4's pictures; a URL (`raw_url`) is never fetched."""
    place: Literal["before", "after"] = "before"
    """Whether a picture of MMC4 stands before or after the sentence it is matched to."""
    joiner: str | None = None
    """What joins two texts that touch. It belongs to the second. Left out: an empty line (two line feeds) between texts
    of OBELICS, a space between sentences of MMC4."""
    empty_slots: Literal["refuse", "skip"] = "refuse"
    """What to do with a slot of OBELICS that has neither text nor picture."""
    train_column: str = "train"
    """Key of a list, as long as the texts, of whether each is trained: true, false, or null for true."""

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises DataError SCHEMA, MEDIA_KIND, NO_TARGET; Drop EMPTY."""
        at = Place(origin)
        for other in (self.videos_column, "video", "audios"):
            if row.get(other):
                raise at.key(other).error("MEDIA_KIND", "this layout has pictures only", "take these rows out")
        if row.get(self.sentences_column) is None:
            parts, joiner, column = self._slots(row, at), OBELICS_JOINER, self.texts_column
        elif row.get(self.texts_column) is None:
            parts, joiner, column = self._sentences(row, at), MMC4_JOINER, self.sentences_column
        else:
            raise at.error("SCHEMA", f"the row has both {self.texts_column!r} and {self.sentences_column!r}")
        content = document(_spaced(parts, joiner if self.joiner is None else self.joiner), at.key(column))
        return Sample(origin, content, id=row_id(row, self.id_column, at))

    def _slots(self, row: Mapping[str, Any], at: Place) -> list[Part]:
        here = at.key(self.texts_column)
        texts = checked_list(required(row, self.texts_column, at), here)
        pictures = entries(row, self.images_column, at)
        if len(texts) != len(pictures):
            raise here.error("SCHEMA", f"has {len(texts)} slots, {self.images_column!r} has {len(pictures)}",
                             "each text and each picture has a slot in both lists, null in one of them")  # fmt: skip
        flags = self._flags(row, len(texts), at)
        parts: list[Part] = []
        for i, (text, (picture, there)) in enumerate(zip(texts, pictures, strict=True)):
            if text is not None and picture is not None:
                raise here.item(i).error("SCHEMA", f"the slot has a text here and a picture in {there.path}",
                                         "give each a slot of its own, with null in the other list")  # fmt: skip
            if text is not None:
                parts.append(Text(checked_text(text, here.item(i), limit=None), flags[i]))
            elif picture is not None:
                parts.append(image_ref(picture, there))
            elif self.empty_slots == "refuse":
                raise here.item(i).error("SCHEMA", f"the slot is null here and in {there.path}",
                                         "set empty_slots: skip to pass over such slots")  # fmt: skip
        return parts

    def _sentences(self, row: Mapping[str, Any], at: Place) -> list[Part]:
        here = at.key(self.sentences_column)
        sentences = checked_list(row[self.sentences_column], here)
        flags = self._flags(row, len(sentences), at)
        pictures = self._matched(row, len(sentences), at)
        parts: list[Part] = []
        for i, sentence in enumerate(sentences):
            text = Text(checked_text(sentence, here.item(i), limit=None), flags[i])
            parts += [*pictures[i], text] if self.place == "before" else [text, *pictures[i]]
        return parts

    def _matched(self, row: Mapping[str, Any], num_sentences: int, at: Place) -> list[list[Image]]:
        """The pictures of each sentence, in the order of the row."""
        pictures: list[list[Image]] = [[] for _ in range(num_sentences)]
        here = at.key(self.image_info_column)
        for i, item in enumerate(checked_list(required(row, self.image_info_column, at) or (), here)):
            info = checked_object(item, here.item(i))
            index = required(info, "matched_text_index", here.item(i))
            there = here.item(i).key("matched_text_index")
            if isinstance(index, bool) or not isinstance(index, int):
                raise wrong_type(index, there, "a whole number")
            if not 0 <= index < num_sentences:
                raise there.error("SCHEMA", f"is {index}, must be below the {num_sentences} of {self.sentences_column}")
            pictures[index].append(_named(info, here.item(i)))
        return pictures

    def _flags(self, row: Mapping[str, Any], num_texts: int, at: Place) -> Sequence[bool | None]:
        if row.get(self.train_column) is None:
            return [None] * num_texts
        here = at.key(self.train_column)
        flags = checked_list(row[self.train_column], here)
        if len(flags) != num_texts:
            raise here.error("SCHEMA", f"has {len(flags)} entries for {num_texts} texts",
                             "it says which texts are trained; another key is set by train_column")  # fmt: skip
        for i, flag in enumerate(flags):
            if flag is not None and not isinstance(flag, bool):
                raise wrong_type(flag, here.item(i), "true, false or null")
        return flags


def _named(info: Mapping[str, Any], place: Place) -> Image:
    """The picture of an entry of MMC4. If only its URL is left it is refused as every URL is, when it is opened."""
    for key in ("image_name", "raw_url"):
        if info.get(key) is not None:
            return image_ref(info[key], place.key(key))
    raise place.key("image_name").error("SCHEMA", "is missing, must name a picture")


def _spaced(parts: Sequence[Part], joiner: str) -> list[Part]:
    # the joiner goes with the second text: tokens such as " word" hold both, and a token has one flag
    result: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and not part.text:
            continue
        if isinstance(part, Text) and result and isinstance(result[-1], Text):
            part = Text(joiner + part.text, part.train)
        result.append(part)
    return joined(result)
