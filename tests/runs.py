"""Run files for tests: a tiny model, a small data set, one thread, no workers unless asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lensmith.config.yaml_file import Tree
from lensmith.recipe.run import Located, from_tree
from lensmith.recipe.train import Outcome, train
from lensmith.report.terminal import Terminal


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; a mapping with `kind` replaces the one below it."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and "kind" not in value:
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def located(folder: Path, base: Path, source: Path, /, **over: Any) -> Located:
    """A run whose output folder is `folder`."""
    values = {
        "model": {"path": str(base)},
        "data": {"train": str(source), "max_tokens": 512, "workers": 0},
        "batch": {"samples": 8, "device_tokens": 512},
        "tune": {"kind": "full"},
        "precision": {"preset": "fp32"},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "train": {"epochs": None, "max_steps": 4, "device": "cpu", "threads": 1, "clip_norm": None},
        "output": str(folder),
    }
    return from_tree(Tree(merge(values, over)), None)


def quiet_train(run: Located, **kwargs: Any) -> Outcome:
    return train(run, terminal=Terminal("quiet"), **kwargs)
