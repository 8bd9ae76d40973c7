"""What the ranks of a run agree on before a step: who dropped what, so that all divide by the same count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from lensmith.core.encoded import PackedRow
from lensmith.data.index import Index
from lensmith.data.pipeline import Cost, StepRows, counts_of
from lensmith.data.plan import Step
from lensmith.parallel.ranks import Ranks, attempt


@dataclass(slots=True)
class SharedStep:
    """A step as one rank trains it: its own micro-batches, and what the whole step counts to, over all ranks."""

    step: Step
    rows: list[PackedRow]
    num_samples: int
    num_tokens: int
    num_supervised: float
    """Sum of loss weights over the supervised positions."""
    counts: dict[str, float]
    """What the terms of the loss are divided by."""
    num_sources: int
    positions: int
    """Supervised positions."""
    image_tokens: int
    num_rows: int
    """Micro-batches of all ranks."""
    most_rows: int
    """Micro-batches of the rank that has most."""
    most_positions: int
    """Supervised positions of the micro-batch that has most, over all ranks."""
    has_pictures: bool
    wait_seconds: float
    """Of the rank that waited longest."""
    dropped: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])
    cost: Cost = field(default_factory=Cost)
    index: Index | None = None


def shared_steps(steps: Iterator[StepRows], ranks: Ranks, units: Mapping[str, str]) -> Iterator[SharedStep]:
    """Each step once all ranks have read it. A rank that fails makes all of them fail, with its error.

    `units`: of each term of the loss, what it is divided by (see `StepRows.counts`).
    """
    with closing(steps):  # type: ignore[type-var]
        while True:
            data, error = attempt(lambda: next(steps, None))
            said = ranks.gather(_figures(data, error), "read the next step")
            if any(row[0] for row in said):
                ranks.all_well(error, "read the next step")
            if data is None:
                return
            yield _shared(data, said, ranks, units)


def _figures(data: StepRows | None, error: Exception | None) -> list[float]:
    if data is None:
        return [float(error is not None), *[0.0] * 8]
    rows = data.rows
    return [
        0.0, len(data.dropped), data.num_tokens, sum(len(r.supervised_S) for r in rows),
        sum(int((r.kind_T != 0).sum()) for r in rows), len(rows),
        max((len(r.supervised_S) for r in rows), default=0), float(any(len(r.image_keys) for r in rows)),
        data.wait_seconds,
    ]  # fmt: skip


def _shared(data: StepRows, said: list[list[float]], ranks: Ranks, units: Mapping[str, str]) -> SharedStep:
    _, drops, tokens, positions, image_tokens, rows, most, pictures, waits = zip(*said, strict=True)
    dropped = data.dropped
    num_samples, counts = data.num_samples, data.counts
    if sum(drops) and ranks.several:
        everywhere: list[Any] = ranks.gather_json(dropped, "say what is dropped")
        dropped = [(int(n), str(why), str(detail)) for rank in everywhere for n, why, detail in rank]
        assert data.index is not None
        counts, num_samples = counts_of(data.index, data.step.members, {n for n, _, _ in dropped})
    assert data.index is not None
    return SharedStep(
        data.step, data.rows, num_samples, int(sum(tokens)), counts["tokens"],
        {term: counts[unit] for term, unit in units.items()}, len(data.index.sources),
        int(sum(positions)), int(sum(image_tokens)), int(sum(rows)), int(max(rows)), int(max(most)), any(pictures),
        max(waits),
        dropped, data.cost, data.index,
    )  # fmt: skip
