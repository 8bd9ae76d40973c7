"""From a row of a source to a sample, its tokens and its pictures. One `Loader` serves the index and the training.

A loader is cheap to build in a worker process and never shared between processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from lensmith.core.encoded import Encoded, ImageBlock, VideoInfo
from lensmith.core.errors import DataError, Drop
from lensmith.core.sample import Document, Image, Sample, Text, Video
from lensmith.data.encode import DocumentRules, Encoder, Placed
from lensmith.data.formats import Compare, Format, detect, parse_compared
from lensmith.data.media import ImageLimits, VideoLimits, is_data_url, parse_data_url, read_bytes, resolve_media
from lensmith.data.media_open import ImageInfo, open_rgb, probe, probe_file
from lensmith.data.readers import RowFile, RowRef, open_rows
from lensmith.data.resize import FirstResize
from lensmith.data.split import Cut
from lensmith.data.spool import SUFFIX as SPOOL
from lensmith.data.spool import SpoolRows
from lensmith.data.tokenizer import TextTokenizer
from lensmith.data.video import probe_video, read_frames

MOST_VIDEOS = 1 << 16
"""Videos of which a loader remembers what their containers say."""


@dataclass(frozen=True)
class SourceFile:
    """One data file of a source, with everything that decides how its rows read."""

    source: str
    path: str
    format: Format | None
    base: str
    weight: float = 1.0
    max_samples: int | None = None
    shown: str | None = None
    """The file's name in origins; left out, its path."""
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    """Of a Hugging Face dataset."""
    chosen: tuple[int, int] | None = None
    """So many rows, chosen at random by a seed; of these the first `max_samples`."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a sample is: its file, its row, and which piece of a document that was cut."""

    file: int
    row: RowRef
    cut: Cut | None = None


@dataclass
class Seen:
    """What was met in the pictures' headers while a sample was encoded."""

    notes: dict[str, None] = field(default_factory=dict[str, None])
    sizes: dict[Image, tuple[int, int]] = field(default_factory=dict[Image, tuple[int, int]])
    """Width and height of each picture."""


OPEN_FILES = 32
"""Source files that a process keeps open."""


@dataclass(frozen=True)
class LoaderSpec:
    """All a worker process needs to build a `Loader`."""

    files: tuple[SourceFile, ...]
    family: Any
    tokenizer_json: str
    roots: tuple[str, ...]
    limits: ImageLimits
    max_tokens: int
    too_long: str
    max_row_bytes: int
    text_tokens: tuple[str, ...] = ()
    documents: DocumentRules = field(default_factory=DocumentRules)
    videos: VideoLimits = field(default_factory=VideoLimits)
    decode: bool = False
    """Decode every picture while indexing, to find those that fail only then."""
    decode_timeout: float | None = None
    """Seconds in which a worker must have read a sample."""
    train_line_feed: bool = False
    first_resize: FirstResize | None = None
    """Of pictures, before the family sizes them."""
    drop_wrong: bool = False
    """Wrong rows are dropped, except those that reach where they may not."""
    compare: Compare | None = None
    """What an objective compares in the rows; None: every answer is to be learnt."""
    mismatched: bool = False
    """Read with each sample its prompt with the answer of another one of its step."""

    def build(self) -> Loader:
        return Loader(self)

    @cached_property
    def tokenizer_digest(self) -> str:
        """Asked for each of many files; the text has megabytes."""
        return hashlib.sha256(self.tokenizer_json.encode()).hexdigest()

    def open(self, file: int) -> RowFile:
        f = self.files[file]
        if f.path.endswith(SPOOL):
            return SpoolRows(Path(f.path))
        return open_rows(
            f.path, name=f.shown, max_row_bytes=self.max_row_bytes, split=f.split, subset=f.subset, revision=f.revision
        )


