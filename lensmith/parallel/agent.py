"""torchrun as `lensmith train` starts it: it ends with its launcher, and says what became of the ranks in a file.

`python -m lensmith.parallel.agent FILE [torchrun's own arguments]`. torchrun ends with 1 and a traceback whatever
happened.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from pathlib import Path

SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def main(failures: Path, arguments: list[str], launcher: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    _end_with(launcher)
    logging.disable(logging.ERROR)  # its own lines would bury the one error of a rank
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        found = {rank: {"code": f.exitcode, "time": f.timestamp} for rank, f in error.failures.items()}
        failures.write_text(json.dumps(found))
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _end_with(launcher: int) -> None:
    """A launcher that is killed takes the ranks with it, as if it had got SIGTERM. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[3:], int(sys.argv[2])))
