"""Next-token prediction: continued pretraining and SFT are the same loss; they differ only in what is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Named (sum, count): what an objective returns. The engine divides by the global count once."""

Sources = tuple[torch.Tensor, int]
"""The source of each position [S], and how many sources there are."""


class NextTokenLoss:
    """loss: sum over positions of w * -log softmax(logits)[target], and sum of w. by_source: per source the sum of
    -log softmax(logits)[target] and the number of positions, without gradient, float32 [G] each.

    Additive over positions, so it may be called on chunks and summed. Computed in float32 whatever the logits are.
    """

    def terms(
        self, logits_SV: torch.Tensor, target_S: torch.Tensor, weight_S: torch.Tensor, by_source: Sources | None = None
    ) -> Terms:
        loss_S = F.cross_entropy(logits_SV.float(), target_S, reduction="none")
        found = {"loss": ((loss_S * weight_S).sum(), weight_S.sum())}
        if by_source is not None:
            source_S, num_sources = by_source
            zeros = loss_S.new_zeros(num_sources)
            plain = loss_S.detach()
            found["by_source"] = (
                zeros.index_add(0, source_S, plain), zeros.index_add(0, source_S, torch.ones_like(plain))
            )  # fmt: skip
        return found
