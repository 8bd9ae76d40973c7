"""AdamW over named parameters: in float32, through float32 masters, or on half-precision parameters alone."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lensmith.engine.lean import LeanAdamW
from lensmith.engine.options import AdamW
from lensmith.parallel.fsdp import last_of_step
from lensmith.parallel.ranks import Ranks
from lensmith.parallel.reduce import Reducer
from lensmith.parallel.shares import Piece, copies, is_sharded, local, start, writers

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

    With several ranks it updates what this rank holds: whole parameters, whose gradients are summed over ranks first,
    or the shares that FSDP2 gave it.
    """

    def __init__(
        self,
        named: Named,
        parts: Sequence[str],
        options: AdamW,
        keep: Mapping[str, Keep] | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        sharded_root: nn.Module | None = None,
    ):
        """`parts`: of each parameter the part whose rates it has; `keep`: parameter name -> how it is kept;
        `sharded_root`: what FSDP2 spread over the ranks."""
        self._sharded_root = sharded_root
        self.named = list(named)
        self.ranks = ranks or Ranks()
        keep = keep or {}
        self.keep = {n: keep.get(n, Keep()) for n, _ in self.named}
        self.sharded = {n for n, p in self.named if is_sharded(p)}
        self.master: dict[str, torch.Tensor] = {n: self._updated(n, p) for n, p in self.named}
        """What the updates are made on."""
        self._reducer: Reducer | None = None
        self.groups = groups_of(self.named, parts, options)
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

    def _updated(self, name: str, p: nn.Parameter) -> torch.Tensor:
        own = local(p) if name in self.sharded else p
        return own.detach().to(torch.float32, copy=True).requires_grad_(True) if self._has_master(name) else own

    def settle(self) -> None:
        """Once parameters have the types they train in: their gradients are added up in `Keep.gradients`."""
        whole = [(n, p) for n, p in self.named if n not in self.sharded]
        for name, p in whole:
            p.grad_dtype = self.keep[name].gradients
        if self.ranks.several and whole:
            self._reducer = Reducer([p for _, p in whole], [self.keep[n].gradients for n, _ in whole], self.ranks)

    def is_sharded(self, name: str) -> bool:
        """Whether this rank has only a share of the gradient: its squares are summed over ranks."""
        return name in self.sharded

    @property
    def copies(self) -> int:
        """How many ranks hold each of the shares (HSDP)."""
        return max((copies(p, self.ranks)[0] for n, p in self.named if n in self.sharded), default=1)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch. `last`: of the step, so it goes out to the other ranks."""
        if last and self._reducer is not None:
            self._reducer.arm()
        if self._sharded_root is not None:
            last_of_step(self._sharded_root, last)
        if loss.requires_grad:  # a row without pictures has no gradient when only the vision path trains
            loss.backward()
        if self._sharded_root is not None:  # shares of half-precision gradients are added up in that of their masters
            self.gradients()

    def reduce(self) -> None:
        """Behind the last backward pass: until the gradients are those of all ranks' rows."""
        if self._reducer is not None:
            self._reducer.finish()

    def gradients(self) -> list[tuple[str, torch.Tensor]]:
        """(name, gradient) of everything that has one; those of masters and of shares move to them, onto what is
        there."""
        for name, p in self.named:
            if p is not self.master[name] and p.grad is not None:
                before, grad = self.master[name].grad, local(p.grad)
                if self._has_master(name):
                    grad = grad.float()
                self.master[name].grad = grad if before is None else before.add_(grad)
                p.grad = None
        return [(n, g) for n, _ in self.named if (g := self.master[n].grad) is not None]

    def scale_gradients(self, factor: float) -> None:
        for _, gradient in self.gradients():
            gradient.mul_(factor)

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
                    local(p).copy_(self.master[name])

    def zero_grad(self) -> None:
        for name, p in self.named:
            p.grad = self.master[name].grad = None

    def rates(self) -> dict[str, float]:
        """Learning rate of the last update per part."""
        return {own.part: own.rate for own in self.groups}

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The training state by parameter name: `param/NAME` in float32 and its moments; by name, so that another
        engine, precision or rank count can take it up. One tensor at a time: the float32 value of a lean parameter is
        made for the moment that it is looked at. Of a sharded parameter, this rank's share."""
        for name, _ in self.named:
            tensor, lean = self.master[name], self.keep[name].lean
            yield f"param/{name}", self.lean.value(name, tensor) if lean else tensor.detach()
            state = self.lean.state[name].moments() if lean else self.torch.state.get(tensor, {})
            yield from ((f"{key}/{name}", value.detach()) for key, value in state.items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of `items` at once."""
        return dict(self.items())

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of the training state: over all ranks every element once."""
        shapes, starts = self.shapes(), {n: start(p) for n, p in self.named}
        mine = writers(self.named, self.ranks)
        for key, value in self.items():
            kind, _, name = key.partition("/")
            if kind == "step":
                if name in mine and starts[name] == 0:
                    yield Piece(key, value, 0, ())
            elif name in mine and value.numel():
                yield Piece(key, value, starts[name], shapes[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the whole parameter."""
        return {n: tuple(p.shape) for n, p in self.named}

    def load_pieces(self, read: Callable[[str, int, int], torch.Tensor | None]) -> None:
        """Take up a training state. `read(key, start, stop)`: those elements of a flattened tensor, or None where the
        state has none. Names and shapes were checked by the caller."""
        found: dict[str, torch.Tensor] = {}
        for name, p in self.named:
            shape, begin = self.master[name].shape, start(p)
            for key in ("param", *MOMENTS):
                size = 1 if key == "step" else shape.numel()
                at = 0 if key == "step" else begin
                if (value := read(f"{key}/{name}", at, at + size)) is not None:
                    found[f"{key}/{name}"] = value.reshape(() if key == "step" else shape)
            self.load_tensors(found)
            found.clear()

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
                    local(p).copy_(target)
                if state and not self.keep[name].lean:  # fused AdamW wants its step count on the parameter's device too
                    self.torch.state[target] = {k: v.to(torch.float32, copy=True) for k, v in state.items()}


def groups_of(named: Named, parts: Sequence[str], options: AdamW) -> list[Group]:
    """Parameters of equal part, rate and decay, in the order of their first; vectors never decay."""
    table: dict[tuple[str, float], Group] = {}
    for (name, p), part in zip(named, parts, strict=True):
        lr, decay = options.rate(part)
        decay = decay if p.ndim >= 2 else 0.0
        table.setdefault((part, decay), Group(part, lr, decay, [], lr)).names.append(name)
    return list(table.values())
