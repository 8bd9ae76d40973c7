"""A run on a local Ray of which one rank is killed at its third step, once: `python ray_driver.py RUN.yaml MARKER`.

Functions of a main program travel to Ray's processes by value.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lensmith.recipe import train_ray
from lensmith.recipe.run import load_run
from lensmith.report.terminal import Terminal

MARKER = Path(sys.argv[2])
ordinary = train_ray.one_rank


def faulty_rank(given: dict[str, Any], mode: Any, said: Path) -> None:
    from lensmith.engine.loop import Loop

    one = Loop._one

    def killed(self: Any, data: Any) -> bool:
        if os.environ["RANK"] == "1" and data.step.number == 3 and not MARKER.exists():
            MARKER.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return one(self, data)

    Loop._one = killed  # type: ignore[method-assign]
    try:
        ordinary(given, mode, said)
    finally:
        Loop._one = one  # type: ignore[method-assign]


if __name__ == "__main__":
    train_ray.one_rank = faulty_rank
    train_ray.train_on_ray(load_run(sys.argv[1]), Terminal("normal"), address="local", storage=None, dry_run=False)
