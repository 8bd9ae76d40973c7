"""Supervised fine-tuning of Qwen2.5-VL without abstractions: one file, one sample at a time, one loop.

It does what `lensmith train` does for a run of `next_token` on plain conversations, and gives the same losses
(tests/test_flat_sft.py). Read it first: what lensmith adds around these lines makes them safe and fast.

    python examples/flat_sft.py MODEL data.jsonl --steps 100 --samples 16 --lr 1e-4 --lora 8 --output tuned

A row of data.jsonl: {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant",
"content": "A cat."}], "images": ["cat.png"]}. Picture paths count from the data file. Not here: packing, the vision
cache, verdicts for bad rows, tools, resume, half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

DEFAULT_SYSTEM = "You are a helpful assistant."  # what the model's chat template puts in front
IMAGE_TOKEN = "<|image_pad|>"
IGNORED = -100
LANGUAGE_LINEAR = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "preprocessor_config.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


# --- a row as tokens and labels ---------------------------------------------------------------------------------------


def render(row: dict[str, Any], image_tokens: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation in Qwen's chat form, and the character ranges that are trained.

    Trained: what the assistant says and the `<|im_end|>` behind it. `image_tokens`: tokens of each picture, in order.
    """
    counts = iter(image_tokens)
    messages = row["messages"]
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    text, trained = "", []
    for message in messages:
        content = message["content"]
        if re.search(r"<\|\w+\|>", content):
            raise SystemExit(f"a control token is written in the data: {content[:80]!r}")  # lensmith keeps it as text
        content = re.sub("<image>", lambda _: f"<|vision_start|>{IMAGE_TOKEN * next(counts)}<|vision_end|>", content)
        text += f"<|im_start|>{message['role']}\n"
        begin = len(text)
        text += f"{content}<|im_end|>"
        if message["role"] == "assistant":
            trained.append((begin, len(text)))
        text += "\n"
    assert next(counts, None) is None, "fewer <image> marks than pictures"
    return text, trained


def tokenise(tokenizer: Tokenizer, text: str, trained: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels [1, L]. The text is tokenised whole, because tokens merge across the border of template and
    content ("assistant\\n" before an answer that begins with a line feed); a token is trained where its first
    character is."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = torch.tensor([encoding.ids])
    starts = [begin for begin, _ in encoding.offsets]
    inside = torch.tensor([[any(a <= start < b for a, b in trained) for start in starts]])
    inside &= ids != tokenizer.token_to_id(IMAGE_TOKEN)
    return ids, torch.where(inside, ids, IGNORED)


def load(
    row: dict[str, Any], folder: Path, tokenizer: Tokenizer, processor: Any
) -> tuple[dict[str, Any], torch.Tensor]:
    """Model inputs and labels of one row."""
    inputs: dict[str, Any] = {}
    image_tokens: list[int] = []
    if row.get("images"):
        pictures = [ImageOps.exif_transpose(Image.open(folder / name)).convert("RGB") for name in row["images"]]
        inputs = dict(processor(pictures, return_tensors="pt"))
        image_tokens = (inputs["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist()
    ids, labels = tokenise(tokenizer, *render(row, image_tokens))
    # Without mm_token_type_ids transformers falls back to one-dimensional positions without a word.
    kinds = (ids == tokenizer.token_to_id(IMAGE_TOKEN)).int()
    return {**inputs, "input_ids": ids, "mm_token_type_ids": kinds}, labels


# --- which samples, at which rate -------------------------------------------------------------------------------------


def stream(count: int, seed: int) -> Iterator[int]:
    """Epoch after epoch without end, each its own permutation. A step takes the next samples; what an epoch has left
    opens the next one's first step (lensmith's `batch.partial: carry`)."""
    epoch = 0
    while True:
        yield from np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count).tolist()
        epoch += 1


def cosine(step: int, steps: int, warmup: float = 0.03) -> float:
    """Share of the peak rate: linear warm-up that does not waste the first update, then half a cosine to zero."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(
    model_folder: Path, data_file: Path, output: Path | None, *, steps: int, samples: int, lr: float, lora: int = 0,
    seed: int = 0, clip_norm: float = 1.0,
) -> list[float]:  # fmt: skip
    """Losses of every step. `lora` is the rank of the adapters; 0 trains every parameter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [json.loads(line) for line in data_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    processor = Qwen2VLImageProcessorPil.from_pretrained(model_folder)
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    model = model.to(device)  # type: ignore[arg-type]
    if lora:
        from peft import LoraConfig, get_peft_model

        # A full pattern: the vision tower has layers called gate_proj, up_proj and down_proj too.
        config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=LANGUAGE_LINEAR, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    order, losses = stream(len(rows), seed), []
    for step in range(steps):
        batch = [load(rows[next(order)], data_file.parent, tokenizer, processor) for _ in range(samples)]
        # The mean over the supervised tokens of the whole step, not the mean of the samples' means: the count must be
        # known before the first backward pass. Position i predicts token i + 1; this is where labels are shifted.
        count = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batch)
        loss_sum = 0.0
        for inputs, labels in batch:
            logits = model(**{k: v.to(device) for k, v in inputs.items()}).logits[0, :-1].float()
            loss = F.cross_entropy(logits, labels[0, 1:].to(device), ignore_index=IGNORED, reduction="sum")
            (loss / count).backward()
            loss_sum += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / count)
        print(f"step {step + 1}/{steps}  loss {losses[-1]:.4f}  lr {optimizer.param_groups[0]['lr']:.2e}", flush=True)
    if output is not None:
        save(model, model_folder, output)
    return losses


def save(model: Any, model_folder: Path, output: Path) -> None:
    """An adapter folder for PEFT or a model folder for transformers, in float32, with what belongs to the model."""
    model.save_pretrained(output)
    for name in CARRIED:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Qwen2.5-VL model")
    parser.add_argument("data", type=Path, help="JSON lines with messages and images")
    parser.add_argument("--output", type=Path, default=Path("tuned"), help="new folder for the result")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--samples", type=int, default=16, help="samples of one step")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank only")
    parser.add_argument("--seed", type=int, default=0, help="decides order and adapters")
    a = parser.parse_args()
    train(a.model, a.data, a.output, steps=a.steps, samples=a.samples, lr=a.lr, lora=a.lora, seed=a.seed)


if __name__ == "__main__":
    main()
