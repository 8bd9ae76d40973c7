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

from lensmith.core.errors import RunError
from lensmith.family.registry import part_of_kind
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
