"""Checkpoints in an object store: committed or not there, verified when they come back, one run to a prefix."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from fsspec.implementations.memory import MemoryFileSystem

from lensmith.checkpoint import mirror as mirror_module
from lensmith.checkpoint import remote as remote_module
from lensmith.checkpoint.mirror import Mirror
from lensmith.checkpoint.remote import Remote, Unreachable
from lensmith.checkpoint.store import MANIFEST, Published, Store, verify
from lensmith.core.errors import ConfigError, ModelError, RunError
from lensmith.recipe import session
from lensmith.recipe.export import export
from lensmith.recipe.inspect import inspect_folder
from lensmith.report.terminal import Terminal

URL = "memory://bucket/run"
ROOT = "/bucket/run"
CHANGES = ("put_file", "pipe_file", "rm_file")
"""What changes an object; `rm` goes through `rm_file`."""


@pytest.fixture(autouse=True)
def _empty_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote_module, "PAUSES_SECONDS", (0.0,) * 6)
    yield
    for thread in threading.enumerate():
        if thread.name == "lensmith-copy":
            thread.join(10)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's work is done by the caller, so that a kill in it ends the caller."""

    def spawn(self: Mirror, steps: list[int], then: Callable[[], None]) -> None:
        self.wait()
        self._work(steps, then)

    monkeypatch.setattr(Mirror, "_spawn", spawn)


def intercept(monkeypatch: pytest.MonkeyPatch, name: str, before: Callable[[str], Any]) -> None:
    """Call `before` with the object's name ahead of every call of this method."""
    real = getattr(MemoryFileSystem, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(str(args[1 if name == "put_file" else 0]))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, name, call)


def content(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "a.bin").write_bytes(bytes([step % 256]) * 60)
        (folder / "state" / "b.json").write_text(json.dumps({"step": step}))

    return write


class Machine:
    """A run folder on a machine, and a session of the run."""

    def __init__(self, folder: Path, name: str = "run", url: str = URL):
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder / "checkpoints")
        self.warnings: list[str] = []
        warn = self.warnings.append
        self.mirror = Mirror(Remote(url), self.store, folder / "remote.json", name, warn, warn)

    def start(self, needed: Callable[..., set[int]] = lambda manifests: set()) -> Published | None:
        self.store.clean()
        found = self.mirror.newest(needed)
        self.mirror.begin()
        return found

    def save(self, step: int, keep_last: int = 2, keep: set[int] | None = None, **about: Any) -> None:
        """As a stage saves."""
        self.store.publish(step, content(step), about)
        self.mirror.wait()
        self.store.purge(keep_last, keep or set())
        self.mirror.start()

    def run(self, last: int) -> None:
        """From start to end."""
        found = self.start()
        for step in range(found.step + 1 if found else 1, last + 1):
            self.save(step)
        self.mirror.wait()


def objects() -> dict[str, bytes]:
    return {n.removeprefix(f"{ROOT}/"): f.getvalue() for n, f in MemoryFileSystem.store.items()}


def committed() -> list[int]:
    return Remote(URL).steps()


def flip(name: str, position: int, bit: int) -> None:
    data = bytearray(MemoryFileSystem.store[f"{ROOT}/{name}"].getvalue())
    data[position] ^= 1 << bit
    MemoryFileSystem().pipe_file(f"{ROOT}/{name}", bytes(data))


# -- what is there ----------------------------------------------------------------------------------------------------


def test_the_store_holds_what_the_folder_holds(tmp_path: Path) -> None:
    Machine(tmp_path).run(4)
    folder = tmp_path / "checkpoints"
    here = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    there = objects()
    assert json.loads(there.pop("OWNER.json"))["name"] == "run"
    assert there == here
    assert sorted({name.split("/")[0] for name in there}) == ["step-00000003", "step-00000004"]


def test_the_manifest_comes_last_and_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, str]] = []
    for name in CHANGES:
        intercept(monkeypatch, name, lambda path, name=name: log.append((name, path.removeprefix(f"{ROOT}/"))))
    machine = Machine(tmp_path)
    machine.start()
    machine.save(1, keep_last=1)
    machine.mirror.wait()
    of_one = [entry for entry in log if entry[1].startswith("step-00000001/")]
    assert of_one[-1] == ("pipe_file", f"step-00000001/{MANIFEST}")
    assert sorted(of_one[1:-1]) == [("put_file", "step-00000001/a.bin"), ("put_file", "step-00000001/state/b.json")]
    log.clear()
    machine.save(2, keep_last=1)
    machine.mirror.wait()
    gone = [path for name, path in log if name == "rm_file" and path.startswith("step-00000001")]
    assert gone[0] == f"step-00000001/{MANIFEST}" and len(gone) == 3


