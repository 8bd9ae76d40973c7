"""`incidents/step-NNNNNN`: what is left of a step that was not finite, enough to compute it again without the data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lensmith.checkpoint.store import sync_folder
from lensmith.core.encoded import Compared, PackedRow, Segment
from lensmith.core.version import VERSION
from lensmith.engine.options import Guard
from lensmith.engine.rescue import Incident, advice
from lensmith.model.root import Root
from lensmith.model.vision_cache import feature_key
from lensmith.parallel.shares import is_here, local
from lensmith.report.metrics import json_line

SCHEMA = 1
TAIL_LINES = 200
"""Lines of metrics.jsonl that are copied."""
WHOLE_BYTES = 1 << 30
"""Weights and moments up to this size are hashed whole; above, evenly spread blocks of each tensor."""
BLOCKS, BLOCK_BYTES = 16, 4096
LONGEST_NAMES = 200
"""Names in a list of incident.json."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class About:
    """What an incident is of. `origin`: of a sample; `known`: what only the run can say (name, stage, checkpoint, ...);
    `text`: of token ids, for `guard.dump_text`."""

    output: Path
    run_yaml: str
    rule: Guard
    root: Root
    first_step: int
    known: dict[str, Any]
    wholes: dict[str, torch.Tensor]
    """Parameters of which this rank has a share, put together as far as there was room."""
    origin: Callable[[int], str]
    text: Callable[[Iterable[int]], str]


def write_incident(incident: Incident, about: About) -> Path:
    """The folder, made whole and then renamed. The oldest above `guard.keep` are removed."""
    parent = about.output / "incidents"
    parent.mkdir(exist_ok=True)
    name = f"step-{about.first_step + incident.step:06d}"
    for left in parent.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    staging = parent / f".{name}-{os.getpid()}"
    staging.mkdir()
    try:
        _fill(staging, incident, about)
        sync_folder(staging)
        target = _free(parent, name)
        os.rename(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, SafetensorError):  # a disk that is full
            raise OSError(str(error)) from None
        raise
    sync_folder(parent)
    for old in folders(about.output)[: -about.rule.keep or None]:
        shutil.rmtree(old)
    return target


def folders(output: Path) -> list[Path]:
    """The incidents of a run folder, oldest first."""
    found = (output / "incidents").glob("step-*/incident.json")
    return sorted((p.parent for p in found), key=lambda p: (p.stat().st_mtime_ns, p.name))


def _free(parent: Path, name: str) -> Path:
    """A step may be computed again after a roll-back, and fail again."""
    names = (name, *(f"{name}-{n}" for n in range(2, 10_000)))
    return next(parent / n for n in names if not (parent / n).exists())


def _fill(folder: Path, incident: Incident, about: About) -> None:
    room = _Room(about.rule.dump_mb << 20)
    record: dict[str, Any] = {"schema": SCHEMA, "lensmith": VERSION, **about.known, **_record(incident, about)}
    if incident.scene is not None and incident.finding.row is not None:
        record["batch"] = _batch(folder, incident, about, room)
    record["tensors"] = _tensors(folder, incident, about, room)
    hashes = tensor_hashes(_everything(incident, about))
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    (folder / "run.yaml").write_text(about.run_yaml, encoding="utf-8")
    metrics = about.output / "metrics.jsonl"
    tail = metrics.read_bytes().splitlines(keepends=True)[-TAIL_LINES:] if metrics.is_file() else []
    (folder / "metrics.jsonl").write_bytes(b"".join(tail))
    text = json.dumps(json.loads(json_line(record)), indent=1)
    (folder / "incident.json").write_text(text, encoding="utf-8")


