"""Noise on the embeddings of text while training (NEFTune, arXiv 2310.05914).

Shape letters: T tokens of a row, H hidden size, L tokens of one sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lensmith.core.encoded import TEXT, PackedRow


def add_noise(root: Any, alpha: float) -> None:
    """From now on each text token's embedding gets uniform noise in [-1, 1] * alpha / sqrt(L H), wherever gradients are
    computed in training mode. The draws are torch's own on that device: a resumed run has the same."""
    _Noise(alpha).attach(root)


class _Noise:
    def __init__(self, alpha: float):
        self.alpha = alpha
        self.length_T: torch.Tensor | None = None
        """L of each text token of the row that is under way, 0 for the rest; None between rows."""

    def attach(self, root: Any) -> None:
        root.register_forward_pre_hook(self._begin)
        root.register_forward_hook(self._end, always_call=True)
        root.model.get_input_embeddings().register_forward_hook(self._add)
        self.training = lambda: root.training and torch.is_grad_enabled()

    def _begin(self, root: Any, args: tuple[PackedRow, ...]) -> None:
        if self.training():
            self.length_T = torch.from_numpy(lengths(args[0]))

    def _end(self, root: Any, args: Any, out: Any) -> None:
        self.length_T = None

    def _add(self, module: Any, args: Any, embeds_BTH: torch.Tensor) -> torch.Tensor:
        if self.length_T is None or not self.training():
            return embeds_BTH
        length_T1 = self.length_T.to(embeds_BTH.device)[:, None]
        scale_T1 = torch.where(length_T1 > 0, self.alpha * (length_T1 * embeds_BTH.shape[-1]).rsqrt(), 0.0)
        noise_BTH = torch.empty(embeds_BTH.shape, device=embeds_BTH.device).uniform_(-1, 1)
        return embeds_BTH + (noise_BTH * scale_T1).to(embeds_BTH.dtype)


def lengths(row: PackedRow) -> np.ndarray:
    """Of each token [T] how many tokens its sample has, as it would stand alone: its segment and the prefix that it
    shares with others; 0 where no text stands."""
    length_T = np.zeros(row.num_tokens, np.float32)
    for s in row.segments:
        length_T[s.start : s.start + s.length] = s.length + s.prefix_length
    return np.where(row.kind_T == TEXT, length_T, 0.0).astype(np.float32)
