"""Rows of JSON, JSONL and Parquet files: found cheaply, read one at a time, parsed strictly, always with their place.

Nothing here holds a whole JSON file: `scan` streams and `read` takes the bytes of one row. A Parquet file is held one
row group at a time.
"""

from __future__ import annotations

import glob
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.strict_json import LAYOUT, check_strings, parse_json, printable

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".parquet")
MAX_ROW_BYTES = 64 << 20

_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RowRef:
    """A row's place: 0-based number, 1-based line (Parquet: number + 1), bytes in the file (Parquet: -1).

    The bytes of an element of a JSON array may end in white space.
    """

    number: int
    line: int
    offset: int
    length: int


class RowFile(Protocol):
    """One source file. Picklable, and safe to use on both sides of a fork; `close` only frees what `read` opened."""

    path: Path
    notes: tuple[str, ...]
    """What was accepted but should be counted: `bom`."""

    def scan(self) -> Iterator[RowRef]:
        """Find the rows in order, without parsing them. Raises DataError NO_ROWS, ROW_BYTES, JSON, PARQUET."""
        ...

    def read(self, ref: RowRef) -> dict[str, Any]:
        """Parse one row. Raises DataError as `parse_json` does, SCHEMA if the row is no object."""
        ...

    def origin(self, ref: RowRef) -> str: ...

    def close(self) -> None: ...


def open_rows(path: Path, *, name: str | None = None, max_row_bytes: int = MAX_ROW_BYTES) -> RowFile:
    """Choose the reader: Parquet by extension, JSON array or JSON lines by the first character of the text.

    `name` is what origins call the file, by default `path` as given; on one line, whatever stands in it. Raises
    ConfigError FILE_TYPE.
    """
    name = printable(str(path) if name is None else name)
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise ConfigError("FILE_TYPE", f"{path.suffix or 'no extension'!r} is not a known file type", where=name,
                          remedy=f"known are {', '.join(EXTENSIONS)}")  # fmt: skip
    if extension == ".parquet":
        return ParquetRows(path, name, max_row_bytes)
    start, first = _sniff(path)
    rows = JsonArray if first == b"[" else JsonLines
    return rows(path, name, max_row_bytes, start)


