"""What holds in every family alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import all_families
import pytest
import runs
import tiny
from safetensors import safe_open

from lensmith.core.errors import ModelError, RunError
from lensmith.family.registry import load_family, part_of_kind
from lensmith.recipe.inspect import parts_of


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