class Loader:
    def __init__(self, spec: LoaderSpec):
        self.spec = spec
        # a family without such tokens need not say so
        own: tuple[str, ...] = getattr(spec.family, "text_tokens", ())
        self.tokenizer = TextTokenizer(spec.tokenizer_json, (*spec.text_tokens, *own))
        self._rows: dict[int, RowFile] = {}
        self._formats: dict[int, Format] = {i: f.format for i, f in enumerate(spec.files) if f.format is not None}
        self._roots = [Path(r) for r in spec.roots]
        self._found_for = ""
        self._found: dict[tuple[int, str], Path] = {}
        self._videos: dict[tuple[str, int, int], VideoInfo] = {}

    def rows(self, file: int) -> RowFile:
        """The reader of a file. Those used last stay open: a source may have more files than a process may open, and of
        Parquet each holds a row group."""
        found = self._rows.pop(file, None) or self.spec.open(file)
        self._rows[file] = found
        if len(self._rows) > OPEN_FILES:
            self._rows.pop(next(iter(self._rows))).close()
        return found

    def sample(self, file: int, ref: RowRef) -> Sample:
        """Raises `DataError` for a row that is wrong and `Drop` for one that cannot be trained."""
        rows = self.rows(file)
        row = rows.read(ref)
        self.detect(file)
        return self.parse(file, row, rows.origin(ref))

    def parse(self, file: int, row: dict[str, Any], origin: str) -> Sample:
        """A row of a file whose format is settled."""
        if self.spec.compare is not None:
            return parse_compared(self._formats[file], row, origin, self.spec.compare)
        sample = self._formats[file].parse(row, origin)
        if row.get("label") is False:
            return replace(sample, notes=(*sample.notes, "labelled_false"))
        return sample

    def use(self, files: tuple[SourceFile, ...]) -> None:
        """Read other files of the same sources from now on (the next window of a stream)."""
        if files != self.spec.files:
            for rows in self._rows.values():
                rows.close()
            self._rows.clear()
            self.spec = replace(self.spec, files=files)

    def detect(self, file: int) -> None:
        """Settle the format of a file: as the run file says, else by its first row that can be read.

        Never by the row at hand: processes read different rows first. Raises DataError UNKNOWN_FORMAT.
        """
        rows = self.rows(file)
        for ref in rows.scan() if file not in self._formats else ():
            try:
                row = rows.read(ref)
            except DataError:  # reported when this row is measured
                continue
            self._formats[file] = detect(row, rows.origin(ref), self.spec.compare)
            return

    def encode(self, file: int, sample: Sample, cut: Cut | None = None) -> Encoded:
        """Raises `Drop` as `Encoder.encode` does, and IMG_COUNT."""
        self._count_images(sample)
        return self.encoder(file, sample.origin).encode(sample, cut)

    def pieces(self, file: int, sample: Sample, seen: Seen) -> list[tuple[Cut | None, Encoded | Drop]]:
        """The sample, or each piece of a document that is cut; `Drop` for a piece that cannot be trained."""
        self._count_images(sample)
        return self.encoder(file, sample.origin, seen).pieces(sample)

    def _count_images(self, sample: Sample) -> None:
        limit, count = self.spec.limits.max_images, sample.most_images()
        splits = isinstance(sample.content, Document) and self.spec.documents.too_long == "split"
        if count > limit and not splits:
            raise Drop("IMG_COUNT", f"{count} images > data.image.max_images = {limit}")

    def encoder(self, file: int, origin: str, seen: Seen | None = None) -> Encoder:
        headers: dict[Image, ImageInfo] = {}
        videos: dict[int, VideoInfo] = {}

        def info(video: Video) -> VideoInfo:
            if id(video) not in videos:
                videos[id(video)] = self.video_info(file, video, origin)
            return videos[id(video)]

        def size(image: Image) -> tuple[int, int]:
            if image not in headers:
                headers[image] = self.header(file, image, origin)
            info = headers[image]
            if seen is not None:
                seen.notes.update(dict.fromkeys(info.notes))
                seen.sizes[image] = info.width, info.height
            return self._first_size(info.width, info.height)

        spec = self.spec
        rules = replace(spec.documents, max_images=spec.limits.max_images)
        return Encoder(
            spec.family, self.tokenizer, size, spec.max_tokens, spec.too_long, rules, info,  # type: ignore[arg-type]
            spec.train_line_feed,
        )  # fmt: skip

    def _first_size(self, width: int, height: int) -> tuple[int, int]:
        return (width, height) if self.spec.first_resize is None else self.spec.first_resize(width, height)

    def header(self, file: int, image: Image, origin: str) -> ImageInfo:
        """Size, format and notes from the header of a picture; no pixel is decoded."""
        if image.data is not None:
            return probe(image.data, self.spec.limits)
        assert image.path is not None
        if is_data_url(image.path):
            return probe(parse_data_url(image.path, self.spec.limits), self.spec.limits)
        return probe_file(self.path(file, image.path, origin), self.spec.limits)

    def path(self, file: int, path: str, origin: str) -> Path:
        """Where a picture is. Remembered for the sample at hand: its branches name the same pictures."""
        if self._found_for != origin:
            self._found_for, self._found = origin, {}
        if (file, path) not in self._found:
            base = Path(self.spec.files[file].base)
            self._found[(file, path)] = resolve_media(path, [base, *self._roots], origin, base)
        return self._found[(file, path)]

    def handle(self, file: int, image: Image | Video, origin: str) -> str:
        """A cheap identity: where the picture is, or its bytes. Equal handles mean the same picture."""
        return "\n".join(self.handles(file, image, origin))

    def handles(self, file: int, image: Image | Video, origin: str) -> list[str]:
        """One handle for each file of a picture or video: a video may be given as its frames."""
        if isinstance(image, Video) and image.frames:
            return [handle for frame in image.frames for handle in self.handles(file, frame, origin)]
        if image.data is not None:
            return [hashlib.blake2b(image.data, digest_size=16).hexdigest()]
        assert image.path is not None
        if is_data_url(image.path):
            return [hashlib.blake2b(image.path.encode(), digest_size=16).hexdigest()]
        return [str(self.path(file, image.path, origin))]

    def bytes_of(self, file: int, image: Image, origin: str) -> bytes:
        if image.data is not None:
            return image.data
        assert image.path is not None
        if is_data_url(image.path):
            return parse_data_url(image.path, self.spec.limits)
        return read_bytes(self.path(file, image.path, origin), self.spec.limits)

    def patches(self, data: bytes, blocks: Sequence[ImageBlock]) -> list[np.ndarray]:
        """uint8 [P, D] of each of these blocks of one picture, which is decoded once. Raises `Drop` when it does not
        decode or no longer has the size of its header."""
        family = self.spec.family
        picture, _ = open_rgb(data, self.spec.limits)
        if (first := self._first_size(*picture.size)) != picture.size:
            picture = picture.resize(first)
        placed = [p.block for p in family.place_image(blocks[0].image, *picture.size) if isinstance(p, Placed)]
        if not all(block in placed for block in blocks):
            raise Drop("CHANGED", f"the picture is now {picture.size[0]}x{picture.size[1]}")
        return [family.patches(picture, block) for block in blocks]

    # -- videos -------------------------------------------------------------------------------------------------

    def video_info(self, file: int, video: Video, origin: str) -> VideoInfo:
        """What a video holds. Raises `Drop` as `probe_video` does, and VIDEO_MISSING, VIDEO_READ; of a video that is
        given as its frames what `header` raises, and VIDEO_FRAMES. ConfigError EXTRA."""
        if video.frames:
            headers = [self.header(file, frame, origin) for frame in video.frames]
            sizes = dict.fromkeys((h.width, h.height) for h in headers)
            if len(sizes) > 1:
                (width, height), (other_width, other_height), *_ = sizes
                raise Drop("VIDEO_FRAMES", f"a frame of {width}x{height} and one of {other_width}x{other_height}")
            return VideoInfo(headers[0].width, headers[0].height, len(headers), video.fps or 0.0)
        with _of_videos():
            source = self._video_file(file, video, origin)
            if isinstance(source, bytes):
                return probe_video(source, self.spec.videos, self.spec.limits)
            stat = source.stat()
            known = str(source), stat.st_size, stat.st_mtime_ns
            if known not in self._videos:  # every epoch asks again, and a container is read to its end to answer
                if len(self._videos) >= MOST_VIDEOS:
                    self._videos.clear()
                self._videos[known] = probe_video(source, self.spec.videos, self.spec.limits)
            return self._videos[known]

    def video_patches(self, file: int, blocks: Sequence[ImageBlock], origin: str) -> list[np.ndarray]:
        """uint8 [P, D] of each of these blocks of one video, whose frames are decoded once. Raises `Drop` as
        `read_frames` and `open_rgb` do."""
        family, video = self.spec.family, blocks[0].image
        assert isinstance(video, Video)
        wanted = sorted({n for block in blocks for n in block.frames})
        first = family.video.first
        frames = {
            n: family.resized(p if first is None else p.resize(first(*p.size)), blocks[0])
            for n, p in self._frames(file, video, wanted, origin)
        }
        return [family.video_patches([frames[n] for n in block.frames], block) for block in blocks]

    def _frames(
        self, file: int, video: Video, wanted: Sequence[int], origin: str
    ) -> Iterator[tuple[int, PIL.Image.Image]]:
        if not video.frames:
            with _of_videos():
                yield from read_frames(self._video_file(file, video, origin), wanted, self.spec.videos)
            return
        for n in wanted:
            yield n, open_rgb(self.bytes_of(file, video.frames[n], origin), self.spec.limits)[0]

    def _video_file(self, file: int, video: Video, origin: str) -> bytes | Path:
        if video.data is not None:
            return video.data
        assert video.path is not None
        if is_data_url(video.path):
            raise Drop("VIDEO_FORMAT", "a data: URL; write the video as a file, or its bytes in Parquet")
        return self.path(file, video.path, origin)


