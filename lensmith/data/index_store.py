"""The index of one file on disk: where it is kept, under what fingerprint, and which of its rows are out of date.

The fingerprint is of the file's content and of all that changes the counts. Pictures are files of their own: a sample
whose picture files changed since (by size and time), and one that was dropped and has pictures, is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lensmith.core.errors import ConfigError
from lensmith.core.version import VERSION as LENSMITH
from lensmith.data.index import SCHEMA
from lensmith.data.load import LoaderSpec

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

VERSION = 6
STORED_ROWS = 1 << 14
"""Rows of one batch in a stored index."""
KNOWN_FILES = 1 << 18
"""Picture files whose state is remembered while the stored samples are compared with them."""


def stored_at(spec: LoaderSpec, number: int, cache: Path) -> Path:
    return cache / f"index-{_fingerprint(spec, number, cache)}.arrow"


def open_stored(stored: Path) -> pa.Table:
    with pa.memory_map(str(stored)) as source:
        return pa.ipc.open_file(source).read_all()


def read_stored(stored: Path) -> pa.Table | None:
    if not stored.is_file():
        return None
    try:
        table = open_stored(stored)
    except (pa.ArrowException, OSError):  # cut short by a crash of the machine: as if it were not there
        return None
    return table if table.schema.equals(SCHEMA) else None


class Writer:
    """A stored index that appears when it is whole, in batches of `STORED_ROWS`."""

    def __init__(self, stored: Path):
        self.stored = stored
        self._temporary = stored.with_suffix(f".{os.getpid()}.tmp")
        self._given_up = False
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> Writer:
        with _CacheErrors(self.stored):
            self.stored.parent.mkdir(parents=True, exist_ok=True)
            self._out = pa.ipc.new_file(str(self._temporary), SCHEMA)
        return self

    def add(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        if sum(map(len, self._waiting)) >= STORED_ROWS:
            self._flush()

    def give_up(self) -> None:
        self._given_up = True

    def _flush(self) -> None:
        with _CacheErrors(self.stored):
            if self._waiting:
                self._out.write_table(pa.Table.from_batches(self._waiting).combine_chunks(), STORED_ROWS)
                self._waiting.clear()

    def __exit__(self, kind: Any, *exc: object) -> None:
        try:
            with _CacheErrors(self.stored):
                if kind is None and not self._given_up:
                    self._flush()
                    self._out.close()
                    os.replace(self._temporary, self.stored)
                else:
                    self._out.close()
        finally:
            self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _CacheErrors:
    stored: Path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            problem = f"the index cache cannot be written: {error.strerror or error}"
            remedy = "set data.cache to a folder with space"
            raise ConfigError("CACHE", problem, where=str(self.stored.parent), remedy=remedy) from None


def _fingerprint(spec: LoaderSpec, number: int, cache: Path) -> str:
    """Content of the file and everything that changes its counts, or whether its rows are read at all."""
    f = spec.files[number]
    said = {
        "version": [VERSION, LENSMITH], "family": repr(spec.family), "path": [f.path, f.shown], "base": f.base,
        "tokenizer": [spec.tokenizer_digest, spec.text_tokens], "roots": spec.roots,
        "format": f.format.model_dump() if f.format else None, "limits": spec.limits.model_dump(),
        "length": [spec.max_tokens, spec.too_long, spec.max_row_bytes], "max_samples": [f.max_samples, f.chosen],
        "videos": spec.videos.model_dump(), "dataset": [f.split, f.subset, f.revision],
        "documents": asdict(spec.documents), "line_feed": spec.train_line_feed,
        "first_resize": repr(spec.first_resize), "drop_wrong": spec.drop_wrong, "compare": spec.compare,
        "content": [_content(p, cache) for p in spec.open(number).content_files()],
    }  # fmt: skip
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _content(path: Path, cache: Path) -> str:
    """Hash of a file's content, remembered under its size and time: a terabyte is not read before every start."""
    found = path.stat()
    key = hashlib.blake2b(
        f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ino}".encode(), digest_size=16
    ).hexdigest()
    known = cache / f"content-{key}.txt"
    if known.is_file() and len(text := known.read_text()) == 32:
        return text
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    # a file written in the same tick of the clock could change without a trace: it is read again next time
    if os.stat(path).st_mtime_ns == found.st_mtime_ns and _settled(found.st_mtime_ns):
        with _CacheErrors(known):
            cache.mkdir(parents=True, exist_ok=True)
            temporary = known.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(h.hexdigest())
            os.replace(temporary, known)
    return h.hexdigest()


def _settled(mtime_ns: int) -> bool:
    return time.time_ns() - mtime_ns > 2_000_000_000


def changed_rows(table: pa.Table, decode: bool) -> np.ndarray | None:
    """Numbers of the rows to measure again; None for none. With `decode`, also those whose pictures were not."""
    states: dict[str, str] = {}  # samples of one picture are mostly neighbours
    found: list[int] = []
    for batch in table.select(["row", "verdict", "images", "videos", "handles", "stamp", "decoded"]).to_batches():
        shows = pc.or_(pc.greater(batch["images"], 0), pc.greater(batch["videos"], 0))
        unknown = pc.and_(shows, pc.invert(pc.fill_null(batch["decoded"], False)))
        again = batch.filter(unknown if decode else pc.and_(pc.equal(batch["verdict"], "drop"), unknown))
        found += again["row"].to_pylist()
        kept = batch.filter(batch["stamp"].is_valid())
        columns = (kept[name].to_pylist() for name in ("row", "handles", "stamp"))
        found += [row for row, handles, old in zip(*columns, strict=True) if stamp(handles, states) != old]
        if len(states) > KNOWN_FILES:
            states.clear()
    return np.unique(np.array(found, np.int64)) if found else None


def stamp(handles: Sequence[str], states: dict[str, str]) -> int | None:
    """64 bits over size and time of a sample's picture files; None for a sample without."""
    files = [h for h in handles if os.path.isabs(h)]
    for file in files:
        if file not in states:
            try:
                found = os.stat(file)
                states[file] = f"{found.st_size} {found.st_mtime_ns}"
            except OSError:
                states[file] = "gone"
    text = "\n".join(states[f] for f in files)
    return (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) if files else None
    )
