"""`lensmith train` as launcher: exit codes, signals, starts anew, ports, and who speaks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from lensmith.parallel.exits import EXITS, leave_code, speaker

TOY = Path(__file__).parent / "toy_ranks.py"
PATHS = {"PYTHONPATH": str(TOY.parent)}


@contextmanager
def started(folder: Path, **plan: Any) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, str(TOY), "launch", str(folder), json.dumps(plan)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **PATHS},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def launched(folder: Path, **plan: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    with started(folder, **plan) as process:
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


def await_step(folder: Path, step: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if json.loads((folder / "state.json").read_text())[0] >= step:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError("the ranks did not get there")


def state(folder: Path) -> list[int]:
    return json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Also: the default port is taken, only the first rank speaks, and nothing is left but an attempt's folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 29500))
        taken.listen()
        code, out, err = launched(folder)
    assert (code, out, err) == (0, "rank 0 speaks\n", "")
    assert [p.name.split("-")[0] for p in (folder / "ranks").iterdir()] == ["attempt"]
    return state(folder)


@pytest.mark.faults("F74", "the default port of torchrun is in use")
def test_another_port_is_taken(undisturbed: list[int]) -> None:
    assert undisturbed[0] == 12


@pytest.mark.faults("F17", "SIGKILL of one rank, all start again")
def test_a_killed_rank_and_a_new_start(tmp_path: Path, undisturbed: list[int]) -> None:
    code, out, err = launched(tmp_path, fault="killed", restarts=1)
    assert code == 0 and state(tmp_path) == undisturbed
    assert out.count("rank 0 speaks") == 2 and "all start again, 1 of 1 times" in out
    assert "[RANK] rank 1 of 2 is gone" in err and "Traceback" not in err


def test_no_more_starts_are_left(tmp_path: Path) -> None:
    code, out, err = launched(tmp_path, fault="exits with 0", once=False, restarts=1)
    assert code == 74 and out.count("rank 0 speaks") == 2
    assert err.count("[RANK] rank 1 of 2 is gone") == 2


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_all_in_order(number: int, code: int, tmp_path: Path) -> None:
    """Both ranks save the same step and the exit code is theirs, though they end half a second apart."""
    with started(tmp_path, steps=100_000, pause=0.02, restarts=3) as launcher:
        await_step(tmp_path, 3)
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (code, "") and "start again" not in out


@pytest.mark.faults("F11", "SIGTERM to one rank only")
def test_a_signal_to_one_rank_only(tmp_path: Path) -> None:
    with started(tmp_path, steps=100_000, pause=0.02, restarts=3) as launcher:
        await_step(tmp_path, 3)
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (143, "") and "start again" not in out


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """The ranks are in their last, long piece of work; none of the processes is left."""
    with started(tmp_path, steps=2, tail=600.0) as launcher:
        await_step(tmp_path, 2)
        below = psutil.Process(launcher.pid).children(recursive=True)
        launcher.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 130 and "[RANK]" not in err
    assert len(below) >= 3 and psutil.wait_procs(below, timeout=10)[1] == []


def test_a_killed_launcher_takes_the_ranks_with_it(tmp_path: Path) -> None:
    with started(tmp_path, steps=100_000, pause=0.02) as launcher:
        await_step(tmp_path, 3)
        below = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        assert psutil.wait_procs(below, timeout=30)[1] == []


@pytest.mark.parametrize(
    "fault, code, words", [("data", 65, "[ROW] a.jsonl:3: a wrong row"), ("defect", 1, "ValueError: a defect")]
)
def test_an_error_of_one_rank_is_said_once(fault: str, code: int, words: str, tmp_path: Path) -> None:
    """Rank 1 writes to a file; the launcher shows it. What another start cannot mend is not started again."""
    found, out, err = launched(tmp_path, fault=fault, once=False, restarts=0 if fault == "defect" else 2)
    assert found == code and err.count(words) == 1 and "ChildFailedError" not in err
    assert out.count("rank 0 speaks") == 1


def test_an_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    code, out, err = launched(tmp_path, fault="config", restarts=2)
    assert code == 64 and err.count("[KEY]") == 1 and out.count("rank 0 speaks") == 1


# -- the rank's side --------------------------------------------------------------------------------------------------


def test_what_a_rank_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert leave_code(143) == 143 and speaker() == ""
    monkeypatch.setenv("RANK", "1")
    assert leave_code(143) == 143 and speaker() == "rank 1: " and speaker("OTHER_RANK") is None
    monkeypatch.setenv(EXITS, str(tmp_path))
    assert (leave_code(65, "ROW"), leave_code(70)) == (65, 70)
    left = json.loads((tmp_path / "rank-1.json").read_text())
    assert (left["code"], left["error"]) == (65, "ROW")
    monkeypatch.setenv("RANK", "0")
    assert leave_code(143) == 0
