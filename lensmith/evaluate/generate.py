"""Greedy answers for a batch of prompts: left-padded, cached, with SDPA and its mask (no packing plan is passed).

Image features go in once, at the prefill; positions continue from each prompt's own rotary positions, so a padded
batch, a single prompt and decoding without a cache give the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lensmith.core.encoded import IMAGE, Encoded


@torch.no_grad()
def greedy(
    model: Any,
    family: Any,
    prompts: Sequence[Encoded],
    features_NH: torch.Tensor | None,
    *,
    stop: set[int],
    max_new_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """Token ids of each answer without the stop token. features_NH: of all prompts' images, in prompt order."""
    from transformers import DynamicCache

    ids, mask, kinds, positions = _left_padded(prompts)
    ids_BL, mask_BL = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
    next_position = torch.tensor([int(p.position_ids_3L.max()) + 1 for p in prompts], device=device)
    cache = DynamicCache(config=model.config.get_text_config())
    out = family.hidden(
        model, ids_BL, features_NH, torch.from_numpy(kinds == IMAGE).to(device), torch.from_numpy(positions).to(device),
        attention_mask=mask_BL, use_cache=True, past_key_values=cache,
    )  # fmt: skip
    answers: list[list[int]] = [[] for _ in prompts]
    open_B = torch.ones(len(prompts), dtype=torch.bool)
    for step in range(max_new_tokens):
        chosen = model.get_output_embeddings()(out.last_hidden_state[:, -1]).argmax(-1)
        for i, token in enumerate(chosen.tolist()):
            if open_B[i] and token in stop:
                open_B[i] = False
            elif open_B[i]:
                answers[i].append(token)
        if not open_B.any() or step + 1 == max_new_tokens:
            break
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(prompts), 1)], dim=1)
        at = (next_position + step)[None, :, None].expand(3, -1, -1)
        no_image = torch.zeros(len(prompts), 1, dtype=torch.bool, device=device)
        out = family.hidden(
            model, chosen[:, None], None, no_image, at, attention_mask=mask_BL, use_cache=True, past_key_values=cache
        )
    return answers


def _left_padded(prompts: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids [B, L], mask [B, L], kinds [B, L], positions [3, B, L]; padding is token 0 at position 0, masked."""
    longest = max(p.num_tokens for p in prompts)
    ids = np.zeros((len(prompts), longest), np.int64)
    mask, kinds = np.zeros_like(ids), np.zeros_like(ids)
    positions = np.zeros((3, len(prompts), longest), np.int64)
    for i, p in enumerate(prompts):
        at = longest - p.num_tokens
        ids[i, at:], mask[i, at:], kinds[i, at:], positions[:, i, at:] = p.ids_L, 1, p.kind_L, p.position_ids_3L
    return ids, mask, kinds, positions
