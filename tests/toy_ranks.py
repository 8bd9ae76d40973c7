"""Ranks without torch, for the launcher and the watchdog: a sum over ranks step by step, kept in a file.

`python toy_ranks.py launch FOLDER PLAN` is the launcher, `python -m toy_ranks FOLDER PLAN` a rank; so is
`python toy_ranks.py pair FOLDER PLAN`, which starts two without torchrun. PLAN is JSON: ranks, steps, timeout,
restarts, fault, at (step), of (rank), pause (seconds a step).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError, DataError, RunError, UserError
from lensmith.parallel.exits import leave_code
from lensmith.parallel.watchdog import Watchdog

ALONE = {"ranks": 2, "steps": 12, "timeout": 30.0, "restarts": 0, "fault": "", "at": 5, "of": 1, "pause": 0.0}


class Stopped(Exception):
    def __init__(self, number: int):
        self.exit_code = 128 + number


@dataclass
class FileRanks:
    """Collectives through a folder of this attempt; the watchdog is told of each."""

    rank: int
    size: int
    folder: Path
    dog: Watchdog | None = None
    count: int = field(default=0)

    def gather(self, value: Any, what: str) -> list[Any]:
        if self.dog is not None:
            self.dog.collective(what)
        self.count += 1
        mine = self.folder / f"{self.count}-{self.rank}"
        mine.with_suffix(".part").write_text(json.dumps(value))
        mine.with_suffix(".part").rename(mine)
        paths = [self.folder / f"{self.count}-{rank}" for rank in range(self.size)]
        while not all(path.exists() for path in paths):
            time.sleep(0.005)
        return [json.loads(path.read_text()) for path in paths]

    def broadcast_json(self, value: Any, what: str) -> Any:
        return self.gather(value, what)[0]


def fault(kind: str, dog: Watchdog, timeout: float) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "exits with 0":
        os._exit(0)
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "holds the interpreter lock":
        ctypes.PyDLL(None).sleep(1000)
    elif kind == "segmentation fault":
        ctypes.string_at(0)
    elif kind == "late":
        time.sleep(3.0)
    elif kind == "long honest work":
        with dog.phase("index"):
            time.sleep(2 * timeout)
    elif kind == "too long a phase":
        with dog.phase("save", limit=1.0):
            time.sleep(1000)
    elif kind == "data":
        raise DataError("ROW", "a wrong row", where="a.jsonl:3", remedy="mend it")
    elif kind == "defect":
        raise ValueError("a defect")


def rank_main(folder: Path, plan: dict[str, Any]) -> int:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = folder / f"meeting-{os.environ['MASTER_PORT']}"
    meeting.mkdir(exist_ok=True)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"rank {rank} speaks", flush=True)
    ranks, caught = FileRanks(rank, size, meeting), list[int]()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, frame: caught.append(n))
    if plan["fault"] == "config":
        raise ConfigError("KEY", "a wrong key", where="run.yaml:1", remedy="mend it")
    with Watchdog(folder / "ranks", ranks, plan["timeout"]) as dog:
        ranks.dog = dog
        state = folder / "state.json"
        step, total = json.loads(state.read_text()) if state.exists() else (0, 0)
        while step < plan["steps"]:
            dog.beat(step, "compute")
            time.sleep(plan["pause"])
            marker = folder / "faulted"
            if (rank, step) == (plan["of"], plan["at"]) and plan["fault"] and not marker.exists():
                if plan.get("once", True):
                    marker.touch()
                fault(plan["fault"], dog, plan["timeout"])
            said = ranks.gather([(step + 1) * (rank + 1), caught[0] if caught else 0], "sum")
            step, total = step + 1, (total * 31 + sum(value for value, _ in said)) % 1_000_003
            if rank == 0:
                state.with_suffix(".tmp").write_text(json.dumps([step, total]))
                state.with_suffix(".tmp").replace(state)
                with (folder / "stragglers").open("a") as file:
                    file.writelines(json.dumps(s) + "\n" for s in dog.stragglers())
            if number := max(n for _, n in said):
                time.sleep(0.5 * rank)  # the ranks do not end at one moment
                raise Stopped(number)
        if rank == 0:
            time.sleep(plan.get("tail", 0.0))
    return 0


def run_rank(folder: Path, plan: dict[str, Any]) -> int:
    try:
        return leave_code(rank_main(folder, plan))
    except Stopped as stopped:
        return leave_code(stopped.exit_code)
    except UserError as error:
        print(error.render(), file=sys.stderr)
        return leave_code(error.exit_code, error.code)


class Terminal:
    def event(self, name: str, message: str = "", **fields: Any) -> None:
        print(f"{name} {message}", flush=True)

    def warning(self, message: str) -> None:
        print(f"warning: {message}", flush=True)


def launcher(folder: Path, plan: dict[str, Any]) -> int:
    from lensmith.parallel.launch import launch

    try:
        return launch(
            [str(folder), json.dumps(plan)], ranks=plan["ranks"], restarts=plan["restarts"], output=folder,
            terminal=Terminal(), program="toy_ranks",
        )  # fmt: skip
    except RunError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code


def pair(folder: Path, plan: dict[str, Any]) -> int:
    """Two ranks without a launcher; prints their exit codes."""
    about = {"WORLD_SIZE": "2", "MASTER_PORT": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, "rank", str(folder), json.dumps(plan)],
                         env={**os.environ, **about, "RANK": str(rank)}) for rank in range(2)
    ]  # fmt: skip
    print(json.dumps([p.wait() for p in ranks]))
    return 0


if __name__ == "__main__":
    roles = {"launch": launcher, "pair": pair, "rank": run_rank}
    role, *rest = sys.argv[1:] if sys.argv[1] in roles else ["rank", *sys.argv[1:]]
    sys.exit(roles[role](Path(rest[0]), {**ALONE, **json.loads(rest[1])}))
