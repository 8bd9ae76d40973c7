"""Packed rows: equal for any number of workers, every token once, and what happens when a worker or a picture goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import runs
import tiny
import torch

from lensmith.core.encoded import IGNORED, IMAGE, PackedRow
from lensmith.core.errors import DataError, RunError
from lensmith.data import pipeline as pipeline_module
from lensmith.data.collate import load_row
from lensmith.data.pipeline import Pipeline
from lensmith.engine.step import run_step
from lensmith.recipe import session as session_module
from lensmith.recipe import stage
from lensmith.recipe.build import build
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "write_report", lambda folder: folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 conversations over 6 pictures, and 4 rows with three questions about one picture each, as branches."""
    folder = tmp_path_factory.mktemp("data")
    path = tiny.make_chat(folder, 40, pictures=6, seed=3)
    with path.open("a", encoding="utf-8") as file:
        for k in range(4):
            branches = [
                [{"role": "user", "content": f"<image>is it {c}?"}, {"role": "assistant", "content": "yes"}]
                for c in ("red", "blue", "green")
            ]
            row = {"branches": branches, "images": [f"images/{k}.png"]}
            file.write(json.dumps(row) + "\n")
    return path


def prepared(tmp_path: Path, qwen25: Path, data: Path, **over: Any) -> Prepared:
    return prepare(runs.located(tmp_path / "run", qwen25, data, **over), QUIET)


def pipeline(p: Prepared, **kwargs: Any) -> Pipeline:
    return Pipeline(p.train, p.plan, p.limits, **kwargs)


def content(row: PackedRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in PackedRow.__slots__}


def assert_equal(a: PackedRow, b: PackedRow) -> None:
    for (name, x), y in zip(content(a).items(), content(b).values(), strict=True):
        same = np.array_equal(x, y) and x.dtype == y.dtype if isinstance(x, np.ndarray) else x == y
        assert same, name


@pytest.mark.faults("F69", "ids, pixels and order with 0, 1 and 2 workers")
def test_workers_change_nothing(tmp_path: Path, qwen25: Path, data: Path) -> None:
    """Ids, pixels and order are equal with 0, 1 and 2 workers, and from a later step on."""
    p = prepared(tmp_path, qwen25, data, train={"epochs": 2, "max_steps": None})
    found = {n: list(pipeline(p, workers=n).steps()) for n in (0, 1, 2)}
    assert len(found[0]) == p.plan.num_steps() == 11
    assert any(row.pixels_PD.size for step in found[0] for row in step.rows)
    for n in (1, 2):
        for a, b in zip(found[0], found[n], strict=True):
            assert (a.step.number, a.step.cursor) == (b.step.number, b.step.cursor)
            assert (a.num_samples, a.num_tokens, a.num_supervised) == (b.num_samples, b.num_tokens, b.num_supervised)
            for x, y in zip(a.rows, b.rows, strict=True):
                assert_equal(x, y)
    late = list(pipeline(p, workers=2).steps(7, found[0][6].step.cursor))
    for a, b in zip(found[0][7:], late, strict=True):
        for x, y in zip(a.rows, b.rows, strict=True):
            assert_equal(x, y)


def test_rows_hold_every_token_once_and_no_padding(tmp_path: Path, qwen25: Path, data: Path) -> None:
    p = prepared(tmp_path, qwen25, data, train={"epochs": 1, "max_steps": None})
    lengths, supervised = p.train.column("tokens"), p.train.column("supervised")
    seen: Counter[int] = Counter()
    with_prefix = shared = 0
    for step in pipeline(p).steps():
        assert step.num_supervised == sum(len(r.target_S) for r in step.rows)
        for row in step.rows:
            seen.update(row.members)
            ends = np.cumsum([int(lengths[m]) for m in row.members])
            starts = ends - [int(lengths[m]) for m in row.members]
            assert row.num_tokens == ends[-1] <= p.limits.device_tokens
            assert row.ids_T.shape == row.kind_T.shape == (row.num_tokens,) == row.position_ids_3T.shape[1:]
            covered = np.zeros(row.num_tokens, int)
            owner_T = np.searchsorted(ends, np.arange(row.num_tokens), side="right")
            for s in row.segments:
                covered[s.start : s.start + s.length] += 1
                own = owner_T[s.start]
                assert starts[own] <= s.start and s.start + s.length <= ends[own]
                if s.prefix_length:
                    with_prefix += 1
                    assert starts[own] <= s.prefix_start and s.prefix_start + s.prefix_length <= s.start
                at = (row.supervised_S >= s.start) & (row.supervised_S < s.start + s.length)
                following = row.supervised_S[at] + 1
                assert (following < s.start + s.length).all()  # no target lies in another segment
                assert np.array_equal(row.ids_T[following], row.target_S[at])
            assert (covered == 1).all()
            assert (row.target_S != IGNORED).all() and np.all(np.diff(row.supervised_S) > 0)
            assert np.array_equal(np.asarray(row.members)[owner_T[row.supervised_S]], row.sample_S)
            counts = Counter(row.sample_S.tolist())
            assert all(counts[m] == supervised[m] for m in row.members)
            image_tokens = (
                row.image_grids_I3.prod(axis=1)[row.image_of_block] // 4 if len(row.image_keys) else np.zeros(0, int)
            )
            assert (row.kind_T == IMAGE).sum() == image_tokens.sum()
            assert len(set(zip(row.image_keys, map(tuple, row.image_grids_I3.tolist()), strict=True))) == len(
                row.image_keys
            )
            assert row.pixels_PD.shape[0] == row.image_grids_I3.prod(axis=1).sum()
            shared += len(row.image_of_block) - len(row.image_keys)
    assert seen == dict.fromkeys(range(44), 1)
    assert with_prefix >= 8 and shared > 0


