"""Pieces of the run folder: its lock, versions, ledger and summary.json."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lensmith.checkpoint.store import Damaged, Store, read_manifest
from lensmith.core.errors import RunError
from lensmith.data.index import LEDGER, LEDGER_SCHEMA
from lensmith.data.windows import number_of, read_window, trained_rows
from lensmith.engine.progress import Progress
from lensmith.recipe.build import Built
from lensmith.recipe.prepare import Prepared
from lensmith.recipe.train import Clock, peak_rss_bytes
from lensmith.report.metrics import read_metrics


class Lock:
    """One run at a time in a folder: a lock of the kernel's on a file that names its owner (process, machine, boot). It
    ends with the process however that ends, and a process id that was given out again does not matter.

    Attributes:
        left_by: the owner before, where it ended without giving the lock back.
    """

    def __init__(self, path: Path):
        self.path = path
        self.left_by = ""
        self._fd: int | None = None

    def acquire(self) -> None:
        """Raises `RunError` LOCKED naming the owner's process id."""
        while True:
            fd = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _process(_owner(fd))
                os.close(fd)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise RunError("LOCKED", f"this file system has no locks ({error.strerror})", where=str(self.path),
                                   remedy="name an output folder on another file system") from None  # fmt: skip
                raise RunError("LOCKED", f"process {owner} is running in this folder", where=str(self.path.parent),
                               remedy="wait for it, stop it, or name another output folder") from None  # fmt: skip
            if self._is_current(fd):
                break
            os.close(fd)  # its owner removed it just now
        self.left_by = _owner(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {platform.node()} {boot_id()}".encode(), 0)
        self._fd = fd

    def is_held(self) -> bool:
        """False: the file was deleted or replaced, as with its folder."""
        return self._fd is not None and self._is_current(self._fd)

    def renew(self) -> None:
        """Make the file anew, where it was deleted. Raises as `acquire` does."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.acquire()

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


def _owner(fd: int) -> str:
    return os.pread(fd, 256, 0).decode(errors="replace").strip()


def _process(owner: str) -> str:
    process, host = [*owner.split(), "", ""][:2]
    return (process or "unknown") + (f" on {host}" if host not in ("", platform.node()) else "")


def boot_id() -> str:
    """Another one after every start of the machine; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def ended_badly(left_by: str, metrics: Path) -> str:
    """What is known of a session that ended without a word: its owner as the lock file has it, and its last step."""
    _, host, boot = [*left_by.split(), "", "", ""][:3]
    last = next((r for r in reversed(read_metrics(metrics)) if "rss_bytes" in r), None)
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    held = "" if last is None else f"; in step {last['step']} it held {last['rss_bytes'] / 2**30:.1f} of {gib:.1f} GiB"
    here = f"the session before (process {_process(left_by)})"
    if host == platform.node() and boot and boot != boot_id():
        return f"{here} ended with a restart of the machine{held}"
    return f"{here} was killed or crashed{held}. Out of memory? Look into dmesg, or ask the scheduler"


class Grace:
    """Warns once when a stop by signal takes longer than a scheduler waits before it kills: the rest of a step, then a
    save."""

    def __init__(self, seconds: float | None, warn: Callable[[str], None]):
        self.seconds, self._warn = seconds, warn
        self.step_seconds = 0.0

    def saved(self, save_seconds: float) -> None:
        needed = self.step_seconds + save_seconds
        if self.seconds is None or needed <= self.seconds:
            return
        self._warn(
            f"a stop by signal takes {needed:.1f} s (step {self.step_seconds:.1f} s, save {save_seconds:.1f} s), more "
            f"than save.grace_seconds = {self.seconds:g}: a scheduler that kills after that time costs the steps since "
            "the last save. Give the job more time to end, and set save.grace_seconds to it"
        )
        self.seconds = None


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def versions(prepared: Prepared) -> dict[str, Any]:
    """Versions of what computes, the git revision of the run file's folder, and the model's commit where known."""
    packages: dict[str, Any] = {"python": platform.python_version()}
    for name in (
        "lensmith",
        "torch",
        "transformers",
        "peft",
        "tokenizers",
        "safetensors",
        "pillow",
        "numpy",
        "pyarrow",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=prepared.located.folder, capture_output=True, text=True, check=False
        )
        git = told.stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    folder = prepared.model_folder
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {
        "packages": packages,
        "git": git or None,
        "model": {"path": prepared.located.run.model.path, "commit": commit},
        "remote_code": prepared.code.record if prepared.code is not None else None,
    }


@dataclass(frozen=True)
class Part:
    """A stage as ledger and summary see it: what was prepared, the samples dropped at load (as `dropped` gives them),
    and the windows of a stream up to the last one in use."""

    prepared: Prepared
    dropped: dict[Any, tuple[str, str]]
    counts: dict[str, Any]
    windows: Sequence[Path] = ()


def write_ledger(path: Path, parts: Sequence[Part]) -> None:
    """One row per sample read: `train`, `drop`, or `held_out` for what `data.holdout` took. Samples dropped at load
    have the verdict `drop` and the reason `LOAD_...`. In a curriculum the source is `STAGE/SOURCE`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, LEDGER_SCHEMA) as out:
        for part in parts:
            for batch in _streamed(part) if part.prepared.stream else _indexed(part):
                out.write_batch(_named(batch, part.prepared.located.stage_name))
    temporary.replace(path)


def _indexed(part: Part) -> Iterator[pa.RecordBatch]:
    prepared, begin = part.prepared, 0
    held = prepared.held.keep if prepared.held is not None and not prepared.located.run.data.eval else None
    numbers = prepared.train.numbers_of(part.dropped)
    changed = {int(prepared.train.trainable[n]): part.dropped[origin] for origin, n in numbers.items()}
    for batch in prepared.read.ledger():
        own = range(begin, begin + len(batch))
        gone = {row - begin: changed[row] for row in changed if row in own}
        yield _settled(batch, None if held is None else held[begin : own.stop], gone)
        begin = own.stop


def _streamed(part: Part) -> Iterator[pa.RecordBatch]:
    assert part.prepared.stream is not None
    names = pa.array([f.source for f in part.prepared.stream.loader.files])
    dropped: dict[int, dict[int, tuple[str, str]]] = defaultdict(dict)
    for (window, sample), why in part.dropped.items():
        dropped[window][sample] = why
    for folder in part.windows:
        table = read_window(folder)
        columns = [names.take(table["file"].combine_chunks()), *(table[n].combine_chunks() for n in LEDGER)]
        batch = pa.RecordBatch.from_arrays(columns, schema=LEDGER_SCHEMA)
        rows = trained_rows(table)
        yield _settled(batch, None, {int(rows[sample]): why for sample, why in dropped[number_of(folder)].items()})


def _named(batch: pa.RecordBatch, stage: str) -> pa.RecordBatch:
    if not stage:
        return batch
    return batch.set_column(
        0, "source", pa.array([f"{stage}/{name}" for name in batch["source"].to_pylist()], pa.string())
    )


def _settled(batch: pa.RecordBatch, held: np.ndarray | None, gone: dict[int, tuple[str, str]]) -> pa.RecordBatch:
    """The ledger's rows with what became of them after the index was made."""
    if not gone and (held is None or not held.any()):
        return batch
    columns = {name: batch[name].to_pylist() for name in ("verdict", "reason", "detail")}
    for row in np.flatnonzero(held).tolist() if held is not None else ():
        columns["verdict"][row] = "held_out"
    for row, (reason, detail) in gone.items():
        columns["verdict"][row], columns["reason"][row], columns["detail"][row] = "drop", f"LOAD_{reason}", detail
    arrays = [pa.array(columns[n], pa.string()) if n in columns else batch[n] for n in LEDGER_SCHEMA.names]
    return pa.RecordBatch.from_arrays(arrays, schema=LEDGER_SCHEMA)


def base_name(prepared: Prepared) -> tuple[str, str | None]:
    """(name, commit) of the base for an adapter's config: the Hub name where it has one, else the local folder."""
    folder, said = prepared.model_folder, prepared.located.run.model.path
    if folder.parent.name == "snapshots" and not (prepared.located.folder / said).is_dir():
        return said, folder.name
    return str(folder), None


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def losses(metrics: Path) -> list[float | None]:
    """Loss of every step so far, for a resumed run; None where it was not finite or nothing was trained."""
    return [r["loss"] for r in read_metrics(metrics) if r.get("kind") == "step"]


def dropped(metrics: Path, stage: str) -> dict[Any, tuple[str, str]]:
    """Samples of a stage dropped at load so far, for a resumed run: by origin, those of a stream by (window, number in
    it)."""
    events = [r for r in read_metrics(metrics) if r.get("name") == "dropped" and r.get("stage", "") == stage]
    return {(r["window"], r["sample"]) if "window" in r else r["origin"]: (r["reason"], r["detail"]) for r in events}


def best_step(
    store: Store, metric: str | None, score: Callable[[dict[str, float], str], float | None], stage: int = 0
) -> set[int]:
    """The checkpoint of a stage with the best finite held-out metric; {} when none is asked for or known."""
    if metric is None:
        return set()
    manifests: dict[int, dict[str, Any]] = {}
    for step in store.steps():
        try:
            manifests[step] = read_manifest(store.path(step))
        except Damaged:
            continue
    return best_of(manifests, metric, score, stage)


def best_of(
    manifests: dict[int, dict[str, Any]],
    metric: str,
    score: Callable[[dict[str, float], str], float | None],
    stage: int = 0,
) -> set[int]:
    """As `best_step`, of these checkpoints: step -> manifest."""
    found: dict[int, float] = {}
    for step, manifest in manifests.items():
        value = score(manifest.get("metrics", {}), metric)
        if value is not None and manifest.get("stage", 0) == stage:
            found[step] = value
    return {max(found, key=lambda s: (found[s], s))} if found else set()


def summary(
    parts: Sequence[Part],
    built: Built,
    p: Progress,
    loss_list: list[float | None],
    metrics: Path,
    heldout: dict[str, Any],
    checkpoint: str,
    clock: Clock,
) -> dict[str, Any]:
    """The stable machine-readable outcome of a run; every key is described in docs/run_folder.md. `built` and `p` are
    those of the last stage."""
    steps = [r for r in read_metrics(metrics) if r.get("kind") == "step"]
    each = [_samples(part) for part in parts]
    samples: dict[str, Any] = {key: sum(s[key] for s in each) for key in ("read", "train", "dropped", "held_out")}
    samples["by_reason"] = dict(sum((Counter(s["by_reason"]) for s in each), Counter[str]()))
    assert samples["read"] == samples["train"] + samples["dropped"] + samples["held_out"]
    names = [part.prepared.located.stage_name for part in parts]
    several = [
        {"name": name, "steps": sum(r.get("stage") == name for r in steps), "samples": s}
        for name, s in zip(names, each, strict=True)
        if name
    ]
    prepared = parts[0].prepared
    return {
        "schema": 1,
        "name": prepared.located.name,
        "outcome": "finished",
        "samples": samples,
        "stages": several,
        "sources": by_source(parts, steps),
        "balance": balance(steps),
        "steps": len(steps),
        "applied_steps": sum(bool(r["applied"]) for r in steps),
        "epochs": p.epoch,
        "losses": loss_list,
        "tokens": {
            "total": sum(r["tokens"] for r in steps),
            "supervised": sum(r["supervised"] for r in steps),
            "image": sum(r["image_tokens"] for r in steps),
            "padding": sum(r["padding"] for r in steps),
        },
        "fill": sum(r["fill"] for r in steps) / len(steps) if steps else None,
        "trainable_parameters": built.trainable_parameters,
        "total_parameters": built.total_parameters,
        "wall_seconds": {k: round(v, 3) for k, v in clock.wall.items()},
        "cpu_seconds": {k: round(v, 3) for k, v in clock.cpu.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "checkpoint": checkpoint,
        "heldout": heldout,
    }


def _samples(part: Part) -> dict[str, Any]:
    counts, prepared = part.counts, part.prepared
    held = 0 if prepared.stream is not None else counts["train"] - len(prepared.train.trainable)
    at_load = Counter(f"LOAD_{reason}" for reason, _ in part.dropped.values())
    return {
        "read": counts["read"],
        "train": counts["train"] - len(part.dropped) - held,
        "dropped": counts["dropped"] + len(part.dropped),
        "held_out": held,
        "by_reason": {**counts["by_reason"], **at_load},
    }


def by_source(parts: Sequence[Part], steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was trained of each source: samples, tokens, passes over it, mean loss of the first and last tenth."""
    found: list[dict[str, Any]] = []
    for prepared in (part.prepared for part in parts):
        stage = prepared.located.stage_name
        own = [r["sources"] for r in steps if r.get("stage", "") == stage and r.get("applied")]
        for name, size in zip(prepared.train.sources, prepared.train.source_sizes, strict=True):
            mine = [s[name] for s in own if name in s]
            tenth = max(1, len(mine) // 10)
            samples = sum(s["samples"] for s in mine)
            found.append({
                **({"stage": stage} if stage else {}), "source": name, "samples": samples,
                "tokens": sum(s["tokens"] for s in mine), "supervised": sum(s["supervised"] for s in mine),
                "passes": round(samples / size, 4) if size else None,
                "loss_first": _mean_loss(mine[:tenth]), "loss_last": _mean_loss(mine[-tenth:]),
            })  # fmt: skip
    return found


def _mean_loss(parts: Sequence[dict[str, Any]]) -> float | None:
    known = [(s["loss"], s["supervised"]) for s in parts if s["loss"] is not None]
    total = sum(count for _, count in known)
    return sum(loss * count for loss, count in known) / total if total else None


def balance(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How even the work was, predicted and measured. Ranks and rows: dearest over mean, on average; steps: standard
    deviation over mean. The first steps, slower for their first time, are left out of what is measured."""
    if not steps:
        return {}
    warm = steps[min(3, len(steps) - 1) :]
    costs, seconds = np.array([r["cost"] for r in steps]), np.array([r["step_seconds"] for r in warm])
    return {
        "ranks_predicted": float(np.mean([r["cost_spread"]["ranks"] for r in steps])),
        "rows_predicted": float(np.mean([r["cost_spread"]["rows"] for r in steps])),
        "rows_measured": float(np.mean([r["row_seconds_spread"] for r in warm])),
        "steps_predicted": float(costs.std() / costs.mean()) if costs.any() else 0.0,
        "steps_measured": float(seconds.std() / seconds.mean()),
    }
