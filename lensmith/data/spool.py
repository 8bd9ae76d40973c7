"""The rows of a window of a stream, on disk for as long as it is trained: read at random as any source file is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lensmith.data.readers import RowRef

SUFFIX = ".spool"
SCHEMA = pa.schema(
    [
        ("origin", pa.string()), ("row", pa.large_binary()), ("mark", pa.string()),
        ("blobs", pa.large_list(pa.large_binary())),
    ]
)  # fmt: skip
"""row: JSON in which bytes are {mark: n}, the n-th of blobs. No text of the row is its mark."""
BATCH_ROWS, BATCH_BYTES = 64, 16 << 20
"""A batch is written when it holds so much: what waits for it is in memory."""
_MARK = "$blob"


class SpoolWriter:
    """Writes rows in order; `add` gives the reference by which each is read: its number, its batch and its place there
    (as `offset` and `length`)."""

    def __init__(self, path: Path):
        self._out = pa.ipc.new_file(str(path), SCHEMA)
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0
        self._batches = 0
        self.count = 0

    def add(self, row: dict[str, Any], origin: str) -> RowRef:
        if len(self._waiting) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()
        text, mark, blobs = _stored(row)
        self._waiting.append({"origin": origin, "row": text, "mark": mark, "blobs": blobs})
        self._bytes += len(text) + sum(map(len, blobs))
        self.count += 1
        return RowRef(self.count - 1, self.count, self._batches, len(self._waiting) - 1)

    def _flush(self) -> None:
        self._out.write_batch(pa.RecordBatch.from_pylist(self._waiting, schema=SCHEMA))
        self._waiting.clear()
        self._bytes, self._batches = 0, self._batches + 1

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._out.close()


def _stored(row: dict[str, Any]) -> tuple[bytes, str, list[bytes]]:
    """(row as JSON, mark, blobs). Values that no format reads, Parquet's dates and decimals, are kept as their text."""
    mark = _MARK
    while True:
        blobs: list[bytes] = []

        def other(value: Any, blobs: list[bytes] = blobs, mark: str = mark) -> Any:
            if not isinstance(value, bytes | bytearray | memoryview):
                return str(value)
            blobs.append(bytes(value))
            return {mark: len(blobs) - 1}

        text = json.dumps(row, default=other)
        if not blobs or text.count(f'"{mark}"') == len(blobs):
            return text.encode(), mark, blobs
        mark = f"{mark}$"  # the row says it too


class SpoolRows:
    """A spool as a source file."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path):
        self.path = path
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None, "_process": -1}

    def close(self) -> None:
        self._file: Any = None
        self._process = os.getpid()

    def content_files(self) -> list[Path]:
        return [self.path]

    def scan(self) -> Iterator[RowRef]:
        file, number = self._opened(), 0
        for batch in range(file.num_record_batches):
            for place in range(len(file.get_batch(batch))):
                yield RowRef(number, number + 1, batch, place)
                number += 1

    def read(self, ref: RowRef) -> dict[str, Any]:
        one = self._one(ref)
        row = json.loads(one["row"][0].as_py())
        blobs = one["blobs"][0].as_py()
        return _restored(row, one["mark"][0].as_py(), blobs) if blobs else row

    def origin(self, ref: RowRef) -> str:
        return self._one(ref)["origin"][0].as_py()

    def _one(self, ref: RowRef) -> pa.RecordBatch:
        return self._opened().get_batch(ref.offset).slice(ref.length, 1)

    def _opened(self) -> Any:
        if self._file is None or self._process != os.getpid():
            self._process = os.getpid()
            self._file = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return self._file


def _restored(value: Any, mark: str, blobs: list[bytes]) -> Any:
    if isinstance(value, dict):
        return blobs[value[mark]] if mark in value else {k: _restored(v, mark, blobs) for k, v in value.items()}
    return [_restored(v, mark, blobs) for v in value] if isinstance(value, list) else value
