"""Faults of the disk: full, failing, read-only, slow to say so, gone. The last good checkpoint stands, the error says
what is missing, and the run resumes by the same command to the same end."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import fault_kit as kit
import pytest

from lensmith.checkpoint.store import Store
from lensmith.core.errors import RunError
from lensmith.recipe import folder as folder_module
from lensmith.recipe.folder import Lock, boot_id, ended_badly
from lensmith.report import metrics as metrics_module
from lensmith.report.metrics import MetricsWriter, read_metrics
from lensmith.report.sinks import Sinks


@pytest.fixture(autouse=True)
def _as_the_bench(bench: kit.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.settle(monkeypatch)


def content(folder: Path) -> None:
    (folder / "state").mkdir()
    for name in ("a", "state/b"):
        (folder / name).write_bytes(name.encode() * 99)


def stored(folder: Path) -> Store:
    store = Store(folder)
    store.publish(1, content, {})
    return store


# -- full -------------------------------------------------------------------------------------------------------------


@pytest.mark.faults("F29", "the folder of metrics.jsonl is on a full file system for nine of twelve steps")
def test_a_full_disk_for_metrics_delays_them(bench: kit.Bench, tmp_path: Path, record_property: Any) -> None:
    """Checkpoints lie elsewhere. The records of the full time are written, in order, when there is room."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()

    def fill() -> None:
        with pytest.raises(OSError), (folder / "full").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 100)

    def free() -> None:
        os.unlink(folder / "full")

    def plant() -> None:
        kit.at_step(2, fill)()
        kit.at_step(11, free)()

    def work() -> Any:
        kit.mount_tmpfs(folder, "size=2m")
        (folder / "checkpoints").symlink_to(elsewhere)
        found = kit.train(bench.run(folder, train={"max_steps": 12}), plant)
        return [found.code, found.said, kit.end_of(folder), json.loads((folder / "summary.json").read_text())["log"]]

    code, said, end, log = kit.in_own_mounts(work)
    assert code == 0 and said.count("metrics.jsonl cannot be written (No space left on device)") == 1, said
    assert kit.train(bench.run(tmp_path / "whole/run", train={"max_steps": 12})).code == 0
    assert end == kit.end_of(tmp_path / "whole/run")
    assert log["late"] >= 4 and log["lost"] == 0
    record_property("figure", f"{log['late']} records late, none lost")


