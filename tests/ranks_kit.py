"""Runs on several ranks in a test: processes forked once meet over gloo and train many run files in turn."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lensmith.engine.optimizer import MasterAdamW
from lensmith.parallel.zero import ZeroAdamW
from lensmith.recipe.run import Located
from lensmith.recipe.train import train
from lensmith.report.metrics import read_metrics
from lensmith.report.terminal import Terminal


def on_ranks(size: int, folder: Path, work: Callable[[int], None], **more: Any) -> None:
    """`work(rank)` in `size` processes that have met. Raises what the first of them raised."""
    mp.start_processes(_rank, (size, str(folder), work), nprocs=size, start_method="fork", **more)


def _rank(rank: int, size: int, folder: str, work: Callable[[int], None]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    warnings.simplefilter("default")  # DeepSpeed's imports warn of what torch has renamed
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        work(rank)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise
    dist.destroy_process_group()


def train_all(size: int, folder: Path, runs: Sequence[Located]) -> None:
    """Each run on `size` ranks; every rank keeps its pieces of the gradients beside the run (`gradients`)."""

    def work(rank: int) -> None:
        for run in runs:
            with recorded(run.output.with_name(f"{run.output.name}-gradients-{rank}.npz")):
                train(run, terminal=Terminal("quiet"))

    on_ranks(size, folder, work)


class recorded:
    """What is applied in every step: the gradients of this rank, by step, name and first element."""

    def __init__(self, file: Path):
        self.file, self.found = file, {}
        self._steps: dict[type, Any] = {}

    def __enter__(self) -> recorded:
        for engine in (MasterAdamW, ZeroAdamW):
            self._steps[engine] = engine.step
            engine.step = self._recording(engine.step)
        return self

    def _recording(self, inner: Any) -> Any:
        number = [0]

        def step(optimizer: Any, factor: float) -> None:
            number[0] += 1
            starts = {piece.key.removeprefix("param/"): piece.start for piece in optimizer.pieces()}
            for name, gradient in optimizer.gradients():
                if name in starts or not optimizer.is_sharded(name):
                    key = f"{number[0]}|{name}|{starts.get(name, 0)}"
                    self.found[key] = gradient.detach().float().flatten().numpy().copy()
            inner(optimizer, factor)

        return step

    def __exit__(self, *exc: object) -> None:
        for engine, step in self._steps.items():
            engine.step = step
        np.savez(self.file, **self.found)


def gradients(output: Path) -> dict[tuple[int, str], np.ndarray]:
    """(step, name) -> the whole gradient, flat, put together from what the ranks kept."""
    parts: dict[tuple[int, str], dict[int, np.ndarray]] = {}
    for file in sorted(output.parent.glob(f"{output.name}-gradients-*.npz")):
        with np.load(file) as kept:
            for key in kept.files:
                step, name, start = key.split("|")
                parts.setdefault((int(step), name), {})[int(start)] = kept[key]
    return {key: np.concatenate([pieces[s] for s in sorted(pieces)]) for key, pieces in parts.items()}


def losses(output: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "step"]
