"""Which part of a model a parameter or module belongs to, as far as names say."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def is_adapter(name: str) -> bool:
    """LoRA's matrices and magnitudes, and the rows that PEFT trains for added tokens."""
    return ".lora_" in name or "trainable_tokens" in name


def outermost(model: nn.Module, part_of: Callable[[str], str]) -> list[tuple[str, str]]:
    """(name, part) of the largest modules whose parameters are all of one part. Lists of modules are never called, so
    their members stand for them."""
    found: list[tuple[str, str]] = []

    def walk(module: nn.Module, prefix: str) -> None:
        parts = {part_of(prefix + name) for name, _ in module.named_parameters(remove_duplicate=False)}
        if len(parts) == 1 and not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and prefix:
            found.append((prefix.removesuffix("."), parts.pop()))
            return
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found
