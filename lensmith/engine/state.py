"""The training state of a checkpoint: float32 parameters and moments by name, random state, progress. No pickle."""

# pyright: reportUnknownVariableType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lensmith.core.errors import RunError
from lensmith.engine.determinism import random_state, restore
from lensmith.engine.optimizer import MOMENTS, MasterAdamW
from lensmith.engine.progress import Progress


def write_state(folder: Path, optimizer: MasterAdamW, progress: Progress) -> None:
    """`training.safetensors`, `random.safetensors` and `progress.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.cpu().contiguous() for k, v in optimizer.items()}
    bad = [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]
    if bad:
        raise RunError(
            "NONFINITE", f"{bad[0]} is not finite; this state is not saved", remedy="resume from the last checkpoint"
        )
    save_file(tensors, folder / "training.safetensors")
    random_tensors, text = random_state()
    save_file(random_tensors, folder / "random.safetensors")
    state = {"progress": progress.to_json(), "random": json.loads(text)}
    (folder / "progress.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")


def read_state(folder: Path, optimizer: MasterAdamW) -> Progress:
    """Restore parameters, moments and random state. Names and shapes are checked before anything is touched."""
    tensors = load_file(folder / "training.safetensors")
    shapes = {n: tuple(p.shape) for n, p in optimizer.named}
    found = {k.removeprefix("param/"): tuple(v.shape) for k, v in tensors.items() if k.startswith("param/")}
    if shapes != found:
        other = sorted(set(shapes.items()) ^ set(found.items()))[0]
        raise RunError("RESUME", f"the checkpoint trains other parameters: {other[0]} {other[1]}", where=str(folder),
                       remedy="keep model.path and tune as they were, or start in a new output folder")  # fmt: skip
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind not in ("param", *MOMENTS) or tuple(value.shape) != (() if kind == "step" else shapes.get(name)):
            raise RunError("RESUME", f"the state {key} {tuple(value.shape)} belongs to no parameter of this run",
                           where=str(folder), remedy="restore this checkpoint, or use a new output folder")  # fmt: skip
    saved: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        for key, value in optimizer.tensors().items():  # moments that began later: as they were before they began
            if key not in tensors:
                value.zero_()
    optimizer.load_tensors(tensors)
    restore(load_file(folder / "random.safetensors"), json.dumps(saved["random"]))
    return Progress.from_json(saved["progress"])


def carry_state(folder: Path, optimizer: MasterAdamW, *, moments: bool) -> None:
    """Take from another stage's state what this optimizer trains too, by name: float32 parameters, and its moments
    if `moments`. What only one of them trains is left as it is. Raises `RunError` RESUME for another shape."""
    tensors = load_file(folder / "training.safetensors")
    shapes = {n: tuple(p.shape) for n, p in optimizer.named}
    both = [n for n in shapes if f"param/{n}" in tensors]
    for name in both:
        if tuple(tensors[f"param/{name}"].shape) != shapes[name]:
            raise RunError("RESUME", f"{name} had another shape in the stage before", where=str(folder))
    kinds = ("param", *MOMENTS) if moments else ("param",)
    optimizer.load_tensors({k: v for n in both for kind in kinds if (v := tensors.get(k := f"{kind}/{n}")) is not None})
