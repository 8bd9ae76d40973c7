"""A family beside transformers' own processor and model over one folder, and checks of what every family promises.

The processor is called with a conversation's text and pictures, so tokens, pixels and token types are the vendor's.
Conversations and rows are those of `test_family_qwen.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_family_qwen import (
    KeepLogits,
    gradients,
    hidden_of,
    own_slices,
    pictures_of,
    relative_gap,
    root_of,
    row_of,
    vendor_messages,
)

from lensmith.checkpoint.export import SavedTypes, write_model
from lensmith.core.encoded import IGNORED, IMAGE, Encoded
from lensmith.core.sample import Conversation, Sample
from lensmith.data.encode import Encoder
from lensmith.data.load import Loader, LoaderSpec
from lensmith.data.media import ImageLimits
from lensmith.data.tokenizer import TextTokenizer
from lensmith.evaluate.generate import greedy
from lensmith.family.registry import load_family
from lensmith.model.load import load_model
from lensmith.model.options import Freeze, Full, Lora
from lensmith.model.tune import apply

GAP = 1e-5
"""Largest difference of hidden states and losses (values of size 1) allowed in float32."""


@dataclass
class Kit:
    folder: Path
    family: Any
    loader: Loader
    model: Any
    stock: Any
    processor: Any
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the vendor's processor is called with beside text and pictures."""

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.loader.tokenizer

    def encoder(self) -> Encoder:
        return self.loader.encoder(0, "test")

    def encode(self, *conversations: Conversation) -> Encoded:
        return self.encoder().encode(Sample("test", conversations))

    def trained(self, *conversations: Conversation) -> str:
        """The text of all trained tokens."""
        encoded = self.encode(*conversations)
        return self.tokenizer.decode(encoded.ids_L[encoded.trained_L].tolist())

    def vendor_inputs(self, conversation: Conversation, *, ask: bool = False) -> dict[str, torch.Tensor]:
        """What transformers' processor gives the model."""
        text = self.processor.apply_chat_template(
            vendor_messages(conversation), tokenize=False, add_generation_prompt=ask
        )
        options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False, **self.options}
        return dict(self.processor(images=pictures_of(conversation) or None, text=text, **options))


def make_kit(folder: Path, processor: Any, **options: Any) -> Kit:
    from transformers import AutoModelForImageTextToText

    family = load_family(folder)
    tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    spec = LoaderSpec((), family, tokenizer_json, (), ImageLimits(), 1 << 20, "drop", 1 << 20)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    model = load_model(folder, torch.float32, torch.device("cpu"), family.loading).eval()
    return Kit(folder, family, spec.build(), model, stock, processor, options)


@torch.no_grad()
def packed_gaps(kit: Kit, conversations: Sequence[Conversation]) -> dict[str, float]:
    """One packed row of all conversations against the stock model's own forward on what the vendor's processor gives:
    largest difference of hidden states and logits, and that of the mean loss; targets must be the vendor's tokens."""
    samples = [kit.encode(c) for c in conversations]
    row = row_of(kit, samples)  # type: ignore[arg-type]
    assert row.num_tokens == sum(s.num_tokens for s in samples) and not row.dropped
    objective = KeepLogits()
    total = root_of(kit, objective)(row)["loss"]  # type: ignore[arg-type]
    hidden, logits = hidden_of(kit, row), objective.logits_SV  # type: ignore[arg-type]
    at, seen, theirs_total = 0, 0, 0.0
    worst = {"hidden": 0.0, "logits": 0.0}
    for conversation, sample in zip(conversations, samples, strict=True):
        inputs = kit.vendor_inputs(conversation)
        assert sample.ids_L.tolist() == inputs["input_ids"][0].tolist()
        theirs = kit.stock.model(**inputs).last_hidden_state[0]
        worst["hidden"] = max(worst["hidden"], (hidden[at : at + sample.num_tokens] - theirs).abs().max().item())
        supervised = np.flatnonzero(sample.target_L != IGNORED)
        n = len(supervised)
        own = kit.stock.lm_head(theirs[supervised])
        target = inputs["input_ids"][0, supervised + 1]
        worst["logits"] = max(worst["logits"], (logits[seen : seen + n] - own).abs().max().item())
        assert row.target_S[seen : seen + n].tolist() == target.tolist()
        theirs_total += torch.nn.functional.cross_entropy(own, target, reduction="sum").item()
        at, seen = at + sample.num_tokens, seen + n
    assert seen == len(row.supervised_S)
    return worst | {"loss": abs(total[0].item() - theirs_total) / seen}