def _record(incident: Incident, about: About) -> dict[str, Any]:
    f, p, result = incident.finding, incident.progress, incident.result
    scale = incident.scene.scale if incident.scene is not None else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "kind": incident.kind,
        "step": about.first_step + incident.step, "cause": f.cause, "module": f.module, "module_type": f.module_type,
        "part": f.part, "direction": f.direction, "largest_input": f.largest_input, "input_dtype": f.input_dtype,
        "output_dtype": f.output_dtype, "row": f.row, "reruns": f.reruns, "every_sample": f.every_sample,
        "samples": [{"number": n, "origin": about.origin(n)} for n in f.samples],
        "bad_parameters": f.bad_parameters[:LONGEST_NAMES], "bad_gradients": f.bad_gradients[:LONGEST_NAMES],
        "num_bad_parameters": len(f.bad_parameters), "num_bad_gradients": len(f.bad_gradients),
        "action": incident.action, "why": incident.why, "advice": advice(f),
        "loss": None if result is None else result.loss, "grad_norm": None if result is None else result.grad_norm,
        "lr": None if result is None else result.rates, "loss_scale": None if scale is None else scale.value,
        "epoch": p.epoch, "cursor": p.cursor, "applied": p.applied, "bad_in_a_row": p.bad_in_a_row,
        "incidents": p.history.incidents, "skipped": p.history.skipped, "transient": p.history.transient,
        "roll_backs": len(p.history.roll_backs), "gradient_norms": f.gradient_norms,
        "largest_outputs": f.largest_outputs, "members": _members(incident, about),
    }  # fmt: skip


def _members(incident: Incident, about: About) -> list[dict[str, Any]]:
    """The samples of the row at fault, or of the step: origin, targets, and a hash of their tokens."""
    scene, row = incident.scene, incident.finding.row
    if scene is None:
        return []
    found: list[dict[str, Any]] = []
    for packed in scene.rows if row is None else [scene.rows[row]]:
        for number in packed.members:
            about_it = {"number": int(number), "origin": about.origin(int(number)),
                        "targets": int((packed.sample_S == number).sum())}  # fmt: skip
            if about.rule.dump_text and row is not None:
                about_it["text"] = about.text(scene.reread(int(number)).ids_T.tolist())
            found.append(about_it)
    return found


# -- tensors ----------------------------------------------------------------------------------------------------------


class _Room:
    """What is left of `guard.dump_mb`."""

    def __init__(self, size: int):
        self.left = size

    def take(self, tensors: Tensors) -> bool:
        """Whether all of these fit; then their room is taken."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size > self.left:
            return False
        self.left -= size
        return True


def _batch(folder: Path, incident: Incident, about: About, room: _Room) -> dict[str, Any] | None:
    """The row at fault, each of its samples alone as far as they fit, features that were kept, the random state. None
    where the row alone is too large."""
    scene, finding = incident.scene, incident.finding
    assert scene is not None and finding.row is not None and finding.random is not None
    row: PackedRow = scene.refresh(scene.rows[finding.row])
    tensors, rest = dump_row(row)
    tensors = {f"row/{k}": v for k, v in tensors.items()} | _features(about.root, row)
    if not room.take(tensors):
        return None
    alone: dict[str, Any] = {}
    if finding.cause != "bad_weights":
        others = [r.members[0] for r in scene.rows if r is not scene.rows[finding.row] and r.members][:1]
        for number in [*row.members, *others]:
            own, own_rest = dump_row(scene.reread(int(number)))
            own = {f"alone/{number}/{k}": v for k, v in own.items()}
            if room.take(own):
                tensors |= own
                alone[str(number)] = own_rest
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / "row.safetensors")
    random, text = finding.random
    save_file(random, folder / "random.safetensors")
    return {"row": rest, "alone": alone, "counts": dict(scene.counts), "random": json.loads(text)}


def _features(root: Root, row: PackedRow) -> Tensors:
    """What the vision cache gave for the pictures of a row: computed anew it may be something else."""
    if root.cache is None:
        return {}
    keys = [feature_key(k, tuple(g)) for k, g in zip(row.image_keys, row.image_grids_I3.tolist(), strict=True)]
    return {f"feature/{k}": v for k in keys if (v := root.cache.get(k)) is not None}


def _tensors(folder: Path, incident: Incident, about: About, room: _Room) -> dict[str, Any]:
    """What is not finite and the parameters of the module at fault; then all that trains, or none of it."""
    finding, model, kept = incident.finding, about.root.named, Tensors()
    named = {n: p for n, p in model.named_parameters() if is_here(p)} | about.wholes
    if incident.kind == "state":
        state = dict(incident.optimizer.items())
        kept = {f"state/{k}": state[k] for k in finding.bad_parameters if room.take({k: state[k]})}
    else:
        first = {n: named[n] for n in finding.bad_parameters if n in named}
        first |= {n: named[n] for n in parameters_of(model, finding.module) if n in named}
        kept = {f"model/{n}": p.detach() for n, p in first.items() if room.take({n: p})}
    shown = sorted(kept)[:LONGEST_NAMES]
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    trained = {f"model/{n}": named[n].detach() for n in trains if n in named and f"model/{n}" not in kept}
    whole = incident.kind == "step" and all(n in named for n in trains) and room.take(trained)
    kept |= trained if whole else {}
    save_file({k: v.cpu().contiguous() for k, v in kept.items()}, folder / "tensors.safetensors")
    return {"trained": whole, "named": shown}


def parameters_of(model: torch.nn.Module, module: str | None) -> list[str]:
    """Names of the parameters of a module, by its name in the model."""
    if module is None:
        return []
    own = {id(p) for p in model.get_submodule(module).parameters()}
    return [n for n, p in model.named_parameters() if id(p) in own]


def _everything(incident: Incident, about: About) -> Iterable[tuple[str, torch.Tensor]]:
    """What only this rank's share is known of, as `share`."""
    model = about.root.named
    for n, p in model.named_parameters():
        if n in about.wholes or is_here(p):
            yield f"model/{n}", about.wholes.get(n, p.detach())
        else:
            yield f"share/{n}", local(p)
    yield from ((f"buffer/{n}", b) for n, b in model.named_buffers())
    yield from ((f"state/{k}", v) for k, v in incident.optimizer.items())


