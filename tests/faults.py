"""Faults planted into real runs of tiny models: where, when, and what the guard must find."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import all_families
import numpy as np
import pytest
import runs
import torch
from PIL import Image
from torch import nn

from lensmith.data.load import content_key
from lensmith.engine import loop as loop_module
from lensmith.engine.step import run_step
from lensmith.recipe import stage
from lensmith.recipe.build import build

AT = 4
"""The step of a planted fault, from 1."""
WHITE = 5
"""The sample whose picture is white."""


@dataclass(frozen=True)
class Places:
    """Modules of a family's tiny model. `white`: less than every normalised value of a white picture, and more than the
    darkest of any other patch."""

    white: float
    mlp: str
    down: str
    head_norm: str
    tower: str
    """Called with normalised pixels first."""
    patches: str
    """The first module of the tower."""
    first: str
    """The first module that gets features beside embedded text."""


FAMILIES: dict[str, Places] = {
    "qwen2_5_vl": Places(
        1.9, "model.language_model.layers.1.mlp", "model.language_model.layers.1.mlp.down_proj",
        "model.language_model.norm", "model.visual", "model.visual.patch_embed.proj",
        "model.language_model.layers.0.input_layernorm",
    ),
    "minicpmv": Places(
        0.97, "llm.model.layers.1.mlp", "llm.model.layers.1.mlp.down_proj", "llm.model.norm",
        "vpm", "vpm.patch_embed", "llm.model.layers.0.input_layernorm",
    ),
}  # fmt: skip


def make_base(folder: Path, family: str) -> Path:
    return all_families.make(folder / family, family)


def make_data(folder: Path, count: int = 24) -> Path:
    """Conversations about a picture of their own each, all of one size; that of sample `WHITE` is white."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(count):
        pixels = np.full((56, 56, 3), 255, np.uint8) if n == WHITE else rng.integers(0, 250, (56, 56, 3), np.uint8)
        name = "white.png" if n == WHITE else f"images/{n}.png"
        Image.fromarray(pixels).save(folder / name)
        turns = [{"role": "user", "content": "<image>what is this?"}, {"role": "assistant", "content": f"a square {n}"}]
        rows.append({"messages": turns, "images": [name]})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def make_answers(folder: Path, kind: str) -> Path:
    """The same pictures with `pairs` of answers or labelled ones (`labels`)."""
    path = make_data(folder)
    rows = []
    for n, row in enumerate(map(json.loads, path.read_text(encoding="utf-8").splitlines())):
        user, answer = row["messages"]
        said = {"messages": [user], "chosen": answer["content"], "rejected": f"no {answer['content']}"}
        label = {"prompt": [user], "completion": [answer], "label": n % 3 != 0}
        rows.append((said if kind == "pairs" else label) | {"images": row["images"]})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@dataclass
class Live:
    """A run while a fault is planted. `step`: the step in work, from 1; `first`: its first computation, no re-run."""

    places: Places
    data: Path
    step: int = 0
    first: bool = False
    built: Any = None
    done: set[str] = field(default_factory=set)

    @property
    def model(self) -> nn.Module:
        return self.built.root.model

    def parameter(self, module: str) -> nn.Parameter:
        return self.model.get_submodule(module).get_parameter("weight")

    def once(self, what: str) -> bool:
        """True the first time it is asked."""
        new = what not in self.done
        self.done.add(what)
        return new


Plant = Callable[[Live], None]


