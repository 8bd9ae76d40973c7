"""Two ranks and a step that is not finite: both leave it out, and the cause is named as on one rank (F53)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from faults import FAMILIES
from ranks_kit import on_ranks
from runs import quiet_train

from lensmith.parallel.shares import is_sharded
from lensmith.recipe.replay import replay
from lensmith.report.terminal import Terminal

ENGINES: dict[str, Any] = {
    "local": "local",
    "fsdp2": {"kind": "fsdp2"},
    "zero2": {"kind": "deepspeed", "zero": 2},
    "zero3": {"kind": "deepspeed", "zero": 3},
}
FAMILY = "qwen2_5_vl"


def down(live: faults.Live, change: Callable[[torch.Tensor], Any]) -> None:
    """`change` what this rank has of the weight: of the copy that is updated, and of the one that is computed with."""
    name = f"{live.places.down}.weight"
    for key, values in live.built.optimizer.items():
        if key == f"param/{name}" and values.numel():
            change(values.data)
    values = getattr(live.parameter(live.places.down), "ds_tensor", live.parameter(live.places.down))
    if not is_sharded(values):
        change(values.data)


def nan_share(live: faults.Live) -> None:
    """F48 on the second rank alone."""
    if live.step == faults.AT and live.once("nan") and live.built.optimizer.ranks.rank == 1:
        down(live, lambda values: values.view(-1)[0].fill_(math.nan))


def huge_shares(live: faults.Live) -> None:
    """F49 on both."""
    if live.step == faults.AT and live.once("huge"):
        down(live, lambda values: values.copy_(values.sign() * 3e38))


PLANTS = {
    "F48": {"before_step": nan_share}, "F49": {"before_step": huge_shares}, "F50": {"at_build": faults.nan_pixel},
    "F51": {"at_build": faults.bad_backward}, "F54": {"at_build": faults.inf_gradient},
}  # fmt: skip
REWARD = ("fsdp2", "zero3")
"""Engines that give the one row of a value head to one rank, and nothing of it to the other."""
NO_HOOK = ("fsdp2", "F54")
"""FSDP2 calls no hooks of parameters."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every plant with every engine, in one pair of processes."""
    folder = tmp_path_factory.mktemp("guard")
    base, data = faults.make_base(folder / "base", FAMILY), faults.make_data(folder)
    pairs = faults.make_answers(folder / "pairs", "pairs")

    def work(rank: int) -> None:
        for engine, how in ENGINES.items():
            for name, plant in PLANTS.items():
                if (engine, name) == NO_HOOK:
                    continue
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("LENSMITH_CACHE", str(folder / "cache"))
                    faults.plant(patch, FAMILY, data, **plant)
                    run = faults.run_of(folder / f"{engine}-{name}", base, data, parallel={"engine": how})
                    quiet_train(run)
        for engine in REWARD:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LENSMITH_CACHE", str(folder / "cache"))
                faults.plant(patch, FAMILY, pairs, before_step=nan_share)
                quiet_train(faults.run_of(
                    folder / f"{engine}-reward", base, pairs, parallel={"engine": ENGINES[engine]},
                    objective={"kind": "reward"}, batch={"device_tokens": 1024},
                ))  # fmt: skip

    on_ranks(2, folder / "pair", work)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.faults("F53", "NaN on one rank only")
def test_a_picture_on_one_rank(found: Path, engine: str) -> None:
    incidents = faults.incidents(found / f"{engine}-F50")
    assert [i["action"] for i in incidents] == ["skip", "skip"]
    for i in incidents:
        assert (i["cause"], i["module"], i["part"]) == ("bad_input", FAMILIES[FAMILY].patches, "vision")
        assert [s["number"] for s in i["samples"]] == [faults.WHITE] and not i["every_sample"]
    steps = faults.records(found / f"{engine}-F50")
    assert [r["step"] for r in steps] == list(range(1, 9)) and [r["applied"] for r in steps].count(False) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_derivative_on_both_ranks(found: Path, engine: str) -> None:
    (incident,) = faults.incidents(found / f"{engine}-F51")
    assert (incident["cause"], incident["module"]) == ("backward_only", FAMILIES[FAMILY].mlp)
    assert incident["every_sample"] and incident["action"] == "skip"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.faults("F48", "a NaN in a weight")
def test_a_weight_on_one_rank(found: Path, engine: str) -> None:
    """Back at once; and the steps behind it compute with what the checkpoint holds, not with what was left gathered."""
    (incident,) = faults.incidents(found / f"{engine}-F48")
    name = FAMILIES[FAMILY].down
    assert (incident["cause"], incident["module"], incident["bad_parameters"]) == (
        "bad_weights", name, [f"{name}.weight"],
    )  # fmt: skip
    assert incident["action"] == "roll_back"
    mine, whole = (faults.records(found / f"{engine}-{which}") for which in ("F48", "F49"))
    assert all(r["applied"] for r in mine) and [r["loss"] for r in mine] == [r["loss"] for r in whole]
    assert replay(incident["path"], Terminal("quiet")) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_overflow_are_in_the_incident(found: Path, engine: str) -> None:
    """Of which each rank had a share: a replay on one process computes with the same."""
    incidents = faults.incidents(found / f"{engine}-F49")
    assert [i["action"] for i in incidents] == ["skip", "skip", "roll_back"]
    for i in incidents:
        assert (i["cause"], i["module"]) == ("forward_overflow", FAMILIES[FAMILY].down) and i["tensors"]["trained"]
        assert replay(i["path"], Terminal("quiet")) == 0


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if (engine, "F54") != NO_HOOK])
def test_a_gradient_is_named_by_the_rank_that_has_it(found: Path, engine: str) -> None:
    """ZeRO gives each gradient to one rank; one that has none of the bad ones must not name its own largest."""
    (incident,) = faults.incidents(found / f"{engine}-F54")
    name = FAMILIES[FAMILY].head_norm
    assert (incident["cause"], incident["module"]) == ("backward_only", name)
    assert incident["bad_gradients"] == [f"{name}.weight"]


@pytest.mark.parametrize("engine", REWARD)
def test_a_reward_model_goes_back_with_its_head(found: Path, engine: str) -> None:
    (incident,) = faults.incidents(found / f"{engine}-reward")
    assert incident["cause"] == "bad_weights" and incident["action"] == "roll_back"
    assert [r["applied"] for r in faults.records(found / f"{engine}-reward")] == [True] * 8
    assert replay(incident["path"], Terminal("quiet")) == 0
    tensors = json.loads((incident["path"] / "hashes.json").read_text())["tensors"]
    assert "model/v_head.summary.weight" in tensors and not any(name.startswith("share/") for name in tensors)
