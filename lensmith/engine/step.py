"""One optimizer step: micro-batches forward and backward, one division by the global count, guard, clip, update."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lensmith.engine.guard import Flags, agreed, read_flags
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.scale import LossScale
from lensmith.engine.spikes import Spike
from lensmith.objective.by_source import BySource

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]


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
    by_source: tuple[tuple[float, float], ...] = ()
    """Of each source: sum of the losses (unweighted) and number of supervised positions."""
    row_seconds: tuple[float, ...] = ()
    """Seconds of each micro-batch, forward and backward."""
    spike: Spike | None = None
    clipped_to: float | None = None
    """The gradient norm that was applied, where it was scaled down."""
    watched: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Of some steps: `activation_max` and `update_ratio` of each part."""

    @property
    def row_seconds_spread(self) -> float:
        """Slowest micro-batch over the mean."""
        return max(self.row_seconds) * len(self.row_seconds) / sum(self.row_seconds) if self.row_seconds else 1.0


def run_step(
    root: Callable[[Any], Terms],
    rows: Iterable[Any],
    count: float,
    optimizer: MasterAdamW,
    part_of: Callable[[str], str],
    *,
    factor: float,
    clip_norm: float | None,
    scale: LossScale | None = None,
    look: Callable[[float, float], Spike] | None = None,
    clip_spikes: bool = False,
) -> StepResult:
    """`count` is the sum of weights over the supervised positions of the whole step, known before the forward pass:
    each micro-batch's loss sum is divided by it, so the gradient is that of the token-weighted mean however the
    samples are packed. `rows` is read one by one: a row may be completed just before its own forward pass.

    `look` judges the finite (loss, gradient norm) before the update; with `clip_spikes` its limit clips too.
    """
    optimizer.zero_grad()
    total: torch.Tensor | None = None
    sources, ends = BySource(), [time.perf_counter()]
    for row in rows:
        terms = root(row)
        loss_sum, _ = terms["loss"]
        sources.add(terms)
        backward(loss_sum, count, scale)
        part = loss_sum.detach().double()
        total = part if total is None else total + part
        ends.append(time.perf_counter())
    assert total is not None
    loss, parts, norm, flags = _read(total / count, gradient_norms(optimizer, part_of), scale)
    overflow = scale is not None and flags.norm_bad and not flags.loss_bad
    spike, clipped_to = None, None
    if flags.good:
        if scale is not None:
            for _, gradient in optimizer.gradients():
                gradient.mul_(1 / scale.value)
        limit = math.inf if clip_norm is None else clip_norm
        if look is not None:
            spike = look(loss, norm)
            limit = min(limit, spike.norm_limit) if clip_spikes else limit
        if norm > limit:
            clip_grads_with_norm_(optimizer.parameters(), limit, torch.tensor(norm))
            clipped_to = limit
        optimizer.step(factor)
    rates = optimizer.rates()
    optimizer.zero_grad()
    seconds = tuple(b - a for a, b in pairwise(ends))
    return StepResult(
        loss, norm, parts, flags.good, rates, overflow=overflow, disagree=flags.disagree, by_source=sources.sums(),
        row_seconds=seconds, spike=spike, clipped_to=clipped_to,
    )  # fmt: skip


def backward(loss_sum: torch.Tensor, count: float, scale: LossScale | None) -> None:
    """Add the gradient of a micro-batch."""
    if loss_sum.requires_grad:  # a row without pictures has no gradient when only the vision path trains
        mean = loss_sum / count
        (mean if scale is None else mean * scale.value).backward()


def gradient_norms(optimizer: MasterAdamW, part_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """L2 norm of the gradient per part, float32, where the gradients are."""
    by_part: dict[str, list[torch.Tensor]] = {}
    for name, grad in optimizer.gradients():
        by_part.setdefault(part_of(name), []).append(grad)
    return {part: _norm(grads) for part, grads in by_part.items()}


def _norm(grads: list[torch.Tensor]) -> torch.Tensor:
    if all(g.dtype == torch.float32 for g in grads):
        return get_total_norm(grads)
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).square().sum().sqrt()


def _read(
    loss: torch.Tensor, norms: dict[str, torch.Tensor], scale: LossScale | None
) -> tuple[float, dict[str, float], float, Flags]:
    """(loss, norm per part, norm, flags) with one transfer from the device; the norms are those without the scale."""
    by_part = torch.stack(list(norms.values())) if norms else torch.zeros(1, device=loss.device)
    if scale is not None:
        by_part = by_part / scale.value
    norm = by_part.square().sum().sqrt()
    flags = agreed(loss, norm)
    everything = torch.cat([loss[None], norm[None].double(), flags.double(), by_part.double()])
    values = cast("list[float]", everything.tolist())
    return values[0], dict(zip(norms, values[6:], strict=False)), values[1], read_flags(values[2:6])
