"""A rank's signs of life, for the watcher process beside it (`watcher.py`).

A rank that is silent for too long, or whose process is gone, would leave the others waiting in a collective for ever.
Watched, all ranks end with a report within `timeout` + 30 s, and the launcher can start them again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lensmith.core.errors import RunError
from lensmith.parallel import watcher
from lensmith.parallel.exits import CONSEQUENCES, STOPPED
from lensmith.parallel.watcher import AFFECTED, DUMP, ENDED, FAILED, PAGE, RUNNING, STRAGGLERS, TOLD

KEPT_ATTEMPTS = 2
IDLE_SECONDS = 60.0
"""Watchers write every 5 s at least."""


_LEFT: list[subprocess.Popen[bytes]] = []
"""The watcher of rank 0 stays until the last rank has ended, and nobody waits for it."""


class Members(Protocol):
    """What the watchdog needs of the ranks."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def broadcast_json(self, value: Any, what: str) -> Any: ...


class Watchdog:
    """Use as a context manager around everything that all ranks do together, after they met. Alone it does nothing.

    Args:
        folder: `ranks` in the run folder, on a file system that all ranks share.
        timeout: seconds without a sign of life after which a rank counts as hung.
    """

    def __init__(self, folder: Path, ranks: Members, timeout: float):
        self.folder, self.ranks, self.timeout = folder, ranks, timeout
        self._page: mmap.mmap | bytearray = bytearray(mmap.PAGESIZE)
        self._beats, self._collectives, self._step, self._limit = 0, 0, -1, timeout
        self._doing, self._collective = b"start", b""
        self._heard = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        if self.ranks.size > 1:
            self._attempt = self._name_attempt()
            self._listen()
            self._start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._process is None:
            return
        state, text = _how(error)
        self._put(state, text)
        self._deafen()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it was killed
            self._process.stdin.write(b".")
            self._process.stdin.close()
        if self.ranks.rank == 0:
            _LEFT.append(self._process)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(watcher.REPORT_SECONDS)

    # -- signs of life ------------------------------------------------------------------------------------------

    def beat(self, step: int, doing: str) -> None:
        """This rank is alive and does `doing` in `step`."""
        self._step, self._doing = step, doing.encode()
        self._put()

    def collective(self, name: str) -> None:
        """This rank begins a collective. Every rank begins the same ones, so whoever began fewer is behind."""
        self._collectives += 1
        self._doing = self._collective = name.encode()
        self._put()

    @contextmanager
    def phase(self, name: str, limit: float | None = None) -> Iterator[None]:
        """Long honest work: `limit` seconds of silence are allowed in it, any number if None. Also a decorator."""
        before = self._limit, self._doing
        self._limit, self._doing = math.inf if limit is None else limit, name.encode()
        self._put()
        yield
        self._limit, self._doing = before  # not behind an error: a report says where it came up
        self._put()

    def stragglers(self) -> list[dict[str, Any]]:
        """Ranks that kept the others waiting since the last call (rank, host, step, doing, seconds); on rank 0."""
        (count,) = TOLD.unpack_from(self._page, PAGE.size)
        if count == self._heard:
            return []
        lines = (self._attempt / STRAGGLERS).read_text().splitlines()
        found, self._heard = [json.loads(line) for line in lines[self._heard : count]], count
        return found

    def _put(self, state: bytes = RUNNING.encode(), failed: bytes = b"") -> None:
        self._beats += 1
        PAGE.pack_into(
            self._page, 0, self._beats, self._collectives, self._limit, self._step, state, self._doing,
            self._collective, failed,
        )  # fmt: skip

    # -- the process beside -------------------------------------------------------------------------------------

    def _name_attempt(self) -> Path:
        """A folder of this attempt's own, so that what an earlier one left does not matter."""
        name, error = None, None
        if self.ranks.rank == 0:
            try:
                name = self._make_attempt()
            except OSError as refused:
                error = refused
        told = self.ranks.broadcast_json(name, "name the attempt")
        if told is None:
            raise error or RunError("OTHER_RANK", "the first rank cannot write to the run folder")
        return self.folder / told

    def _make_attempt(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        made = Path(tempfile.mkdtemp(prefix=f"attempt-{stamp}-", dir=self.folder))
        made.chmod(0o755)
        for old in sorted(p for p in self.folder.glob("attempt-*") if p != made)[:-KEPT_ATTEMPTS]:
            if _is_idle(old):
                shutil.rmtree(old, ignore_errors=True)
        return made.name

    def _listen(self) -> None:
        """Stacks are written on a signal and on a fault of native code, both without the interpreter lock."""
        self._stacks = watcher.stacks(self._attempt, self.ranks.rank).open("wb")
        faulthandler.register(DUMP, self._stacks, all_threads=True)
        self._before = faulthandler.is_enabled()
        faulthandler.enable(self._stacks, all_threads=True)

    def _deafen(self) -> None:
        faulthandler.disable()
        if self._before and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)

    def _start(self) -> None:
        with _page_file() as fd:
            self._page = mmap.mmap(fd, mmap.PAGESIZE)
            self._put()
            about = {"folder": str(self._attempt.resolve()), "rank": self.ranks.rank, "size": self.ranks.size,
                     "timeout": self.timeout, "page": fd, "pid": os.getpid()}  # fmt: skip
            # a session of its own: what ends the rank and its processes, or the terminal, spares it
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", watcher.__file__, json.dumps(about)], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, pass_fds=[fd], start_new_session=True,
            )  # fmt: skip


def _is_idle(attempt: Path) -> bool:
    """Whether no watcher writes there: another run may be at work in this run folder, and this one be refused."""
    return all(time.time() - file.stat().st_mtime > IDLE_SECONDS for file in attempt.glob("rank-*.json"))


def _how(error: BaseException | None) -> tuple[bytes, bytes]:
    """How a rank ends: the state that is told, and its error."""
    if error is None or getattr(error, "exit_code", None) in STOPPED:
        return ENDED.encode(), b""
    affected = getattr(error, "code", "") in CONSEQUENCES
    return (AFFECTED if affected else FAILED).encode(), f"{type(error).__name__}: {error}".encode()[:400]


@contextmanager
def _page_file() -> Iterator[int]:
    """A page that two processes map. In memory where the system can; a file that is written in full does not end a
    process when the disk is full."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("lensmith-signs-of-life")
        os.ftruncate(fd, mmap.PAGESIZE)
    else:
        fd, name = tempfile.mkstemp()
        os.unlink(name)
        os.write(fd, bytes(mmap.PAGESIZE))
    try:
        yield fd
    finally:
        os.close(fd)
