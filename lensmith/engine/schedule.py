"""Learning-rate factors by applied update. A vetoed step moves no schedule."""

from __future__ import annotations

import math

from lensmith.engine.options import WSD, Constant, Cosine, Linear


def factor(schedule: Constant | Linear | Cosine | WSD, applied: int, total: int) -> float:
    """Share of the peak rate for update number `applied` (from 0) of `total`.

    Warm-up: (applied + 1) / warm, so the first update is not lost to a rate of zero. The last update has `final` only
    in the limit; half-open as in transformers' schedules.
    """
    warm = schedule.warmup_steps if schedule.warmup_steps is not None else math.ceil(schedule.warmup * total)
    if applied < warm:
        return (applied + 1) / warm
    if isinstance(schedule, Constant):
        return 1.0
    if isinstance(schedule, WSD):
        decay = max(1, math.ceil(schedule.decay * total))
        done = (applied - (total - decay)) / decay
        return 1.0 if done <= 0 else schedule.final + (1 - schedule.final) * (1 - min(done, 1.0))
    done = min(1.0, (applied - warm) / max(1, total - warm))
    left = 1 - done if isinstance(schedule, Linear) else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.final + (1 - schedule.final) * left
