"""Code that a model brings: never run unasked; pinned to the byte; listed, recorded, and part of what a run is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from lensmith.config.build import build
from lensmith.config.yaml_file import Tree
from lensmith.core.errors import ConfigError, ModelError, RunError
from lensmith.model.options import Model
from lensmith.model.remote_code import check, code_files, digest_of
from lensmith.model.source import resolve
from lensmith.recipe import session
from lensmith.recipe.check import check as check_run
from lensmith.report.terminal import Terminal

MODELING = """import os
from pathlib import Path

from transformers import Qwen2_5_VLForConditionalGeneration

from .helper_tiny import MARK

Path(os.environ[MARK]).touch()


class TinyRemote(Qwen2_5_VLForConditionalGeneration):
    pass
"""
HELPER = 'MARK = "REMOTE_MARK"\n'
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, qwen25: Path) -> Path:
    """A model folder that brings a class; transformers has one of its own for it."""
    out = Path(shutil.copytree(qwen25, tmp_path / "model"))
    (out / "modeling_tiny.py").write_text(MODELING)
    (out / "helper_tiny.py").write_text(HELPER)
    set_config(out, auto_map={"AutoModelForImageTextToText": "modeling_tiny.TinyRemote"})
    live_names(out / "model.safetensors")
    return out


def live_names(file: Path) -> None:
    """transformers renames the tensors of its own classes only; a brought class reads the names of its modules."""
    from safetensors.torch import load_file, save_file

    renamed = {}
    for name, tensor in load_file(file).items():
        name = f"model.{name}" if name.startswith("visual.") else re.sub(r"^model\.", "model.language_model.", name)
        renamed[name] = tensor
    save_file(renamed, file, metadata={"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def options(folder: Path, pin: str | None = None, **more: Any) -> Model:
    return Model(path=str(folder), remote_code=pin, **more)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pin_of(folder: Path) -> str:
    """Two lines as `sha256sum *.py` prints them, hashed."""
    lines = [f"{sha(folder / name)}  {name}\n" for name in ("helper_tiny.py", "modeling_tiny.py")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_class_of_ours_or_of_transformers_needs_no_code(folder: Path) -> None:
    assert check(folder, options(folder)) is None
    set_config(folder, model_type="something_else")
    assert check(folder, options(folder), native=True) is None
    set_config(folder, auto_map={"AutoTokenizer": ["a.B", None], "AutoProcessor": "c.D"})
    assert check(folder, options(folder)) is None


def test_code_is_refused_with_what_would_be_run_and_how_to_pin_it(folder: Path) -> None:
    set_config(folder, model_type="something_else")
    with pytest.raises(ModelError, match="REMOTE_CODE") as caught:
        check(folder, options(folder))
    for name in ("modeling_tiny.py", "helper_tiny.py"):
        assert f"{sha(folder / name)}  {name}" in caught.value.message
    line = re.search(r"model: \{remote_code: ([0-9a-f]{64})\}", caught.value.remedy)
    assert line is not None and line[1] == pin_of(folder)
    found = check(folder, options(folder, line[1]))
    assert found is not None and found.digest == line[1] and found.commit is None
    assert found.auto_class == "AutoModelForImageTextToText"
    assert found.files == {n: sha(folder / n) for n in ("helper_tiny.py", "modeling_tiny.py")}


@pytest.mark.parametrize("change", ["helper_tiny.py", "modeling_tiny.py", "new.py", "deeper/new.py"])
def test_any_other_byte_or_file_is_refused(change: str, folder: Path) -> None:
    pin = pin_of(folder)
    (folder / "deeper").mkdir()
    with (folder / change).open("a") as file:
        file.write("\n")
    with pytest.raises(ModelError, match="REMOTE_CODE") as caught:
        check(folder, options(folder, pin))
    now = digest_of(code_files(folder))
    assert pin != now and pin in caught.value.message and now in caught.value.message and now in caught.value.remedy
    assert f"{sha(folder / change)}  {change}" in caught.value.message


def test_a_pin_without_code(folder: Path, qwen25: Path) -> None:
    for model, native in ((qwen25, False), (folder, True)):
        with pytest.raises(ConfigError, match=r"REMOTE_CODE.*\n.*take it out"):
            check(model, options(model, "0" * 64), native=native)


def test_code_that_is_elsewhere(folder: Path) -> None:
    set_config(folder, auto_map={"AutoModel": "other/repository--modeling_tiny.TinyRemote"})
    with pytest.raises(ModelError, match=r"another repository: other/repository"):
        check(folder, options(folder, pin_of(folder)))
    set_config(folder, auto_map={"AutoModel": "modeling_gone.TinyRemote"})
    with pytest.raises(ModelError, match=r"modeling_gone\.py, which is not there"):
        check(folder, options(folder, pin_of(folder)))


@pytest.mark.parametrize("value", ["main", COMMIT[:39], COMMIT.upper(), "g" * 40, True])
def test_a_pin_is_a_commit_or_a_digest(value: Any) -> None:
    with pytest.raises(ConfigError, match="remote_code"):
        build(Model, Tree({"path": "m", "remote_code": value}))
    assert build(Model, Tree({"path": "m", "remote_code": COMMIT})).remote_code == COMMIT


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as `some/model` at a commit in a cache of the Hub."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return snapshot


def test_the_commit_of_the_hub(hub: Path, tmp_path: Path) -> None:
    asked = Model(path="some/model", remote_code=COMMIT)
    assert resolve(asked, tmp_path) == hub
    found = check(hub, asked)
    assert found is not None and found.commit == COMMIT and found.digest == pin_of(hub)
    assert check(hub, Model(path="some/model", remote_code=pin_of(hub))) is not None
    other = COMMIT[::-1]
    with pytest.raises(ModelError, match="REMOTE_CODE") as caught:
        check(hub, Model(path="some/model", remote_code=other))
    assert other in caught.value.message and COMMIT in caught.value.message
    with pytest.raises(ModelError, match="MODEL_PATH"):  # the other commit, not the one that `main` is
        resolve(Model(path="some/model", remote_code=other), tmp_path)
    with pytest.raises(ConfigError, match=r"REMOTE_CODE.*model\.revision is main"):
        resolve(Model(path="some/model", revision="main", remote_code=COMMIT), tmp_path)


def test_a_refusal_names_the_commit(hub: Path) -> None:
    set_config(hub, model_type="something_else")
    with pytest.raises(ModelError, match="REMOTE_CODE") as caught:
        check(hub, Model(path="some/model"))
    assert f"model: {{remote_code: {COMMIT}}}" in caught.value.remedy
    assert f"{sha(hub / 'modeling_tiny.py')}  modeling_tiny.py" in caught.value.message


def test_weights_and_code_are_fetched_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(name: str, **how: Any) -> str:
        asked.append(how)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve(Model(path="some/model", revision="main"), tmp_path)
    resolve(Model(path="some/model", remote_code=COMMIT), tmp_path)
    resolve(Model(path="some/model", revision="main", remote_code="0" * 64), tmp_path)
    assert [a["revision"] for a in asked] == ["main", COMMIT, "main"]
    assert all("*.py" in a["allow_patterns"] and "*.bin" not in a["allow_patterns"] for a in asked)


# -- running it -------------------------------------------------------------------------------------------------------

LOAD = """
import json, os, sys
from pathlib import Path
from transformers import AutoModelForImageTextToText
from lensmith.model.options import Model
from lensmith.model.remote_code import check
folder, out, found = Path(sys.argv[1]), Path(sys.argv[3]), []
for pin in (None, sys.argv[2]):
    code = check(folder, Model(path=str(folder), remote_code=pin))
    how = code.arguments if code else {"trust_remote_code": False}
    model = AutoModelForImageTextToText.from_pretrained(folder, **how)
    model.save_pretrained(out / str(bool(pin)))
    found.append([type(model).__name__, os.path.exists(os.environ["REMOTE_MARK"])])
