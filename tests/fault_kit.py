"""Runs of a tiny model in forked processes, into which faults are planted; and how a run ended."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from lensmith.checkpoint.store import Store
from lensmith.recipe import session, stage

STEPS = 6
LORA = {"kind": "lora", "rank": 2, "dropout": 0.1}
BEFORE_EXIT = 90.0
"""Seconds after which a process counts as hung, and the test fails."""

Plant = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """`code`: the exit status, or minus the signal. `said`: everything it wrote."""

    code: int
    said: str


def run_in(folder: Path, base: Path, chat: Path, /, **over: Any) -> Any:
    """Six steps of four samples, saved every second step. Dropout makes the end depend on the generators."""
    values: dict[str, Any] = {
        "tune": LORA, "train": {"max_steps": STEPS}, "batch": {"samples": 4},
        "save": {"every_steps": 2, "keep_last": 2},
    }  # fmt: skip
    return runs.located(folder, base, chat, **runs.merge(values, over))


def start(run: Any, plant: Plant | None = None, *, mode: str = "--quiet", out: str | None = None) -> tuple[int, Path]:
    """`lensmith train` in a forked process, the leader of its own group, with a fault planted; its id, and the file
    that it writes to."""
    run.output.parent.mkdir(parents=True, exist_ok=True)
    file = run.output.parent / "fault.yaml"
    file.write_text(run.resolved_yaml(), encoding="utf-8")
    said = run.output.parent / f"said-{time.monotonic_ns()}.txt"
    pid = os.fork()
    if pid:
        return pid, said
    try:
        os.setpgid(0, 0)
        descriptor = os.open(out or said, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False, buffering=1)
        if plant is not None:
            plant()
        from lensmith.cli import main

        main(["train", str(file), *([mode] if mode else [])])
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:  # noqa: BLE001 - the forked child must not go on as a second pytest
        import traceback

        traceback.print_exc()
        code = 99
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def ended(pid: int, said: Path) -> Ended:
    """Wait for a process of `start`, with a limit."""
    deadline = time.monotonic() + BEFORE_EXIT
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
            return Ended(os.waitstatus_to_exitcode(status), text)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail(f"the run hung; it said: {said.read_text() if said.exists() else ''}")
        time.sleep(0.005)


def train(run: Any, plant: Plant | None = None, **how: Any) -> Ended:
    return ended(*start(run, plant, **how))


def wait_for_step(pid: int, folder: Path, step: int) -> None:
    """Until step `step` (0: nothing) is on record, or the process has ended."""
    metrics, ended = folder / "metrics.jsonl", Path(f"/proc/{pid}/stat")
    while step and ended.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        if metrics.exists() and metrics.read_text().count('"kind": "step"') >= step:
            return
        time.sleep(0.002)


def end_of(folder: Path) -> dict[str, Any]:
    """Losses, trained state, and which steps are on record."""
    newest = Store(folder / "checkpoints").path(steps_of(folder)[-1])
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "losses": summary["losses"], "steps": [r["step"] for r in records(folder)],
        "state": hashlib.sha256((newest / "state/training.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip


def records(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def steps_of(folder: Path) -> list[int]:
    return Store(folder / "checkpoints").steps()


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in (folder / "checkpoints").glob(".*")]


@dataclass(frozen=True)
class Bench:
    """A model, data, and the end of the undisturbed run."""

    base: Path
    chat: Path
    whole: dict[str, Any]
    seconds: float

    def settle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its index cache, and no report, which takes longer than the training."""
        monkeypatch.setenv("LENSMITH_CACHE", str(self.chat.parent.parent / "cache"))
        monkeypatch.setattr(session, "write_report", lambda folder: folder)

    def run(self, folder: Path, /, **over: Any) -> Any:
        return run_in(folder, self.base, self.chat, **over)

    def goes_on(self, folder: Path, /, **over: Any) -> Ended:
        """The run started again by nothing but the same command: it must end as the undisturbed one did."""
        found = train(self.run(folder, **over))
        assert found.code == 0, found.said
        assert end_of(folder) == self.whole
        assert leftovers(folder) == []
        return found


