"""`metrics.jsonl`: one JSON object a line, appended while the run goes on.

A line counts once its newline is written. So a crash costs at most the line being written, a reader leaves out what
follows the last newline, and a writer that opens the file again cuts it off. A disk that takes nothing does not end the
run: records wait in memory and are written, in order, when there is room again.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

from lensmith.core.errors import DataError

Record = dict[str, Any]

MOST_WAITING = 100_000
"""Records that wait for room on the disk; about 100 MB."""


class MetricsWriter:
    """Appends records. `kind` is `step`, `eval` or `event`; `step` counts applied updates from 1.

    Attributes:
        refused: why the disk takes nothing, while records wait.
        late, lost: records that had to wait, and those that were never written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.refused: str | None = None
        self.late = self.lost = 0
        self._waiting: deque[bytes] = deque()
        if path.exists():
            _cut_half_line(path)
        self._fd = _append_to(path)

    def write(self, record: Record) -> None:
        """Append one record, and before it those that wait."""
        self._waiting.append((json_line(record) + "\n").encode())
        self._write_waiting()
        self.late += bool(self._waiting)
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                _append(self._fd, self._waiting[0])
                self._waiting.popleft()
            self.refused = None
        except OSError as error:
            self.refused = error.strerror or str(error)

    def restore(self) -> None:
        """Make the file anew with all its records: its folder was deleted while it was open."""
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        os.close(self._fd)
        self._fd = _append_to(self.path)
        os.ftruncate(self._fd, 0)
        self._waiting.appendleft(data)
        self._write_waiting()

    def truncate_after(self, step: int) -> None:
        """Drop every record of a later step: what is resumed from `step` writes them again. Others stay as they are."""
        kept = [line for line, record in _lines(self.path) if record.get("step") is None or record["step"] <= step]
        new = self.path.with_name(self.path.name + ".tmp")
        with new.open("wb") as file:
            file.write(b"".join(kept))
            file.flush()
            os.fsync(file.fileno())
        os.close(self._fd)
        os.replace(new, self.path)
        self._fd = _append_to(self.path)

    def close(self) -> None:
        self._write_waiting()
        self.lost += len(self._waiting)
        os.close(self._fd)


def json_line(record: Record) -> str:
    """Always valid JSON: NaN and infinities become null, their dotted names are listed under `nonfinite`.

    ASCII only, so that no terminal reads control or bidi characters out of it.
    """
    bad: list[str] = []
    safe = _finite(record, "", bad)
    return json.dumps({**safe, "nonfinite": bad} if bad else safe, allow_nan=False)


def read_metrics(path: Path) -> list[Record]:
    """Every record in order; an absent file has none. Raises `DataError` with the line of a record that is not JSON."""
    return [record for _, record in _lines(path)] if path.exists() else []


def _append_to(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o666)


def _append(fd: int, data: bytes) -> None:
    """All of `data` or nothing."""
    size = os.fstat(fd).st_size
    if os.write(fd, data) < len(data):
        os.ftruncate(fd, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_half_line(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _lines(path: Path) -> list[tuple[bytes, Record]]:
    *whole, _half = path.read_bytes().split(b"\n")
    found: list[tuple[bytes, Record]] = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(
                "METRICS", "not a JSON object", where=f"{path}:{number}", remedy="remove this line; the others are kept"
            )
        found.append((line + b"\n", record))
    return found


def _finite(value: Any, name: str, bad: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v, f"{name}.{k}" if name else str(k), bad) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{name}.{i}", bad) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(name)
        return None
    return value