print(json.dumps(found))
"""


def test_only_pinned_code_runs(folder: Path, tmp_path: Path) -> None:
    """In a process with a module cache of its own: without the pin, then with it."""
    out = tmp_path / "saved"
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "REMOTE_MARK": str(tmp_path / "mark")}
    command = [sys.executable, "-c", LOAD, str(folder), pin_of(folder), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [["Qwen2_5_VLForConditionalGeneration", False], ["TinyRemote", True]]
    assert not list((out / "False").glob("*.py"))
    assert (out / "True" / "modeling_tiny.py").read_text() == MODELING


def test_a_run_lists_and_records_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder: folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("REMOTE_MARK", str(tmp_path / "mark"))
    data, pin = tiny.make_chat(tmp_path, 8, pictures=2), pin_of(folder)

    def run(pin: str | None, steps: int) -> Any:
        model = {"model": {"remote_code": pin}} if pin else {}
        train = {"train": {"max_steps": steps}, "tune": {"kind": "lora", "rank": 2}}
        return runs.located(tmp_path / "run", folder, data, **model, **train)

    check_run(run(pin, 1), Terminal("json"))
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    listed = next(e for e in events if e["event"] == "remote_code")["rows"]
    assert listed == [{"file": n, "SHA-256": sha(folder / n)} for n in ("helper_tiny.py", "modeling_tiny.py")]

    out = runs.quiet_train(run(pin, 1))
    assert (tmp_path / "mark").exists()
    kept = json.loads((out.folder / "versions.json").read_text(encoding="utf-8"))["remote_code"]
    assert kept["digest"] == pin and kept["commit"] is None and kept["files"] == code_files(folder)
    manifest = json.loads((Path(out.summary["checkpoint"]) / "MANIFEST.json").read_text(encoding="utf-8"))
    assert manifest["identity"]["model.remote_code"] == pin

    (folder / "helper_tiny.py").write_text(HELPER + "\n")
    with pytest.raises(ModelError, match="REMOTE_CODE"):
        runs.quiet_train(run(pin, 2))
    for other in (pin_of(folder), None):
        with pytest.raises(RunError, match=rf"RESUME.*\n.*model\.remote_code: checkpoint {pin}"):
            runs.quiet_train(run(other, 2))
