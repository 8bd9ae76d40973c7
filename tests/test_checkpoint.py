"""Checkpoints: whole or not at all, verified to the byte, never pickled; and what a resume accepts."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file

import lensmith
from lensmith.checkpoint.store import MANIFEST, Store, _manifest_text, _seal
from lensmith.core.errors import RunError
from lensmith.engine.loop import score
from lensmith.recipe import session
from lensmith.recipe.folder import best_step

LORA = {"kind": "lora", "rank": 2}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder: folder)


# -- the store alone --------------------------------------------------------------------------------------------------


def content(step: int) -> Any:
    def write(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "a.bin").write_bytes(bytes([step % 256]) * 50)
        (folder / "b.bin").write_bytes(bytes([step % 256 ^ 1]) * 50)
        (folder / "state" / "c.json").write_text(json.dumps({"step": step}))

    return write


def filled(folder: Path, *steps: int) -> Store:
    store = Store(folder / "checkpoints")
    for step in steps:
        store.publish(step, content(step), {"metrics": {}})
    return store


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_what_is_published_is_what_was_written(tmp_path: Path) -> None:
    found = filled(tmp_path, 3).newest(pytest.fail)
    assert found is not None and found.step == 3
    assert sorted(found.manifest["files"]) == ["a.bin", "b.bin", "state/c.json"]
    entry = found.manifest["files"]["a.bin"]
    assert entry == {"size": 50, "sha256": hashlib.sha256(b"\3" * 50).hexdigest()}
    assert [p.name for p in found.folder.parent.iterdir()] == ["step-00000003"]


def test_everything_is_on_disk_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a power cut, which no kill imitates: every file, then every folder, then the rename, then the parent; and
    no file is written after its sync."""
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename
    sizes: dict[str, int] = {}

    def logged_sync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        calls.append(("sync", path.replace(f"-{os.getpid()}", "")))
        sizes[path.rsplit("/", 1)[1]] = os.fstat(fd).st_size
        sync(fd)

    def logged_rename(a: Any, b: Any) -> None:
        calls.append(("rename", Path(b).name))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "rename", logged_rename)
    store = filled(tmp_path, 1)
    staging = f"{store.folder}/.staging-00000001"
    published = calls.index(("rename", "step-00000001"))
    files = [("sync", f"{staging}/{name}") for name in ("a.bin", "b.bin", "state/c.json", MANIFEST)]
    folders = [("sync", f"{staging}/state"), ("sync", staging)]
    assert calls[:published] == files + folders
    assert calls[published + 1 :] == [("sync", str(store.folder))]
    assert all(sizes[p.name] == p.stat().st_size for p in store.path(1).rglob("*") if p.is_file())


@pytest.mark.faults("F38", "500 flipped bits over all files, the manifest too")
def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    """500 random bits over all files, the manifest too; each time the earlier checkpoint is used, with a warning."""
    store = filled(tmp_path, 1, 2)
    files = [p for p in store.path(2).rglob("*") if p.is_file()]
    rng = random.Random(0)
    for n in range(500):
        path = files[n % len(files)]
        before = path.read_bytes()
        flip(path, rng.randrange(len(before)), rng.randrange(8))
        warnings: list[str] = []
        found = store.newest(warnings.append)
        assert found is not None and found.step == 1, path
        assert len(warnings) == 1 and str(path) in warnings[0], warnings
        path.write_bytes(before)
    assert store.newest(pytest.fail).step == 2  # type: ignore[union-attr]


def truncated(folder: Path) -> str:
    os.truncate(folder / "a.bin", 49)
    return "a.bin has 49 bytes, 50 were written"


def emptied(folder: Path) -> str:
    os.truncate(folder / "a.bin", 0)
    return "a.bin has 0 bytes"


def extended(folder: Path) -> str:
    with (folder / "a.bin").open("ab") as file:
        file.write(b"x")
    return "a.bin has 51 bytes"


def missing(folder: Path) -> str:
    (folder / "state" / "c.json").unlink()
    return "c.json is missing"


def extra(folder: Path) -> str:
    (folder / "state" / "d.json").write_text("{}")
    return "state/d.json"


def swapped(folder: Path) -> str:
    (folder / "a.bin").rename(folder / "x")
    (folder / "b.bin").rename(folder / "a.bin")
    (folder / "x").rename(folder / "b.bin")
    return "a.bin differs"


