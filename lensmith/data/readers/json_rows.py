"""Rows of JSON lines and JSON arrays: found cheaply, read one at a time, parsed strictly.

Nothing here holds a whole file: `scan` streams and `read` takes the bytes of one row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from lensmith.core.errors import DataError
from lensmith.data.readers.base import BOM, CHUNK_BYTES, OnDisk, RowRef, StreamRow, no_rows, too_long
from lensmith.data.strict_json import LAYOUT, parse_json


def sniff(file: BinaryIO) -> tuple[int, bytes]:
    """Where the text starts (behind a byte order mark) and its first character that is not white space."""
    chunk = file.read(CHUNK_BYTES)
    start = len(BOM) if chunk.startswith(BOM) else 0
    chunk = chunk[start:]
    while chunk and not (text := chunk.lstrip()):
        chunk = file.read(CHUNK_BYTES)
    return start, text[:1] if chunk else b""


def open_json(path: Path, name: str, max_row_bytes: int) -> JsonLines | JsonArray:
    """An array or lines, by the first character of the text."""
    with path.open("rb") as file:
        start, first = sniff(file)
    return (JsonArray if first == b"[" else JsonLines)(path, name, max_row_bytes, start)


def numbered_lines(file: BinaryIO, max_row_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines with their line feed and 1-based number. Of a longer line come `max_row_bytes` + 1 bytes, then the next."""
    number = 0
    while line := file.readline(max_row_bytes + 1):
        number += 1
        yield number, line
        rest = line if len(line) > max_row_bytes else b"\n"
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(CHUNK_BYTES)


def stream_lines(file: BufferedReader, name: str, start: int, max_row_bytes: int) -> Iterator[StreamRow]:
    """The rows of JSON lines from row `start` on. Raises DataError FILE_TYPE for a JSON array, NO_ROWS."""
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    number = 0
    for line_number, line in numbered_lines(file, max_row_bytes):
        if not number and line.lstrip()[:1] == b"[":
            raise DataError("FILE_TYPE", "a JSON array cannot be read as a stream from elsewhere", where=name,
                            remedy="write one object per line (.jsonl), or read it without data.stream")  # fmt: skip
        if len(line) > max_row_bytes or not line.isspace():
            if number >= start:
                yield _stream_row(number, f"{name}:{line_number}", line, max_row_bytes)
            number += 1
    if not number:
        raise no_rows(name)


def _stream_row(number: int, origin: str, line: bytes, max_row_bytes: int) -> StreamRow:
    try:
        if len(line) > max_row_bytes:
            raise too_long(origin, max_row_bytes)
        return StreamRow(number, origin, _object(line.rstrip(), origin))
    except DataError as error:
        return StreamRow(number, origin, None, error)


def _object(data: bytes, origin: str) -> dict[str, Any]:
    row = parse_json(data, origin)
    if not isinstance(row, dict):
        raise DataError("SCHEMA", f"a row is an object, found {type(row).__name__}", where=origin, remedy=LAYOUT)
    return row


class _JsonRows(OnDisk):
    def __init__(self, path: Path, name: str, max_row_bytes: int, start: int):
        super().__init__(path, name, max_row_bytes)
        self.notes: tuple[str, ...] = ("bom",) if start else ()
        self._start = start

    def read(self, ref: RowRef) -> dict[str, Any]:
        return _object(self._bytes(ref), self.origin(ref))

    def _too_long(self, line: int) -> DataError:
        return too_long(f"{self._name}:{line}", self._max_row_bytes)


class JsonLines(_JsonRows):
    """One object per line; blank lines are passed over but counted. Only a line feed ends a line, never U+2028."""

    def scan(self) -> Iterator[RowRef]:
        number, offset = 0, self._start
        with self.path.open("rb") as file:
            file.seek(offset)
            for line_number, line in numbered_lines(file, self._max_row_bytes):
                if len(line) > self._max_row_bytes:
                    raise self._too_long(line_number)
                if not line.isspace():
                    yield RowRef(number, line_number, offset, len(line.rstrip()))
                    number += 1
                offset += len(line)
        if not number:
            raise no_rows(self._name)


class JsonArray(_JsonRows):
    """One array of objects, its elements found by brackets and quotes alone; whether each is JSON is seen in `read`."""

    def scan(self) -> Iterator[RowRef]:
        scanner = _ArrayScanner(self._start)
        with self.path.open("rb") as file:
            file.seek(self._start)
            while chunk := file.read(CHUNK_BYTES):
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
            raise no_rows(self._name)

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
