"""What a run is: a resume that would change it is refused and the field is named."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from lensmith.core.errors import RunError
from lensmith.recipe.prepare import Prepared

REMEDY = {
    "data": "the training data changed since the checkpoint: restore it, or start in a new output folder",
}


def identity(prepared: Prepared) -> dict[str, Any]:
    """Fields that must not change between a checkpoint and its resume. World size, workers, paths and logging may."""
    run = prepared.located.run
    digests = np.ascontiguousarray(prepared.train.column("digest"))
    config = prepared.model_folder / "config.json"
    return {
        "data": hashlib.blake2b(digests.tobytes(), digest_size=12).hexdigest(),
        "num_samples": len(digests),
        "seed": run.train.seed,
        "batch.samples": run.samples_per_step,
        "batch.tokens": run.batch.tokens,
        "batch.partial": run.batch.partial,
        "tune": run.tune.model_dump(mode="json"),
        "precision": run.precision.preset,
        "optimizer": run.optimizer.model_dump(mode="json"),
        "schedule": run.schedule.model_dump(mode="json"),
        "epochs": run.train.epochs,
        "base_config": hashlib.blake2b(config.read_bytes(), digest_size=12).hexdigest(),
        "tokenizer": hashlib.blake2b(prepared.train.spec.tokenizer_json.encode(), digest_size=12).hexdigest(),
        "pixels": repr(prepared.family.pixels),
        "max_tokens": run.data.max_tokens,
    }


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises `RunError` RESUME naming each field that differs, with both values."""
    differ = [k for k in now if k in saved and saved[k] != now[k]]
    if differ:
        lines = "\n".join(f"  {k}: checkpoint {saved[k]}, now {now[k]}" for k in differ)
        remedy = REMEDY.get(differ[0], "put these back as they were, or start in a new output folder (output: ...)")
        raise RunError("RESUME", f"the run file differs from the checkpoint's:\n{lines}", where=where, remedy=remedy)
