"""`lensmith inspect`: does a folder say what it holds, and, with `--repair`, make it so."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lensmith.checkpoint import repair as repairing
from lensmith.checkpoint.findings import modules_to_save
from lensmith.checkpoint.headers import name_of, read_contents
from lensmith.checkpoint.inspect import Inspection, inspect
from lensmith.core.errors import ConfigError, ModelError
from lensmith.family.registry import FAMILIES, part_of_kind
from lensmith.recipe.export import DTYPES, here, is_url, model_folder
from lensmith.recipe.folder import Lock
from lensmith.report.tables import Table, number, size
from lensmith.report.terminal import Terminal

DISAGREES = 1
"""Exit status when a finding is an error."""


def inspect_folder(path: Path | str, *, values: bool, repair: bool, dtype: str | None, terminal: Terminal) -> int:
    """Say what a folder, or a checkpoint in a store, holds; the exit status. With `repair`, convert it first. Raises
    `UserError`s."""
    if dtype is not None and not repair:
        raise ConfigError(
            "DTYPE", "--dtype says what --repair converts to", remedy="add --repair, or use lensmith export"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("DTYPE", f"--dtype {dtype!r}", remedy=f"one of {', '.join(DTYPES)}")
    if is_url(path) and repair:
        raise ConfigError("REPAIR", "a checkpoint in a store cannot be repaired", remedy="lensmith export it first")
    with here(path, terminal) as folder:
        return _inspect(folder, values, repair, dtype, terminal)


def _inspect(path: Path, values: bool, repair: bool, dtype: str | None, terminal: Terminal) -> int:
    path = Path(os.path.realpath(path))  # a repair renames the folder itself: no link to it, and no working folder
    if repair:
        _repair(path, DTYPES.get(dtype or ""), terminal)
    folder = _model_folder(path, terminal)
    part_of = parts_of(folder)
    if values:
        count = len(read_contents(folder).tensors)
        with terminal.progress(f"Reading {folder}", count) as progress:
            found = inspect(folder, part_of, values=True, tick=progress.advance)
    else:
        found = inspect(folder, part_of)
    show(found, terminal)
    return DISAGREES if found.errors else 0


def parts_of(folder: Path) -> Callable[[str], str] | None:
    """Tensor name -> part, by the family of the model, whatever else its files say; None where no family knows it."""
    kind = read_contents(folder).config.get("model_type")
    return part_of_kind(kind) if isinstance(kind, str) and kind in FAMILIES else None


def _model_folder(path: Path, terminal: Terminal) -> Path:
    """As `model_folder`; of a folder with weights and no config, that folder: what it lacks is a finding."""
    if path.is_dir() and not any((path / n).exists() for n in ("checkpoints", "MANIFEST.json")):
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            return path
    elif not path.exists() and repairing.names_of(path).backup.is_dir():
        raise ModelError("REPAIR", "a repair of this folder was interrupted", where=str(path),
                         remedy="lensmith inspect FOLDER --repair goes on with it")  # fmt: skip
    return model_folder(path, terminal)


# -- repair -----------------------------------------------------------------------------------------------------------


def _repair(path: Path, dtype: torch.dtype | None, terminal: Terminal) -> None:
    names = repairing.names_of(path)
    if not path.exists() and not names.backup.is_dir():
        model_folder(path, terminal)
    lock = Lock(names.staging.with_name(f"{names.staging.name}.lock"))
    lock.acquire()
    try:
        if repairing.finish(path):
            _swapped(path, names.backup, terminal)
            return
        folder = _model_folder(path, terminal)
        if folder != path or (names.folder.parent / "MANIFEST.json").is_file():
            raise ModelError("REPAIR", "a checkpoint of lensmith is sealed and not repaired in place", where=str(path),
                             remedy="lensmith export writes a model of one type from it")  # fmt: skip
        part_of = parts_of(folder)
        found = inspect(folder, part_of)
        repairing.check_whole(found)
        target = repairing.wanted(found, dtype)
        if target is None:
            terminal.event("repair", "nothing to repair", path=str(path), repaired=False)
            return
        with terminal.progress(f"Writing {path.name} in {name_of(target)}", len(found.contents.tensors)) as progress:
            backup = repairing.repair(found, target, part_of, progress.advance)
        _swapped(path, backup, terminal)
    finally:
        lock.release()


def _swapped(path: Path, backup: Path, terminal: Terminal) -> None:
    terminal.event("repair", f"{path} is repaired; what it was is {backup}", path=str(path), repaired=True,
                   backup=str(backup))  # fmt: skip


# -- what is shown ----------------------------------------------------------------------------------------------------


def record(found: Inspection) -> dict[str, Any]:
    """The inspection as JSON."""
    contents = found.contents
    adapter = {k: contents.config.get(k) for k in ("base_model_name_or_path", "r", "modules_to_save")}
    return {
        "path": str(contents.folder),
        "kind": "adapter" if contents.adapter else "model",
        "model_type": contents.config.get("model_type"),
        **({"adapter": adapter} if contents.adapter else {}),
        "files": len(contents.files),
        "tensors": len(contents.tensors),
        "parts": {
            part: {name_of(d): {"tensors": h.num_tensors, "values": h.num_values, "bytes": h.num_bytes}
                   for d, h in held.items()}
            for part, held in found.parts.items()
        },
        "config_dtypes": found.said,
        "vllm": None if found.read_by_vllm is None else dict(zip(("dtype", "from"), found.read_by_vllm, strict=True)),
        "findings": [asdict(f) for f in found.findings],
        "agrees": not found.errors,
    }  # fmt: skip


def show(found: Inspection, terminal: Terminal) -> None:
    """Tables and findings for a person, one event for a program, only the errors where it is to be quiet."""
    if terminal.mode == "json":
        terminal.event("inspection", **record(found))
        return
    if terminal.mode == "quiet":
        for finding in found.errors:
            terminal.warning(f"{finding.code}: {finding.what}")
        return
    terminal.show("parts", _parts_table(found))
    if not found.contents.adapter:
        terminal.show("config", _config_table(found))
    else:
        config = found.contents.config
        saved = ", ".join(modules_to_save(config)) or "nothing"
        terminal.event("adapter", f"adapter of {config.get('base_model_name_or_path')}, rank {config.get('r')}, whole "
                       f"modules: {saved}")  # fmt: skip
    for finding in found.findings:
        terminal.event("finding", f"{finding.severity} {finding.code}: {finding.what}; {finding.why}")
        terminal.event("finding", f"  -> {finding.remedy}")
    warnings = len(found.findings) - len(found.errors)
    terminal.event("inspection", f"{len(found.errors)} errors, {warnings} warnings" if found.findings else
                   "config and tensors agree")  # fmt: skip


def _parts_table(found: Inspection) -> Table:
    rows = [
        (part, name_of(dtype), number(held.num_tensors), number(held.num_values), size(held.num_bytes))
        for part, by_type in found.parts.items()
        for dtype, held in by_type.items()
    ]
    title = f"{found.contents.folder} ({found.contents.config.get('model_type') or 'adapter'})"
    return Table(title, ("part", "type", "tensors", "values", "size"), rows, frozenset({"tensors", "values", "size"}))


def _config_table(found: Inspection) -> Table:
    rows = [("config.json", key, dtype) for key, dtype in found.said.items()] or [
        ("config.json", "no dtype", number(None))
    ]
    if found.read_by_vllm is not None:
        dtype, key = found.read_by_vllm
        rows.append(("vLLM reads", key, dtype))
    return Table("What is said of types", ("", "key", "type"), rows)
