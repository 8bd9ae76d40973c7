"""Attention over segments of a packed row against a dense masked reference, and decoding against transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lensmith.core.encoded import Segment
from lensmith.core.sample import Conversation, Image, Message, Text
from lensmith.data.encode import Encoder
from lensmith.data.tokenizer import TextTokenizer
from lensmith.evaluate.generate import greedy
from lensmith.family.registry import load_family
from lensmith.model import attention
from lensmith.model.attention import AttentionPlan, segment_attention
from lensmith.model.load import load_model

UNLESS_SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@st.composite
def rows(draw: st.DrawFn, prefixes: bool = True) -> tuple[list[Segment], int]:
    """Samples side by side: plain segments, and prefixes with one or more branches behind them."""
    segments: list[Segment] = []
    at = 0
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 12))
        segments.append(Segment(at, length))
        start, at = at, at + length
        for _ in range(draw(st.integers(0, 3)) if prefixes else 0):
            own = draw(st.integers(1, 9))
            segments.append(Segment(at, own, start, length))
            at += own
    return segments, at


def mask_of(segments: Sequence[Segment], num_tokens: int, causal: bool) -> torch.Tensor:
    """Dense bool [T, T], token by token from the definition of a segment."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for s in segments:
        for query in range(s.start, s.start + s.length):
            last = query if causal else s.start + s.length - 1
            mask[query, s.start : last + 1] = True
            mask[query, s.prefix_start : s.prefix_start + s.prefix_length] = True
    return mask


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[1, heads, T, D] -> [1, T, heads, D] by the formula."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT) * scale
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def random_qkv(num_tokens: int, heads: tuple[int, int], size: int = 8, seed: int = 0) -> QKV:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, num_tokens, size, generator=g) for h in (heads[0], heads[1], heads[1]))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def run(
    plan: AttentionPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, **kwargs: Any
) -> torch.Tensor:
    return segment_attention(nn.Identity(), q, k, v, None, scaling=scale, attention_plans={None: plan}, **kwargs)[0]


@given(rows(), st.booleans(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.randoms(use_true_random=False))
@settings(UNLESS_SLOW, max_examples=120)
def test_equals_a_dense_mask(row: tuple[list[Segment], int], causal: bool, heads: tuple[int, int], random: Any) -> None:
    """Outputs and gradients, in whatever order the segments are listed."""
    segments, num_tokens = row
    if not causal:  # a prefix is a notion of causal rows
        segments = [Segment(s.start, s.length) for s in segments]
    shuffled = list(segments)
    random.shuffle(shuffled)
    inputs = random_qkv(num_tokens, heads)
    out = run(AttentionPlan(tuple(shuffled), num_tokens, causal), *inputs, scale=0.3)
    expected = dense(*inputs, mask_of(segments, num_tokens, causal), 0.3)
    assert out.shape == expected.shape == (1, num_tokens, heads[0], 8)
    assert (out - expected).abs().max() < 2e-6
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_scale_is_that_of_the_head_size_by_default() -> None:
    inputs = random_qkv(9, (2, 2))
    plan = AttentionPlan.from_lengths([4, 5], causal=True)
    assert (run(plan, *inputs) - dense(*inputs, mask_of(plan.segments, 9, True), 8**-0.5)).abs().max() < 2e-6


@given(rows())
@settings(UNLESS_SLOW, max_examples=30)
def test_other_samples_change_nothing(row: tuple[list[Segment], int]) -> None:
    """Values, infinities and gradients of one sample never reach another."""
    segments, num_tokens = row
    first_end = next((s.start for s in segments[1:] if not s.prefix_length), num_tokens)
    plan = AttentionPlan(tuple(segments), num_tokens, causal=True)
    q, k, v = random_qkv(num_tokens, (4, 2))
    before = run(plan, q, k, v)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, first_end:] = 1e4
    assert torch.equal(before[:, :first_end], run(plan, *changed)[:, :first_end])
    for gradient in torch.autograd.grad(before[:, :first_end].sum(), (q, k, v)):
        assert (gradient[:, :, first_end:] == 0).all()
    changed[2][:, :, first_end:] = float("nan")
    assert run(plan, *changed)[:, :first_end].isfinite().all()


