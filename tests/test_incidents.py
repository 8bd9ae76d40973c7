"""Faults F48 to F59 planted into real runs: found where they were planted, answered, recorded, and computed again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faults
import pytest
import runs
import torch
from faults import AT, FAMILIES, WHITE
from safetensors.torch import load_file

from lensmith.cli import main
from lensmith.core.errors import ConfigError, RunError
from lensmith.data import pipeline
from lensmith.engine.forensics import Finding
from lensmith.evaluate.held_out import mean_loss
from lensmith.model.root import Root
from lensmith.recipe import held_out
from lensmith.recipe import incident as incident_module
from lensmith.recipe import session as session_module
from lensmith.recipe.replay import replay
from lensmith.recipe.rescue import Feed
from lensmith.report.page import write_report
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "write_report", lambda folder: folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_base(tmp_path_factory.mktemp("base"), family)


def states(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state" / "training.safetensors")


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the run ends with when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENSMITH_CACHE", str(folder / "cache"))
        patch.setattr(session_module, "write_report", lambda folder: folder)
        runs.quiet_train(faults.run_of(folder / "run", base, data))
    return states(folder / "run")


@dataclass(frozen=True)
class Case:
    """`at`: the module's name in `Places`; `samples`: those at fault, None: every sample is; `stays`: the plant is in
    the code, so a replay needs it too."""

    plant: dict[str, Any]
    cause: str
    at: str | None
    part: str | None
    samples: list[int] | None
    actions: list[str]
    over: dict[str, Any] = field(default_factory=dict)
    stays: bool = False
    same_end: bool = False
    """The run ends in the same bits as one without the fault."""


CASES: dict[str, Case] = {
    "F48": Case({"before_step": faults.nan_weight}, "bad_weights", "down", "language", [], ["roll_back"],
                same_end=True),
    "F49": Case({"before_step": faults.huge_weight}, "forward_overflow", "down", "language", None,
                ["skip", "skip", "roll_back"], same_end=True),
    # in the first epoch and in the second; then the sample is left out
    "F50": Case({"at_build": faults.nan_pixel}, "bad_input", "patches", "vision", [WHITE], ["skip", "skip"],
                stays=True),
    # found once: what was found is not kept, and the second epoch encodes the picture anew
    "F50-cache": Case({"before_step": faults.nan_feature}, "bad_input", "first", "language", [WHITE], ["skip"],
                      {"tune": {"kind": "lora", "rank": 2}}),
    "F51": Case({"at_build": faults.bad_backward}, "backward_only", "mlp", "language", None, ["skip"], stays=True),
    "F54": Case({"at_build": faults.inf_gradient}, "backward_only", "head_norm", "language", None, ["skip"],
                stays=True),
    "F56": Case({"after_step": faults.nan_moment}, "bad_state", None, None, [], ["roll_back"], same_end=True),
}  # fmt: skip
WHAT = {
    "F48": "a NaN in a weight", "F49": "an activation overflows", "F50": "a NaN in a picture or its cached features",
    "F51": "a derivative that is NaN", "F54": "a gradient that is infinite", "F56": "a NaN in a second moment",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.faults(n[:3], WHAT[n[:3]])) for n in CASES])
def test_planted_faults(
    name: str, family: str, base: Path, data: Path, whole: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    case, places = CASES[name], FAMILIES[family]
    live = faults.plant(monkeypatch, family, data, **case.plant)
    out = runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **case.over))
    found = faults.incidents(tmp_path / "run")
    assert [i["action"] for i in found] == case.actions
    module = case.at and getattr(places, case.at)
    for i in found:
        assert (i["cause"], i["module"], i["part"]) == (case.cause, module, case.part)
        assert [s["number"] for s in i["samples"]] == (case.samples or [])
        assert i["every_sample"] == (case.samples is None)
        assert all(s["origin"].endswith(f"train.jsonl:{s['number'] + 1}") for s in i["samples"])
    check_details(name, found[0], places)
    for folder in (tmp_path / "run/checkpoints").iterdir():
        for file in folder.rglob("*.safetensors"):
            assert all(t.isfinite().all() for t in load_file(file).values() if t.is_floating_point()), file
    steps = faults.records(tmp_path / "run")
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["applied"] for r in steps].count(False) == case.actions.count("skip") * (not case.same_end)
    if case.same_end:
        end = states(tmp_path / "run")
        assert end.keys() == whole.keys() and all(torch.equal(end[k], whole[k]) for k in whole)
    twice = len(case.samples or []) > 0 and len(case.actions) == 2
    assert out.summary["guard"]["excluded"] == twice
    assert [r["samples"] for r in faults.records(tmp_path / "run", "event") if r["name"] == "excluded"] == (
        [[WHITE]] if twice else []
    )
    assert out.summary["guard"]["incidents"] == len(case.actions)
    capsys.readouterr()
    live.step = 0
    if not case.stays:
        monkeypatch.undo()
    for i in found:
        assert replay(i["path"], Terminal("json")) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        if i["kind"] == "step":
            assert said[0]["module"] == module and said[0]["cause"] == case.cause
            assert said[0]["samples"] == [s["origin"] for s in i["samples"]]
            assert said[0]["weights"] == "as they were"


def check_details(name: str, i: dict[str, Any], places: Any) -> None:
    weight = f"{places.down}.weight"
    if name == "F48":
        assert i["bad_parameters"] == [weight] and i["step"] == AT
    elif name == "F49":
        assert i["bad_parameters"] == [] and 0 < i["largest_input"] < 100
        assert i["input_dtype"] == i["output_dtype"] == "torch.float32"
    elif name == "F54":
        assert i["bad_gradients"] == [f"{places.head_norm}.weight"] and i["loss"] < 10 and i["grad_norm"] is None
        assert i["gradient_norms"][f"{places.head_norm}.weight"] is None and "grad_norm" in i["nonfinite"]
    elif name == "F56":
        assert i["bad_parameters"] == [f"exp_avg_sq/{weight}"] and i["step"] == AT


# -- faults that are no fault of a module ------------------------------------------------------------------------------


@pytest.mark.faults("F55", "fp16: overflows without end")
def test_overflows_without_end_stop_with_advice(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A whole run: each of 20 steps is left out at half the scale of the one before."""
    live = faults.plant(monkeypatch, family, data, at_build=faults.overflow)
    with pytest.raises(RunError, match=r"NONFINITE.*step 20 .*overflow in") as stopped:
        runs.quiet_train(faults.run_of(tmp_path / "run", base, data, precision={"preset": "fp16"},
                                       train={"max_steps": 40}))  # fmt: skip
    assert stopped.value.exit_code == 74 and "bf16" in stopped.value.remedy
    steps = faults.records(tmp_path / "run")
    assert [r["applied"] for r in steps] == [False] * 20
    assert [r["loss_scale"] for r in steps] == [steps[0]["loss_scale"] / 2**n for n in range(20)]
    assert all(r["grad_norm"] is None and r["loss"] > 0 for r in steps)
    (incident,) = faults.incidents(tmp_path / "run")
    assert (incident["cause"], incident["module"]) == ("overflow", live.places.head_norm)
    assert incident["action"] == "stop" and incident["loss_scale"] == steps[-2]["loss_scale"]
    assert replay(incident["path"], QUIET) == 0


