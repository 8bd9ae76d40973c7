"""Whole runs of two ranks by `lensmith train`: a rank killed, a rank signalled; both end as undisturbed runs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml

STEPS = 30


class Runs:
    """Runs of one model on the same data, each in a folder of its own."""

    def __init__(self, folder: Path, base: Path):
        self.folder, self.base, self.chat = folder, base, tiny.make_chat(folder / "chat", 24)

    def start(self, name: str, *overrides: str) -> subprocess.Popen[str]:
        values: dict[str, Any] = {
            "model": {"path": str(self.base)}, "data": {"train": str(self.chat), "max_tokens": 512, "workers": 0},
            "batch": {"samples": 4, "device_tokens": 512}, "tune": {"kind": "lora", "rank": 2, "dropout": 0.1},
            "precision": {"preset": "fp32"}, "schedule": {"kind": "constant", "warmup_steps": 0},
            "train": {"epochs": None, "max_steps": STEPS, "device": "cpu", "threads": 1},
            "save": {"every_steps": 1, "keep_last": 2}, "parallel": {"ranks": 2, "timeout": 60.0},
            "output": str(self.folder / name),
        }  # fmt: skip
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return subprocess.Popen(
            [sys.executable, "-m", "lensmith", "train", str(file), *overrides], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def rank(self, process: subprocess.Popen[str], name: str, step: int) -> psutil.Process:
        """The second rank, once the run has done `step` steps."""
        metrics, end = self.folder / name / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            if metrics.is_file() and metrics.read_text().count('"kind": "step"') >= step:
                below = psutil.Process(process.pid).children(recursive=True)
                return next(p for p in below if p.environ().get("RANK") == "1" and "lensmith" in p.cmdline())
            time.sleep(0.02)
        raise AssertionError(process.communicate())

    def state(self, name: str) -> dict[str, str]:
        """Digest of every file of the newest checkpoint that is not about where it lies."""
        summary = json.loads((self.folder / name / "summary.json").read_text())
        assert summary["steps"] == STEPS and summary["checkpoint"].endswith(f"{STEPS:08d}")
        files = sorted(Path(summary["checkpoint"]).glob("*/*.safetensors"))
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, qwen25: Path) -> Iterator[tuple[Runs, dict[str, str]]]:
    runs = Runs(tmp_path_factory.mktemp("runs"), qwen25)
    code, out, err = runs.ended(runs.start("whole"))
    assert code == 0, err
    assert out.count("What trains") == 1  # only the first rank speaks
    yield runs, runs.state("whole")


@pytest.mark.faults("F17", "SIGKILL of one rank of a run, all start again")
def test_a_killed_rank(made: tuple[Runs, dict[str, str]]) -> None:
    runs, reference = made
    process = runs.start("killed", "parallel.restarts=1")
    runs.rank(process, "killed", 5).kill()
    code, out, err = runs.ended(process)
    assert code == 0, err
    assert "all start again, 1 of 1 times" in out and "rank 1" in out + err
    assert runs.state("killed") == reference


@pytest.mark.faults("F11", "SIGTERM to one rank only of a run")
def test_a_signal_to_one_rank(made: tuple[Runs, dict[str, str]]) -> None:
    runs, reference = made
    process = runs.start("stopped")
    runs.rank(process, "stopped", 5).send_signal(signal.SIGTERM)
    code, _, err = runs.ended(process)
    assert code == 143 and err.count("stopped by SIGTERM after step") == 1, err
    step = int(err.partition("after step ")[2].partition(";")[0])
    newest = sorted((runs.folder / "stopped" / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{step:08d}" and 5 <= step < STEPS
    code, _, err = runs.ended(runs.start("stopped"))
    assert code == 0, err
    assert runs.state("stopped") == reference
