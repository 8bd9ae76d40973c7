"""What a run is: a resume that would change it is refused and the field is named.

What may change: the length (`train.epochs`, `train.max_steps`), where and how fast it runs (device, threads, workers,
packing, recomputation, compile, vision cache), and what is watched (log, evaluation, saving, early stop).

Another length changes no step that is done: the order of the samples does not depend on it, and the run goes on in it
where it was. The steps from there on follow the schedule of the new length, so a cosine that had come down to nothing
rises again; the run says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lensmith.core.errors import RunError
from lensmith.model import precision
from lensmith.model.load import base_dtype
from lensmith.recipe.build import device_of
from lensmith.recipe.methods import adapter_folders
from lensmith.recipe.prepare import Prepared
from lensmith.recipe.stream import stream_identity

REMEDY = {
    "data": "the training data changed since the checkpoint: restore it, or start in a new output folder",
    "base_weights": "the base model changed since the checkpoint: restore it, or start in a new output folder",
}
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096


def identity(prepared: Prepared) -> dict[str, Any]:
    """Fields that must not change between a checkpoint and its resume."""
    run = prepared.located.run
    digests = prepared.train.column("digest")
    config = prepared.model_folder / "config.json"
    resolved = precision.plan(run.precision, device_of(run), base_dtype(prepared.model_folder))
    data = {
        "data": _hash(digests),
        "trained tokens": _hash(prepared.train.column("supervised")),
        "num_samples": len(digests),
        "source weights": [f.weight for f in prepared.train.spec.files],
    }
    stage = prepared.located.stage
    resized = run.data.resize != "model"
    return {
        "stage.name": prepared.located.stage_name,
        "stage.optimizer_state": stage.optimizer_state if stage is not None else None,
        **(data if prepared.stream is None else stream_identity(prepared.stream)),
        "data.mixture": run.data.mixture.model_dump(mode="json"),
        "mixture weights": list(prepared.mixture.weights) if prepared.stream is None and prepared.mixture else None,
        "mixture caps": list(prepared.mixture.caps) if prepared.stream is None and prepared.mixture else None,
        "data.documents": run.data.documents.model_dump(mode="json"),
        "train.seed": run.train.seed,
        "train.clip_norm": run.train.clip_norm,
        "train.neftune_alpha": run.train.neftune_alpha,
        "batch.samples": run.samples_per_step,
        "batch.tokens": run.batch.tokens,
        "batch.partial": run.batch.partial,
        "tune": run.tune.model_dump(mode="json"),
        "weights of tune.merge": [sampled_weights(f) for f in adapter_folders(prepared.located).merge],
        "precision.preset": resolved.preset,
        "precision.parts": run.precision.model_dump(mode="json")["parts"],
        "objective": run.objective.model_dump(mode="json"),
        "optimizer": run.optimizer.model_dump(mode="json"),
        "schedule": run.schedule.model_dump(mode="json"),
        "guard.clip_spikes": [run.guard.spike_z, run.guard.spike_window] if run.guard.clip_spikes else None,
        "base_config": _hash(config.read_bytes()),
        "base_weights": sampled_weights(prepared.model_folder),
        "model.remote_code": prepared.code.digest if prepared.code is not None else None,
        "tokenizer": _hash(prepared.train.spec.tokenizer_json.encode()),
        **{f"family.{f.name}": repr(getattr(prepared.family, f.name)) for f in fields(prepared.family) if f.repr},
        "data.max_tokens": run.data.max_tokens,
        "data.too_long": run.data.too_long,
        "data.train_line_feed": run.data.train_line_feed,
        "data.resize": [run.data.resize, *((run.data.min_pixels, run.data.max_pixels) if resized else ())],
    }


def identity_of_done(prepared: Prepared, number: int) -> dict[str, Any]:
    """Fields of a stage that is done, which must not change any more: its length is one of them. The weights that it
    began from were made by the stage before, and are looked at only in the first."""
    train = prepared.located.run.train
    found = identity(prepared) | {"train.epochs": train.epochs, "train.max_steps": train.max_steps}
    return {k: v for k, v in found.items() if not number or not k.startswith("base_")}


def _hash(data: bytes | np.ndarray) -> str:
    raw = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data
    return hashlib.blake2b(raw, digest_size=12).hexdigest()


def sampled_weights(folder: Path) -> str:
    """Names, sizes, headers and some blocks of the weight files: another training of the same model differs in all of
    them, and a whole hash would read 15 GB before each start."""
    h = hashlib.blake2b(digest_size=12)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for k in range(SAMPLED_BLOCKS):
                file.seek(k * max(0, size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                h.update(file.read(BLOCK_BYTES))
    return h.hexdigest()


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str, what: str = "the checkpoint's") -> None:
    """Raises `RunError` RESUME naming each field that differs, with both values."""
    differ = [k for k in now if k in saved and saved[k] != now[k]]
    if differ:
        lines = "\n".join(f"  {k}: checkpoint {saved[k]}, now {now[k]}" for k in differ)
        remedy = REMEDY.get(differ[0], "put these back as they were, or start in a new output folder (output: ...)")
        raise RunError("RESUME", f"the run file differs from {what}:\n{lines}", where=where, remedy=remedy)
