"""Attention for packed rows: each segment attends to itself (and its prefix) and to nothing else, without a dense mask.

Registered once with transformers' AttentionInterface under `NAME`. Training hands every attention module an
`AttentionPlan`; without a plan (generation, evaluation) the same name is plain SDPA with transformers' mask, so padded,
unpadded and cached decoding are the library's own.

On CUDA in half precision a plan is one call of torch's variable-length flash attention. Elsewhere segments of like
length are stacked and each stack is one SDPA call: right-padded causal segments need no mask, since a query never sees
the padding behind it. Nothing of size [T, T] is built for a row of T tokens.

Shape letters: T tokens of the row, Q/K heads, D head size, n segments of a stack, q/k their padded lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lensmith.core.encoded import Segment

NAME = "lensmith_segments"
MAX_WASTE = 0.25
"""Segments are stacked while padding adds at most this share. Anything from 0 to 0.75 is as fast for rows of short
answers (docs/log.md); the bound is for long segments, where padding costs quadratically."""


@dataclass(frozen=True)
class Stack:
    """Segments of like length: where their queries and keys stand in the row, and which are real."""

    query_index: torch.Tensor  # [n, q]
    key_index: torch.Tensor  # [n, k]
    mask: torch.Tensor | None  # bool [n or 1, 1, q, k]; None: plain causal or full
    take: torch.Tensor | None  # flat positions of real queries in [n * q]; None: all
    contiguous: tuple[int, int, int] | None  # (start, n, length) when queries are keys and lie side by side


@dataclass(frozen=True)
class AttentionPlan:
    """How a row of `num_tokens` splits into segments. Built on the host once per row, used by every layer."""

    segments: tuple[Segment, ...]
    num_tokens: int
    causal: bool
    sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = field(default=None, compare=False)
    """In place of causality within a segment and its prefix: row places of queries [n, q, 1] and keys [n, 1, k], on the
    host, to who sees whom, bool [n, q, k] (pictures seen both ways, windows). Never given to a flash kernel."""
    _device: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def from_lengths(lengths: Sequence[int], *, causal: bool) -> AttentionPlan:
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist() if len(lengths) else []
        segments = tuple(Segment(int(a), int(n)) for a, n in zip(starts, lengths, strict=True) if n)
        return AttentionPlan(segments, int(sum(lengths)), causal)

    @cached_property
    def stacks(self) -> tuple[list[Stack], torch.Tensor | None]:
        """Stacks, and the index that brings their concatenated outputs back into row order (None: already)."""
        order = sorted(range(len(self.segments)), key=lambda i: self._key(i))
        groups: list[list[Segment]] = []
        for i in order:
            segment = self.segments[i]
            if groups and self._fits(groups[-1], segment):
                groups[-1].append(segment)
            else:
                groups.append([segment])
        for group in groups:
            group.sort(key=lambda s: s.start)
        stacks = [_stack(group, self.causal, self.sees) for group in groups]
        rows = torch.cat([_own_positions(g) for g in groups])
        if bool((rows == torch.arange(len(rows))).all()):
            return stacks, None
        return stacks, torch.argsort(rows)

    def _key(self, i: int) -> tuple[int, int, int]:
        s = self.segments[i]
        return (s.prefix_length, s.length, s.start)

    @staticmethod
    def _fits(group: list[Segment], segment: Segment) -> bool:
        """The group is in ascending length: `segment` would be its longest."""
        if group[0].prefix_length != segment.prefix_length:
            return False
        padded = segment.length * (len(group) + 1)
        return padded - sum(s.length for s in group) - segment.length <= MAX_WASTE * padded

    def on(self, device: torch.device) -> tuple[list[Stack], torch.Tensor | None]:
        key = f"stacks:{device}"
        if key not in self._device:
            stacks, inverse = self.stacks
            moved = [
                Stack(
                    s.query_index.to(device),
                    s.key_index.to(device),
                    None if s.mask is None else s.mask.to(device),
                    None if s.take is None else s.take.to(device),
                    s.contiguous,
                )
                for s in stacks
            ]
            self._device[key] = (moved, None if inverse is None else inverse.to(device))
        return self._device[key]

    def varlen(self, device: torch.device) -> dict[str, Any]:
        """Arguments of `torch.nn.attention.varlen.varlen_attn`; keys are gathered where segments have a prefix."""
        if "varlen" not in self._device:
            ordered = sorted(self.segments, key=lambda s: s.start)
            q = np.array([s.length for s in ordered])
            k = q + np.array([s.prefix_length for s in ordered])
            index = None
            if (q != k).any():
                index = torch.cat([_key_positions(s) for s in ordered]).to(device)
            cu = [torch.from_numpy(np.concatenate([[0], np.cumsum(x)]).astype(np.int32)).to(device) for x in (q, k)]
            lengths = {"max_q": int(q.max()), "max_k": int(k.max())}
            self._device["varlen"] = {"index": index, "cu_q": cu[0], "cu_k": cu[1], **lengths}
        return self._device["varlen"]


def _own_positions(group: list[Segment]) -> torch.Tensor:
    return torch.cat([torch.arange(s.start, s.start + s.length) for s in group])


def _key_positions(s: Segment) -> torch.Tensor:
    own = torch.arange(s.start, s.start + s.length)
    return torch.cat([torch.arange(s.prefix_start, s.prefix_start + s.prefix_length), own]) if s.prefix_length else own


def _stack(
    group: list[Segment], causal: bool, sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
) -> Stack:
    """Right-padded index tables. Padded entries repeat the segment's last token; padded queries are not taken."""
    prefix = group[0].prefix_length
    lengths = torch.tensor([s.length for s in group])
    longest = int(lengths.max())
    offsets = torch.minimum(torch.arange(longest)[None], lengths[:, None] - 1)
    query = offsets + torch.tensor([s.start for s in group])[:, None]
    key = query
    if prefix:
        front = torch.tensor([s.prefix_start for s in group])[:, None] + torch.arange(prefix)[None]
        key = torch.cat([front, query], dim=1)
    real = torch.arange(longest)[None] < lengths[:, None]
    equal = bool((lengths == longest).all())
    mask = None
    if sees is not None:
        there = torch.cat([torch.ones(len(group), prefix, dtype=torch.bool), real], dim=1)
        mask = (sees(query[:, :, None], key[:, None, :]) & there[:, None, :])[:, None]
    elif causal and prefix:
        mask = torch.ones(longest, prefix + longest, dtype=torch.bool).tril(prefix)[None, None]
    elif not causal and not equal:
        mask = real[:, None, None, :].expand(len(group), 1, longest, longest)
    side_by_side = all(b.start == a.start + a.length for a, b in itertools.pairwise(group))
    contiguous = (group[0].start, len(group), longest) if equal and side_by_side and not prefix else None
    take = None if equal else real.flatten().nonzero()[:, 0]
    return Stack(query, key, mask, take, contiguous)


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, Q, T, D], key and value [B, K, T, D] -> [B, T, Q, D]."""
    plans = kwargs.pop("attention_plans", None)
    if plans is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[return-value]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    plan: AttentionPlan = plans[module] if module in plans else plans[None]
    q_TQD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    assert query.shape[0] == 1 and q_TQD.shape[0] == plan.num_tokens, "a plan describes exactly one packed row"
    dtype = _compute_dtype(query)
    if query.is_cuda and dtype in (torch.float16, torch.bfloat16) and dropout == 0.0 and plan.sees is None:
        out_TQD = _varlen(plan, q_TQD.to(dtype), k_TKD.to(dtype), v_TKD.to(dtype), scaling)
    else:
        out_TQD = _stacked(plan, q_TQD, k_TKD, v_TKD, scaling, dropout)
    return out_TQD[None], None


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    """Under autocast queries and keys arrive in float32 (the rotary table has the embedding's type) and values in
    bfloat16; SDPA casts them by itself, variable-length attention does not."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _stacked(
    plan: AttentionPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, dropout: float
) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1]
    stacks, inverse = plan.on(q.device)
    outputs: list[torch.Tensor] = []
    for stack in stacks:
        if stack.contiguous is not None:
            start, n, length = stack.contiguous
            qs, ks, vs = (x[start : start + n * length].unflatten(0, (n, length)) for x in (q, k, v))
        else:
            qs = q.index_select(0, stack.query_index.flatten()).unflatten(0, stack.query_index.shape)
            ks, vs = (x.index_select(0, stack.key_index.flatten()).unflatten(0, stack.key_index.shape) for x in (k, v))
        if repeats > 1 and stack.mask is not None:
            # beside a mask, only CUDA's kernel that writes all scores down takes fewer heads of keys than of queries
            ks, vs = (x.repeat_interleave(repeats, dim=2) for x in (ks, vs))
        out = F.scaled_dot_product_attention(
            qs.transpose(1, 2),
            ks.transpose(1, 2),
            vs.transpose(1, 2),
            attn_mask=stack.mask,
            dropout_p=dropout,
            is_causal=plan.causal and stack.mask is None,
            scale=scale,
            enable_gqa=qs.shape[2] != ks.shape[2],
        )
        flat = out.transpose(1, 2).flatten(0, 1)
        outputs.append(flat if stack.take is None else flat.index_select(0, stack.take))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if inverse is None else joined.index_select(0, inverse)


def _varlen(
    plan: AttentionPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Flash attention aligns a causal mask to the lower right, which is what a prefix in front of the keys needs."""
    from torch.nn.attention.varlen import varlen_attn

    a = plan.varlen(q.device)
    if a["index"] is not None:
        k, v = k.index_select(0, a["index"]), v.index_select(0, a["index"])
    window = (-1, 0) if plan.causal else (-1, -1)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), a["cu_q"], a["cu_k"], a["max_q"], a["max_k"],
        scale=scale, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


def register() -> None:
    """Make `NAME` known to transformers, with SDPA's mask for rows without a plan. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
