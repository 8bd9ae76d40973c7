"""Frozen weights in 4 bits through bitsandbytes (QLoRA, arXiv 2305.14314), checked as they are made."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from lensmith.core.errors import ConfigError, ModelError
from lensmith.model.options import Quantize

BLOCK = 64
"""Weights that share a scale."""
WIDEST_GAP = {"nf4": 0.304, "fp4": 0.334}
"""Between two neighbouring values of the largest of a block: of NF4 from -1 to -0.6962, of FP4 from 2/3 to 1."""
SCALE_ERROR = 0.02
"""Scales in 8 bits are off by up to this share of the largest weight."""


def bytes_of_value(options: Quantize) -> float:
    """Of a quantised weight, with its share of the scales: float32, or 8 bits and a float32 one for 256 of them."""
    return options.bits / 8 + (1 + 4 / 256 if options.double else 4) / BLOCK


def check_installed(key: str, extra: str) -> None:
    """Raises `ConfigError` PACKAGE where there is no bitsandbytes. `key`: what needs it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("PACKAGE", f"{key} needs bitsandbytes, which is not installed",
                          remedy=f"pip install 'lensmith[{extra}]'")  # fmt: skip


class Parts(Protocol):
    def part_of(self, name: str) -> Any: ...


@dataclass
class Residuals:
    """Of each layer, the largest directions of what quantisation took away: U [O, r], S [r], V [r, I], float32."""

    parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def keep(self, name: str, residual: torch.Tensor, rank: int) -> None:
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        self.parts[name] = u[:, :rank].cpu(), s[:rank].cpu(), v[:rank].cpu()

    def factors(self, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, I], B [O, r]): B A is the best approximation of this rank."""
        u, s, v = self.parts[name]
        root = s[:rank].sqrt()
        return root[:, None] * v[:rank], u[:, :rank] * root


def quantised_layers(model: Any, family: Parts, options: Quantize) -> list[str]:
    """Every linear layer of `options.parts`. Raises `ConfigError` where there is none."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = [n for n in names if family.part_of(f"{n}.weight") in options.parts]
    if not found:
        raise ConfigError("QUANTIZE", f"tune.quantize.parts {list(options.parts)}: no linear layers there")
    return found


def quantise(
    model: Any, names: Iterable[str], options: Quantize, compute: torch.dtype, device: torch.device, rank: int = 0
) -> Residuals:
    """Replace these linear layers by bitsandbytes' in place; the weights move to `device` one by one.

    `rank`: keep so many directions of what is lost. Raises `ModelError` QUANTIZE where weights do not come back as
    they should: bitsandbytes 0.50 reads rows that are no whole number of blocks wrongly on a CPU.
    """
    layers: Any = importlib.import_module("bitsandbytes.nn")

    residuals = Residuals()
    for name in names:
        old = model.get_submodule(name)
        weight = old.weight.detach()
        new = layers.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=compute,
            compress_statistics=options.double, quant_type=options.type, device="meta",
        )  # fmt: skip
        new.weight = layers.Params4bit(
            weight.to(device, copy=True), requires_grad=False, compress_statistics=options.double,
            quant_type=options.type, blocksize=BLOCK,
        ).to(device)  # fmt: skip
        new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # it would pack the weights anew in every evaluation
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        back = dequantised(new).float()
        _check(name, back, weight.to(device).float(), options)
        if rank:
            residuals.keep(name, weight.to(device).float() - back, rank)
    model.is_loaded_in_4bit = True  # by this PEFT knows
    return residuals


def dequantised(layer: Any) -> torch.Tensor:
    """The weight [O, I] that a quantised layer computes with."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def restore(model: nn.Module) -> None:
    """Quantised layers become plain ones again, with the weights that they compute with."""
    found: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if is_quantised(m)]
    for name, layer in found:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(dequantised(layer), requires_grad=False), layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)


def is_quantised(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and getattr(layer.weight, "quant_state", None) is not None


def _check(name: str, back: torch.Tensor, weight: torch.Tensor, options: Quantize) -> None:
    """Every weight comes back within half a gap of the scale of its block."""
    rows = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    most = rows.abs().amax(1, keepdim=True)
    limit = most * WIDEST_GAP[options.type] / 2 + SCALE_ERROR * weight.abs().max() + 1e-3 * most
    off = torch.nn.functional.pad((back - weight).flatten().abs(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    if not bool((off <= limit).all()):
        raise ModelError("QUANTIZE", f"bitsandbytes does not give the weights of {name} ({weight.shape[0]} x "
                         f"{weight.shape[1]}) back: off by up to {float(off.max()):.3g}",
                         remedy=f"on a CPU the input features must be a multiple of {BLOCK}; use a GPU, or take "
                         "tune.quantize out")  # fmt: skip
