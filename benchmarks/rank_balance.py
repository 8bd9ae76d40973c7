"""Plan and placement of a synthetic index of 10^8 rows over many ranks: how even the work of a step is, and what it
costs to know it.

    python benchmarks/rank_balance.py [--rows 1e8] [--ranks 8,64,256,1024] [--steps 20]

Text tokens are lognormal (median 250), 60 % of the rows have a picture of lognormal size (median 1,300 patches, up to
16,384), four patches to a token, up to 8,192 tokens in all. The columns are written once into a memory-mapped file, and
the plan reads them as it reads those of an index. Every rank works out the placement of a step by itself, so `place ms`
is spent on each of them. `balance` is the slowest rank over the mean, of the placement's own cost and of the FLOPs of
Qwen2.5-VL-7B (LoRA, frozen tower; docs/scaling.md), mean and worst of the steps. `rows` is the number of micro-batches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from lensmith.data.placement import Limits, place
from lensmith.data.plan import Plan

CHUNK = 1 << 20
LIMIT = 8192
PER_RANK = (4, 16, 64)


def write_columns(folder: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, patches), int32, memory-mapped."""
    found = [np.memmap(folder / name, np.int32, "w+", shape=(rows,)) for name in ("tokens", "patches")]
    for begin in range(0, rows, CHUNK):
        rng, n = np.random.default_rng(begin), min(CHUNK, rows - begin)
        picture = np.exp(rng.standard_normal(n, np.float32) * 0.9 + np.log(1300))
        patches = np.where(rng.random(n, np.float32) < 0.6, np.clip(picture, 64, 16_384), 0).astype(np.int32) // 4 * 4
        text = np.exp(rng.standard_normal(n, np.float32) * 1.0 + np.log(250)).astype(np.int32)
        tokens = np.clip(text, 16, LIMIT - patches // 4)
        found[0][begin : begin + n], found[1][begin : begin + n] = tokens + patches // 4, patches
    return found[0], found[1]


def flops(tokens: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Of a sample of Qwen2.5-VL-7B: forward and input gradients of the language model, forward of the tower; a tenth of
    the positions is supervised."""
    tokens, patches = tokens.astype(float), patches.astype(float)
    language = 4 * 6.525e9 * tokens + 3 * 2 * 28 * 3584 * tokens**2 + 4 * 3584 * 152_064 * tokens / 10
    vision = 2 * 642.6e6 * patches + 4 * 1280 * patches * (4 * patches + 28 * 64)
    return language + vision


def measure(tokens: np.ndarray, patches: np.ndarray, ranks: int, each: int, steps: int) -> str:
    plan = Plan(len(tokens), 1, samples=ranks * each, epochs=1)
    next(plan.steps())
    planned = placed = 0.0
    by_cost: list[float] = []
    by_flops: list[float] = []
    rows = 0
    numbers = np.linspace(0, max(0, plan.num_steps() - 2), steps).astype(int).tolist()
    for number in numbers:
        begin = time.thread_time()
        members = next(plan.steps(number)).members
        planned += time.thread_time() - begin
        t, p = tokens[members], patches[members]
        cost, work = t + p / 4.0, flops(t, p)
        begin = time.thread_time()
        found = place(t, p, cost, np.full(len(t), -1), ranks=ranks, limits=Limits(LIMIT))
        placed += time.thread_time() - begin
        rows = max(rows, len(found[0]))
        for values, into in ((cost, by_cost), (work, by_flops)):
            load = np.array([sum(values[list(row)].sum() for row in rank) for rank in found])
            into.append(load.max() / load.mean())
    n = len(numbers)
    return (
        f"{ranks:6,} {each:5} {rows:5} {planned / n * 1e3:8.2f} {placed / n * 1e3:9.1f}"
        f" {np.mean(by_cost):8.3f} {max(by_cost):7.3f} {np.mean(by_flops):9.3f} {max(by_flops):7.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e8)
    parser.add_argument("--ranks", default="8,64,256,1024")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", help="where the columns are written: 8 bytes a row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        begin = time.perf_counter()
        tokens, patches = write_columns(Path(folder), int(args.rows))
        head = tokens[: 1 << 20]
        print(f"{len(tokens):,} rows written in {time.perf_counter() - begin:.0f} s; tokens: mean {head.mean():.0f}, "
              f"p50 {np.median(head):.0f}, p99 {np.percentile(head, 99):.0f}")  # fmt: skip
        print(f"{'ranks':>6} {'each':>5} {'rows':>5} {'plan ms':>8} {'place ms':>9}"
              f" {'balance':>8} {'worst':>7} {'by FLOPs':>9} {'worst':>7}")  # fmt: skip
        for ranks in map(int, args.ranks.split(",")):
            for each in PER_RANK:
                print(measure(tokens, patches, ranks, each, args.steps), flush=True)


if __name__ == "__main__":
    main()
