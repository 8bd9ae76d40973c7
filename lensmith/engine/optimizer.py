"""AdamW over named parameters: in float32, through float32 masters, or on half-precision parameters alone."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lensmith.engine.lean import LeanAdamW
from lensmith.engine.options import AdamW

Named = Sequence[tuple[str, nn.Parameter]]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Keep:
    """How the parameters of a part are kept while they train (lensmith/model/precision.py)."""

    update: Literal["plain", "masters", "compensated", "stochastic"] = "plain"
    parameters: torch.dtype = torch.float32
    """The type they will have once the optimizer is made; `masters` and what is kept beside them are made from the
    values as they are now."""
    gradients: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32

    @property
    def lean(self) -> bool:
        """Whether torch's AdamW cannot do it."""
        return self.update in ("compensated", "stochastic") or self.moments != torch.float32


@dataclass
class Group:
    """One optimizer group: equal part, rate and decay."""

    part: str
    lr: float
    weight_decay: float
    names: list[str]
    rate: float = 0.0
    """The rate of the last update."""


class MasterAdamW:
    """torch's AdamW on the parameters or on float32 copies of them, and `LeanAdamW` where nothing is copied.

    `keep` says for each part how; a part that it does not name is plain float32. Gradients are added up over
    micro-batches in `Keep.gradients`, so accumulation in float32 loses nothing to half precision.
    """

    def __init__(
        self, named: Named, parts: Sequence[str], options: AdamW, keep: Mapping[str, Keep] | None = None, seed: int = 0
    ):
        """`parts`: of each parameter the part whose rates it has; `keep`: parameter name -> how it is kept."""
        self.named = list(named)
        keep = keep or {}
        self.keep = {n: keep.get(n, Keep()) for n, _ in self.named}
        self.master: dict[str, torch.Tensor] = {
            n: p.detach().to(torch.float32, copy=True).requires_grad_(True) if self._has_master(n) else p
            for n, p in self.named
        }
        self.groups = _groups(self.named, parts, options)
        self.lean = LeanAdamW(options, seed)
        plain: list[tuple[Group, list[torch.Tensor]]] = []
        for g in self.groups:
            for n in g.names:
                if self.keep[n].lean:
                    self.lean.add(n, self.master[n], self.keep[n].update, self.keep[n].parameters, self.keep[n].moments)
            plain.append((g, [self.master[n] for n in g.names if not self.keep[n].lean]))
        self.torch = torch.optim.AdamW(
            [{"params": tensors, "lr": g.lr, "weight_decay": g.weight_decay} for g, tensors in plain],
            lr=options.lr, betas=options.betas, eps=options.eps, fused=True,
        )  # fmt: skip

    def _has_master(self, name: str) -> bool:
        return self.keep[name].update == "masters"

    def settle(self) -> None:
        """Once parameters have the types they train in: their gradients are added up in `Keep.gradients`."""
        for name, p in self.named:
            p.grad_dtype = self.keep[name].gradients

    def gradients(self) -> list[tuple[str, torch.Tensor]]:
        """(name, gradient) of everything that has one; those of masters move to them, onto what is there."""
        for name, p in self.named:
            if self._has_master(name) and p.grad is not None:
                before = self.master[name].grad
                self.master[name].grad = p.grad.float() if before is None else before.add_(p.grad)
                p.grad = None
        return [(n, g) for n, _ in self.named if (g := self.master[n].grad) is not None]

    def parameters(self) -> list[torch.Tensor]:
        """What carries the gradients, after `gradients`."""
        return list(self.master.values())

    def step(self, factor: float) -> None:
        """One update at `factor` of each group's peak rate."""
        for group, own in zip(self.torch.param_groups, self.groups, strict=True):
            group["lr"] = own.rate = own.lr * factor
        self.torch.step()
        for own in self.groups:
            for name in own.names:
                if self.keep[name].lean:
                    self.lean.step(name, self.master[name], own.rate, own.weight_decay)
        with torch.no_grad():
            for name, p in self.named:
                if self._has_master(name):
                    p.copy_(self.master[name])

    def zero_grad(self) -> None:
        for name, p in self.named:
            p.grad = self.master[name].grad = None

    def rates(self) -> dict[str, float]:
        """Learning rate of the last update per part."""
        return {own.part: own.rate for own in self.groups}

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The training state by parameter name: `param/NAME` in float32 and its moments; by name, so that another
        engine, precision or rank count can take it up. One tensor at a time: the float32 value of a lean parameter is
        made for the moment that it is looked at."""
        for name, _ in self.named:
            tensor, lean = self.master[name], self.keep[name].lean
            yield f"param/{name}", self.lean.value(name, tensor) if lean else tensor.detach()
            state = self.lean.state[name].moments() if lean else self.torch.state.get(tensor, {})
            yield from ((f"{key}/{name}", value.detach()) for key, value in state.items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of `items` at once."""
        return dict(self.items())

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `tensors` gave, as far as it is there. Names and shapes were checked by the caller."""
        with torch.no_grad():
            for name, p in self.named:
                if f"param/{name}" not in tensors:
                    continue
                target = self.master[name]
                value = tensors[f"param/{name}"].to(target.device)
                state = {k: v.to(target.device) for k in MOMENTS if (v := tensors.get(f"{k}/{name}")) is not None}
                if self.keep[name].lean:
                    self.lean.load(name, target, value, state)
                else:
                    target.copy_(value)
                if self._has_master(name):
                    p.copy_(target)
                if state and not self.keep[name].lean:  # fused AdamW wants its step count on the parameter's device too
                    self.torch.state[target] = {k: v.to(torch.float32, copy=True) for k, v in state.items()}


def _groups(named: Named, parts: Sequence[str], options: AdamW) -> list[Group]:
    table: dict[tuple[str, float], Group] = {}
    for (name, p), part in zip(named, parts, strict=True):
        lr, decay = options.rate(part)
        decay = decay if p.ndim >= 2 else 0.0
        table.setdefault((part, decay), Group(part, lr, decay, [], lr)).names.append(name)
    return list(table.values())
