"""In every family: an adapter with parts in full and a start of its own goes out, comes back, and is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import all_families
import pytest
import torch

from lensmith.checkpoint.export import write_adapter
from lensmith.family.registry import load_family
from lensmith.model import tune
from lensmith.model.load import is_tied, load_model, skeleton
from lensmith.model.lora import Folders, lora_layers, unwrapped
from lensmith.model.options import Lora

FULL, CPU = torch.float32, torch.device("cpu")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", params=list(all_families.MAKERS))
def family(request: pytest.FixtureRequest, here: Path) -> tuple[Path, Any]:
    folder = all_families.make(here / request.param, request.param)
    return folder, load_family(folder)


def weights(tuned: tune.Tuned) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in unwrapped(tuned.peft).state_dict().items()}


def largest_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((t - other[n]).abs().max()) for n, t in one.items() if t.is_floating_point())


def changed(options: Lora, folder: Path, rules: Any, into: Path) -> dict[str, torch.Tensor]:
    """The weights of a model whose adapters and parts in full have moved; its adapter is in `into`."""
    torch.manual_seed(0)
    tuned = tune.apply(load_model(folder, FULL, CPU, rules.loading), options, rules)
    with torch.no_grad():
        for _, p in tuned.trainable():
            p.add_(0.05 * torch.randn_like(p))
    write_adapter(into, tuned.peft, folder, str(folder), adapted=tuned.adapted)
    return weights(tuned)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_what_goes_out_comes_back(family: tuple[Path, Any], tmp_path: Path, init: str) -> None:
    folder, rules = family
    tied = is_tied(load_model(folder, FULL, CPU, rules.loading))
    full: list[Any] = ["embeddings", "projector"] + ([] if tied else ["head"])
    options = Lora(rank=2, parts=("language", "vision"), ranks={"vision": 3}, full=tuple(full), init=init)
    wanted = changed(options, folder, rules, tmp_path / "out")
    on = Lora(rank=2 if init == "default" else _usual(tmp_path / "out"), adapter="out", full=tuple(full))
    tune.apply(skeleton(folder, rules.loading), on, rules, folders=Folders(tmp_path / "out"))  # names and shapes
    found = tune.apply(load_model(folder, FULL, CPU, rules.loading), on, rules, folders=Folders(tmp_path / "out"))
    trains = {n for n, _ in found.trainable()}
    assert {rules.part_of(n) for n in trains if ".lora_" not in n} == set(full)
    assert {rules.part_of(n) for n, _ in lora_layers(found.model)} >= {"language"}
    assert largest_gap(weights(found), wanted) < 1e-5


def _usual(folder: Path) -> int:
    return json.loads((folder / "adapter_config.json").read_text())["r"]


def test_merged_and_published_with_another(family: tuple[Path, Any], tmp_path: Path) -> None:
    folder, rules = family
    first = changed(Lora(rank=2), folder, rules, tmp_path / "first")
    model = load_model(folder, FULL, CPU, rules.loading)
    tuned = tune.apply(model, Lora(rank=3, parts=("vision",)), rules, folders=Folders(merge=(tmp_path / "first",)))
    with torch.no_grad():
        for _, p in tuned.trainable():
            p.add_(0.05 * torch.randn_like(p))
    write_adapter(tmp_path / "both", tuned.peft, folder, str(folder), adapted=tuned.adapted)
    both = weights(tuned)
    assert largest_gap(both, first) > 1e-3
    on = Lora(rank=_usual(tmp_path / "both"), adapter="both")
    found = tune.apply(load_model(folder, FULL, CPU, rules.loading), on, rules, folders=Folders(tmp_path / "both"))
    assert largest_gap(weights(found), both) < 1e-5
