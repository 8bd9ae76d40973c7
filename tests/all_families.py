"""A tiny random model of every family, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tiny
import tiny_gemma3
import tiny_idefics3
import tiny_internvl
import tiny_llava
import tiny_minicpm
import tiny_minicpm4
import torch
from safetensors.torch import load_file, save_file

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": lambda folder: tiny.make_model(folder, "qwen2_vl"),
    "qwen2_5_vl": lambda folder: tiny.make_model(folder, "qwen2_5_vl"),
    "qwen3_vl": lambda folder: tiny.make_model(folder, "qwen3_vl", tie=False),
    "llava": lambda folder: tiny_llava.make_model(folder, "llava"),
    "llava_next": lambda folder: tiny_llava.make_model(folder, "llava_next"),
    "idefics3": lambda folder: tiny_idefics3.make_model(folder, "idefics3"),
    "smolvlm": lambda folder: tiny_idefics3.make_model(folder, "smolvlm"),
    "internvl": tiny_internvl.make_model,
    "gemma3": tiny_gemma3.make_model,
    "minicpmv": tiny_minicpm.make_model,
    "minicpmv4_6": tiny_minicpm4.make_model,
}


def make(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder, kept in `dtype`."""
    made = MAKERS[name](folder)
    if dtype == torch.float32:
        return made
    for file in made.glob("*.safetensors"):
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    said = str(dtype).removeprefix("torch.")
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        part |= {key: said for key in ("dtype", "torch_dtype") if key in part}
    (made / "config.json").write_text(json.dumps(config | {"dtype": said}), encoding="utf-8")
    return made
