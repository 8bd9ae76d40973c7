"""Model folders: what is in them, and loading them with one dtype and our attention."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lensmith.core.errors import ModelError
from lensmith.model.attention import NAME, register
from lensmith.model.loading import FROM_PLAIN, PLAIN, Loading, refuse_quantised

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALED = ("F8_", "F6_", "F4")
"""How the types of 8 bits and less begin: numbers that are weights only together with their scales."""


def tensor_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Name -> dtype of every floating-point tensor in the folder's safetensors files, from their headers."""
    entries = _entries(folder)
    return {name: SAFETENSORS_DTYPES[e["dtype"]] for name, e in entries if e["dtype"] in SAFETENSORS_DTYPES}


def _entries(folder: Path) -> list[tuple[str, Any]]:
    """Names and headers of all tensors. Raises `ModelError` QUANTISED for floats of 8 bits and less."""
    found: list[tuple[str, Any]] = []
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            if str(entry["dtype"]).startswith(SCALED):
                raise ModelError("QUANTISED", f"tensor {name} is {entry['dtype']}: no weights without their scales",
                                 where=str(file), remedy=FROM_PLAIN)  # fmt: skip
            found.append((name, entry))
    return found


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. Raises `ModelError` when there are none, or not those that the index names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [f.name for f in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]]
        extra = f"; {pickled[0]} is a pickle and is never read" if pickled else ""
        raise ModelError(
            "UNSAFE_FORMAT" if pickled else "WEIGHTS",
            f"no .safetensors file in {folder}{extra}",
            remedy="convert the weights to safetensors" if pickled else "",
        )
    index = folder / INDEX
    sharded = index.is_file() and not (folder / WHOLE).is_file()
    if sharded and (missing := sorted(_indexed(index) - {file.name for file in files})):
        raise ModelError("WEIGHTS", f"it names {missing[0]}{_more(missing)}, not in the folder", where=str(index),
                         remedy="copy or download the folder again")  # fmt: skip
    return files


def _indexed(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError("WEIGHTS", "no index of tensors (`weight_map`: tensor to file)", where=str(index),
                         remedy="copy or download the folder again") from None  # fmt: skip


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}. Raises `ModelError` WEIGHTS where it is
    none, or the file is shorter or longer than it says."""
    with open(file, "rb") as f:
        head, length = f.read(8), os.fstat(f.fileno()).st_size
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < size <= min(100 << 20, length):
            raise ModelError("WEIGHTS", "not a safetensors file (its header does not fit)", where=str(file))
        try:
            header: dict[str, Any] = json.loads(f.read(size))
            header.pop("__metadata__", None)
            wanted = 8 + size + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError("WEIGHTS", "not a safetensors file (its header is not JSON, or of another format)",
                             where=str(file)) from None  # fmt: skip
    if wanted != length:
        raise ModelError("WEIGHTS", f"header and bytes disagree: {wanted:,} bytes by the header, {length:,} on disk",
                         where=str(file), remedy="copy or download the file again")  # fmt: skip
    return header


def base_dtype(folder: Path) -> torch.dtype:
    """The type most values of the model have on disk: what it is saved in again."""
    sizes: dict[torch.dtype, int] = {}
    for _, entry in _entries(folder):
        begin, end = entry["data_offsets"]
        if (dtype := SAFETENSORS_DTYPES.get(entry["dtype"])) is not None:
            sizes[dtype] = sizes.get(dtype, 0) + end - begin
    if not sizes:
        raise ModelError("WEIGHTS", "no floating-point tensor in its safetensors files", where=str(folder))
    return max(sizes, key=lambda d: sizes[d])


def widest_dtype(folder: Path) -> torch.dtype:
    """The type that holds every tensor on disk exactly: what the model is loaded in before parts get their types."""
    found = set(tensor_dtypes(folder).values())
    return found.pop() if len(found) == 1 else torch.float32


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, loading: Loading = PLAIN) -> nn.Module:
    """The transformers model with every tensor in `dtype` and lensmith's attention. Runs no code but what is pinned.

    Raises `ModelError` when tensors are missing, have another shape, or the config asks for what packing cannot do.
    """
    from transformers.utils.logging import disable_progress_bar

    tensor_dtypes(folder)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # transformers imports DeepSpeed, which else talks of devices
    register()
    disable_progress_bar()
    config = _config(folder, loading)
    try:
        loaded: Any = loading.classes()[1].from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **_code(loading),
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError("WEIGHTS", f"transformers cannot load it: {error}", where=str(folder)) from None
    wrong = [*info["missing_keys"], *(str(k) for k in info.get("mismatched_keys", ()))]
    if wrong:
        raise ModelError(
            "WEIGHTS",
            f"{len(wrong)} tensors are missing or misshapen: {', '.join(sorted(wrong)[:5])}",
            where=str(folder),
        )
    model.config.use_cache = False
    return model.to(device)


def skeleton(folder: Path, loading: Loading = PLAIN) -> nn.Module:
    """The model without weights, on the meta device: names and shapes. Raises `ModelError` as `load_model` does."""
    config, model = _config(folder, loading), loading.classes()[1]
    build = model.from_config if loading.native is None else model._from_config
    with torch.device("meta"):
        return build(config, dtype=base_dtype(folder), **_code(loading))


def _code(loading: Loading) -> dict[str, Any]:
    """Code of the folder's only if it is pinned; said, for transformers asks on the terminal where nothing is said."""
    if loading.code is not None:
        return loading.code.arguments
    return {"trust_remote_code": False} if loading.native is None else {}


def _config(folder: Path, loading: Loading) -> Any:
    config: Any = loading.classes()[0].from_pretrained(folder, **_code(loading))
    refuse_quantised(getattr(config, "quantization_config", None), folder)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if other := kinds - loading.layer_kinds:
        raise ModelError(
            "ATTENTION",
            f"layers of kind {sorted(other)}: packed rows need {', '.join(sorted(loading.layer_kinds))}",
            where=str(folder / "config.json"),
            remedy="set use_sliding_window: false in the model's config.json",
        )
    return config


def is_tied(model: Any) -> bool:
    """Whether input and output embeddings are one tensor."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
