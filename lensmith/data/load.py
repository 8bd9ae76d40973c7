"""From a row of a source to a sample, its tokens and its pictures. One `Loader` serves the index and the training.

A loader is cheap to build in a worker process and never shared between processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lensmith.core.encoded import Encoded, ImageBlock
from lensmith.core.errors import DataError, Drop
from lensmith.core.sample import Document, Image, Sample, Text
from lensmith.data.encode import Encoder
from lensmith.data.formats import Format, detect
from lensmith.data.media import ImageLimits, is_data_url, parse_data_url, read_bytes, resolve_media
from lensmith.data.media_open import ImageInfo, open_rgb, probe, probe_file
from lensmith.data.readers import RowFile, RowRef, open_rows
from lensmith.data.tokenizer import TextTokenizer


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

    def build(self) -> Loader:
        return Loader(self)


class Loader:
    def __init__(self, spec: LoaderSpec):
        self.spec = spec
        self.tokenizer = TextTokenizer(spec.tokenizer_json, spec.text_tokens)
        self._rows: dict[int, RowFile] = {}
        self._formats: dict[int, Format] = {i: f.format for i, f in enumerate(spec.files) if f.format is not None}
        self._roots = [Path(r) for r in spec.roots]
        self._found_for = ""
        self._found: dict[tuple[int, str], Path] = {}

    def rows(self, file: int) -> RowFile:
        if file not in self._rows:
            f = self.spec.files[file]
            self._rows[file] = open_rows(Path(f.path), name=f.shown, max_row_bytes=self.spec.max_row_bytes)
        return self._rows[file]

    def sample(self, file: int, ref: RowRef) -> Sample:
        """Raises `DataError` for a row that is wrong and `Drop` for one that cannot be trained."""
        rows = self.rows(file)
        row = rows.read(ref)
        self.detect(file)
        return self._formats[file].parse(row, rows.origin(ref))

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
            self._formats[file] = detect(row, rows.origin(ref))
            return

    def encode(self, file: int, sample: Sample, notes: dict[str, None] | None = None) -> Encoded:
        """`notes` gathers the notes of the pictures' headers."""
        limit, count = self.spec.limits.max_images, sample.most_images()
        if count > limit:
            raise Drop("IMG_COUNT", f"{count} images > data.image.max_images = {limit}")
        return self.encoder(file, sample.origin, notes).encode(sample)

    def encoder(self, file: int, origin: str, notes: dict[str, None] | None = None) -> Encoder:
        headers: dict[Image, ImageInfo] = {}

        def size(image: Image) -> tuple[int, int]:
            if image not in headers:
                headers[image] = self.header(file, image, origin)
            info = headers[image]
            if notes is not None:
                notes.update(dict.fromkeys(info.notes))
            return info.width, info.height

        return Encoder(self.spec.family, self.tokenizer, size, self.spec.max_tokens, self.spec.too_long)  # type: ignore[arg-type]

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

    def handle(self, file: int, image: Image, origin: str) -> str:
        """A cheap identity: where the picture is, or its bytes. Equal handles mean the same picture."""
        if image.data is not None:
            return hashlib.blake2b(image.data, digest_size=16).hexdigest()
        assert image.path is not None
        if is_data_url(image.path):
            return hashlib.blake2b(image.path.encode(), digest_size=16).hexdigest()
        return str(self.path(file, image.path, origin))

    def bytes_of(self, file: int, image: Image, origin: str) -> bytes:
        if image.data is not None:
            return image.data
        assert image.path is not None
        if is_data_url(image.path):
            return parse_data_url(image.path, self.spec.limits)
        return read_bytes(self.path(file, image.path, origin), self.spec.limits)

    def patches(self, data: bytes, block: ImageBlock) -> np.ndarray:
        """uint8 [P, D]. Raises `Drop` when the picture does not decode or no longer has the size of its header."""
        picture, _ = open_rgb(data, self.spec.limits)
        placed = self.spec.family.place(block.image, *picture.size)
        if placed.grid_thw != block.grid_thw:
            raise Drop("CHANGED", f"the picture is now {picture.size[0]}x{picture.size[1]}")
        return self.spec.family.patches(picture, block)


def content_key(data: bytes) -> str:
    """The identity of a picture's bytes, for the vision cache."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def portable(handle: str, bases: Sequence[str]) -> str:
    """A picture's handle without the folder its source counts from, so that data may move to another place."""
    return next((handle[len(base) + 1 :] for base in bases if handle.startswith(base + "/")), handle)


def digest_of(sample: Sample, handles: Sequence[str]) -> int:
    """64 bits over everything a sample says; `handles` as `portable` gives them."""
    h = hashlib.blake2b(digest_size=8)
    h.update(repr(_texts(sample.content)).encode("utf-8", "surrogatepass"))
    h.update(repr(list(handles)).encode("utf-8", "surrogatepass"))
    return int.from_bytes(h.digest(), "little", signed=True)


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
