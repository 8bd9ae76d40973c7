"""How a rank ends, as its launcher is told."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

EXITS = "LENSMITH_EXITS"
"""Variable of a rank: the folder in which it leaves its exit code."""
STOPPED = (129, 130, 143)
"""Exit codes of SIGHUP, SIGINT and SIGTERM after a save: an orderly end."""
CONSEQUENCES = ("RANKS", "OTHER_RANK")
"""Codes of errors that a rank has because another failed first."""


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def speaker(error: str = "") -> str | None:
    """What this process puts before a message: nothing, or which rank it is. None: another rank says it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return ""
    return None if error == "OTHER_RANK" else f"rank {rank}: "


def leave_code(code: int, error: str = "") -> int:
    """Called by a rank at its end: tells the launcher its exit code and the code of its error; the first call counts.
    Returns what torchrun is to see: it would kill the other ranks when the first has saved after a signal."""
    if EXITS not in os.environ or not is_rank():
        return code
    about = {"code": code, "error": error, "time": time.time()}
    try:
        with Path(os.environ[EXITS], f"rank-{os.environ['RANK']}.json").open("x") as file:
            file.write(json.dumps(about))
    except OSError:  # told already, or a full disk: torchrun's own view has to do
        pass
    return 0 if code in STOPPED else code
