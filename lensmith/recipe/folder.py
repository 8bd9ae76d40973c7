"""Pieces of the run folder: its lock, versions, ledger and summary.json."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from lensmith.checkpoint.store import Damaged, Store, read_manifest
from lensmith.core.errors import RunError
from lensmith.engine.loop import Progress
from lensmith.recipe.build import Built
from lensmith.recipe.prepare import Prepared
from lensmith.recipe.train import Clock, peak_rss_bytes
from lensmith.report.metrics import read_metrics


class Lock:
    """One run at a time in a folder: a lock of the kernel's on a file that names its owner. It ends with the process
    however that ends, and a process id that was given out again does not matter."""

    def __init__(self, path: Path):
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Raises `RunError` LOCKED naming the owner's process id."""
        while True:
            fd = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise RunError("LOCKED", f"this file system has no locks ({error.strerror})", where=str(self.path),
                                   remedy="name an output folder on another file system") from None  # fmt: skip
                raise RunError("LOCKED", f"process {owner} is running in this folder", where=str(self.path.parent),
                               remedy="wait for it, stop it, or name another output folder") from None  # fmt: skip
            if self._is_current(fd):
                break
            os.close(fd)  # its owner removed it just now
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._fd = fd

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
    }


def ledger(prepared: Prepared, dropped_at_load: list[tuple[int, str, str]]) -> pa.Table:
    """One row per sample read: `train`, `drop`, or `held_out` for what `data.holdout` took. Samples dropped at load
    have the verdict `drop` and the reason `LOAD_...`."""
    table = prepared.read.ledger()
    split = prepared.held is not None and not prepared.located.run.data.eval
    held = set(prepared.held.column("origin").tolist()) if prepared.held is not None and split else set[str]()
    if not dropped_at_load and not held:
        return table
    by_origin = {prepared.train.column("origin")[n]: (r, d) for n, r, d in dropped_at_load}
    columns = {name: table[name].to_pylist() for name in ("origin", "verdict", "reason", "detail")}
    for i, origin in enumerate(columns["origin"]):
        if origin in held:
            columns["verdict"][i] = "held_out"
        if origin in by_origin:
            columns["verdict"][i] = "drop"
            columns["reason"][i], columns["detail"][i] = f"LOAD_{by_origin[origin][0]}", by_origin[origin][1]
    for name in ("verdict", "reason", "detail"):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(columns[name], pa.string()))
    return table


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


def dropped(metrics: Path, origins: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Samples dropped at load so far, by number, for a resumed run."""
    found = {r["origin"]: (r["reason"], r["detail"]) for r in read_metrics(metrics) if r.get("name") == "dropped"}
    return {n: found[origin] for n, origin in enumerate(origins if found else ()) if origin in found}


def best_step(store: Store, metric: str | None, score: Callable[[dict[str, float], str], float | None]) -> set[int]:
    """The checkpoint with the best finite held-out metric; {} when none is asked for or known."""
    if metric is None:
        return set()
    found: dict[int, float] = {}
    for step in store.steps():
        try:
            value = score(read_manifest(store.path(step)).get("metrics", {}), metric)
        except Damaged:
            continue
        if value is not None:
            found[step] = value
    return {max(found, key=lambda s: (found[s], s))} if found else set()


def summary(
    prepared: Prepared,
    built: Built,
    p: Progress,
    loss_list: list[float | None],
    metrics: Path,
    heldout: dict[str, Any],
    dropped: dict[int, tuple[str, str]],
    checkpoint: str,
    clock: Clock,
) -> dict[str, Any]:
    """The stable machine-readable outcome of a run; every key is described in docs/run_folder.md."""
    counts = prepared.read.counts()
    at_load = Counter(f"LOAD_{reason}" for reason, _ in dropped.values())
    held = counts["train"] - len(prepared.train.trainable)
    steps = [r for r in read_metrics(metrics) if r.get("kind") == "step"]
    by_reason = {**counts["by_reason"], **at_load}
    samples = {
        "read": counts["read"],
        "train": counts["train"] - len(dropped) - held,
        "dropped": counts["dropped"] + len(dropped),
        "held_out": held,
        "by_reason": by_reason,
    }
    assert samples["read"] == samples["train"] + samples["dropped"] + samples["held_out"]
    return {
        "schema": 1,
        "name": prepared.located.name,
        "outcome": "finished",
        "samples": samples,
        "steps": p.step,
        "applied_steps": p.applied,
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