def plant(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    data: Path,
    *,
    at_build: Plant | None = None,
    before_step: Plant | None = None,
    after_step: Plant | None = None,
) -> Live:
    """`at_build`: into the model, also that of a replay; the others around every step's first computation."""
    live = Live(FAMILIES[family], data.parent)

    def built(prepared: Any, **kwargs: Any) -> Any:
        live.built = build(prepared, **kwargs)
        if at_build is not None:
            at_build(live)
        return live.built

    def counted(root: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        if before_step is not None:
            before_step(live)
        live.first = True
        result = run_step(root, rows, *args, **kwargs)
        live.first = False
        return result

    log = stage.StageRun._log

    def logged(self: Any, p: Any, *args: Any) -> None:
        log(self, p, *args)
        if after_step is not None:
            after_step(live)

    one = loop_module.Loop._one

    def stepped(self: Any, data: Any) -> bool:
        live.step = data.step.number + 1
        return one(self, data)

    monkeypatch.setattr(stage, "build", built)
    monkeypatch.setattr("lensmith.recipe.build.build", built)
    monkeypatch.setattr(loop_module, "run_step", counted)
    monkeypatch.setattr(stage.StageRun, "_log", logged)
    monkeypatch.setattr(loop_module.Loop, "_one", stepped)
    return live


# -- the faults -------------------------------------------------------------------------------------------------------


def nan_weight(live: Live) -> None:
    """F48: one element of one weight, once, before the step."""
    if live.step == AT and live.once("nan"):
        live.parameter(live.places.down).data[1, 2] = math.nan


def huge_weight(live: Live) -> None:
    """F49: finite weights whose product with a finite input is not."""
    if live.step == AT and live.once("huge"):
        weight = live.parameter(live.places.down).data
        weight.copy_(weight.sign() * 3e38)


def nan_pixel(live: Live) -> None:
    """F50: one value of the white picture, on its way into the tower."""

    def spoil(module: nn.Module, args: Any) -> Any:
        values = args[0].clone()
        flat = values.flatten(1)
        flat[flat.min(1).values > live.places.white, 0] = math.nan
        return (flat.view_as(values), *args[1:])

    live.model.get_submodule(live.places.tower).register_forward_pre_hook(spoil)


def bad_backward(live: Live) -> None:
    """F51: the square root of zero has no derivative; forward it adds nothing."""
    mlp: Any = live.model.get_submodule(live.places.mlp)
    plain = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = plain(x)
        return out + torch.sqrt(out - out) if live.step in (AT, 0) else out

    mlp.forward = forward


def inf_gradient(live: Live) -> None:
    """F54: the gradient of one weight alone."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.inf) if live.step in (AT, 0) else gradient

    live.parameter(live.places.head_norm).register_hook(spoil)


def overflow(live: Live) -> None:
    """F55: the gradient of one weight is infinite in every step, whatever the loss scale."""
    live.parameter(live.places.head_norm).register_hook(lambda g: torch.full_like(g, math.inf))


def transient(live: Live) -> None:
    """F57: a gradient that is NaN the first time it is computed, and not again."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.nan) if live.first and live.step in (AT, AT + 3) else gradient

    live.parameter(live.places.head_norm).register_hook(spoil)


def nan_moment(live: Live) -> None:
    """F56: one element of a second moment, once, behind the step."""
    if live.step == AT and live.once("moment"):
        live.built.optimizer.tensors()[f"exp_avg_sq/{live.places.down}.weight"][0, 0] = math.nan


def nan_feature(live: Live) -> None:
    """F50 with a frozen tower: one value of the white picture's feature in the cache."""
    if live.step == AT and live.once("feature"):
        cache = live.built.root.cache
        key = next(k for k in cache._memory if k.startswith(content_key((live.data / "white.png").read_bytes())))
        cache._memory[key][0, 0] = math.nan


# -- runs -------------------------------------------------------------------------------------------------------------


def run_of(folder: Path, base: Path, data: Path, /, **over: Any) -> Any:
    values: dict[str, Any] = {
        "batch": {"samples": 6, "device_tokens": 512}, "train": {"max_steps": 8},
        "save": {"every_steps": 1, "keep_last": 99}, "optimizer": {"kind": "adamw", "lr": 1e-4},
    }  # fmt: skip
    return runs.located(folder, base, data, **runs.merge(values, over))


def incidents(folder: Path) -> list[dict[str, Any]]:
    def refuse(text: str) -> Any:
        pytest.fail(f"{text} in JSON")

    paths = sorted((folder / "incidents").glob("step-*/incident.json"), key=lambda p: p.stat().st_mtime_ns)
    return [json.loads(p.read_text(), parse_constant=refuse) | {"path": p.parent} for p in paths]


def records(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]
