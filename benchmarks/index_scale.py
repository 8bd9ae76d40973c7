"""What a large index costs: seconds and memory of everything that is asked of it before step 1 and while training.

    python benchmarks/index_scale.py [--rows 1e5 1e6 1e7] [--files 8] [--folder FOLDER]

The stored index of so many rows is written directly (no data, no model); each size then runs in a process of its own.
Anonymous memory is what the index keeps (or, `peak`, holds meanwhile) above the interpreter with its imports, apart
from the pages of mapped files, which the kernel takes back when it needs them; `mapped` are those that are resident.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lensmith.data import index_build, index_store
from lensmith.data.holdout import hold_out, seen_in_training
from lensmith.data.index import LEDGER_SCHEMA, SCHEMA, Index
from lensmith.data.load import SourceFile
from lensmith.data.pipeline import Pipeline
from lensmith.data.placement import Limits
from lensmith.data.plan import Plan

NUMBERS = [f.name for f in SCHEMA if pa.types.is_integer(f.type)]
MIB = 1 << 20


# --- a stored index ---------------------------------------------------------------------------------------------------


def batch_of(file: int, begin: int, end: int) -> pa.RecordBatch:
    """Rows `begin` to `end` of a file: 30 % text, else one or two of half as many pictures; 2 % dropped; 10 % pieces of
    documents cut in four."""
    n = end - begin
    rng = np.random.default_rng([file, begin])
    row = np.arange(begin, end)
    document = row % 40 < 4
    piece = np.where(document, row % 40, 0)
    source_row = row - piece
    draw = rng.random(n)
    dropped = draw < 0.02
    reasons = pa.array(["IMG_MISSING", "TOO_LONG"]).take(pa.array((draw < 0.01).astype(np.int32)))
    origins = [f"part-{file:03}.jsonl:{r + 1}[{p + 1}/4]" if d else f"part-{file:03}.jsonl:{r + 1}"
               for r, p, d in zip(source_row.tolist(), piece.tolist(), document.tolist(), strict=True)]  # fmt: skip
    shown = np.where(rng.random(n) < 0.3, 0, rng.integers(1, 3, n))
    pictures = row[:, None] // 2 + np.array([[0, 1]])
    handles = [[f"/data/images/{file:03}/{p:08}.jpg" for p in ps[:s]]
               for ps, s in zip(pictures.tolist(), shown.tolist(), strict=True)]  # fmt: skip
    gone = [None if not k else index_store.stamp([f"/{i}" for i in range(k)], {f"/{i}": "gone" for i in range(k)})
            for k in range(3)]  # fmt: skip
    tokens = np.minimum(rng.lognormal(6, 0.8, n).astype(np.int32) + 8, 4096)
    whole = np.full(n, -1, np.int32)
    sides = rng.integers(200, 1200, 2 * int(shown.sum()), dtype=np.int32)
    noted = rng.random(n) < 0.01
    columns: dict[str, Any] = {
        "row": source_row, "line": source_row + 1, "offset": source_row * 1500, "length": np.full(n, 1480),
        "piece": piece, "pieces": np.where(document, 4, 1), "first": np.where(document, piece, whole),
        "start": np.where(document, 0, whole), "last": np.where(document, piece, whole),
        "stop": np.where(document, tokens, whole), "context": np.where(document, 0, whole), "origin": origins,
        "id": [f"id-{file}-{r}" for r in source_row.tolist()],
        "verdict": pa.array(["train", "drop"]).take(pa.array(dropped.astype(np.int32))),
        "reason": pa.array(reasons.to_pylist(), mask=~dropped), "detail": pa.array(["a detail"] * n, mask=~dropped),
        "tokens": tokens, "supervised": tokens // 3, "media_tokens": shown * 256, "patches": shown * 1024,
        "images": shown, "videos": np.zeros(n), "answers": np.ones(n), "handles": handles,
        "look": np.where(shown > 0, pictures[:, 0] * 4 + shown + (file << 40), 0),
        "digest": rng.integers(-(1 << 62), 1 << 62, n),
        "id_hash": np.where(piece > 0, 0, source_row * 1000 + file + 1),
        "stamp": pa.array([gone[k] for k in shown.tolist()], pa.int64()),
        "sizes": pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(2 * shown)]), pa.int32()), sides),
        "notes": pa.array([["alpha"] if note else [] for note in noted.tolist()], pa.list_(pa.string())),
    }  # fmt: skip
    arrays = [pa.array(v).cast(f.type) for f, v in ((f, columns[f.name]) for f in SCHEMA)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def write_file(path: Path, file: int, rows: int) -> None:
    with pa.ipc.new_file(str(path), SCHEMA) as out:
        for begin in range(0, rows, index_store.STORED_ROWS):
            out.write_batch(batch_of(file, begin, min(begin + index_store.STORED_ROWS, rows)))


# --- what is measured -------------------------------------------------------------------------------------------------


def anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def rollup() -> dict[str, int]:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in map(str.split, lines)}


class Stages:
    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        pa.default_memory_pool().release_unused()
        self._base = rollup()

    def run(self, name: str, what: Callable[[], Any]) -> Any:
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        wall, cpu = time.perf_counter(), time.thread_time()
        result = what()
        seconds, cpu_seconds = time.perf_counter() - wall, time.thread_time() - cpu
        done.set()
        watcher.join()
        pa.default_memory_pool().release_unused()
        now = rollup()
        base = self._base["Anonymous"]
        kept = now["Anonymous"] - base
        files = now["Rss"] - now["Anonymous"] - (self._base["Rss"] - base)
        self.found.append({"stage": name, "seconds": seconds, "cpu": cpu_seconds, "kept": kept / MIB,
                           "peak": max(kept, peak[0] - base) / MIB, "mapped": files / MIB})  # fmt: skip
        return result


def spec_of(files: int) -> Any:
    """Two files make a source. Only what an index reads of its spec."""
    named = tuple(SourceFile(f"source {n // 2}", f"part-{n:03}.jsonl", None, "/data/images") for n in range(files))
    return SimpleNamespace(files=named)


def measure(folder: Path, space: Path) -> list[dict[str, Any]]:
    stored = sorted(folder.glob("*.arrow"))
    spec = spec_of(len(stored))
    stages = Stages()
    tables = stages.run("open", lambda: tuple(index_store.open_stored(p) for p in stored))
    index = Index(tables, spec, space=space)
    stages.run(
        "stored samples compared with their pictures",
        lambda: [index_store.changed_rows(t, decode=False) for t in tables],
    )
    stages.run("ids that stand twice", lambda: index_build._refuse_duplicate_ids(index))
    stages.run("trainable", lambda: index.trainable)
    stages.run(f"{len(NUMBERS) + 2} columns", lambda: [index.column(n) for n in (*NUMBERS, "file", "source")])
    stages.run("counts", index.counts)
    stages.run("notes", index.notes)
    stages.run("source sizes", lambda: index.source_sizes)
    picks = np.random.default_rng(0).integers(0, len(index.trainable), 1000).tolist()
    stages.run("1,000 refs", lambda: [index.ref(n) for n in picks])
    stages.run("1,000 origins and handles", lambda: [(index.origin(n), index.handles(n)) for n in picks])
    stages.run("10 origins looked up", lambda: index.numbers_of(index.origins(picks[:10])))
    stages.run("ledger written", lambda: write_ledger(index, space))
    pipeline = stages.run("pipeline made", lambda: pipeline_of(index))
    stages.run("20 steps planned", lambda: plan_steps(pipeline, 20))
    train, held = stages.run("held out 5 %", lambda: hold_out(index, 0.05, 0))
    stages.run("seen in training", lambda: seen_in_training(train, held))
    part = stages.run("pipeline of the rest", lambda: pipeline_of(train))
    stages.run("20 steps of the rest", lambda: plan_steps(part, 20))
    return stages.found


def write_ledger(index: Index, space: Path) -> None:
    with pq.ParquetWriter(space / "ledger.parquet", LEDGER_SCHEMA) as out:
        for batch in index.ledger():
            out.write_batch(batch)


def pipeline_of(index: Index) -> Pipeline:
    plan = Plan(len(index.trainable), seed=0, samples=256, num_tokens=index.column("tokens"))
    return Pipeline(index, plan, Limits(16_384, 65_536))


def plan_steps(pipeline: Pipeline, steps: int) -> int:
    """The members of so many steps put into rows, with their places."""
    walk = zip(range(steps), pipeline.plan.steps(), strict=False)
    return sum(len(row) for _, step in walk for row in pipeline.rows_of(step))


# --- table ------------------------------------------------------------------------------------------------------------


def law(sizes: list[int], values: list[float], floor: float) -> str:
    """The exponent between the two largest sizes."""
    if len(sizes) < 2 or max(values[-2:]) < floor:
        return "flat"
    grown = np.log(max(values[-1], floor) / max(values[-2], floor)) / np.log(sizes[-1] / sizes[-2])
    return "flat" if grown < 0.15 else f"n^{grown:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=float, default=[1e5, 1e6, 1e7])
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="keep the stored indexes here and use those that are there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory(dir=arguments.measure) as space:
            print(json.dumps(measure(arguments.measure, Path(space))))
        return
    sizes = [int(r) for r in arguments.rows]
    found: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in sizes:
            folder = (arguments.folder or Path(scratch)) / str(rows)
            folder.mkdir(parents=True, exist_ok=True)
            for file in range(arguments.files):
                path = folder / f"{file:03}.arrow"
                if not path.exists():
                    write_file(path.with_suffix(".tmp"), file, rows // arguments.files)
                    os.replace(path.with_suffix(".tmp"), path)
            command = [sys.executable, __file__, "--measure", str(folder)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found.append(json.loads(answer.stdout))
            mib = sum(p.stat().st_size for p in folder.glob("*.arrow")) / MIB
            print(f"{rows:,} rows: {mib:,.0f} MiB stored", file=sys.stderr)
    heads = "".join(f"{n:>11,}" for n in sizes)
    print(f"{'':<46}{'CPU seconds':^{len(heads)}} {'law':<7}{'peak anonymous MiB':^{len(heads)}} law")
    print(f"{'':<46}{heads} {'':<7}{heads}")
    for stage in zip(*found, strict=True):
        seconds, peak = [s["cpu"] for s in stage], [s["peak"] for s in stage]
        cells = ["".join(f"{v:>11.3f}" for v in seconds), f" {law(sizes, seconds, 0.005):<7}"]
        cells += ["".join(f"{v:>11.1f}" for v in peak), f" {law(sizes, peak, 8.0)}"]
        print(f"{stage[0]['stage']:<46}{''.join(cells)}")
    print(f"{'seconds of wall time in all':<46}" + "".join(f"{sum(s['seconds'] for s in f):>11.1f}" for f in found))
    for name, key in (("anonymous at the end, MiB", "kept"), ("mapped at the end, MiB", "mapped")):
        print(f"{name:<46}" + "".join(f"{f[-1][key]:>11.1f}" for f in found))


if __name__ == "__main__":
    main()
