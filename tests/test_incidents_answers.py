"""The guard where answers are compared: the value head, references in each step, and those not finite (F60)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import runs
import torch
from faults import AT, WHITE

from lensmith.recipe import known
from lensmith.recipe import session as session_module
from lensmith.recipe.replay import replay
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
FAMILY = "qwen2_5_vl"
LORA = {"kind": "lora", "rank": 2}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "write_report", lambda folder: folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_base(tmp_path_factory.mktemp("base"), FAMILY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: faults.make_answers(tmp_path_factory.mktemp(kind), kind) for kind in ("pairs", "labels")}


def run(folder: Path, base: Path, data: dict[str, Path], objective: dict[str, Any], **over: Any) -> Any:
    source = data["labels" if objective["kind"] == "kto" else "pairs"]
    return faults.run_of(folder, base, source, **runs.merge(
        {"objective": objective, "tune": LORA, "batch": {"device_tokens": 1024}}, over
    ))  # fmt: skip


def spoilt_head(live: faults.Live, value: float, once: str = "head") -> None:
    if live.step == AT and live.once(once):
        live.built.root.value_head.summary.weight.data.fill_(value)


def nan_head(live: faults.Live) -> None:
    spoilt_head(live, math.nan)


def huge_head(live: faults.Live) -> None:
    spoilt_head(live, 3.4e38)


def bad_gradient(live: faults.Live) -> None:
    live.built.root.value_head.summary.weight.register_hook(
        lambda g: torch.full_like(g, math.inf) if live.step in (AT, 0) else g
    )


@pytest.mark.parametrize(("plant", "cause", "actions"), [
    ({"before_step": nan_head}, "bad_weights", ["roll_back"]),
    ({"before_step": huge_head}, "forward_overflow", ["skip", "skip", "roll_back"]),
    ({"at_build": bad_gradient}, "backward_only", ["skip"]),
])  # fmt: skip
def test_the_value_head_is_named_and_replayed(
    base: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: Any, plant: Any, cause: str, actions: list[str]
) -> None:
    live = faults.plant(monkeypatch, FAMILY, data["pairs"], **plant)
    runs.quiet_train(run(tmp_path / "run", base, data, {"kind": "reward"}))
    found = faults.incidents(tmp_path / "run")
    assert [i["action"] for i in found] == actions
    live.step = 0
    for i in found:
        assert (i["cause"], i["module"], i["part"]) == (cause, "v_head.summary", "head")
        assert replay(i["path"], QUIET) == 0
        assert "model/v_head.summary.weight" in json.loads((i["path"] / "hashes.json").read_text())["tensors"]


REFERENCES: dict[str, dict[str, Any]] = {
    "dpo, adapter": {"objective": {"kind": "dpo", "reference": {"kind": "adapter"}}},
    "dpo, frozen": {"objective": {"kind": "dpo", "reference": {"kind": "frozen"}}, "tune": {"kind": "full"}},
    "kto, adapter": {"objective": {"kind": "kto", "reference": {"kind": "adapter"}}},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_in_each_step_is_there_in_a_replay(
    name: str, base: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    over = dict(REFERENCES[name])
    objective = over.pop("objective")
    live = faults.plant(monkeypatch, FAMILY, data["pairs"], at_build=faults.bad_backward)
    runs.quiet_train(run(tmp_path / "run", base, data, objective, **over))
    (incident,) = faults.incidents(tmp_path / "run")
    assert (incident["cause"], incident["module"]) == ("backward_only", faults.FAMILIES[FAMILY].mlp)
    live.step = 0
    assert replay(incident["path"], QUIET) == 0


OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"}, "dpo hinge": {"kind": "dpo", "loss": "hinge"}, "ipo": {"kind": "dpo", "loss": "ipo"},
    "kto": {"kind": "kto"},
}  # fmt: skip
"""Losses that are flat, not infinite, behind an infinite ratio are among them."""


@pytest.mark.parametrize(("name", "side"), [(n, s) for n in OBJECTIVES for s in (0, 1) if (n, s) != ("kto", 1)])
@pytest.mark.faults("F60", "a reference that gives an answer of a pair no chance")
def test_a_reference_without_a_chance_is_named_and_the_others_train(
    name: str, side: int, base: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Sample `WHITE`'s chosen or rejected answer; of KTO its answer. In the second epoch it is left out for good."""
    tell = known.Known.tell

    def told(self: Any, row: Any) -> None:
        tell(self, row)
        of = row.compared
        if of is not None and not (of.other_B >= 0).any() and (at := np.flatnonzero(of.sample_B == WHITE)).size:
            of.reference_B = of.reference_B.copy()
            of.reference_B[at[side]] = -math.inf

    monkeypatch.setattr(known.Known, "tell", told)
    out = runs.quiet_train(run(tmp_path / "run", base, data, OBJECTIVES[name], train={"max_steps": 12}))
    found = faults.incidents(tmp_path / "run")
    assert [(i["cause"], i["action"], [s["number"] for s in i["samples"]]) for i in found] == [
        ("loss", "skip", [WHITE])
    ] * 2
    steps = faults.records(tmp_path / "run")
    assert [r["applied"] for r in steps].count(False) == 2 and out.summary["guard"]["excluded"] == 1
    assert all(r["loss"] is None and "loss" in r["nonfinite"] for r in steps if not r["applied"])


def test_a_reference_that_gives_no_number_is_named_and_not_kept(
    base: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    plain = known.log_probabilities

    def broken(nll_S: torch.Tensor, row: Any) -> torch.Tensor:
        found = plain(nll_S, row)
        return torch.where(torch.from_numpy(row.compared.sample_B == WHITE), torch.nan, found)

    monkeypatch.setattr(known, "log_probabilities", broken)
    runs.quiet_train(run(tmp_path / "run", base, data, {"kind": "dpo"}))
    said = {(i["cause"], *(s["number"] for s in i["samples"])) for i in faults.incidents(tmp_path / "run")}
    assert said == {("loss", WHITE)}
    monkeypatch.setattr(known, "log_probabilities", plain)
    runs.quiet_train(run(tmp_path / "again", base, data, {"kind": "dpo"}))
    assert faults.incidents(tmp_path / "again") == []


@pytest.mark.faults("F60", "a reference that gives an answer of a pair no chance")
def test_a_mismatched_answer_without_a_chance_does_not_spoil_the_step(
    base: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """KTO's KL is the mean of those that are known; an infinite one would make every loss of the step flat."""
    tell = known.Known.tell

    def told(self: Any, row: Any) -> None:
        tell(self, row)
        of = row.compared
        if of is not None and (of.other_B >= 0).any() and (at := np.flatnonzero(of.sample_B == WHITE)).size:
            of.reference_B = of.reference_B.copy()
            of.reference_B[at] = -math.inf

    monkeypatch.setattr(known.Known, "tell", told)
    runs.quiet_train(run(tmp_path / "run", base, data, {"kind": "kto"}))
    assert faults.incidents(tmp_path / "run") == []
    for record in faults.records(tmp_path / "run"):
        assert record["applied"] and math.isfinite(record["objective"]["kl"]) and record["grad_norm"] > 0
