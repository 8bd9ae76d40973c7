"""The optimizers that compute updates, each with the names and shapes of what it keeps for a parameter.

State is kept by name in checkpoints; here it is by the tensor that is updated (the parameter or its master copy).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of torch leave parts of these types open; bitsandbytes has none)

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lensmith.engine.options import Adafactor, AdamW, AdamW8bit, Muon

Shape = tuple[int, ...]


@dataclass
class Group:
    """One optimizer group: equal part, rate and decay."""

    part: str
    lr: float
    weight_decay: float
    names: list[str]
    rate: float = 0.0
    """The rate of the last update."""


Grouped = Sequence[tuple[Group, list[torch.Tensor]]]
"""Groups, each with those of its tensors that an optimizer updates."""


class Inner:
    """One of torch's optimizers over groups. `moments`: name in a checkpoint -> key of its state."""

    moments: Mapping[str, str] = {"step": "step", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

    def __init__(self, grouped: Grouped, optimizer: Any):
        self.own = [group for group, _ in grouped]
        self.torch: torch.optim.Optimizer = optimizer

    def step(self) -> None:
        """One update at each group's `rate`."""
        for group, own in zip(self.torch.param_groups, self.own, strict=True):
            group["lr"] = own.rate
        self.torch.step()

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Moment -> its shape, for a parameter of this shape."""
        return {name: () if name == "step" else shape for name in self.moments}

    def state(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The moments of a tensor by their names in a checkpoint; {} before its first update."""
        found: dict[str, Any] = self.torch.state.get(tensor, {})
        return {name: found[key] for name, key in self.moments.items() if key in found}

    def load(self, tensor: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        """Take up moments, which are on the tensor's device."""
        self.torch.state[tensor] = {self.moments[k]: v.to(torch.float32, copy=True) for k, v in state.items()}


def groups_for_torch(grouped: Grouped) -> list[dict[str, Any]]:
    return [{"params": tensors, "lr": g.lr, "weight_decay": g.weight_decay} for g, tensors in grouped]


def adamw(grouped: Grouped, options: AdamW | Muon) -> Inner:
    made = torch.optim.AdamW(groups_for_torch(grouped), lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
    return Inner(grouped, made)


class MuonInner(Inner):
    moments = {"momentum": "momentum_buffer"}  # noqa: RUF012

    def __init__(self, grouped: Grouped, options: Muon):
        made = torch.optim.Muon(
            groups_for_torch(grouped), lr=options.lr, momentum=options.momentum, nesterov=options.nesterov,
            ns_steps=options.steps, adjust_lr_fn=options.scale,
        )  # fmt: skip
        super().__init__(grouped, made)


class AdafactorInner(Inner):
    moments = {"step": "step", "row_sq": "row_var", "column_sq": "col_var", "exp_avg_sq": "variance"}  # noqa: RUF012

    def __init__(self, grouped: Grouped, options: Adafactor):
        made = torch.optim.Adafactor(
            groups_for_torch(grouped), lr=options.lr, beta2_decay=options.beta2_decay, d=options.clip
        )
        super().__init__(grouped, made)

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        if len(shape) < 2:
            return {"step": (), "exp_avg_sq": shape}
        return {"step": (), "row_sq": (*shape[:-1], 1), "column_sq": (*shape[:-2], 1, shape[-1])}


SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
"""bitsandbytes: parameters of fewer values keep float32 moments; others have a scale for so many values."""


class AdamW8bitInner(Inner):
    moments = {  # noqa: RUF012
        "step": "step", "exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1",
        "exp_avg_sq_scale": "absmax2",
    }  # fmt: skip

    def __init__(self, grouped: Grouped, options: AdamW8bit):
        made = importlib.import_module("bitsandbytes.optim").AdamW8bit(
            groups_for_torch(grouped), lr=options.lr, betas=options.betas, eps=options.eps,
            min_8bit_size=SMALLEST_8BIT,
        )  # fmt: skip
        super().__init__(grouped, made)

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        size = torch.Size(shape).numel()
        found: dict[str, Shape] = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        blocks = (-(-size // BLOCK_8BIT),)
        return found if size < SMALLEST_8BIT else {**found, "exp_avg_scale": blocks, "exp_avg_sq_scale": blocks}

    def state(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().state(tensor)
        return found and {**found, "step": torch.tensor(float(found["step"]))}

    def load(self, tensor: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        made: Any = self.torch
        found = {key: value.clone() for key, value in state.items() if key != "step"}
        made.state[tensor] = {self.moments[k]: v for k, v in found.items()} | {"step": int(state["step"])}
        if "exp_avg_scale" in state:
            maps = {"qmap1": made.name2qmap["dynamic"], "qmap2": made.name2qmap["udynamic"]}
            made.state[tensor] |= {k: v.to(tensor.device) for k, v in maps.items()}


def is_matrix_inside(name: str, part: str, shape: Shape) -> bool:
    """What Muon updates: matrices that are no tables of vectors."""
    tables = part in ("embeddings", "head") or "embed" in name or "trainable_tokens" in name
    return len(shape) == 2 and not tables
