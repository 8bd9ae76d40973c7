"""Faults at rest and around a run: flipped bits, foreign files, bad and slow data, clocks, locales, strange paths."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_kit as kit
import pyarrow.parquet as pq
import pytest
import tiny

from lensmith.checkpoint.store import MANIFEST, Store
from lensmith.data import collate
from lensmith.recipe import session
from lensmith.recipe.export import export
from lensmith.report.page import write_report
from lensmith.report.terminal import Terminal


@pytest.fixture(autouse=True)
def _as_the_bench(bench: kit.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.settle(monkeypatch)


@pytest.fixture
def done(bench: kit.Bench, tmp_path: Path) -> Path:
    """The folder of a finished run, with checkpoints 4 and 6."""
    shutil.copytree(bench.chat.parent.parent / "whole/run", tmp_path / "run")
    return tmp_path / "run"


# -- corruption at rest -----------------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.faults("F38", "500 flipped bits over all files of a real checkpoint")
def test_every_flipped_bit_of_a_real_checkpoint_is_refused(done: Path, record_property: Any) -> None:
    store, rng = Store(done / "checkpoints"), random.Random(0)
    files = sorted(p for p in store.path(6).rglob("*") if p.is_file())
    refused: Counter[str] = Counter()
    for n in range(500):
        path = files[n % len(files)]
        before = path.read_bytes()
        flip(path, rng)
        warnings: list[str] = []
        found = store.newest(warnings.append)
        assert found is not None and found.step == 4
        assert len(warnings) == 1 and str(path) in warnings[0], warnings
        refused[path.name] += 1
        path.write_bytes(before)
    assert {MANIFEST, "training.safetensors", "random.safetensors", "progress.json"} <= set(refused)
    assert store.newest(pytest.fail).step == 6  # type: ignore[union-attr]
    record_property("figure", f"{refused.total()} of 500 refused by name, in {len(refused)} files")


@pytest.mark.faults("F38", "one flipped bit, and save.fall_back: false")
def test_a_run_may_be_told_not_to_fall_back(bench: kit.Bench, done: Path) -> None:
    path = done / "checkpoints/step-00000006/state/progress.json"
    flip(path, random.Random(1))
    before = {p: p.read_bytes() for p in done.rglob("*") if p.is_file()}
    found = kit.train(bench.run(done, save={"fall_back": False}))
    assert found.code == 74 and "[DAMAGED]" in found.said and str(path) in found.said
    assert {p: p.read_bytes() for p in done.rglob("*") if p.is_file()} == before
    assert "is damaged and not used" in bench.goes_on(done).said


@pytest.mark.faults("F45", "files named LATEST, latest, step-x beside the checkpoints: dangling, empty, to a bad one")
def test_nothing_beside_the_checkpoints_decides(bench: kit.Bench, done: Path) -> None:
    folder = done / "checkpoints"
    shutil.rmtree(folder / "step-00000006")
    (folder / "LATEST").symlink_to(folder / "step-00000099")
    (folder / "latest").write_text("step-00000002")
    (folder / "latest_checkpointed_iteration.txt").write_text("")
    (folder / "step-00000008").write_text("a file")
    (folder / "step-9").mkdir()
    (done / "summary.json").unlink()
    assert Store(folder).steps() == [4]
    os.truncate(folder / "step-00000004/state/progress.json", 0)
    found = kit.train(bench.run(done))
    assert found.code == 74 and "[DAMAGED]" in found.said  # and not from the start, though LATEST names nothing
    shutil.copytree(bench.chat.parent.parent / "whole/run/checkpoints/step-00000004", folder / "step-00000004",
                    dirs_exist_ok=True)  # fmt: skip
    (folder / "step-00000008").unlink()
    bench.goes_on(done)


# -- data -------------------------------------------------------------------------------------------------------------


def rows(folder: Path, count: int, bad: int = 0) -> Path:
    """`count` rows with a picture, of which the last `bad` name one that is not there."""
    tiny.make_pictures(folder, 4)
    turns = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a circle"}]
    names = ["images/gone.png" if k >= count - bad else f"images/{k % 4}.png" for k in range(count)]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": turns, "images": [name]}) + "\n" for name in names))
    return path


@pytest.mark.faults("F64", "1, 5, 6 and 100 of 100 samples are bad, the limit is 5 %")
@pytest.mark.parametrize("bad", [1, 5, 6, 100])
def test_a_share_of_bad_samples(bench: kit.Bench, tmp_path: Path, bad: int) -> None:
    data, folder = rows(tmp_path / "data", 100, bad), tmp_path / "run"
    over = {"train": {"epochs": 1, "max_steps": None}, "batch": {"samples": 50}}
    found = kit.train(kit.run_in(folder, bench.base, data, **over))
    if bad > 5:
        assert found.code == 65 and f"{bad} IMG_MISSING" in found.said, found.said
        assert "[TOO_MANY_DROPPED]" in found.said or "[NO_SAMPLES]" in found.said
        assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()
        return
    assert found.code == 0, found.said
    counts = json.loads((folder / "summary.json").read_text())["samples"]
    assert (counts["read"], counts["train"], counts["dropped"]) == (100, 100 - bad, bad)
    ledger = pq.read_table(folder / "ledger.parquet").to_pylist()
    assert [r["row"] for r in ledger if r["verdict"] == "drop"] == list(range(100 - bad, 100))
    assert sum(r["samples"] for r in kit.records(folder)) == 100 - bad


@pytest.mark.faults("F66", "the last line of a JSONL file is cut in half")
def test_a_half_written_last_line(bench: kit.Bench, tmp_path: Path) -> None:
    data = rows(tmp_path / "data", 12)
    data.write_bytes(data.read_bytes()[:-30])
    found = kit.train(kit.run_in(tmp_path / "run", bench.base, data))
    assert found.code == 65 and "train.jsonl:12" in found.said and "[JSON]" in found.said, found.said
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.faults("F67", "each sample takes 100 ms to read")
@pytest.mark.parametrize("workers", [0, 1])
def test_slow_decoding_is_seen_and_nothing_times_out(bench: kit.Bench, tmp_path: Path, workers: int) -> None:
    def plant() -> None:
        real = collate._encode
        collate._encode = lambda loader, member: (time.sleep(0.1), real(loader, member))[1]  # type: ignore[assignment]

    folder = tmp_path / "run"
    found = kit.train(bench.run(folder, data={"workers": workers, "decode_timeout": 5}), plant)
    assert found.code == 0 and kit.end_of(folder) == bench.whole
    waits = [r["data_wait_seconds"] for r in kit.records(folder)]
    assert sum(waits) > 6 * 4 * 0.1 * (0.95 if workers == 0 else 0.3)  # a worker reads while a step is computed


@pytest.mark.faults("F69", "1, 2 and 4 data workers instead of none; another number at a resume")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers(bench: kit.Bench, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "run"
    found = kit.train(bench.run(folder, data={"workers": workers}), kit.at_step(3, kit.signal_self(15)))
    assert found.code == 143
    bench.goes_on(folder, data={"workers": 4 - workers})


# -- clocks, locales, paths -------------------------------------------------------------------------------------------


def jumping_clock() -> None:
    """An hour on behind step 2, two back behind step 4."""
    now, now_ns, ahead = time.time, time.time_ns, [0]
    time.time = lambda: now() + ahead[0]
    time.time_ns = lambda: now_ns() + ahead[0] * 10**9

    def move(seconds: int) -> Callable[[], None]:
        return lambda: ahead.__setitem__(0, seconds)

    kit.at_step(2, move(3600))()
    kit.at_step(4, move(-3600))()


@pytest.mark.faults("F71", "the clock jumps an hour on, then two back; the newest checkpoint has the oldest time")
def test_a_clock_that_jumps(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    over: dict[str, Any] = {"save": {"every_minutes": 20}, "data": {"workers": 1}}
    found = kit.train(bench.run(folder, **over), jumping_clock)
    assert found.code == 0 and kit.end_of(folder) == bench.whole
    assert kit.steps_of(folder) == [4, 6]
    summary = json.loads((folder / "summary.json").read_text())
    durations = [r[key] for r in kit.records(folder) for key in ("step_seconds", "data_wait_seconds")]
    assert all(0 <= d < 60 for d in [*durations, *summary["wall_seconds"].values(), *summary["cpu_seconds"].values()])
    assert [r["step"] for r in kit.records(folder, "event") if r["name"] == "checkpoint"] == [2, 4, 6]
    for step, when in ((6, 0), (4, time.time() + 9999)):
        os.utime(folder / f"checkpoints/step-{step:08d}", (when, when))
    assert Store(folder / "checkpoints").newest(pytest.fail).step == 6  # type: ignore[union-attr]


@pytest.mark.faults("F72", "another umask, time zone and working folder at a resume")
def test_another_environment(bench: kit.Bench, tmp_path: Path) -> None:
    def plant() -> None:
        os.umask(0o077)
        os.chdir("/")
        os.environ["TZ"] = "Pacific/Kiritimati"
        time.tzset()

    folder = tmp_path / "run"
    assert kit.train(bench.run(folder), kit.at_step(3, kit.signal_self(15))).code == 143
    found = kit.train(bench.run(folder), plant)
    assert found.code == 0, found.said
    assert kit.end_of(folder) == bench.whole


def command(run: Any, file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run.resolved_yaml(), encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-m", "lensmith", "train", str(file)], env=env, capture_output=True, text=True
    )


ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.faults("F72", "an ASCII locale, Python's UTF-8 mode off; a path that it cannot write")
def test_an_ascii_locale(bench: kit.Bench, tmp_path: Path) -> None:
    found = command(bench.run(tmp_path / "run"), tmp_path / "run.yaml", **ASCII)
    assert found.returncode == 0, found.stderr
    assert kit.end_of(tmp_path / "run") == bench.whole
    found = command(bench.run(tmp_path / "größe/run"), tmp_path / "other.yaml", **ASCII)
    assert found.returncode == 74 and "[LOCALE]" in found.stderr and "PYTHONUTF8=1" in found.stderr, found.stderr


@pytest.mark.faults("F73", "spaces, quotes, braces, brackets, a line feed, letters beyond ASCII in run and data paths")
def test_strange_paths(bench: kit.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", write_report)
    strange = tmp_path / "a b 'c' \"d\" {e} %s $HOME" / "größe 🚀\nline" / "-run"
    chat = tmp_path / "dätä é 'x'"
    shutil.copytree(bench.chat.parent, chat)
    run = kit.run_in(strange, bench.base, chat / bench.chat.name)
    assert kit.train(run, kit.at_step(3, kit.signal_self(15))).code == 143
    found = kit.train(run)
    assert found.code == 0, found.said
    assert kit.end_of(strange) == bench.whole and (strange / "report.html").is_file()
    out = strange.parent / "exported model"
    export(strange, out, base=None, merge=True, dtype=None, shard_gb=5.0, terminal=Terminal("quiet"))
    assert (out / "model.safetensors").is_file()
