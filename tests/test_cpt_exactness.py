"""Continued pretraining against a flat loop over stock transformers: documents with pictures, marks of what is trained,
documents that are cut, captions that share a picture. And what is never trained, in every family."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from lensmith.core.encoded import IGNORED, Encoded
from lensmith.data.pipeline import Pipeline
from lensmith.data.placement import Limits
from lensmith.model.tune import peft_is_quiet
from lensmith.recipe.build import build
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
LORA = {"kind": "lora", "rank": 4}
FULL = {"kind": "full"}
STEPS = 6
OPEN, CLOSE = "<trainable_text>", "</trainable_text>"
LONG = "a red circle is in the picture. there is no blue square! " * 12


def documents(folder: Path, *, video: bool = False) -> Path:
    """Text alone, text with pictures, marks, a document of several pieces with pictures in it, captions of one picture,
    a picture at the very front and at the very end."""
    names = tiny.make_pictures(folder, 4, sizes=(60, 130))
    one, two = names[:2]
    rows: list[dict[str, Any]] = [
        {"text": "only text, 中文 😀 and\n\nlines  \n"},
        {"text": "a picture <image> in the middle", "images": [one]},
        {"text": "<image>at the front and at the end<image>", "images": [one, two]},
        {"text": f"Q: <image> {OPEN}a red circle{CLOSE} not this {OPEN}<image>but this.{CLOSE}", "images": [two, one]},
        {"text": LONG + "<image>" + LONG + "<image>", "images": names[2:]},
        {"text": f"{LONG}{OPEN}{LONG}{CLOSE} and no more"},
        {"text": ["<image>a red circle", "<image>a blue square, yes", "<image>no"], "images": [one]},
        {"parts": [{"type": "text", "text": "context", "train": False}, {"type": "image", "image": two},
                   {"type": "text", "text": " is a square"}]},
        *({"text": f"document {n} <image>", "images": [names[n % 4]]} for n in range(6)),
    ]  # fmt: skip
    if video:
        (folder / "clip.mp4").write_bytes(tiny.make_video(8))
        rows.append({"text": "before <video> behind <image>", "videos": ["clip.mp4"], "images": [one]})
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documents(tmp_path_factory.mktemp("documents"))


# -- the flat loop ----------------------------------------------------------------------------------------------------


def plain_samples(prepared: Prepared, number: int, processor: Any) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """A sample as inputs and labels of stock transformers: pixel values of its own processor, positions made by the
    model. Branches behind a shared prefix are samples of their own there."""
    from PIL import Image

    loader, at = prepared.train.spec.build(), prepared.train.ref(number)
    sample = loader.sample(at.file, at.row)
    encoded = loader.encode(at.file, sample, at.cut)
    pictures = [Image.open(io.BytesIO(loader.bytes_of(at.file, b.image, ""))).convert("RGB") for b in encoded.images]
    shared = {s.prefix_start: s.prefix_length for s in encoded.segments if s.prefix_length}
    for s in encoded.segments:
        before = np.arange(s.prefix_start, s.prefix_start + s.prefix_length)
        own = np.arange(s.start, s.start + s.length)
        where = np.concatenate([before, own])
        trained = np.concatenate([np.zeros(len(before), bool), encoded.trained_L[own]])
        if len(own):
            trained[len(before)] = False  # the first token of a segment has no position that predicts it
        if not trained.any():
            assert s.start in shared  # what the branches share
            continue
        shown = _blocks_in(encoded, where)
        ids = torch.from_numpy(encoded.ids_L[where]).long()[None]
        inputs: dict[str, Any] = {
            "input_ids": ids, "mm_token_type_ids": torch.from_numpy(encoded.kind_L[where]).int()[None],
        }  # fmt: skip
        if shown:
            inputs |= dict(processor([pictures[i] for i in shown], return_tensors="pt"))
        yield inputs, torch.where(torch.from_numpy(trained)[None], ids, IGNORED)


def _blocks_in(encoded: Encoded, where: np.ndarray) -> list[int]:
    """The picture blocks whose tokens are at these places."""
    owner = np.full(encoded.num_tokens, -1)
    owner[encoded.kind_L != 0] = np.repeat(np.arange(len(encoded.images)), [b.num_tokens for b in encoded.images])
    found = owner[where]
    return list(dict.fromkeys(found[found >= 0].tolist()))


def plain_loop(run: Any, folder: Path, tune: dict[str, Any], steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the trained parameters by name: one sample at a time, token-weighted by source, torch's AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    prepared = prepare(run, QUIET)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if tune["kind"] == "lora":
        target = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        with peft_is_quiet():
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=target, task_type="CAUSAL_LM"))
    model.train()
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    named = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=0.0)
    weights, sources, losses = prepared.train.source_weights, prepared.train.column("source"), []
    for step in prepared.plan.steps():
        batch = [
            (inputs, labels[0, 1:], float(weights[sources[m]]))
            for m in step.members.tolist()
            for inputs, labels in plain_samples(prepared, m, processor)
        ]
        count = sum(w * int((labels != IGNORED).sum()) for _, labels, w in batch)
        total = 0.0
        for inputs, labels, weight in batch:
            logits = model(**inputs).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            (loss * weight / count).backward()
            total += float(loss.detach()) * weight / count
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if len(losses) == steps:
            return losses, {n: p.detach() for n, p in named.items()}
    raise AssertionError("the plan ended early")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("tune", [FULL, LORA], ids=["full", "lora"])
def test_continued_pretraining_equals_a_flat_loop(
    tmp_path: Path, qwen25: Path, source: Path, tune: dict[str, Any], packing: bool
) -> None:
    """Each step's loss within 1e-5; where the weights end within 1e-4 of the way they moved."""
    run = runs.located(
        tmp_path / "run", qwen25, source, tune=tune, batch={"samples": 6, "packing": packing},
        data={"max_tokens": 160, "documents": {"overlap": 16}, "max_dropped": 0.2}, train={"max_steps": STEPS},
    )  # fmt: skip
    prepared = prepare(run, QUIET)
    cut = [prepared.train.ref(n).cut for n in range(len(prepared.train.trainable))]
    assert sum(c is not None for c in cut) >= 4 and any(c is not None and c.context == 16 for c in cut)
    start = {n: p.detach().clone() for n, p in build(prepared).optimizer.named}
    ours = runs.quiet_train(run).summary
    losses, ended = plain_loop(run, qwen25, tune, STEPS)
    assert np.abs(np.array(ours["losses"]) - losses).max() <= 1e-5
    found = load_file(Path(ours["checkpoint"]) / "state/training.safetensors")
    assert {f"param/{n}" for n in ended} == {k for k in found if k.startswith("param/")}
    moved = np.sqrt(sum(float((ended[n] - start[n]).square().sum()) for n in start))
    gap = np.sqrt(sum(float((found[f"param/{n}"] - ended[n]).square().sum()) for n in start))
    assert moved > 0.01 and gap / moved <= 1e-4, gap / moved


