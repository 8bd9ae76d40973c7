"""Rows of tar archives in the layout of WebDataset: the files that share a name, by their extensions."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import model_validator

from lensmith.config.part import Part as Options
from lensmith.core.sample import Conversation, Document, Image, Part, Sample, Text, Video
from lensmith.data.formats.common import Place, RowOptions, checked_object, checked_text, required, row_id
from lensmith.data.formats.document import DocumentFormat
from lensmith.data.formats.interleaved import Interleaved
from lensmith.data.formats.known import Layout, RowFormat, known_layout
from lensmith.data.formats.parts import IMAGE_MARK, MEDIA_MARKS, VIDEO_MARK, image_ref, media_key
from lensmith.data.media import is_data_url
from lensmith.data.strict_json import key_list

KEY = "__key__"
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
_SOUND = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac")
_TEXTS = ("txt", "text", "caption")
_MEDIA_BLOCKS = ("image", "image_url", "video", "video_url")


class WebDataset(Options):
    """Rows of {__key__, jpg, png, 0.jpg, mp4, ..., txt?, json?}, as a tar archive of files KEY.jpg, KEY.txt gives them.

    A `json` of a known layout is the row; pictures and videos that it names are files of the tar (by full name, name
    without folder, or extension), and where it names none it has all of the row's, in natural order. Otherwise the row
    is a document: its pictures and videos, and the text.
    """

    kind: Literal["webdataset"] = "webdataset"
    inner: RowFormat | None = None
    """Layout of `json`. Left out: detected in each row."""
    text_key: str | None = None
    """Extension of the file that holds the text, or a key of `json` that does; `json` is then no row of its own. Left
    out: `txt`, `text` or `caption`, or `caption` in `json`."""
    order: Literal["image_first", "text_first"] = "image_first"
    """Where the pictures and videos of a text without `<image>` and `<video>` marks stand."""
    id_column: str = "id"
    """Key of the row's id in `json`. `__key__` is the common name of the row's files, which may repeat from one tar to
    the next."""

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        if self.inner is not None and self.text_key is not None:
            raise ValueError("inner reads json as the row and text_key reads a text: set one of them")
        return self

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises what the layout of `json` raises; DataError MEDIA_KIND, MEDIA_MISSING, SCHEMA without a text."""
        place = Place(origin)
        files = _Files(row, place)
        held = self._json(row, place)
        layout = self._layout(held, origin)
        if layout is None:
            layout = DocumentFormat()
            text = self._placed(self._text(row, held, place), files)
            inside = files.listed({layout.text_column: text}, layout, place)
        else:
            inside = self._completed(held, layout, files, place)
        sample = _with_media(layout.parse(inside, origin), lambda part: files.found(part, place))
        named = row_id({**held, KEY: row.get(KEY)}, self.id_column, place)
        return replace(sample, id=sample.id if named is None else named)

    def _json(self, row: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
        if row.get("json") is None and self.inner is None:
            return {}
        return checked_object(required(row, "json", place), place.key("json"))

    def _layout(self, held: Mapping[str, Any], origin: str) -> Layout | None:
        """The format of the json; None if it is no row of its own."""
        if self.inner is not None or self.text_key is not None or not held:
            return self.inner
        return known_layout({"images": [], **held}, origin)

    def _completed(self, held: Mapping[str, Any], layout: Layout, files: _Files, place: Place) -> Mapping[str, Any]:
        """The json with the row's pictures and videos, where it names none itself."""
        if _names_media(held):
            return held
        if isinstance(layout, Interleaved):
            return _slotted(held, layout, files, place)
        inside = files.listed(held, layout, place)
        own = media_key(held, layout.images_column, place), media_key(held, layout.videos_column, place)
        if not isinstance(layout, DocumentFormat) or any(held.get(column) is not None for column in own):
            return inside
        text = held.get(layout.text_column)
        several = [self._placed(t, files) for t in text] if isinstance(text, list) else self._placed(text, files)
        return {**inside, layout.text_column: several}

    def _placed(self, text: Any, files: _Files) -> Any:
        """A text that places nothing itself with a mark for each picture and video of the row."""
        if not isinstance(text, str) or MEDIA_MARKS.search(text):
            return text
        return files.marks + text if self.order == "image_first" else text + files.marks

    def _text(self, row: Mapping[str, Any], held: Mapping[str, Any], place: Place) -> str:
        for key in (self.text_key,) if self.text_key is not None else _TEXTS:
            if row.get(key) is not None:
                return checked_text(row[key], place.key(key), limit=None)
        key = self.text_key or "caption"
        if held.get(key) is None:
            raise place.error("SCHEMA", f"there is no text (found: {key_list(row)})",
                              "name its extension, or its key in json, by text_key")  # fmt: skip
        return checked_text(held[key], place.key("json").key(key), limit=None)


class _Files:
    """The pictures, videos and other binary files of a row, in natural order: 2.jpg before 10.jpg."""

    def __init__(self, row: Mapping[str, Any], place: Place):
        self._files: dict[str, Any] = {}
        for extension in sorted((e for e in row if not e.startswith("__")), key=_natural):
            if row[extension] is not None and _kind(extension) in _SOUND:
                raise place.key(extension).error("MEDIA_KIND", "sound cannot be trained", "take these rows out")
            if _is_file(row[extension]):
                self._files[extension] = row[extension]
        full = {_lowered(f"{row.get(KEY, '')}.{extension}"): extension for extension in self._files}
        self._base_names = {posixpath.basename(name): extension for name, extension in full.items()}
        # the full name wins over an extension that reads the same: the row "0" may hold 0.jpg and 0.0.jpg
        self._names = {**{_lowered(e): e for e in self._files}, **self._base_names, **full}

    def of(self, kinds: Sequence[str]) -> list[Any]:
        return [value for extension, value in self._files.items() if _kind(extension) in kinds]

    @property
    def marks(self) -> str:
        kinds = [_kind(extension) for extension in self._files]
        return "".join(IMAGE_MARK if k in _IMAGES else VIDEO_MARK for k in kinds if k in (*_IMAGES, *_VIDEOS))

    def listed(self, held: Mapping[str, Any], layout: RowOptions, place: Place) -> dict[str, Any]:
        """`held` with all pictures and all videos, each where it has no list of its own."""
        lists: dict[str, Any] = {}
        columns = (layout.images_column, layout.videos_column)
        if any(isinstance(entry, list) for c in columns for entry in held.get(media_key(held, c, place)) or ()):
            return dict(held)  # pictures that are the frames of a video
        for column, kinds in ((layout.images_column, _IMAGES), (layout.videos_column, _VIDEOS)):
            if held.get(media_key(held, column, place)) is None and (files := self.of(kinds)):
                lists[column] = files
        return {**held, **lists}

    def found(self, part: Image | Video, place: Place) -> Image | Video:
        """`part` with the bytes of the file that it names. Raises DataError MEDIA_MISSING."""
        if isinstance(part, Image):
            return self._found(part, place)
        if part.frames:
            return replace(part, frames=tuple(self._found(frame, place) for frame in part.frames))
        file = self._found(Image(part.path, part.data), place)
        return replace(part, path=file.path, data=file.data)

    def _found(self, part: Image, place: Place) -> Image:
        # a URL is refused as everywhere, when it is opened
        if part.path is None or "://" in part.path or is_data_url(part.path):
            return part
        name = _lowered(part.path)
        extension = self._names.get(name, self._base_names.get(posixpath.basename(name)))
        if extension is None:
            raise place.key("json").error("MEDIA_MISSING", f"names {part.path[:200]!r}, which the row lacks (files: "
                                          f"{key_list(self._files)})", "a picture is named as the tar names it, or by "
                                          "what stands behind the row's key")  # fmt: skip
        return image_ref(self._files[extension], place.key(extension))


def _natural(extension: str) -> list[str | int]:
    return [int(s) if s.isdecimal() else s for s in re.split(r"([0-9]+)", extension)]


def _lowered(name: str) -> str:
    """A file's name with its extension as the reader of tar archives gives it."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}{slash}{stem}{dot}{extension.lower()}"


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2].lower()


def _is_file(value: object) -> bool:
    """Bytes as a tar gives them, or {bytes, path} as Parquet does."""
    return isinstance(value, bytes) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes))


def _names_media(value: object) -> bool:
    """Whether a block somewhere in a json names its picture or video."""
    if isinstance(value, Mapping):
        kind = value.get("type")
        named = isinstance(kind, str) and kind in _MEDIA_BLOCKS and value.get(kind) is not None
        return named or any(map(_names_media, value.values()))
    return isinstance(value, list) and any(map(_names_media, value))


def _slotted(held: Mapping[str, Any], layout: Interleaved, files: _Files, place: Place) -> Mapping[str, Any]:
    """Rows of OBELICS without their list of pictures: the row's pictures stand where the texts are null."""
    texts, own = held.get(layout.texts_column), media_key(held, layout.images_column, place)
    if not isinstance(texts, list) or held.get(own) is not None:
        return held
    pictures = files.of(_IMAGES)
    if len(pictures) != texts.count(None):
        raise place.error("IMAGE_COUNT", f"{len(pictures)} pictures for {texts.count(None)} slots without a text",
                          f"write null into {layout.texts_column!r} once for each picture")  # fmt: skip
    remaining = iter(pictures)
    return {**held, layout.images_column: [next(remaining) if text is None else None for text in texts]}


def _with_media(sample: Sample, change: Callable[[Image | Video], Image | Video]) -> Sample:
    def changed(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(part if isinstance(part, Text) else change(part) for part in parts)

    def branch(content: Conversation | Document) -> Conversation | Document:
        if isinstance(content, Document):
            return replace(content, parts=changed(content.parts))
        return replace(content, messages=tuple(replace(m, parts=changed(m.parts)) for m in content.messages))

    if isinstance(sample.content, Document):
        return replace(sample, content=Document(changed(sample.content.parts)))
    return replace(sample, content=tuple(map(branch, sample.content)))
