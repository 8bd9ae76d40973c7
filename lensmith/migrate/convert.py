"""From a LLaMA-Factory file to a lensmith run: the parts in their order, and the batch that a resume keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.checkpoint.store import write_atomically
from lensmith.config.build import apply_overrides
from lensmith.config.yaml_file import Tree, read_tree
from lensmith.core.errors import ConfigError
from lensmith.migrate import data, model, objective, parallel, rules, templates, training
from lensmith.migrate.draft import Decision, Draft
from lensmith.migrate.given import Given, is_llamafactory, read_given
from lensmith.migrate.launch import Launch, launch_of, without_effect
from lensmith.recipe.run import Located, Run, from_tree

RECORD = "llamafactory.json"
"""In the run folder: how the batch of the first start came about."""


@dataclass(frozen=True)
class Migrated:
    """A run made of a LLaMA-Factory file."""

    tree: Tree
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]
    launch: Launch
    batch: dict[str, Any]

    def located(self, file: Path) -> Located:
        return from_tree(self.tree, file)


def load_any(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Located, Migrated | None]:
    """A run file of lensmith's, or one of LLaMA-Factory's as it is."""
    path = Path(file)
    if path.is_dir() and (path / "run.yaml").is_file():
        path = path / "run.yaml"
    tree = read_tree(path)
    if not is_llamafactory(tree):
        return from_tree(apply_overrides(tree, overrides), path), None
    migrated = migrate(tree, overrides)
    return migrated.located(path), migrated


def migrate(
    tree: Tree,
    overrides: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
    ranks: int | None = None,
    devices: Callable[[], int] | None = None,
) -> Migrated:
    """`overrides` of LLaMA-Factory's keys, and of lensmith's options (`train.threads=1`), which are laid over the run.

    Raises `ConfigError`: every key is taken, said to be needless, or refused.
    """
    env = os.environ if env is None else env
    theirs, ours = _apart(overrides)
    given = read_given(tree, theirs, env, folder)
    rules.check(given)
    asked = ranks if ranks is not None else _asked(ours)
    launch = launch_of(env, devices or count_devices, asked, given.get("ray_num_workers"))
    draft = Draft(given)
    about = model.about(given)
    template = templates.choose(draft, about.model_type, about.folder)
    model.add(draft, about)
    data.add(draft, template)
    objective.add(draft)
    training.add(draft, launch, recorded(given))
    parallel.add(draft, launch)
    for text in without_effect(env):
        draft.warn(text)
    decisions = tuple(draft.settle())
    made = apply_overrides(draft.tree(), ours)
    return Migrated(made, decisions, tuple(draft.warnings), launch, _batch(given, draft, launch))


def _apart(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    theirs: list[str] = []
    ours: list[str] = []
    for text in overrides:
        name = text.partition("=")[0].partition(".")[0]
        (ours if name in Run.model_fields else theirs).append(text.removeprefix("--"))
    return theirs, ours


def _asked(ours: Sequence[str]) -> int | None:
    found = [text.partition("=")[2] for text in ours if text.startswith("parallel.ranks=")]
    return int(found[-1]) if found and found[-1].isdecimal() and int(found[-1]) > 0 else None


def count_devices() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


# --- the batch of the first start -------------------------------------------------------------------------------------


def _batch(given: Given, draft: Draft, launch: Launch) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": given.get("per_device_train_batch_size"),
        "gradient_accumulation_steps": given.get("gradient_accumulation_steps"),
        "ranks": launch.ranks,
        "samples": draft.at("batch.samples"),
    }


def recorded(given: Given) -> int | None:
    """Samples of a step that the run began with, if it has checkpoints and its batch keys are as they were."""
    if not given.has("output_dir"):
        return None
    output = given.path(given.get("output_dir"))
    file = output / RECORD
    if not file.is_file() or not any((output / "checkpoints").glob("step-*")):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(
            "MIGRATE", "no JSON", where=str(file), remedy="restore it, or name another output_dir"
        ) from None
    same = all(found[key] == given.get(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return found["samples"] if same else None


def record(migrated: Migrated, output: Path) -> None:
    """Keep the batch beside the run, for a resume on another number of ranks. The first start decides."""
    file = output / RECORD
    if file.is_file() and any((output / "checkpoints").glob("step-*")):
        return
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(migrated.batch, indent=1) + "\n").encode())
