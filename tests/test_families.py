"""What holds in every family alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import all_families
import pytest
import runs
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lensmith.checkpoint.inspect import inspect
from lensmith.core.errors import ModelError, RunError
from lensmith.family.registry import load_family, part_of_kind
from lensmith.recipe.check import check
from lensmith.recipe.export import export
from lensmith.recipe.inspect import parts_of
from lensmith.report.terminal import Terminal


@pytest.mark.parametrize("name", all_families.MAKERS)
def test_parts_are_known_from_names_alone(name: str, tmp_path: Path) -> None:
    """Of the tensors on disk, whatever the preprocessor says: `inspect` needs no more."""
    folder = all_families.make(tmp_path / "model", name)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (folder / file).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    part_of = part_of_kind(config["model_type"])
    assert {part_of(n) for n in names} >= {"vision", "projector", "language", "embeddings"}
    known = parts_of(folder)
    assert known is not None and [known(n) for n in names] == [part_of(n) for n in names]


def config_with(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in change.items():
        if value is None:
            config.pop(key)
        else:
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


EXPERTS = {
    "internvl": "qwen3_moe", "llava": "mixtral", "llava_next": "qwen2_moe", "smolvlm": "gpt_oss", "gemma3": "qwen3_moe",
    "minicpmv4_6": "qwen3_5_moe_text",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_refused(name: str, tmp_path: Path) -> None:
    folder = config_with(all_families.make(tmp_path, name), {"text_config": {"model_type": EXPERTS[name]}})
    with pytest.raises(ModelError, match=rf"MODEL_FORM.*config\.json.*{EXPERTS[name]}.*mixture of experts"):
        load_family(folder)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("gemma3", {"vision_config": None}, "vision_config"),
        ("idefics3", {"vision_config": None}, "vision_config"),
        ("internvl", {"vision_config": None}, "vision_config"),
        ("minicpmv4_6", {"text_config": None}, "text_config"),
        ("internvl", {"vision_config": "siglip"}, "wrong type"),
        ("minicpmv", {"patch_size": "14"}, "patch_size is '14'"),
        ("minicpmv", {"query_num": 0}, "query_num is 0"),
    ],
)
def test_a_config_of_something_else(name: str, change: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = config_with(all_families.make(tmp_path, name), change)
    with pytest.raises(ModelError, match=f"MODEL_FILE.*{found}"):
        load_family(folder)


@pytest.mark.parametrize(
    ("text", "found"),
    [("[]", "not a JSON object but a list"), ('{"model_type": ["llava"]}', r"model_type is \['llava'\]")],
)
def test_a_config_that_is_none_stops_a_check_and_an_export(text: str, found: str, tmp_path: Path) -> None:
    folder, data = all_families.make(tmp_path / "model", "qwen2_5_vl"), tiny.make_chat(tmp_path, 8, pictures=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused_everywhere(folder, data, tmp_path, rf"MODEL_FILE.*config\.json.*{found}")


@pytest.mark.parametrize("name", [n for n in all_families.MAKERS if n != "minicpmv"])
@pytest.mark.parametrize("value", ["null", "5"])
@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_a_part_without_settings_is_not_built_in_its_default_size(
    name: str, key: str, value: str, tmp_path: Path
) -> None:
    folder = all_families.make(tmp_path / "model", name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {key: json.loads(value)}), encoding="utf-8")
    found = [f.what for f in inspect(folder, parts_of(folder)).errors if f.code == "CONFIG"]
    assert found == [f"config.json: {key} is {value}, not an object"]
    with pytest.raises(ModelError, match=rf"MODEL_FILE.*{key} is {value}"):
        load_family(folder)
    with pytest.raises(ModelError, match=rf"MODEL_FILE.*{key} is {value}"):
        export(folder, tmp_path / "out", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=Terminal("quiet"))


@pytest.mark.parametrize("said", [True, False])
def test_a_model_in_8_bits_is_named_and_refused(said: bool, tmp_path: Path) -> None:
    folder, data = all_families.make(tmp_path / "model", "qwen2_5_vl"), tiny.make_chat(tmp_path, 8, pictures=2)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if said:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}), encoding="utf-8")
    finding = next(f for f in inspect(folder, parts_of(folder)).findings if f.code == "QUANTISED")
    assert f"F8_E4M3 are {name}" in finding.what and finding.severity == ("warning" if said else "error")
    refused_everywhere(folder, data, tmp_path, "QUANTISED.*" + ("quant_method fp8" if said else rf"{name} is F8_E4M3"))


def refused_everywhere(folder: Path, data: Path, out: Path, found: str) -> None:
    quiet = Terminal("quiet")
    with pytest.raises(ModelError, match=found):
        check(runs.located(out / "run", folder, data), quiet)
    with pytest.raises(ModelError, match=found):
        runs.quiet_train(runs.located(out / "run", folder, data))
    with pytest.raises(ModelError, match=found):
        export(folder, out / "out", base=None, merge=True, dtype="bfloat16", shard_gb=5.0, terminal=quiet)


OTHER: dict[str, dict[str, Any]] = {
    "idefics3": {"resample": 3},
    "llava": {"resample": 2},
    "internvl": {"resample": 2},
    "gemma3": {"resample": 3},
}
"""A setting of the preprocessor that changes pixels, and no count of tokens."""


@pytest.mark.parametrize("name", OTHER)
def test_a_resume_with_other_pictures_is_refused(name: str, tmp_path: Path) -> None:
    base, data = all_families.make(tmp_path / "model", name), tiny.make_chat(tmp_path, 8, pictures=2)

    def run(steps: int) -> Any:
        over = {"data": {"max_tokens": 4096}, "batch": {"device_tokens": 4096}, "train": {"max_steps": steps}}
        return runs.located(tmp_path / "run", base, data, tune={"kind": "lora", "rank": 2}, **over)

    runs.quiet_train(run(1))
    path = next(p for n in ("preprocessor_config.json", "processor_config.json") if (p := base / n).is_file())
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.get("image_processor", settings).update(OTHER[name])
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(RunError, match=r"RESUME.*\n  family\.resample: checkpoint"):
        runs.quiet_train(run(2))
