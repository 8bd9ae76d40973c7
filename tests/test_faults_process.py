"""Faults of processes: killed, signalled, crashed, out of memory or files. Every run resumes by the same command to the
same end as an undisturbed one."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_kit as kit
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from lensmith.checkpoint import store as store_module
from lensmith.checkpoint.store import Store
from lensmith.core.errors import RunError
from lensmith.data import collate
from lensmith.data import pipeline as pipeline_module
from lensmith.data import workers as workers_module
from lensmith.data.pipeline import Pipeline
from lensmith.engine.optimizer import MasterAdamW
from lensmith.model.root import Root
from lensmith.recipe import export as export_module
from lensmith.recipe import stage
from lensmith.recipe.held_out import HeldOut
from lensmith.recipe.prepare import prepare
from lensmith.report.terminal import Terminal


@pytest.fixture(autouse=True)
def _as_the_bench(bench: kit.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.settle(monkeypatch)


# -- killed -----------------------------------------------------------------------------------------------------------


def kills(bench: kit.Bench, folder: Path, seeds: range) -> Counter[str]:
    """For each seed a run that is killed at a random time, and goes on; what it had reached, and how often. The time is
    counted from the start or from a step, so that on a busy machine too all of the run is hit."""
    reached: Counter[str] = Counter()
    for seed in seeds:
        rng, run, workers = random.Random(seed), folder / str(seed) / "run", {"data": {"workers": seed % 2}}
        pid, said = kit.start(bench.run(run, **workers))
        behind = rng.randrange(kit.STEPS + 1)
        kit.wait_for_step(pid, run, behind)
        time.sleep(rng.uniform(0, 0.1 if behind else bench.seconds / 2))
        os.kill(pid, signal.SIGKILL)
        found = kit.ended(pid, said)
        assert found.code in (-signal.SIGKILL, 0), found.said
        steps = kit.steps_of(run)
        reached["too late" if found.code == 0 else f"behind checkpoint {steps[-1]}" if steps else "no checkpoint"] += 1
        bench.goes_on(run, **workers)
        shutil.rmtree(folder / str(seed))
    return reached


@pytest.mark.faults("F01", "kill -9 at a random time, without and with a data worker")
def test_kills_at_random_times(bench: kit.Bench, tmp_path: Path, record_property: Any) -> None:
    reached = kills(bench, tmp_path, range(6))
    record_property("figure", f"sample: {reached.total()} kills, {reached.total()} ended the same")


@pytest.mark.slow
@pytest.mark.faults("F01", "200 times kill -9 at a seeded random time")
def test_200_kills_at_random_times(bench: kit.Bench, tmp_path: Path, record_property: Any) -> None:
    reached = kills(bench, tmp_path, range(100, 300))
    assert len(reached) >= 3, reached  # before the first checkpoint, and behind several
    shown = ", ".join(f"{n} {where}" for where, n in sorted(reached.items()))
    record_property("figure", f"{reached.total()} of {reached.total()} ended the same ({shown})")


def content(folder: Path) -> None:
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 99)


def dies(work: Callable[[], Any]) -> None:
    """`work` in a process that must be killed by what was planted."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(98)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failpoints() -> dict[str, Callable[[], None]]:
    def before(name: str, module: Any = store_module) -> Callable[[], None]:
        return lambda: setattr(module, name, die)

    def behind(name: str, module: Any) -> Callable[[], None]:
        real = getattr(module, name)
        return lambda: setattr(module, name, lambda *a, **k: (real(*a, **k), die()))

    return {
        "between files": lambda: setattr(store_module, "_sha256", die),
        "before the manifest": before("_write_synced"),
        "behind the manifest": behind("_write_synced", store_module),
        "before the folder is synced": before("sync_folder"),
        "before the rename": before("rename", os),
        "behind the rename": behind("rename", os),
    }


@pytest.mark.faults("F04", "kill between files, manifest, rename and the parent's sync")
@pytest.mark.parametrize("where", failpoints())
def test_killed_between_the_parts_of_a_save(tmp_path: Path, where: str) -> None:
    store = Store(tmp_path)
    store.publish(1, content, {})

    def save() -> None:
        failpoints()[where]()
        store.publish(2, content, {})

    dies(save)
    done = where == "behind the rename"
    assert store.steps() == ([1, 2] if done else [1])
    assert done or any(p.name.startswith(".staging") for p in tmp_path.iterdir())
    store.clean()
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert store.newest(pytest.fail).step == (2 if done else 1)  # type: ignore[union-attr]


