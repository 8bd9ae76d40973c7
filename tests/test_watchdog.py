"""The watchdog: two ranks of which one hangs, dies, or is late; what the others do, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lensmith.parallel import watcher
from lensmith.parallel.watchdog import Watchdog
from lensmith.parallel.watcher import AFFECTED, ENDED, FAILED, GONE, Heard, Status, View, judge

TOY = Path(__file__).parent / "toy_ranks.py"
KILLED = -9


def pair(folder: Path, **plan: Any) -> tuple[list[int], str, float]:
    """(exit codes, what was printed, seconds) of two ranks."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(TOY), "pair", str(folder), json.dumps(plan)], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, time.monotonic() - begin


def report(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "ranks").glob("report-*.json")
    return json.loads(path.read_text())


def state(folder: Path) -> list[int]:
    return json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    folder = tmp_path_factory.mktemp("undisturbed")
    codes, said, _ = pair(folder)
    assert codes == [0, 0] and "[RANK]" not in said and not list((folder / "ranks").glob("report-*"))
    return state(folder)


F15, F20 = pytest.mark.faults("F15", "SIGSTOP of one rank"), pytest.mark.faults("F20", "interpreter lock held")
HANGS = [
    pytest.param("stopped", "stopped by a signal", marks=F15),
    pytest.param("holds the interpreter lock", "has been silent", marks=F20),
    pytest.param("too long a phase", "has been silent"),
]


@pytest.mark.parametrize("kind, words", HANGS)
def test_a_rank_that_hangs_ends_all(kind: str, words: str, tmp_path: Path) -> None:
    """Named with its last step and collective, stacks of both, within the timeout and 30 s; none ends with 0."""
    codes, said, seconds = pair(tmp_path, fault=kind, timeout=3.0)
    assert codes == [KILLED, KILLED] and seconds < 3 + 30
    found = report(tmp_path)
    assert [c["rank"] for c in found["causes"]] == [1] and words in found["causes"][0]["what"]
    waiting, hung = found["ranks"]
    assert (hung["step"], hung["collective"], waiting["doing"], waiting["collectives"]) == (5, "sum", "sum", 6)
    assert hung["collectives"] == 5
    assert "in fault" in hung["stacks"] and "in gather" in waiting["stacks"]
    assert said.count("[RANK] rank 1 of 2") == 1 and "last step 5, last collective 'sum'" in said
    assert state(tmp_path)[0] == 5


DEATHS = [
    pytest.param("killed", "is gone", KILLED, marks=pytest.mark.faults("F17", "SIGKILL of one rank")),
    pytest.param("exits with 0", "is gone", 0, marks=pytest.mark.faults("F18", "one rank ends with 0 too early")),
    pytest.param("segmentation fault", "died: Segmentation fault", -11,
                 marks=pytest.mark.faults("F21", "segmentation fault in native code")),
]  # fmt: skip


@pytest.mark.parametrize("kind, words, code", DEATHS)
def test_a_rank_that_dies_ends_all(kind: str, words: str, code: int, tmp_path: Path) -> None:
    """Long before the timeout, without a launcher that sees to it."""
    codes, said, seconds = pair(tmp_path, fault=kind, timeout=30.0)
    assert codes == [KILLED, code] and seconds < 15
    found = report(tmp_path)
    assert [c["rank"] for c in found["causes"]] == [1] and words in found["causes"][0]["what"]
    assert "in gather" in found["ranks"][0]["stacks"]
    assert ("string_at" in found["ranks"][1]["stacks"]) == (code == -11)
    assert said.count("[RANK] rank 1 of 2") == 1


@pytest.mark.faults("F16", "SIGSTOP and SIGCONT below the timeout")
def test_a_late_rank_is_a_straggler_and_nothing_else(tmp_path: Path, undisturbed: list[int]) -> None:
    codes, said, _ = pair(tmp_path, fault="late", timeout=12.0, pause=0.1)
    assert codes == [0, 0] and "[RANK]" not in said and state(tmp_path) == undisturbed
    (late,) = map(json.loads, (tmp_path / "stragglers").read_text().splitlines())
    assert (late["rank"], late["step"], late["doing"]) == (1, 5, "compute") and 2 < late["seconds"] < 5


def test_long_honest_work_is_no_hang(tmp_path: Path, undisturbed: list[int]) -> None:
    """Rank 1 works for twice the timeout in a phase without limit; rank 0 waits for it in a collective."""
    codes, said, _ = pair(tmp_path, fault="long honest work", timeout=2.0)
    assert codes == [0, 0] and "[RANK]" not in said and state(tmp_path) == undisturbed
    assert (tmp_path / "stragglers").read_text() == ""


