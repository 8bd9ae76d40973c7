"""What stands twice: pictures by their bytes, texts, whole samples; and pictures of one colour or without pixels.

Every row is read once and every picture once, by several processes. What is kept of a row, a text or a picture is 64
bits in an array, so a million samples cost some tens of megabytes. Equal bits are taken for equal bytes: among ten
million pictures a wrong pair is expected in three of a million runs.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute

from lensmith.core.errors import Drop, RunError
from lensmith.core.sample import Image, Video
from lensmith.data.index import Index
from lensmith.data.load import Loader, LoaderSpec, portable, said_by
from lensmith.data.media_open import open_rgb
from lensmith.data.readers import RowRef
from lensmith.data.workers import Workers

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

Record = dict[str, Any]
Progress = Callable[[int], None]
"""Told how many more samples are done."""

CHUNK = 64
PARALLEL_FROM = 256
"""Below this many rows one process is faster than starting several."""
SHOWN = 10
"""Groups, and places of one kind, that are named."""
SHOWN_ORIGINS = 3
FINE, ONE_COLOUR = 0, 1
"""Flags of a picture; from 2 on it did not decode, and the flag stands for the reason."""


# --- what was read ----------------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """Handle of each picture read so far -> its bytes and its flag. Stages of a curriculum share it."""

    handles: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Sorted."""
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    flags: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    reasons: list[str] = field(default_factory=list[str])

    def known(self, handles: np.ndarray) -> np.ndarray:
        return self.handles[self._at(handles)] == handles if len(self.handles) else np.zeros(len(handles), bool)

    def add(self, found: Sequence[_Picture]) -> None:
        flags = [p.reason if isinstance(p.reason, int) else self._flag(p.reason) for p in found]
        handles = np.concatenate([self.handles, np.array([p.handle for p in found], np.uint64)])
        contents = np.concatenate([self.contents, np.array([p.content for p in found], np.uint64)])
        order = np.argsort(handles, kind="stable")
        self.handles, self.contents = handles[order], contents[order]
        self.flags = np.concatenate([self.flags, np.array(flags, np.uint16)])[order]

    def _flag(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return 2 + self.reasons.index(reason)

    def content(self, handles: np.ndarray) -> np.ndarray:
        """A picture that was not read is like no other."""
        if not len(self.handles):
            return handles
        return np.where(self.known(handles), self.contents[self._at(handles)], handles)

    def flag(self, handles: np.ndarray) -> np.ndarray:
        if not len(self.handles):
            return np.full(len(handles), FINE, np.uint16)
        return np.where(self.known(handles), self.flags[self._at(handles)], FINE)

    def _at(self, handles: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(self.handles, handles), len(self.handles) - 1)


@dataclass
class Hashed:
    """The rows of an index: each row once, whatever pieces it was cut into."""

    index: Index
    numbers: np.ndarray
    """Of the first trainable sample of each row."""
    sources: np.ndarray
    texts: np.ndarray
    samples: np.ndarray
    """Text and pictures, in their order."""
    shown: np.ndarray
    """Handles of pictures, once for each sample that shows them."""
    shown_by: np.ndarray
    """The numbers of these samples."""

    def origin(self, number: int) -> str:
        """Of the row."""
        piece, pieces = self.index.value(number, "piece"), self.index.value(number, "pieces")
        return self.index.origin(number).removesuffix(f"[{(piece or 0) + 1}/{pieces}]")

    def file(self, handle: int, number: int) -> str:
        """Where a picture that a sample shows is; empty where it is in the row itself."""
        bases = [f.base for f in self.index.spec.files]
        found = next((h for h in self.index.handles(number) if _bits(h.encode("utf-8", "surrogatepass")) == handle), "")
        return portable(found.split("\n")[0], bases) if os.path.isabs(found) else ""


def hash_index(index: Index, contents: Contents, *, workers: int = 1, progress: Progress | None = None) -> Hashed:
    """Read every row, and every picture that `contents` does not know. Raises `UserError` as the loader does."""
    shown, shown_by = _handles(index)
    first = np.zeros(len(shown), bool)
    first[np.unique(shown, return_index=True)[1]] = True
    first &= ~contents.known(shown)
    numbers: list[int] = []
    texts: list[int] = []
    counts: list[np.ndarray] = []
    media: list[np.ndarray] = []
    pictures: list[_Picture] = []
    done = 0
    for begin, stop, found in _spread(index, _wanted(index, shown[first], shown_by[first]), workers):
        numbers += begin
        texts += found.texts
        counts.append(np.array(found.counts, np.int64))
        media.append(np.array(found.media, np.uint64))
        pictures += found.pictures
        if progress is not None:
            progress(stop - done)
            done = stop
        if len(pictures) >= 1 << 16:
            contents.add(pictures)
            pictures = []
    contents.add(pictures)
    said = np.array(texts, np.uint64)
    shows = contents.content(np.concatenate([np.zeros(0, np.uint64), *media]))
    own = np.array(numbers, np.int64)
    both = mixed(said, np.concatenate([np.zeros(0, np.int64), *counts]), shows)
    return Hashed(index, own, index.column("source")[own], said, both, shown, shown_by)


def mixed(texts: np.ndarray, counts: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """64 bits of each text with the `counts` contents that belong to it, which depend on their order."""
    ends = np.cumsum(counts)
    place = (np.arange(len(contents)) - np.repeat(ends - counts, counts)).astype(np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_stirred(contents + place * _STEP), dtype=np.uint64)])
    return _stirred(texts ^ _stirred(sums[ends] - sums[ends - counts] + counts.astype(np.uint64)))


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _stirred(values: np.ndarray) -> np.ndarray:
    """splitmix64's last part (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _bits(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _handles(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """(handle, number of a sample that shows it), sample by sample."""
    shown, by = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    begin = 0
    for _, _, batch in index.batches(["verdict", "handles"]):
        own = batch.filter(pc.equal(batch["verdict"], "train"))
        each = pc.list_flatten(own["handles"]).dictionary_encode()
        bits = np.array([_bits(h.encode("utf-8", "surrogatepass")) for h in each.dictionary.to_pylist()], np.uint64)
        shown.append(bits[each.indices.to_numpy(zero_copy_only=False)])
        by.append(pc.list_parent_indices(own["handles"]).to_numpy(zero_copy_only=False) + begin)
        begin += len(own)
    return np.concatenate(shown), np.concatenate(by)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    stop: int
    """The number behind its last piece."""
    file: int
    ref: RowRef
    wanted: frozenset[int]
    """Pictures to read."""


@dataclass(frozen=True, slots=True)
class _Picture:
    handle: int
    content: int
    reason: int | str
    """A flag, or why it did not decode."""


@dataclass
class _Found:
    texts: list[int] = field(default_factory=list[int])
    counts: list[int] = field(default_factory=list[int])
    media: list[int] = field(default_factory=list[int])
    """Handles, row by row."""
    pictures: list[_Picture] = field(default_factory=list[_Picture])


def _wanted(index: Index, handles: np.ndarray, numbers: np.ndarray) -> Iterator[_Row]:
    """Each row that trains, with the pictures that are to be read of it."""
    for file, ref, begin, stop in _rows(index):
        own = slice(*np.searchsorted(numbers, [begin, stop]).tolist())
        yield _Row(begin, stop, file, ref, frozenset(handles[own].tolist()))


def _rows(index: Index) -> Iterator[tuple[int, RowRef, int, int]]:
    """(file, row, number of its first sample, number behind its last); pieces of a document are neighbours."""
    number = begin = 0
    before: tuple[int, RowRef] | None = None
    for file, _, batch in index.batches(["verdict", "row", "line", "offset", "length"]):
        own = batch.filter(pc.equal(batch["verdict"], "train"))
        for values in zip(*(own[name].to_pylist() for name in ("row", "line", "offset", "length")), strict=True):
            at = file, RowRef(*values)
            if at != before:
                if before is not None:
                    yield *before, begin, number
                before, begin = at, number
            number += 1
    if before is not None:
        yield *before, begin, number


def _spread(index: Index, rows: Iterable[_Row], workers: int) -> Iterator[tuple[list[int], int, _Found]]:
    """(numbers, number behind the last, what was found) of each chunk, in order."""
    iterator = iter(rows)
    chunks = iter(lambda: list(islice(iterator, CHUNK)), [])
    if workers < 2 or len(index.trainable) < PARALLEL_FROM:
        loader = index.spec.build()
        for chunk in chunks:
            yield [row.number for row in chunk], chunk[-1].stop, _read(loader, chunk)
        return
    waiting: deque[tuple[list[int], int, Future[_Found]]] = deque()
    pool = Workers(workers, _start, (index.spec,))
    try:
        for chunk in chunks:
            waiting.append(([row.number for row in chunk], chunk[-1].stop, pool.submit(_work, chunk)))
            if len(waiting) > 4 * workers:
                numbers, stop, future = waiting.popleft()
                yield numbers, stop, future.result()
        while waiting:
            numbers, stop, future = waiting.popleft()
            yield numbers, stop, future.result()
    except BrokenProcessPool:
        raise RunError("DATA_WORKER", "a process that reads the pictures died",
                       remedy="look for an out-of-memory kill; lower data.image.max_pixels") from None  # fmt: skip
    finally:
        pool.shutdown()


_worker: dict[str, Loader] = {}


def _start(spec: LoaderSpec) -> None:
    _worker["loader"] = spec.build()


def _work(rows: list[_Row]) -> _Found:
    return _read(_worker["loader"], rows)


def _read(loader: Loader, rows: Sequence[_Row]) -> _Found:
    found = _Found()
    for row in rows:
        sample = loader.sample(row.file, row.ref)
        media = [m for part in sample.media() for m in (part.frames if isinstance(part, Video) else ()) or (part,)]
        wanted = set(row.wanted)
        found.texts.append(_bits(said_by(sample)))
        found.counts.append(len(media))
        for part in media:
            handle = _bits(loader.handle(row.file, part, sample.origin).encode("utf-8", "surrogatepass"))
            found.media.append(handle)
            if handle in wanted:
                wanted.discard(handle)
                found.pictures.append(_Picture(handle, *_look(loader, row.file, part, sample.origin, handle)))
    return found


def _look(loader: Loader, file: int, part: Image | Video, origin: str, handle: int) -> tuple[int, int | str]:
    """(content, flag or reason). What cannot be read has no content but its handle."""
    try:
        if isinstance(part, Video):
            return _film(loader, file, part, origin), FINE
        data = loader.bytes_of(file, part, origin)
    except Drop as drop:
        return handle, drop.reason
    except OSError:
        return handle, "VIDEO_READ"
    try:
        extrema = open_rgb(data, loader.spec.limits)[0].getextrema()
    except Drop as drop:
        return _bits(data), drop.reason
    return _bits(data), ONE_COLOUR if all(low == high for low, high in extrema) else FINE  # type: ignore[misc]


def _film(loader: Loader, file: int, video: Video, origin: str) -> int:
    """A video by its file; none of its frames is decoded."""
    if video.data is not None:
        return _bits(video.data)
    assert video.path is not None
    with open(loader.path(file, video.path, origin), "rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=8)).digest()
    return int.from_bytes(digest, "little")


# --- what was found ---------------------------------------------------------------------------------------------------


def findings(hashed: Hashed, contents: Contents) -> Record:
    """What stands twice on one side of the split, and which pictures are of one colour or do not decode."""
    handles, first = np.unique(hashed.shown, return_index=True)
    by, flags, content = hashed.shown_by[first], contents.flag(handles), contents.content(handles)
    order = np.argsort(by, kind="stable")
    handles, by, flags, content = handles[order], by[order], flags[order], content[order]
    twice = _twice(content)
    sources = hashed.index.column("source")
    return {
        "pictures": {
            "files": len(handles),
            "distinct": len(handles) - twice.extra,
            "copies": twice.extra,
            "across_sources": _across(contents.content(hashed.shown), sources[hashed.shown_by]),
            "first": [
                {
                    "count": len(at),
                    "origins": [hashed.origin(int(by[n])) for n in at[:SHOWN_ORIGINS]],
                    "files": [hashed.file(int(handles[n]), int(by[n])) for n in at[:SHOWN_ORIGINS]],
                }
                for at in twice.shown()
            ],
        },
        "texts": _repeated(hashed, hashed.texts),
        "samples": _repeated(hashed, hashed.samples),
        "one_colour": _flagged(hashed, handles, by, flags == ONE_COLOUR),
        "undecodable": {
            reason: _flagged(hashed, handles, by, flags == 2 + number)
            for number, reason in enumerate(contents.reasons)
            if (flags == 2 + number).any()
        },
    }


def crossings(train: Hashed, held: Hashed, contents: Contents) -> Record:
    """What stands on both sides of the split."""
    seen, shown = contents.content(train.shown), contents.content(held.shown)
    both = np.isin(shown, seen)
    samples = np.flatnonzero(np.isin(held.samples, train.samples))
    pairs: list[Record] = []
    for content in dict.fromkeys(shown[both][: 64 * SHOWN].tolist()):
        here, there = int(np.argmax(shown == content)), int(np.argmax(seen == content))
        pairs.append({"held_out": held.origin(int(held.shown_by[here])),
                      "train": train.origin(int(train.shown_by[there]))})  # fmt: skip
        if len(pairs) == SHOWN:
            break
    return {
        "pictures": len(np.unique(shown[both])),
        "samples_with_pictures": len(np.unique(held.shown_by[both])),
        "first_pictures": pairs,
        "samples": len(samples),
        "first_samples": [
            {
                "held_out": held.origin(int(held.numbers[n])),
                "train": train.origin(int(train.numbers[np.argmax(train.samples == held.samples[n])])),
            }
            for n in samples[:SHOWN]
        ],
    }


def _repeated(hashed: Hashed, values: np.ndarray) -> Record:
    twice = _twice(values)
    return {
        "rows": len(values),
        "distinct": len(values) - twice.extra,
        "repeats": twice.extra,
        "across_sources": _across(values, hashed.sources),
        "first": [
            {"count": len(at), "origins": [hashed.origin(int(hashed.numbers[n])) for n in at[:SHOWN_ORIGINS]]}
            for at in twice.shown()
        ],
    }


def _flagged(hashed: Hashed, handles: np.ndarray, by: np.ndarray, mask: np.ndarray) -> Record:
    """`by` in ascending order."""
    rows = hashed.shown_by[np.isin(hashed.shown, handles[mask])]
    return {
        "pictures": int(mask.sum()),
        "samples": len(np.unique(rows)),
        "first": [hashed.origin(int(n)) for n in by[mask][:SHOWN]],
    }


@dataclass(frozen=True)
class _Twice:
    values: np.ndarray
    extra: int
    """Values that stood before."""
    largest: list[int]
    """One place in each of the largest groups, largest first, then in the order of their first."""

    def shown(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.values == self.values[at]) for at in self.largest]


def _twice(values: np.ndarray) -> _Twice:
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    groups = np.flatnonzero(counts > 1)
    order = groups[np.lexsort((first[groups], -counts[groups]))][:SHOWN]
    return _Twice(values, len(values) - len(counts), first[order].tolist())


def _across(values: np.ndarray, sources: np.ndarray) -> int:
    """Values that stand in more than one source."""
    if not len(values):
        return 0
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0]))
    own = sources[order]
    return int((np.minimum.reduceat(own, starts) != np.maximum.reduceat(own, starts)).sum())