def test_a_picture_of_two_files_is_read_once(tmp_path: Path, qwen25: Path) -> None:
    """Equal bytes under two names are one picture of the row."""
    path = tiny.make_chat(tmp_path, 1, pictures=2)
    (tmp_path / "images/1.png").write_bytes((tmp_path / "images/0.png").read_bytes())
    message = [{"role": "user", "content": "<image><image><image>?"}, {"role": "assistant", "content": "yes"}]
    path.write_text(
        json.dumps({"messages": message, "images": ["images/0.png", "images/1.png", "images/0.png"]}) + "\n"
    )
    p = prepared(tmp_path, qwen25, path)
    (row,) = next(pipeline(p).steps()).rows[:1]
    assert len(row.image_keys) == 1 and row.image_of_block[:3].tolist() == [0, 0, 0]


def test_known_pictures_have_no_pixels(tmp_path: Path, qwen25: Path, data: Path) -> None:
    """With workers too; and the row read again has them all."""
    p = prepared(tmp_path, qwen25, data)
    handles = {h for number in range(len(p.train.trainable)) for h in p.train.handles(number)}
    known = {h: f"key of {Path(h).name}" for h in handles}
    for workers in (0, 1):
        pipe = pipeline(p, workers=workers, known=lambda hs: {h: known[h] for h in hs})
        step = next(pipe.steps())
        assert any(r.image_keys for r in step.rows) and not any(len(r.pixel_image) for r in step.rows)
        with_pictures = next(r for r in step.rows if r.image_keys)
        assert len(pipe.reread(with_pictures.members).pixel_image) == len(with_pictures.image_keys)


@pytest.mark.faults("F22", "SIGKILL to a worker that has a sample")
def test_a_killed_worker_is_named_with_its_samples(tmp_path: Path, qwen25: Path, data: Path, monkeypatch: Any) -> None:
    p = prepared(tmp_path, qwen25, data, batch={"samples": 4, "packing": False}, train={"epochs": 1, "max_steps": None})
    doomed = int(list(p.plan.steps())[6].members[1])

    def dies(loader: Any, members: Any, known: Any) -> PackedRow:
        if any(m.number == doomed for m in members):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_row(loader, members, known)

    monkeypatch.setattr(pipeline_module, "load_row", dies)
    read = 0
    with pytest.raises(RunError, match="DATA_WORKER") as caught:
        for _ in pipeline(p, workers=2, ahead=3).steps():
            read += 1
            time.sleep(0.02)  # the pool may break while a step is computed: then handing out the next row fails
    assert f"{data.name}:{doomed + 1}" in caught.value.message
    assert read <= 6 and caught.value.exit_code == 74


