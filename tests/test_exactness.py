"""Trajectories that must coincide: packed = unpacked = one at a time = a plain loop; resumed = uninterrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from lensmith.core.encoded import IGNORED
from lensmith.data.pipeline import Pipeline
from lensmith.data.placement import Limits
from lensmith.engine.step import run_step
from lensmith.model.tune import peft_is_quiet
from lensmith.recipe.build import build
from lensmith.recipe.prepare import prepare
from lensmith.report.terminal import Terminal

LORA = {"kind": "lora", "rank": 4}
FULL = {"kind": "full"}
LAYOUTS = {
    "packed": {"device_tokens": 4096},
    "small rows": {"device_tokens": 256},
    "one by one": {"packing": False, "device_tokens": 256},
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 conversations of unequal length, a third without pictures, pictures repeated within a step."""
    return tiny.make_chat(tmp_path_factory.mktemp("chat"), 48, pictures=10)


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = load_file(checkpoint / "state" / "training.safetensors")
    return {k.removeprefix("param/"): v for k, v in state.items() if k.startswith("param/")}


@pytest.mark.parametrize("tune", [FULL, LORA], ids=["full", "lora"])
def test_layouts_have_one_trajectory(tmp_path: Path, qwen25: Path, chat: Path, tune: dict[str, Any]) -> None:
    """20 steps at 1e-3 in float32: losses within 1e-5; the way moved within 1e-4 (the design's measure)."""
    found = {}
    for name, batch in LAYOUTS.items():
        run = runs.located(
            tmp_path / name, qwen25, chat, tune=tune, batch=batch, train={"max_steps": 20}, data={"max_tokens": 256}
        )
        out = runs.quiet_train(run)
        found[name] = (out.summary["losses"], trained(Path(out.summary["checkpoint"])))
    prepared = prepare(
        runs.located(tmp_path / "start", qwen25, chat, tune=tune, data={"max_tokens": 256}), Terminal("quiet")
    )
    start = {n: p.detach().clone() for n, p in build(prepared).optimizer.named}
    losses, weights = found["one by one"]
    moved = np.sqrt(sum(float((weights[n] - start[n]).square().sum()) for n in start))
    assert moved > 0.01
    for name in ("packed", "small rows"):
        assert np.abs(np.array(found[name][0]) - losses).max() <= 1e-5
        gap = np.sqrt(sum(float((found[name][1][n] - weights[n]).square().sum()) for n in start))
        assert gap / moved <= 1e-4, (name, gap / moved)


@pytest.mark.parametrize(
    "tune", [FULL, LORA, {"kind": "freeze", "train": ["projector", "language"]}], ids=["full", "lora", "freeze"]
)
def test_layouts_have_one_gradient(tmp_path: Path, qwen25: Path, chat: Path, tune: dict[str, Any]) -> None:
    """Gradients per tensor within 1e-5 relative, at the same weights."""
    run = runs.located(
        tmp_path / "run", qwen25, chat, tune=tune, batch={"samples": 12}, vision_cache={"enabled": False}
    )
    prepared = prepare(run, Terminal("quiet"))
    built = build(prepared)
    if tune is LORA:  # B starts at zero, which would hide errors in A's gradient
        torch.manual_seed(1)
        for name, p in built.optimizer.named:
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    gradients = {
        name: _gradient(prepared, built, Limits(b["device_tokens"] * 2, packing=b.get("packing", True)))
        for name, b in LAYOUTS.items()
    }
    alone = gradients["one by one"]
    assert set(alone) == {n for n, _ in built.optimizer.named}
    for name in ("packed", "small rows"):
        worst = max(
            float((gradients[name][n] - g).norm() / g.norm().clamp_min(1e-12))
            for n, g in alone.items()
            if g.norm() > 1e-7
        )
        assert worst <= 1e-5, (name, worst)


def _gradient(prepared: Any, built: Any, limits: Limits) -> dict[str, torch.Tensor]:
    data = next(Pipeline(prepared.train, prepared.plan, limits).steps())
    seen: dict[str, torch.Tensor] = {}

    class Keep:
        """Stands in for the optimizer: keeps the gradient instead of stepping."""

        def __getattr__(self, name: str) -> Any:
            return getattr(built.optimizer, name)

        def step(self, factor: float) -> None:
            seen.update({n: g.detach().clone() for n, g in built.optimizer.gradients()})

    run_step(built.root, data.rows, {"loss": data.num_supervised}, Keep(), built.part_of, factor=1.0, clip_norm=None)  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("tune", [FULL, LORA], ids=["full", "lora"])
