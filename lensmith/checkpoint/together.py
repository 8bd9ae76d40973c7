"""Full weights written by several ranks: each gathers and keeps only the tensors of its own files."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lensmith.checkpoint.export import SavedTypes, carry, carry_code, finish_config, saved_config, verify_dtypes
from lensmith.core.errors import RunError
from lensmith.parallel.ranks import Ranks, attempt

INDEX = "model.safetensors.index.json"

Full = Callable[[str, torch.Tensor], torch.Tensor]
"""The whole of a named tensor of which this rank may hold a share. Every rank calls it, for the same names in the same
order."""


@dataclass(frozen=True)
class Files:
    """File name -> tensors in it, name on disk -> name in the model; `index`: of more than one file; `configs`: text of
    the JSON files beside them."""

    files: dict[str, dict[str, str]]
    index: dict[str, Any] | None
    configs: dict[str, str]


def plan_files(model: Any, types: SavedTypes, shard_gb: float) -> Files:
    """Which tensors a save would write, under which names, in which files, and its configs.

    transformers decides on names: it is given numbers in place of the weights, and the names under which they come back
    are read. Raises `RunError` SAVE for a model whose tensors are joined or cut on disk.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import load_file

    state = model.state_dict(keep_vars=True)
    numbers: dict[int, torch.Tensor] = {}
    names = list(state)
    stand_ins = {n: numbers.setdefault(id(state[n]), torch.tensor([i])) for i, n in enumerate(names)}
    restore = saved_config(model, types)
    try:
        with tempfile.TemporaryDirectory(prefix="lensmith-names-") as scratch:
            model.save_pretrained(scratch, state_dict=stand_ins, safe_serialization=True)
            found = load_file(Path(scratch) / "model.safetensors")
            configs = {file.name: file.read_text(encoding="utf-8") for file in Path(scratch).glob("*.json")}
    finally:
        restore()
    if sorted(int(v.sum()) for v in found.values()) != sorted(int(v) for v in numbers.values()):
        raise RunError("SAVE", f"{type(model).__name__} joins or cuts tensors on disk; several ranks cannot write it",
                       remedy="train on one rank, or use LoRA")  # fmt: skip
    live = {disk: names[int(v.sum())] for disk, v in found.items()}
    shapes = {
        disk: torch.empty(shape_of(state[n]), dtype=types.of(n) if state[n].is_floating_point() else state[n].dtype,
                          device="meta")
        for disk, n in live.items()
    }  # fmt: skip
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=f"{shard_gb}GB")
    files = {file: {disk: live[disk] for disk in tensors} for file, tensors in split.filename_to_tensors.items()}
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return Files(files, index, configs)


def taken_model(
    plan: Files, model: Any, base: Path, types: SavedTypes, full: Full, ranks: Ranks, pixels: dict[str, int] | None
) -> Callable[[Path], None]:
    """The weights as they are now, in the types they are saved in, on the host; what is returned writes them into a
    folder later, as `write_model` would. Every rank holds the tensors of its own files."""
    kept = dict(_own_files(plan, model, types, full, ranks, copy=True))

    def write(folder: Path) -> None:
        _write(folder, plan, iter(kept.items()), base, types, ranks, pixels)

    return write


def write_model_together(
    folder: Path, plan: Files, model: Any, base: Path, types: SavedTypes, full: Full, ranks: Ranks,
    pixels: dict[str, int] | None,
) -> None:  # fmt: skip
    """As `write_model`, by all ranks into one folder each. A file's tensors are gathered one at a time, and only the
    rank that writes the file keeps them until it is written."""
    files = _own_files(plan, model, types, full, ranks, copy=False)
    _write(folder, plan, files, base, types, ranks, pixels)


def agreed_files(model: Any, types: SavedTypes, shard_gb: float, ranks: Ranks) -> Files:
    """`plan_files` by the first rank, on all."""
    plan, error = attempt(lambda: plan_files(model, types, shard_gb)) if ranks.is_main else (None, None)
    ranks.all_well(error, "plan the files of a checkpoint")
    return Files(**ranks.broadcast_json(plan and asdict(plan), "plan the files of a checkpoint"))


def _own_files(
    plan: Files, model: Any, types: SavedTypes, full: Full, ranks: Ranks, *, copy: bool
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(file, its tensors by their names on disk) of this rank's files; all ranks gather all tensors together."""
    state = model.state_dict(keep_vars=True)
    for number, (file, tensors) in enumerate(plan.files.items()):
        mine = number % ranks.size == ranks.rank
        kept: dict[str, torch.Tensor] = {}
        for disk, name in tensors.items():
            whole = full(name, state[name])
            if mine:
                dtype = types.of(name) if whole.is_floating_point() else whole.dtype
                kept[disk] = whole.detach().to("cpu", dtype, copy=copy).contiguous()
            del whole
        if mine:
            yield file, kept


def _write(
    folder: Path, plan: Files, files: Iterator[tuple[str, dict[str, torch.Tensor]]], base: Path, types: SavedTypes,
    ranks: Ranks, pixels: dict[str, int] | None,
) -> None:  # fmt: skip
    """The first rank writes what is not weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if ranks.is_main:
        for name, text in plan.configs.items():
            (folder / name).write_text(text, encoding="utf-8")
        if plan.index is not None:
            (folder / INDEX).write_text(json.dumps(plan.index, indent=2), encoding="utf-8")
        finish_config(folder / "config.json", types)
        carry(folder, base, pixels)
        carry_code(folder, base)
    verify_dtypes(folder, types, config=ranks.is_main)


def shape_of(tensor: Any) -> Any:
    """Of the whole tensor: ZeRO-3 leaves an empty one in its place."""
    return getattr(tensor, "ds_shape", tensor.shape)


def gathered(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`Full` of tensors that are whole, or spread by FSDP2."""
    own: Any = tensor.detach()
    return own.full_tensor() if hasattr(own, "full_tensor") else own
