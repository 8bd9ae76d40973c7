"""The picture half of MiniCPM-V-2: a SigLIP tower and a resampler, under the published tensor names.

All slices of a row go through the tower in one pass, one attention segment each, and through the resampler in one
attention call for each number of patches. Position tables are computed in float32 and cast to the type of what they are
added to, so a component never sees two types.

Vendor sources: the forms of timm's `VisionTransformer` 0.9.10 and of the model's `resampler.py` (Qwen-VL's resampler
with its keys' positions made for each size).

Shape letters: P patches of all slices, C width of the tower, D width of the language model, n slices, Q queries, K
heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lensmith.model.attention import AttentionPlan, segment_attention

Size = tuple[int, int]
"""Rows and columns of patches of a slice."""


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[P, 3 * patch * patch], in a patch channel, row, column -> [P, C]. A patch is all its kernel sees, so the
        convolution is one matrix product."""
        return F.linear(values, self.proj.weight.flatten(1), self.proj.bias)


class TowerAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)[:, None]
        out, _ = segment_attention(self, q, k, v, None, attention_plans={None: plan})
        return self.proj(out[0].flatten(1))


class TowerMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TowerBlock(GradientCheckpointingLayer):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = TowerAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = TowerMLP(width, inner)

    def forward(self, x: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), plan)
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """SigLIP without its pooling head; the last block of the published encoder is left out (`drop_vision_last_layer`).

    `side`: rows and columns of the learnt positions, which are resampled to the size of each slice.
    """

    def __init__(self, width: int, layers: int, heads: int, inner: int, patch: int, side: int):
        super().__init__()
        self.side = side
        self.patch_embed = PatchEmbed(width, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, width))
        self.blocks = nn.ModuleList([TowerBlock(width, heads, inner) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, values: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
        """Normalised patches [P, 3 * patch * patch] of slices of `sizes`, one after the other -> [P, C]."""
        x = self.patch_embed(values.to(self.patch_embed.proj.weight.dtype))
        x = x + self.positions(sizes).to(x.dtype)
        plan = AttentionPlan.from_lengths([rows * columns for rows, columns in sizes], causal=False)
        for block in self.blocks:
            x = block(x, plan)
        return self.norm(x)

    def positions(self, sizes: Sequence[Size]) -> torch.Tensor:
        """float32 [P, C]: the learnt positions at every size, resampled once for each distinct one."""
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            grid = self.pos_embed[0].float().unflatten(0, (self.side, self.side))
            found = {size: self._resampled(grid, size) for size in dict.fromkeys(sizes)}
        return torch.cat([found[size] for size in sizes])

    def _resampled(self, grid: torch.Tensor, size: Size) -> torch.Tensor:
        if size == (self.side, self.side):
            return grid.flatten(0, 1)
        rows, columns = (resampling(self.side, n).to(grid.device) for n in size)
        return torch.einsum("ra,ack->rck", rows, torch.einsum("cb,abk->ack", columns, grid)).flatten(0, 1)


@lru_cache(maxsize=1024)
def resampling(source: int, target: int) -> torch.Tensor:
    """float32 [target, source]: bicubic resampling with antialiasing along one axis, as a matrix.

    Along two axes it is that along each, so what is kept depends on no weight, and gradients reach the positions.
    """
    unit = torch.eye(source)[None, None]
    return F.interpolate(unit, size=(target, source), mode="bicubic", antialias=True, align_corners=False)[0, 0]


class ResamplerAttention(nn.Module):
    """Multi-head attention under the names of `nn.MultiheadAttention`. Its output layer is called as a module, so an
    adapter on it works; query, key and value share one tensor that is no layer and takes none."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Queries [Q, D], the same for each slice; keys and values [P, D] of slices of `counts` patches: [n, Q, D]."""
        layers = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)) for x, weight, bias in layers)
        starts, sizes = np.concatenate([[0], np.cumsum(counts)[:-1]]), np.asarray(counts)
        found, order = [], []
        for count in np.unique(sizes):
            slices = np.flatnonzero(sizes == count)
            index = torch.from_numpy(starts[slices][:, None] + np.arange(count)).to(k.device)
            # [n, K, Q, d] from queries [n, K, Q, d], keys and values [n, K, count, d]
            queries = q.transpose(0, 1).expand(len(slices), -1, -1, -1)
            out = F.scaled_dot_product_attention(queries, k[index].transpose(1, 2), v[index].transpose(1, 2))
            found.append(out.transpose(1, 2).flatten(2))
            order.append(slices)
        back = torch.from_numpy(np.argsort(np.concatenate(order))).to(k.device)
        return self.out_proj(torch.cat(found).index_select(0, back))


class Resampler(nn.Module):
    """`queries` learnt queries look at the patches of a slice and become its tokens.

    `pos_embed` is a table, not a weight: a buffer that is saved, so nothing that sets what trains can reach it.
    """

    pos_embed: torch.Tensor

    def __init__(self, width: int, tower_width: int, queries: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.proj = nn.Parameter(torch.zeros(width, width))
        self.register_buffer("pos_embed", torch.zeros(queries, width))
        self.kv_proj = nn.Linear(tower_width, width, bias=False)
        self.attn = ResamplerAttention(width, heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))

    def forward(self, features: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
        """What the tower gave [P, C] for slices of `sizes` -> [n, Q, D]."""
        x = self.ln_kv(self.kv_proj(features.to(self.kv_proj.weight.dtype)))
        q = self.ln_q(self.query)
        keys = x + places(sizes, x.shape[-1], x.device).to(x.dtype)
        out = self.attn(q + self.pos_embed.to(q.dtype), keys, x, [rows * columns for rows, columns in sizes])
        return self.ln_post(out) @ self.proj


def places(sizes: Sequence[Size], width: int, device: Any = None) -> torch.Tensor:
    """float32 [P, width]: sine and cosine of each patch's column in the first half, of its row in the second."""
    side = max(max(size) for size in sizes)
    half = width // 2
    omega = 1.0 / 10000.0 ** (torch.arange(half // 2, dtype=torch.float32, device=device) / (half / 2))
    angles = torch.arange(side, dtype=torch.float32, device=device)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = np.concatenate([np.repeat(np.arange(r), c) for r, c in sizes])
    columns = np.concatenate([np.tile(np.arange(c), r) for r, c in sizes])
    return torch.cat([line[torch.from_numpy(at).to(line.device)] for at in (columns, rows)], dim=1)
