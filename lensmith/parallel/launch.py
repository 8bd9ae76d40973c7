"""The ranks that `lensmith train` starts by itself: torchrun on this machine, one exit code, one error.

torchrun starts the ranks, finds a free port and ends all of them when one fails. What it lacks is here: the exit code
that the ranks gave, a second signal that ends at once, and a failure that is started again only where that can help.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil

from lensmith.core.errors import ConfigError, DataError, ModelError, RunError
from lensmith.parallel import watcher
from lensmith.parallel.exits import CONSEQUENCES, EXITS, STOPPED

FINAL = (0, ConfigError.exit_code, DataError.exit_code, ModelError.exit_code, *STOPPED)
"""Exit codes behind which another start would come to the same."""
PATIENCE_SECONDS = 24 * 3600
"""How long torchrun waits for ranks that save after a signal. Ranks that hang are the watchdog's business, and a second
signal ends all at once."""
SHOWN_LINES = 40


class Says(Protocol):
    """What the launcher needs of the terminal."""

    def event(self, name: str, message: str = "", **fields: Any) -> None: ...
    def warning(self, message: str) -> None: ...


@dataclass(frozen=True)
class End:
    """How a rank ended: an exit code, or minus the signal that killed it."""

    rank: int
    code: int
    error: str = ""
    time: float = 0.0

    @property
    def spoke(self) -> bool:
        """Whether it said itself what was wrong."""
        return self.code > 0

    def says(self, other: End) -> bool:
        """Whether this rank's message is that of the other too. Two defects (without a code) may differ."""
        same = (self.code, self.error) == (other.code, other.error) and self.error != ""
        return same or self.error == "OTHER_RANK" or self.rank == other.rank

    @property
    def is_affected(self) -> bool:
        """It only failed because another did; SIGTERM is torchrun's, for those that are left."""
        return self.error in CONSEQUENCES or self.code == -signal.SIGTERM


def launch(
    arguments: Sequence[str],
    *,
    ranks: int,
    restarts: int,
    output: Path | None,
    terminal: Says,
    program: str = "lensmith",
) -> int:
    """Run `python -m PROGRAM ARGUMENTS` in `ranks` processes of this machine until they end; their exit code.

    Args:
        restarts: how often all ranks are started again after a failure.
        output: the run folder; reports are in its `ranks`, and what the ranks wrote in a launch that failed. None:
            nothing is kept.

    Raises `RunError` RANK when a rank was killed, or none started.
    """
    error: RunError | None = None
    code = 0
    with _folder(output) as folder, Signals() as signals:
        for attempt in range(restarts + 1):
            run = Attempt(folder, attempt, [program, *arguments], ranks, signals)
            code, error = run.run(), run.say()
            if code in FINAL or signals.first is not None or attempt == restarts:
                break
            reason = f"the ranks ended with {code}" if error is None else error.message
            terminal.warning(f"{reason}; all start again, {attempt + 1} of {restarts} times")
        if code in (0, *STOPPED):
            shutil.rmtree(folder, ignore_errors=True)
    if error is not None:
        raise error
    return code


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """For logs and exit codes of this launch."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="lensmith-ranks-") as folder:
            yield Path(folder)
        return
    (output / "ranks").mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    yield Path(tempfile.mkdtemp(prefix=f"launch-{stamp}-", dir=output / "ranks"))


class Signals:
    """Hands the first SIGTERM, SIGINT or SIGHUP to torchrun, which hands it to the ranks; a second one kills all of
    them. One that was ignored (SIGHUP under nohup) stays ignored."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.agent: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        again, self.first = self.first is not None, self.first or number
        if self.agent is None or self.agent.poll() is not None:
            return
        if again:
            kill_all(self.agent.pid)
        else:
            self.agent.send_signal(number)


def kill_all(pid: int) -> None:
    """A process and all below it, at once."""
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [*reversed(below), psutil.Process(pid)]:  # watchers before their ranks: they have nothing to report
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


