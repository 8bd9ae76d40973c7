"""A folder made anew in one type, beside the old one, and swapped in by two renames.

Writing: a hidden folder `.NAME.repair` with the same files, the same tensors in the same files, every floating-point
tensor in the type and every (sub-)config naming it; all of it synced, then looked at by `inspect`. Then NAME becomes
NAME.before-repair, and `.NAME.repair` becomes NAME. A kill before the first rename leaves NAME as it was, and the next
call starts anew; after it the new folder is whole, and the next call does the second rename. Tensors are streamed:
memory does not grow with the model.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lensmith.checkpoint.headers import INDEX, Contents, Tensor, name_of, raw_chunks, read_contents, read_tensors
from lensmith.checkpoint.inspect import Inspection, inspect
from lensmith.checkpoint.store import sync_folder
from lensmith.core.errors import ModelError, RunError
from lensmith.model.load import SAFETENSORS_DTYPES

CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}

REPAIRED = ("MIXED_DTYPES", "MIXED_PARTS", "CONFIG_DTYPE", "VLLM_DTYPE", "DTYPE_MISSING", "FLASH_ATTENTION")
"""Codes of findings that a repair ends."""
NO_REPAIR = ("CONFIG", "HEADER", "SHARD_MISSING", "WEIGHTS", "PICKLED", "DUPLICATE_TENSOR", "TWO_WEIGHTS", "QUANTISED")
"""Codes with which there is nothing whole to convert. `PICKLED` is one only as an error."""


@dataclass(frozen=True)
class Names:
    folder: Path
    staging: Path
    backup: Path


def names_of(folder: Path) -> Names:
    folder = Path(os.path.abspath(folder))
    return Names(folder, folder.with_name(f".{folder.name}.repair"), folder.with_name(f"{folder.name}.before-repair"))


def finish(folder: Path) -> bool:
    """Do the second rename of a repair that was killed between the two; whether there was one.

    Raises `ModelError` REPAIR when the old folder is put aside and there is no whole new one.
    """
    names = names_of(folder)
    if names.folder.exists() or not names.backup.is_dir():
        return False
    if not names.staging.is_dir() or _layout(read_contents(names.staging)) != _layout(read_contents(names.backup)):
        raise ModelError("REPAIR", f"{names.folder.name} is gone, and what a repair left of it is not whole",
                         where=str(names.backup), remedy=f"rename it back to {names.folder.name}")  # fmt: skip
    os.rename(names.staging, names.folder)
    sync_folder(names.folder.parent)
    return True


def wanted(found: Inspection, dtype: torch.dtype | None) -> torch.dtype | None:
    """The type a repair would convert to; None when there is nothing to repair."""
    if any(f.code in REPAIRED and (f.severity == "error" or f.code == "DTYPE_MISSING") for f in found.findings):
        return dtype or found.natural_dtype
    return dtype if dtype is not None and set(found.dtypes) - {dtype} else None


def repair(
    found: Inspection,
    dtype: torch.dtype,
    part_of: Callable[[str], str] | None,
    tick: Callable[[], None] = lambda: None,
) -> Path:
    """Convert the inspected folder to `dtype`; returns where the old one is. `tick` is called once a tensor.

    Raises `ModelError` REPAIR when the folder cannot be converted, `RunError` REPAIR when the disk refuses; the folder
    is then what it was.
    """
    names = names_of(found.contents.folder)
    check_whole(found)
    if names.backup.exists():
        raise ModelError("REPAIR", f"{names.backup} is there already, from an earlier repair", where=str(names.folder),
                         remedy="delete it, or rename it, and repair again")  # fmt: skip
    shutil.rmtree(names.staging, ignore_errors=True)
    try:
        _write(found.contents, names.staging, dtype, tick)
        _sync(names.staging)
        _verify(found, inspect(names.staging, part_of), dtype)
        _swap(names)
    except BaseException as error:
        shutil.rmtree(names.staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise _disk(error, names) from error
        raise
    sync_folder(names.folder.parent)
    return names.backup


def _swap(names: Names) -> None:
    """The old folder aside, the new one in its place. If that is interrupted, the old one is put back."""
    try:
        os.rename(names.folder, names.backup)
        sync_folder(names.folder.parent)  # on disk too the second rename must not come before the first
        os.rename(names.staging, names.folder)
    except BaseException:
        if not names.folder.exists():
            os.rename(names.backup, names.folder)
        raise


def check_whole(found: Inspection) -> None:
    """Raises `ModelError` REPAIR where there is nothing whole to convert."""
    wrong = [f for f in found.findings if f.code in NO_REPAIR and (f.severity == "error" or f.code == "QUANTISED")]
    if wrong:
        text = "\n".join(f"  {f.code}: {f.what}" for f in wrong)
        raise ModelError("REPAIR", f"this cannot be repaired:\n{text}", where=str(found.contents.folder),
                         remedy=wrong[0].remedy)  # fmt: skip


def _disk(error: OSError, names: Names) -> RunError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    free = f"; {shutil.disk_usage(names.folder.parent).free >> 20:,} MiB are free" if full else ""
    remedy = "make room" if full else f"look at {error.filename or names.staging}: its kind and its permissions"
    return RunError("REPAIR", f"the repaired folder could not be written: {error.strerror}{free}",
                    where=str(names.staging), remedy=f"{remedy}; the folder is as it was")  # fmt: skip


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(contents: Contents, staging: Path, dtype: torch.dtype, tick: Callable[[], None]) -> None:
    _copy(contents, staging)
    total = 0
    for name in contents.files:
        total += convert_file(contents.folder / name, staging / name, dtype, tick)
    if not contents.adapter:
        _rewrite(staging / "config.json", fixed_config(contents.config, dtype))
    if contents.index is not None:
        index = json.loads((contents.folder / INDEX).read_text(encoding="utf-8"))
        about = index.get("metadata")
        about = {**(about if isinstance(about, dict) else {}), "total_size": total}
        _rewrite(staging / INDEX, {**index, "metadata": about})


def _copy(contents: Contents, staging: Path) -> None:
    """Everything that is not converted, folders too."""
    for at, _, files in os.walk(contents.folder, followlinks=True):
        below = Path(at).relative_to(contents.folder)
        (staging / below).mkdir()
        for name in files:
            if below.parts or name not in contents.files:
                shutil.copy2(Path(at) / name, staging / below / name)


def _rewrite(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fixed_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with `dtype` under every key that names a type, and at the root in every case. Which of the keys
    (`dtype`, or `torch_dtype` as older loaders know it) stays as it was."""
    fixed = _renamed(config, name_of(dtype))
    return fixed if "dtype" in fixed or "torch_dtype" in fixed else {**fixed, "dtype": name_of(dtype)}