@pytest.mark.faults("F06", "kill while old checkpoints are deleted, file by file")
def test_killed_in_a_purge(tmp_path: Path) -> None:
    for files in range(4):
        store = Store(tmp_path / str(files))
        for step in (1, 2, 3):
            store.publish(step, content, {})

        def purge(files: int = files, store: Store = store) -> None:
            unlink, left = os.unlink, [files]

            def count(*args: Any, **kwargs: Any) -> None:
                left[0] -= 1
                if left[0] < 0:
                    die()
                unlink(*args, **kwargs)

            os.unlink = count
            store.purge(1, set())

        dies(purge)
        assert store.steps() == [2, 3]  # the first is out of sight, however much of it is left
        assert len([p for p in store.folder.iterdir() if p.name.startswith(".trash")]) == 1
        store.clean()
        assert sorted(p.name for p in store.folder.iterdir()) == ["step-00000002", "step-00000003"]


def checkpoints(folder: Path) -> dict[str, bytes]:
    found = sorted((folder / "checkpoints").rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.is_file()}


@pytest.mark.faults("F07", "kill in a resume: before and behind weights, optimizer, random state")
def test_killed_in_a_resume(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert kit.train(bench.run(folder), kit.at_save(6, die)).code == -signal.SIGKILL
    before = checkpoints(folder)
    assert kit.steps_of(folder) == [2, 4]

    def behind_weights() -> None:
        stage.read_state = die  # type: ignore[assignment]

    def behind_state() -> None:
        stage.check_borders, stage.StageRun._num_steps = (lambda *a: None), die  # type: ignore[assignment]

    def behind_all() -> None:
        stage.StageRun.train = die  # type: ignore[method-assign]

    for plant in (behind_weights, behind_state, behind_all):
        assert kit.train(bench.run(folder), plant).code == -signal.SIGKILL
        assert checkpoints(folder) == before
    bench.goes_on(folder)


@pytest.mark.faults("F08", "kill in an export that merges an adapter, at five places")
def test_killed_in_an_export(bench: kit.Bench, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    assert kit.train(bench.run(folder)).code == 0

    def export() -> None:
        export_module.export(folder, out, base=None, merge=True, dtype=None, shard_gb=5.0, terminal=Terminal("quiet"))

    real, rename = export_module.write_model, Path.rename

    def half(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        files = sorted(args[0].iterdir())
        os.truncate(files[-1], 1)
        die()

    plants: list[tuple[Any, str, Any]] = [
        (export_module, "load_model", die),
        (export_module, "write_model", half),
        (export_module, "carry", die),
        (export_module, "sync_folder", die),
        (Path, "rename", lambda *args: (rename(*args), die())),
    ]
    for n, (module, name, fault) in enumerate(plants):

        def planted(module: Any = module, name: str = name, fault: Any = fault) -> None:
            setattr(module, name, fault)
            export()

        dies(planted)
        assert out.exists() == (n == len(plants) - 1)
    left = {p.name for p in out.iterdir()}
    out.rename(tmp_path / "first")
    export()
    assert {p.name for p in out.iterdir()} == left and "model.safetensors" in left
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


# -- signalled --------------------------------------------------------------------------------------------------------


def nth(owner: Any, name: str, number: int, fault: Callable[[], None]) -> Callable[[], None]:
    """Plants `fault` into the call of a function that has this number, from 1."""

    def plant() -> None:
        real, calls = getattr(owner, name), [0]

        def called(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                fault()
            return real(*args, **kwargs)

        setattr(owner, name, called)

    return plant


def in_backward() -> None:
    real = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if len(seen) == 2:
            self.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))
        seen.append(1)
        real(self, *args, **kwargs)

    seen: list[int] = []
    torch.Tensor.backward = backward  # type: ignore[method-assign]


TERM = kit.signal_self(signal.SIGTERM)
PLACES: dict[str, Callable[[], None]] = {
    "forward": nth(Root, "forward", 3, TERM),
    "backward": in_backward,
    "optimizer": nth(MasterAdamW, "step", 3, TERM),
    "evaluation": nth(HeldOut, "measure", 2, TERM),
    "wait for data": nth(Pipeline, "_finish", 3, TERM),
    "save": kit.at_save(2, TERM),
}


@pytest.mark.faults("F09", "SIGTERM in forward, backward, optimizer, evaluation, the wait for data, a save")
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere(bench: kit.Bench, tmp_path: Path, place: str) -> None:
    """Every row of `bench` is a step of its own, so the third call is of step 3."""
    folder = tmp_path / "run"
    over: dict[str, Any] = {"save": {"every_steps": None}} if place != "save" else {}
    if place == "evaluation":
        over |= {"data": {"holdout": 0.2}, "evaluate": {"loss": True, "every_steps": 3}}
    found = kit.train(bench.run(folder, **over), PLACES[place])
    assert found.code == 143, found.said
    (step,) = kit.steps_of(folder)
    assert f"after step {step}; the run is saved" in found.said
    assert step == len(kit.records(folder)) < kit.STEPS
    assert place != "save" or step == 2
    if place == "evaluation":  # another split: compared with an undisturbed run of its own
        assert kit.train(bench.run(tmp_path / "whole/run", **over)).code == 0
        assert kit.train(bench.run(folder, **over)).code == 0
        assert kit.end_of(folder) == kit.end_of(tmp_path / "whole/run")
    else:
        bench.goes_on(folder, **over)


@pytest.mark.faults("F12", "Ctrl-C: SIGINT to the whole group, with data workers")
def test_ctrl_c_reaches_the_workers_too(bench: kit.Bench, tmp_path: Path) -> None:
    def interrupt() -> None:
        os.killpg(0, signal.SIGINT)

    folder = tmp_path / "run"
    found = kit.train(bench.run(folder, data={"workers": 2}), kit.at_step(3, interrupt))
    assert found.code == 130, found.said
    assert kit.steps_of(folder)[-1] == 3 and "Traceback" not in found.said
    bench.goes_on(folder, data={"workers": 2})


@pytest.mark.faults("F14", "each sync of a file takes 50 ms, and save.grace_seconds is 0.1")
def test_a_save_longer_than_the_grace_time_is_said_before_it_matters(bench: kit.Bench, tmp_path: Path) -> None:
    def slow_disk() -> None:
        sync = os.fsync
        os.fsync = lambda fd: (time.sleep(0.05), sync(fd))[1]

    folder = tmp_path / "run"
    found = kit.train(bench.run(folder, save={"grace_seconds": 0.1}), slow_disk)
    assert found.code == 0 and found.said.count("save.grace_seconds = 0.1") == 1
    assert "a stop by signal takes" in found.said
    (tmp_path / "quick").mkdir()
    found = kit.train(bench.run(tmp_path / "quick/run", save={"grace_seconds": 60}), slow_disk)
    assert "grace_seconds" not in found.said


# -- crashed, out of something ----------------------------------------------------------------------------------------


@pytest.mark.faults("F21", "a segmentation fault in native code")
def test_a_segmentation_fault_leaves_a_trace(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = kit.train(bench.run(folder), kit.at_step(3, lambda: ctypes.string_at(0)))
    assert found.code == -signal.SIGSEGV
    assert "Segmentation fault" in found.said and "stage.py" in found.said
    assert kit.steps_of(folder) == [2]
    assert "was killed or crashed" in bench.goes_on(folder).said


@pytest.mark.faults("F25", "killed from outside when it holds 256 MiB more")
def test_killed_for_its_memory(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hoard: list[bytes] = []

    def grow() -> None:
        hoard.append(b"x" * (256 << 20))
        time.sleep(30)

    pid, said = kit.start(bench.run(folder), kit.at_step(5, grow))
    first = most = 0
    while most < first + (200 << 20):
        most = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        first = first or most
        if (folder / "metrics.jsonl").exists() and len(kit.records(folder)) < 4:
            first = most
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert kit.ended(pid, said).code == -signal.SIGKILL
    found = bench.goes_on(folder)
    assert f"process {pid}" in found.said and "Out of memory?" in found.said
    assert "in step 5 it held" in found.said


def no_more_files() -> None:
    """The next file that is opened is one too many."""
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@pytest.mark.faults("F26", "no file can be opened any more, at a save and when pictures are read")
@pytest.mark.parametrize("workers", [0, 1])
def test_out_of_file_descriptors(bench: kit.Bench, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "save/run"
    found = kit.train(bench.run(folder, data={"workers": workers}), kit.at_save(4, no_more_files))
    assert found.code == 74 and "Too many open files" in found.said and "[SAVE]" in found.said, found.said
    assert kit.steps_of(folder) == [2]
    bench.goes_on(folder)

    over: dict[str, Any] = {"data": {"workers": workers}, "vision_cache": {"enabled": False}}
    folder = tmp_path / "read/run"
    plant = nth(pipeline_module, "load_row", 6, no_more_files)
    found = kit.train(bench.run(folder, **over), plant)
    assert found.code == 74 and "Too many open files" in found.said, found.said
    assert "IMG_READ" not in found.said
    assert kit.train(bench.run(folder, **over)).code == 0
    assert kit.records(folder, "event") and all(r["name"] != "dropped" for r in kit.records(folder, "event"))


@pytest.mark.faults("F27", "/dev/shm of 64 KiB, full")
def test_no_room_in_shared_memory(bench: kit.Bench, tmp_path: Path) -> None:
    def work() -> Any:
        shared = Path("/dev/shm")
        kit.mount_tmpfs(shared, "size=64k")
        (shared / "full").write_bytes(b"x" * (64 << 10))
        found = kit.train(bench.run(tmp_path / "run", data={"workers": 2}))
        (shared / "full").unlink()
        again = kit.train(bench.run(tmp_path / "run", data={"workers": 2}))
        return [found.code, found.said, again.code]

    code, said, again = kit.in_own_mounts(work)
    assert code == 74 and "[WORKERS] /dev/shm" in said and "data.workers: 0" in said
    assert again == 0 and kit.end_of(tmp_path / "run") == bench.whole  # 64 KiB are enough: rows travel through pipes


# -- data workers -----------------------------------------------------------------------------------------------------


@pytest.mark.faults("F22", "a data worker is killed while it reads")
def test_a_killed_worker_costs_nothing(bench: kit.Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = kit.train(bench.run(folder, data={"workers": 2}), nth(pipeline_module, "load_row", 3, die))
    assert found.code == 74 and "[DATA_WORKER]" in found.said and "in flight: " in found.said
    bench.goes_on(folder, data={"workers": 2})


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 samples with a picture each."""
    folder = tmp_path_factory.mktemp("own")
    path = tiny.make_chat(folder, 1, pictures=12)
    turns = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a circle"}]
    rows = [json.dumps({"messages": turns, "images": [f"images/{k}.png"]}) + "\n" for k in range(12)]
    path.write_text("".join(rows))
    return path


def asleep() -> None:
    """In C, with the interpreter's lock held, as a decoder hangs."""
    ctypes.PyDLL(None).sleep(600)


def raise_drop(number: int, reason: str) -> Callable[[Any], None]:
    def fault(member: Any) -> None:
        if member.number == number:
            raise collate.Drop(reason)

    return fault


def on_member(fault: Callable[[Any], None]) -> Callable[[], None]:
    """Before a sample is read."""

    def plant() -> None:
        real = collate._encode

        def encode(loader: Any, member: Any) -> Any:
            fault(member)
            return real(loader, member)

        collate._encode = encode  # type: ignore[assignment]

    return plant


OVER: dict[str, Any] = {
    "data": {"workers": 2, "max_dropped": 0.5}, "train": {"epochs": 1, "max_steps": None},
    "vision_cache": {"enabled": False},
}  # fmt: skip


@pytest.mark.faults("F23", "a decoder hangs on one sample, the interpreter's lock held")
def test_a_hung_decoder_is_named_and_dropped(
    bench: kit.Bench, own_pictures: Path, tmp_path: Path, record_property: Any
) -> None:
    """The others train: the end is that of a run in which the sample was dropped for another reason."""
    hung, plain = tmp_path / "hung/run", tmp_path / "plain/run"
    over = kit.runs.merge(OVER, {"data": {"decode_timeout": 1.0}})
    begin = time.monotonic()
    found = kit.train(
        kit.run_in(hung, bench.base, own_pictures, **over), on_member(lambda m: asleep() if m.number == 5 else None)
    )
    took = time.monotonic() - begin
    assert found.code == 0, found.said
    assert "train.jsonl:6 is dropped at load: DECODE_TIMEOUT not read within 1 s" in found.said
    ledger = pq.read_table(hung / "ledger.parquet").to_pylist()
    assert [r["reason"] for r in ledger if r["verdict"] == "drop"] == ["LOAD_DECODE_TIMEOUT"]
    assert kit.train(kit.run_in(plain, bench.base, own_pictures, **OVER), on_member(raise_drop(5, "CHANGED"))).code == 0
    assert kit.end_of(hung) == kit.end_of(plain)
    assert took < 60
    record_property("figure", f"decode_timeout 1 s: the run took {took:.1f} s")


def test_many_slow_samples_are_no_hang(bench: kit.Bench, own_pictures: Path, tmp_path: Path) -> None:
    """A row takes longer than one sample may, none of its samples does: each is read, none is dropped."""

    def plan(name: str) -> Pipeline:
        over = kit.runs.merge(OVER, {"batch": {"device_tokens": 4096}, "data": {"decode_timeout": 0.5}})
        p = prepare(kit.run_in(tmp_path / name, bench.base, own_pictures, **over), Terminal("quiet"))
        return Pipeline(p.train, p.plan, p.limits, workers=1)

    quick = next(plan("quick").steps())
    with pytest.MonkeyPatch.context() as patch:
        real = collate._encode
        patch.setattr(collate, "_encode", lambda loader, member: (time.sleep(0.3), real(loader, member))[1])
        slow = next(plan("slow").steps())
    assert slow.dropped == [] and len(slow.rows[0].members) == 4
    assert [r.members for r in slow.rows] == [r.members for r in quick.rows]
    assert np.array_equal(slow.rows[0].pixels_PD, quick.rows[0].pixels_PD)


def test_a_row_that_hangs_only_as_a_whole_is_an_error(bench: kit.Bench, own_pictures: Path, tmp_path: Path) -> None:
    def work(members: Any, known: Any, files: Any = None) -> Any:
        if len(members) > 1:
            asleep()
        return real(members, known, files)

    over = kit.runs.merge(OVER, {"batch": {"device_tokens": 4096}, "data": {"decode_timeout": 0.3}})
    p = prepare(kit.run_in(tmp_path / "run", bench.base, own_pictures, **over), Terminal("quiet"))
    real = pipeline_module._work
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "_work", work)
        patch.setattr(workers_module, "END_SECONDS", 0.2)
        work.__module__, work.__qualname__ = pipeline_module.__name__, "_work"  # found by name in the worker
        with pytest.raises(RunError, match=r"DATA_WORKER.*never ends: .*train.jsonl"):
            next(Pipeline(p.train, p.plan, p.limits, workers=1).steps())


@pytest.mark.faults("F24", "the address space of a worker is limited to 640 MiB more; one picture has 256 megapixels")
def test_a_picture_that_does_not_fit_is_dropped(bench: kit.Bench, own_pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    path = tiny.make_chat(folder, 1, pictures=12)
    path.write_text(own_pictures.read_text())
    Image.new("1", (16_000, 16_000)).save(folder / "images/7.png")  # 732 MiB in RGB

    def limited() -> None:
        begin = pipeline_module._start_worker

        def begins(spec: Any) -> None:
            begin(spec)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + (640 << 20), resource.RLIM_INFINITY))

        begins.__module__, begins.__qualname__ = pipeline_module.__name__, "_start_worker"
        pipeline_module._start_worker = begins  # type: ignore[assignment]

    run = tmp_path / "run"
    over = kit.runs.merge(OVER, {"data": {"image": {"max_pixels": 256_000_000}}})
    found = kit.train(kit.run_in(run, bench.base, path, **over), limited)
    assert found.code == 0, found.said
    ledger = pq.read_table(run / "ledger.parquet").to_pylist()
    assert [(r["row"], r["reason"]) for r in ledger if r["verdict"] == "drop"] == [(7, "LOAD_OOM")]
    assert len(kit.records(run)) == 3
