"""Rows of .csv, .tsv, .txt and .arrow files: small tables that are read whole. Every value of a .csv or .tsv is text,
and an empty one is null; a .txt has a line a row, under `text`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc

from lensmith.core.errors import DataError
from lensmith.data.readers.base import RowRef, no_rows
from lensmith.data.readers.parquet_rows import table_row

TABLES = (".csv", ".tsv", ".txt", ".arrow")
"""Read where a source names the file itself; in a folder they may be anything."""
MAX_BYTES = 1 << 30

csv: Any = pyarrow.csv  # no stub knows it


class TableRows:
    """Rows of a table file, which is held as long as the reader is open."""

    def __init__(self, path: Path, name: str, max_row_bytes: int):
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._name = name
        self._max_row_bytes = max_row_bytes
        self._table: pa.Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def close(self) -> None:
        self._table = None

    def origin(self, ref: RowRef) -> str:
        return f"{self._name}:{ref.line}"

    def content_files(self) -> list[Path]:
        return [self.path]

    def scan(self) -> Iterator[RowRef]:
        """Raises DataError TABLE, NO_ROWS."""
        count = len(self._opened())
        if not count:
            raise no_rows(self._name)
        for number in range(count):
            yield RowRef(number, number + 1, -1, -1)

    def read(self, ref: RowRef) -> dict[str, Any]:
        return table_row(self._opened().slice(ref.number, 1), self.origin(ref), self._max_row_bytes)

    def _opened(self) -> pa.Table:
        if self._table is None:
            try:
                self._table = self._read()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                problem = f"not a {self.path.suffix} file: {error}"
                raise DataError("TABLE", problem, where=self._name, remedy="mend the file, or write .jsonl") from None
        return self._table

    def _read(self) -> pa.Table:
        if (size := self.path.stat().st_size) > MAX_BYTES:
            raise DataError("TABLE", f"{size:,} bytes; at most {MAX_BYTES:,} of such a file are read",
                            where=self._name, remedy="write it as .parquet or .jsonl")  # fmt: skip
        kind = self.path.suffix.lower()
        if kind == ".arrow":
            return _arrow(self.path)
        if kind == ".txt":
            return pa.table({"text": self.path.read_text(encoding="utf-8").splitlines()})
        return _separated(self.path, "\t" if kind == ".tsv" else ",")


def _separated(path: Path, mark: str) -> pa.Table:
    parse = csv.ParseOptions(delimiter=mark, newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse) as header:
        names = header.schema.names
    if len(set(names)) != len(names):
        raise pa.ArrowInvalid("two columns have the same name")
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
    )
    return csv.read_csv(path, parse_options=parse, convert_options=convert)


def _arrow(path: Path) -> pa.Table:
    """Arrow's file form, or the stream form that the datasets library writes."""
    with pa.OSFile(str(path)) as file:
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()
