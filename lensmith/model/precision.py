"""Presets of precision: in which type parameters are loaded, trained, computed and saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lensmith.core.errors import ConfigError
from lensmith.model.options import Precision


@dataclass(frozen=True)
class PrecisionPlan:
    """Types by role. `compute` None: the parameters' own type, without autocast."""

    preset: str
    frozen: torch.dtype
    trainable: torch.dtype
    compute: torch.dtype | None
    masters: bool
    saved: torch.dtype


def plan(options: Precision, device: torch.device, base: torch.dtype) -> PrecisionPlan:
    """The plan of a preset. Full weights are saved in the type the base has on disk."""
    preset = options.preset
    if preset == "auto":
        preset = "bf16" if device.type == "cuda" else "fp32"
    if preset != "fp32" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("PRECISION", f"precision.preset {preset!r}: this GPU has no bfloat16", remedy="use fp32")
    half, full = torch.bfloat16, torch.float32
    if preset == "fp32":
        return PrecisionPlan(preset, full, full, None, False, base)
    if preset == "bf16":
        return PrecisionPlan(preset, half, full, half, False, base)
    return PrecisionPlan(preset, half, half, half, True, base)
