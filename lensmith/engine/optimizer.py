"""Optimizers over named parameters: in float32, through float32 masters, or on half-precision parameters alone."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lensmith.engine.inner import (
    AdafactorInner,
    AdamW8bitInner,
    Group,
    Grouped,
    Inner,
    MuonInner,
    Shape,
    adamw,
    is_matrix_inside,
)  # fmt: skip
from lensmith.engine.lean import LeanAdamW
from lensmith.engine.options import Adafactor, AdamW, AdamW8bit, Optimizer
from lensmith.parallel.fsdp import give_back, last_of_step
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


class MasterAdamW:
    """The run's optimizer (torch's AdamW unless another is named) on the parameters or on float32 copies of them, and
    `LeanAdamW` where nothing is copied.

    `keep` says for each part how; a part that it does not name is plain float32. Gradients are added up over
    micro-batches in `Keep.gradients`, so accumulation in float32 loses nothing to half precision.

    With several ranks it updates what this rank holds: whole parameters, whose gradients are summed over ranks first,
    or the shares that FSDP2 gave it.
    """

    def __init__(
        self,
        named: Named,
        parts: Sequence[str],
        options: Optimizer,
        keep: Mapping[str, Keep] | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        sharded_root: nn.Module | None = None,
    ):
        """`parts`: of each parameter the part whose rates it has; `keep`: parameter name -> how it is kept;
        `sharded_root`: what FSDP2 spread over the ranks."""
        self._sharded_root = sharded_root
        self.named = list(named)
        self._by_name = dict(self.named)
        self.ranks = ranks or Ranks()
        keep = keep or {}
        self.keep = {n: keep.get(n, Keep()) for n, _ in self.named}
        self.sharded = {n for n, p in self.named if is_sharded(p)}
        self.master: dict[str, torch.Tensor] = {n: self._updated(n, p) for n, p in self.named}
        """What the updates are made on."""
        self._reducer: Reducer | None = None
        self.groups = groups_of(self.named, parts, options)
        lean = options if isinstance(options, AdamW) else AdamW()  # others never are: lensmith.recipe.methods
        self.lean = LeanAdamW(lean, seed)
        plain: list[tuple[Group, list[str]]] = []
        for g in self.groups:
            for n in g.names:
                if self.keep[n].lean:
                    self.lean.add(n, self.master[n], self.keep[n].update, self.keep[n].parameters, self.keep[n].moments)
            plain.append((g, [n for n in g.names if not self.keep[n].lean]))
        part_of = {n: part for (n, _), part in zip(self.named, parts, strict=True)}
        self.inner: dict[str, Inner] = {}
        """What updates a plain parameter, by its name."""
        self._inners = self._made(options, plain, part_of)

    def _made(
        self, options: Optimizer, plain: Sequence[tuple[Group, list[str]]], part_of: Mapping[str, str]
    ) -> list[Inner]:
        def those(kept: Callable[[str], bool]) -> Grouped:
            return [(g, [self.master[n] for n in names if kept(n)]) for g, names in plain]

        def given(inner: Inner, kept: Callable[[str], bool] = lambda _: True) -> Inner:
            self.inner |= dict.fromkeys((n for _, names in plain for n in names if kept(n)), inner)
            return inner

        def inside(name: str) -> bool:
            return is_matrix_inside(name, part_of[name], tuple(self.master[name].shape))

        if isinstance(options, AdamW):
            return [given(adamw(those(lambda _: True), options))]
        if isinstance(options, AdamW8bit):
            return [given(AdamW8bitInner(those(lambda _: True), options))]
        if isinstance(options, Adafactor):
            return [given(AdafactorInner(those(lambda _: True), options))]
        rest = given(adamw(those(lambda n: not inside(n)), options), lambda n: not inside(n))
        return [rest, given(MuonInner(those(inside), options), inside)]

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
        for name in self.sharded:
            if not self._has_master(name):
                self.master[name].grad_dtype = self.keep[name].gradients
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
                grad = grad.to(torch.float32 if self._has_master(name) else self.keep[name].gradients)
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
        for own in self.groups:
            own.rate = own.lr * factor
        for inner in self._inners:
            inner.step()
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
            state = self.lean.state[name].moments() if lean else self.inner[name].state(tensor)
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
            if kind != "param" and self.moments(name)[kind] != shapes[name]:
                if name in mine and starts[name] == 0:
                    yield Piece(key, value, 0, tuple(value.shape))
            elif name in mine and value.numel():
                yield Piece(key, value, starts[name], shapes[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the whole parameter."""
        return {n: tuple(p.shape) for n, p in self.named}

    def moments(self, name: str) -> dict[str, Shape]:
        """Of a parameter's moments the name and the shape of the whole."""
        shape = tuple(self._by_name[name].shape)
        return {m: () if m == "step" else shape for m in MOMENTS} if self.keep[name].lean else (
            self.inner[name].shapes(shape)
        )  # fmt: skip

    def begin_without(self, has: Callable[[str], bool]) -> None:
        """Begin anew the moments that `has` does not know."""
        for name, _ in self.named:
            if has(f"{next(iter(self.moments(name)))}/{name}"):
                continue
            if self.keep[name].lean:
                for value in self.lean.state[name].moments().values():
                    value.zero_()
            else:
                self.inner[name].torch.state.pop(self.master[name], None)

    def give_back(self) -> None:
        """Parameters that an examination left gathered are shares again."""
        if self._sharded_root is not None:
            give_back(self._sharded_root)

    def load_pieces(self, read: Callable[[str, int, int], torch.Tensor | None]) -> None:
        """Take up a training state. `read(key, start, stop)`: those elements of a flattened tensor, or None where the
        state has none. Names and shapes were checked by the caller."""
        self.give_back()
        found: dict[str, torch.Tensor] = {}
        for name, p in self.named:
            shape, begin = self.master[name].shape, start(p)
            whole = tuple(p.shape)
            for key, own in {"param": whole, **self.moments(name)}.items():
                size, at = (shape.numel(), begin) if own == whole else (math.prod(own), 0)
                if (value := read(f"{key}/{name}", at, at + size)) is not None:
                    found[f"{key}/{name}"] = value.reshape(shape if own == whole else own)
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
                kinds = self.moments(name)
                state = {k: v.to(target.device) for k in kinds if (v := tensors.get(f"{k}/{name}")) is not None}
                if self.keep[name].lean:
                    self.lean.load(name, target, value, state)
                else:
                    target.copy_(value)
                if self._has_master(name):
                    local(p).copy_(target)
                if state and not self.keep[name].lean:  # fused AdamW wants its step count on the parameter's device too
                    self.inner[name].load(target, state)


def groups_of(named: Named, parts: Sequence[str], options: Optimizer) -> list[Group]:
    """Parameters of equal part, rate and decay, in the order of their first; vectors never decay. With LoRA+ the B
    matrices of a part are `PART_b`."""
    table: dict[tuple[str, float], Group] = {}
    for (name, p), part in zip(named, parts, strict=True):
        lr, decay = options.rate(part)
        decay = decay if p.ndim >= 2 else 0.0
        if options.lora_b_ratio is not None and ".lora_B." in name:
            part, lr = f"{part}_b", lr * options.lora_b_ratio
        table.setdefault((part, decay), Group(part, lr, decay, [], lr)).names.append(name)
    return list(table.values())
