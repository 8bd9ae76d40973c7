"""What a model or adapter folder holds, by headers and JSON only: 100 GB of weights cost a few reads of kilobytes.

No model is built, no code of the folder's is run and nothing pickled is opened. Folders of any tool are accepted,
broken ones too: what cannot be read is part of what is said.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lensmith.core.errors import ModelError
from lensmith.model.load import INDEX, SAFETENSORS_DTYPES, WHOLE, read_header

ADAPTER = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor on disk; `begin` and `end` are bytes from the start of its file."""

    name: str
    file: str
    code: str
    """The type as the file names it: `BF16`."""
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None: not a floating-point type that is compared and converted (integers, 8-bit floats)."""
        return SAFETENSORS_DTYPES.get(self.code)

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Contents:
    """A folder, as far as headers and JSON tell."""

    folder: Path
    adapter: bool
    config: dict[str, Any]
    """config.json, or adapter_config.json of an adapter."""
    config_error: str
    """Why there is no config; empty when there is one."""
    files: tuple[str, ...]
    """The weight files that are loaded."""
    beside: tuple[str, ...]
    """Safetensors files that are not among them."""
    index: dict[str, str] | None
    """Tensor -> file by the index of a sharded model."""
    index_error: str
    tensors: tuple[Tensor, ...]
    unreadable: dict[str, str] = field(default_factory=dict[str, str])
    """Weight file -> what is wrong with it."""
    missing: tuple[str, ...] = ()
    """Weight files that the index names and that are not there."""
    pickles: tuple[str, ...] = ()

    @property
    def floats(self) -> list[tuple[Tensor, torch.dtype]]:
        return [(t, t.dtype) for t in self.tensors if t.dtype is not None]


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16`, as configs write it."""
    return str(dtype).removeprefix("torch.")


def read_contents(folder: Path) -> Contents:
    """Everything that can be read of `folder`; raises nothing for what is missing or broken in it."""
    adapter = (folder / "adapter_config.json").is_file()
    config, config_error = _object(folder / ("adapter_config.json" if adapter else "config.json"))
    index, index_error = None, ""
    if (folder / INDEX).is_file():
        parsed, index_error = _object(folder / INDEX)
        weight_map = parsed.get("weight_map")
        if not index_error and not _is_map(weight_map):
            index_error = "has no weight_map of tensors to files of this folder"
        index = None if index_error else weight_map
    present = tuple(sorted(p.name for p in folder.glob("*.safetensors")))
    files = _loaded(present, index, adapter)
    tensors: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for name in files:
        if name not in present:
            continue
        try:
            tensors += read_tensors(folder / name)
        except ModelError as error:
            unreadable[name] = error.message
    return Contents(
        folder=folder,
        adapter=adapter,
        config=config,
        config_error=config_error,
        files=files,
        beside=tuple(n for n in present if n not in files),
        index=index,
        index_error=index_error,
        tensors=tuple(tensors),
        unreadable=unreadable,
        missing=tuple(n for n in files if n not in present),
        pickles=tuple(sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.is_file())),
    )


def _is_map(found: Any) -> bool:
    """Names of files without a folder: an index must not lead out of its own."""
    return isinstance(found, dict) and all(isinstance(f, str) and Path(f).name == f for f in found.values())


def _loaded(present: tuple[str, ...], index: dict[str, str] | None, adapter: bool) -> tuple[str, ...]:
    if index is not None:
        return tuple(sorted(set(index.values())))
    whole = ADAPTER if adapter else WHOLE
    return (whole,) if whole in present else present


def _object(path: Path) -> tuple[dict[str, Any], str]:
    """(the JSON object in `path`, why there is none)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "is missing"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read: {error}"
    return (found, "") if isinstance(found, dict) else ({}, "is not a JSON object")


def read_tensors(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file in the order of their bytes. Raises `ModelError` WEIGHTS where the header is
    none, or does not describe the bytes behind it."""
    header = read_header(file)
    try:
        with safe_open(file, framework="pt"):  # checks offsets, sizes and the length of the file
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError("WEIGHTS", f"header and bytes disagree ({error})", where=str(file)) from None
    start = data_start(file)
    found = [
        Tensor(
            name,
            file.name,
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            start + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    ]
    return sorted(found, key=lambda t: (t.begin, t.end))


def data_start(file: Path) -> int:
    """Where the bytes of the tensors begin."""
    with open(file, "rb") as f:
        return 8 + struct.unpack("<Q", f.read(8))[0]


def raw_chunks(file: Path, tensor: Tensor) -> Iterator[bytearray]:
    """The bytes of a tensor, at most `CHUNK_BYTES` at a time."""
    with open(file, "rb") as f:
        f.seek(tensor.begin)
        left = tensor.num_bytes
        while left:
            piece = bytearray(min(CHUNK_BYTES, left))
            if f.readinto(piece) != len(piece):
                raise ModelError("WEIGHTS", f"{tensor.name} ends early", where=str(file))
            left -= len(piece)
            yield piece


def values(file: Path, tensor: Tensor) -> Iterator[torch.Tensor]:
    """The values of a floating-point tensor, flat, chunk by chunk."""
    assert tensor.dtype is not None
    for piece in raw_chunks(file, tensor):
        yield torch.frombuffer(piece, dtype=tensor.dtype)


def said_dtypes(config: dict[str, Any], at: str = "") -> dict[str, str]:
    """Dotted key -> type, of the config and every (sub-)config in it that names one: `dtype`, `text_config.dtype`,
    `vision_config.torch_dtype`."""
    found = {
        f"{at}{k}": v.removeprefix("torch.") for k in ("dtype", "torch_dtype") if isinstance(v := config.get(k), str)
    }
    for key, sub in config.items():
        if key.endswith("_config") and isinstance(sub, dict):
            found |= said_dtypes(sub, f"{at}{key}.")
    return found
