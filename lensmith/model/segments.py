"""Rows of models with recurrent layers: every segment by itself behind its prefix, the results in row order.

A recurrent layer (linear attention, a convolution over positions) carries a state from token to token and knows no
segments, so no mask keeps the segments of a row apart. Segments of like length go through the model together, padded on
the right: a causal model never sees what stands behind a token. What branches share runs again with each of them.

Shape letters: T tokens of the row, H hidden size, n segments of a stack, L their padded length with the prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lensmith.model.attention import AttentionPlan

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Embeddings [n, L, H] and positions [3, n, L] to hidden states [n, L, H]; causal, each of the n by itself."""


def each_by_itself(
    embeds_1TH: torch.Tensor, position_ids_31T: torch.Tensor, plan: AttentionPlan, forward: Forward
) -> torch.Tensor:
    """Hidden states [1, T, H] of a row, each segment computed as if its prefix and itself were all there is.

    A segment that is the prefix of others takes its hidden states from the first of them.
    """
    device = embeds_1TH.device
    shared = {(s.prefix_start, s.prefix_length) for s in plan.segments if s.prefix_length}
    runs = tuple(s for s in plan.segments if (s.start, s.length) not in shared)
    found: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for stack in replace(plan, segments=runs, _device={}).stacks[0]:
        index = stack.key_index.to(device)
        hidden_nLH = forward(embeds_1TH[0, index], position_ids_31T[:, 0, index])
        prefix = index.shape[1] - stack.query_index.shape[1]
        own, places = hidden_nLH[:, prefix:].flatten(0, 1), stack.query_index.flatten()
        if stack.take is not None:
            own, places = own.index_select(0, stack.take.to(device)), places[stack.take]
        found.append(own)
        rows.append(places)
        for i, start in enumerate(stack.key_index[:, 0].tolist() if prefix else ()):
            if (start, prefix) in shared:
                shared.discard((start, prefix))
                found.append(hidden_nLH[i, :prefix])
                rows.append(stack.key_index[i, :prefix])
    return torch.cat(found).index_select(0, torch.argsort(torch.cat(rows)).to(device))[None]