@pytest.mark.faults("F57", "a gradient that is NaN the first time only")
def test_a_transient_fault_is_counted_and_the_second_stops(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """F57: the gradient is NaN the first time at steps 4 and 7, and finite in every re-run."""
    faults.plant(monkeypatch, family, data, at_build=faults.transient)
    with pytest.raises(RunError, match=r"transient.*2 steps came out finite when they were computed again"):
        runs.quiet_train(faults.run_of(tmp_path / "run", base, data))
    found = faults.incidents(tmp_path / "run")
    assert [(i["step"], i["cause"], i["action"], i["reruns"]) for i in found] == [
        (AT, "transient", "skip", 3), (AT + 3, "transient", "stop", 3),
    ]  # fmt: skip
    assert [r["step"] for r in faults.records(tmp_path / "run") if not r["applied"]] == [AT, AT + 3]
    with pytest.raises(ConfigError, match=r"REPLAY.*no batch"):
        replay(found[0]["path"], QUIET)


def test_looking_into_a_step_changes_nothing_after_it(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """With dropout: three re-runs at step 4 leave the random numbers of step 5 as they would have been."""
    over: dict[str, Any] = {"tune": {"kind": "lora", "rank": 2, "dropout": 0.2}, "train": {"max_steps": 6}}

    def spoil(live: faults.Live) -> None:
        p = live.built.optimizer.named[-1][1]
        p.register_hook(lambda g: torch.full_like(g, math.nan) if live.first and live.step == AT else g)

    ends = []
    for name in ("looked", "not"):
        faults.plant(monkeypatch, family, data, at_build=spoil)
        if name == "not":
            monkeypatch.setattr("lensmith.engine.rescue.examine", lambda scene: Finding("transient"))
        runs.quiet_train(faults.run_of(tmp_path / name, base, data, **over))
        ends.append(states(tmp_path / name))
        monkeypatch.undo()
        monkeypatch.setattr(session_module, "write_report", lambda folder: folder)
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[1])


@pytest.mark.faults("F52", "all labels of a sample masked")
def test_samples_without_targets_are_dropped_and_the_others_train(base: Path, data: Path, tmp_path: Path) -> None:
    """F52: three of the rows train nothing once they are cut: NO_TARGETS in the ledger, and no loss is NaN."""
    rows = data.read_text().splitlines()
    for n in (2, 3, 9):
        row = json.loads(rows[n])
        row["messages"][1]["train"] = False
        row["messages"] += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "picture " * 300}]
        rows[n] = json.dumps(row)
    masked = data.with_name("masked.jsonl")
    masked.write_text("\n".join(rows) + "\n")
    out = runs.quiet_train(
        faults.run_of(tmp_path / "run", base, masked, data={"max_dropped": 0.5, "too_long": "cut", "max_tokens": 200})
    )
    assert out.summary["samples"]["by_reason"] == {"NO_TARGETS": 3} and out.summary["samples"]["train"] == 21
    assert out.summary["applied_steps"] == 8 and all(math.isfinite(loss) for loss in out.summary["losses"])


