"""Preference training on two ranks gives what one rank gives, with every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import preference_kit
import pytest
from ranks_kit import gradients, losses, recorded, train_all
from runs import located, quiet_train
from tiny import make_model

from lensmith.recipe.run import Located

STEPS = 5
ENGINES: dict[str, Any] = {
    "local": "local",
    "fsdp2": {"kind": "fsdp2"},
    "zero2": {"kind": "deepspeed", "zero": 2},
    "zero3": {"kind": "deepspeed", "zero": 3},
}
FULL, LORA = {"kind": "full"}, {"kind": "lora", "rank": 4, "parts": ["language", "projector"]}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo, full": ({"kind": "dpo", "sft_weight": 0.3}, FULL),
    "dpo, LoRA": ({"kind": "dpo"}, LORA),
    "orpo, LoRA": ({"kind": "orpo"}, LORA),
    "kto, full": ({"kind": "kto", "beta": 0.5}, FULL),
    "kto, LoRA": ({"kind": "kto", "beta": 0.5}, LORA),
    "reward, full": ({"kind": "reward"}, FULL),
    "reward, LoRA": ({"kind": "reward"}, LORA),
}
EVERY = [
    (e, r) for e in ENGINES for r in RUNS if e in ("local", "fsdp2") or r in ("dpo, LoRA", "kto, full", "reward, full")
]
REST = [
    ("local", "dpo, LoRA"), ("local", "orpo, LoRA"), ("local", "kto, LoRA"), ("local", "reward, LoRA"),
    ("fsdp2", "dpo, LoRA"), ("fsdp2", "kto, full"), ("fsdp2", "reward, LoRA"),
]  # fmt: skip
CELLS = [c for c in EVERY if c not in REST]


def cell(folder: Path, base: Path, engine: str, name: str) -> Located:
    objective, tune = RUNS[name]
    source = folder / ("labels.jsonl" if objective["kind"] == "kto" else "pairs.jsonl")
    return located(
        folder / f"{engine}-{name}" / "run", base, source, objective=objective, tune=tune,
        parallel={"engine": ENGINES.get(engine, "local")}, batch={"samples": 6, "device_tokens": 1024},
        train={"max_steps": STEPS, "clip_norm": 1.0}, data={"cache": str(folder / f"cache-{engine}")},
    )  # fmt: skip


def trained(folder: Path, cells: list[tuple[str, str]]) -> Path:
    base = make_model(folder / "model", "qwen2_5_vl")
    preference_kit.make_pairs(folder, 24)
    preference_kit.make_labelled(folder, 24)
    for name in dict.fromkeys(name for _, name in cells):
        alone = cell(folder, base, "alone", name)
        alone.output.parent.mkdir(parents=True)
        with recorded(alone.output.with_name("run-gradients-0.npz")):
            quiet_train(alone)
    runs = [cell(folder, base, *key) for key in cells]
    for run in runs:
        run.output.parent.mkdir(parents=True)
    train_all(2, folder / "pair", runs)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("grid"), CELLS)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("rest"), REST)


@pytest.mark.parametrize(("engine", "name"), [*CELLS, *(pytest.param(*c, marks=pytest.mark.slow) for c in REST)])
def test_two_ranks_are_one(request: pytest.FixtureRequest, engine: str, name: str) -> None:
    """Losses of all steps, and the gradients of the first one, where the weights are the same to the last bit."""
    folder: Path = request.getfixturevalue("grid" if (engine, name) in CELLS else "rest")
    alone, other = folder / f"alone-{name}" / "run", folder / f"{engine}-{name}" / "run"
    mine, theirs = losses(alone), losses(other)
    assert len(theirs) == STEPS and np.allclose(theirs, mine, rtol=1e-5, atol=0)
    want, found = gradients(alone), gradients(other)
    for key in set(found) - set(want):
        assert not found[key].any(), key
    for step, name_ in want:
        if step > 1:
            continue
        apart = np.linalg.norm(found[step, name_] - want[step, name_])
        # without `center` the head's bias has no gradient in exact arithmetic: held against that of its weight
        size = np.linalg.norm(want[step, name_.replace("v_head.summary.bias", "v_head.summary.weight")])
        assert apart <= 1e-5 * size + 1e-8, (step, name_, apart, size)
