"""What an objective is: figures at supervised positions, then named sums over a row; the engine divides once.

The head runs in chunks, so what an objective asks of the logits is asked position by position (`at`); everything behind
that (`terms`) sees a whole row, whose samples never stand in two rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

from lensmith.core.encoded import PackedRow

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Named (sum, count). The engine divides the sum of each term that `Objective.units` names by what it counts over the
whole step, and trains the sum of these. `by_source`: sums and counts of `Objective.figures` [F, G], no gradient."""


class Objective(Protocol):
    @property
    def units(self) -> Mapping[str, str]:
        """Of each term that is trained, what it is divided by: weights over `tokens`, `samples` or `chosen` tokens."""
        ...

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what is logged for each source; the first is the loss."""
        ...

    def at(self, logits_SV: torch.Tensor, target_S: torch.Tensor) -> torch.Tensor:
        """Figures of each supervised position [S, K], with gradient."""
        ...

    def terms(self, at_SK: torch.Tensor, row: PackedRow) -> Terms: ...


def negative_log_likelihood(logits_SV: torch.Tensor, target_S: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] in float32 [S]."""
    return F.cross_entropy(logits_SV.float(), target_S, reduction="none")


def by_source(values: torch.Tensor, of: torch.Tensor, num_sources: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums, counts) [F, G] of `values` [F, N], whose n-th column is of source `of[n]`; NaN is not counted."""
    there = ~values.isnan()
    zeros = values.new_zeros(len(values), num_sources)
    sums = zeros.index_add(1, of, torch.where(there, values, 0.0))
    return sums, zeros.index_add(1, of, there.to(values.dtype))
