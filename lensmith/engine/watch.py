"""Figures that show trouble before it comes: the largest activation of each part, and how far an update moves it."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from lensmith.engine.hooks import extremes, modules
from lensmith.engine.optimizer import MasterAdamW

SAMPLED = 4096
"""Elements of each tensor that are looked at for the size of an update: a copy of all would be another model."""


class Watch:
    """Made before a step and asked behind it. Modules without children are hooked meanwhile; nothing is read from the
    device before `figures`."""

    def __init__(
        self, model: nn.Module, optimizer: MasterAdamW, part_of: Callable[[str], str], *, activations: bool = True
    ):
        """`activations` False: compiled blocks do not call hooks, and the rest alone would look like a fall."""
        self._optimizer, self._part_of = optimizer, part_of
        self._largest: dict[str, list[torch.Tensor]] = {}
        leaves = [(n, m) for n, m in modules(model) if activations and not list(m.children())]
        self._handles: list[Any] = [m.register_forward_hook(self._hook(part_of(f"{n}.weight"))) for n, m in leaves]
        self._before = self._parameters()

    def _hook(self, part: str) -> Any:
        found = self._largest.setdefault(part, [])

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                found.append(extremes(output))

        return hook

    def _parameters(self) -> dict[str, tuple[torch.Tensor, float]]:
        """(some elements, how many each of them stands for) of every parameter that trains."""
        found: dict[str, tuple[torch.Tensor, float]] = {}
        for key, tensor in self._optimizer.items():
            kind, _, name = key.partition("/")
            if kind != "param":
                continue
            flat = tensor.flatten()
            some = flat[:: max(1, flat.numel() // SAMPLED)].to(torch.float32, copy=True)
            found[name] = some, flat.numel() / max(1, some.numel())
        return found

    def figures(self) -> dict[str, dict[str, float]]:
        """`activation_max`: part -> largest magnitude; `update_ratio`: part -> norm of the update over that of the
        weights, estimated from a sample of their elements."""
        for handle in self._handles:
            handle.remove()
        largest = {part: torch.stack(values).abs().max() for part, values in self._largest.items() if values}
        moved: dict[str, list[torch.Tensor]] = {}
        for name, (after, each) in self._parameters().items():
            before, _ = self._before[name]
            sums = torch.stack([(after - before).square().sum(), before.square().sum()]) * each
            moved.setdefault(self._part_of(name), []).append(sums)
        totals = {part: torch.stack(sums).sum(0) for part, sums in moved.items()}
        mine = [
            dict(zip(largest, _read(list(largest.values())), strict=True)),
            dict(zip(totals, _read(list(totals.values())), strict=True)),
        ]
        each = self._optimizer.ranks.gather_json(mine, "look at activations and updates")
        parts = sorted({part for found, _ in each for part in found})
        names = sorted({part for _, found in each for part in found})
        sums = {part: [sum(found.get(part, (0.0, 0.0))[i] for _, found in each) for i in (0, 1)] for part in names}
        return {
            "activation_max": {part: max(found.get(part, 0.0) for found, _ in each) for part in parts},
            "update_ratio": {part: math.sqrt(a / b) if b else math.nan for part, (a, b) in sums.items()},
        }


def _read(values: list[torch.Tensor]) -> list[Any]:
    return cast("list[Any]", torch.stack(values).tolist()) if values else []