def _renamed(config: dict[str, Any], text: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            out[key] = text
        elif key.endswith("_config") and isinstance(value, dict):
            out[key] = _renamed(value, text)
        else:
            out[key] = value
    return out


def convert_file(source: Path, target: Path, dtype: torch.dtype, tick: Callable[[], None] = lambda: None) -> int:
    """Write `source` to `target` with its floating-point tensors in `dtype`; returns the bytes of all tensors.

    Tensors of wider types stand first, so that each begins at a multiple of its size. Raises `ModelError` OVERFLOW for
    a finite value that `dtype` does not hold.
    """
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = sorted(read_tensors(source), key=lambda t: -_width(t, dtype))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for tensor in tensors:
        size = tensor.num_bytes if tensor.dtype is None else tensor.num_bytes // tensor.dtype.itemsize * dtype.itemsize
        code = tensor.code if tensor.dtype is None else CODES[dtype]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in raw_chunks(source, tensor):
                out.write(_converted(piece, tensor, dtype, source))
            tick()
    shutil.copymode(source, target)
    return at


def _width(tensor: Tensor, dtype: torch.dtype) -> int:
    """Bits of a value of `tensor` once it is converted."""
    digits = re.search(r"\d+", tensor.code)
    return 8 * dtype.itemsize if tensor.dtype is not None else int(digits[0]) if digits else 8


def _converted(piece: bytearray, tensor: Tensor, dtype: torch.dtype, source: Path) -> bytes | bytearray:
    """The bytes of `piece` in `dtype`, as `Tensor.to` rounds."""
    if tensor.dtype is None or tensor.dtype == dtype:
        return piece
    before = torch.frombuffer(piece, dtype=tensor.dtype)
    after = before.to(dtype)
    if not torch.isfinite(after).all() and bool((torch.isfinite(before) & ~torch.isfinite(after)).any()):
        raise ModelError("OVERFLOW", f"{tensor.name} has values that {name_of(dtype)} does not hold", where=str(source),
                         remedy="--dtype bfloat16 or float32")  # fmt: skip
    return after.view(torch.uint8).numpy().tobytes()


# -- verifying --------------------------------------------------------------------------------------------------------


def _sync(folder: Path) -> None:
    for at, _, files in os.walk(folder, topdown=False):
        for name in files:
            with open(Path(at) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(at))


def _layout(contents: Contents) -> tuple[Any, ...]:
    """What a repair must not change: names, places and shapes of tensors, and the other files with their sizes."""
    rewritten = {*contents.files, "config.json", INDEX}
    others = {
        path.relative_to(contents.folder).as_posix(): path.stat().st_size
        for path in (Path(at) / name for at, _, files in os.walk(contents.folder, followlinks=True) for name in files)
    }
    sizes = {name: size for name, size in others.items() if name not in rewritten}
    return set(others), sizes, {(t.name, t.file, t.shape) for t in contents.tensors}


def _verify(before: Inspection, after: Inspection, dtype: torch.dtype) -> None:
    """Raises `RunError` REPAIR unless the copy on disk has everything, in one type, and says so."""
    had = {f.code for f in before.errors}
    wrong = [f"{f.code}: {f.what}" for f in after.errors if f.code in REPAIRED or f.code not in had]
    if _layout(before.contents) != _layout(after.contents):
        wrong.append("files or tensors differ from those of the folder")
    if set(after.dtypes) - {dtype}:
        wrong.append(f"tensors are {', '.join(name_of(d) for d in after.dtypes)}")
    if wrong:
        raise RunError("REPAIR", f"the copy does not verify: {'; '.join(wrong)}", where=str(after.contents.folder),
                       remedy="the folder is as it was; try again, on another disk if this repeats")  # fmt: skip