def make_bench(folder: Path, base: Path) -> Bench:
    bench = Bench(base, tiny.make_chat(folder / "chat", 24), {}, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        bench.settle(patch)
        for name in ("first", "whole"):  # the first one makes the index
            begin = time.monotonic()
            found = train(bench.run(folder / name / "run"))
            seconds = time.monotonic() - begin
            assert found.code == 0, found.said
    return replace(bench, whole=end_of(folder / "whole" / "run"), seconds=seconds)


# -- where faults are planted -----------------------------------------------------------------------------------------


def at_step(number: int, fault: Plant) -> Plant:
    """Behind step `number`, before it is saved."""

    def plant() -> None:
        log = stage.StageRun._log

        def logged(self: Any, p: Any, *args: Any) -> None:
            log(self, p, *args)
            if p.step == number:
                fault()

        stage.StageRun._log = logged  # type: ignore[method-assign]

    return plant


def at_save(step: int, fault: Plant) -> Plant:
    """When step `step` is about to be saved."""

    def plant() -> None:
        save = stage.StageRun._save

        def saves(self: Any, p: Any, metrics: Any) -> Any:
            if p.step == step:
                fault()
            return save(self, p, metrics)

        stage.StageRun._save = saves  # type: ignore[method-assign]

    return plant


def signal_self(number: int) -> Plant:
    return lambda: os.kill(os.getpid(), number)


# -- what only the kernel can do --------------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_PRIVATE, _BIND, _REMOUNT, _READ_ONLY = 0x40000 | 0x4000, 0x1000, 0x20, 0x1


def own_mounts() -> None:
    """This process gets mounts of its own. Raises `PermissionError` where that is not allowed."""
    flags = _NEW_MOUNTS if os.geteuid() == 0 else _NEW_MOUNTS | _NEW_USER
    _checked(_LIBC.unshare(flags))
    _checked(_LIBC.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None))


def mount_tmpfs(at: Path, options: str) -> None:
    _checked(_LIBC.mount(b"tmpfs", os.fsencode(at), b"tmpfs", ctypes.c_ulong(0), options.encode()))


def remount_tmpfs(at: Path, options: str) -> None:
    _checked(_LIBC.mount(b"tmpfs", os.fsencode(at), b"tmpfs", ctypes.c_ulong(_REMOUNT), options.encode()))


def bind(folder: Path) -> None:
    """A mount of `folder` on itself, which can be made read-only."""
    _checked(_LIBC.mount(os.fsencode(folder), os.fsencode(folder), None, ctypes.c_ulong(_BIND), None))


def read_only(folder: Path) -> None:
    flags = ctypes.c_ulong(_REMOUNT | _BIND | _READ_ONLY)
    _checked(_LIBC.mount(b"none", os.fsencode(folder), None, flags, None))


def _checked(result: int) -> None:
    if result != 0:
        raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def obey_permissions() -> None:
    """Root too: without the capabilities to read, write and search in spite of permissions."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    header, data = Header(0x20080522, 0), (Data * 2)()
    _checked(_LIBC.capget(ctypes.byref(header), data))
    data[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    _checked(_LIBC.capset(ctypes.byref(header), data))


def in_own_mounts(work: Callable[[], Any]) -> Any:
    """What `work` gives in a forked process with mounts of its own, as JSON; skips the test where that is forbidden."""
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(mine)
        try:
            own_mounts()
        except PermissionError:
            os._exit(77)
        try:
            os.write(theirs, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - as in `start`
            import traceback

            os.write(theirs, json.dumps(traceback.format_exc()).encode())
            os._exit(99)
    os.close(theirs)
    with os.fdopen(mine, "rb") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 77:
        pytest.skip("this system allows no mount namespaces")
    found = json.loads(text) if text else None
    assert code == 0, found
    return found