def test_workers_end_with_a_killed_parent(tmp_path: Path, qwen25: Path, data: Path) -> None:
    """Else they would wait for work for ever, and hold memory."""
    p = prepared(tmp_path, qwen25, data)
    mine, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        steps = pipeline(p, workers=2).steps()
        next(steps)
        import multiprocessing

        os.write(theirs, json.dumps([c.pid for c in multiprocessing.active_children()]).encode())
        time.sleep(60)
        os._exit(1)
    workers = json.loads(os.read(mine, 1000))
    assert len(workers) == 2 and all(alive(w) for w in workers)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while any(alive(w) for w in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def own_pictures(folder: Path, rows: int) -> Path:
    """Row k shows picture k; every third row shows picture 0 as well."""
    path = tiny.make_chat(folder, 1, pictures=rows)
    lines = []
    for k in range(rows):
        images = [f"images/{k}.png"] + (["images/0.png"] if k % 3 == 2 else [])
        turns = [
            {"role": "user", "content": "<image>" * len(images) + f" what is {k}?"},
            {"role": "assistant", "content": f"a circle {k}"},
        ]
        lines.append(json.dumps({"messages": turns, "images": images}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.faults("F61", "a picture is deleted after it was indexed")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_removed_picture_drops_its_sample_and_no_other(tmp_path: Path, qwen25: Path, workers: int) -> None:
    """The loss of its step is that of the step without the sample, not of one with fewer or zero tokens in it."""
    path = own_pictures(tmp_path, 8)
    p = prepared(tmp_path, qwen25, path)
    (tmp_path / "images/3.png").unlink()
    (step,) = list(pipeline(p, workers=workers).steps())[:1]
    assert [d[:2] for d in step.dropped] == [(3, "IMG_MISSING")]
    assert step.num_samples == 7
    assert step.num_supervised == p.train.column("supervised").sum() - p.train.column("supervised")[3]
    assert sorted(m for r in step.rows for m in r.members) == [0, 1, 2, 4, 5, 6, 7]
    assert loss_of(p, step) == pytest.approx(without(p, 3), abs=1e-6)
    assert abs(without(p, 3) - without(p, 3, 4)) > 1e-4  # the test can tell


def loss_of(p: Prepared, step: Any) -> float:
    built = build(p)
    found = run_step(
        built.root, step.rows, {"loss": step.num_supervised}, built.optimizer, built.part_of, factor=1.0, clip_norm=None
    )
    return found.loss


def without(p: Prepared, *samples: int) -> float:
    """Token-weighted mean over the other samples, each in a row of its own."""
    built, pipe = build(p), pipeline(p)
    total = count = 0.0
    with torch.no_grad():
        for number in set(range(8)).difference(samples):
            loss, weight = built.root(pipe.reread((number,)))["loss"]
            total, count = total + float(loss), count + float(weight)
    return total / count


def test_a_step_of_which_nothing_is_left_moves_nothing(tmp_path: Path, qwen25: Path, monkeypatch: Any) -> None:
    """Three empty steps in a row are no non-finite steps; the ledger balances, also after a resume."""
    path = own_pictures(tmp_path, 24)
    over: dict[str, Any] = {
        "batch": {"samples": 4}, "train": {"epochs": 1, "max_steps": None}, "guard": {"max_in_a_row": 1},
        "data": {"max_dropped": 1.0}, "save": {"every_steps": 1, "keep_last": 99}, "vision_cache": {"enabled": False},
    }  # fmt: skip
    run = runs.located(tmp_path / "run", qwen25, path, **over)
    gone = [m for s in list(prepare(run, QUIET).plan.steps())[1:4] for m in s.members.tolist()]
    pictures = {m: (tmp_path / f"images/{m}.png").read_bytes() for m in gone}
    monkeypatch.setattr(
        stage, "build", after(lambda: [(tmp_path / f"images/{m}.png").unlink(missing_ok=True) for m in gone])
    )
    summary = runs.quiet_train(run).summary
    kept = [m for m in range(24) if m not in gone and not (0 in gone and m % 3 == 2)]
    lost = 24 - len(kept)
    assert summary["samples"] == {
        "read": 24, "train": 24 - lost, "dropped": lost, "held_out": 0, "by_reason": {"LOAD_IMG_MISSING": lost},
    }  # fmt: skip
    assert summary["steps"] == 6 and summary["applied_steps"] == sum(loss is not None for loss in summary["losses"])
    assert summary["losses"][1:4] == [None] * 3
    json.loads(
        (tmp_path / "run" / "summary.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON")
    )
    ledger = pq.read_table(tmp_path / "run" / "ledger.parquet").to_pylist()
    assert [r["verdict"] for r in ledger].count("drop") == lost
    for name in ("step-00000006", "step-00000005"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    for m, content in pictures.items():
        (tmp_path / f"images/{m}.png").write_bytes(content)
    resumed = runs.quiet_train(run).summary
    assert {k: resumed[k] for k in ("samples", "losses", "steps")} == {
        k: summary[k] for k in ("samples", "losses", "steps")
    }
    assert pq.read_table(tmp_path / "run" / "ledger.parquet").to_pylist() == ledger


def after(action: Any) -> Any:
    def built(prepared: Any, **_: Any) -> Any:
        action()
        return build(prepared)

    return built


@pytest.mark.faults("F61", "more of them than the limit")
def test_too_many_drops_at_load_end_the_run(tmp_path: Path, qwen25: Path, monkeypatch: Any) -> None:
    """`data.max_dropped` holds for them too; the message names the reason and the count."""
    run = runs.located(tmp_path / "run", qwen25, own_pictures(tmp_path, 24), train={"epochs": 1, "max_steps": None},
                       data={"max_dropped": 0.1}, vision_cache={"enabled": False})  # fmt: skip
    monkeypatch.setattr(stage, "build", after(lambda: [(tmp_path / f"images/{m}.png").unlink() for m in (4, 7, 10)]))
    with pytest.raises(DataError, match=r"3 of 24 rows are dropped, 3 LOAD_IMG_MISSING"):
        runs.quiet_train(run)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_went_wrong_is_named(tmp_path: Path, qwen25: Path, workers: int) -> None:
    """The data file was overwritten after it was indexed: one error that names the line, not a dead worker."""
    path = own_pictures(tmp_path, 8)
    p = prepared(tmp_path, qwen25, path)
    path.write_bytes(path.read_bytes().replace(b'"messages"', b'"messages?'))
    with pytest.raises(DataError, match=r"train.jsonl:\d"):
        list(pipeline(p, workers=workers).steps())
