"""One optimizer step: micro-batches forward and backward, one division by the global count, guard, clip, update."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lensmith.engine.optimizer import MasterAdamW
from lensmith.objective.by_source import BySource

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepResult:
    """Figures of one step. `applied` False: nothing moved, for the loss or gradient was not finite, or (`empty`)
    nothing in the step had a weight."""

    loss: float
    grad_norm: float
    grad_norm_parts: dict[str, float]
    applied: bool
    rates: dict[str, float]
    empty: bool = False
    by_source: tuple[tuple[float, float], ...] = ()
    """Of each source: sum of the losses (unweighted) and number of supervised positions."""
    row_seconds: tuple[float, ...] = ()
    """Seconds of each micro-batch, forward and backward."""

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
) -> StepResult:
    """`count` is the sum of weights over the supervised positions of the whole step, known before the forward pass:
    each micro-batch's loss sum is divided by it, so the gradient is that of the token-weighted mean however the
    samples are packed. `rows` is read one by one: a row may be completed just before its own forward pass.
    """
    optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    sources, ends = BySource(), [time.perf_counter()]
    for row in rows:
        terms = root(row)
        loss_sum, _ = terms["loss"]
        sources.add(terms)
        if loss_sum.requires_grad:  # a row without pictures has no gradient when only the vision path trains
            (loss_sum / count).backward()
            optimizer.collect()
        total += loss_sum.detach().double().cpu()
        ends.append(time.perf_counter())
    loss = float(total / count)
    norms = _norms(optimizer, part_of)
    norm = float(torch.stack(list(norms.values())).square().sum().sqrt()) if norms else 0.0
    parts = {k: float(v) for k, v in norms.items()}
    finite = _finite(loss) and _finite(norm)
    if finite:
        if clip_norm is not None and norm > clip_norm:
            clip_grads_with_norm_(optimizer.parameters(), clip_norm, torch.tensor(norm))
        optimizer.step(factor)
    rates = optimizer.rates()
    optimizer.zero_grad()
    seconds = tuple(b - a for a, b in pairwise(ends))
    return StepResult(loss, norm, parts, finite, rates, by_source=sources.sums(), row_seconds=seconds)


def _finite(value: float) -> bool:
    return value - value == 0.0


def _norms(optimizer: MasterAdamW, part_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """L2 norm of the gradient per part, float32, on the CPU."""
    by_part: dict[str, list[torch.Tensor]] = {}
    for name, grad in optimizer.gradients():
        by_part.setdefault(part_of(name), []).append(grad)
    return {part: get_total_norm(grads).float().cpu() for part, grads in by_part.items()}
