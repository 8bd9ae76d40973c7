"""The vision tower of MiniCPM-V 4.6 and 4.7, layer by layer, over the blocks of a row at once.

transformers' own forward calls attention once for each block and, in the merger between two layers, once for each
window of 2 x 2 patches: 256 calls for one slice. Here its layers run over all patches, with attention within blocks and
windows by plans. The result is tested against the stock forward.

Shape letters: P patches, C channels of the tower, N tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lensmith.model.attention import AttentionPlan

Size = tuple[int, int]


def run_tower(vision: Any, values: torch.Tensor, sizes: Sequence[Size], *, merge_inside: bool) -> list[torch.Tensor]:
    """Values [P, 3, patch, patch] of blocks of `sizes` (rows, columns of patches) to [N, 4 * C] for each block: 2 x 2
    neighbours side by side. `merge_inside`: 2 x 2 patches become one inside the tower (downsample mode 16x)."""
    strip = values.permute(1, 2, 0, 3).flatten(2)[None]  # [1, 3, patch, P * patch]
    x = vision.embeddings(strip, target_sizes=torch.tensor(sizes))
    plan = _within(sizes)
    for number, layer in enumerate(vision.encoder.layers):
        x = layer(x, None, **_attention(plan))
        if merge_inside and number == vision.config.insert_layer_id:
            x = _merged(vision.vit_merger, x, sizes)
            sizes = [(h // 2, w // 2) for h, w in sizes]
            plan = _within(sizes)
    rows = vision.post_layernorm(x)[0][_squares(sizes).to(x.device)].flatten(1)
    return list(rows.split([h * w // 4 for h, w in sizes]))


def _within(sizes: Sequence[Size]) -> AttentionPlan:
    return AttentionPlan.from_lengths([h * w for h, w in sizes], causal=False)


def _attention(plan: AttentionPlan) -> dict[str, Any]:
    """What makes an attention module see one sequence and the plan its segments."""
    whole = torch.tensor([0, plan.num_tokens], dtype=torch.int32)
    return {"cu_seqlens": whole, "max_seqlen": None, "attention_plans": {None: plan}}


def _merged(merger: Any, x_1PC: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """The window merger: attention within 2 x 2 patches, which then become one: [1, P / 4, C]."""
    index = _squares(sizes).to(x_1PC.device)
    plan = AttentionPlan.from_lengths([4] * index.shape[0], causal=False)
    attended, _ = merger.self_attn(merger.layer_norm1(x_1PC)[:, index.flatten()], **_attention(plan))
    four = (x_1PC[:, index.flatten()] + attended).unflatten(1, (-1, 4))
    joined = merger.linear_2(merger.act(merger.linear_1(merger.pre_norm(four.flatten(2)))))
    return joined + four.mean(2)


def _squares(sizes: Sequence[Size]) -> torch.Tensor:
    """[P / 4, 4]: which patches are a square of 2 x 2, squares row by row, block after block."""
    found: list[torch.Tensor] = []
    start = 0
    for h, w in sizes:
        at = torch.arange(start, start + h * w).view(h // 2, 2, w // 2, 2)
        found.append(at.transpose(1, 2).reshape(-1, 4))
        start += h * w
    return torch.cat(found)