def expand(path: str, base: Path) -> list[Path]:
    """The files that `path` (a file, a folder or a glob, relative to `base`) names, sorted.

    A folder gives its own files with a known extension, dot files left out. Raises ConfigError NO_FILES.
    """
    target = base / path
    if target.is_file():
        return [target]
    if target.is_dir():
        found = [p for p in target.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
    else:
        found = [base / name for name in glob.glob(path, root_dir=base, recursive=True)]
    files = sorted(p for p in found if p.is_file())
    if not files:
        what = f"a folder without {', '.join(EXTENSIONS)} files" if target.is_dir() else "no such file, folder or match"
        raise ConfigError("NO_FILES", f"{path!r} is {what}", where=str(base), remedy="correct the path of this source")
    return files


# --- JSON files -------------------------------------------------------------------------------------------------------


def _sniff(path: Path) -> tuple[int, bytes]:
    """Where the text starts (behind a byte order mark) and its first character that is not white space."""
    with path.open("rb") as file:
        chunk = file.read(_CHUNK_BYTES)
        start = len(_BOM) if chunk.startswith(_BOM) else 0
        chunk = chunk[start:]
        while chunk and not (text := chunk.lstrip()):
            chunk = file.read(_CHUNK_BYTES)
        return start, text[:1] if chunk else b""


class _JsonRows:
    def __init__(self, path: Path, name: str, max_row_bytes: int, start: int):
        self.path = path
        self.notes: tuple[str, ...] = ("bom",) if start else ()
        self._name = name
        self._max_row_bytes = max_row_bytes
        self._start = start
        self._open: tuple[int, weakref.finalize[Any, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def origin(self, ref: RowRef) -> str:
        return f"{self._name}:{ref.line}"

    def read(self, ref: RowRef) -> dict[str, Any]:
        if self._open is None:
            descriptor = os.open(self.path, os.O_RDONLY)
            self._open = descriptor, weakref.finalize(self, os.close, descriptor)
        # pread, not seek + read: forked workers share the file position of their parent
        row = parse_json(os.pread(self._open[0], ref.length, ref.offset), self.origin(ref))
        if not isinstance(row, dict):
            raise DataError("SCHEMA", f"a row is an object, found {type(row).__name__}", where=self.origin(ref),
                            remedy=LAYOUT)  # fmt: skip
        return row

    def close(self) -> None:
        if self._open is not None:
            self._open[1]()
            self._open = None

    def _too_long(self, line: int) -> DataError:
        return DataError("ROW_BYTES", f"the row is longer than {self._max_row_bytes:,} bytes",
                         where=f"{self._name}:{line}", remedy=LAYOUT)  # fmt: skip


class JsonLines(_JsonRows):
    """One object per line; blank lines are passed over but counted. Only a line feed ends a line, never U+2028."""

    def scan(self) -> Iterator[RowRef]:
        number, line_number, offset = 0, 0, self._start
        with self.path.open("rb") as file:
            file.seek(offset)
            while line := file.readline(self._max_row_bytes + 1):
                line_number += 1
                if len(line) > self._max_row_bytes:
                    raise self._too_long(line_number)
                if not line.isspace():
                    yield RowRef(number, line_number, offset, len(line.rstrip()))
                    number += 1
                offset += len(line)
        if not number:
            raise _no_rows(self._name)


class JsonArray(_JsonRows):
    """One array of objects, its elements found by brackets and quotes alone; whether each is JSON is seen in `read`."""

    def scan(self) -> Iterator[RowRef]:
        scanner = _ArrayScanner(self._start)
        with self.path.open("rb") as file:
            file.seek(self._start)
            while chunk := file.read(_CHUNK_BYTES):
                for ref in scanner.feed(chunk):
                    if ref.length > self._max_row_bytes:
                        raise self._too_long(ref.line)
                    yield ref
                if scanner.problem:
                    raise self._broken(scanner.line, scanner.problem)
                if scanner.element >= 0 and scanner.offset - scanner.element > self._max_row_bytes:
                    raise self._too_long(scanner.element_line)
        if scanner.depth >= 0:
            line = scanner.element_line if scanner.element >= 0 else scanner.line
            raise self._broken(line, "the file ends inside this element" if scanner.element >= 0 else "no closing ]")
        if not scanner.number:
            raise _no_rows(self._name)

    def _broken(self, line: int, problem: str) -> DataError:
        return DataError("JSON", f"not JSON: {problem}", where=f"{self._name}:{line}", remedy=LAYOUT)


_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_IN_ARRAY = re.compile(rb'["\[\]{},]')
_IN_ELEMENT = re.compile(rb'["\[\]{}]')


class _ArrayScanner:
    """Byte ranges of the elements of a JSON array, fed chunk by chunk; it keeps a state, never the bytes.

    `depth` is 0 before the array, 1 between its elements, more inside one, -1 behind the array. `element` is the
    offset of the element that is open, or -1. `problem` stops the scan and says what is wrong in `line`.
    """

    def __init__(self, offset: int):
        self.offset = offset
        self.line = 1
        self.depth = 0
        self.number = 0
        self.element = -1
        self.element_line = 0
        self.problem = ""
        self._quoted = False
        self._skip = 0  # 1 when the chunk before ended in a backslash
        self._comma = False

    def feed(self, chunk: bytes) -> Iterator[RowRef]:
        at, counted, self._skip = self._skip, 0, 0
        while at < len(chunk):
            if self._quoted:
                at = self._leave_string(chunk, at)
                continue
            pattern = _IN_ELEMENT if self.depth > 1 else _IN_ARRAY if self.element >= 0 else _NOT_SPACE
            token = pattern.search(chunk, at)
            if token is None:
                break
            at = token.end()
            if self.depth > 1:
                self._nest(token[0])
                continue
            self.line += chunk.count(b"\n", counted, at)
            counted = at
            if self.element >= 0 and token[0] in b",]":
                yield RowRef(self.number, self.element_line, self.element, self.offset + at - 1 - self.element)
                self.number += 1
                self.element = -1
                self._comma = token[0] == b","
                self.depth = 1 if self._comma else -1
            elif not self._between(token[0], self.offset + at - 1):
                return
        self.line += chunk.count(b"\n", counted)
        self.offset += len(chunk)

    def _leave_string(self, chunk: bytes, at: int) -> int:
        """Go behind the closing quote, or to the end of the chunk if that comes first."""
        while True:
            quote = chunk.find(b'"', at)
            piece = chunk[at : quote if quote >= 0 else len(chunk)]
            escaped = (len(piece) - len(piece.rstrip(b"\\"))) % 2
            if quote < 0:
                self._skip = escaped
                return len(chunk)
            at = quote + 1
            if not escaped:
                self._quoted = False
                return at

    def _nest(self, token: bytes) -> None:
        if token == b'"':
            self._quoted = True
        else:
            self.depth += 1 if token in b"[{" else -1

    def _between(self, token: bytes, offset: int) -> bool:
        """A token outside of nested values: the array opens, an element begins or goes on, the array ends."""
        if self.depth == 0:
            self.depth = 1
        elif self.depth < 0:
            self.problem = "text behind the end of the array"
        elif token == b"}" or (self.element < 0 and (token == b"," or (token == b"]" and self._comma))):
            self.problem = f"{token.decode()!r} where an element should stand"
        elif token == b"]":
            self.depth = -1
        else:
            if self.element < 0:
                self.element, self.element_line = offset, self.line
            if token in b'"[{':
                self._nest(token)
        return not self.problem


def _no_rows(name: str) -> DataError:
    return DataError("NO_ROWS", "the file holds no rows", where=name, remedy="take it out of the run file or fill it")


# --- Parquet files ----------------------------------------------------------------------------------------------------


class ParquetRows:
    """Rows of a Parquet file; the row group read last is kept. Bytes stay bytes, structs become dicts."""

    def __init__(self, path: Path, name: str, max_row_bytes: int):
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._name = name
        self._max_row_bytes = max_row_bytes
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_group": None}

    def close(self) -> None:
        self._file: pq.ParquetFile | None = None
        self._group: tuple[range, pa.Table] | None = None
        self._process = os.getpid()

    def origin(self, ref: RowRef) -> str:
        return f"{self._name}:{ref.line}"

    def scan(self) -> Iterator[RowRef]:
        num_rows = self._opened().metadata.num_rows
        if not num_rows:
            raise _no_rows(self._name)
        for number in range(num_rows):
            yield RowRef(number, number + 1, -1, -1)

    def read(self, ref: RowRef) -> dict[str, Any]:
        rows, table = self._row_group(ref.number)
        one = table.slice(ref.number - rows.start, 1)
        if one.nbytes > self._max_row_bytes:
            raise DataError("ROW_BYTES", f"the row has {one.nbytes:,} of {self._max_row_bytes:,} bytes",
                            where=self.origin(ref))  # fmt: skip
        try:
            row = one.to_pylist()[0]
        except UnicodeDecodeError:
            raise DataError("ENCODING", "a text column is not UTF-8", where=self.origin(ref)) from None
        check_strings(row, self.origin(ref))
        return row

    def _row_group(self, number: int) -> tuple[range, pa.Table]:
        file = self._opened()
        if self._group is None or number not in self._group[0]:
            self._group = None  # let the old one go before the new one comes
            first = 0
            for index in range(file.metadata.num_row_groups):
                rows = range(first, first + file.metadata.row_group(index).num_rows)
                if number in rows:
                    break
                first = rows.stop
            else:
                raise self._broken(f"no row {number}")
            try:
                self._group = rows, file.read_row_group(index, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise self._broken(f"row group {index} cannot be read: {error}") from None
        return self._group

    def _opened(self) -> pq.ParquetFile:
        if self._process != os.getpid():  # forked: the parent's handle is not ours
            self.close()
        if self._file is None:
            try:
                file = pq.ParquetFile(self.path)
            except (pa.ArrowException, OSError) as error:
                raise self._broken(f"not a Parquet file: {error}") from None
            names = file.schema_arrow.names
            if len(set(names)) != len(names):  # to_pylist would keep the last one silently
                raise self._broken(f"two columns have the same name in {', '.join(names)}")
            self._file = file
        return self._file

    def _broken(self, problem: str) -> DataError:
        return DataError("PARQUET", problem, where=self._name, remedy="write the file again or take it out")
