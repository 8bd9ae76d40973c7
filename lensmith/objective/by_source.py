"""Adding up the `by_source` terms of micro-batches."""

from __future__ import annotations

import torch

from lensmith.objective.next_token import Terms


class BySource:
    """Adds up the `by_source` terms of several rows, which may know different numbers of sources."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, 0, dtype=torch.float64)

    def add(self, terms: Terms) -> None:
        found = terms.get("by_source")
        if found is None:
            return
        more = torch.stack([t.detach().double().cpu() for t in found])
        wider = max(more.shape[1], self._sums.shape[1])
        self._sums = _widened(self._sums, wider) + _widened(more, wider)

    def sums(self, width: int = 0) -> tuple[tuple[float, float], ...]:
        """(sum of losses, number of positions) of each source; of `width` sources at least."""
        losses, counts = _widened(self._sums, max(width, self._sums.shape[1]))
        return tuple((float(losses[i]), float(counts[i])) for i in range(len(losses)))


def _widened(sums: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(sums, (0, width - sums.shape[1]))
