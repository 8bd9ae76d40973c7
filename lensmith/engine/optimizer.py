"""AdamW over named parameters, with float32 masters where parameters are kept in half precision."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lensmith.engine.options import AdamW

Named = Sequence[tuple[str, nn.Parameter]]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Group:
    """One optimizer group: equal part, rate and decay."""

    part: str
    lr: float
    weight_decay: float
    names: list[str]


class MasterAdamW:
    """torch's AdamW on the parameters, or on float32 copies of them.

    With masters, gradients of every micro-batch are added into float32 (`collect`), so accumulation loses nothing to
    half precision; after a step the copies are rounded into the parameters.
    """

    def __init__(self, named: Named, parts: Sequence[str], options: AdamW, *, masters: bool):
        self.named = list(named)
        self.masters = masters
        self.master: dict[str, torch.Tensor] = {
            n: p.detach().to(torch.float32, copy=True).requires_grad_(True) if masters else p for n, p in self.named
        }
        self.groups: list[Group] = []
        table: dict[tuple[str, float], Group] = {}
        for (name, p), part in zip(self.named, parts, strict=True):
            lr, decay = options.rate(part)
            decay = decay if p.ndim >= 2 else 0.0
            if (part, decay) not in table:
                table[(part, decay)] = Group(part, lr, decay, [])
                self.groups.append(table[(part, decay)])
            table[(part, decay)].names.append(name)
        groups = [(g, [self.master[n] for n in g.names]) for g in self.groups]
        self.torch = torch.optim.AdamW(
            [{"params": tensors, "lr": g.lr, "weight_decay": g.weight_decay} for g, tensors in groups],
            lr=options.lr, betas=options.betas, eps=options.eps, fused=True,
        )  # fmt: skip

    def collect(self) -> None:
        """After each backward pass. Moves half-precision gradients into the float32 masters."""
        if not self.masters:
            return
        for name, p in self.named:
            if p.grad is not None:
                grad = self.master[name].grad
                if grad is None:
                    self.master[name].grad = p.grad.float()
                else:
                    grad += p.grad
                p.grad = None

    def gradients(self) -> list[tuple[str, torch.Tensor]]:
        """(name, gradient) of everything that has one."""
        return [(n, g) for n, _ in self.named if (g := self.master[n].grad) is not None]

    def parameters(self) -> list[torch.Tensor]:
        return list(self.master.values())

    def step(self, factor: float) -> None:
        """One update at `factor` of each group's peak rate."""
        for group, own in zip(self.torch.param_groups, self.groups, strict=True):
            group["lr"] = own.lr * factor
        self.torch.step()
        if self.masters:
            with torch.no_grad():
                for name, p in self.named:
                    p.copy_(self.master[name])

    def zero_grad(self) -> None:
        self.torch.zero_grad(set_to_none=True)
        for _, p in self.named:
            p.grad = None

    def rates(self) -> dict[str, float]:
        """Current learning rate per part."""
        return {own.part: float(g["lr"]) for g, own in zip(self.torch.param_groups, self.groups, strict=True)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The training state by parameter name: `param/NAME` in float32 and its moments; by name, so that another
        engine or rank count can take it up."""
        out: dict[str, torch.Tensor] = {}
        for name, _ in self.named:
            tensor = self.master[name]
            out[f"param/{name}"] = tensor.detach()
            for key, value in self.torch.state.get(tensor, {}).items():
                out[f"{key}/{name}"] = value.detach()
        return out

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `tensors` gave, as far as it is there. Names and shapes were checked by the caller."""
        with torch.no_grad():
            for name, p in self.named:
                if f"param/{name}" not in tensors:
                    continue
                target = self.master[name]
                target.copy_(tensors[f"param/{name}"])
                if self.masters:
                    p.copy_(target)
                state: dict[str, torch.Tensor] = {}
                for key in MOMENTS:  # fused AdamW wants its step count on the parameter's device too
                    if (value := tensors.get(f"{key}/{name}")) is not None:
                        state[key] = value.to(target.device, copy=True)
                if state:
                    self.torch.state[target] = state
