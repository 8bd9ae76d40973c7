"""Next-token prediction: continued pretraining and SFT are the same loss; they differ only in what is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Named (sum, count): what an objective returns. The engine divides by the global count once."""


class NextTokenLoss:
    """loss: sum over positions of w * -log softmax(logits)[target], and sum of w.

    Additive over positions, so it may be called on chunks and summed. Computed in float32 whatever the logits are.
    """

    def terms(self, logits_SV: torch.Tensor, target_S: torch.Tensor, weight_S: torch.Tensor) -> Terms:
        loss_S = F.cross_entropy(logits_SV.float(), target_S, reduction="none")
        return {"loss": ((loss_S * weight_S).sum(), weight_S.sum())}
