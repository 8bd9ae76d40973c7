"""Training on two ranks gives what one rank gives: every engine, full and LoRA, text and pictures."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks_kit import gradients, losses, on_ranks, recorded, train_all
from runs import located, quiet_train
from tiny import make_chat, make_model

from lensmith.core.errors import ConfigError, DataError, Drop, UserError
from lensmith.data.load import Loader
from lensmith.data.pipeline import Pipeline
from lensmith.engine.state import Saved, read_state
from lensmith.recipe import stage
from lensmith.recipe.check import check
from lensmith.recipe.run import Located
from lensmith.report.metrics import read_metrics
from lensmith.report.terminal import Terminal

STEPS = 10
ENGINES: dict[str, Any] = {
    "local": "local",
    "fsdp2": {"kind": "fsdp2"},
    "hsdp": {"kind": "fsdp2", "shard": 1},
    "zero1": {"kind": "deepspeed", "zero": 1},
    "zero2": {"kind": "deepspeed", "zero": 2},
    "zero3": {"kind": "deepspeed", "zero": 3},
}
TUNES: dict[str, Any] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4, "parts": ["language", "projector"]},
    "language": {"kind": "freeze", "train": ["language"]},
}
DATA = {"text": 1.0, "mixed": 0.6}


def cell_run(folder: Path, base: Path, source: Path, engine: str, tune: str, **over: Any) -> Located:
    over = {"data": {"max_tokens": 256}, "save": {"every_steps": 5}} | over
    return located(
        folder / f"{engine}-{tune}-{source.parent.name}" / "run", base, source,
        tune=TUNES[tune], parallel={"engine": ENGINES.get(engine, "local")},
        batch={"samples": 6, "device_tokens": 256},
        train={"max_steps": STEPS, "clip_norm": 1.0}, **over,
    )  # fmt: skip


CELLS = [(engine, tune, "mixed") for engine in ENGINES for tune in TUNES]
CELLS += [("fsdp2", "full", "text"), ("zero3", "full", "text")]
REST = [(e, t, d) for e in ENGINES for t in TUNES for d in DATA if (e, t, d) not in CELLS]


def trained(folder: Path, cells: list[tuple[str, str, str]]) -> Path:
    """Every cell once: on one rank here, and on two in one pair of processes."""
    os.environ["LENSMITH_CACHE"] = str(folder / "cache")
    base = make_model(folder / "model", "qwen2_5_vl")
    for name, share in DATA.items():
        make_chat(folder / name, 40, seed=1, text_only=share)
    sources = {name: folder / name / "train.jsonl" for name in DATA}
    for tune, data in dict.fromkeys((tune, data) for _, tune, data in cells):
        alone = cell_run(folder, base, sources[data], "alone", tune)
        with recorded(alone.output.parent.mkdir(parents=True) or alone.output.with_name("run-gradients-0.npz")):
            quiet_train(alone)
    runs = [cell_run(folder, base, sources[data], engine, tune) for engine, tune, data in cells]
    for run in runs:
        run.output.parent.mkdir(parents=True)
    train_all(2, folder / "pair", runs)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("grid"), CELLS)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("rest"), REST)


@pytest.mark.parametrize(
    ("engine", "tune", "data"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in REST)]
)
def test_two_ranks_are_one(request: pytest.FixtureRequest, engine: str, tune: str, data: str) -> None:
    folder: Path = request.getfixturevalue("grid" if (engine, tune, data) in CELLS else "rest")
    alone, other = folder / f"alone-{tune}-{data}" / "run", folder / f"{engine}-{tune}-{data}" / "run"
    mine, theirs = losses(alone), losses(other)
    assert len(theirs) == STEPS and np.allclose(theirs, mine, rtol=1e-5, atol=0)
    want, found = gradients(alone), gradients(other)
    for key in set(found) - set(want):  # ZeRO holds a gradient of what no sample used
        assert not found[key].any(), key
    for key, gradient in want.items():
        apart = np.linalg.norm(found[key] - gradient)
        assert apart <= 1e-5 * np.linalg.norm(gradient) + 1e-9, key


# -- elastic ----------------------------------------------------------------------------------------------------------

CHANGES = (
    ("alone", "local"), ("alone", "fsdp2"), ("alone", "zero3"), ("local", "zero2"), ("fsdp2", "zero3"),
    ("zero3", "hsdp"), ("zero2", "fsdp2"), ("zero1", "local"),
)  # fmt: skip


def checked_read(folder: Path, optimizer: Any) -> Any:
    """Every element that a rank holds is the one in the checkpoint, bit for bit."""
    progress = read_state(folder, optimizer)
    saved, seen = Saved(folder), 0
    for piece in optimizer.pieces():
        want = saved.read(piece.key, piece.start, piece.start + piece.values.numel())
        if want is None:  # of a parameter that was never used, ZeRO has moments of zero
            assert not piece.values.any(), piece.key
            continue
        assert torch.equal(want.flatten(), piece.values.detach().cpu().flatten().float()), piece.key
        seen += 1
    assert seen
    return progress


@pytest.fixture(scope="module")
def elastic(grid: Path) -> Path:
    """The first half of a run by one engine, the second by another."""
    base, source = grid / "model", grid / "mixed" / "train.jsonl"
    runs: list[Located] = []
    for before, after in CHANGES:
        run = cell_run(grid / f"from-{before}", base, source, after, "full")
        half(grid / f"{before}-full-mixed" / "run", run.output)
        runs.append(run)

    def work(rank: int) -> None:
        stage.read_state = checked_read
        for run in runs:
            quiet_train(run)

    on_ranks(2, grid / "second-pair", work)
    return grid


def half(run: Path, into: Path) -> None:
    """The run as it was when its fifth step was saved."""
    shutil.copytree(run, into)
    shutil.rmtree(into / "checkpoints" / "step-00000010")


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_another_engine_goes_on(elastic: Path, before: str, after: str) -> None:
    """The state is the same bit for bit (`checked_read`), and so the run goes on as one rank would."""
    alone = losses(elastic / "alone-full-mixed" / "run")
    found = losses(elastic / f"from-{before}" / f"{after}-full-mixed" / "run")
    assert len(found) == STEPS and np.allclose(found, alone, rtol=1e-5, atol=0)


@pytest.mark.faults("F68", "1 -> 2 -> 1 ranks")
def test_two_ranks_and_one_again(elastic: Path) -> None:
    """1 -> 2 -> 1 ranks: the same samples in the same steps, the same losses."""
    run = cell_run(elastic / "back", elastic / "model", elastic / "mixed" / "train.jsonl", "alone", "full")
    half(elastic / "from-alone" / "local-full-mixed" / "run", run.output)
    quiet_train(run)
    steps = [[r for r in read_metrics(f / "metrics.jsonl") if r["kind"] == "step"]
             for f in (elastic / "alone-full-mixed" / "run", run.output)]  # fmt: skip
    for mine, theirs in zip(*steps, strict=True):
        assert all(mine[k] == theirs[k] for k in ("step", "epoch", "samples", "tokens", "supervised", "image_tokens"))
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)


@pytest.mark.faults("F65", "a picture of many samples is gone, on one rank or the other")
def test_pictures_that_are_gone(grid: Path) -> None:
    """After they were indexed: the same samples are dropped as on one rank, and nobody waits for anybody."""
    base, source = grid / "model", make_chat(grid / "gone", 40, seed=3, text_only=0.3)
    over: dict[str, Any] = {"data": {"max_tokens": 256, "max_dropped": 1.0}}
    names = ("alone", "local", "fsdp2", "zero2")
    runs = [cell_run(grid / f"gone-{name}", base, source, name, "full", **over) for name in names]
    shown = next(row["images"][0] for row in map(json.loads, source.read_text().splitlines()) if row.get("images"))
    gone, read = (source.parent / shown).read_bytes(), Loader.bytes_of

    def bytes_of(self: Any, *args: Any) -> bytes:
        if (data := read(self, *args)) == gone:
            raise Drop("IMG_MISSING", "gone")
        return data

    def work(rank: int) -> None:
        Loader.bytes_of = bytes_of
        for run in runs[1:]:
            quiet_train(run)

    on_ranks(2, grid / "sixth-pair", work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "bytes_of", bytes_of)
        quiet_train(runs[0])
    records = [read_metrics(run.output / "metrics.jsonl") for run in runs]
    dropped = [sorted(r["origin"] for r in each if r.get("name") == "dropped") for each in records]
    assert dropped[0] and all(each == dropped[0] for each in dropped)
    for run in runs[1:]:
        assert np.allclose(losses(run.output), losses(runs[0].output), rtol=1e-5, atol=0)


@pytest.mark.faults("F19", "one rank raises while it reads")
def test_a_rank_that_cannot_read(grid: Path) -> None:
    """Both stop with the same step, the other with its words."""
    run = cell_run(grid / "unread", grid / "model", grid / "mixed" / "train.jsonl", "fsdp2", "lora")

    def work(rank: int) -> None:
        read, calls = Pipeline._read, [0]

        def refuses(self: Any, *args: Any) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] == 6:
                raise DataError("SHARD", "this shard is gone")
            return read(self, *args)

        Pipeline._read = refuses
        with pytest.raises(UserError) as caught:
            quiet_train(run)
        assert (caught.value.code, rank) in (("SHARD", 1), ("OTHER_RANK", 0))
        assert "this shard is gone" in caught.value.message

    on_ranks(2, grid / "seventh-pair", work)


def test_a_stream_is_the_same_on_two_ranks(grid: Path) -> None:
    base, source = grid / "model", grid / "mixed" / "train.jsonl"
    over: dict[str, Any] = {"data": {"stream": {"window": 16}, "max_tokens": 256, "workers": 1}}
    run, alone = (cell_run(grid / name, base, source, "local", "lora", **over) for name in ("stream-2", "stream-1"))
    on_ranks(2, grid / "third-pair", lambda rank: quiet_train(run))
    quiet_train(alone)
    assert len(losses(run.output)) == STEPS and np.allclose(losses(run.output), losses(alone.output), rtol=1e-5, atol=0)
    assert {p.name for p in (run.output / "stream").iterdir()} == {p.name for p in (alone.output / "stream").iterdir()}


def test_saving_behind_the_training(grid: Path) -> None:
    """The same checkpoints, byte for byte, as when training waits for them; on both ranks of FSDP2, full and LoRA."""
    base, source = grid / "model", grid / "mixed" / "train.jsonl"
    runs = [
        cell_run(grid / f"save-{behind}", base, source, "fsdp2", tune, save={"every_steps": 2, "background": behind})
        for behind in (True, False) for tune in ("full", "lora")
    ]  # fmt: skip

    def work(rank: int) -> None:
        for run in runs:
            quiet_train(run)

    on_ranks(2, grid / "fourth-pair", work)
    for behind, waiting in zip(runs[:2], runs[2:], strict=True):
        files = sorted((waiting.output / "checkpoints").rglob("*.safetensors"))
        assert len(files) >= 8
        for file in files:
            other = behind.output / file.relative_to(waiting.output)
            assert other.read_bytes() == file.read_bytes(), file
        events = [r for r in read_metrics(behind.output / "metrics.jsonl") if r.get("name") == "save_begun"]
        assert len(events) == STEPS // 2 and all(e["stalled_seconds"] >= 0 for e in events)


PRESETS = ("bf16", "bf16-params", "bf16-params-compensated", "bf16-params-stochastic")


@pytest.fixture(scope="module")
def presets(grid: Path) -> Path:
    """Every preset in bfloat16 on one rank here, and by FSDP2 on two."""
    base, source = grid / "model", grid / "mixed" / "train.jsonl"
    runs = [
        cell_run(grid / f"{name}-{preset}", base, source, name, "full", precision={"preset": preset})
        for name in ("alone", "fsdp2") for preset in PRESETS
    ]  # fmt: skip

    def work(rank: int) -> None:
        for run in runs[len(PRESETS) :]:
            quiet_train(run)

    on_ranks(2, grid / "fifth-pair", work)
    for run in runs[: len(PRESETS)]:
        quiet_train(run)
    return grid


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_fsdp2(presets: Path, preset: str) -> None:
    """The same run to within the rounding of bfloat16, and float32 values that mean the same in the state."""
    alone, other = (presets / f"{name}-{preset}" / f"{name}-full-mixed" / "run" for name in ("alone", "fsdp2"))
    assert np.allclose(losses(other), losses(alone), rtol=0, atol=0.02)
    saved = [Saved(run / "checkpoints" / "step-00000005" / "state") for run in (alone, other)]
    assert saved[0].shapes == saved[1].shapes
    for name, shape in saved[0].shapes.items():
        if name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is nothing but rounding
            continue
        mine, theirs = (s.read(f"param/{name}", 0, int(np.prod(shape))) for s in saved)
        assert mine is not None and theirs is not None and theirs.dtype == mine.dtype == torch.float32
        assert float((mine - theirs).norm()) <= 0.02 * float(mine.norm()) + 1e-3, name


@pytest.mark.parametrize(
    ("engine", "over", "text"),
    [
        ({"kind": "deepspeed", "zero": 2}, {"precision": {"preset": "bf16-params-stochastic"}}, "stochastic"),
        ({"kind": "deepspeed", "zero": 2, "config": "none.json"}, {}, "none.json"),
    ],
)
def test_what_an_engine_cannot_do_is_said_before(grid: Path, engine: Any, over: Any, text: str) -> None:
    """`lensmith check` says it, on one process and without weights."""
    run = located(grid / "refused" / "run", grid / "model", grid / "text" / "train.jsonl", parallel={"engine": engine},
                  **over)  # fmt: skip
    with pytest.raises(ConfigError, match=text):
        check(run, Terminal("quiet"))