def no_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return MANIFEST


def resealed(folder: Path, **changes: Any) -> str:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest.update(changes)
    manifest["seal"] = _seal(manifest)
    (folder / MANIFEST).write_bytes(_manifest_text(manifest))
    return MANIFEST


def another_step(folder: Path) -> str:
    resealed(folder, step=7)
    return "step 7, not of step-00000002"


def leads_outside(folder: Path) -> str:
    outside = folder.parent.parent / "secret"
    outside.write_bytes(b"s")
    return resealed(folder, files={"../../secret": {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}})


def no_entries(folder: Path) -> str:
    return resealed(folder, files={"a.bin": "50 bytes"})


def manifest_of(text: bytes) -> Any:
    def damage(folder: Path) -> str:
        (folder / MANIFEST).write_bytes(text)
        return MANIFEST

    return damage


NO_MANIFESTS = [
    b"",
    b"[]",
    b"null",
    b"{}",
    b'"text"',
    b"{",
    b"\xff\xfe",
    b'{"schema": "1"}',
    b'{"schema": 1, "files": []}',
    b"[" * 100_000,
]
DAMAGES: list[Any] = [
    pytest.param(truncated, marks=pytest.mark.faults("F39", "a file one byte shorter")),
    pytest.param(emptied, marks=pytest.mark.faults("F40", "a file of no bytes")),
    pytest.param(extended, marks=pytest.mark.faults("F39", "one byte longer")),
    pytest.param(missing, marks=pytest.mark.faults("F41", "a file is missing")),
    pytest.param(extra, marks=pytest.mark.faults("F41", "an unknown file")),
    pytest.param(swapped, marks=pytest.mark.faults("F42", "two files of one size swapped")),
    no_manifest,
    another_step,
    leads_outside,
    no_entries,
]


@pytest.mark.parametrize("damage", [*DAMAGES, *map(manifest_of, NO_MANIFESTS)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: Any) -> None:
    store = filled(tmp_path, 1, 2)
    named = damage(store.path(2))
    warnings: list[str] = []
    assert store.newest(warnings.append).step == 1  # type: ignore[union-attr]
    assert named in warnings[0] and "step-00000002" in warnings[0]
    damage(store.path(1)) if damage is not another_step else truncated(store.path(1))
    with pytest.raises(RunError, match="DAMAGED") as caught:
        store.newest(pytest.fail)
    assert "step-00000001" in caught.value.message and "step-00000002" in caught.value.message


@pytest.mark.faults("F44", "a manifest of a later schema")
def test_a_later_schema_is_refused(tmp_path: Path) -> None:
    """Not passed over for an older checkpoint: that would silently take back steps that a newer lensmith made."""
    store = filled(tmp_path, 1, 2)
    resealed(store.path(2), schema=2)
    with pytest.raises(RunError, match=r"SCHEMA.*schema 2 is newer") as caught:
        store.newest(pytest.fail)
    assert "update" in caught.value.remedy


def test_what_dead_runs_left_is_removed(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    for name in (".staging-00000002-99", ".trash-step-00000000-99"):
        (store.folder / name).mkdir()
        (store.folder / name / "a").write_text("x")
    assert store.steps() == [1]
    store.clean()
    assert [p.name for p in store.folder.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RunError("NONFINITE", "w is not finite"), KeyboardInterrupt()]
)
def test_a_failed_save_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    store = filled(tmp_path, 1)

    def write(folder: Path) -> None:
        (folder / "a").write_text("x")
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)) as caught:
        store.publish(2, write, {})
    assert [p.name for p in store.folder.iterdir()] == ["step-00000001"]
    if isinstance(error, OSError):
        assert caught.value.code == "SAVE" and "MiB are free, the last checkpoint has 0.0 MiB" in caught.value.message  # type: ignore[union-attr]


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """keep_last 2 with 1 good, 2 and 4 damaged: after the save of step 3 the good 1 and 3 stand."""
    store = filled(tmp_path, 1, 2, 4)
    for step in (2, 4):
        truncated(store.path(step))
    assert store.newest(lambda text: None).step == 1  # type: ignore[union-attr]
    store.publish(3, content(3), {})
    store.purge(2, set())
    assert store.steps() == [1, 3]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    truncated(store.path(2))
    assert store.newest(lambda text: None).step == 1  # type: ignore[union-attr]
    store.publish(2, content(2), {})
    store.purge(2, set())
    assert store.newest(pytest.fail).step == 2  # type: ignore[union-attr]
    assert store.steps() == [1, 2]


