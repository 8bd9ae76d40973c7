"""One optimizer step: micro-batches forward and backward, one division by the global count, guard, clip, update."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from lensmith.engine.guard import Mine, agree
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.scale import LossScale
from lensmith.engine.spikes import Spike
from lensmith.objective.base import Terms
from lensmith.objective.by_source import BySource, Pairs, of_figures
from lensmith.parallel.ranks import Ranks


@dataclass(frozen=True)
class StepResult:
    """Figures of one step. `applied` False: nothing moved, for the loss or gradient was not finite, or (`empty`)
    nothing in the step had a weight, or (`overflow`) the gradient was too large for the loss scale."""

    loss: float
    grad_norm: float
    grad_norm_parts: dict[str, float]
    applied: bool
    rates: dict[str, float]
    empty: bool = False
    overflow: bool = False
    disagree: bool = False
    """The ranks had different gradient norms."""
    by_source: Mapping[str, Pairs] = field(default_factory=dict[str, Pairs])
    """Of each figure of the objective and each source: sum (unweighted) and count. `loss` is one of them."""
    row_seconds: tuple[float, ...] = ()
    """Seconds of each of this rank's micro-batches, forward and backward."""
    rank_seconds: tuple[float, ...] = ()
    """Seconds of each rank's micro-batches together."""
    votes: tuple[float, ...] = ()
    """The largest answer over ranks to each question that was asked."""
    spike: Spike | None = None
    clipped_to: float | None = None
    """The gradient norm that was applied, where it was scaled down."""
    watched: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Of some steps: `activation_max` and `update_ratio` of each part."""

    @property
    def row_seconds_spread(self) -> float:
        """Slowest micro-batch over the mean."""
        return _spread(self.row_seconds)

    @property
    def rank_seconds_spread(self) -> float:
        """Slowest rank over the mean."""
        return _spread(self.rank_seconds)


def _spread(seconds: Sequence[float]) -> float:
    return max(seconds) * len(seconds) / sum(seconds) if seconds and sum(seconds) else 1.0


def run_step(
    root: Callable[[Any], Terms],
    rows: Sequence[Any],
    counts: Mapping[str, float],
    optimizer: MasterAdamW,
    part_of: Callable[[str], str],
    *,
    factor: float,
    clip_norm: float | None,
    scale: LossScale | None = None,
    look: Callable[[float, float], Spike] | None = None,
    clip_spikes: bool = False,
    ranks: Ranks | None = None,
    votes: Callable[[], Sequence[float]] | None = None,
    num_sources: int = 0,
    figures: Sequence[str] = ("loss",),
    refresh: Callable[[Any], Any] | None = None,
) -> StepResult:
    """`counts` is what each term of the loss is divided by (for next-token prediction the sum of weights over the
    supervised positions), over the whole step and known before the forward pass: so the gradient is that of the
    weighted mean however the samples are packed. `rows` are those of this rank; `refresh` completes a row just before
    its own forward pass.

    `look` judges the finite (loss, gradient norm) before the update; with `clip_spikes` its limit clips too. `votes`:
    asked behind the backward passes; every rank gets the largest answers. `num_sources`: how many have `figures`
    at least; all ranks must say the same.
    """
    ranks = ranks or Ranks()
    optimizer.zero_grad()
    loss: torch.Tensor | None = None
    sources, ends = BySource(len(figures)), [time.perf_counter()]
    for number, row in enumerate(rows, 1):
        terms = root(row if refresh is None else refresh(row))
        mean = mean_of(terms, counts)
        sources.add(terms)
        backward(mean, optimizer, scale, last=number == len(rows))
        part = mean.detach().double()
        loss = part if loss is None else loss + part
        ends.append(time.perf_counter())
    if loss is None:  # fewer samples than ranks
        loss = torch.zeros((), dtype=torch.float64, device=optimizer.named[0][1].device)
    optimizer.reduce()
    whole, shares = gradient_norms(optimizer, part_of)
    found = agree(
        Mine(
            loss, whole, shares, votes() if votes is not None else (), sources.sums(num_sources), ends[-1] - ends[0],
            optimizer.copies if shares else 1, 1.0 if scale is None else scale.value,
        ),
        ranks,
    )  # fmt: skip
    flags, norm = found.flags, found.norm
    overflow = scale is not None and flags.norm_bad and not flags.loss_bad
    spike, clipped_to = None, None
    if flags.good:
        if scale is not None:
            optimizer.scale_gradients(1 / scale.value)
        limit = math.inf if clip_norm is None else clip_norm
        if look is not None:
            spike = look(found.loss, norm)
            limit = min(limit, spike.norm_limit) if clip_spikes else limit
        if norm > limit:
            optimizer.scale_gradients(limit / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            clipped_to = limit
        optimizer.step(factor)
    rates = optimizer.rates()
    optimizer.zero_grad()
    seconds = tuple(b - a for a, b in pairwise(ends))
    return StepResult(
        found.loss, norm, found.parts, flags.good, rates, overflow=overflow, disagree=flags.disagree,
        by_source=dict(zip(figures, of_figures(found.sources, len(figures)), strict=True)),
        row_seconds=seconds, rank_seconds=found.seconds, votes=found.votes, spike=spike,
        clipped_to=clipped_to,
    )  # fmt: skip


def mean_of(terms: Terms, counts: Mapping[str, float]) -> torch.Tensor:
    """A micro-batch's part of the loss: each term by what it counts in the whole step. A term of which nothing counts
    is left out."""
    parts = [terms[name][0] / count for name, count in counts.items() if count and name in terms]
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def backward(mean: torch.Tensor, optimizer: MasterAdamW, scale: LossScale | None, *, last: bool = False) -> None:
    """Add the gradient of a micro-batch."""
    optimizer.backward(mean if scale is None else mean * scale.value, last=last)


def gradient_norms(
    optimizer: MasterAdamW, part_of: Callable[[str], str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """L2 norm of the gradient per part, float32, where the gradients are: of whole gradients, and of this rank's shares
    of those that are spread over ranks. Every part is there on every rank."""
    kinds: tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]] = {}, {}
    for name, _ in optimizer.named:
        kinds[optimizer.is_sharded(name)].setdefault(part_of(name), [])
    for name, grad in optimizer.gradients():
        kinds[optimizer.is_sharded(name)][part_of(name)].append(grad)
    device = optimizer.named[0][1].device
    whole, shares = ({part: _norm(grads, device) for part, grads in kind.items()} for kind in kinds)
    return whole, shares


def _norm(grads: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not grads:
        return torch.zeros((), device=device)
    if all(g.dtype == torch.float32 for g in grads):
        return get_total_norm(grads).to(device)
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).square().sum().sqrt()
    return norm.to(device)