def test_what_is_kept_here_is_kept_there(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.start()
    for step in range(1, 6):
        machine.save(step, keep={2})
    machine.mirror.wait()
    assert committed() == [2, 4, 5]


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", [False, True], ids=["same machine", "another machine"])
def test_killed_between_any_two_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None, moves: bool
) -> None:
    """A kill before the k-th change of an object, for every k: another session goes on from a checkpoint that verifies,
    no older than the last committed one, and ends as if nothing had been."""
    left, acknowledged = [0], [0]

    def count(path: str, name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        if name == "pipe_file" and path.endswith(MANIFEST):
            acknowledged[0] = max(acknowledged[0], int(path.split("/")[-2].removeprefix("step-")))

    for name in CHANGES:
        intercept(monkeypatch, name, lambda path, name=name: count(path, name))

    def whole(k: int) -> bool:
        """Whether the run came to its end before change `k`."""
        MemoryFileSystem.store.clear()
        folder = tmp_path / f"run-{k}"
        left[0], acknowledged[0] = k, 0
        try:
            Machine(folder).run(4)
            done = True
        except Killed:
            done = False
        left[0] = 0
        if moves:
            shutil.rmtree(folder)
        reached = acknowledged[0]
        again = Machine(folder)
        found = again.start()
        assert (0 if found is None else found.step) >= reached, k
        if found is not None:
            assert verify(found.folder).manifest == found.manifest
        Machine(folder).run(5)
        assert committed() == [4, 5] and not again.warnings, k
        left_over = {name.split("/")[0] for name in objects()}
        assert left_over == {"OWNER.json", "step-00000004", "step-00000005"}, k
        for step in committed():
            fetched = tmp_path / f"fetched-{k}" / f"step-{step:08d}"
            fetched.mkdir(parents=True)
            Remote(URL).fetch(step, fetched)
            assert verify(fetched).step == step
        shutil.rmtree(folder)
        return done

    k = 1
    while not whole(k):
        k += 1
    assert k > 20  # owner; 3 objects for each of 4 checkpoints; 3 for each of 2 that went


def test_a_prefix_without_the_commit_is_ignored_and_cleaned(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(2)
    MemoryFileSystem().rm_file(f"{ROOT}/step-00000002/{MANIFEST}")
    shutil.rmtree(tmp_path / "a")
    machine = Machine(tmp_path / "a")
    found = machine.mirror.newest(lambda manifests: set())
    assert found is not None and found.step == 1 and not machine.warnings
    assert "step-00000002/a.bin" in objects()  # it is not certain yet that the run goes on
    machine.mirror.begin()
    machine.mirror.wait()
    assert not [name for name in objects() if name.startswith("step-00000002")]


def test_a_copy_that_was_interrupted_is_made_up_for_at_the_next_start(tmp_path: Path) -> None:
    Machine(tmp_path).run(2)
    MemoryFileSystem().rm_file(f"{ROOT}/step-00000002/{MANIFEST}")
    machine = Machine(tmp_path)
    found = machine.start()
    machine.mirror.wait()
    assert found is not None and found.step == 2 and committed() == [1, 2]


# -- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    """60 random bits over all objects of the newest checkpoint; each time the older one is taken, and it is said."""
    Machine(tmp_path / "a").run(2)
    names = sorted(name for name in objects() if name.startswith("step-00000002/"))
    rng = random.Random(0)
    for n in range(60):
        name = names[n % len(names)]
        position, bit = rng.randrange(len(objects()[name])), rng.randrange(8)
        flip(name, position, bit)
        machine = Machine(tmp_path / "b")
        found = machine.mirror.newest(lambda manifests: set())
        assert found is not None and found.step == 1, name
        assert len(machine.warnings) == 1 and f"{URL}/{name}" in machine.warnings[0], machine.warnings
        assert [p.name for p in machine.store.folder.iterdir()] == ["step-00000001"]
        flip(name, position, bit)
        shutil.rmtree(tmp_path / "b")
    assert Machine(tmp_path / "b").start().step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["a.bin", "state/b.json"])
def test_a_missing_object_is_refused_by_name(tmp_path: Path, name: str) -> None:
    Machine(tmp_path / "a").run(2)
    MemoryFileSystem().rm_file(f"{ROOT}/step-00000002/{name}")
    machine = Machine(tmp_path / "b")
    assert machine.start().step == 1  # type: ignore[union-attr]
    assert machine.warnings == [f"checkpoint is damaged and not used: {URL}/step-00000002/{name} is missing"]


def test_an_object_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(2)
    MemoryFileSystem().pipe_file(f"{ROOT}/step-00000002/a.bin", b"\2" * 59)
    machine = Machine(tmp_path / "b")
    assert machine.start().step == 1  # type: ignore[union-attr]
    assert machine.warnings[0].endswith("step-00000002/a.bin has 59 bytes, 60 were written")


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(2)
    for name, data in objects().items():
        if name.startswith("step-00000001"):
            MemoryFileSystem().pipe_file(f"{ROOT}/{name.replace('00000001', '00000009')}", data)
    machine = Machine(tmp_path / "b")
    assert machine.start().step == 2  # type: ignore[union-attr]
    assert machine.warnings[0].endswith("step-00000009/MANIFEST.json is that of step 1")


def test_a_damaged_one_there_is_replaced_when_the_run_comes_to_its_step(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(2)
    flip("step-00000002/a.bin", 3, 3)
    Machine(tmp_path / "b").run(2)
    machine = Machine(tmp_path / "c")
    assert machine.start().step == 2 and not machine.warnings  # type: ignore[union-attr]


def test_a_damaged_one_here_is_replaced_by_that_of_the_store(tmp_path: Path) -> None:
    Machine(tmp_path).run(2)
    path = tmp_path / "checkpoints" / "step-00000002" / "a.bin"
    path.write_bytes(b"\0" * 60)
    machine = Machine(tmp_path)
    found = machine.start()
    assert found is not None and found.step == 2 and path.read_bytes() == b"\2" * 60
    assert str(path) in machine.warnings[0]
    machine.save(3)  # what was found damaged goes at the next save: it is not that any more
    machine.mirror.wait()
    assert machine.store.steps() == committed() == [2, 3]


def test_nothing_that_verifies_is_an_error(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(1)
    flip("step-00000001/a.bin", 0, 0)
    with pytest.raises(RunError) as error:
        Machine(tmp_path / "b").start()
    assert error.value.code == "DAMAGED" and error.value.where == URL


def test_a_manifest_cannot_name_a_file_outside(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(1)
    from lensmith.checkpoint.store import _manifest_text, _seal

    manifest = json.loads(objects()[f"step-00000001/{MANIFEST}"])
    manifest["files"]["../../escaped"] = manifest["files"]["a.bin"]
    manifest["seal"] = _seal({k: v for k, v in manifest.items() if k != "seal"})
    MemoryFileSystem().pipe_file(f"{ROOT}/step-00000001/{MANIFEST}", _manifest_text(manifest))
    with pytest.raises(RunError, match="DAMAGED"):
        Machine(tmp_path / "b").start()
    assert not list(tmp_path.rglob("escaped"))


# -- another machine --------------------------------------------------------------------------------------------------


def test_the_newest_of_both_places_is_taken(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(2)
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    Machine(tmp_path / "a").run(5)
    assert Machine(tmp_path / "old").start().step == 5  # type: ignore[union-attr]
    (tmp_path / "none").mkdir()
    assert Machine(tmp_path / "none").start().step == 5  # type: ignore[union-attr]


def test_what_the_newest_needs_comes_with_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    machine.start()
    for step in range(1, 5):
        machine.save(step, keep={1}, borders=[1])
    machine.mirror.wait()
    moved = Machine(tmp_path / "b")
    seen: list[list[int]] = []

    def needed(manifests: dict[int, dict[str, Any]]) -> set[int]:
        seen.append(sorted(manifests))
        return set(manifests[max(manifests)]["borders"])

    assert moved.start(needed).step == 4  # type: ignore[union-attr]
    assert moved.store.steps() == [1, 4] and seen == [[1, 3, 4]]
    assert verify(moved.store.path(1)).step == 1


def test_going_back_deletes_the_later_ones_there_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.start()
    for step in (1, 2, 3):
        machine.save(step, keep_last=9)
    machine.mirror.forget_after(1)
    assert committed() == [1]
    machine.store.forget_after(1)
    machine.save(2, keep_last=9)
    machine.mirror.wait()
    assert committed() == [1, 2]


# -- whose it is ------------------------------------------------------------------------------------------------------


def test_another_run_is_refused(tmp_path: Path) -> None:
    Machine(tmp_path / "a").run(2)
    before = objects()
    for other in (Machine(tmp_path / "b", name="other"), Machine(tmp_path / "c")):
        if other.mirror.name == "run":  # one that has checkpoints of its own
            other.store.publish(1, content(9), {})
        with pytest.raises(RunError) as error:
            other.start()
        assert error.value.code == "OWNER" and "run 'run'" in error.value.message and "save.remote" in str(error.value)
    assert objects() == before


def test_of_two_sessions_the_later_one_has_it(tmp_path: Path) -> None:
    first = Machine(tmp_path / "a")
    first.start()
    first.save(1)
    first.mirror.wait()
    second = Machine(tmp_path / "b")
    assert second.start().step == 1  # type: ignore[union-attr]
    second.save(2)
    second.mirror.wait()
    before = objects()
    first.save(2)
    with pytest.raises(RunError) as error:
        first.mirror.wait()
    assert error.value.code == "SAVE" and "has taken it over" in error.value.message
    with pytest.raises(RunError, match="OWNER"):
        first.mirror.forget_after(0)
    assert objects() == before and first.store.steps() == [1, 2]


@pytest.mark.parametrize("cleaned", [True, False])
def test_a_session_that_is_overtaken_in_a_copy_does_not_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleaned: bool
) -> None:
    """Whether the other one has already removed what it found without a manifest, or is about to."""
    first, second = Machine(tmp_path / "a"), Machine(tmp_path / "b")
    first.start()
    taken = []

    def overtake(path: str) -> None:
        if path.endswith("b.json") and not taken:
            taken.append(path)
            if cleaned:
                second.start()
            else:
                owner = json.loads(objects()["OWNER.json"]) | {"session": "another"}
                MemoryFileSystem().pipe_file(f"{ROOT}/OWNER.json", json.dumps(owner).encode())

    intercept(monkeypatch, "put_file", overtake)
    first.save(1)
    with pytest.raises(RunError, match="has taken it over"):
        first.mirror.wait()
    assert taken and committed() == []


def test_a_run_folder_deleted_under_the_run_stays_that_runs(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    machine.start()
    machine.save(1)
    machine.mirror.wait()
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    machine.save(2)
    machine.mirror.wait()
    assert committed() == [2] and Machine(tmp_path / "a").start().step == 2  # type: ignore[union-attr]


def test_a_checkpoint_that_goes_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path / "a")
    machine.start()
    intercept(monkeypatch, "put_file", lambda path: shutil.rmtree(tmp_path / "a", ignore_errors=True))
    machine.save(1)
    with pytest.raises(RunError, match="SAVE"):
        machine.mirror.wait()
    assert committed() == []


def test_a_damaged_one_is_not_passed_over_unless_allowed(tmp_path: Path) -> None:
    """`save.fall_back: false`: the run stops, but for a whole copy of the same step in the other place."""

    class Stop(Exception):
        pass

    def stop(text: str) -> None:
        raise Stop(text)

    def strict(name: str) -> Published | None:
        machine = Machine(tmp_path / name)
        machine.mirror.damaged = stop
        return machine.mirror.newest(lambda manifests: set())

    Machine(tmp_path / "a").run(2)
    here, there = tmp_path / "a" / "checkpoints" / "step-00000002" / "a.bin", "step-00000002/a.bin"
    here.write_bytes(b"\0" * 60)
    assert strict("a").step == 2 and here.read_bytes() == b"\2" * 60  # type: ignore[union-attr]
    flip(there, 0, 0)
    assert strict("a").step == 2  # type: ignore[union-attr]
    with pytest.raises(Stop, match=there):
        strict("b")
    MemoryFileSystem().rm_file(f"{ROOT}/step-00000002/{MANIFEST}")
    here.write_bytes(b"\0" * 60)
    with pytest.raises(Stop, match=str(here)):
        strict("a")


def test_a_damaged_owner_is_not_taken_for_none(tmp_path: Path) -> None:
    Machine(tmp_path).run(1)
    MemoryFileSystem().pipe_file(f"{ROOT}/OWNER.json", b"{}")
    with pytest.raises(RunError, match=r"OWNER\.json is damaged"):
        Machine(tmp_path).start()


# -- a store that fails -----------------------------------------------------------------------------------------------


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException, *names: str) -> list[bool]:
    """Every call of these methods raises `error`, as long as the list's first element is true."""
    on = [True]

    def refuse(path: str) -> None:
        if on[0]:
            raise error

    for name in names:
        intercept(monkeypatch, name, refuse)
    return on


ALL = ("find", "cat_file", "put_file", "pipe_file", "rm_file", "info")


def test_unavailable_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear error, unless there is a checkpoint here; then the run goes on, and copies when the store is back."""
    Machine(tmp_path / "a").run(2)
    down = fail(monkeypatch, ConnectionResetError(104, "connection reset"), *ALL)
    with pytest.raises(Unreachable) as error:
        Machine(tmp_path / "b").start()
    assert "asked 7 times" in error.value.message and error.value.where == URL and error.value.remedy
    machine = Machine(tmp_path / "a")
    assert machine.start().step == 2  # type: ignore[union-attr]
    assert len(machine.warnings) == 2 and "going on from checkpoint 2" in machine.warnings[0]
    machine.save(3)
    with pytest.raises(RunError) as error:
        machine.mirror.wait()
    assert error.value.code == "SAVE" and "connection reset" in error.value.message
    assert machine.store.steps() == [2, 3]
    down[0] = False
    machine.save(4)
    machine.mirror.wait()
    assert committed() == [3, 4]


def test_a_store_that_takes_nothing_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first step, where there is nothing here to go on from."""
    fail(monkeypatch, OSError(16, "SlowDown"), "pipe_file")
    with pytest.raises(Unreachable, match=r"OWNER\.json was not written"):
        Machine(tmp_path).start()


def test_a_store_that_was_away_and_has_more_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(tmp_path / "a").run(2)
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    Machine(tmp_path / "a").run(4)
    down = fail(monkeypatch, TimeoutError("no answer"), *ALL)
    machine = Machine(tmp_path / "old")
    assert machine.start().step == 2  # type: ignore[union-attr]
    down[0] = False
    before = objects()
    machine.save(3)
    with pytest.raises(RunError, match="has a later checkpoint, 4"):
        machine.mirror.wait()
    assert objects() == before


@pytest.mark.parametrize("error", [PermissionError(13, "Access Denied"), FileNotFoundError("NoSuchBucket")])
def test_a_store_that_refuses_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    machine = Machine(tmp_path)
    machine.start()
    asked: list[str] = []
    fail(monkeypatch, error, "put_file")
    intercept(monkeypatch, "put_file", asked.append)
    machine.save(1)
    with pytest.raises(RunError) as found:
        machine.mirror.wait()
    assert found.value.code == "SAVE" and str(error.args[-1]) in found.value.message
    assert "is in" in found.value.message and "run the same command again" in found.value.remedy
    assert len(asked) == 1 and machine.store.steps() == [1] and committed() == []


def test_an_error_of_a_copy_fails_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of that save is here before it fails."""
    machine = Machine(tmp_path)
    machine.start()
    fail(monkeypatch, PermissionError(13, "Access Denied"), "put_file")
    machine.save(1)
    with pytest.raises(RunError, match="SAVE"):
        machine.save(2)
    assert machine.store.steps() == [1, 2]
    machine.mirror.close()
    assert machine.warnings == []


def test_a_passing_failure_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth call fails, whatever it is."""
    calls = [0]

    def sometimes(path: str) -> None:
        calls[0] += 1
        if calls[0] % 5 == 0:
            raise OSError(16, "SlowDown")

    for name in ALL:
        intercept(monkeypatch, name, sometimes)
    Machine(tmp_path).run(4)
    assert calls[0] > 60 and committed() == [3, 4]


def test_the_pauses_are_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PAUSES_SECONDS", (1.0, 2.0, 4.0))
    slept: list[float] = []
    monkeypatch.setattr(remote_module.time, "sleep", slept.append)
    fail(monkeypatch, OSError(16, "SlowDown"), "find")
    state = random.getstate()
    with pytest.raises(Unreachable, match="asked 4 times"):
        Remote(URL).steps()
    assert len(slept) == 3 and all(0.5 <= s / p <= 1.5 for s, p in zip(slept, (1, 2, 4), strict=True))
    assert random.getstate() == state  # the run's own


def test_bytes_that_did_not_arrive_are_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, cut = MemoryFileSystem.put_file, []

    def put(self: Any, source: str, target: str, **kwargs: Any) -> None:
        real(self, source, target, **kwargs)
        if target.endswith("a.bin") and len(cut) < 2:
            cut.append(target)
            self.pipe_file(target, Path(source).read_bytes()[:30])

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    Machine(tmp_path).run(1)
    assert len(cut) == 2 and objects()["step-00000001/a.bin"] == b"\1" * 60


@pytest.mark.parametrize("say", ["md5Hash", "content_settings"])
def test_other_bytes_than_were_sent_are_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: str) -> None:
    """Where the store says the MD5, as Google's and Microsoft's do."""
    real, info, spoiled = MemoryFileSystem.put_file, MemoryFileSystem.info, []

    def put(self: Any, source: str, target: str, **kwargs: Any) -> None:
        real(self, source, target, **kwargs)
        if target.endswith("a.bin") and not spoiled:
            spoiled.append(target)
            self.pipe_file(target, b"\xff" * 60)

    def with_md5(self: Any, path: str, **kwargs: Any) -> dict[str, Any]:
        digest = hashlib.md5(self.cat_file(path)).digest()
        said = (
            {say: base64.b64encode(digest).decode()} if say == "md5Hash" else {say: {"content_md5": bytearray(digest)}}
        )
        return info(self, path, **kwargs) | said

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    monkeypatch.setattr(MemoryFileSystem, "info", with_md5)
    Machine(tmp_path).run(1)
    assert spoiled and objects()["step-00000001/a.bin"] == b"\1" * 60


def test_a_commit_needs_every_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    published = store.publish(1, content(1), {})
    remote = Remote(URL)
    remote.put(1, published.folder, ["a.bin"])
    with pytest.raises(RunError, match=r"state/b\.json is not there"):
        remote.commit(1, published.folder)
    remote.put(1, published.folder, ["state/b.json"])
    MemoryFileSystem().pipe_file(f"{ROOT}/step-00000001/a.bin", b"short")
    with pytest.raises(RunError, match=r"a\.bin has 5 bytes there, not 60"):
        remote.commit(1, published.folder)
    assert remote.steps() == []


def test_a_slow_store_is_waited_for_by_the_next_save_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path)
    machine.start()
    gate, at_work, most = threading.Event(), [0], [0]
    real = MemoryFileSystem.put_file

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        gate.wait(10)
        real(self, *args, **kwargs)
        at_work[0] -= 1

    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    begin = time.monotonic()
    machine.save(1, keep_last=1)
    assert time.monotonic() - begin < 5 and committed() == []
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    machine.save(2, keep_last=1)  # waits, or the folder of step 1 would go while it is read
    assert gate.is_set()
    machine.mirror.wait()
    timer.join()
    assert committed() == [2] and most == [1]


def test_waiting_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(mirror_module, "BEAT_SECONDS", 0.01)
    beats: list[str] = []
    machine = Machine(tmp_path)
    machine.mirror.ranks = replace(machine.mirror.ranks, beat=beats.append)
    machine.start()
    intercept(monkeypatch, "put_file", lambda path: time.sleep(0.1))
    machine.save(1)
    machine.mirror.wait()
    assert len(beats) > 3


def test_a_folder_stands_for_a_store(tmp_path: Path) -> None:
    """`file://`, with folders of its own; nothing is left of what is deleted."""
    url = f"file://{tmp_path}/elsewhere/prefix"
    Machine(tmp_path / "a", url=url).run(4)
    there = tmp_path / "elsewhere" / "prefix"
    assert sorted(p.name for p in there.iterdir()) == ["OWNER.json", "step-00000003", "step-00000004"]
    assert Machine(tmp_path / "b", url=url).start().step == 4  # type: ignore[union-attr]


def test_a_scheme_whose_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RunError) as error:
        Remote("s3://key:secret@bucket/run")
    assert "lensmith[s3]" in error.value.remedy and "secret" not in str(error.value)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.make_model(folder / "base"), tiny.make_chat(folder, 12)