class Attempt:
    """One start of all ranks."""

    def __init__(self, folder: Path, number: int, arguments: list[str], ranks: int, signals: Signals):
        self.ranks, self.signals, self.arguments = ranks, signals, arguments
        self.reports = folder.parent
        self.folder = folder / f"start-{number}"
        self.folder.mkdir()
        self._earlier = set(self.reports.glob("attempt-*")), set(self.reports.glob("report-*.json"))
        self.code = 0
        self.ends: list[End] = []
        self.cause: End | None = None
        self.report: dict[str, Any] | None = None

    def run(self) -> int:
        """The exit code of the ranks."""
        if self.signals.first is not None:
            self.code = 128 + self.signals.first
            return self.code
        failures = self.folder / "failures.json"
        command = [sys.executable, "-m", "lensmith.parallel.agent", str(failures), str(os.getpid())]
        # a session of its own: Ctrl-C reaches it once, through this process
        agent = subprocess.Popen([*command, *self._torchrun()], env=self._environment(), start_new_session=True)
        self.signals.agent = agent
        if self.signals.first is not None:  # it came in between
            agent.send_signal(self.signals.first)
        agent.wait()
        self.ends = list(self._ends(failures))
        if self.signals.first is None and agent.returncode != 0:
            self._await_watchers()
            self.report = self._newest_report()
        self.code = self._settle(agent.returncode)
        return self.code

    def _torchrun(self) -> list[str]:
        """Port 0 is one that is free. Ranks but the first write to files."""
        silent = ",".join(f"{rank}:3" for rank in range(1, self.ranks))
        return [
            "--nnodes=1", f"--nproc-per-node={self.ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1", "--max-restarts=0", f"--shutdown-timeout={PATIENCE_SECONDS}",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP", f"--log-dir={self.folder}",
            *([f"--redirects={silent}"] if silent else []), "-m", *self.arguments,
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self.ranks)
        own = {"OMP_NUM_THREADS": str(threads)}
        if sys.platform == "linux":
            own["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine need not lead anywhere
        return {**own, **os.environ, EXITS: str(self.folder)}

    def _ends(self, failures: Path) -> Iterator[End]:
        seen = json.loads(failures.read_text()) if failures.is_file() else {}
        for rank in range(self.ranks):
            path = self.folder / f"rank-{rank}.json"
            if path.is_file():
                about = json.loads(path.read_text())
                yield End(rank, about["code"], about["error"], about["time"])
            elif str(rank) in seen:
                yield End(rank, seen[str(rank)]["code"], "", seen[str(rank)]["time"])

    def _settle(self, agent: int) -> int:
        """The code of what came first; 74 for a rank that was killed."""
        bad = sorted((e for e in self.ends if e.code not in (0, *STOPPED)), key=lambda e: e.time)
        if self.signals.first is not None:
            spoke = [e.code for e in bad if e.spoke and not e.is_affected]
            stopped = [e.code for e in self.ends if e.code in STOPPED]
            return next(iter([*spoke, *stopped]), 0 if agent == 0 else 128 + self.signals.first)
        if self.report is not None:
            rank = self.report["causes"][0]["rank"]
            self.cause = next((e for e in bad if e.rank == rank and e.spoke), None)
            return RunError.exit_code if self.cause is None else self.cause.code
        if bad:
            self.cause = next((e for e in bad if not e.is_affected), bad[0])
            return self.cause.code if self.cause.spoke else RunError.exit_code
        stopped = [e.code for e in self.ends if e.code in STOPPED]  # somebody signalled a rank
        return next(iter(stopped), 0 if agent == 0 else RunError.exit_code)

    def say(self) -> RunError | None:
        """Show what the rank that failed first wrote, if nobody else did. An error to raise where it was killed."""
        if self.code == 0:
            return None
        if self.cause is None:
            is_told = self.code in STOPPED or self.signals.first is not None or self.report is not None
            return None if is_told else RunError(
                "RANK", "torchrun did not start the ranks", where=str(self.folder), remedy="look at its lines above"
            )  # fmt: skip
        if self.cause.spoke and any(e.rank == 0 and e.says(self.cause) for e in self.ends):
            return None
        lines = self._log(self.cause.rank)
        if lines:
            print(f"rank {self.cause.rank}:", *lines[-SHOWN_LINES:], sep="\n", file=sys.stderr)
        if self.cause.spoke:
            return None
        name = signal.Signals(-self.cause.code).name
        return RunError(
            "RANK",
            f"rank {self.cause.rank} was ended by {name}",
            where=str(self.folder),
            remedy="SIGKILL is often the system's, for memory; a fault of native code has a trace above",
        )

    def _log(self, rank: int) -> list[str]:
        """What a rank other than the first wrote to its stderr."""
        found = sorted(self.folder.glob(f"*/attempt_*/{rank}/stderr.log"))
        return found[-1].read_text(errors="replace").splitlines() if found else []

    def _await_watchers(self) -> None:
        """Until the watchers of this attempt have said what there is to say."""
        end = time.monotonic() + watcher.GRACE_SECONDS + watcher.REPORT_SECONDS
        while time.monotonic() < end and any(map(_is_watcher, self._watchers())):
            time.sleep(0.1)

    def _watchers(self) -> Iterator[int]:
        for folder in set(self.reports.glob("attempt-*")) - self._earlier[0]:
            for rank in range(self.ranks):
                try:
                    yield json.loads(watcher.slot(folder, rank).read_bytes())["watcher"]
                except (OSError, ValueError):
                    continue

    def _newest_report(self) -> dict[str, Any] | None:
        new = sorted(set(self.reports.glob("report-*.json")) - self._earlier[1])
        return json.loads(new[-1].read_text()) if new else None


def _is_watcher(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and watcher.__file__ in process.cmdline()
    except psutil.NoSuchProcess:
        return False
