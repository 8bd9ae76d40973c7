"""Adding up the `by_source` terms of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lensmith.objective.base import Terms

Pairs = tuple[tuple[float, float], ...]
"""(sum, count) of each source."""


class BySource:
    """Adds up the figures of several rows, which may know different numbers of sources."""

    def __init__(self, figures: int = 1) -> None:
        self._sums = torch.zeros(2, figures, 0, dtype=torch.float64)

    def add(self, terms: Terms) -> None:
        found = terms.get("by_source")
        if found is None:
            return
        more = torch.stack([t.detach().double().cpu() for t in found])
        wider = max(more.shape[2], self._sums.shape[2])
        self._sums = _widened(self._sums, wider) + _widened(more, wider)

    def sums(self, width: int = 0) -> Pairs:
        """(sum, count) of each figure of each source, the sources of a figure together; of `width` sources at least."""
        sums, counts = _widened(self._sums, max(width, self._sums.shape[2])).flatten(1)
        return tuple((float(sums[i]), float(counts[i])) for i in range(len(sums)))


def of_figures(pairs: Sequence[tuple[float, float]], figures: int) -> tuple[Pairs, ...]:
    """What `BySource.sums` gave, figure by figure."""
    width = len(pairs) // figures
    return tuple(tuple(pairs[i * width : (i + 1) * width]) for i in range(figures))


def _widened(sums: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(sums, (0, width - sums.shape[2]))
