"""Next-token prediction: continued pretraining and SFT are the same loss; they differ only in what is trained."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lensmith.core.encoded import PackedRow
from lensmith.objective.base import Terms, negative_log_likelihood


@dataclass(frozen=True)
class NextTokenLoss:
    """loss: sum over positions of w * l, and sum of w, with l = -log softmax(logits)[target].

    label_smoothing e: l becomes (1 - e) l + e * mean over the vocabulary of -log softmax(logits) (arXiv 1512.00567).
    z_loss z: z * (log sum exp logits)^2 is added (PaLM, arXiv 2204.02311, section 5). What is logged by source is the
    plain l. Computed in float32 whatever the logits are.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def units(self) -> Mapping[str, str]:
        return {"loss": "tokens"}

    @property
    def figures(self) -> tuple[str, ...]:
        return ("loss",)

    def at(self, logits_SV: torch.Tensor, target_S: torch.Tensor) -> torch.Tensor:
        """The loss and, where it differs, the plain one: [S, 1 or 2]."""
        plain_S = negative_log_likelihood(logits_SV, target_S)
        if not self.label_smoothing and not self.z_loss:
            return plain_S[:, None]
        logits_SV = logits_SV.float()
        total_S = logits_SV.logsumexp(-1)
        smooth_S = total_S - logits_SV.mean(-1)
        loss_S = (1 - self.label_smoothing) * plain_S + self.label_smoothing * smooth_S + self.z_loss * total_S.square()
        return torch.stack([loss_S, plain_S.detach()], dim=1)

    def terms(self, at_SK: torch.Tensor, row: PackedRow) -> Terms:
        weight_S = torch.from_numpy(row.weight_S).to(at_SK.device)
        source_S = torch.from_numpy(row.source_S).to(at_SK.device, torch.long)
        plain_S = at_SK[:, -1].detach()
        zeros = plain_S.new_zeros(1, int(row.source_S.max(initial=-1)) + 1)
        sums = zeros.index_add(1, source_S, plain_S[None])
        counts = zeros.index_add(1, source_S, torch.ones_like(plain_S)[None])
        return {"loss": ((at_SK[:, 0] * weight_S).sum(), weight_S.sum()), "by_source": (sums, counts)}
