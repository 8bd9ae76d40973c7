"""`lensmith train --ray local`: two ranks that Ray starts, and starts again; what cannot be had is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny
import yaml

from lensmith.core.errors import ConfigError, DataError, RunError
from lensmith.parallel import ray_train
from lensmith.recipe.train_ray import relayed, train_on_ray
from lensmith.report.terminal import Terminal


@pytest.mark.faults("F17", "SIGKILL of one rank under Ray, which starts all again")
def test_a_rank_is_killed_under_ray(tmp_path: Path, qwen25: Path) -> None:
    """The losses are those of one rank alone, step by step, and each step is there once."""
    over: dict[str, Any] = {
        "batch": {"samples": 4}, "tune": {"kind": "lora", "rank": 2, "dropout": 0.0}, "train": {"max_steps": 5},
        "save": {"every_steps": 1},
    }  # fmt: skip
    chat = tiny.make_chat(tmp_path / "chat", 24)
    alone = runs.located(tmp_path / "alone", qwen25, chat, **over)
    reference = runs.quiet_train(alone).summary["losses"]
    values = yaml.safe_load(alone.resolved_yaml())
    file, marker = tmp_path / "run.yaml", tmp_path / "killed"
    several = {**values, "output": str(tmp_path / "ray"), "parallel": {"ranks": 2, "restarts": 1}}
    file.write_text(yaml.safe_dump(several))
    driver = Path(__file__).parent / "ray_driver.py"
    done = subprocess.run([sys.executable, str(driver), str(file), str(marker)], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert marker.exists() and done.stdout.count("What trains") == 2 and "RayTrainWorker" not in done.stdout
    summary = json.loads((tmp_path / "ray" / "summary.json").read_text())
    assert summary["losses"] == pytest.approx(reference, rel=1e-5) and len(reference) == 5


# -- without Ray ------------------------------------------------------------------------------------------------------


class Wrapped(Exception):
    def __init__(self, cause: BaseException):
        self.cause = cause


def failed(*ranks: BaseException) -> Exception:
    error = Exception("Training failed\nlast line")
    error.worker_failures = dict(enumerate(ranks))  # type: ignore[attr-defined]
    return error


def test_whose_error_it_was() -> None:
    row, other = DataError("ROW", "a wrong row"), RunError("OTHER_RANK", "rank 1 stopped")
    assert ray_train._first(failed(Wrapped(other), Wrapped(row))) is row
    assert ray_train._first(failed(other)) is other
    assert ray_train._first(failed(Wrapped(OSError("x")))).message == "the ranks failed: last line"


def test_a_cluster_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    ray_train._require("CPU", 3)
    with pytest.raises(ConfigError, match=r"the cluster has 3 CPUs and parallel\.ranks is 4"):
        ray_train._require("CPU", 4)
    with pytest.raises(ConfigError, match="the cluster has 0 GPUs"):
        ray_train._require("GPU", 1)


def test_a_dry_run_is_not_for_a_cluster() -> None:
    located: Any = SimpleNamespace(run=SimpleNamespace(parallel=None))
    with pytest.raises(ConfigError, match="--dry-run"):
        train_on_ray(located, Terminal("quiet"), address="local", storage=None, dry_run=True)


def test_the_first_ranks_words_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = tmp_path / "ray" / "terminal.txt"
    with relayed(said), said.open("a") as out:
        out.write("step 1\nstep 2\n")
    assert capsys.readouterr().out == "step 1\nstep 2\n"
