"""A row's pictures and videos, and the parts that its marks and blocks make of them and of text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lensmith.core.sample import Image, Part, Text, Video
from lensmith.data.formats.boxes import Objects
from lensmith.data.formats.common import (
    MAX_TEXT_BYTES,
    ChatOptions,
    Place,
    RowOptions,
    Turn,
    checked_flag,
    checked_list,
    checked_object,
    checked_text,
    required,
    wrong_type,
)

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
MEDIA_MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")

# --- references -------------------------------------------------------------------------------------------------------


def image_ref(value: object, place: Place) -> Image:
    """A picture as rows name it: a path or URL, encoded bytes, or Hugging Face's {bytes, path}."""
    found = _file(value, place, "picture", "a path, bytes or {bytes, path}")
    return Image(data=found) if isinstance(found, bytes) else Image(path=found)


def video_ref(value: object, place: Place, fps: float | None = None) -> Video:
    """A video as rows name it: a file, as pictures are named, or the list of its frames, which are pictures."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise place.error("SCHEMA", "holds no frames")
        return Video(frames=tuple(image_ref(frame, place.item(i)) for i, frame in enumerate(value)), fps=fps)
    found = _file(value, place, "video", "a path, bytes, {bytes, path} or a list of frames")
    return Video(data=found, fps=fps) if isinstance(found, bytes) else Video(path=found, fps=fps)


def _file(value: object, place: Place, noun: str, wanted: str) -> str | bytes:
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise wrong_type(value, place, wanted)
    if not value:
        raise place.error("SCHEMA", f"is empty, must name a {noun}")
    return value


_SYNONYMS = {"images": "image", "image": "images", "videos": "video", "video": "videos"}


def media_key(row: Mapping[str, Any], column: str, place: Place) -> str:
    """`column`, or its synonym where the row has only that. Raises DataError SCHEMA if the row has two lists.

    A picture is never passed over because the first row, which tells the layout, had none.
    """
    other = _SYNONYMS.get(column)
    if other is None or row.get(other) is None:
        return column
    if row.get(column) is None:
        return other
    if row[other] not in (row[column], [row[column]]) and [row[other]] != row[column]:
        noun = "pictures" if "image" in column else "videos"
        raise place.key(other).error("SCHEMA", f"there are other {noun} under {column!r}", "keep one of the two keys")
    return column


def entries(row: Mapping[str, Any], column: str, place: Place) -> list[tuple[object, Place]]:
    """What a row lists under a media column, or the one thing that stands there, with places."""
    column = media_key(row, column, place)
    value, place = row.get(column), place.key(column)
    if value is None:
        return []
    items = value if isinstance(value, (list, tuple)) else [value]
    return [(item, place.item(index)) for index, item in enumerate(items)]


# --- marks ------------------------------------------------------------------------------------------------------------


class MediaQueue:
    """Hands a row's pictures and videos out, each kind in its order, one for each mark that asks; counts the marks."""

    def __init__(self, images: Sequence[Image], videos: Sequence[Video], options: RowOptions):
        self._images = images
        self._videos = videos
        self._options = options
        self._images_asked = 0
        self._videos_asked = 0
        self.objects: Objects | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any], options: RowOptions, place: Place) -> MediaQueue:
        """The media of a row. Raises DataError MEDIA_KIND for rows with sound, SCHEMA."""
        if row.get("audios"):
            raise place.key("audios").error("MEDIA_KIND", "sound cannot be trained", "take these rows out")
        images = [image_ref(*entry) for entry in entries(row, options.images_column, place)]
        videos = [video_ref(*entry) for entry in entries(row, options.videos_column, place)]
        queue = cls(images, videos, options)
        queue.objects = Objects.of(row, options, place)
        return queue

    def again(self) -> MediaQueue:
        """The same media from the beginning, for another branch."""
        queue = MediaQueue(self._images, self._videos, self._options)
        queue.objects = None if self.objects is None else self.objects.again()
        return queue

    # a stand-in when there are too few: `settle` then refuses the row with the whole count

    def image(self) -> Image:
        self._images_asked += 1
        return self._images[self._images_asked - 1] if self._images_asked <= len(self._images) else Image(path="")

    def video(self) -> Video:
        self._videos_asked += 1
        return self._videos[self._videos_asked - 1] if self._videos_asked <= len(self._videos) else Video(path="")

    def in_front(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns with all pictures and videos in front of the first user turn, where no mark places any and the
        options ask for it."""
        front = isinstance(self._options, ChatOptions) and self._options.unplaced == "front"
        at = next((i for i, (_, m) in enumerate(turns) if m.role == "user"), None)
        if not front or at is None or self._images_asked or self._videos_asked:
            return turns
        place, message = turns[at]
        media: list[Part] = [*(self.image() for _ in self._images), *(self.video() for _ in self._videos)]
        return [*turns[:at], (place, replace(message, parts=(*media, *message.parts))), *turns[at + 1 :]]

    def settle(self, place: Place) -> None:
        """Raises DataError IMAGE_COUNT, VIDEO_COUNT unless there was one mark for each picture and each video, SCHEMA
        unless there was one for each box, of a picture that is there."""
        if self.objects is not None:
            self.objects.settle(place)
            if any(box.picture >= len(self._images) for box in self.objects.boxes):
                raise place.error("SCHEMA", f"a box is of a picture that is not there; there are {len(self._images)}")
        if self._images_asked != len(self._images):
            raise place.error("IMAGE_COUNT", f"{self._images_asked} image marks, {len(self._images)} pictures in "
                              f"{self._options.images_column!r}", f"write one {IMAGE_MARK} for each picture; if the "
                              "pictures are under another key, set images_column")  # fmt: skip
        if self._videos_asked != len(self._videos):
            raise place.error("VIDEO_COUNT", f"{self._videos_asked} video marks, {len(self._videos)} videos in "
                              f"{self._options.videos_column!r}", f"write one {VIDEO_MARK} for each video; if the "
                              "videos are under another key, set videos_column; where the word itself is meant, write "
                              "a list of blocks, whose text is plain")  # fmt: skip


def marked_parts(text: str, queue: MediaQueue, train: bool | None = None) -> list[Part]:
    """Text with `<image>` and `<video>` marks as text, pictures and videos. Every text gets the flag `train`."""
    parts: list[Part] = []
    for piece in MEDIA_MARKS.split(text):
        if piece == IMAGE_MARK:
            parts.append(queue.image())
        elif piece == VIDEO_MARK:
            parts.append(queue.video())
        elif piece:
            parts += [Text(piece, train)] if queue.objects is None else queue.objects.parts(piece, train)
    return parts


# --- blocks -----------------------------------------------------------------------------------------------------------


def block_parts(blocks: object, queue: MediaQueue, place: Place) -> list[Part]:
    """A list of {type: text | image | image_url | video | video_url} blocks. A mark inside their text is plain text."""
    items = enumerate(checked_list(blocks, place))
    parts = [block_part(item, queue, place.item(index)) for index, item in items]
    return [part for part in parts if not isinstance(part, Text) or part.text]


def block_part(value: object, queue: MediaQueue, place: Place, *, limit: int | None = MAX_TEXT_BYTES) -> Part:
    """The part of one block; a text may be empty. Raises DataError SCHEMA; Drop TEXT_BYTES above `limit` bytes."""
    block = checked_object(value, place)
    kind = required(block, "type", place)
    here = place.key(kind) if isinstance(kind, str) else place
    if kind == "text":
        return Text(
            checked_text(required(block, "text", place), here, limit=limit), checked_flag(block, "train", place)
        )
    if kind == "image":
        return queue.image() if block.get("image") is None else image_ref(block["image"], here)
    if kind == "image_url":
        return image_ref(*_link(block, kind, place))
    fps = _fps(block, place)
    if kind == "video" and block.get("video") is None:
        video = queue.video()
        return video if fps is None else replace(video, fps=fps)
    if kind == "video":
        return video_ref(block["video"], here, fps)
    if kind == "video_url":
        return video_ref(*_link(block, kind, place), fps)
    raise place.key("type").error("SCHEMA", f"{kind!r} is not one of text, image, image_url, video, video_url")


def _link(block: Mapping[str, Any], kind: str, place: Place) -> tuple[str, Place]:
    here = place.key(kind)
    url = required(checked_object(required(block, kind, place), here), "url", here)
    return checked_text(url, here.key("url"), limit=None), here.key("url")


def _fps(block: Mapping[str, Any], place: Place) -> float | None:
    """Frames a second, as the block says."""
    value = block.get("fps")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(value, place.key("fps"), "a number")
    if not 0 < value < float("inf"):
        raise place.key("fps").error("SCHEMA", f"is {value}, must be above 0")
    return float(value)
