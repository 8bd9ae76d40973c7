"""Faults in one save of a real run: `python crash_driver.py WORK all|sample`, with the shim in LD_PRELOAD.

Imports once, forks for every case: a child trains and is killed (or gets ENOSPC) at call k of the save of step 2, then
another resumes. Prints one JSON object: the number of calls, and every case that did not end as it must.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import runs
import tiny
import torch

from lensmith.checkpoint.store import Store
from lensmith.core.errors import RunError
from lensmith.recipe import session, stage

SHIM = ctypes.CDLL(os.environ["LD_PRELOAD"])
BEFORE, MIDDLE, FULL = 0, 1, 2


class Faulty(stage.StageRun):
    """Fails at call `k` of the save of step 2."""

    k, mode, calls = -1, BEFORE, 0

    def _save(self, p: Any, metrics: Any) -> None:
        if p.step == 2:
            SHIM.kp_arm(os.fsencode(self.store.folder), ctypes.c_long(self.k), self.mode)
        super()._save(p, metrics)
        SHIM.kp_disarm()
        if p.step == 2:
            type(self).calls = SHIM.kp_count()


def child(work: Callable[[], Any]) -> tuple[Any, int]:
    """(what `work` gave, as JSON; the wait status) of a forked process."""
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(theirs, json.dumps(work()).encode())
            os._exit(0)
        except RunError as error:
            SHIM.kp_disarm()
            os.write(theirs, json.dumps(error.render()).encode())
            os._exit(error.exit_code)
        except BaseException:  # noqa: BLE001 - the forked child must not go on as a second driver
            SHIM.kp_disarm()
            traceback.print_exc()
            os._exit(99)
    os.close(theirs)
    with os.fdopen(mine, "rb") as pipe:
        text = pipe.read()
    return (json.loads(text) if text else None), os.waitpid(pid, 0)[1]


class Cases:
    def __init__(self, work: Path):
        self.work = work
        os.environ["LENSMITH_CACHE"] = str(work / "cache")
        self.base = tiny.make_model(work / "base")
        self.chat = tiny.make_chat(work / "chat", 12)
        session.StageRun = Faulty  # type: ignore[misc]
        session.write_report = lambda folder: folder
        torch.set_num_threads(1)
        whole, _ = child(lambda: self.train(work / "first", keep=9))
        for step in (2, 3):
            shutil.rmtree(work / "first" / "checkpoints" / f"step-{step:08d}")
        shutil.copytree(work / "first", work / "run")
        self.reference, _ = child(lambda: self.train(work / "run"))  # counts the calls, those of the purge too
        assert {**whole, "calls": 0} == {**self.reference, "calls": 0}

    def train(self, folder: Path, k: int = -1, mode: int = BEFORE, keep: int = 1) -> dict[str, Any]:
        Faulty.k, Faulty.mode = k, mode
        over: dict[str, Any] = {
            "tune": {"kind": "lora", "rank": 2, "dropout": 0.1}, "train": {"max_steps": 3}, "batch": {"samples": 4},
            "save": {"every_steps": 1, "keep_last": keep},
        }  # fmt: skip
        out = runs.quiet_train(runs.located(folder, self.base, self.chat, **over)).summary
        state = Path(out["checkpoint"]) / "state" / "training.safetensors"
        return {
            "losses": out["losses"],
            "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
            "calls": Faulty.calls,
        }

    def case(self, k: int, mode: int) -> str | None:
        """What is wrong with case (k, mode), or None. The run stands at step 1 before it."""
        folder = self.work / "run"
        shutil.rmtree(folder)
        shutil.copytree(self.work / "first", folder)
        out, status = child(lambda: self.train(folder, k, mode))
        store = Store(folder / "checkpoints")
        if mode == FULL:
            if status == 0:  # the call needs no space, and no later one does
                return None if out["sha256"] == self.reference["sha256"] else "ended otherwise"
            if os.waitstatus_to_exitcode(status) != 74 or "[SAVE]" not in out or "MiB are free" not in out:
                return f"ENOSPC gave {os.waitstatus_to_exitcode(status)}: {out}"
            if [p.name for p in store.folder.iterdir() if p.name.startswith(".staging")]:
                return "the staging folder is left"
        elif not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            return f"not killed: {status} {out}"
        if not set(store.steps()) <= {1, 2} or not store.steps():
            return f"steps {store.steps()}"
        warnings: list[str] = []
        found = store.newest(warnings.append)
        if found is None or warnings:
            return f"after the fault: {found}, {warnings}"
        out, status = child(lambda: self.train(folder))
        if status != 0:
            return f"resume gave {os.waitstatus_to_exitcode(status)}: {out}"
        if (out["losses"], out["sha256"]) != (self.reference["losses"], self.reference["sha256"]):
            return "the resumed run ended otherwise"
        left = [p.name for p in store.folder.iterdir()]
        return None if left == ["step-00000003"] else f"left over: {left}"


def main() -> None:
    cases = Cases(Path(sys.argv[1]))
    calls = cases.reference["calls"]
    grid = [(k, mode) for k in range(1, calls + 1) for mode in (BEFORE, MIDDLE, FULL)]
    if sys.argv[2] == "sample":  # every tenth call, the modes in turn
        grid = [(k, n % 3) for n, k in enumerate(range(1, calls + 1, 10))]
    wrong = {f"call {k}, mode {mode}": problem for k, mode in grid if (problem := cases.case(k, mode)) is not None}
    print(json.dumps({"calls": calls, "cases": len(grid), "wrong": wrong}))


main()