def test_module_of_its_own_plan() -> None:
    """Qwen2.5-VL's tower: some layers attend per window, others per picture."""
    window, full = AttentionPlan.from_lengths([3, 3, 2], causal=False), AttentionPlan.from_lengths([8], causal=False)
    layer = nn.Identity()
    q, k, v = random_qkv(8, (2, 2))
    plans = {None: window, layer: full}
    for module, plan in ((layer, full), (nn.Identity(), window)):
        out = segment_attention(module, q, k, v, None, scaling=0.5, attention_plans=plans)[0]
        assert (out - dense(q, k, v, mask_of(plan.segments, 8, False), 0.5)).abs().max() < 2e-6


def test_a_plan_is_of_one_row_and_its_length() -> None:
    q, k, v = random_qkv(8, (2, 2))
    with pytest.raises(AssertionError, match="one packed row"):
        run(AttentionPlan.from_lengths([7], causal=True), q, k, v)
    with pytest.raises(AssertionError, match="one packed row"):
        run(AttentionPlan.from_lengths([8], causal=True), *(x.expand(2, -1, -1, -1) for x in (q, k, v)))


def test_dropout_is_only_of_probabilities() -> None:
    """With equal values dropout changes an output only by its factor: 0 or a multiple of 1 / (1 - p) of the weights."""
    q, k, _ = random_qkv(64, (2, 2))
    plan = AttentionPlan.from_lengths([64], causal=True)
    torch.manual_seed(0)
    out = run(plan, q, k, torch.ones_like(q), dropout=0.5)
    assert out.std() > 0.05 and abs(out.mean().item() - 1) < 0.1


@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=["float", "rotary float"]
)
def test_autocast_takes_what_the_layers_give(types: tuple[torch.dtype, torch.dtype]) -> None:
    """With float32 embeddings under autocast, queries and keys come in float32 and values in bfloat16."""
    q, k, v = random_qkv(20, (4, 2))
    plan = AttentionPlan.from_lengths([7, 7, 6], causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._compute_dtype(q) == torch.bfloat16
        out = run(plan, q.to(types[0]), k.to(types[0]), v.to(types[1]))
    assert attention._compute_dtype(q) == torch.float32
    assert (out.float() - dense(q, k, v, mask_of(plan.segments, 20, True), 8**-0.5)).abs().max() < 0.03


# -- memory -------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest number of values of any tensor an operation returns, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def short_rows(num_tokens: int) -> list[tuple[Segment, ...]]:
    """Rows of ragged segments of about 40 tokens; the second with branches behind prefixes."""
    rng = np.random.default_rng(0)
    plain: list[Segment] = []
    branches: list[Segment] = []
    at = 0
    while at < num_tokens:
        length = min(int(rng.integers(8, 64)), num_tokens - at)
        plain.append(Segment(at, length))
        behind = branches and branches[-1].prefix_length == 0 and length < 40
        branches.append(Segment(at, length, branches[-1].start, branches[-1].length) if behind else Segment(at, length))
        at += length
    return [tuple(plain), tuple(branches)]


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "branches"])
def test_nothing_of_size_t_squared(kind: int) -> None:
    """Forward and backward of a row of 8,192 tokens keep to a few times its queries; [T, T] would be 67 million."""
    num_tokens = 8192
    q, k, v = random_qkv(num_tokens, (4, 2), size=16)
    plan = AttentionPlan(short_rows(num_tokens)[kind], num_tokens, causal=True)
    with Largest() as largest:
        run(plan, q, k, v).sum().backward()
    assert largest.numel <= 4 * q.numel() == 4 * 4 * 16 * num_tokens < num_tokens**2 / 30, largest.numel


