"""Time and memory of the plan from 10^5 to 10^9 samples; each row in a process of its own.

    python benchmarks/plan_scale.py [SAMPLES ...]

Steps of 512 samples, 3 epochs: all samples as one source; a mixture of five sources with 1, 2, 3, 4 and 90 % of the
samples and equal shares, of which one is left out when it is used up; and steps of 512,000 tokens over a memory-mapped
column of token counts. `step` is the mean over 10 random places of 100 steps each, `jump` the mean
of 20 first steps at random places, `memory` the peak resident memory above that of the imported modules; the pages of
the token column that were touched count too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from lensmith.data.mixture import Mixture
from lensmith.data.plan import Plan

SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
MOST_TOKEN_COUNTS = 10**7
SAMPLES = 512
TOKENS = 512 * 1000
PARTS = (1, 2, 3, 4, 90)


def resident(field: str) -> float:
    """In MiB. `VmHWM` is the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def build(kind: str, n: int, column: Path | None) -> Plan:
    if kind == "mixture":
        sizes = tuple(n * part // 100 for part in PARTS)
        mixture = Mixture([1] * len(sizes), [None, None, sizes[2], None, None])
        return Plan(n, 1, samples=SAMPLES, epochs=3, sizes=sizes, mixture=mixture)
    if kind == "tokens":
        counts = np.memmap(column, np.int32, "r")
        return Plan(n, 1, samples=None, tokens=TOKENS, epochs=3, num_tokens=counts)
    return Plan(n, 1, samples=SAMPLES, epochs=3)


def measure(kind: str, n: int, column: Path | None) -> dict[str, Any]:
    plan = build("concat", 1000, None)
    list(plan.steps())  # numpy's own first-use costs are no part of it
    base = resident("VmRSS")
    begin = time.perf_counter()
    plan = build(kind, n, column)
    next(plan.steps())
    first = time.perf_counter() - begin
    places = np.random.default_rng(0).integers(0, 3 * n // SAMPLES - 101, 20) if n > 20_000 else np.zeros(20)
    begin = time.perf_counter()
    for place in places.tolist():
        next(plan.steps(place, place * SAMPLES))
    jump = (time.perf_counter() - begin) / len(places)
    step = steps_from(plan, places[:10].tolist())
    return {"first": first, "step": step, "jump": jump, "memory": resident("VmHWM") - base}


def steps_from(plan: Plan, places: list[int]) -> float:
    begin, done = time.perf_counter(), 0
    for place in places:
        for _ in zip(range(100), plan.steps(place, place * SAMPLES), strict=False):
            done += 1
    return (time.perf_counter() - begin) / done


def write_counts(path: Path, n: int) -> None:
    counts = np.memmap(path, np.int32, "w+", shape=(n,))
    for begin in range(0, n, 1 << 20):
        counts[begin : begin + (1 << 20)] = np.random.default_rng(begin).integers(100, 1900, min(1 << 20, n - begin))
    counts.flush()


def main() -> None:
    sizes = [int(float(a)) for a in sys.argv[1:]] or SIZES
    print(f"{'plan':8} {'samples':>13} {'first ms':>9} {'step ms':>8} {'jump ms':>8} {'memory MiB':>11}")
    with tempfile.TemporaryDirectory() as scratch:
        for n in sizes:
            column = Path(scratch) / str(n)
            for kind in ("concat", "mixture", "tokens"):
                if kind == "tokens":
                    if n > MOST_TOKEN_COUNTS:
                        continue
                    write_counts(column, n)
                with get_context("spawn").Pool(1) as pool:
                    r = pool.apply(measure, (kind, n, column))
                times = f"{r['first'] * 1e3:9.2f} {r['step'] * 1e3:8.3f} {r['jump'] * 1e3:8.2f}"
                print(f"{kind:8} {n:13,} {times} {r['memory']:11.1f}", flush=True)


if __name__ == "__main__":
    main()
