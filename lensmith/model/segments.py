"""Rows of models with recurrent layers: every segment by itself behind its prefix, the results in row order.

A recurrent layer (linear attention, a convolution over positions) carries a state from token to token and knows no
segments, so no mask keeps the segments of a row apart. They go through the model together, padded on the right: a
causal model never sees what stands behind a token. What branches share runs again with each of them. A row is one pass
whatever is in it: where parameters are spread over ranks, each pass gathers them, and all ranks must do so equally
often.

Shape letters: T tokens of the row, H hidden size, n segments, L their padded length with the prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lensmith.model.attention import AttentionPlan

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Embeddings [n, L, H] and positions [3, n, L] to hidden states [n, L, H]; causal, each of the n by itself."""


def each_by_itself(
    embeds_1TH: torch.Tensor, position_ids_31T: torch.Tensor, plan: AttentionPlan, forward: Forward
) -> torch.Tensor:
    """Hidden states [1, T, H] of a row, each segment computed as if its prefix and itself were all there is.

    `forward` is called once. A segment that is the prefix of others takes its hidden states from the first of them.
    """
    device = embeds_1TH.device
    shared = {(s.prefix_start, s.prefix_length) for s in plan.segments if s.prefix_length}
    runs = [s for s in plan.segments if (s.start, s.length) not in shared]
    places = [torch.cat([_from(s.prefix_start, s.prefix_length), _from(s.start, s.length)]) for s in runs]
    longest = max(len(p) for p in places)
    index = torch.stack([F.pad(p, (0, longest - len(p)), value=int(p[-1])) for p in places]).to(device)
    hidden_nLH = forward(embeds_1TH[0, index], position_ids_31T[:, 0, index])
    found: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for s, place, hidden_LH in zip(runs, places, hidden_nLH, strict=True):
        prefix = (s.prefix_start, s.prefix_length)
        first = 0 if prefix in shared else s.prefix_length
        shared.discard(prefix)
        found.append(hidden_LH[first : len(place)])
        rows.append(place[first:])
    return torch.cat(found).index_select(0, torch.argsort(torch.cat(rows)).to(device))[None]


def _from(start: int, length: int) -> torch.Tensor:
    return torch.arange(start, start + length)