def test_the_whole_model_builds_no_dense_mask(qwen25: Path) -> None:
    """The language model's own mask functions are not called for a row with a plan: T = 2,048, [T, T] = 4.2 million."""
    num_tokens = 2048
    model: Any = load_model(qwen25, torch.float32, torch.device("cpu"))
    family = load_family(qwen25)
    plan = AttentionPlan(short_rows(num_tokens)[0], num_tokens, causal=True)
    ids = torch.arange(num_tokens)[None] % 200
    at = torch.arange(num_tokens).expand(3, 1, -1)
    with Largest() as largest:
        out = family.hidden(
            model,
            ids,
            None,
            torch.zeros_like(ids, dtype=torch.bool),
            at,
            attention_mask=None,
            use_cache=False,
            attention_plans={None: plan},
        )
        out.last_hidden_state.sum().backward()
    assert largest.numel <= 4 * num_tokens * 64 < num_tokens**2 / 4, largest.numel  # 64: the widest layer


# -- variable-length attention: its arguments ---------------------------------------------------------------------


@given(rows(), st.booleans())
@settings(UNLESS_SLOW, max_examples=80)
def test_arguments_of_varlen_attention(row: tuple[list[Segment], int], causal: bool) -> None:
    """What `varlen_attn` is documented to compute from them, sequence by sequence, is the dense reference."""
    segments, num_tokens = row
    if not causal:
        segments = [Segment(s.start, s.length) for s in segments]
    q, k, v = random_qkv(num_tokens, (4, 2))
    a = AttentionPlan(tuple(segments[::-1]), num_tokens, causal).varlen(torch.device("cpu"))
    assert a["cu_q"].dtype == a["cu_k"].dtype == torch.int32 and a["cu_q"][-1] == num_tokens
    keys, values = (x if a["index"] is None else x[:, :, a["index"]] for x in (k, v))
    out = torch.zeros(1, num_tokens, 4, 8)
    for i in range(len(a["cu_q"]) - 1):
        own, seen = (slice(int(cu[i]), int(cu[i + 1])) for cu in (a["cu_q"], a["cu_k"]))
        nq, nk = own.stop - own.start, seen.stop - seen.start
        assert 0 < nq <= a["max_q"] and nq <= nk <= a["max_k"]
        # flash attention: a causal mask is aligned to the lower right corner
        mask = torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq) if causal else torch.ones(nq, nk, dtype=torch.bool)
        out[:, own] = dense(q[:, :, own], keys[:, :, seen], values[:, :, seen], mask, 0.3)
    assert (out - dense(q, k, v, mask_of(segments, num_tokens, causal), 0.3)).abs().max() < 2e-6


