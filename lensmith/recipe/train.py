"""`train(run)`: from a run file to a published checkpoint, a report and a summary."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lensmith.report.terminal import Terminal


class Clock:
    """Wall and CPU seconds per phase. CPU is of this process; that of its worker processes is `workers`, counted when
    they have ended."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()
        self._workers = cpu_seconds(resource.RUSAGE_CHILDREN)

    def lap(self, phase: str) -> None:
        wall, cpu = time.perf_counter(), cpu_seconds()
        self.wall[phase] = self.wall.get(phase, 0.0) + wall - self._wall
        self.cpu[phase] = self.cpu.get(phase, 0.0) + cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        self.cpu["workers"] = cpu_seconds(resource.RUSAGE_CHILDREN) - self._workers


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@dataclass
class Outcome:
    """What a run amounted to; `summary` is the content of summary.json."""

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)


def train(
    run: str | Path | Any, overrides: Sequence[str] = (), *, terminal: Terminal | None = None, dry_run: bool = False
) -> Outcome:
    """Train a run file (or an already loaded run). Resumes by itself from the newest checkpoint that verifies.

    One rank of several where a launcher says so by its variables; all ranks call this with the same run.

    `dry_run`: index, model, one step and one save in a temporary folder; nothing is kept. Raises `UserError`s, and
    `Interrupted` after a signal.
    """
    clock = Clock()
    from lensmith.parallel.ranks import Ranks, from_env, is_of_a_collective, join, leave
    from lensmith.parallel.watchdog import Watchdog
    from lensmith.recipe.build import device_of
    from lensmith.recipe.run import Located, load_run
    from lensmith.recipe.session import Session

    located = run if isinstance(run, Located) else load_run(run, overrides)
    ranks = from_env()
    terminal = (terminal or Terminal("normal")) if ranks.is_main else Terminal.silent()
    joined = join(ranks, device_of(located.run))
    timeout = located.run.parallel.timeout
    try:
        with Watchdog(located.output / "ranks", Ranks() if dry_run else ranks, timeout) as dog:
            watched = replace(ranks, beat=dog.collective)
            with Session(located, terminal, clock, dry_run=dry_run, ranks=watched, dog=dog) as session:
                return Outcome(session.output, session.run())
    except RuntimeError as error:
        if ranks.several and is_of_a_collective(error):
            raise ranks.gone(error) from error
        raise
    finally:
        if joined:
            leave()
