"""The process beside a rank that says whether the rank lives, and ends it when the ranks cannot go on.

It is a process because a thread stands still where the interpreter lock is held. It needs nothing but the standard
library and is run by its path, so it starts in some 20 ms. `Watchdog` starts it and hands it one page of shared memory,
into which the rank writes its signs of life.

Every watcher copies its rank's page to a file of the run folder each few moments; the watcher of rank 0 reads all of
them and is the only one that judges. Silence is counted in the reader's own time, in small pieces: neither clocks that
differ nor a machine that slept make a rank look silent. A verdict is a file too. On it every watcher has its rank write
its Python stacks (`faulthandler`, which needs no interpreter lock), the report is made, and the ranks are killed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PAGE = struct.Struct("<QQdq16s120s120s400s")
"""Signs of life, collectives begun, seconds that may pass until the next sign, step, state, what it does, its last
collective, how it failed."""
TOLD = struct.Struct("<Q")
"""Behind it in the page: how many stragglers the watcher has noted."""
SLOT_BYTES = 2048
STRAGGLERS, VERDICT, REPORTED, CLOSED = "stragglers.jsonl", "verdict.json", "reported", "closed"
RUNNING, ENDED, FAILED, AFFECTED, GONE = "running", "ended", "failed", "affected", "gone"
"""States of a rank. Affected: it failed because another is gone. Gone: its process ended without a word."""
OVER = (ENDED, FAILED, AFFECTED, GONE)
GRACE_SECONDS = 10.0
"""After one rank failed, the others end by themselves or by their launcher; then they are ended."""
STACKS_SECONDS = 5.0
REPORT_SECONDS = 15.0
DUMP = getattr(signal, "SIGRTMIN", signal.SIGUSR2)
"""The signal on which a rank writes its stacks; schedulers use SIGUSR1 and SIGUSR2."""


@dataclass
class Status:
    """What a watcher tells the others about its rank."""

    rank: int
    host: str
    pid: int
    watcher: int
    state: str = RUNNING
    step: int = -1
    doing: str = "start"
    collective: str = ""
    beats: int = 0
    collectives: int = 0
    silent: float = 0.0
    limit: float | None = None
    """Seconds of silence that are allowed; None: any."""
    process: str = ""
    """What the system says of a silent process: stopped, waits for a device."""
    failed: str = ""
    over_at: float = 0.0
    """Seconds since 1970 at which it ended."""
    dumped: bool = False
    told: int = 0
    """How often it was told."""


def slot(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def stacks(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank:05d}.txt"


class Own:
    """The watcher's own rank: its page, its process, what is told of it."""

    def __init__(self, folder: Path, rank: int, pid: int, page: mmap.mmap, timeout: float):
        self.folder, self.page, self.timeout = folder, page, timeout
        self.status = Status(rank, socket.gethostname(), pid, os.getpid(), limit=timeout)
        self._file = os.open(slot(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(self._file, bytes(SLOT_BYTES), 0)  # a disk that fills up later does not matter

    def look(self, passed: float) -> None:
        """Take over the page, `passed` seconds after the last look."""
        s = self.status
        if s.state in OVER:
            return
        is_gone = os.getppid() != s.pid  # asked first: a rank says that it ends before it does
        beats, collectives, limit, step, state, doing, collective, failed = PAGE.unpack_from(self.page, 0)
        s.silent = 0.0 if beats != s.beats else s.silent + passed
        s.beats, s.collectives, s.step = beats, collectives, step
        s.limit = None if limit == float("inf") else limit
        s.state, s.doing, s.collective, s.failed = (_text(part) for part in (state, doing, collective, failed))
        if s.state == RUNNING and is_gone:
            s.state = GONE
        s.over_at = time.time() if s.state in OVER else 0.0
        s.process = _process_state(s.pid) if s.silent > 1.0 and s.state == RUNNING else ""

    def tell(self) -> None:
        self.status.told += 1
        text = json.dumps(asdict(self.status)).encode()
        with contextlib.suppress(OSError):  # the run itself will say what is wrong with its folder
            os.pwrite(self._file, text[:SLOT_BYTES].ljust(SLOT_BYTES, b" "), 0)

    def dump(self) -> None:
        """Have the rank write its stacks, wait until it has, and stop it there."""
        if self.status.state == RUNNING and self._send(DUMP):
            self._send(signal.SIGCONT)  # a stopped process takes its signals when it goes on
            path, size, end = stacks(self.folder, self.status.rank), -1, time.monotonic() + STACKS_SECONDS
            while time.monotonic() < end:
                time.sleep(0.05)
                before, size = size, path.stat().st_size if path.is_file() else 0
                if size > 0 and size == before:
                    break
            self._send(signal.SIGSTOP)  # what hung may go on now, with others that are told to end
        self.status.dumped = True
        self.tell()

    def kill(self) -> None:
        if self.status.state == RUNNING:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> bool:
        """A process that is no longer the parent has ended; its number may be another's."""
        if os.getppid() != self.status.pid:
            return False
        os.kill(self.status.pid, number)
        return True


def _text(part: bytes) -> str:
    return part.rstrip(b"\0").decode(errors="replace")


def _process_state(pid: int) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no Linux
        return ""
    return {"T": "stopped by a signal", "t": "held by a debugger", "D": "waits for a disk or a device"}.get(letter, "")


@dataclass
class Heard:
    """The last status of a rank, and for how long there was no newer one."""

    status: Status | None = None
    stale: float = 0.0


@dataclass
class View:
    """All ranks as one watcher sees them."""

    folder: Path
    size: int
    heard: dict[int, Heard] = field(default_factory=dict[int, Heard])

    def look(self, ranks: range, passed: float) -> None:
        for rank in ranks:
            heard, status = self.heard.setdefault(rank, Heard()), self._read(rank)
            is_new = status is not None and (heard.status is None or status.told != heard.status.told)
            heard.status, heard.stale = (status, 0.0) if is_new else (heard.status, heard.stale + passed)

    def _read(self, rank: int) -> Status | None:
        try:
            return Status(**json.loads(slot(self.folder, rank).read_bytes()))
        except (OSError, ValueError):  # not there yet, or read while it was written
            return None

    @property
    def known(self) -> list[Status]:
        return [h.status for h in self.heard.values() if h.status is not None]

    @property
    def is_over(self) -> bool:
        return len(self.known) == self.size and all(s.state in OVER for s in self.known)


@dataclass(frozen=True)
class Cause:
    rank: int
    what: str


def judge(view: View, timeout: float, failed_since: float) -> list[Cause]:
    """The ranks because of which the others cannot go on; usually none.

    A rank that waits in a collective is silent, but not to blame while another has begun fewer of them: that one is
    behind, and may do long honest work. `failed_since`: seconds since the first rank said that it failed.
    """
    running = [s for s in view.known if s.state == RUNNING]
    bad = sorted((s for s in view.known if s.state in (FAILED, GONE)), key=_over_at)
    gone = [s for s in bad if s.state == GONE]
    if bad and bad[0].state == FAILED:  # a launcher ends the others, and a rank that said why needs no report
        late = running and failed_since > GRACE_SECONDS
        return [Cause(s.rank, "failed, and said why") for s in bad if s.state == FAILED] if late else []
    if gone:
        return [Cause(s.rank, ended_how(view.folder, s.rank)) for s in gone]
    if lost := [rank for rank, h in view.heard.items() if _is_lost(h, timeout)]:
        return [Cause(rank, f"has not been heard of for {timeout:.0f} s: its machine or its watchdog is gone")
                for rank in lost]  # fmt: skip
    if running and failed_since > GRACE_SECONDS:
        hurt = [s for s in view.known if s.state == AFFECTED]
        return [Cause(s.rank, "failed, and said why") for s in sorted(hurt, key=_over_at)]
    fewest = min((s.collectives for s in running), default=0)
    behind = [s for s in running if s.collectives == fewest and s.limit is not None]
    if not any(s.silent > (s.limit or 0.0) for s in behind):
        return []
    silent = [s for s in behind if s.silent > (s.limit or 0.0) / 2]  # the others of one collective follow in a moment
    held = [s for s in silent if s.process]
    return [Cause(s.rank, f"has been silent for {s.silent:.0f} s" + (f" ({s.process})" if s.process else ""))
            for s in sorted(held or silent, key=lambda s: (s.step, -s.silent))]  # fmt: skip


def _over_at(status: Status) -> float:
    return status.over_at


def _is_lost(heard: Heard, timeout: float) -> bool:
    return heard.stale > timeout and (heard.status is None or heard.status.state not in OVER)


def ended_how(folder: Path, rank: int) -> str:
    """Of a process that ended without a word: a fault of native code leaves a trace."""
    with contextlib.suppress(OSError), stacks(folder, rank).open(errors="replace") as file:
        for line in file:
            if line.startswith("Fatal Python error: "):
                return f"died: {line.removeprefix('Fatal Python error: ').strip()}"
    return "is gone: killed (often for memory), or ended without a word"


class Stragglers:
    """Ranks that kept all others waiting, and went on. Noted in a file."""

    def __init__(self, folder: Path, page: mmap.mmap, at_least: float):
        self.path, self.page, self.at_least = folder / STRAGGLERS, page, at_least
        self._late: dict[int, Status] = {}
        self._count = 0

    def look(self, running: list[Status]) -> None:
        most = max((s.collectives for s in running), default=0)
        silent = [s for s in running if s.limit is not None and s.silent >= self.at_least]
        late = {s.rank: s for s in silent if s.collectives < most or s.process}
        for rank, before in list(self._late.items()):
            if rank not in late or late[rank].beats != before.beats:
                self._note(self._late.pop(rank))
        if len(late) < len(running):
            self._late |= late

    def _note(self, late: Status) -> None:
        about = {"rank": late.rank, "host": late.host, "step": late.step, "doing": late.doing,
                 "seconds": round(late.silent, 1)}  # fmt: skip
        with contextlib.suppress(OSError), self.path.open("a") as file:
            file.write(json.dumps(about) + "\n")
            self._count += 1
        TOLD.pack_into(self.page, PAGE.size, self._count)


class Watcher:
    def __init__(self, folder: Path, rank: int, size: int, timeout: float, page: mmap.mmap, pid: int):
        self.folder, self.rank, self.size, self.timeout, self.page = folder, rank, size, timeout, page
        self.every = min(max(timeout / 60, 0.2), 5.0)
        self.own = Own(folder, rank, pid, page, timeout)
        self.view = View(folder, size)
        self.stragglers = Stragglers(folder, page, max(1.0, timeout / 20))
        self._failed_since = 0.0

    def run(self) -> None:
        last, wake = time.monotonic(), [0]
        while True:
            if select.select(wake, [], [], self.every)[0]:  # the rank says that it ends, or is gone
                wake = []
                if not os.read(0, 1):  # a process that ends closes its files a moment before it is gone
                    time.sleep(0.05)
            now = time.monotonic()
            passed, last = min(now - last, 2 * self.every), now
            if self._turn(passed):
                return

    def _turn(self, passed: float) -> bool:
        """One look; whether this process is no longer needed."""
        self.own.look(passed)
        self.own.tell()
        if (self.folder / VERDICT).is_file():
            self._carry_out()
            return True
        if not self.folder.is_dir():  # nothing can be read or said any more; the run will notice at its next save
            return self.own.status.state in OVER
        causes = self._judge(passed)
        if causes:
            self._decide(causes)
            return False
        if self.rank == 0:
            if self.view.is_over:
                (self.folder / CLOSED).touch()
            return self.view.is_over
        state = self.own.status.state
        alone = (self.folder / CLOSED).exists() or self.view.heard[0].stale > self.timeout
        return state in (ENDED, FAILED, AFFECTED) or (state == GONE and alone)

    def _judge(self, passed: float) -> list[Cause]:
        if self.rank != 0:  # all but the first only see to it that the first is there
            self.view.look(range(1), passed)
            return [c for c in judge(self.view, self.timeout, 0.0) if _is_lost(self.view.heard[0], self.timeout)]
        self.view.look(range(self.size), passed)
        self.stragglers.look([s for s in self.view.known if s.state == RUNNING])
        if any(s.state in (FAILED, AFFECTED) for s in self.view.known):
            self._failed_since += passed
        return judge(self.view, self.timeout, self._failed_since)

    def _decide(self, causes: list[Cause]) -> None:
        """Publish the verdict, unless another watcher was faster."""
        draft = self.folder / f".verdict-{self.rank}"
        draft.write_text(json.dumps({"by": self.rank, "causes": [asdict(c) for c in causes]}))
        with contextlib.suppress(FileExistsError):
            os.link(draft, self.folder / VERDICT)
        draft.unlink()

    def _carry_out(self) -> None:
        verdict = json.loads((self.folder / VERDICT).read_text())
        causes = [Cause(**c) for c in verdict["causes"]]
        blamed = {c.rank for c in causes}
        if self.rank in blamed:  # it may go on when it is woken: the others stand still by then
            self._await_stacks(set(range(self.size)) - blamed)
        self.own.dump()
        if verdict["by"] == self.rank:
            try:
                self._report(causes)
            finally:
                (self.folder / REPORTED).touch()
        end = time.monotonic() + REPORT_SECONDS
        while not (self.folder / REPORTED).exists() and time.monotonic() < end:
            time.sleep(0.2)
        self.own.kill()

    def _report(self, causes: list[Cause]) -> None:
        self._await_stacks(set(range(self.size)))
        path = write_report(self.folder, self.view, causes)
        print(brief(self.folder, self.view, causes, path), file=sys.stderr, flush=True)

    def _await_stacks(self, ranks: set[int]) -> None:
        """Until their watchers have them, or take too long."""
        end = time.monotonic() + STACKS_SECONDS + 1
        while time.monotonic() < end:
            self.view.look(range(self.size), 0.0)
            if all(s.dumped or s.state in (ENDED, FAILED, AFFECTED) for s in self.view.known if s.rank in ranks):
                break
            time.sleep(0.1)


# -- the report -----------------------------------------------------------------------------------------------------


def write_report(folder: Path, view: View, causes: list[Cause]) -> Path:
    """`report-TIME.json` and `.txt` beside the folder of the attempt; returns the text."""
    at = datetime.now(UTC)
    path = folder.parent / f"report-{at:%Y%m%d-%H%M%S}.txt"
    traces = {s.rank: _stacks_of(folder, s.rank) for s in view.known}
    record: dict[str, Any] = {
        "time": at.isoformat(timespec="seconds"), "attempt": folder.name, "causes": [asdict(c) for c in causes],
        "ranks": [{**asdict(s), "stacks": traces[s.rank]} for s in sorted(view.known, key=lambda s: s.rank)],
    }  # fmt: skip
    _write(path.with_suffix(".json"), json.dumps(record, indent=1))
    parts = [_head(view, causes), _lines(view.known)]
    parts += [f"--- error of rank {s.rank} ---\n{_printable(s.failed)}" for s in view.known if s.failed]
    parts += [f"--- stacks of rank {rank} ---\n{trace}" for rank, trace in sorted(traces.items()) if trace]
    _write(path, "\n\n".join(parts) + "\n")
    return path


def brief(folder: Path, view: View, causes: list[Cause], path: Path) -> str:
    """For the terminal: the ranks to blame, and where the first of them stands."""
    blamed = {c.rank for c in causes}
    shown = sorted(view.known, key=lambda s: (s.rank not in blamed, s.rank))[:8]
    trace = _stacks_of(folder, causes[0].rank).splitlines()[:25]
    return "\n".join([_head(view, causes), _lines(shown), *trace, f"  -> all ranks and their stacks: {path}"])


def _head(view: View, causes: list[Cause]) -> str:
    known = {s.rank: s for s in view.known}
    lines: list[str] = []
    for cause in causes[:8]:
        s = known.get(cause.rank)
        last = "" if s is None else f"; last step {s.step}, last collective {s.collective!r}, doing {s.doing!r}"
        lines.append(f"[RANK] rank {cause.rank} of {view.size} {cause.what}{last}")
    return _printable("\n".join([*lines, f"all {view.size} ranks are ended"]))


def _lines(ranks: list[Status]) -> str:
    return _printable("\n".join(
        f"  rank {s.rank} ({s.host}, process {s.pid}): {s.state}, step {s.step}, {s.doing!r}, silent {s.silent:.1f} s, "
        f"{s.collectives} collectives, last {s.collective!r}{f', {s.process}' if s.process else ''}"
        for s in sorted(ranks, key=lambda s: s.rank)
    ))  # fmt: skip


def _stacks_of(folder: Path, rank: int) -> str:
    try:
        return _printable(stacks(folder, rank).read_text(errors="replace")[-20_000:]).strip()
    except OSError:
        return ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _write(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the terminal still gets it
        path.write_text(text, encoding="utf-8")


def main() -> None:
    about = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    page = mmap.mmap(about["page"], mmap.PAGESIZE)
    Watcher(Path(about["folder"]), about["rank"], about["size"], about["timeout"], page, about["pid"]).run()


if __name__ == "__main__":
    main()
