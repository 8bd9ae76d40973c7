"""Runs with adapters, and the weights that they amount to: in the training process, and in stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runs
import torch

from lensmith.checkpoint.inspect import inspect
from lensmith.engine.state import read_state
from lensmith.model.lora import peft_is_quiet, unwrapped
from lensmith.recipe.build import Built, build
from lensmith.recipe.export import export
from lensmith.recipe.prepare import prepare
from lensmith.recipe.run import Located
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
EXACT = 1e-5
RATE = {"kind": "adamw", "lr": 0.01}


def lora(**options: Any) -> dict[str, Any]:
    return {"kind": "lora", "rank": 4, **options}


def located(folder: Path, base: Path, data: Path, /, **over: Any) -> Located:
    return runs.located(folder, base, data, **({"optimizer": RATE} | over))


def last(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def live(run: Located, checkpoint: Path | None = None) -> Built:
    """The run's objects as they are at its start, or in a checkpoint."""
    built = build(prepare(run, QUIET))
    if checkpoint is not None:
        read_state(checkpoint / "state", built.optimizer)
    return built


def merged_state(built: Built) -> dict[str, torch.Tensor]:
    """Every weight with its adapter in it."""
    return {n: t.detach().clone() for n, t in unwrapped(built.tuned.peft).state_dict().items()}


def stock(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def stock_state(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """The same through stock transformers and PEFT, from the base on disk; adapters are merged in order."""
    from peft import PeftModel

    model = stock(base)
    for folder in adapters:
        with peft_is_quiet():
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[operator]
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((t.float() - other[n].float()).abs().max()) for n, t in one.items())


def trained(folder: Path, base: Path, data: Path, **over: Any) -> tuple[Any, Path]:
    """(run, its last checkpoint)."""
    run = located(folder, base, data, **over)
    runs.quiet_train(run)
    return run, last(folder)


def as_published(folder: Path, base: Path, data: Path, **over: Any) -> tuple[dict[str, torch.Tensor], Path]:
    """The weights of a trained run; its adapter amounts to the same on the original base, in stock PEFT and merged."""
    run, checkpoint = trained(folder, base, data, **over)
    weights = merged_state(live(run, checkpoint))
    assert gap(weights, stock_state(base, checkpoint / "model")) < EXACT
    out = export(folder, folder / "merged", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert gap(weights, stock_state(out)) < EXACT
    assert gap(weights, stock_state(base)) > 1e-3
    assert [f for f in inspect(checkpoint / "model").findings if f.severity == "error"] == []
    return weights, checkpoint / "model"


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoint -> its training state."""
    from safetensors.torch import load_file

    found = sorted((folder / "checkpoints").glob("step-*"))
    return {path.name: load_file(path / "state" / "training.safetensors") for path in found}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def resumed(folder: Path, base: Path, data: Path, steps: int, at: int, /, **over: Any) -> bool:
    """Whether a run that stopped after `at` steps and went on ends in the bits of one that did not."""
    train = over.pop("train", {})
    save = {"every_steps": at, "keep_last": 9}
    whole = located(folder / "whole", base, data, save=save, train={**train, "max_steps": steps}, **over)
    runs.quiet_train(whole)
    for number in (at, steps):
        runs.quiet_train(located(folder / "cut", base, data, save=save, train={**train, "max_steps": number}, **over))
    a, b = states(folder / "whole"), states(folder / "cut")
    return same_bits(a[f"step-{steps:08d}"], b[f"step-{steps:08d}"])
