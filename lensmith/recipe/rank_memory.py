"""Peak memory of one of several ranks: what a single rank was predicted to need, with what an engine spreads over ranks
taken apart and what it holds for a moment put on top (docs/scaling.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lensmith.parallel.cost import Layout, Tensor
from lensmith.recipe.memory import Phase, Prediction

EXCHANGING_BYTES = 150 << 20
"""Beside tensors, of a process on a CPU that exchanges with others: what two ranks took more than was predicted,
on average over four (docs/scaling.md)."""
GATHERED_UNITS = 2
"""Units that are whole at once: the one that computes and the one that is fetched ahead."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes by kind at the moment that needs most; `exchange`: what collectives work in."""

    phase: str
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


LOADING = "Loading"


def loading_of(found: Prediction) -> int:
    """Bytes while the model is loaded, which every rank does as a whole before an engine spreads it."""
    return max((sum(phase.kinds.values()) for phase in found.phases if phase.name == LOADING), default=0)


def peak_of(found: Prediction, layout: Layout, tensors: Sequence[Tensor], *, host: bool) -> RankMemory:
    """Of what comes behind loading. `host`: the device is a CPU, so that its allocator and the vision cache count."""
    phases = [_of_phase(phase, layout, tensors, host=host) for phase in found.phases if phase.name != LOADING]
    if layout.ranks > 1 and layout.engine == "local":
        phases.append(_reducing(found, tensors, host=host))
    return max(phases, key=lambda phase: phase.total)


def _of_phase(phase: Phase, layout: Layout, tensors: Sequence[Tensor], *, host: bool) -> RankMemory:
    kinds: Counter[str] = Counter({str(kind): size for kind, size in phase.kinds.items()})
    if host:
        kinds |= {"vision cache": phase.features, "allocator": phase.allocator}
    if layout.ranks > 1:
        _spread(kinds, phase.name, layout, tensors)
        kinds["allocator"] += EXCHANGING_BYTES if host else 0
    return RankMemory(phase.name, {kind: size for kind, size in kinds.items() if size > 0})


def _spread(kinds: Counter[str], phase: str, layout: Layout, tensors: Sequence[Tensor]) -> None:
    """Take away what the other ranks hold."""
    trained = [t for t in tensors if t.trained]
    if layout.spreads_parameters:
        spread = [t for t in tensors if t.unit is not None]
        weights, here = sum(t.count * t.kept for t in spread), sum(t.share(layout.shard) * t.kept for t in spread)
        kinds["weights"] -= weights - here
        trained = [t for t in trained if t.unit is not None]
        if phase == "Forward, backward":
            units = _units(spread)
            kinds["casts"] = round(kinds["casts"] * (1 - _share(spread, tensors)))
            kinds["exchange"] += sum(sorted(units.values(), reverse=True)[:GATHERED_UNITS])
            kinds["exchange"] += max(_gradients_of_units(spread).values(), default=0)
    rest = 1 - _share(trained, [t for t in tensors if t.trained]) * (1 - 1 / layout.shard)
    if layout.spreads_state:
        for kind in ("optimizer", "masters", "copies"):
            kinds[kind] = round(kinds[kind] * rest)
    if layout.spreads_gradients:
        kinds["gradients"] = round(kinds["gradients"] * rest)


def _share(some: Sequence[Tensor], every: Sequence[Tensor]) -> float:
    return sum(t.count for t in some) / max(1, sum(t.count for t in every))


def _units(spread: Sequence[Tensor]) -> Counter[str]:
    """Bytes of each unit while it is whole."""
    found: Counter[str] = Counter()
    for t in spread:
        found[t.unit or ""] += t.count * t.travels
    return found


def _gradients_of_units(spread: Sequence[Tensor]) -> Counter[str]:
    found: Counter[str] = Counter()
    for t in spread:
        found[t.unit or ""] += t.count * t.gradient * t.trained
    return found


def _reducing(found: Prediction, tensors: Sequence[Tensor], *, host: bool) -> RankMemory:
    """Behind the backward passes: all gradients stand in buckets too."""
    before = next(phase for phase in found.phases if phase.name == "Forward, backward")
    kinds = {str(kind): size for kind, size in before.kinds.items() if kind in ("weights", "masters", "optimizer")}
    gradients = sum(t.count * t.gradient for t in tensors if t.trained)
    kinds |= {"gradients": gradients, "exchange": gradients}
    if host:
        kinds |= {"vision cache": before.features, "allocator": before.allocator + EXCHANGING_BYTES}
    return RankMemory("Sum of gradients", {kind: size for kind, size in kinds.items() if size})