def test_metrics_are_whole_lines_whatever_the_disk_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line, then nothing, then everything: no half line is ever left, nothing is lost, the order stays."""
    warnings: list[str] = []
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    sinks = Sinks(writer, {}, warnings.append)
    write, takes = os.write, [10_000]

    def some(fd: int, data: bytes) -> int:
        room, takes[0] = takes[0], max(0, takes[0] - len(data))
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:room])

    monkeypatch.setattr(metrics_module.os, "write", some)
    for n in range(3):
        sinks.write({"kind": "event", "n": n})
    takes[0] = 5
    for n in range(3, 6):
        sinks.write({"kind": "event", "n": n})
        assert [r["n"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    takes[0] = 10_000
    sinks.write({"kind": "event", "n": 6})
    assert [r["n"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(7))
    assert sinks.records == {"late": 3, "lost": 0} and len(warnings) == 1
    takes[0] = 0
    sinks.write({"kind": "event", "n": 7})
    sinks.close()
    assert sinks.records == {"late": 4, "lost": 1} and len(warnings) == 1


@pytest.mark.faults("F29", "standard output and error on a full disk")
@pytest.mark.parametrize("mode", ["", "--json", "--quiet"])
def test_a_log_on_a_full_disk(bench: kit.Bench, tmp_path: Path, mode: str) -> None:
    found = kit.train(bench.run(tmp_path / "run", log={"every_steps": 1}), mode=mode, out="/dev/full")
    assert found.code == 0
    assert kit.end_of(tmp_path / "run") == bench.whole


@pytest.mark.faults("F36", "a file system without room for another file, at the second save")
def test_no_files_left(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def fill() -> None:
        with pytest.raises(OSError):
            for n in range(10_000):
                (folder / f"full-{n}").touch()
        for n in range(3):  # the staging folder can be made, the files in it cannot
            (folder / f"full-{n}").unlink()

    def work() -> Any:
        kit.mount_tmpfs(folder, "size=64m,nr_inodes=200")
        found = kit.train(bench.run(folder), kit.at_save(4, fill))
        left = [kit.steps_of(folder), kit.leftovers(folder)]
        for path in folder.glob("full-*"):
            path.unlink()
        again = kit.train(bench.run(folder))
        return [found.code, found.said, left, again.code, kit.end_of(folder)]

    code, said, left, again, end = kit.in_own_mounts(work)
    assert code == 74 and "[SAVE]" in said and "3 files and " in said and "are free" in said, said
    assert left == [[2], []]
    assert again == 0 and end == bench.whole


@pytest.mark.faults("F37", "RLIMIT_FSIZE of 16 KiB from the second save on")
def test_files_may_not_grow(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, resource.RLIM_INFINITY))  # noqa: E731
    found = kit.train(bench.run(folder), kit.at_save(4, limit))
    assert found.code == 74 and "[SAVE]" in found.said and "File too large" in found.said, found.said
    assert kit.steps_of(folder) == [2] and kit.leftovers(folder) == []
    bench.goes_on(folder)


# -- failing ----------------------------------------------------------------------------------------------------------


@pytest.mark.faults("F30", "EIO at each fsync of a save in turn")
def test_a_sync_that_fails_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the pages may be marked clean: a second one would succeed, and the data be lost."""
    sync, state = os.fsync, {"left": 10**9}
    synced: list[str] = []

    def fails(fd: int) -> None:
        state["left"] -= 1
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        if state["left"] == 0:
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fails)
    stored(tmp_path / "count")
    calls = len(synced)
    assert calls >= 6  # two files, the manifest, three folders
    published = 0
    for number in range(1, calls + 1):
        store = stored(tmp_path / str(number))
        synced.clear()
        state["left"] = number
        with pytest.raises(RunError, match=r"SAVE.*Input/output error"):
            store.publish(2, content, {})
        state["left"] = 10**9
        assert len(synced) == number  # nothing is synced behind the one that failed
        assert [p.name for p in store.folder.iterdir() if p.name.startswith(".")] == []
        published += store.steps() == [1, 2]
        assert store.newest(pytest.fail).step in (1, 2)  # type: ignore[union-attr]
    assert published == 1  # only the last one, that of the parent: the checkpoint is there and whole


@pytest.mark.faults("F30", "EIO at a sync of the second save of a run")
def test_a_failing_disk_ends_the_run_and_it_goes_on(bench: kit.Bench, tmp_path: Path) -> None:
    def fail() -> None:
        sync, calls = os.fsync, [0]

        def fsync(fd: int) -> None:
            calls[0] += 1
            if calls[0] == 3:
                raise OSError(errno.EIO, "Input/output error")
            sync(fd)

        os.fsync = fsync

    found = kit.train(bench.run(tmp_path / "run"), kit.at_save(4, fail))
    assert found.code == 74 and "[SAVE]" in found.said and "Input/output error" in found.said
    assert kit.steps_of(tmp_path / "run") == [2]
    bench.goes_on(tmp_path / "run")


