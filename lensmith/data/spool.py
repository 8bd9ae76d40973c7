"""The rows of a window of a stream, on disk for as long as it is trained: read at random as any source file is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lensmith.core.errors import DataError
from lensmith.data.readers import RowRef

SUFFIX = ".spool"
SCHEMA = pa.schema([("origin", pa.string()), ("row", pa.binary()), ("blobs", pa.list_(pa.binary()))])
"""row: JSON in which bytes are {"$blob": n}, the n-th of blobs."""
_BATCH = 64
_BLOB = "$blob"


class SpoolWriter:
    """Writes rows in order; `add` gives the reference by which each is read."""

    def __init__(self, path: Path):
        self._out = pa.ipc.new_file(str(path), SCHEMA)
        self._waiting: list[dict[str, Any]] = []
        self.count = 0

    def add(self, row: dict[str, Any], origin: str) -> RowRef:
        """Raises DataError SCHEMA for values that JSON cannot hold (Parquet's dates)."""
        blobs: list[bytes] = []
        try:
            text = json.dumps(row, default=lambda value: _blob(value, blobs), ensure_ascii=True)
        except (TypeError, ValueError) as error:
            raise DataError("SCHEMA", str(error), where=origin) from None
        self._waiting.append({"origin": origin, "row": text.encode(), "blobs": blobs})
        self.count += 1
        if len(self._waiting) >= _BATCH:
            self._flush()
        return RowRef(self.count - 1, self.count, -1, -1)

    def _flush(self) -> None:
        self._out.write_batch(pa.RecordBatch.from_pylist(self._waiting, schema=SCHEMA))
        self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._out.close()


def _blob(value: Any, blobs: list[bytes]) -> dict[str, int]:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"a value of type {type(value).__name__} cannot be read")
    blobs.append(bytes(value))
    return {_BLOB: len(blobs) - 1}


class SpoolRows:
    """A spool as a source file. Every batch has `_BATCH` rows but the last."""

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
        count = sum(len(self._batch(i)) for i in range(self._opened().num_record_batches))
        return (RowRef(n, n + 1, -1, -1) for n in range(count))

    def read(self, ref: RowRef) -> dict[str, Any]:
        one = self._one(ref)
        blobs = one["blobs"][0].as_py()
        return _restored(json.loads(one["row"][0].as_py()), blobs)

    def origin(self, ref: RowRef) -> str:
        return self._one(ref)["origin"][0].as_py()

    def _one(self, ref: RowRef) -> pa.RecordBatch:
        return self._batch(ref.number // _BATCH).slice(ref.number % _BATCH, 1)

    def _batch(self, number: int) -> pa.RecordBatch:
        return self._opened().get_batch(number)

    def _opened(self) -> Any:
        if self._file is None or self._process != os.getpid():
            self._process = os.getpid()
            self._file = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return self._file


def _restored(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and _BLOB in value and blobs:
            return blobs[value[_BLOB]]
        return {k: _restored(v, blobs) for k, v in value.items()}
    return [_restored(v, blobs) for v in value] if isinstance(value, list) else value