def test_one_rank_fails_and_the_others_wait(tmp_path: Path) -> None:
    """Without a launcher nobody ends the others; the rank has said its own error."""
    codes, said, seconds = pair(tmp_path, fault="data", timeout=60.0)
    assert codes == [KILLED, 65] and seconds < 30
    found = report(tmp_path)
    assert found["causes"] == [{"rank": 1, "what": "failed, and said why"}]
    assert found["ranks"][1]["failed"] == "DataError: [ROW] a.jsonl:3: a wrong row\n  -> mend it"
    assert said.count("wrong row") == 1


# -- the judgement alone ----------------------------------------------------------------------------------------------


def view(tmp_path: Path, *ranks: dict[str, Any]) -> View:
    made = View(tmp_path, len(ranks))
    for number, about in enumerate(ranks):
        stale = about.pop("stale", 0.0)
        made.heard[number] = Heard(Status(number, "host", 1, 2, **{"limit": 10.0, **about}), stale)
    return made


def blamed(seen: View, failed_since: float = 0.0) -> list[int]:
    return [c.rank for c in judge(seen, 10.0, failed_since)]


def test_who_is_to_blame(tmp_path: Path) -> None:
    waits, works = {"collectives": 7, "silent": 11.0}, {"collectives": 6, "silent": 11.0}
    assert blamed(view(tmp_path, waits, works)) == [1]
    assert blamed(view(tmp_path, waits, {**works, "silent": 9.0})) == []
    assert blamed(view(tmp_path, waits, {**works, "limit": None})) == []  # a phase
    assert blamed(view(tmp_path, waits, {**waits, "silent": 12.0})) == [1, 0]  # all in one collective
    stopped = {**waits, "silent": 9.8, "process": "stopped by a signal"}
    assert blamed(view(tmp_path, waits, stopped)) == [1]  # in the same collective, and a moment later
    assert blamed(view(tmp_path, {}, {"stale": 11.0})) == [1]  # its machine is gone
    assert blamed(view(tmp_path, {}, {"stale": 11.0, "state": ENDED})) == []


def test_deaths_and_failures(tmp_path: Path) -> None:
    first, second = {"state": GONE, "over_at": 5.0}, {"state": GONE, "over_at": 4.0}
    assert blamed(view(tmp_path, first, second)) == [1, 0]
    hurt = {"state": AFFECTED, "over_at": 3.0}
    assert blamed(view(tmp_path, hurt, first)) == [1]  # its end is why the other failed
    failed = {"state": FAILED, "over_at": 3.0}
    assert blamed(view(tmp_path, failed, first)) == []  # torchrun ended the other
    assert blamed(view(tmp_path, {**failed, "over_at": 6.0}, first)) == [1]  # it failed as the other had gone
    assert blamed(view(tmp_path, failed, {}), 9.0) == [] and blamed(view(tmp_path, failed, {}), 11.0) == [0]
    assert blamed(view(tmp_path, hurt, {}), 11.0) == [0]
    assert blamed(view(tmp_path, {"state": ENDED}, {"state": ENDED})) == []


# -- the rank's side --------------------------------------------------------------------------------------------------


def test_alone_there_is_no_watcher_and_signs_of_life_are_cheap(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "ranks", SimpleNamespace(rank=0, size=1, broadcast_json=None), 10.0) as dog:
        batches: list[float] = []
        for _ in range(10):  # of which the machine may disturb some
            begin = time.perf_counter()
            for step in range(2000):
                dog.beat(step, "forward")
            batches.append((time.perf_counter() - begin) / 2000)
        with dog.phase("save"):
            dog.collective("sum")
        assert dog.stragglers() == []
    assert not (tmp_path / "ranks").exists()
    assert min(batches) < 5e-6
    assert watcher.PAGE.unpack_from(dog._page, 0)[:2] == (20_003, 1)


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("in the way")
    ranks = SimpleNamespace(rank=0, size=2, broadcast_json=lambda value, what: value)
    with pytest.raises(FileExistsError), Watchdog(tmp_path / "ranks", ranks, 10.0):
        pass


def test_old_attempts_go_and_those_at_work_stay(tmp_path: Path) -> None:
    """Of four earlier ones the newest two stay, and one whose watchers still write."""
    for number in range(4):
        folder = tmp_path / "ranks" / f"attempt-2020010{number}-x"
        folder.mkdir(parents=True)
        slot = watcher.slot(folder, 0)
        slot.write_text("{}")
        if number != 1:
            os.utime(slot, (0, 0))
    ranks = SimpleNamespace(rank=0, size=2, broadcast_json=None)
    made = Watchdog(tmp_path / "ranks", ranks, 10.0)._make_attempt()
    left = sorted(p.name for p in (tmp_path / "ranks").iterdir())
    assert left == ["attempt-20200101-x", "attempt-20200102-x", "attempt-20200103-x", made]