@pytest.mark.faults("F52", "an objective that divides by no targets")
def test_a_loss_that_divides_by_no_targets(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """F52 where an objective averages sample by sample: the one whose labels are all masked is named, and no module."""

    def masked(*args: Any) -> Any:
        row = load_row(*args)
        keep = row.sample_S != WHITE
        names = ("supervised_S", "target_S", "weight_S", "sample_S", "source_S")
        return replace(row, **{name: getattr(row, name)[keep] for name in names})

    def averaged(self: Any, row: Any) -> Any:
        found = forward(self, row)
        counts = torch.tensor([float((row.sample_S == m).sum()) for m in row.members])
        return found | {"loss": (found["loss"][0] * (counts / counts).mean(), found["loss"][1])}

    load_row, forward = pipeline.load_row, Root.forward
    monkeypatch.setattr(pipeline, "load_row", masked)
    monkeypatch.setattr(Root, "forward", averaged)
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data, train={"max_steps": 4}))
    (found,) = faults.incidents(tmp_path / "run")
    assert (found["cause"], found["module"], [s["number"] for s in found["samples"]]) == ("no_targets", None, [WHITE])
    targets = {m["number"]: m["targets"] for m in found["members"]}
    assert targets[WHITE] == 0 and all(n > 0 for m, n in targets.items() if m != WHITE)
    assert replay(found["path"], QUIET) == 0


