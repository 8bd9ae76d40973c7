"""Finite spikes: a loss and a gradient norm far above those of the last steps. Found before the optimizer moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lensmith.engine.options import Guard

LEAST = 16
"""Steps before anything is called a spike."""
FLOOR = 0.01
"""Smallest standard deviation, as a share of the mean: a loss that hardly moves would make spikes of its noise."""


@dataclass
class SpikeWindow:
    """Losses and gradient norms of the last steps that were finite. A part of the training state, as clipping by it
    changes the weights. A value above the limit enters as the limit: one spike does not hide the next, and another
    level is learnt in time."""

    losses: list[float] = field(default_factory=list[float])
    norms: list[float] = field(default_factory=list[float])


@dataclass(frozen=True)
class Spike:
    """z: distance from the mean of the window in its standard deviations."""

    loss_z: float
    norm_z: float
    is_spike: bool
    norm_limit: float
    """The gradient norm at `guard.spike_z`; infinity while too little is known."""


def look(rule: Guard, window: SpikeWindow, loss: float, norm: float) -> Spike:
    """Judge a finite step by the window, and take it into the window."""
    loss_z, loss_limit = _judged(window.losses, loss, rule.spike_z)
    norm_z, norm_limit = _judged(window.norms, norm, rule.spike_z)
    for values, value, limit in ((window.losses, loss, loss_limit), (window.norms, norm, norm_limit)):
        values.append(min(value, limit))
        del values[: -rule.spike_window]
    return Spike(loss_z, norm_z, loss_z > rule.spike_z and norm_z > rule.spike_z, norm_limit)


def _judged(values: Sequence[float], value: float, z: float) -> tuple[float, float]:
    """(z of `value`, the value at z)."""
    if len(values) < LEAST:
        return 0.0, math.inf
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    deviation = max(deviation, FLOOR * abs(mean), 1e-12)
    return (value - mean) / deviation, mean + z * deviation