def train(folder: Path, inputs: tuple[Path, Path], steps: int, /, **over: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tune": {"kind": "lora", "rank": 2, "dropout": 0.1}, "train": {"max_steps": steps}, "batch": {"samples": 4},
        "save": {"every_steps": 1, "keep_last": 1, "remote": URL},
    }  # fmt: skip
    run = runs.located(folder, *inputs, **runs.merge(values, over))
    return runs.quiet_train(run).summary


def weights(folder: Path) -> bytes:
    newest = max((folder / "checkpoints").glob("step-*"))
    return (newest / "state" / "training.safetensors").read_bytes()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder: folder)


def test_a_run_goes_on_on_another_machine(tmp_path: Path, inputs: tuple[Path, Path], no_report: None) -> None:
    whole = train(tmp_path / "whole", inputs, 5, save={"remote": None})
    train(tmp_path / "a", inputs, 3)
    assert committed() == [3]
    shutil.rmtree(tmp_path / "a")
    moved = train(tmp_path / "b", inputs, 5)
    assert moved["losses"] == whole["losses"][3:]
    assert weights(tmp_path / "b") == weights(tmp_path / "whole")
    assert committed() == [5]


def test_a_run_killed_in_its_copies_goes_on_on_another_machine(
    tmp_path: Path, inputs: tuple[Path, Path], no_report: None, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", inputs, 4, save={"remote": None})
    left = [0]

    def count(path: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    for name in CHANGES:
        intercept(monkeypatch, name, count)
    for k in (1, 7, 20, 24, 40):
        MemoryFileSystem.store.clear()
        left[0] = k
        with pytest.raises(Killed):
            train(tmp_path / f"a{k}", inputs, 4)
        train(tmp_path / f"b{k}", inputs, 4)
        assert weights(tmp_path / f"b{k}") == weights(tmp_path / "whole"), k
        assert committed() == [4]


def test_the_best_comes_along(tmp_path: Path, inputs: tuple[Path, Path], no_report: None) -> None:
    held = {
        "data": {"eval": str(inputs[1])}, "evaluate": {"every_steps": 1}, "save": {"keep_best": "loss"},
        "optimizer": {"kind": "adamw", "lr": 0.5},
    }  # fmt: skip
    train(tmp_path / "a", inputs, 4, **held)
    best = min(committed())
    assert committed() == [best, 4] and best < 4
    train(tmp_path / "b", inputs, 5, **held)
    assert Store(tmp_path / "b" / "checkpoints").steps() == committed() == [best, 5]


def test_a_curriculum_goes_on_on_another_machine(tmp_path: Path, inputs: tuple[Path, Path], no_report: None) -> None:
    """The checkpoints of the borders come along; what was merged at a border is merged again."""
    lora = {"kind": "lora", "rank": 2}

    def stages(last: int) -> list[dict[str, Any]]:
        return [
            {"name": "one", "train": {"max_steps": 2}},
            {"name": "two", "tune": lora | {"rank": 4}, "train": {"max_steps": 2}},
            {"name": "three", "tune": {"kind": "full"}, "train": {"max_steps": last}},
        ]

    train(tmp_path / "whole", inputs, 1, stages=stages(2), save={"remote": None})
    train(tmp_path / "a", inputs, 1, stages=stages(1))
    assert committed() == [2, 4, 5]
    shutil.rmtree(tmp_path / "a")
    train(tmp_path / "b", inputs, 1, stages=stages(2))
    assert weights(tmp_path / "b") == weights(tmp_path / "whole")


def test_a_store_that_refuses_ends_the_run(
    tmp_path: Path, inputs: tuple[Path, Path], no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, PermissionError(13, "Access Denied"), "put_file")
    with pytest.raises(RunError, match="Access Denied") as error:
        train(tmp_path / "a", inputs, 3)
    assert error.value.code == "SAVE" and error.value.exit_code == 74
    steps = Store(tmp_path / "a" / "checkpoints").steps()
    assert steps == [1, 2]  # the copy of the first failed: so does the second save, when it is here


def test_a_store_that_refuses_the_last_copy_ends_the_run(
    tmp_path: Path, inputs: tuple[Path, Path], no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = fail(monkeypatch, PermissionError(13, "Access Denied"), "put_file")
    with pytest.raises(RunError, match="SAVE"):
        train(tmp_path / "a", inputs, 1)
    assert (tmp_path / "a" / "summary.json").is_file()
    down[0] = False
    train(tmp_path / "a", inputs, 1)  # nothing is left to train: the copy is made up for
    assert committed() == [1]


def test_a_folder_is_not_deleted_while_it_is_copied(
    tmp_path: Path, inputs: tuple[Path, Path], no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    intercept(monkeypatch, "put_file", lambda path: time.sleep(0.05))
    train(tmp_path / "a", inputs, 3)
    assert committed() == [3]


def test_going_back_is_done_in_the_store_first(
    tmp_path: Path, inputs: tuple[Path, Path], no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill behind it must not leave a checkpoint there that the run went back from."""
    seen: list[list[int]] = []
    finish, forget_after = session.Session._finish, Store.forget_after

    def go_back(self: session.Session) -> None:
        self.done[-1].rescue.roll_back(2)
        assert self.store.steps() == [1, 2]
        finish(self)

    def logged(self: Store, step: int) -> None:
        seen.append(committed())
        forget_after(self, step)

    monkeypatch.setattr(session.Session, "_finish", go_back)
    monkeypatch.setattr(Store, "forget_after", logged)
    train(tmp_path / "a", inputs, 4, save={"keep_last": 9})
    assert seen == [[1, 2]]


def test_a_dry_run_leaves_the_store_alone(tmp_path: Path, inputs: tuple[Path, Path], no_report: None) -> None:
    values: dict[str, Any] = {"tune": {"kind": "lora", "rank": 2}, "save": {"remote": URL}}
    runs.quiet_train(runs.located(tmp_path / "a", *inputs, **values), dry_run=True)
    assert objects() == {}


def test_what_another_run_left_is_not_taken_up(tmp_path: Path, inputs: tuple[Path, Path], no_report: None) -> None:
    """Of the same name, but of other options: refused before anything changes there."""
    train(tmp_path / "a", inputs, 2)
    before = objects()
    with pytest.raises(RunError, match=r"RESUME.*train\.seed|train\.seed"):
        train(tmp_path / "b", inputs, 3, train={"seed": 5})
    assert objects() == before


def test_export_and_inspect_by_url(tmp_path: Path, inputs: tuple[Path, Path], no_report: None) -> None:
    train(tmp_path / "a", inputs, 2, save={"keep_last": 2})
    quiet: dict[str, Any] = {"base": None, "merge": True, "dtype": None, "shard_gb": 5.0, "terminal": Terminal("quiet")}
    here = tmp_path / "a" / "checkpoints" / "step-00000001"
    one = export(here, tmp_path / "one", **quiet)
    there = export(f"{URL}/step-00000001", tmp_path / "there", **quiet)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in there.iterdir()}
    newest = export(f"{URL}/", tmp_path / "newest", **quiet | {"merge": False})
    adapter = "adapter_model.safetensors"
    assert (newest / adapter).read_bytes() == objects()[f"step-00000002/model/{adapter}"]
    look: dict[str, Any] = {"values": False, "dtype": None, "terminal": Terminal("quiet")}
    assert inspect_folder(f"{URL}/step-00000002", repair=False, **look) == inspect_folder(here, repair=False, **look)
    with pytest.raises(ConfigError, match="cannot be repaired"):
        inspect_folder(f"{URL}/step-00000002", repair=True, **look)
    flip(f"step-00000002/model/{adapter}", 100, 1)
    with pytest.raises(ModelError, match="no checkpoint there that verifies"):
        export(f"{URL}/step-00000002", tmp_path / "none", **quiet)
    fallen = export(URL, tmp_path / "fallen", **quiet)
    assert (fallen / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


@pytest.mark.parametrize("url", ["bucket/run", "s3://bucket", "s3://bucket/", "/folder", "s3:bucket/run"])
def test_a_url_that_is_none(tmp_path: Path, inputs: tuple[Path, Path], url: str) -> None:
    with pytest.raises(ConfigError, match=r"save\.remote"):
        runs.located(tmp_path, *inputs, save={"remote": url})


def test_stages_share_one_store(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    stages = [{"name": "one"}, {"name": "two", "save": {"remote": f"{URL}2"}}]
    with pytest.raises(ConfigError, match=r"save\.remote is not the same"):
        train(tmp_path / "a", inputs, 1, stages=stages)


# -- several ranks ----------------------------------------------------------------------------------------------------


def two_ranks(folder: Path, case: str) -> list[list[dict[str, Any]]]:
    """What each of two processes said of each of two sessions (`remote_driver.py`)."""
    (folder / "run").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    driver = str(Path(__file__).with_name("remote_driver.py"))
    command = [sys.executable, driver, str(folder / "run"), f"file://{folder}/there"]
    ranks = [subprocess.Popen([*command, str(r), port, case], stdout=subprocess.PIPE, text=True) for r in range(2)]
    said = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    return [[json.loads(line) for line in lines] for lines in said]


def test_each_rank_copies_its_share(tmp_path: Path) -> None:
    """And another machine goes on, with as many ranks."""
    for rank, (first, again) in enumerate(two_ranks(tmp_path, "")):
        assert (first["error"], first["found"], again["error"], again["found"]) == (None, None, None, 2)
        assert first["put"] == [f"step-0000000{step}/{1 - rank}.bin" for step in (1, 2)]  # the largest is the first's
        assert again["put"] == [f"step-0000000{step}/{1 - rank}.bin" for step in (3, 4)]
    assert Remote(f"file://{tmp_path}/there").steps() == [4]
    assert verify(tmp_path / "there" / "step-00000004").step == 4


def test_a_rank_that_cannot_copy_ends_all(tmp_path: Path) -> None:
    ended = two_ranks(tmp_path, "refused")
    assert [first["error"] for first, _ in ended] == ["OTHER_RANK", "SAVE"]
    assert Remote(f"file://{tmp_path}/there").steps() == []