@pytest.mark.faults("F58", "the loss a thousandfold")
def test_a_spike_is_logged_and_hides_nothing(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """F58: the loss of step 20 a thousandfold. Logged as it is, with its distance; with clipping, its norm is cut."""

    def louder(live: faults.Live) -> None:
        terms = live.built.root.objective.terms

        def scaled(*args: Any, **kwargs: Any) -> Any:
            found = terms(*args, **kwargs)
            by = 1000.0 if live.step == 20 else 1.0
            return found | {"loss": (found["loss"][0] * by, found["loss"][1])}

        object.__setattr__(live.built.root.objective, "terms", scaled)

    for clip in (False, True):
        faults.plant(monkeypatch, family, data, at_build=louder)
        over: dict[str, Any] = {"train": {"max_steps": 22}, "guard": {"clip_spikes": clip}, "tune": {"kind": "lora"}}
        out = runs.quiet_train(faults.run_of(tmp_path / str(clip), base, data, save={"every_steps": None}, **over))
        events = [r for r in faults.records(tmp_path / str(clip), "event") if r["name"] == "spike"]
        assert [e["step"] for e in events] == [20] and min(events[0]["loss_z"], events[0]["grad_norm_z"]) > 100
        step = faults.records(tmp_path / str(clip))[19]
        assert step["applied"] and step["loss"] > 1000 and step["loss"] == events[0]["loss"]
        assert (step["clipped_to"] is not None) == clip and out.summary["guard"]["spikes"] == 1
        if clip:
            others = [r["grad_norm"] for r in faults.records(tmp_path / str(clip))[:19]]
            assert step["clipped_to"] < 2 * max(others) and step["grad_norm"] > 100 * max(others)
        monkeypatch.undo()
        monkeypatch.setattr(session_module, "write_report", lambda folder: folder)


@pytest.mark.faults("F59", "a held-out loss that is NaN")
def test_a_held_out_loss_that_is_nan_is_never_the_best(
    base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """F59: NaN at the second of three evaluations: null in the record, and the best is of the others."""
    count = [0]

    def spoilt(*args: Any, **kwargs: Any) -> dict[str, float]:
        count[0] += 1
        return {"loss": math.nan} if count[0] == 2 else mean_loss(*args, **kwargs)

    monkeypatch.setattr(held_out, "mean_loss", spoilt)
    over: dict[str, Any] = {
        "data": {"holdout": 0.3}, "evaluate": {"every_steps": 1, "loss": True, "before": False},
        "save": {"every_steps": None, "keep_best": "loss", "keep_last": 1}, "train": {"max_steps": 3},
    }  # fmt: skip
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **over))
    evals = faults.records(tmp_path / "run", "eval")
    assert evals[1]["loss"] is None and evals[1]["nonfinite"] == ["loss"]
    progress = json.loads((tmp_path / "run/checkpoints/step-00000003/state/progress.json").read_text())["progress"]
    assert progress["best_kept"] == -min(e["loss"] for e in evals if e["loss"] is not None)


# -- what is done about it --------------------------------------------------------------------------------------------


