"""What the tests of families share: a family over a model folder beside the stock model, packed rows, gradients."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pillow
from transformers import AutoModelForImageTextToText, AutoTokenizer

from lensmith.core.encoded import IGNORED, IMAGE, Encoded, PackedRow
from lensmith.core.sample import Conversation, Image, Message, Part, Sample, Text, ToolCall
from lensmith.data.collate import Member, load_row
from lensmith.data.encode import Encoder
from lensmith.data.load import Loader, LoaderSpec, SampleRef
from lensmith.data.media import ImageLimits
from lensmith.data.readers import RowRef
from lensmith.evaluate.generate import greedy
from lensmith.family.registry import load_family
from lensmith.model.attention import AttentionPlan
from lensmith.model.load import load_model
from lensmith.model.root import Autocast, Root, VisionMode
from lensmith.objective.next_token import NextTokenLoss

GAP = 1e-5
"""Largest difference of hidden states, logits and losses (values of size 1) in float32, and of gradients, relative."""


@dataclass
class Kit:
    """A family and transformers' own pieces over the same model folder. `processor`: of one conversation's text and
    pictures, as transformers has it."""

    folder: Path
    family: Any
    loader: Loader
    model: Any
    stock: Any
    tokenizer: Any
    processor: Any

    def encoder(self) -> Encoder:
        return self.loader.encoder(0, "test")

    def encode(self, *conversations: Conversation) -> Encoded:
        return self.encoder().encode(Sample("test", conversations))

    def trained(self, encoded: Encoded) -> str:
        return self.loader.tokenizer.decode(encoded.ids_L[encoded.trained_L].tolist())


def make_kit(folder: Path, processor: Callable[[Path, Any, Any], Any]) -> Kit:
    """`processor` makes transformers' own from the folder, the family and the tokenizer."""
    family = load_family(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = LoaderSpec((), family, (folder / "tokenizer.json").read_text("utf-8"), (), ImageLimits(), 1 << 20, "drop",
                      1 << 20)  # fmt: skip
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    model = load_model(folder, torch.float32, torch.device("cpu"), family.loading).eval()
    return Kit(folder, family, spec.build(), model, stock, tokenizer, processor(folder, family, tokenizer))


# -- conversations ------------------------------------------------------------------------------------------------


def picture(width: int, height: int, seed: int = 0, *, noise: bool = False) -> Image:
    """A PNG of smooth or of plain noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height, width, 3) if noise else (5, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    pillow.fromarray(small).resize((width, height), pillow.Resampling.BICUBIC).save(out, "PNG")
    return Image(data=out.getvalue())


def opened(image: Image) -> pillow.Image:
    assert image.data is not None
    return pillow.open(io.BytesIO(image.data)).convert("RGB")


Content = str | Image | list[str | Image]


def message(role: Any, content: Content, calls: Sequence[ToolCall] = ()) -> Message:
    items = content if isinstance(content, list) else [content]
    parts: list[Part] = [Text(i) if isinstance(i, str) else i for i in items]
    return Message(role, tuple(parts), tuple(calls))


def chat(*turns: tuple[Any, ...], tools: tuple[str, ...] = ()) -> Conversation:
    return Conversation(tuple(message(*t) for t in turns), tools)


def pictures_of(conversation: Conversation) -> list[pillow.Image]:
    return [opened(i) for i in Sample("test", (conversation,)).images()]


# -- rows ---------------------------------------------------------------------------------------------------------


def row_of(kit: Kit, samples: Sequence[Encoded]) -> PackedRow:
    members = [Member(i, SampleRef(0, RowRef(i, i + 1, 0, 0))) for i in range(len(samples))]
    return load_row(kit.loader, members, {}, lambda m: (f"test:{m.number}", samples[m.number]))


def root_of(kit: Kit, cache: Any = None) -> Root:
    return Root(kit.model, kit.family, NextTokenLoss(), autocast=Autocast("cpu", None), cache=cache)


def hidden_of(kit: Kit, row: PackedRow) -> torch.Tensor:
    """[T, H] of every token of a packed row."""
    out = kit.family.hidden(
        kit.model, torch.from_numpy(row.ids_T)[None].long(), root_of(kit).features(row),
        torch.from_numpy(row.kind_T == IMAGE)[None],
        torch.from_numpy(row.position_ids_3T)[:, None].long(), attention_mask=None, use_cache=False,
        attention_plans={None: AttentionPlan(row.segments, row.num_tokens, causal=True)},
    )  # fmt: skip
    return out.last_hidden_state[0]


def labels_of(sample: Encoded) -> torch.Tensor:
    """[1, L] for transformers, which shifts them."""
    return torch.from_numpy(np.where(sample.trained_L, sample.ids_L, IGNORED))[None].long()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest per-tensor |difference| / |reference|. The bias of a key projection has no gradient in exact arithmetic,
    so it is held against that of its weight."""
    assert ours.keys() == theirs.keys()

    def size(name: str) -> torch.Tensor:
        return theirs[name.replace("k_proj.bias", "k_proj.weight")].norm()

    return max(((ours[n] - g).norm() / size(n)).item() for n, g in theirs.items())


def stock_gradients(kit: Kit, alone: Sequence[tuple[Encoded, dict[str, Any]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss over supervised tokens and its gradient by transformers, one sample with its inputs at a time."""
    total = 0.0
    for sample, inputs in alone:
        loss = kit.stock(**inputs, labels=labels_of(sample), use_cache=False).loss * sample.num_supervised
        loss.backward()
        total += loss.item()
    return total, gradients(kit.stock)


def packed_gradients(kit: Kit, rows: Sequence[PackedRow]) -> tuple[float, dict[str, torch.Tensor]]:
    kit.model.requires_grad_(True).train()
    total = 0.0
    for row in rows:
        loss, _ = root_of(kit)(row)["loss"]
        loss.backward()
        total += loss.item()
    kit.model.eval()
    return total, gradients(kit.model)


def set_mode(kit: Kit, mode: VisionMode) -> None:
    trains = {"trained": {"vision", "projector", "language"}, "projector": {"projector", "language"},
              "frozen": {"language"}}[mode]  # fmt: skip
    for name, p in kit.model.named_parameters():
        p.requires_grad_(kit.family.part_of(name) in trains)


def answers(kit: Kit, prompts: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
    """Greedy ids of a batch of prompts."""
    row = row_of(kit, prompts)
    with torch.no_grad():
        features = root_of(kit).features(row)
    stop = {kit.loader.tokenizer.control(kit.family.turn_end)}
    return greedy(
        kit.model, kit.family, prompts, features, stop=stop, max_new_tokens=max_new_tokens, device=torch.device("cpu")
    )
