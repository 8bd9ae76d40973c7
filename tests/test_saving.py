"""Checkpoints that are written while training goes on (`save.background`)."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import fault_kit as kit
import pytest

from lensmith.checkpoint import store
from lensmith.recipe import stage

BEHIND = {"save": {"background": True, "every_steps": 2, "keep_last": 2}}


@pytest.fixture(autouse=True)
def _as_the_bench(bench: kit.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.settle(monkeypatch)


def slow_disk(seconds: float, seen: list[str] | None = None) -> kit.Plant:
    """Every fsync of the saver takes so long."""

    def plant() -> None:
        sync = os.fsync

        def slowly(fd: int) -> None:
            if threading.current_thread().name == "save":
                time.sleep(seconds)
            sync(fd)

        store.os.fsync = slowly  # type: ignore[attr-defined]

    return plant


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in kit.records(folder, "event") if r["name"] == name]


def test_the_same_end(bench: kit.Bench, tmp_path: Path) -> None:
    found = kit.train(bench.run(tmp_path / "run", **BEHIND))
    assert found.code == 0, found.said
    assert kit.end_of(tmp_path / "run") == bench.whole and kit.leftovers(tmp_path / "run") == []
    assert kit.steps_of(tmp_path / "run") == [4, 6]
    assert [e["step"] for e in events(tmp_path / "run", "save_begun")] == [2, 4, 6]
    assert [e["step"] for e in events(tmp_path / "run", "checkpoint")] == [2, 4, 6]


@pytest.mark.faults("F33", "every fsync of a save takes 0.1 s, saves behind the training")
def test_a_slow_disk_does_not_hold_up_steps(bench: kit.Bench, tmp_path: Path, record_property: Any) -> None:
    """Training stands still for the copy, and for a save only where the one before is still under way: it is said."""
    found = kit.train(bench.run(tmp_path / "run", **BEHIND), slow_disk(0.1))
    assert found.code == 0, found.said
    assert kit.end_of(tmp_path / "run") == bench.whole
    saves = events(tmp_path / "run", "checkpoint")
    stalls = [e["stalled_seconds"] for e in events(tmp_path / "run", "save_begun")]
    assert all(e["seconds"] > 1.0 for e in saves)  # more than ten files and folders are synced
    assert max(stalls) < min(e["seconds"] for e in saves) and all("waited_seconds" in e for e in saves)
    record_property("figures", f"saves {max(e['seconds'] for e in saves):.1f} s, stalls {1000 * max(stalls):.0f} ms")


@pytest.mark.faults("F05", "killed while the saver writes and training goes on")
def test_killed_behind_the_training(bench: kit.Bench, tmp_path: Path) -> None:
    """The save of step 4 hangs at its first fsync; step 5 is trained, then the process is killed."""

    def plant() -> None:
        save, log = stage.StageRun._save, stage.StageRun._log

        def saves(self: Any, p: Any, metrics: Any) -> None:
            if p.step == 4:
                slow_disk(600.0)()
            save(self, p, metrics)

        def logged(self: Any, p: Any, *args: Any) -> None:
            log(self, p, *args)
            if p.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        stage.StageRun._save, stage.StageRun._log = saves, logged  # type: ignore[method-assign]

    assert kit.train(bench.run(tmp_path / "run", **BEHIND), plant).code == -signal.SIGKILL
    assert kit.steps_of(tmp_path / "run") == [2]
    assert [name for name in kit.leftovers(tmp_path / "run") if name.startswith(".staging-00000004")]
    bench.goes_on(tmp_path / "run", **BEHIND)


def test_what_the_saver_fails_with_ends_the_run(bench: kit.Bench, tmp_path: Path) -> None:
    """Not the step that began it, but one soon after; the last good checkpoint stays."""

    def plant() -> None:
        begin = store.Store._begin

        def refused(self: Any, staging: Path) -> None:
            if staging.name.startswith(".staging-00000004"):
                raise OSError(28, os.strerror(28))
            begin(self, staging)

        store.Store._begin = refused  # type: ignore[method-assign]

    found = kit.train(bench.run(tmp_path / "run", **BEHIND), plant)
    assert found.code == 74 and "SAVE" in found.said and "checkpoint 4 could not be written" in found.said
    assert kit.steps_of(tmp_path / "run") == [2]
    bench.goes_on(tmp_path / "run", **BEHIND)
