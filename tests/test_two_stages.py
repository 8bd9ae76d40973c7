"""Text first, then pictures with a frozen tower and projector, in bfloat16: the recipe that turns NaN elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import faults
import pytest
import runs
import torch
from faults import AT, FAMILIES, WHITE
from safetensors.torch import load_file

from lensmith.core.errors import DataError
from lensmith.data.pipeline import Pipeline
from lensmith.engine.step import run_step
from lensmith.recipe import session as session_module
from lensmith.recipe.build import build
from lensmith.recipe.prepare import prepare
from lensmith.recipe.replay import replay
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
TEXT_STAGES: dict[str, Any] = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 2}}
LAYOUTS = ["1x4", "2x2"]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "write_report", lambda folder: folder)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_base(tmp_path_factory.mktemp("base"), family)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with questions, and beside them text alone."""
    path = faults.make_data(tmp_path_factory.mktemp("data"))
    turns = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(16)]
    (path.parent / "text.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    return path


def two_stages(folder: Path, base: Path, data: Path, text: str, layout: str, preset: str = "bf16", **over: Any) -> Any:
    """Eight steps of four samples on pictures behind three on text; `2x2` puts two samples into each row."""
    probe = runs.located(folder, base, data)
    longest = int(prepare(probe, QUIET).train.column("tokens").max())
    batch = {"packing": False} if layout == "1x4" else {"device_tokens": 2 * longest}
    stages = [
        {"name": "text", "tune": TEXT_STAGES[text], "data": {"train": str(data.parent / "text.jsonl")},
         "train": {"max_steps": 3}},
        {"name": "pictures", "tune": {"kind": "freeze", "train": ["language", "embeddings"]}, "batch": batch,
         "data": {"max_tokens": 2 * longest}},
    ]  # fmt: skip
    values = {"stages": stages, "precision": {"preset": preset}, "batch": {"samples": 4}}
    return faults.run_of(folder, base, data, **runs.merge(values, over))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", TEXT_STAGES)
def test_no_step_is_lost(tmp_path: Path, base: Path, data: Path, text: str, layout: str) -> None:
    out = runs.quiet_train(two_stages(tmp_path / "run", base, data, text, layout))
    steps = faults.records(tmp_path / "run")
    assert [r["applied"] for r in steps] == [True] * 11
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in steps)
    assert out.summary["guard"]["incidents"] == 0 and not (tmp_path / "run" / "incidents").exists()
    of_pictures = [r for r in steps if r["stage"] == "pictures"]
    assert {r["rows"] for r in of_pictures} == {4 if layout == "1x4" else 2}
    assert {r["samples"] for r in of_pictures} == {4}


def gradients_of(built: Any, step: Any) -> dict[str, torch.Tensor]:
    """What the optimizer is given for a step, which it does not take."""
    found: dict[str, torch.Tensor] = {}
    optimizer = built.optimizer
    optimizer.step = lambda factor: found.update((n, g.clone()) for n, g in optimizer.gradients())
    result = run_step(
        built.root, step.rows, {"loss": step.num_supervised}, optimizer, built.part_of, factor=1.0, clip_norm=None
    )
    assert result.applied
    return found


@pytest.mark.parametrize("text", TEXT_STAGES)
def test_both_accumulations_have_one_gradient(tmp_path: Path, base: Path, data: Path, text: str) -> None:
    """In float32, at the weights that the text stage left: every tensor within 1e-5 relative."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    out = runs.quiet_train(two_stages(tmp_path / "text", base, data, text, "1x4", "fp32"))
    model = Path(out.summary["checkpoint"]).parent.parent / "stages/1-text"
    model = model if text == "lora" else next((tmp_path / "text/checkpoints").glob("step-*3")) / "model"
    for layout in LAYOUTS:
        prepared = prepare(two_stages(tmp_path / layout, model, data, text, layout, "fp32").stages[1], QUIET)
        step = next(Pipeline(prepared.train, prepared.plan, prepared.limits).steps())
        assert len(step.rows) == (4 if layout == "1x4" else 2)
        found[layout] = gradients_of(build(prepared), step)
    assert found["1x4"].keys() == found["2x2"].keys() and len(found["1x4"]) > 10
    for name, gradient in found["1x4"].items():
        assert float((found["2x2"][name] - gradient).norm() / gradient.norm()) <= 1e-5, name


def test_a_sample_without_targets_is_named(tmp_path: Path, base: Path, data: Path) -> None:
    """All labels masked: the mean over nothing is NaN elsewhere. Here its line is told before the first step."""
    masked = tmp_path / "masked"
    shutil.copytree(data.parent, masked)
    lines = data.read_text().splitlines()
    row = json.loads(lines[2])
    row["messages"][1]["weight"] = 0
    (masked / "train.jsonl").write_text("".join(f"{line}\n" for line in [*lines[:2], json.dumps(row), *lines[3:]]))
    with pytest.raises(DataError, match="NO_TARGET") as caught:
        runs.quiet_train(two_stages(tmp_path / "run", base, masked / "train.jsonl", "full", "1x4"))
    assert f"{masked / 'train.jsonl'}:3: messages[1].content" in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


PLANTED: dict[str, tuple[dict[str, Any], str, str | None, list[int] | None]] = {
    "NaN pixel": ({"before_step": faults.nan_feature}, "bad_input", "first", [WHITE]),
    "overflow weight": ({"before_step": faults.huge_weight}, "forward_overflow", "down", None),
    "Inf gradient": ({"at_build": faults.inf_gradient}, "backward_only", "head_norm", None),
    "bad optimizer state": ({"after_step": faults.nan_moment}, "bad_state", None, []),
}
"""What is planted, and the cause, module and samples that must be named."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cause", PLANTED)
def test_each_cause_is_named(
    tmp_path: Path, family: str, base: Path, data: Path, monkeypatch: Any, cause: str, layout: str
) -> None:
    plant, named, at, samples = PLANTED[cause]
    live = faults.plant(monkeypatch, family, data, **plant)
    runs.quiet_train(two_stages(tmp_path / "run", base, data, "full", layout))
    found = faults.incidents(tmp_path / "run")
    assert found and {i["cause"] for i in found} == {named}
    assert {i["module"] for i in found} == {at and getattr(live.places, at)}
    for i in found:
        assert [s["number"] for s in i["samples"]] == (samples or []) and i["every_sample"] == (samples is None)
        assert i["step"] > 3 or cause == "Inf gradient"  # planted in step 4 of a stage; the hook is there in both
    for state in (tmp_path / "run/checkpoints").glob("*/state/training.safetensors"):
        assert all(t.isfinite().all() for t in load_file(state).values())
    assert found[0]["step"] == 3 + AT or cause in ("NaN pixel", "Inf gradient")
    live.step = 0
    if "at_build" not in plant:
        monkeypatch.undo()
    for i in found:
        assert replay(i["path"], QUIET) == 0
