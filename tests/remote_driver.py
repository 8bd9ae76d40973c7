"""One rank of two that share a run folder and a store: `python remote_driver.py FOLDER URL RANK PORT CASE`.

Two sessions, the second with an empty run folder. Prints of each what it put and how it ended, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from lensmith.checkpoint import remote as remote_module
from lensmith.checkpoint.mirror import Mirror
from lensmith.checkpoint.remote import Remote
from lensmith.checkpoint.store import Store
from lensmith.core.errors import RunError
from lensmith.parallel.ranks import Ranks, join, leave


def main() -> None:
    folder, url, rank, port, case = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    remote_module.PAUSES_SECONDS = (0.0,)
    ranks = Ranks(rank, 2, rank, 2)
    join(ranks, torch.device("cpu"))
    for session in (1, 2):
        print(json.dumps(run(folder, Remote(url), ranks, case)))
        ranks.barrier("end a session")
        if ranks.is_main:
            shutil.rmtree(folder)  # the second one is on another machine
            folder.mkdir()
        ranks.barrier(f"moved after session {session}")
    leave()


def run(folder: Path, remote: Remote, ranks: Ranks, case: str) -> dict[str, Any]:
    store, put = Store(folder / "checkpoints", ranks), []
    real = type(remote._system).put_file.__get__(remote._system)

    def put_file(source: str, target: str, **kwargs: Any) -> None:
        put.append("/".join(target.split("/")[-2:]))
        if case == "refused" and ranks.rank == 1:
            raise PermissionError(13, "Access Denied")
        real(source, target, **kwargs)

    remote._system.put_file = put_file
    said: list[str] = []
    mirror = Mirror(remote, store, folder / "remote.json", "run", said.append, said.append, ranks)
    found, error = mirror.newest(lambda manifests: set()), None
    mirror.begin()
    begin = 1 if found is None else found.step + 1
    try:
        for step in (begin, begin + 1):
            store.publish(step, lambda at, step=step: write(at, step, ranks.rank), {})
            mirror.wait()
            ranks.barrier("purge")
            if ranks.is_main:
                store.purge(1, set())
            ranks.barrier("purged")
            mirror.start()
        mirror.wait()
    except RunError as raised:
        error = raised.code
    return {"put": put, "error": error, "found": found and found.step, "said": said}


def write(folder: Path, step: int, rank: int) -> None:
    (folder / f"{rank}.bin").write_bytes(bytes([step]) * (10 + rank))


main()