@contextmanager
def _of_videos() -> Iterator[None]:
    """What is wrong with the file of a video is said of a video."""
    try:
        yield
    except Drop as drop:
        if drop.reason == "IMG_MISSING":
            raise Drop("VIDEO_MISSING", drop.detail) from None
        if drop.reason == "IMG_READ":
            raise Drop("VIDEO_READ", drop.detail) from None
        raise


def content_key(data: bytes) -> str:
    """The identity of a picture's bytes, for the vision cache."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def portable(handle: str, bases: Sequence[str]) -> str:
    """A picture's handle without the folder its source counts from, so that data may move to another place."""
    return next((handle[len(base) + 1 :] for base in bases if handle.startswith(base + "/")), handle)


def said_by(sample: Sample) -> bytes:
    """Everything a sample says but its pictures."""
    said = _texts(sample.content)
    if sample.preference is not None:
        said = [said, sample.preference]
    return repr(said).encode("utf-8", "surrogatepass")


def digest_of(said: bytes, handles: Sequence[str], cut: Cut | None = None) -> int:
    """64 bits over what a sample (or a piece of it) says and shows; `handles` as `portable` gives them."""
    h = hashlib.blake2b(said, digest_size=8)
    h.update(repr(list(handles)).encode("utf-8", "surrogatepass"))
    if cut is not None:
        h.update(repr(cut).encode())
    return int.from_bytes(h.digest(), "little", signed=True)


def look_of(handles: Sequence[str]) -> int:
    """64 bits that are equal for samples that show the same pictures in the same order; 0 without pictures."""
    text = "\0".join(handles).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True) or 1 if handles else 0


def id_hash(text: str | None) -> int:
    """64 bits of a row's id; 0 for none."""
    if text is None:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) or 1


def _texts(content: Any) -> Any:
    """Texts, what of them is trained, roles, calls and tools; pictures only by their place."""
    branches = content if isinstance(content, tuple) else (content,)
    return [
        _parts(b.parts)
        if isinstance(b, Document)
        else (b.tools, [(m.role, m.trained, _parts(m.parts), m.tool_calls) for m in b.messages])
        for b in branches
    ]


def _parts(parts: Sequence[Any]) -> list[Any]:
    return [(p.text, p.train) if isinstance(p, Text) else None for p in parts]
