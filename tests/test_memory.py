"""What a run is predicted to need, against the same run with values and against numbers derived by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from torch import nn

from lensmith.data.pipeline import Pipeline
from lensmith.engine import lean
from lensmith.model.memory import KINDS, NEEDS_VALUES, Kind, Ledger, make_fake, without_values
from lensmith.recipe import memory as of_run
from lensmith.recipe.build import build
from lensmith.recipe.check import check
from lensmith.recipe.memory import Prediction, kept_parts, predict, save_peak, step_peak, update_peak
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.report.terminal import Terminal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("data"), 24, pictures=4)


def prepared_run(folder: Path, data: Path, model_type: str = "qwen2_5_vl", **over: Any) -> Prepared:
    base = tiny.make_model(folder / "base", model_type, dtype=torch.bfloat16)
    run = runs.located(folder / "run", base, data, **{"data": {"cache": str(folder / "cache")}, **over})
    return prepare(run, Terminal("quiet"))


def prediction(prepared: Prepared) -> Prediction:
    found = predict(prepared, prepared.train, prepared.plan)
    assert found is not None
    return found


# -- the ledger -------------------------------------------------------------------------------------------------


def test_a_ledger_counts_what_lives_once() -> None:
    fake = without_values()
    with Ledger(CPU, fake) as ledger:
        with fake, ledger.making("weights"):
            w = nn.Parameter(torch.empty(4, 8))
        ledger.hold([w])
        ledger.begin()
        with ledger.making("activations"):
            y = torch.zeros(2, 8) @ w.t()  # x [2, 8] goes, w.t() is a view
            assert ledger.live["activations"] == 2 * 4 * 4 + 2 * 8 * 4  # x is kept for the gradient of w
            z = y.to(torch.bfloat16)
            del y
            assert ledger.live["activations"] == 2 * 4 * 2 + 2 * 8 * 4
            z.sum().backward()
        assert ledger.live["weights"] == 4 * 8 * 4
        ledger.name([w.grad], "gradients")  # type: ignore[list-item]
        assert ledger.live["gradients"] == 4 * 8 * 4
        assert ledger.peak["activations"] >= 2 * 8 * 4 + 4 * 8 * 4  # x, and the gradient before it had its name
        del z
        w.grad = None
    assert sum(ledger.live.values()) == 4 * 8 * 4


def test_kinds_are_told_by_shape_and_origin() -> None:
    fake = without_values()
    with Ledger(CPU, fake) as ledger:
        with fake:
            w = nn.Parameter(torch.empty(10, 8))
        ledger.hold([w])
        ledger.vocabulary = 10
        with ledger.making("activations"), torch.autocast("cpu", torch.bfloat16):
            logits = torch.nn.functional.linear(torch.zeros(3, 8), w)
            assert ledger.live == Counter(weights=320, casts=160, logits=60, activations=48)  # x in float32 is gone
        del logits
    assert ledger.live["logits"] == 0


def test_small_blocks_stay_when_they_are_freed() -> None:
    fake = without_values()
    with Ledger(CPU, fake, kept_below=100) as ledger, fake:
        small, large = torch.empty(20), torch.empty(30)  # 80 and 120 bytes
        del small, large
        assert ledger.resident == 200
        ledger.begin()
        assert (ledger.resident, ledger.peak.total()) == (80, 0)
        kept = torch.empty(15), torch.empty(30)
        assert (ledger.resident, ledger.peak.total()) == (200, 180)
        del kept


def test_mapped_files_stay_until_their_last_tensor_is_gone() -> None:
    fake, model = without_values(), nn.Sequential(nn.Linear(8, 4, device="meta"), nn.Linear(4, 8, device="meta"))
    with Ledger(CPU, fake) as ledger:
        make_fake(model, fake, torch.bfloat16, CPU, [500])
        assert ledger.live["weights"] == 500
        for p in model[0].parameters():
            p.data = p.data.float()
        assert ledger.live["weights"] == 500 + 36 * 4
        for p in model[1].parameters():
            p.data = p.data.float()
        assert ledger.live["weights"] == 76 * 4


# -- a run ------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": {"preset": "bf16"}},
    "masters": {"precision": {"preset": "bf16-params"}},
    "compensated": {"precision": {"preset": "bf16-params-compensated"}},
    "recompute": {"precision": {"preset": "bf16"}, "train": {"recompute": True}},
    "lora": {"precision": {"preset": "bf16"}, "tune": {"kind": "lora", "dropout": 0.1}},
    "projector": {"precision": {"preset": "bf16"}, "tune": {"kind": "freeze", "train": ["projector"]}},
}


def peaks_with_values(prepared: Prepared, found: Prediction) -> dict[str, Counter[Kind]]:
    """What a ledger sees of the same phases, of the same row, with values."""
    built = build(prepared)
    built.root.cache = found.built.root.cache
    with Ledger(CPU, without_values()) as ledger:
        model = built.tuned.model
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach()
        with ledger.making("masters"):
            for name, p in built.optimizer.named:
                if built.optimizer.master[name] is not p:
                    built.optimizer.master[name].detach()
        with ledger.making("optimizer"):
            for state in built.optimizer.lean.state.values():
                _ = state.exp_avg.detach(), state.exp_avg_sq.detach()
        with ledger.making("masters"):
            for state in built.optimizer.lean.state.values():
                _ = None if state.residual is None else state.residual.detach()
        ledger.hold(model.parameters())
        ledger.vocabulary = model.get_output_embeddings().weight.shape[0]
        return {
            "Update": update_peak(ledger, built),
            "Forward, backward": step_peak(ledger, built, found.row, several=True),
            "Save": save_peak(ledger, built, adapters_only=built.tuned.peft is not None),
        }


def uncertain(found: Prediction, kind: Kind) -> int:
    """A count of updates for each tensor; and index tables of the row, some of which are kept for the next row."""
    return {"optimizer": 4 * len(found.built.optimizer.named), "activations": 24 * found.row.num_tokens}.get(kind, 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_is_that_of_a_run_with_values(name: str, data: Path, tmp_path: Path) -> None:
    prepared = prepared_run(tmp_path, data, **SETTINGS[name])
    found = prediction(prepared)
    real = peaks_with_values(prepared, found)
    for phase in found.phases[1:]:
        for kind in KINDS[1:]:
            assert abs(phase.kinds.get(kind, 0) - real[phase.name][kind]) <= uncertain(found, kind), (phase, kind)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_other_families(model_type: str, data: Path, tmp_path: Path) -> None:
    prepared = prepared_run(tmp_path, data, model_type)
    found = prediction(prepared)
    want = peaks_with_values(prepared, found)["Forward, backward"]
    kinds = next(phase.kinds for phase in found.phases if phase.name == "Forward, backward")
    assert abs(kinds["activations"] - want["activations"]) <= uncertain(found, "activations")
    assert kinds["logits"] == want["logits"]


BYTES_OF_STATE = {
    "fp32": (0, 8),
    "bf16-params": (4, 8),
    "bf16-params-compensated": (2, 8),
    "bf16-params-stochastic": (0, 8),
}


@pytest.mark.parametrize("preset", BYTES_OF_STATE)
def test_what_is_kept_of_a_parameter(preset: str, data: Path, tmp_path: Path) -> None:
    found = prediction(prepared_run(tmp_path, data, precision={"preset": preset}))
    masters, moments = BYTES_OF_STATE[preset]
    count = sum(p.numel() for p in found.built.root.model.parameters())
    kinds = next(phase.kinds for phase in found.phases if phase.name == "Forward, backward")
    assert kinds.get("masters", 0) == masters * count
    steps = 4 * len(found.built.optimizer.named)  # a count of updates for each tensor
    assert moments * count <= kinds["optimizer"] <= moments * count + steps
    assert kinds["gradients"] == 4 * count


def test_moments_in_half_precision_and_updates_one_parameter_at_a_time(data: Path, tmp_path: Path) -> None:
    parts = {part: {"optimizer": "bfloat16"} for part in ("vision", "projector", "language", "embeddings")}
    found = prediction(prepared_run(tmp_path, data, precision={"preset": "bf16-params-stochastic", "parts": parts}))
    phases = {phase.name: phase.kinds for phase in found.phases}
    sizes = [p.numel() for p in found.built.root.model.parameters()]
    kept = 4 * sum(sizes)
    assert kept <= phases["Forward, backward"]["optimizer"] <= kept + 4 * len(sizes)
    # both moments, the value and, one after the other, denominator or noise and bits, of the largest parameter
    assert kept + 4 * 4 * max(sizes) <= phases["Update"]["optimizer"] <= kept + 6 * 4 * max(sizes)


def test_updates_without_masters_go_slice_by_slice(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "SLICE", 1000)
    found = prediction(prepared_run(tmp_path, data, precision={"preset": "bf16-params-compensated"}))
    phases = {phase.name: phase.kinds["optimizer"] for phase in found.phases if phase.name != "Loading"}
    assert phases["Update"] <= phases["Save"] + 6 * 4 * 1000


def test_recomputing_needs_less(data: Path, tmp_path: Path) -> None:
    found = [
        prediction(prepared_run(tmp_path, data, train={"recompute": on}, batch={"device_tokens": 2048}))
        for on in (False, True)
    ]
    plain, less = (f.phases[2].kinds["activations"] for f in found)
    assert less < 0.7 * plain


def test_casts_go_with_their_block_where_blocks_are_recomputed(data: Path, tmp_path: Path) -> None:
    found = [
        prediction(prepared_run(tmp_path, data, train={"recompute": on}, precision={"preset": "bf16"}))
        for on in (False, True)
    ]
    plain, less = (f.phases[2].kinds["casts"] for f in found)
    assert less < 0.25 * plain


def test_no_memory_is_taken(tmp_path: Path, data: Path) -> None:
    """400 million parameters more than are on disk."""
    prepared = prepared_run(tmp_path, data)
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text["vocab_size"] = 12_500_000
    file.write_text(json.dumps(config))
    before = resident()
    found = prediction(prepared)
    assert found.peak.total > 16 * 400e6
    assert resident() - before < 300 << 20


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def test_features_of_a_frozen_tower(data: Path, tmp_path: Path) -> None:
    prepared = prepared_run(tmp_path, data, tune={"kind": "lora"}, train={"max_steps": 20})
    found = prediction(prepared)
    built = build(prepared)
    assert built.root.cache is not None
    for _, row in Pipeline(prepared.train, prepared.plan, prepared.limits).pictures(1 << 20):
        built.root.warm(row)
    cached = sum(v.numel() * v.element_size() for v in built.root.cache._memory.values())  # pyright: ignore
    assert abs(found.features - cached) < 0.35 * cached  # two pictures of a sample count as equally large


def test_the_largest_row_is_taken(data: Path, tmp_path: Path) -> None:
    prepared = prepared_run(tmp_path, data, tune={"kind": "lora"})
    found = prediction(prepared)
    pipeline = Pipeline(prepared.train, prepared.plan, prepared.limits)
    rows = [row for step in prepared.plan.steps() for row in pipeline.rows_of(step)]
    assert found.row.num_tokens == max(sum(m.tokens for m in row) for row in rows)


# -- what check says --------------------------------------------------------------------------------------------


def test_check_shows_precision_and_memory(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepared_run(tmp_path, data, tune={"kind": "lora"}, precision={"preset": "bf16"})
    check(prepared.located, Terminal("json"))
    events = {e["event"]: e for e in map(json.loads, capsys.readouterr().out.splitlines())}
    rows = {row["Part"]: row for row in events["precision"]["rows"]}
    frozen = {"On disk": "bf16", "Frozen": "bf16", "Trained": "–", "Compute": "bf16", "Gradients": "–", "Saved": "–"}
    assert rows["language"].items() >= frozen.items()
    adapter = {"On disk": "–", "Frozen": "–", "Trained": "fp32", "Gradients": "fp32", "Optimizer": "fp32"}
    assert rows["adapter"].items() >= {**adapter, "Saved": "fp32"}.items()
    kinds = [row["Kind"] for row in events["memory"]["rows"]]
    assert {"weights", "gradients", "optimizer", "activations", "vision cache", "allocator"} <= set(kinds)
    peak = events["peak"]
    assert peak["bytes"] == sum(peak["by_kind"].values()) < peak["room_bytes"]
    assert "warning" not in events


def test_code_that_asks_for_single_values_is_counted(data: Path, tmp_path: Path) -> None:
    """A frozen tower whose features are looked at, and an optimizer that reads norms; a whole number ends it."""
    ledger = Ledger(CPU, without_values())
    with ledger, ledger.fake:
        x = torch.randn(3)
        assert bool(torch.isfinite(x).all()) and float(x.sum()) == 1.0
        with pytest.raises(NEEDS_VALUES):
            int(x.argmax())
    frozen_tower = {"kind": "freeze", "train": ["language"]}
    over: dict[str, Any] = {"optimizer": {"kind": "adafactor", "lr": 1e-3}, "tune": frozen_tower}
    prepared = prepared_run(tmp_path, data, **over)
    assert prediction(prepared).peak.total > 0


def test_types_are_shown_where_memory_is_not_predicted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 input features in NF4 with double quantisation: half a byte, one for 64, four for 16,384."""
    pytest.importorskip("bitsandbytes")
    tune = {"kind": "lora", "full": ["projector"], "quantize": {"bits": 4, "parts": ["language"]}}
    prepared = prepared_run(tmp_path, data, tune=tune, precision={"preset": "bf16"})
    check(prepared.located, Terminal("json"))
    events = {e["event"]: e for e in map(json.loads, capsys.readouterr().out.splitlines())}
    rows = {row["Part"]: row for row in events["precision"]["rows"]}
    assert rows["language"].items() >= {"Frozen": "bf16 + nf4", "Trained": "–", "Saved": "–"}.items()
    assert rows["projector"].items() >= {"Trained": "fp32", "Gradients": "fp32", "Saved": "fp32"}.items()
    assert "bitsandbytes" in events["warning"]["message"] and "memory" not in events
    plan, parts = kept_parts(prepared)
    assert plan.preset == "bf16"
    packed = [k for k in parts["language"] if k.type == "nf4"]
    assert packed and all(k.num_bytes == round(k.count * (0.5 + 1 / 64 + 4 / 16384)) for k in packed)


def test_check_warns_when_the_device_is_too_small(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_run, "room", lambda device: 1 << 20)
    prepared = prepared_run(tmp_path, data)
    check(prepared.located, Terminal("json"))
    said = [e["message"] for e in map(json.loads, capsys.readouterr().out.splitlines()) if e["event"] == "warning"]
    assert len(said) == 1 and "1.0 MiB" in said[0] and "train.recompute: true" in said[0]


def test_room_is_within_the_machine() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:"))
    assert 0 < of_run.room(CPU) <= total
