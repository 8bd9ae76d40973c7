"""Rows of Parquet files; one row group is held at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lensmith.core.errors import DataError
from lensmith.data.readers.base import RowRef, StreamRow, no_rows
from lensmith.data.strict_json import check_strings


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

    def content_files(self) -> list[Path]:
        return [self.path]

    def scan(self) -> Iterator[RowRef]:
        num_rows = self._opened().metadata.num_rows
        if not num_rows:
            raise no_rows(self._name)
        for number in range(num_rows):
            yield RowRef(number, number + 1, -1, -1)

    def read(self, ref: RowRef) -> dict[str, Any]:
        rows, table = self._row_group(ref.number)
        return table_row(table.slice(ref.number - rows.start, 1), self.origin(ref), self._max_row_bytes)

    def _row_group(self, number: int) -> tuple[range, pa.Table]:
        file = self._opened()
        if self._group is None or number not in self._group[0]:
            self._group = None  # let the old one go before the new one comes
            for index, rows in enumerate(_row_groups(file)):
                if number in rows:
                    self._group = rows, _read_group(file, index, self._name)
                    break
            else:
                raise _broken(f"no row {number}", self._name)
        return self._group

    def _opened(self) -> pq.ParquetFile:
        if self._process != os.getpid():  # forked: the parent's handle is not ours
            self.close()
        if self._file is None:
            self._file = _open(self.path, self._name)
        return self._file


def stream_parquet(file: BinaryIO, name: str, start: int, max_row_bytes: int) -> Iterator[StreamRow]:
    """The rows from row `start` on, a row group at a time. Raises DataError PARQUET, NO_ROWS."""
    parquet = _open(file, name)
    if not parquet.metadata.num_rows:
        raise no_rows(name)
    for index, rows in enumerate(_row_groups(parquet)):
        if rows.stop > start:
            yield from _stream_group(_read_group(parquet, index, name), rows, name, start, max_row_bytes)


def _stream_group(table: pa.Table, rows: range, name: str, start: int, max_row_bytes: int) -> Iterator[StreamRow]:
    for number in rows[max(0, start - rows.start) :]:
        yield stream_table_row(table.slice(number - rows.start, 1), number, name, max_row_bytes)


def table_row(one: pa.Table, origin: str, max_row_bytes: int) -> dict[str, Any]:
    """The row of a table of one row. Raises DataError ROW_BYTES, ENCODING, UNICODE."""
    if one.nbytes > max_row_bytes:
        raise DataError("ROW_BYTES", f"the row has {one.nbytes:,} of {max_row_bytes:,} bytes", where=origin,
                        remedy="make it shorter, or raise data.max_row_bytes")  # fmt: skip
    try:
        row = one.to_pylist()[0]
    except UnicodeDecodeError:
        raise DataError("ENCODING", "a text column is not UTF-8", where=origin) from None
    check_strings(row, origin)
    return row


def stream_table_row(one: pa.Table, number: int, name: str, max_row_bytes: int) -> StreamRow:
    origin = f"{name}:{number + 1}"
    try:
        return StreamRow(number, origin, table_row(one, origin, max_row_bytes))
    except DataError as error:
        return StreamRow(number, origin, None, error)


def _open(source: Path | BinaryIO, name: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise _broken(f"not a Parquet file: {error}", name) from None
    names = file.schema_arrow.names
    if len(set(names)) != len(names):  # to_pylist would keep the last one silently
        raise _broken(f"two columns have the same name in {', '.join(names)}", name)
    return file


def _row_groups(file: pq.ParquetFile) -> Iterator[range]:
    first = 0
    for index in range(file.metadata.num_row_groups):
        rows = range(first, first + file.metadata.row_group(index).num_rows)
        yield rows
        first = rows.stop


def _read_group(file: pq.ParquetFile, index: int, name: str) -> pa.Table:
    try:
        return file.read_row_group(index, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _broken(f"row group {index} cannot be read: {error}", name) from None


def _broken(problem: str, name: str) -> DataError:
    return DataError("PARQUET", problem, where=name, remedy="write the file again or take it out")