def tensor_hashes(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """`whole`: whether every byte counts; `tensors`: name -> BLAKE2b of type, shape and values."""
    found = list(tensors)
    whole = sum(t.numel() * t.element_size() for _, t in found) <= WHOLE_BYTES
    return {"whole": whole, "tensors": {name: _hash(t, whole) for name, t in found}}


def _hash(tensor: torch.Tensor, whole: bool) -> str:
    h = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    size = flat.numel()
    if whole or size <= BLOCKS * BLOCK_BYTES:
        h.update(_bytes(flat))
        return h.hexdigest()
    for k in range(BLOCKS):
        start = k * (size - BLOCK_BYTES) // (BLOCKS - 1)
        h.update(_bytes(flat[start : start + BLOCK_BYTES]))
    return h.hexdigest()


def _bytes(flat: torch.Tensor) -> Any:
    """Of a copy: torch lets go of no memory that NumPy has seen, and FSDP2 wants to."""
    return flat.to("cpu", copy=True).numpy().data


# -- rows -------------------------------------------------------------------------------------------------------------


def dump_row(row: PackedRow) -> tuple[Tensors, dict[str, Any]]:
    """(arrays, the rest as JSON)."""
    tensors: Tensors = {}
    rest: dict[str, Any] = {}
    for field in fields(PackedRow):
        value = getattr(row, field.name)
        if isinstance(value, np.ndarray):
            tensors[field.name] = torch.from_numpy(np.ascontiguousarray(value))
        elif field.name == "segments":
            rest["segments"] = [[s.start, s.length, s.prefix_start, s.prefix_length] for s in value]
        elif field.name == "compared" and value is not None:
            arrays = {f.name: v for f in fields(Compared) if isinstance(v := getattr(value, f.name), np.ndarray)}
            tensors |= {f"compared.{k}": torch.from_numpy(v) for k, v in arrays.items()}
            rest["compared"] = {"statistic": value.statistic}
        elif field.name not in ("meta", "compared"):
            rest[field.name] = value
    return tensors, rest


def load_row(tensors: Tensors, rest: dict[str, Any]) -> PackedRow:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    values: dict[str, Any] = {name: array for name, array in arrays.items() if not name.startswith("compared.")}
    for name, value in rest.items():
        if name == "compared":
            own = {k.removeprefix("compared."): v for k, v in arrays.items() if k.startswith("compared.")}
            values[name] = Compared(**own, **value)
            continue
        if name == "segments":
            values[name] = tuple(Segment(*s) for s in value)
        elif name == "image_keys":
            values[name] = value
        elif name == "image_views":
            values[name] = [tuple(v) for v in value]
        else:
            values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return PackedRow(**values)