@pytest.mark.faults("F34", "a rename that leaves the file system (EXDEV)")
def test_checkpoints_on_two_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging lies beside its target, so this happens only on layered file systems."""
    store = stored(tmp_path)

    def refuse(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(RunError, match=r"SAVE.*Invalid cross-device link"):
            store.publish(2, content, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


# -- read-only, gone --------------------------------------------------------------------------------------------------


@pytest.mark.faults("F31", "the folder of checkpoints loses its write permission after the first save")
def test_lost_permission(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def lose() -> None:
        kit.obey_permissions()
        os.chmod(folder / "checkpoints", 0o555)

    found = kit.train(bench.run(folder), kit.at_step(3, lose))
    assert found.code == 74 and "[SAVE]" in found.said and "Permission denied" in found.said, found.said
    assert kit.steps_of(folder) == [2] and kit.leftovers(folder) == []
    os.chmod(folder / "checkpoints", 0o755)
    bench.goes_on(folder)


@pytest.mark.faults("F31", "the folder of checkpoints is remounted read-only after the first save")
def test_a_disk_that_turns_read_only(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)

    def work() -> Any:
        kit.bind(folder / "checkpoints")
        found = kit.train(bench.run(folder), kit.at_step(3, lambda: kit.read_only(folder / "checkpoints")))
        return [found.code, found.said]

    code, said = kit.in_own_mounts(work)
    assert code == 74 and "Read-only file system" in said, said
    assert kit.steps_of(folder) == [2] and kit.leftovers(folder) == []
    bench.goes_on(folder)


@pytest.mark.faults("F32", "rm -r of the run folder behind step 3; then kill, and the same command again")
def test_a_deleted_folder_is_made_anew(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = kit.train(bench.run(folder), kit.at_step(3, lambda: shutil.rmtree(folder)))
    assert found.code == 0 and found.said.count("was deleted while the run was going on; it is made anew") == 1
    assert kit.end_of(folder) == bench.whole  # the records of steps 1 to 3 too
    assert kit.steps_of(folder) == [4, 6]
    names = {"metrics.jsonl", "run.yaml", "trains.json", "versions.json", "ledger.parquet", "summary.json"}
    assert names <= {p.name for p in folder.iterdir()}

    folder = tmp_path / "again" / "run"

    def plant() -> None:
        kit.at_step(3, lambda: shutil.rmtree(folder))()
        kit.at_step(5, kit.signal_self(9))()

    assert kit.train(bench.run(folder), plant).code == -9
    assert kit.steps_of(folder) == [4]
    bench.goes_on(folder)


@pytest.mark.faults("F32", "another run begins in the folder that was deleted")
def test_a_deleted_folder_that_another_run_took(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def take() -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        mine, theirs = os.pipe()
        first = os.getpid()
        if os.fork() == 0:
            lock = Lock(folder / "lock")
            lock.acquire()
            os.write(theirs, b"x")
            while os.getppid() == first:
                time.sleep(0.05)
            os._exit(0)
        os.read(mine, 1)

    found = kit.train(bench.run(folder), kit.at_step(3, take))
    assert found.code == 74 and "[LOCKED]" in found.said, found.said
    assert not (folder / "checkpoints").exists()


# -- two runs, one folder ---------------------------------------------------------------------------------------------


@pytest.mark.faults("F35", "a stale lock: dead process, another boot, the number of a living stranger")
def test_a_stale_lock_is_taken_over_and_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, here = tmp_path / "lock", folder_module.platform.node()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 7, "rss_bytes": 2147483648}\n')
    said: dict[str, str] = {}
    for owner in ("1", f"1 {here} {boot_id()}", f"1 {here} 0-another-boot", "1 another-host 0"):
        path.write_text(owner)
        lock = Lock(path)
        lock.acquire()
        assert path.read_text() == f"{os.getpid()} {here} {boot_id()}" and lock.is_held()
        assert lock.left_by == owner
        said[owner] = ended_badly(lock.left_by, tmp_path / "metrics.jsonl")
        lock.release()
        assert not path.exists()
    restarted = said.pop(f"1 {here} 0-another-boot")
    assert "ended with a restart of the machine" in restarted
    assert all("was killed or crashed; in step 7 it held 2.0 of" in text for text in said.values())
    assert "process 1 on another-host)" in said["1 another-host 0"] and "(process 1)" in said["1"]
    fresh = Lock(path)
    fresh.acquire()
    assert fresh.left_by == ""


# -- the kit ---------------------------------------------------------------------------------------------------------


def test_permissions_can_be_lost(tmp_path: Path) -> None:
    """Also by root, whom they would not bind."""
    (tmp_path / "closed").mkdir(mode=0o555)
    pid = os.fork()
    if pid == 0:
        kit.obey_permissions()
        try:
            (tmp_path / "closed" / "a").touch()
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