def test_the_best_is_kept_and_nan_never_is(tmp_path: Path) -> None:
    values = {1: 2.0, 2: 1.0, 3: math.nan, 4: 1.5, 5: math.inf, 6: None}
    for metric, best in (("loss", 2), ("exact_match", 1)):
        store = Store(tmp_path / metric)
        for step, value in values.items():
            store.publish(step, content(step), {"metrics": {} if value is None else {metric: value}})
            store.purge(1, best_step(store, metric, score))
        assert store.steps() == [best, 6]
    assert best_step(Store(tmp_path / "loss"), "exact_match", score) == set()


class StoreMachine(RuleBasedStateMachine):
    """Model: step -> (good?, metric). The newest good one is returned, the best never purged, staging never counts."""

    @initialize()
    def start(self) -> None:
        self.work = Path(tempfile.mkdtemp(dir=os.environ["STORE_MACHINE"]))
        self.store = Store(self.work)
        self.good: dict[int, bool] = {}
        self.metric: dict[int, float] = {}
        self.last = 0
        self.had_good = False

    @rule(metric=st.sampled_from([0.1, 0.5, 0.9, math.nan]), gap=st.integers(1, 3), keep=st.integers(1, 3))
    def publish(self, metric: float, gap: int, keep: int) -> None:
        step = self.last + gap
        self.last = step
        self.store.publish(step, content(step), {"metrics": {"exact_match": metric}})
        self.good[step], self.metric[step] = True, metric
        best = best_step(self.store, "exact_match", score)
        finite = {s: m for s, m in self.metric.items() if math.isfinite(m) and s in self.store.steps()}
        readable = {s: m for s, m in finite.items() if (self.store.path(s) / MANIFEST).is_file()}
        assert best == ({max(readable, key=lambda s: (readable[s], s))} if readable else set())
        self.store.purge(keep, best)
        left = self.store.steps()
        assert step in left and best <= set(left) | self.damaged()
        assert len(left) <= keep + 1
        self.forget(left)

    def damaged(self) -> set[int]:
        return {s for s, good in self.good.items() if not good}

    def forget(self, left: list[int]) -> None:
        self.good = {s: g for s, g in self.good.items() if s in left}
        self.metric = {s: m for s, m in self.metric.items() if s in left}

    @precondition(lambda self: self.good)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)))
        files = sorted(p for p in self.store.path(step).rglob("*") if p.is_file() and p.name != MANIFEST)
        if not files or not self.good[step]:
            return
        path = data.draw(st.sampled_from(files))
        flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
        self.good[step] = False

    @rule()
    def a_save_dies(self) -> None:
        folder = self.store.folder / f".staging-{self.last + 1:08d}-1"
        folder.mkdir(parents=True, exist_ok=True)
        content(self.last + 1)(folder) if not any(folder.iterdir()) else None

    @precondition(lambda self: len(self.good) > 1)
    @rule(data=st.data())
    def a_purge_dies(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)[:-1]))
        path = self.store.path(step)
        path.rename(path.with_name(f".trash-{path.name}-1-{time.time_ns()}"))
        self.forget([s for s in self.good if s != step])

    @rule()
    def a_new_run(self) -> None:
        self.store = Store(self.work)
        self.store.clean()
        assert not list(self.work.glob(".*"))
        self.resume()

    @rule()
    def resume(self) -> None:
        warnings: list[str] = []
        good = [s for s, g in self.good.items() if g]
        if not good and self.good:
            with pytest.raises(RunError, match="DAMAGED"):
                self.store.newest(warnings.append)
            return
        found = self.store.newest(warnings.append)
        assert (found.step if found else None) == (max(good) if good else None)
        assert len(warnings) == sum(s > max(good, default=0) for s in self.good)
        if found is not None:
            self.last = found.step  # the run goes on from there, and will come to the damaged steps again

    @invariant()
    def what_is_there_is_known(self) -> None:
        if hasattr(self, "store"):
            assert self.store.steps() == sorted(self.good)


