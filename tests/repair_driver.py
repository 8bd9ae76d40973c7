"""Faults in one repair: `python repair_driver.py WORK all|sample`, with the shim in LD_PRELOAD.

Imports once, forks for every case: a child repairs and is killed (or gets ENOSPC) at call k, then another repairs
again. Prints one JSON object: the number of calls, and every case that did not end as it must.
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

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from lensmith.core.errors import RunError
from lensmith.recipe.inspect import inspect_folder
from lensmith.report.terminal import Terminal

SHIM = ctypes.CDLL(os.environ["LD_PRELOAD"])
BEFORE, MIDDLE, FULL = 0, 1, 2
LAST = 5
NAME, BACKUP = "model", "model.before-repair"


def child(work: Callable[[], int]) -> tuple[int, int]:
    """(what `work` gave, the wait status) of a forked process."""
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(theirs, str(work()).encode())
            os._exit(0)
        except (RunError, OSError):  # what the command line makes 74 of
            SHIM.kp_disarm()
            os._exit(RunError.exit_code)
        except BaseException:  # noqa: BLE001 - the forked child must not go on as a second driver
            SHIM.kp_disarm()
            traceback.print_exc()
            os._exit(99)
    os.close(theirs)
    with os.fdopen(mine, "rb") as pipe:
        text = pipe.read()
    return int(text or -1), os.waitpid(pid, 0)[1]


def repair(folder: Path, k: int, mode: int) -> int:
    """The calls that were made."""
    if k >= 0:
        SHIM.kp_arm(os.fsencode(folder.parent), ctypes.c_long(k), mode)
    status = inspect_folder(folder, values=False, repair=True, dtype=None, terminal=Terminal("quiet"))
    SHIM.kp_disarm()
    assert status == 0
    return SHIM.kp_count()


def digest(folder: Path) -> str | None:
    """Of all names and bytes in a folder; None where there is none."""
    if not folder.is_dir():
        return None
    h = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        h.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + path.read_bytes())
    return h.hexdigest()


class Cases:
    def __init__(self, work: Path):
        self.work, self.source = work, work / "source"
        tiny.make_model(self.source, "qwen2_5_vl", dtype=torch.bfloat16)
        state = load_file(self.source / "model.safetensors")
        wide = {n: t if "visual" in n else t.float() for n, t in state.items()}
        save_file(wide, self.source / "model.safetensors", metadata={"format": "pt"})
        (self.source / "more").mkdir()
        (self.source / "more" / "notes.txt").write_text("kept")
        self.old = digest(self.source)
        self.calls, status = child(lambda: repair(self.fresh(), 0, BEFORE))
        assert status == 0, "a repair without faults"
        self.new = digest(self.work / "run" / NAME)
        assert self.new != self.old and digest(self.work / "run" / BACKUP) == self.old

    def fresh(self) -> Path:
        shutil.rmtree(self.work / "run", ignore_errors=True)
        shutil.copytree(self.source, self.work / "run" / NAME)
        return self.work / "run" / NAME

    def case(self, k: int, mode: int) -> str | None:
        """What is wrong with case (k, mode), or None."""
        folder = self.fresh()
        backup = folder.with_name(BACKUP)
        _, status = child(lambda: repair(folder, k, mode))
        now, kept = digest(folder), digest(backup)
        if mode == FULL and status != 0:
            if os.waitstatus_to_exitcode(status) != RunError.exit_code:
                return f"ENOSPC gave {os.waitstatus_to_exitcode(status)}"
            if now is None or (folder.parent / f".{NAME}.repair").exists():
                return "ENOSPC did not put things back"
        elif mode != FULL and (not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL):
            return f"not killed: {status}"
        if (now, kept) not in ((self.old, None), (None, self.old), (self.new, self.old)):
            return f"after the fault: {now}, {kept}"
        _, status = child(lambda: repair(folder, -1, BEFORE))
        if status != 0:
            return f"the next call gave {os.waitstatus_to_exitcode(status)}"
        if (digest(folder), digest(backup)) != (self.new, self.old):
            return "the next call ended otherwise"
        left = sorted(p.name for p in folder.parent.iterdir())
        return None if left == [NAME, BACKUP] else f"left over: {left}"


def main() -> None:
    cases = Cases(Path(sys.argv[1]))
    grid = [(k, mode) for k in range(1, cases.calls + 1) for mode in (BEFORE, MIDDLE, FULL)]
    if sys.argv[2] == "sample":  # every seventh call, the modes in turn, and the renames at the end
        grid = [(k, n % 3) for n, k in enumerate(range(1, cases.calls - LAST, 7))] + grid[-3 * LAST :]
    wrong = {f"call {k}, mode {mode}": problem for k, mode in grid if (problem := cases.case(k, mode)) is not None}
    print(json.dumps({"calls": cases.calls, "cases": len(grid), "wrong": wrong}))


main()
