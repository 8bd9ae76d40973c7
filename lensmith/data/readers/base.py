"""What all readers share: a row's place, the protocol of a source file, files read at random by offset."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lensmith.core.errors import DataError
from lensmith.data.strict_json import LAYOUT

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".parquet", ".tar")
MAX_ROW_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RowRef:
    """A row's place: 0-based number, 1-based line (where a file has no lines: number + 1), bytes in the file (else -1).

    The bytes of an element of a JSON array may end in white space; those of a tar row include its headers.
    """

    number: int
    line: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A row read in passing: 0-based number in its shard, origin, and either the row or what is wrong with it."""

    number: int
    origin: str
    row: dict[str, Any] | None
    error: DataError | None = None


class RowFile(Protocol):
    """One source file. Picklable, and safe to use on both sides of a fork; `close` only frees what `read` opened."""

    notes: tuple[str, ...]
    """What was accepted but should be counted: `bom`."""

    def scan(self) -> Iterator[RowRef]:
        """Find the rows in order, without parsing them. Raises DataError NO_ROWS, ROW_BYTES, JSON, PARQUET, TAR,
        DATASET."""
        ...

    def read(self, ref: RowRef) -> dict[str, Any]:
        """Parse one row. Raises DataError as `parse_json` does, SCHEMA if the row is no object, ROW_BYTES, and what
        `scan` raises."""
        ...

    def origin(self, ref: RowRef) -> str: ...

    def content_files(self) -> list[Path]:
        """The local files that hold the rows, in order: equal bytes there mean equal rows."""
        ...

    def close(self) -> None: ...


class OnDisk:
    """A local file whose rows are ranges of bytes."""

    def __init__(self, path: Path, name: str, max_row_bytes: int):
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._name = name
        self._max_row_bytes = max_row_bytes
        self._open: tuple[int, weakref.finalize[Any, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def origin(self, ref: RowRef) -> str:
        return f"{self._name}:{ref.line}"

    def content_files(self) -> list[Path]:
        return [self.path]

    def close(self) -> None:
        if self._open is not None:
            self._open[1]()
            self._open = None

    def _bytes(self, ref: RowRef) -> bytes:
        if self._open is None:
            descriptor = os.open(self.path, os.O_RDONLY)
            self._open = descriptor, weakref.finalize(self, os.close, descriptor)
        # pread, not seek + read: forked workers share the file position of their parent
        return os.pread(self._open[0], ref.length, ref.offset)


def no_rows(name: str, what: str = "the file holds no rows") -> DataError:
    return DataError("NO_ROWS", what, where=name, remedy="take it out of the run file or fill it")


def too_long(where: str, max_row_bytes: int, remedy: str = LAYOUT) -> DataError:
    return DataError("ROW_BYTES", f"the row is longer than {max_row_bytes:,} bytes", where=where, remedy=remedy)