def test_the_call_of_varlen_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call itself, with the kernel replaced by its documented meaning: [T, heads, D] in and out."""
    import torch.nn.attention.varlen as varlen

    calls: list[dict[str, Any]] = []

    def by_the_book(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **kwargs: Any
    ) -> torch.Tensor:
        calls.append(kwargs)
        out = torch.empty_like(q)
        for i in range(len(cu_q) - 1):
            own, seen = (slice(int(c[i]), int(c[i + 1])) for c in (cu_q, cu_k))
            nq, nk = own.stop - own.start, seen.stop - seen.start
            mask = torch.ones(nq, nk, dtype=torch.bool)
            mask = mask.tril(nk - nq) if kwargs["window_size"] == (-1, 0) else mask
            out[own] = dense(*(x.transpose(0, 1)[None] for x in (q[own], k[seen], v[seen])), mask, kwargs["scale"])[0]
        return out

    monkeypatch.setattr(varlen, "varlen_attn", by_the_book)
    for segments, causal in (
        ((Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 4, 0, 3)), True),
        ((Segment(0, 5), Segment(5, 4)), False),
    ):
        q, k, v = random_qkv(9, (4, 2))
        out = attention._varlen(AttentionPlan(segments, 9, causal), *(x[0].transpose(0, 1) for x in (q, k, v)), 0.3)
        assert (out[None] - dense(q, k, v, mask_of(segments, 9, causal), 0.3)).abs().max() < 2e-6
    assert [c["window_size"] for c in calls] == [(-1, 0), (-1, -1)] and all(c["enable_gqa"] for c in calls)


# -- generation: no plan, transformers' own mask ------------------------------------------------------------------


class Prompts:
    """Three prompts of different length: text, one picture, two pictures."""

    def __init__(self, folder: Path):
        self.family = load_family(folder)
        self.model: Any = load_model(folder, torch.float32, torch.device("cpu")).eval()
        self.tokenizer = TextTokenizer(tiny.tokenizer_json())
        encoder = Encoder(self.family, self.tokenizer, lambda image: SIZES[image.path or ""], 1 << 20)
        a, b = Image(path="a"), Image(path="b")
        asks = [(Text("what?"),), (a, Text("what is in the picture, a red circle or a square?")), (b, a, Text("same?"))]
        self.prompts = [encoder.encode_prompt(Conversation((Message("user", parts),))) for parts in asks]
        self.pixels = {
            n: torch.from_numpy(np.random.default_rng(i).integers(0, 256, self.shape(n), dtype=np.uint8))
            for i, n in enumerate("ab")
        }

    def shape(self, name: str) -> tuple[int, int]:
        block = self.family.place(Image(path=name), *SIZES[name])
        return block.num_patches, 3 * self.family.pixels.patch**2

    @torch.no_grad()
    def features(self, prompts: Sequence[Any]) -> torch.Tensor | None:
        blocks = [b for p in prompts for b in p.images]
        if not blocks:
            return None
        pixels = torch.cat([self.pixels[b.image.path] for b in blocks])
        return torch.cat(self.family.encode_images(self.model, pixels, [b.grid_thw for b in blocks]))

    def greedy(self, which: Sequence[int], stop: Sequence[int] = ()) -> list[list[int]]:
        prompts = [self.prompts[i] for i in which]
        return greedy(
            self.model,
            self.family,
            prompts,
            self.features(prompts),
            stop=set(stop),
            max_new_tokens=12,
            device=torch.device("cpu"),
        )


SIZES = {"a": (90, 60), "b": (60, 150)}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def prompts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(
        tiny.make_model(tmp_path_factory.mktemp("answers") / request.param, request.param, seed=3, tie=False)
    )


def test_padded_answers_equal_single_ones(prompts: Prompts) -> None:
    alone = [prompts.greedy([i])[0] for i in range(3)]
    assert prompts.greedy([0, 1, 2]) == alone and prompts.greedy([2, 0]) == [alone[2], alone[0]]
    assert all(len(a) == 12 for a in alone) and len({tuple(a) for a in alone}) == 3


def test_answers_end_at_a_stop_token(prompts: Prompts) -> None:
    """The first of the stop tokens ends its own answer only, and is left out."""
    alone = [prompts.greedy([i])[0] for i in range(3)]
    stop = alone[1][5]
    assert prompts.greedy([0, 1, 2], [stop]) == [a[: a.index(stop)] if stop in a else a for a in alone]


@torch.no_grad()
def test_answers_equal_those_of_transformers(prompts: Prompts) -> None:
    """`generate` of the same model, and greedy choice by recomputing the whole text for every token."""
    for i, prompt in enumerate(prompts.prompts):
        ours = prompts.greedy([i])[0]
        ids = torch.from_numpy(prompt.ids_L)[None].long()
        kinds = torch.from_numpy(prompt.kind_L)[None].int()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        if prompt.images:
            pixels = torch.cat([prompts.pixels[b.image.path or ""] for b in prompt.images])
            inputs["pixel_values"] = prompts.family.normalise(pixels)
            inputs["image_grid_thw"] = torch.tensor([b.grid_thw for b in prompt.images])
        theirs = prompts.model.generate(
            **inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        assert ours == theirs[0, ids.shape[1] :].tolist()
        for token in ours:
            logits = prompts.model(**inputs, use_cache=False).logits[0, -1]
            assert logits.argmax().item() == token
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.cat(
                [inputs["mm_token_type_ids"], torch.zeros(1, 1, dtype=torch.int32)], dim=1
            )