@torch.no_grad()
def branches_gap(kit: Kit, conversations: Sequence[Conversation], other: Conversation) -> float:
    """Branches behind what they share, beside another sample, against each of them through the stock model."""
    joined, alone = kit.encode(*conversations), [kit.encode(c) for c in conversations]
    row = row_of(kit, [kit.encode(other), joined])  # type: ignore[arg-type]
    hidden = hidden_of(kit, row)[-joined.num_tokens :]  # type: ignore[arg-type]
    shared, own = own_slices(joined, len(alone))
    worst = 0.0
    for conversation, branch, place in zip(conversations, alone, own, strict=True):
        theirs = kit.stock.model(**kit.vendor_inputs(conversation)).last_hidden_state[0]
        assert joined.target_L[place].tolist() == branch.target_L[shared:].tolist()
        both = torch.cat([hidden[:shared], hidden[place]])
        worst = max(worst, (both - theirs).abs().max().item())
    return worst


def gradient_gap(kit: Kit, groups: Sequence[Sequence[Conversation]]) -> float:
    """Largest relative difference, over tensors, of a packed row's gradient (each group as branches) and the stock
    model's, one conversation at a time."""
    kit.model.requires_grad_(True)
    kit.model.train()
    joined = [kit.encode(*group) for group in groups]
    loss, ours = gradients(kit, [row_of(kit, joined)])  # type: ignore[arg-type]
    kit.model.eval()
    kit.stock.zero_grad()
    total = 0.0
    for conversation in (c for group in groups for c in group):
        labels = torch.from_numpy(kit.encode(conversation).target_L.astype(np.int64))
        logits = kit.stock(**kit.vendor_inputs(conversation)).logits[0]
        own = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        own.backward()
        total += own.item()
    theirs = {n: p.grad.clone() for n, p in kit.stock.named_parameters() if p.grad is not None}
    kit.stock.zero_grad()
    assert loss == pytest.approx(total, rel=1e-6)
    assert len(ours) == len(list(kit.model.named_parameters()))
    return relative_gap(ours, theirs)


@torch.no_grad()
def greedy_equals_generate(kit: Kit, conversations: Sequence[Conversation], new_tokens: int = 8) -> list[list[int]]:
    """Greedy answers of a padded batch, checked to be those of transformers' `generate` for each prompt alone."""
    prompts = [kit.encoder().encode_prompt(c) for c in conversations]
    row = row_of(kit, prompts)  # type: ignore[arg-type]
    stop = {kit.tokenizer.control(kit.family.turn_end)}
    features = root_of(kit).features(row)  # type: ignore[arg-type]
    ours = greedy(
        kit.model, kit.family, prompts, features, stop=stop, max_new_tokens=new_tokens, device=torch.device("cpu")
    )
    for conversation, answer in zip(conversations, ours, strict=True):
        inputs = kit.vendor_inputs(conversation, ask=True)
        out = kit.stock.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(stop))
        theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == (theirs[:-1] if theirs[-1] in stop else theirs)
    return ours


@torch.no_grad()
def saved_equals_stock(kit: Kit, conversation: Conversation, folder: Path) -> None:
    """What is saved loads with stock transformers, gives the same logits, and is the same family again."""
    from transformers import AutoModelForImageTextToText

    write_model(folder, kit.model, kit.folder, SavedTypes.all(torch.float32))
    again, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = kit.vendor_inputs(conversation)
    assert torch.equal(again.eval()(**inputs).logits, kit.stock(**inputs).logits)
    before, after = (json.loads((f / "config.json").read_text()) for f in (kit.folder, folder))
    assert before["architectures"] == after["architectures"] and before["model_type"] == after["model_type"]
    assert load_family(folder) == kit.family


def what_trains(folder: Path, family: Any, tune: Full | Freeze | Lora) -> set[str]:
    """Names of the parameters that train under `tune`, of a fresh model."""
    model = load_model(folder, torch.float32, torch.device("cpu"), family.loading)
    return {n for n, _ in apply(model, tune, family).trainable()}


def image_tokens_are_never_trained(encoded: Encoded) -> bool:
    return not encoded.trained_L[encoded.kind_L == IMAGE].any()