def test_pieces_are_the_tokens_of_the_whole_text(tmp_path: Path, qwen25: Path, source: Path) -> None:
    """Put together, less what a piece repeats, they are what transformers' tokenizer makes of the document."""
    from transformers import AutoTokenizer

    data = {"max_tokens": 160, "documents": {"overlap": 16}, "max_dropped": 0.2}
    train = prepare(runs.located(tmp_path / "run", qwen25, source, data=data), QUIET).read
    loader, tokenizer = train.spec.build(), AutoTokenizer.from_pretrained(qwen25)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    found: dict[int, list[int]] = {}
    blocks: dict[int, list[int]] = {}
    for number in range(train.num_rows):
        at = train.row_ref(number)
        if "context" in json.dumps(rows[at.row.number]) or isinstance(rows[at.row.number]["text"], list):
            continue
        encoder = loader.encoder(at.file, "")
        sample = loader.sample(at.file, at.row)
        pieces = [e for cut, e in encoder.pieces(sample) if cut == at.cut]
        ids = pieces[0].ids_L if isinstance(pieces[0], Encoded) else _untrained(encoder, sample, at.cut)
        found.setdefault(at.row.number, []).extend(ids[at.cut.context if at.cut else 0 :].tolist())
        blocks.setdefault(at.row.number, []).extend(b.num_tokens for b in getattr(pieces[0], "images", ()))
    assert len(found) == 12
    for number, ids in found.items():
        text = rows[number]["text"].replace(OPEN, "").replace(CLOSE, "")
        for count in blocks[number]:
            text = text.replace("<image>", f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>", 1)
        assert ids == tokenizer(text + "<|endoftext|>").input_ids, number


def _untrained(encoder: Any, sample: Any, cut: Any) -> np.ndarray:
    """The tokens of a piece without a target."""
    units = [encoder._tokens(unit) for unit in encoder._units(sample.content)]
    return encoder._cut(units, cut).ids_L


# -- what is never trained --------------------------------------------------------------------------------------------

NEVER = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|im_start|>")


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_media_and_its_marks_are_never_trained(tmp_path: Path, model_type: str) -> None:
    """Over documents and conversations, whole and cut: in samples and in packed rows. There is no padding at all."""
    base = tiny.make_model(tmp_path / "base", model_type)
    docs = documents(tmp_path / "data", video=True)
    chat = tiny.make_chat(tmp_path / "data", 8, text_only=0.0)
    run = runs.located(
        tmp_path / "run", base, docs, batch={"samples": 8},
        data={"train": [str(docs), str(chat)], "max_tokens": 160, "documents": {"overlap": 16}, "max_dropped": 0.2},
    )  # fmt: skip
    prepared = prepare(run, QUIET)
    assert set(prepared.read.counts()["by_reason"]) == {"NO_TARGETS"}  # a piece before the first mark
    never = np.array([tiny.token_id(name) for name in NEVER])
    loader, shown = prepared.train.spec.build(), set()
    for number in range(len(prepared.train.trainable)):
        at = prepared.train.ref(number)
        encoded = loader.encode(at.file, loader.sample(at.file, at.row), at.cut)
        assert not encoded.trained_L[encoded.kind_L != 0].any()
        assert not np.isin(encoded.ids_L[encoded.trained_L], never).any()
        assert not encoded.trained_L[: at.cut.context if at.cut else 0].any()
        shown |= set(encoded.ids_L[np.isin(encoded.ids_L, never)].tolist())
    assert {tiny.token_id(n) for n in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")} <= shown
    tokens, total = prepared.train.column("tokens"), 0
    for data in Pipeline(prepared.train, prepared.plan, Limits(512)).steps():
        for row in data.rows:
            assert not np.isin(row.target_S, never).any()
            assert len(row.ids_T) == sum(int(tokens[m]) for m in row.members)  # nothing but the samples: no padding
            assert np.array_equal(row.target_S, row.ids_T[row.supervised_S + 1])
            total += len(row.target_S)
        if data.step.number == 3:
            break
    assert total > 300