def test_policy_stop(family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    faults.plant(monkeypatch, family, data, before_step=faults.huge_weight)
    places = FAMILIES[family]
    with pytest.raises(RunError, match=f"NONFINITE.*step {AT} .*forward_overflow in {places.down}.*on_nonfinite"):
        runs.quiet_train(faults.run_of(tmp_path / "run", base, data, guard={"on_nonfinite": "stop"}))
    assert [i["action"] for i in faults.incidents(tmp_path / "run")] == ["stop"]
    assert not (tmp_path / "run/summary.json").exists()


def test_policy_roll_back_leaves_out_the_sample(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Step 4 meets the NaN pixel: back to step 3, and on without that sample, in every later epoch too. Workers read
    ahead meanwhile."""
    faults.plant(monkeypatch, family, data, at_build=faults.nan_pixel)
    over: dict[str, Any] = {"guard": {"on_nonfinite": "roll_back"}, "data": {"workers": 1}}
    out = runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **over))
    (found,) = faults.incidents(tmp_path / "run")
    assert (found["step"], found["action"]) == (AT, "roll_back")
    steps = faults.records(tmp_path / "run")
    assert [(r["step"], r["applied"], r["samples"]) for r in steps] == [
        (n, True, 5 if n in (4, 8) else 6) for n in range(1, 9)
    ]
    assert out.summary["guard"] == {
        "incidents": 1, "skipped": 1, "transient": 0, "roll_backs": 1, "spikes": 0, "excluded": 1,
    }  # fmt: skip
    (event,) = [r for r in faults.records(tmp_path / "run", "event") if r["name"] == "roll_back"]
    assert (event["reached"], event["step"], event["excluded"]) == (AT, AT - 1, [WHITE])
    kept = [json.loads(line) for line in (found["path"] / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in kept if r["kind"] == "step"] == [1, 2, 3, 4]  # the lost step is kept there


def test_what_was_left_out_stays_out_after_a_crash(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The run dies right behind the roll-back, before it saves again: resumed, it ends in the same bits, and the sample
    is not met again."""
    over: dict[str, Any] = {"guard": {"on_nonfinite": "roll_back"}}
    faults.plant(monkeypatch, family, data, at_build=faults.nan_pixel)
    runs.quiet_train(faults.run_of(tmp_path / "whole", base, data, **over))

    class Died(Exception):
        pass

    restart = Feed.restart

    def dies(self: Any) -> None:
        restart(self)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Feed, "restart", dies)
        with pytest.raises(Died):
            runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **over))
    out = runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **over))
    found, wanted = states(tmp_path / "run"), states(tmp_path / "whole")
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert out.summary["guard"]["incidents"] == len(faults.incidents(tmp_path / "run")) == 1
    assert out.summary["losses"] == json.loads((tmp_path / "whole/summary.json").read_text())["losses"]