def test_losses_equal_a_plain_transformers_loop(tmp_path: Path, qwen25: Path, chat: Path, tune: dict[str, Any]) -> None:
    """The same samples through stock transformers (+ PEFT), one at a time, token-weighted, torch's AdamW."""
    run = runs.located(tmp_path / "run", qwen25, chat, tune=tune, train={"max_steps": 6})
    ours = runs.quiet_train(run).summary["losses"]
    assert ours == pytest.approx(_plain_loop(run, qwen25, tune, steps=6), abs=1e-5)


def _plain_loop(run: Any, folder: Path, tune: dict[str, Any], steps: int) -> list[float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    prepared = prepare(run, Terminal("quiet"))
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if tune is LORA:
        target = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        with peft_is_quiet():
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=target, task_type="CAUSAL_LM"))
    model.train()
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    loader, losses = prepared.train.spec.build(), []
    for step in prepared.plan.steps():
        batch = [_plain_sample(loader, processor, prepared.train.ref(m)) for m in step.members.tolist()]
        count = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batch)
        total = 0.0
        for inputs, labels in batch:
            logits = model(**inputs).logits[0, :-1].float()
            loss = (
                torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum") / count
            )
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if step.number + 1 == steps:
            return losses
    raise AssertionError("the plan ended early")


def _plain_sample(loader: Any, processor: Any, at: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from PIL import Image

    sample = loader.sample(at.file, at.row)
    encoded = loader.encode(at.file, sample, at.cut)
    ids = torch.from_numpy(encoded.ids_L).long()[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": torch.from_numpy(encoded.kind_L).int()[None]}
    if encoded.images:
        paths = [loader.path(at.file, b.image.path, sample.origin) for b in encoded.images]
        pictures = [Image.open(path).convert("RGB") for path in paths]
        inputs |= dict(processor(pictures, return_tensors="pt"))
    labels = torch.where(torch.from_numpy(encoded.trained_L)[None], ids, IGNORED)
    return inputs, labels


@pytest.mark.parametrize("tune", [FULL, {**LORA, "dropout": 0.1}], ids=["full", "lora with dropout"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, qwen25: Path, chat: Path, tune: dict[str, Any]) -> None:
    """From every step of a 12-step run: same losses, same bits in parameters and moments, each step logged once."""
    over = {
        "tune": tune, "train": {"max_steps": 12, "clip_norm": 1.0}, "save": {"every_steps": 1, "keep_last": 100},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
    }  # fmt: skip
    whole = runs.quiet_train(runs.located(tmp_path / "whole", qwen25, chat, **over))
    final = Path(whole.summary["checkpoint"]) / "state" / "training.safetensors"
    for step in range(1, 12):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(
            whole.folder,
            folder,
            ignore=lambda d, names, s=step: [n for n in names if n.startswith("step-") and int(n[5:]) > s],
        )
        resumed = runs.quiet_train(runs.located(folder, qwen25, chat, **over))
        assert resumed.summary["losses"] == whole.summary["losses"]
        assert (
            Path(resumed.summary["checkpoint"]) / "state" / "training.safetensors"
        ).read_bytes() == final.read_bytes()
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines if x["kind"] == "step"] == list(range(1, 13))
        shutil.rmtree(folder)


@pytest.mark.parametrize("preset", ["fp32", "bf16", "bf16-params"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_bfloat16_base_is_saved_in_bfloat16(tmp_path: Path, chat: Path, preset: str, model_type: str) -> None:
    """Every tensor and every (sub-)config, in each precision; transformers reloads it as bfloat16 throughout."""
    from transformers import AutoModelForImageTextToText

    from lensmith.model.load import read_header

    base = tiny.make_model(tmp_path / "base", model_type, dtype=torch.bfloat16)
    run = runs.located(tmp_path / "run", base, chat, precision={"preset": preset}, train={"max_steps": 2})
    folder = Path(runs.quiet_train(run).summary["checkpoint"]) / "model"
    found = {n: e for f in folder.glob("*.safetensors") for n, e in read_header(f).items()}
    wanted = {n: e for f in base.glob("*.safetensors") for n, e in read_header(f).items()}
    assert {n: e["shape"] for n, e in found.items()} == {n: e["shape"] for n, e in wanted.items()}
    assert {e["dtype"] for e in found.values()} == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    assert [config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]] == ["bfloat16"] * 3
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.vision_config.dtype == torch.bfloat16
