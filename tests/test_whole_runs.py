"""Whole runs over what a user may combine: parts that train, broken held-out pictures, precisions, metrics, sinks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from lensmith.core.errors import ConfigError, RunError
from lensmith.recipe.build import build
from lensmith.recipe.prepare import prepare
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text-only and picture rows, one sample a row below, so that some rows have no picture."""
    return tiny.make_chat(tmp_path_factory.mktemp("chat"), 16, pictures=6, text_only=0.5)


@pytest.mark.parametrize(
    "tune",
    [
        {"kind": "freeze", "train": ["projector"]},
        {"kind": "freeze", "train": ["vision"]},
        {"kind": "freeze", "train": ["vision", "projector", "head", "embeddings"]},
        {"kind": "freeze", "train": ["language"], "first_layers": 1},
        {"kind": "lora", "rank": 2, "parts": ["vision"]},
        {"kind": "lora", "rank": 2, "parts": ["vision", "projector", "language"], "dora": True},
        {"kind": "full"},
    ],
    ids=lambda t: "-".join(str(x) for v in t.values() for x in (v if isinstance(v, list) else [v])),
)
def test_any_part_trains_on_mixed_data(tmp_path: Path, chat: Path, tune: dict[str, Any]) -> None:
    base = tiny.make_model(tmp_path / "base", tie="head" not in tune.get("train", ()))
    over: dict[str, Any] = {"tune": tune, "batch": {"samples": 4, "packing": False}, "train": {"max_steps": 3}}
    out = runs.quiet_train(runs.located(tmp_path / "run", base, chat, **over))
    assert all(math.isfinite(x) for x in out.summary["losses"]) and out.summary["applied_steps"] == 3
    before = dict(build(prepare(runs.located(tmp_path / "x", base, chat, **over), QUIET)).optimizer.named)
    after = load_file(Path(out.summary["checkpoint"]) / "state" / "training.safetensors")
    assert [n for n, p in before.items() if not torch.equal(p, after[f"param/{n}"])]


def test_a_broken_held_out_picture_is_left_out_and_named(
    tmp_path: Path, qwen25: Path, chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tiny.make_chat(tmp_path, 5, pictures=5, text_only=0.0, name="held.jsonl")
    rows = [json.loads(x) for x in held.read_text().splitlines()]
    broken = tmp_path / rows[2]["images"][0]
    broken.write_bytes(broken.read_bytes()[:-30])
    run = runs.located(
        tmp_path / "run", qwen25, chat, data={"eval": str(held)}, evaluate={"generate": {"max_new_tokens": 2}}
    )
    out = runs.quiet_train(run)
    lost = sum(rows[2]["images"][0] in row["images"] for row in rows)
    assert out.summary["heldout"]["dropped"] == lost and math.isfinite(out.summary["heldout"]["after"]["loss"])
    assert "held.jsonl:3 is left out: IMG_TRUNCATED" in capsys.readouterr().err
    assert out.summary["heldout"]["n"] == 5 - lost


@pytest.mark.parametrize("preset", ["fp32", "bf16", "bf16-params"])
def test_what_trains_begins_with_the_bits_on_disk(tmp_path: Path, qwen25: Path, chat: Path, preset: str) -> None:
    """A float32 base is not rounded before its float32 parameters or masters are made."""
    built = build(prepare(runs.located(tmp_path / "run", qwen25, chat, precision={"preset": preset}), QUIET))
    disk = load_file(qwen25 / "model.safetensors")
    found = built.optimizer.tensors()["param/model.language_model.layers.0.mlp.up_proj.weight"]
    wanted = disk["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found.float(), wanted) and not torch.equal(wanted.bfloat16().float(), wanted)
    half = torch.float32 if preset != "bf16-params" else torch.bfloat16
    assert {p.dtype for p in built.root.model.parameters()} == {half}


def test_rates_of_parts_reach_adapters(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    over: dict[str, Any] = {"tune": {"kind": "lora", "rank": 2, "parts": ["vision", "language"]}}
    over["optimizer"] = {"kind": "adamw", "lr": 1e-3, "parts": {"vision": {"lr": 1e-5}}}
    built = build(prepare(runs.located(tmp_path / "run", qwen25, chat, **over), QUIET))
    assert {g.part: g.lr for g in built.optimizer.groups} == {"vision": 1e-5, "adapter": 1e-3}
    over["optimizer"]["parts"] = {"projector": {"lr": 1e-5}}
    with pytest.raises(ConfigError, match="projector"):
        build(prepare(runs.located(tmp_path / "run", qwen25, chat, **over), QUIET))


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"save": {"keep_best": "acuracy"}, "evaluate": {"every_steps": 1}}, "acuracy"),
        ({"save": {"keep_best": "loss"}}, "every_steps"),
        ({"train": {"early_stop": {"metric": "exact_match"}}, "evaluate": {"every_steps": 1}}, "exact_match"),
        ({"train": {"early_stop": {}}, "evaluate": {"every_steps": 1, "loss": False}}, "loss"),
        ({"evaluate": {"generate": {"groups": {"a": "("}}}}, "regular expression"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, over: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        runs.located(tmp_path / "run", tmp_path, tmp_path / "x.jsonl", data={"holdout": 0.5}, **over)


def test_resume_notices_other_targets(tmp_path: Path, qwen25: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "a b"}] * 2} for w in tiny.WORDS
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    runs.quiet_train(runs.located(tmp_path / "run", qwen25, data, train={"max_steps": 1}))
    rows[0]["messages"][1] = {**rows[0]["messages"][1], "train": False}
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    with pytest.raises(RunError, match="data"):
        runs.quiet_train(runs.located(tmp_path / "run", qwen25, data, train={"max_steps": 2}))