def test_without_a_checkpoint_there_is_no_way_back(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    faults.plant(monkeypatch, family, data, before_step=faults.nan_weight)
    with pytest.raises(RunError, match=r"NONFINITE.*bad_weights.*no checkpoint up to step 3"):
        runs.quiet_train(faults.run_of(tmp_path / "run", base, data, save={"every_steps": None}))
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_frozen_weights_that_are_not_finite_stop(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """No checkpoint holds them: going back would meet them again."""
    faults.plant(monkeypatch, family, data, before_step=nan_frozen)
    with pytest.raises(RunError, match="does not train, and no checkpoint"):
        runs.quiet_train(faults.run_of(tmp_path / "run", base, data, tune={"kind": "lora", "rank": 2}))
    monkeypatch.undo()
    (found,) = faults.incidents(tmp_path / "run")
    assert found["cause"] == "bad_weights" and replay(found["path"], QUIET) == 0


def nan_frozen(live: faults.Live) -> None:
    if live.step == AT and live.once("frozen"):
        norm = live.model.get_submodule(live.places.head_norm)
        norm.get_parameter("weight").data[0] = math.nan


def test_a_stream_cannot_roll_back(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.stream.*guard\.on_nonfinite is roll_back"):
        faults.run_of(tmp_path / "run", base, data, data={"stream": {}}, guard={"on_nonfinite": "roll_back"})


# -- what is left -----------------------------------------------------------------------------------------------------


def test_the_size_of_an_incident_and_their_number(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """No room for tensors: ids, hashes and the pointer to the checkpoint are left. One is kept of three. Text only if
    asked for."""
    over: dict[str, Any] = {"guard": {"keep": 1, "dump_mb": 0, "dump_text": True}}
    faults.plant(monkeypatch, family, data, before_step=faults.huge_weight)
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **over))
    (found,) = faults.incidents(tmp_path / "run")
    assert found["incidents"] == 3 and found["batch"] is None and found["tensors"]["trained"] is False
    assert sum(p.stat().st_size for p in found["path"].glob("*.safetensors")) < 1000
    assert len(found["members"]) >= 1 and all("what is this?" in m["text"] for m in found["members"])
    assert found["checkpoint"].endswith("step-00000003")
    hashes = json.loads((found["path"] / "hashes.json").read_text())
    assert hashes["whole"] and f"model/{FAMILIES[family].down}.weight" in hashes["tensors"]


def test_weights_of_the_checkpoint_stand_in(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Room for the row and the module, not for all that trains: the replay takes the rest from the checkpoint, which
    was made just before, and says that nothing differs."""
    take = incident_module._Room.take
    monkeypatch.setattr(incident_module._Room, "take", lambda self, found: len(found) < 25 and take(self, found))
    faults.plant(monkeypatch, family, data, before_step=faults.nan_weight)
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data))
    monkeypatch.undo()
    (found,) = faults.incidents(tmp_path / "run")
    assert found["tensors"] == {"trained": False, "named": [f"model/{FAMILIES[family].down}.weight"]}
    capsys.readouterr()
    assert replay(found["path"], Terminal("json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["weights"] == "as they were"


def test_the_only_sample_of_a_step_is_not_blamed(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Weights overflow with every sample; a step of one has no other to compare with."""
    faults.plant(monkeypatch, family, data, before_step=faults.huge_weight)
    out = runs.quiet_train(faults.run_of(tmp_path / "run", base, data, batch={"samples": 1}))
    found = faults.incidents(tmp_path / "run")
    assert {i["cause"] for i in found} == {"forward_overflow"} and all(i["samples"] == [] for i in found)
    assert all(i["every_sample"] for i in found) and out.summary["guard"]["excluded"] == 0


def test_an_incident_that_cannot_be_written_is_said(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The disk is full: the step is answered all the same."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(incident_module, "_fill", full)
    faults.plant(monkeypatch, family, data, at_build=faults.inf_gradient)
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data))
    events = faults.records(tmp_path / "run", "event")
    assert [e["why"] for e in events if e["name"] == "incident_lost"] == ["No space left on device"]
    assert [r["applied"] for r in faults.records(tmp_path / "run")].count(False) == 1


def test_a_replay_that_finds_something_else_says_so(
    family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The fault lay in code that is mended now: exit status 1."""
    faults.plant(monkeypatch, family, data, at_build=faults.bad_backward)
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data))
    monkeypatch.undo()
    (found,) = faults.incidents(tmp_path / "run")
    with pytest.raises(SystemExit) as done:
        main(["replay", str(found["path"]), "--json"])
    assert done.value.code == 1
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0]["cause"] == "transient" and said[1]["reproduced"] is False


def test_the_page_of_incidents(family: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.undo()
    faults.plant(monkeypatch, family, data, before_step=faults.huge_weight)
    with pytest.raises(RunError):
        runs.quiet_train(faults.run_of(tmp_path / "run", base, data, guard={"on_nonfinite": "stop"}))
    page = (tmp_path / "run/incidents.html").read_text()
    places = FAMILIES[family]
    assert places.down in page and "forward_overflow" in page and "lensmith replay incidents/step-000004" in page
    assert '<dt>loss</dt><dd dir="auto">not finite</dd>' in page and '<dd dir="auto">step-00000003</dd>' in page
    assert "its type has all the range there is" in page and "precision.preset bf16 or fp32" not in page
    report = write_report(tmp_path / "run").read_text()
    assert 'id="incidents"' in report and 'href="./incidents/step-000004/"' in report and "incidents.html" in report


def test_early_warning_figures(family: str, base: Path, data: Path, tmp_path: Path) -> None:
    """Every second step: the largest activation and the size of the update of every part; the other steps have none."""
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data, guard={"watch_every": 2}))
    steps = faults.records(tmp_path / "run")
    assert ["update_ratio" in r for r in steps] == [n % 2 == 0 for n in range(8)]
    for record in steps[::2]:
        assert {"vision", "projector", "language", "embeddings"} <= set(record["activation_max"])
        assert all(0 < v < 1e4 for v in record["activation_max"].values())
        assert all(1e-6 < v < 1e-2 for v in record["update_ratio"].values())
