"""What the guard costs: steps of the loop against the same steps with clipping alone, in turn, in one process.

    python benchmarks/guard_cost.py [--pairs 200] [--samples 32] [--device cpu]

Two copies of the embedded base model train on the same rows, all of it. `plain` is forward, backward, torch's
clip_grad_norm_ and the update, with loss and norm read once; `guarded` is `Loop` with the guard's defaults: random
state, flags, spikes, and at every 50th step the early-warning figures and the look through weights and moments. CPU
seconds of one thread of this process; on a GPU wall seconds up to a synchronisation. Printed are the median ratio of
neighbouring steps, what an early-warning step costs more, and both together per step.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import runs
import tiny
import torch
from torch import nn

import lensmith
from lensmith.data.pipeline import Pipeline
from lensmith.engine.loop import Callbacks, Loop, Signals
from lensmith.engine.options import Guard
from lensmith.engine.rescue import Rescue
from lensmith.objective.by_source import BySource
from lensmith.parallel.ranks import Ranks
from lensmith.recipe.build import Built, build
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.recipe.together import SharedStep, shared_steps
from lensmith.report.terminal import Terminal

BASE = Path(lensmith.__file__).parent / "assets" / "tiny_vqa"
CLIP = 1.0


def prepared(folder: Path, samples: int, device: str) -> Prepared:
    chat = tiny.make_chat(folder / "data", 4 * samples, pictures=8)
    run = runs.located(
        folder / "run", BASE, chat, batch={"samples": samples, "device_tokens": 4096}, model={"template": "force"},
        train={"epochs": None, "max_steps": 10**6, "device": device, "clip_norm": CLIP}, data={"max_tokens": 1024},
    )  # fmt: skip
    return prepare(run, Terminal("quiet"))


def plain(built: Built) -> Callable[[SharedStep], None]:
    """Clipping alone; the loss of each source is added up as the loop does, for it is no part of the guard."""
    optimizer = built.optimizer

    def step(data: SharedStep) -> None:
        optimizer.zero_grad()
        sources, total = BySource(), torch.zeros((), dtype=torch.float64)
        for row in data.rows:
            terms = built.root(row)
            sources.add(terms)
            (terms["loss"][0] / data.num_supervised).backward()
            total += terms["loss"][0].detach().double().cpu()
        optimizer.gradients()
        norm = nn.utils.clip_grad_norm_(optimizer.parameters(), CLIP)
        optimizer.step(1.0)
        optimizer.zero_grad()
        float(norm), float(total)

    return step


def guarded(built: Built, about: Prepared, steps: int) -> Callable[[SharedStep], None]:
    run = about.located.run
    nothing: Any = lambda *_: None  # noqa: E731
    rescue = Rescue(built.root.model, nothing, nothing, nothing, nothing, nothing)
    loop = Loop(
        root=built.root, optimizer=built.optimizer, schedule=run.schedule, part_of=built.part_of, train=run.train,
        saving=run.save, total_steps=steps, evaluate_every=None, guard=Guard(), rescue=rescue,
        callbacks=Callbacks(nothing, nothing, nothing, lambda row: row, nothing),
    )  # fmt: skip

    loop._signals, loop._last_save = Signals(), 0.0

    def step(data: SharedStep) -> None:
        loop._one(data)
        if loop._check_due(data.step.number + 1):
            loop._sound()

    return step


def timed(step: Callable[[SharedStep], None], data: SharedStep, device: str) -> float:
    clock = time.perf_counter if device != "cpu" else time.process_time
    begin = clock()
    step(data)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LENSMITH_CACHE"] = folder
        about = prepared(Path(folder), o.samples, o.device)
        copies = [build(about), build(about)]
        kinds = [[plain(c), guarded(c, about, o.pairs)] for c in copies]
        pairs: list[tuple[float, float]] = []
        gc.disable()
        steps = Pipeline(about.train, about.plan, about.limits).steps()
        for n, data in enumerate(shared_steps(steps, Ranks(), copies[0].root.objective.units)):
            own = n // 2 % 2  # which copy is the plain one, and which of the two comes first, change in turn
            seconds = {k: timed(kinds[own ^ k][k], data, o.device) for k in ((0, 1) if n % 2 else (1, 0))}
            pairs.append((seconds[0], seconds[1]))
            gc.collect()
            if len(pairs) == o.pairs:
                break
    tell(pairs)


def tell(pairs: list[tuple[float, float]]) -> None:
    rule, count = Guard(), len(pairs)
    early = set(range(0, count, rule.watch_every))
    checks = set(range(rule.check_every - 1, count, rule.check_every))
    usual = [pair for n, pair in enumerate(pairs) if n >= 4 and n not in early | checks]
    base = statistics.median(a for a, _ in usual)
    ratio = statistics.median(b / a for a, b in usual)

    def more(steps: set[int]) -> float:
        return statistics.median(pairs[n][1] - pairs[n][0] * ratio for n in steps if n >= 4)

    watched, checked = more(early), more(checks)
    each = watched / rule.watch_every + checked / rule.check_every
    print(f"plain step {1000 * base:.2f} ms; guarded / plain {ratio:.4f} (median of {len(usual)} pairs)")
    print(f"early warning {1000 * watched:+.2f} ms each {rule.watch_every} steps")
    print(f"weights and moments {1000 * checked:+.2f} ms each {rule.check_every} steps")
    print(f"together {100 * (ratio - 1 + each / base):+.2f} % of a step")


if __name__ == "__main__":
    main()