def test_the_store_as_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("STORE_MACHINE", str(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what is tested is the logic; 30 times as quick
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


# -- crashes of a real run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("these tests compile a small C file (tests/data/crash_shim.c): install gcc")
    library = tmp_path_factory.mktemp("shim") / "kp.so"
    source = Path(__file__).parent / "data" / "crash_shim.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def faults(shim: Path, work: Path, which: str) -> dict[str, Any]:
    driver = Path(__file__).parent / "crash_driver.py"
    env = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(driver), str(work), which], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.faults("F02", "sample: every tenth call")
@pytest.mark.faults("F03", "sample: every tenth call")
@pytest.mark.faults("F28", "sample: every tenth call")
def test_faults_at_every_tenth_call_of_a_save(shim: Path, tmp_path: Path, record_property: Any) -> None:
    """Killed before a call, in the middle of a write, or out of space from a call on, in turn."""
    found = faults(shim, tmp_path, "sample")
    assert found["wrong"] == {}
    assert found["calls"] >= 60 and found["cases"] == -(-found["calls"] // 10)
    record_property("figure", f"sample: {found['cases']} of {found['calls']} calls")


@pytest.mark.slow
@pytest.mark.faults("F02", "kill before each file-system call of a save")
@pytest.mark.faults("F03", "kill in the middle of each write of a save")
@pytest.mark.faults("F28", "no space from each call of a save on")
def test_faults_at_every_call_of_a_save(shim: Path, tmp_path: Path, record_property: Any) -> None:
    found = faults(shim, tmp_path, "all")
    assert found["wrong"] == {}
    assert found["cases"] == 3 * found["calls"] and found["calls"] >= 60
    record_property("figure", f"{found['calls']} calls, {found['cases']} faults, all ended the same")


# -- a run's folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("chat"), 16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, qwen25: Path, chat: Path) -> Path:
    """A run of three steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENSMITH_CACHE", str(folder.parent / "cache"))
        patch.setattr(session, "write_report", lambda folder: folder)
        runs.quiet_train(run_in(folder, qwen25, chat))
    return folder


def run_in(folder: Path, base: Path, chat: Path, **over: Any) -> Any:
    values = {
        "tune": LORA,
        "train": {"max_steps": 3},
        "batch": {"samples": 4},
        "save": {"every_steps": 1, "keep_last": 9},
    }
    return runs.located(folder, base, chat, **runs.merge(values, over))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that stands at step 2."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    (tmp_path / "run/summary.json").unlink()
    return tmp_path / "run"


def state(folder: Path, step: int = 3) -> bytes:
    return (folder / f"checkpoints/step-{step:08d}/state/training.safetensors").read_bytes()


@pytest.mark.faults("F38", "one flipped bit, and a resume")
def test_a_run_falls_back_and_says_so(run: Path, finished: Path, qwen25: Path, chat: Path, capsys: Any) -> None:
    flip(run / "checkpoints/step-00000002/state/random.safetensors", 300, 2)
    out = runs.quiet_train(run_in(run, qwen25, chat))
    said = capsys.readouterr().err
    assert "checkpoint is damaged and not used" in said and "step-00000002/state/random.safetensors" in said
    assert state(run) == state(finished) and out.summary["steps"] == 3
    assert Store(run / "checkpoints").newest(pytest.fail).step == 3  # type: ignore[union-attr]


@pytest.mark.faults("F46", "a flipped bit in every checkpoint")
def test_a_run_never_starts_over_silently(run: Path, qwen25: Path, chat: Path) -> None:
    for step in (1, 2):
        flip(run / f"checkpoints/step-{step:08d}/state/training.safetensors", 5000, 1)
    with pytest.raises(RunError, match="DAMAGED"):
        runs.quiet_train(run_in(run, qwen25, chat))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.faults("F43", "a manifest made anew for tensors of other shapes")
@pytest.mark.parametrize("kind", ["param", "exp_avg"])
def test_other_shapes_are_refused_before_anything_is_touched(run: Path, qwen25: Path, chat: Path, kind: str) -> None:
    """A manifest that was edited consistently (F43)."""
    folder = run / "checkpoints/step-00000002"
    path = folder / "state/training.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.startswith(kind))
    save_file({**tensors, key: torch.zeros(3, 3)}, path)
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    data = path.read_bytes()
    resealed(
        folder,
        files={**files, "state/training.safetensors": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
    )
    with pytest.raises(RunError, match="RESUME") as caught:
        runs.quiet_train(run_in(run, qwen25, chat))
    assert key.partition("/")[2] in caught.value.message


CHANGES: dict[str, dict[str, Any]] = {
    "train.seed": {"train": {"seed": 1}},
    "train.clip_norm": {"train": {"clip_norm": 0.5}},
    "optimizer": {"optimizer": {"lr": 2e-3}},
    "schedule": {"schedule": {"kind": "cosine"}},
    "tune": {"tune": {"kind": "lora", "rank": 3}},
    "batch.samples": {"batch": {"samples": 5}},
    "batch.partial": {"batch": {"partial": "drop"}},
    "precision.preset": {"precision": {"preset": "bf16"}},
    "data.max_tokens": {"data": {"max_tokens": 400}},
    "data.too_long": {"data": {"too_long": "cut"}},
    "family.pixels": {"data": {"max_pixels": 12544}},
}


@pytest.mark.faults("F47", "a checkpoint of a run with other options")
@pytest.mark.faults("F70", "another seed, batch, rate, rank, precision, ...")
@pytest.mark.parametrize("field", CHANGES)
def test_another_run_is_refused_and_the_field_is_named(run: Path, qwen25: Path, chat: Path, field: str) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="RESUME") as caught:
        runs.quiet_train(run_in(run, qwen25, chat, **CHANGES[field]))
    assert f"\n  {field}: checkpoint " in caught.value.message and ", now " in caught.value.message
    assert caught.value.message.count("\n") == 1  # this field and no other
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.faults("F63", "a row more; two rows swapped")
def test_other_data_is_refused(run: Path, qwen25: Path, chat: Path, tmp_path: Path) -> None:
    """A row more, and a row changed."""
    shutil.copytree(chat.parent / "images", tmp_path / "more/images")
    lines = chat.read_text(encoding="utf-8").splitlines(keepends=True)
    for changed in ([*lines, lines[0]], [lines[1], lines[0], *lines[2:]]):
        (tmp_path / "more/train.jsonl").write_text("".join(changed), encoding="utf-8")
        with pytest.raises(RunError, match=r"RESUME(.|\n)*data: checkpoint"):
            runs.quiet_train(run_in(run, qwen25, tmp_path / "more/train.jsonl"))


@pytest.mark.faults("F47", "a base model with other weights")
def test_another_base_is_refused(run: Path, qwen25: Path, chat: Path, tmp_path: Path) -> None:
    """The same config with other weights: an adapter on another base is another model."""
    other = tiny.make_model(tmp_path / "other", seed=7)
    with pytest.raises(RunError, match="base_weights: checkpoint"):
        runs.quiet_train(run_in(run, other, chat))


@pytest.mark.faults("F69", "another number of workers at a resume")
def test_how_and_where_a_run_is_computed_may_change(
    run: Path, finished: Path, qwen25: Path, chat: Path, tmp_path: Path
) -> None:
    """Same bits at the end with workers, other log sinks, another name of the model's folder, the run folder moved."""
    shutil.copytree(qwen25, tmp_path / "copy of the model")
    run = run.rename(tmp_path / "moved run")
    out = runs.quiet_train(run_in(
        run, tmp_path / "copy of the model", chat, data={"workers": 1}, log={"sinks": ["tensorboard"]},
        vision_cache={"memory_mb": 77}, guard={"max_in_a_row": 9}, save={"every_minutes": 50.0, "keep_last": 5},
    ))  # fmt: skip
    assert state(run) == state(finished)
    assert len(out.summary["losses"]) == 3


def test_packing_and_recomputation_may_change(run: Path, finished: Path, qwen25: Path, chat: Path) -> None:
    """Not the same bits, the same numbers."""
    out = runs.quiet_train(run_in(run, qwen25, chat, batch={"packing": False}, train={"recompute": True}))
    assert out.summary["losses"] == pytest.approx(
        json.loads((finished / "summary.json").read_text())["losses"], abs=1e-5
    )


def test_a_run_can_be_made_longer(tmp_path: Path, qwen25: Path, chat: Path, capsys: Any) -> None:
    """It says so, as a schedule may depend on it. At a constant rate it is the run that was planned longer from the
    start, bit by bit."""
    full = {"tune": {"kind": "full"}}
    runs.quiet_train(run_in(tmp_path / "run", qwen25, chat, **full))
    longer = {**full, "train": {"max_steps": 5}}
    out = runs.quiet_train(run_in(tmp_path / "run", qwen25, chat, **longer))
    assert "the run now has 5 steps, not 3" in capsys.readouterr().err
    runs.quiet_train(run_in(tmp_path / "whole", qwen25, chat, **longer))
    assert state(tmp_path / "run", 5) == state(tmp_path / "whole", 5)
    assert out.summary["steps"] == len(out.summary["losses"]) == 5


def test_more_epochs_go_on_after_a_last_small_step(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    """16 samples, 6 a step, 1 epoch: 6 6 4. Two epochs: the second begins with its first sample, not its third."""
    over: dict[str, Any] = {"batch": {"samples": 6}, "train": {"max_steps": None, "epochs": 1}}
    first = runs.quiet_train(run_in(tmp_path / "run", qwen25, chat, **over)).summary
    both = runs.quiet_train(
        run_in(tmp_path / "run", qwen25, chat, **runs.merge(over, {"train": {"epochs": 2}}))
    ).summary
    steps = [
        r for r in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if r["kind"] == "step"
    ]
    assert [r["samples"] for r in steps] == [6, 6, 4, 6, 6, 4]
    assert first["epochs"] == 1 and both["epochs"] == 2 and both["steps"] == 6


def test_data_smaller_than_a_step_with_drop_is_an_error(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    with pytest.raises(Exception, match="NO_STEPS"):
        runs.quiet_train(run_in(tmp_path / "run", qwen25, chat, batch={"samples": 17, "partial": "drop"}))


# -- no pickle --------------------------------------------------------------------------------------------------------


def test_no_file_of_a_run_is_a_pickle(finished: Path) -> None:
    """Neither pickles (protocol 2 and later begin with 0x80) nor zip archives, which torch.save writes."""
    for path in filter(Path.is_file, finished.rglob("*")):
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80", b"cos\n", b"c__builtin__")), path
        assert path.suffix in {
            ".json",
            ".jsonl",
            ".safetensors",
            ".yaml",
            ".parquet",
            ".jinja",
            ".md",
            ".png",
            ".html",
        }, path


def test_a_pickle_in_a_checkpoint_is_refused_unread(run: Path, qwen25: Path, chat: Path, tmp_path: Path) -> None:
    """A canary that would leave a file behind, in the place of each state file and beside them."""
    canary = tmp_path / "canary"

    class Canary:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    data = pickle.dumps(Canary())
    pickle.loads(data)  # noqa: S301
    assert canary.exists()  # the canary sings
    canary.rmdir()
    folder = run / "checkpoints/step-00000002"
    shutil.rmtree(run / "checkpoints/step-00000001")
    for name in ("state/training.safetensors", "state/random.safetensors", "state/progress.json", "state/optimizer.pt"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(data)
        with pytest.raises(RunError, match="DAMAGED"):
            runs.quiet_train(run_in(run, qwen25, chat))
        (folder / name).write_bytes(before) if before is not None else (folder / name).unlink()
    assert not canary.exists()


def test_the_source_unpickles_nothing() -> None:
    """No torch.load, torch.save, pickle, shelve, marshal, joblib, dill, numpy pickles, eval or exec."""
    modules = {"pickle", "cPickle", "_pickle", "shelve", "marshal", "joblib", "dill", "cloudpickle"}
    calls = {("torch", "load"), ("torch", "save"), ("pd", "read_pickle"), ("np", "load"), ("numpy", "load")}
    for path in Path(lensmith.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not modules.intersection(a.name.split(".")[0] for a in node.names), where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in modules, where
                assert not (node.module == "torch" and {"load", "save"}.intersection(a.name for a in node.names)), where
            elif isinstance(node, ast.Call):
                f = node.func
                if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
                    assert (f.value.id, f.attr) not in calls, where
                assert not (isinstance(f, ast.Name) and f.id in {"eval", "exec", "compile", "__import__"}), where
                assert not any(k.arg == "allow_pickle" for k in node.keywords), where


def test_random_state_survives_the_way_through_json(tmp_path: Path) -> None:
    from lensmith.engine.determinism import random_state, restore, seed_all

    seed_all(2**62 + 3)
    random.gauss(0, 1), np.random.standard_normal()  # leave half a pair in both
    tensors, text = random_state()
    save_file(tensors, tmp_path / "r.safetensors")

    def draw() -> list[Any]:
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(3).tolist(),
        ]

    first = draw()
    draw()
    restore(load_file(tmp_path / "r.safetensors"), text)
    assert draw() == first
