"""Processes that read rows ahead of training: they end with their parent, and are replaced when one hangs.

Rows travel through pipes. Of /dev/shm only the few bytes of the queues' semaphores are needed.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from typing import Any

from lensmith.core.errors import RunError

END_SECONDS = 5.0
"""What workers have to end what they are at."""


class Workers:
    """Processes that each begin with `begin(*arguments)`. Unlike an executor they can be ended while one hangs."""

    def __init__(self, workers: int, begin: Callable[..., None], arguments: tuple[Any, ...]):
        self._workers, self._begin, self._arguments = workers, begin, arguments
        self._start()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Raises `BrokenProcessPool` after a worker died, and `RunError` WORKERS when none can be started."""
        try:
            return self._executor.submit(work, *arguments)
        except OSError as error:
            raise _no_workers(error) from error

    def kill(self) -> None:
        """All workers end now, whatever they do. Futures that are not done never will be."""
        for process in self._context.processes:
            if process.pid is not None:
                process.kill()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def restart(self) -> None:
        """`kill`, and begin with new ones."""
        self.kill()
        self._start()

    def shutdown(self) -> None:
        """Workers end when they have done what they are at. One that hangs is killed."""
        late = threading.Timer(END_SECONDS, self.kill)
        late.start()
        self._executor.shutdown(wait=True, cancel_futures=True)
        late.cancel()

    def _start(self) -> None:
        self._context = _Counted()
        try:
            self._executor = ProcessPoolExecutor(
                self._workers, mp_context=self._context, initializer=_begin, initargs=(self._begin, self._arguments)
            )
        except OSError as error:
            raise _no_workers(error) from error


class _Counted(ForkContext):
    """Remembers its processes: an executor has no public way to its own before Python 3.14."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:  # type: ignore[override]
        self.processes.append(super().Process(*args, **kwargs))
        return self.processes[-1]


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    begin(*arguments)


def end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: its siblings hold the pipe open."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _no_workers(error: OSError) -> RunError:
    """The C library makes semaphores as files in /dev/shm, and does not name them when it cannot."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOSYS):
        remedy = "make room there (docker: --shm-size), or set data.workers: 0"
        text = f"data workers need a few bytes of shared memory, and cannot have them: {reason}"
        return RunError("WORKERS", text, where="/dev/shm", remedy=remedy)
    remedy = "raise the limits of processes and open files (ulimit -u, -n), or lower data.workers"
    return RunError("WORKERS", f"data workers cannot be started: {reason}", remedy=remedy)