def test_moved_data_is_the_same_data(tmp_path: Path, qwen25: Path) -> None:
    """The split and the resume do not depend on where the files lie."""
    import shutil

    def held(folder: Path) -> list[int]:
        run = runs.located(tmp_path / "x", qwen25, folder / "train.jsonl", data={"holdout": 0.3})
        prepared = prepare(run, QUIET)
        assert prepared.held is not None
        return prepared.held.column("row").tolist()

    tiny.make_chat(tmp_path / "here", 30, pictures=30, text_only=0.1)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert held(tmp_path / "here") == held(tmp_path / "there") != []
    runs.quiet_train(runs.located(tmp_path / "run", qwen25, tmp_path / "here" / "train.jsonl", train={"max_steps": 1}))
    moved = runs.located(tmp_path / "run", qwen25, tmp_path / "there" / "train.jsonl", train={"max_steps": 2})
    assert runs.quiet_train(moved).summary["steps"] == 2


def test_a_dry_run_opens_no_sink(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    run = runs.located(tmp_path / "run", qwen25, chat, log={"sinks": ["tensorboard"]})
    runs.quiet_train(run, dry_run=True)
    assert not (tmp_path / "run").exists()


def test_pixel_limits_reach_both_processor_files(tmp_path: Path, chat: Path) -> None:
    base = tiny.make_model(tmp_path / "base")
    settings = json.loads((base / "preprocessor_config.json").read_text())
    (base / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    out = runs.quiet_train(runs.located(tmp_path / "run", base, chat, data={"max_pixels": 30_000}))
    folder = Path(out.summary["checkpoint"]) / "model"
    for name, inner in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        config = json.loads((folder / name).read_text())
        assert (config[inner] if inner else config)["size"]["longest_edge"] == 30_000


def test_a_family_decides_what_packing_is_exact(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    prepared = prepare(runs.located(tmp_path / "run", qwen25, chat), QUIET)
    alone = replace(prepared, family=SimpleNamespace(packing="one_sample_per_row"))
    assert prepared.limits.packing and not alone.limits.packing
