"""Incidents on a full disk and in damaged files; features that must not be kept."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
import runs
import tiny
from faults import AT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lensmith.core.errors import ConfigError, DataError, RunError, UserError
from lensmith.model import vision_cache
from lensmith.recipe import incident as incident_module
from lensmith.recipe import rescue as rescue_module
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_data(tmp_path_factory.mktemp("data"))


def events(folder: Path) -> list[str]:
    return [r["name"] for r in faults.records(folder, "event")]


def test_a_full_disk_loses_the_incident_not_the_run(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Tensors, and then the history too. The sample is left out all the same after the second time."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def no_room(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    faults.plant(monkeypatch, FAMILY, data, at_build=faults.nan_pixel)
    monkeypatch.setattr(incident_module, "save_file", full)
    monkeypatch.setattr(rescue_module, "write_atomically", no_room)
    out = runs.quiet_train(faults.run_of(tmp_path / "run", base, data))
    assert out.summary["guard"]["excluded"] == 1
    assert faults.incidents(tmp_path / "run") == [] and list((tmp_path / "run/incidents").iterdir()) == []
    said = events(tmp_path / "run")
    assert said.count("incident_lost") == 2 and said.count("history_lost") == 3 and said.count("excluded") == 1


def test_a_run_is_done_without_its_report(
    base: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def broken(folder: Path) -> Path:
        raise DataError("RUN_FOLDER", "not JSON", where=str(folder / "incidents/step-000001/incident.json"))

    monkeypatch.setattr(session_module, "write_report", broken)
    out = runs.quiet_train(faults.run_of(tmp_path / "run", base, data))
    assert Path(out.summary["checkpoint"]).is_dir() and "no report" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ['{"step": 1, ', "[1]", '{"schema": 1, "step": 1}'])
def test_a_damaged_incident_does_not_end_the_run_that_has_another(
    damage: str, base: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def before(live: faults.Live) -> None:
        if live.step == AT:
            old = tmp_path / "run/incidents/step-000001"
            old.mkdir(parents=True, exist_ok=True)
            (old / "incident.json").write_text(damage)
        faults.nan_weight(live)

    faults.plant(monkeypatch, FAMILY, data, before_step=before)
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data))
    assert events(tmp_path / "run").count("roll_back") == 1
    assert "step-000001/incident.json" in capsys.readouterr().err


def test_a_damaged_history_is_said_at_a_resume(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    over: dict[str, Any] = {"train": {"max_steps": 5}}
    faults.plant(monkeypatch, FAMILY, data, before_step=faults.nan_weight)
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **over))
    monkeypatch.undo()
    monkeypatch.setattr(session_module, "write_report", lambda folder: folder)
    path = tmp_path / "run/incidents/history.json"
    more = faults.run_of(tmp_path / "run", base, data, train={"max_steps": 7})
    for damage in (path.read_text()[:-9], '{"0": {"history": []}}', "[1]"):
        path.write_text(damage)
        with pytest.raises(RunError, match=r"RESUME.*history\.json") as found:
            runs.quiet_train(more)
        assert "delete this file" in found.value.remedy
    path.unlink()
    out = runs.quiet_train(more)
    assert out.summary["guard"]["incidents"] == 1  # the checkpoint knows it too


# -- replays ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def incident(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("incident")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "write_report", lambda folder: folder)
        faults.plant(patch, FAMILY, data, before_step=faults.huge_weight)
        with pytest.raises(RunError):
            runs.quiet_train(faults.run_of(folder / "run", base, data, guard={"on_nonfinite": "stop"}))
    return folder / "run/incidents/step-000004"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        about = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in about.items() if v != "gone"}))

    return change


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no row": ("row.safetensors", Path.unlink, "row.safetensors"),
    "half a row": ("row.safetensors", cut, "row.safetensors"),
    "no random state": ("random.safetensors", Path.unlink, "random.safetensors"),
    "half of the tensors": ("tensors.safetensors", cut, "tensors.safetensors"),
    "no hashes": ("hashes.json", Path.unlink, "hashes.json"),
    "half of the hashes": ("hashes.json", cut, "hashes.json"),
    "half of incident.json": ("incident.json", cut, "incident.json"),
    "a list": ("incident.json", lambda path: path.write_text("[1]"), "not a mapping"),
    "a later schema": ("incident.json", changed(schema=2), "later lensmith"),
    "no schema": ("incident.json", changed(schema="gone"), "schema None is unknown"),
    "without a key": ("incident.json", changed(model_folder="gone"), "model_folder"),
    "no run file": ("run.yaml", Path.unlink, "run.yaml"),
    "a moved base": ("incident.json", changed(model_folder="/nowhere"), "--base"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_incident_is_said_and_no_traceback(name: str, incident: Path, tmp_path: Path) -> None:
    file, damage, said = DAMAGES[name]
    folder = tmp_path / "step-000004"
    shutil.copytree(incident, folder)
    damage(folder / file)
    with pytest.raises(UserError) as found:
        replay(folder, QUIET)
    assert said in str(found.value) and found.value.remedy and str(found.value.where)


def test_a_moved_incident_and_a_moved_base(incident: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(incident, folder)
    shutil.copytree(base, tmp_path / "model")
    changed(model_folder="/nowhere")(folder / "incident.json")
    assert replay(folder, QUIET, base=tmp_path / "model") == 0


def test_another_model_as_the_base(incident: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "wide", FAMILY, hidden=64)
    with pytest.raises(ConfigError, match=r"REPLAY.*the model has no .*of shape"):
        replay(incident, QUIET, base=other)


# -- features ---------------------------------------------------------------------------------------------------------


def test_a_feature_that_is_not_finite_is_dropped_from_the_disk(
    base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """One on disk is not: the first run that meets it leaves the step out and forgets it; then all is well."""
    over: dict[str, Any] = {
        "tune": LORA, "vision_cache": {"disk_mb": 64, "folder": str(tmp_path / "cache")}, "train": {"max_steps": 4},
    }  # fmt: skip
    runs.quiet_train(faults.run_of(tmp_path / "first", base, data, **over))
    file = next((tmp_path / "cache").rglob("*.safetensors"))
    feature = load_file(file)["features"]
    good = feature.clone()
    feature[0, 0] = math.nan
    save_file({"features": feature}, file, metadata={"blake2b": vision_cache._digest(feature)})
    runs.quiet_train(faults.run_of(tmp_path / "second", base, data, **over))
    (found,) = faults.incidents(tmp_path / "second")
    assert found["cause"] == "bad_input" and len(found["samples"]) == 1 and found["action"] == "skip"
    assert not file.exists() or bool(load_file(file)["features"].equal(good))
    assert replay(found["path"], QUIET) == 0
    runs.quiet_train(faults.run_of(tmp_path / "third", base, data, **over))
    assert faults.incidents(tmp_path / "third") == [] and load_file(file)["features"].equal(good)


def test_a_feature_that_is_not_finite_is_never_kept(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A picture whose features come out NaN: named at the tower, and nothing of it is on disk."""
    faults.plant(monkeypatch, FAMILY, data, at_build=faults.nan_pixel)
    over: dict[str, Any] = {"tune": LORA, "vision_cache": {"disk_mb": 64, "folder": str(tmp_path / "cache")}}
    runs.quiet_train(faults.run_of(tmp_path / "run", base, data, **over))
    found = faults.incidents(tmp_path / "run")
    places = faults.FAMILIES[FAMILY]
    assert [(i["cause"], i["module"], i["part"]) for i in found] == [("bad_input", places.patches, "vision")] * 2
    assert [[s["number"] for s in i["samples"]] for i in found] == [[faults.WHITE]] * 2
    kept = [load_file(file)["features"] for file in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(kept) == 23 and all(bool(k.isfinite().all()) for k in kept)
