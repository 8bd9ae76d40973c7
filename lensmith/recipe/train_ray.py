"""`lensmith train --ray`: the same `train`, by ranks that Ray Train starts."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError
from lensmith.data.index_ray import cluster
from lensmith.parallel.ray_train import fit
from lensmith.recipe.run import Located
from lensmith.report.terminal import Mode, Terminal

RELAY_SECONDS = 0.5


def train_on_ray(located: Located, terminal: Terminal, *, address: str, storage: str | None, dry_run: bool) -> None:
    """One rank for each of `parallel.ranks`. Data, model and output are under the same paths on all machines.

    Args:
        address: of a cluster, `auto` (the one that runs here) or `local` (a Ray of this machine's own).
        storage: where Ray keeps its own state; None: `ray` in the run folder.
    """
    parallel = located.run.parallel
    if dry_run:
        raise ConfigError("CONFIG", "--dry-run trains one step here, not on a cluster", remedy="leave out --ray")
    said = located.output / "ray" / "terminal.txt"
    with cluster(address, ranks=parallel.ranks) as has_gpus, relayed(said):
        terminal.event("ray", f"{parallel.ranks} ranks on Ray ({address})", address=address, ranks=parallel.ranks)
        fit(
            partial(one_rank, mode=terminal.mode, said=said),
            {"run": located},
            ranks=parallel.ranks,
            gpus=has_gpus and located.run.train.device != "cpu",
            restarts=parallel.restarts,
            timeout=parallel.timeout,
            storage=storage or str(said.parent),
            name=located.name,
        )


def one_rank(given: dict[str, Any], mode: Mode, said: Path) -> None:
    """What a process of the cluster does. The first rank speaks through a file."""
    from lensmith.recipe.train import train

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with said.open("a", encoding="utf-8", buffering=1) as out:
        train(given["run"], terminal=Terminal(mode, out=out, err=out))


@contextmanager
def relayed(said: Path) -> Iterator[None]:
    """What comes to stand in the file is shown here. Ray's own relay mixes all ranks and its own processes."""
    said.parent.mkdir(parents=True, exist_ok=True)
    said.write_text("")
    done = threading.Event()

    def relay() -> None:
        with said.open(encoding="utf-8", errors="replace") as file:
            last = False
            while not last:
                last = done.wait(RELAY_SECONDS)
                sys.stdout.write(file.read())
                sys.stdout.flush()

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
