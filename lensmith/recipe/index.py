"""`lensmith index`: the index of a run's data made ahead, by several processes or on a Ray cluster."""

from __future__ import annotations

from contextlib import nullcontext

from lensmith.core.errors import ConfigError
from lensmith.data.index_ray import cluster
from lensmith.recipe.prepare import Indexing, prepare
from lensmith.recipe.run import Located
from lensmith.report.terminal import Terminal


def index(
    located: Located, terminal: Terminal, *, workers: int | None = None, ray: str | None = None, decode: bool = False
) -> None:
    """Every stage's training and held-out data, into the cache that `train` reads. `ray` is the address of a cluster,
    `auto` or `local`. Raises `UserError`s as `check` does."""
    if workers is not None and workers < 1:
        raise ConfigError("CONFIG", f"--workers {workers} is not a number of processes")
    with cluster(ray) if ray is not None else nullcontext():
        for stage in located.stages:
            if stage.run.data.stream is not None:
                name = f"stage {stage.stage_name}" if stage.stage_name else "this run"
                terminal.warning(f"{name} streams its training data: there is no index of it to make")
            prepare(stage, terminal, Indexing(workers, ray is not None, decode))
