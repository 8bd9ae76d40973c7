"""Streams: the order of rows, windows and their spools, whole runs that are stopped anywhere, what ends them."""

from __future__ import annotations

import datetime
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lensmith.core.errors import ConfigError, DataError, RunError
from lensmith.data import spool as spool_module
from lensmith.data.lanes import OPEN, Lanes, LaneSpec
from lensmith.data.readers import StreamRow, hf_rows
from lensmith.data.readers.base import no_rows
from lensmith.data.spool import SpoolRows, SpoolWriter
from lensmith.data.windows import StreamPipeline, WindowMaker, forget_windows, window_folders
from lensmith.engine.loop import Interrupted
from lensmith.recipe import check as check_module
from lensmith.recipe import session, stage
from lensmith.recipe.prepare import prepare
from lensmith.recipe.show import show
from lensmith.report.terminal import Terminal


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder: folder)


# --- the order --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A shard of `count` rows; one that ends with an error has that many before it."""

    name: str
    count: int
    error: Exception | None = None

    def rows(self, start: int = 0) -> Iterator[StreamRow]:
        if not self.count and self.error is None:
            raise no_rows(self.name)
        for number in range(start, self.count):
            yield StreamRow(number, f"{self.name}:{number + 1}", {"n": number})
        if self.error is not None:
            raise self.error


def lane(name: str, counts: list[int], **about: Any) -> LaneSpec:
    return LaneSpec(tuple((0, Rows(f"{name}{i}", count)) for i, count in enumerate(counts)), **about)


def drawn(lanes: Lanes, most: int = 500) -> list[str]:
    found: list[str] = []
    while len(found) < most and (row := lanes.draw()) is not None:
        found.append(row[1].origin)
        for one in lanes.lanes:
            assert len(one._iterators) <= len(one.open) <= OPEN
    return found


COUNTS = st.lists(st.integers(0, 7), min_size=1, max_size=2 * OPEN)
LANES = st.tuples(COUNTS, st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([1, 2, None]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(COUNTS, st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([1, 2, None])), min_size=1, max_size=3
    ),
    st.integers(0, 5),
    st.integers(0, 90),
)
def test_the_order_is_pure_and_goes_on_from_any_draw(kinds: list[Any], seed: int, stop: int) -> None:
    """The same rows; from a state that went through JSON the same that follow; every row once a pass; the shares."""
    specs = [lane("abc"[i], c, share=s, passes=p) for i, (c, s, p) in enumerate(kinds)]
    lanes = Lanes(specs, seed)
    before = drawn(lanes, stop)
    state = json.loads(json.dumps(lanes.state()))
    assert len(json.dumps(state)) < 400 * len(specs)
    rest = drawn(lanes)
    assert drawn(Lanes(specs, seed), stop) == before
    again = Lanes(specs, seed)
    again.restore(state)
    assert drawn(again) == rest
    for spec, name in zip(specs, "abc", strict=False):
        own = [origin for origin in before + rest if origin[0] == name]
        every = {row.origin for _, shard in spec.shards if shard.count for row in shard.rows()}  # type: ignore[attr-defined]
        for begin in range(0, len(own), max(1, len(every))):
            one_pass = own[begin : begin + len(every)]
            assert len(set(one_pass)) == len(one_pass)
        if spec.passes is not None and not any(other.passes is None for other in specs):
            assert Counter(own) == dict.fromkeys(every, spec.passes)
    total = sum(spec.share for spec in specs)
    lengths = [(spec.passes or 10**9) * sum(s.count for _, s in spec.shards) for spec in specs]  # type: ignore[attr-defined]
    counts = [0] * len(specs)
    for number, origin in enumerate(before + rest, start=1):
        if any(c >= n for c, n in zip(counts, lengths, strict=True)):
            break  # from here on one of them is left out
        counts["abc".index(origin[0])] += 1
        assert all(abs(c - number * s.share / total) < 1 for c, s in zip(counts, specs, strict=True))


def test_another_seed_and_each_pass_have_another_order() -> None:
    spec = lane("a", [1] * 50, passes=2)
    one, two = drawn(Lanes([spec], 1)), drawn(Lanes([spec], 2))
    assert sorted(one) == sorted(two) and one != two and one[:50] != one[50:]


@pytest.mark.parametrize("stop", range(9))
def test_a_shard_that_breaks_off_says_it_once(stop: int) -> None:
    """After a resume too, though it breaks off again."""
    broken = LaneSpec(((0, Rows("a", 3, DataError("TAR", "cut short", where="a"))), (0, Rows("b", 4))), passes=1)
    whole = drawn(Lanes([broken], 0))
    assert sorted(whole) == ["a", "a:1", "a:2", "a:3", "b:1", "b:2", "b:3", "b:4"]
    lanes = Lanes([broken], 0)
    assert drawn(lanes, stop) == whole[:stop]
    again = Lanes([broken], 0)
    again.restore(lanes.state())
    assert drawn(again) == whole[stop:]


@pytest.mark.parametrize(
    ("error", "code"),
    [(FileNotFoundError(2, "No such file"), "SHARD"), (DataError("REMOTE", "reset"), "REMOTE")],
)
def test_a_shard_that_cannot_be_had_is_never_a_wrong_row(error: Exception, code: str) -> None:
    """Else a hiccup of the network would leave out the rest of a shard."""
    lanes = Lanes([LaneSpec(((0, Rows("a", 1, error)),), passes=1)], 0)
    assert drawn(lanes, 1) == ["a:1"]
    with pytest.raises(DataError, match=code):
        lanes.draw()


def test_a_stream_without_rows_ends() -> None:
    """With passes without end too, and when the rows went away between two passes."""
    assert drawn(Lanes([lane("a", [0, 0])], 0)) == []
    lanes = Lanes([lane("a", [1, 1])], 0)
    assert len(drawn(lanes, 2)) == 2
    gone = Lanes([lane("a", [0, 0])], 0)
    gone.restore(lanes.state())
    assert drawn(gone) == []


# --- the spool --------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["a", "é", "$blob", "$blob$", '"$blob"']), inner),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES), min_size=1, max_size=5), st.randoms())
def test_rows_come_back_as_they_were(tmp_path_factory: Any, rows: list[dict[str, Any]], random: Any) -> None:
    path = tmp_path_factory.mktemp("spool") / "rows.spool"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module, "BATCH_ROWS", random.choice([1, 2, 64]))
        patch.setattr(spool_module, "BATCH_BYTES", random.choice([1, 40, 1 << 20]))
        out = SpoolWriter(path)
        refs = [out.add(row, f"é:{i}") for i, row in enumerate(rows)]
        out.close()
    found = SpoolRows(path)
    assert list(found.scan()) == refs
    for i in random.sample(range(len(rows)), len(rows)):
        assert same(found.read(refs[i]), rows[i]) and found.origin(refs[i]) == f"é:{i}"


def test_what_json_cannot_hold_is_kept_as_text(tmp_path: Path) -> None:
    """No format reads such values, and a column of dates beside the text is common in Parquet."""
    out = SpoolWriter(tmp_path / "rows.spool")
    ref = out.add({"at": datetime.date(2024, 5, 1), "image": b"\x00\xff"}, "a:1")
    out.close()
    assert SpoolRows(tmp_path / "rows.spool").read(ref) == {"at": "2024-05-01", "image": b"\x00\xff"}


# --- windows ----------------------------------------------------------------------------------------------------------


def documents(folder: Path, shards: int, rows: int, long: int = 0) -> str:
    """Shards of short documents; every `long`-th row has a few hundred tokens more."""
    folder.mkdir(exist_ok=True)
    for k in range(shards):
        texts = [f"document {k} {i}. " + "red blue. " * (60 * (long and i % long == 0)) for i in range(rows)]
        (folder / f"docs-{k}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(folder / "docs-*.jsonl")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("data"), 20)


def streamed(folder: Path, base: Path, train: Any, /, **over: Any) -> Any:
    values: dict[str, Any] = {
        "data": {"train": train, "stream": {"window": 10}, "max_tokens": 256},
        "batch": {"samples": 4, "device_tokens": 256},
        "train": {"max_steps": 6, "epochs": None},
    }
    return runs.located(folder, base, Path(), **runs.merge(values, over))


def spec_of(run: Any, folder: Path) -> Any:
    prepared = prepare(run, Terminal("quiet"))
    assert prepared.stream is not None
    return replace(prepared.stream, folder=folder), prepared.limits


def said(rows: Any) -> Any:
    """What a step holds, and where the stream goes on."""
    about = {k: v for k, v in rows.step.stream.items() if k != "begin"}
    held = [(r.ids_T.tolist(), r.members, r.pixels_PD.tobytes()) for r in rows.rows]
    return about, rows.num_samples, rows.num_supervised, held, rows.index.origins(rows.step.members.tolist())


MIXED = {"mixture": {"kind": "shares"}}


def test_workers_and_resumes_change_nothing(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    """From every step on, at window borders too, with 0, 1 and 2 workers."""
    train = [{"path": documents(tmp_path, 3, 9), "share": 2}, str(chat)]
    run = streamed(tmp_path / "run", qwen25, train, data=MIXED)
    spec, limits = spec_of(run, tmp_path / "windows")
    steps = 9

    def first(count: int, workers: int, start: int = 0, state: Any = None) -> list[Any]:
        if state is None:
            shutil.rmtree(spec.folder, ignore_errors=True)
        else:
            forget_windows(spec.folder, state["window"])
        pipeline = StreamPipeline(spec, limits, workers=workers)
        found: list[Any] = []
        each = pipeline.steps(start, json.loads(json.dumps(state)))
        for _, rows in zip(range(count), each, strict=False):
            assert rows.step.number == start + len(found)
            found.append((said(rows), rows.step.stream))
            assert len(window_folders(spec.folder)) <= rows.step.stream["window"] + 2, "one is made ahead, not more"
            assert len(list(spec.folder.glob("*/rows.spool"))) <= 2
        each.close()  # type: ignore[attr-defined]
        return found

    whole = first(steps, 0)
    windows = [state["window"] for _, state in whole]
    assert windows == [0, 0, 0, 1, 1, 1, 2, 2, 2], "10 rows, and 2 more to fill the last step"
    assert {len(held[4]) for held, _ in whole} == {4}
    assert [one for one, _ in first(steps, 2)] == [one for one, _ in whole]
    for start in range(1, steps):
        rest = first(steps - start, start % 3 if start % 4 == 3 else 0, start, whole[start - 1][1])
        assert [one for one, _ in rest] == [one for one, _ in whole[start:]]
    assert settled()
    assert list(spec.folder.glob("*/rows.spool")) == []
    other, _ = spec_of(streamed(tmp_path / "run", qwen25, train, data=MIXED, train={"seed": 7}), spec.folder)
    rows = next(StreamPipeline(other, limits).steps())
    assert said(rows)[4] != whole[0][0][4]


def settled(seconds: float = 10.0) -> bool:
    """Whether all child processes end by themselves."""
    deadline = time.monotonic() + seconds
    while multiprocessing.active_children():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_documents_are_cut_and_steps_are_filled_by_tokens(tmp_path: Path, qwen25: Path) -> None:
    train = documents(tmp_path, 2, 12, long=3)
    by_samples = {"data": {"max_tokens": 64}, "train": {"epochs": 1}}
    by_tokens = {**by_samples, "batch": {"samples": None, "tokens": 200, "device_tokens": 200}}
    for over in (by_samples, by_tokens):
        spec, limits = spec_of(streamed(tmp_path / "run", qwen25, train, **over), tmp_path / "windows")
        found = list(StreamPipeline(spec, limits).steps())
        pieces = [o for rows in found for o in said(rows)[4] if o.endswith("]")]
        assert pieces and len(set(pieces)) == len(pieces)
        if spec.tokens:
            assert all(rows.num_tokens <= 200 for rows in found) and max(rows.num_tokens for rows in found) > 130
        else:
            assert {rows.num_samples for rows in found[:-1]} == {4}


def test_rows_that_changed_under_a_checkpoint_are_refused(tmp_path: Path, qwen25: Path) -> None:
    train = documents(tmp_path, 1, 20)
    spec, limits = spec_of(streamed(tmp_path / "run", qwen25, train), tmp_path / "windows")
    state = next(StreamPipeline(spec, limits).steps()).step.stream
    for change in (lambda text: text.replace("document 0 3", "document 0 x"), lambda text: text[:0]):
        file = tmp_path / "docs-0.jsonl"
        before = file.read_text()
        file.write_text(change(before))
        with pytest.raises(RunError, match=r"\[RESUME\].*window 0"):
            next(StreamPipeline(spec, limits).steps(1, state))
        file.write_text(before)
    assert next(StreamPipeline(spec, limits).steps(1, state)).step.number == 1


def test_a_stream_of_which_nothing_trains_ends(tmp_path: Path, qwen25: Path) -> None:
    """It has no end of its own here, and no step at which anything else could be noticed."""
    write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, *[{"text": " "}] * 30])
    run = streamed(tmp_path / "run", qwen25, str(tmp_path / "a.jsonl"), data={"max_dropped": 1.0}, batch={"samples": 1})
    with pytest.raises(DataError, match=r"\[NO_SAMPLES\] none of 18 rows.*18 EMPTY"):
        runs.quiet_train(run)
    assert json.loads((tmp_path / "run/checkpoints/step-00000001/state/progress.json").read_text())


# --- sources ----------------------------------------------------------------------------------------------------------


def png(shade: int = 0) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (56 + shade, 56), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def test_all_kinds_of_sources_in_one_run(tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any) -> None:
    """Each is named, measured and read as by an index."""
    turns = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a circle"}]
    plain = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a square"}]
    table = [{"messages": turns, "images": [{"bytes": png(i), "path": None}], "at": None} for i in range(6)]
    held = pa.Table.from_pylist(table)
    dates = pa.array([datetime.datetime(2024, 1, 1 + i) for i in range(6)], pa.timestamp("us"))
    pq.write_table(held.set_column(2, "at", dates), tmp_path / "p.parquet", row_group_size=2)
    with tarfile.open(tmp_path / "t-000.tar", "w") as archive:
        for i in range(6):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.txt", b"a red circle")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    datasets.Dataset.from_list([{"messages": plain, "n": i} for i in range(6)]).save_to_disk(tmp_path / "saved")
    (tmp_path / "array").mkdir()
    names = tiny.make_pictures(tmp_path / "array", 2)
    array = [{"messages": turns, "images": [names[i % 2]]} for i in range(6)]
    (tmp_path / "array/a.json").write_text("[" + ",\n".join(map(json.dumps, array)) + "]")
    rows = [{"messages": plain, "n": i} for i in range(6)]
    system = fsspec.filesystem("memory")
    for k in range(2):
        system.pipe(f"/far-{k}.jsonl", "".join(json.dumps(row) + "\n" for row in rows[3 * k : 3 * k + 3]).encode())

    def load(path: str, subset: Any, *, split: str, revision: Any, streaming: bool) -> Any:
        assert streaming
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    hf_rows.hub_stream.cache_clear()
    sources = {
        "train": str(chat), "p": "p.parquet", "t-000": "t-000.tar", "saved": "saved", "a": "array/a.json",
        "name": "hf://org/name", "far-*.jsonl": "memory://far-*.jsonl",
    }  # fmt: skip
    absolute = {n: str(tmp_path / p) if (tmp_path / p).exists() else p for n, p in sources.items()}
    train = [{"path": path} for path in absolute.values()]
    over = {"data": {"mixture": {"kind": "shares", "exhausted": "leave_out"}, "workers": 1}}
    out = runs.quiet_train(streamed(tmp_path / "run", qwen25, train, **over, train={"max_steps": 99})).summary
    system.rm("/", recursive=True)
    hf_rows.hub_stream.cache_clear()
    assert {s["source"]: s["samples"] for s in out["sources"]} == {n: 20 if n == "train" else 6 for n in sources}
    assert out["samples"]["read"] == out["samples"]["train"] == 56 and out["steps"] == 14
    assert all(s["supervised"] and s["loss_last"] for s in out["sources"])
    ledger = pq.read_table(tmp_path / "run/ledger.parquet")
    assert len(set(ledger["origin"].to_pylist())) == 56


def test_the_format_is_that_of_the_first_row_that_can_be_read(tmp_path: Path, qwen25: Path) -> None:
    (tmp_path / "docs-0.jsonl").write_text("\n")
    (tmp_path / "docs-1.jsonl").write_text('not json\n{"text": "one"}\n{"text": "two"}\n')
    path = str(tmp_path / "docs-*.jsonl")
    run = streamed(tmp_path / "run", qwen25, path, data={"stream": {"wrong": "drop"}, "max_dropped": 0.5})
    out = runs.quiet_train(run).summary["samples"]
    assert out["by_reason"].keys() == {"JSON"} and out["read"] == 3 * out["dropped"]
    (tmp_path / "docs-1.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(DataError, match="UNKNOWN_FORMAT"):
        runs.quiet_train(streamed(tmp_path / "b", qwen25, path))
    (tmp_path / "docs-1.jsonl").write_text("\n")
    with pytest.raises(DataError, match="NO_ROWS"):
        runs.quiet_train(streamed(tmp_path / "b", qwen25, path))


def test_the_first_rows_of_each_shard(tmp_path: Path, qwen25: Path) -> None:
    train = [{"path": documents(tmp_path, 2, 9), "max_samples": 5}]
    out = runs.quiet_train(streamed(tmp_path / "run", qwen25, train, train={"epochs": 2, "max_steps": 50})).summary
    assert out["samples"]["read"] == 20 and out["steps"] == 5


# --- whole runs -------------------------------------------------------------------------------------------------------


def end(folder: Path) -> Any:
    """Everything of a finished run that must not depend on how it came about."""
    summary = json.loads((folder / "summary.json").read_text())
    state = load_file(Path(summary["checkpoint"]) / "state/training.safetensors")
    tensors = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
    ledger = pq.read_table(folder / "ledger.parquet").to_pylist()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(r["step"], r["loss"], r["samples"], r["sources"]) for r in records if r["kind"] == "step"]
    assert [s[0] for s in steps] == list(range(1, len(steps) + 1))
    counts = Counter(row["verdict"] for row in ledger)
    assert (counts["train"], counts["drop"]) == (summary["samples"]["train"], summary["samples"]["dropped"])
    return tensors, ledger, steps, summary["samples"], summary["sources"], summary["losses"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A chat with pictures of which one does not decode, and documents of which one is empty."""
    folder = tmp_path_factory.mktemp("source")
    pictures = tiny.make_chat(folder, 16, text_only=0.0)
    broken = (folder / "images/0.png").read_bytes()
    (folder / "images/0.png").write_bytes(broken[:60] + b"\0" * (len(broken) - 60))
    path = documents(folder, 2, 8)
    rows = [json.loads(line) for line in (folder / "docs-1.jsonl").read_text().splitlines()]
    rows[2] = {"text": " "}
    write_lines(folder / "docs-1.jsonl", rows)
    return [{"path": path, "name": "docs", "share": 1}, {"path": str(pictures), "weight": 0.5, "share": 2}]


def whole_run(folder: Path, base: Path, source: list[Any], /, **over: Any) -> Any:
    values = {"data": {**MIXED, "max_dropped": 1.0}, "train": {"max_steps": 8}, "save": {"keep_last": 3}}
    return streamed(folder, base, source, **runs.merge(values, over))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, qwen25: Path, source: list[Any]) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "write_report", lambda folder: folder)
        runs.quiet_train(whole_run(folder, qwen25, source))
    return folder


def test_the_ledger_balances(uninterrupted: Path) -> None:
    """Over the windows up to the one in use; samples dropped at load stand in it once for each time they were met."""
    _, ledger, steps, samples, sources, _ = end(uninterrupted)
    reasons = samples["by_reason"]
    assert samples["read"] == len(ledger) and {"EMPTY", "LOAD_IMG_CORRUPT"} & reasons.keys() == reasons.keys()
    at_load = [row for row in ledger if row["reason"] == "LOAD_IMG_CORRUPT"]
    assert 1 < len(at_load) == 4 * len(steps) - sum(s[2] for s in steps)
    assert len({row["origin"] for row in at_load}) < len(at_load), "a second pass met some again"
    assert sum(s["samples"] for s in sources) == sum(s[2] for s in steps)
    assert [s["source"] for s in sources] == ["docs", "train"]
    assert not list((uninterrupted / "stream").rglob("rows.spool"))
    assert len(window_folders(uninterrupted / "stream/stage-1")) == 3


def test_resumed_after_every_step(tmp_path: Path, qwen25: Path, source: list[Any], uninterrupted: Path) -> None:
    for step in range(1, 9):
        over = {"data": {"workers": step % 3}, "train": {"max_steps": step}}
        runs.quiet_train(whole_run(tmp_path / "run", qwen25, source, **over))
        assert settled()
    assert end(tmp_path / "run") == end(uninterrupted)
    runs.quiet_train(whole_run(tmp_path / "run", qwen25, source))  # over: nothing is read any more
    assert end(tmp_path / "run") == end(uninterrupted)


def at_step(monkeypatch: Any, step: int, act: Any) -> None:
    log = stage.StageRun._log

    def acting(self: Any, p: Any, *args: Any) -> None:
        log(self, p, *args)
        if p.step == step:
            act()

    monkeypatch.setattr(stage.StageRun, "_log", acting)


def maker() -> Any:
    return next(c for c in multiprocessing.active_children() if c.name == "lensmith-stream")


def test_a_killed_run_goes_on(tmp_path: Path, qwen25: Path, source: list[Any], uninterrupted: Path) -> None:
    """Its processes end with it."""
    run = whole_run(tmp_path / "run", qwen25, source, data={"workers": 2}, save={"every_steps": 2})
    assert settled()
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:

            def die() -> None:
                pids = [c.pid for c in multiprocessing.active_children()]
                (tmp_path / "children.json").write_text(json.dumps(pids))
                os.kill(os.getpid(), signal.SIGKILL)

            at_step(patch, 5, die)
            runs.quiet_train(run)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    children = json.loads((tmp_path / "children.json").read_text())
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a process outlives the run"
        time.sleep(0.02)
    assert len(children) == 3
    runs.quiet_train(run)
    assert end(tmp_path / "run") == end(uninterrupted)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["signal", "signal to all", "interrupt", "killed maker", "defect"])
def test_whatever_ends_a_run_leaves_no_process(
    tmp_path: Path, qwen25: Path, source: list[Any], uninterrupted: Path, monkeypatch: Any, how: str
) -> None:
    """A signal and the maker's death are answered with a save, and the run goes on from there."""
    run = whole_run(tmp_path / "run", qwen25, source, data={"workers": 1})

    def act() -> None:
        if how == "signal to all":
            os.kill(maker().pid, signal.SIGTERM)
            maker().join()
        if how.startswith("signal"):
            os.kill(os.getpid(), signal.SIGTERM)
        elif how == "interrupt":
            raise KeyboardInterrupt
        elif how == "defect":
            raise AssertionError("a defect")
        else:
            os.kill(maker().pid, signal.SIGKILL)

    kinds = {"interrupt": KeyboardInterrupt, "defect": AssertionError, "killed maker": RunError}
    with monkeypatch.context() as patch:
        at_step(patch, 1 if how == "killed maker" else 2, act)
        with pytest.raises(kinds.get(how, Interrupted)) as caught:
            runs.quiet_train(run)
    assert settled()
    if how == "killed maker":
        assert "[DATA_WORKER] the process that reads the stream died of SIGKILL" in str(caught.value)
    saved = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step-*"))
    windows = ["step-00000003"], ["step-00000006"]  # the maker may have handed over the second one already
    ends = {"signal": (["step-00000002"],), "killed maker": windows}.get(how.split(" to ")[0], ([],))
    assert saved in ends
    runs.quiet_train(run)
    assert end(tmp_path / "run") == end(uninterrupted)


def test_the_maker_does_not_answer_the_terminal(
    tmp_path: Path, qwen25: Path, source: list[Any], monkeypatch: Any
) -> None:
    """Ctrl-C reaches every process: the loop saves and ends, the maker waits to be ended."""

    def act() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(maker().pid, number)
        time.sleep(0.1)
        assert maker().is_alive()

    at_step(monkeypatch, 2, act)
    runs.quiet_train(whole_run(tmp_path / "run", qwen25, source, data={"workers": 1}, train={"max_steps": 4}))
    assert settled()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_row_ends_the_run_behind_the_steps_before(tmp_path: Path, qwen25: Path, workers: int) -> None:
    """These are saved; when the row is mended the run ends as if it had never been wrong."""
    train = documents(tmp_path, 1, 40)
    file = tmp_path / "docs-0.jsonl"
    right = file.read_text()
    over = {"data": {"workers": workers}, "train": {"max_steps": 8}}
    runs.quiet_train(streamed(tmp_path / "whole", qwen25, train, **over))
    lines = right.splitlines(keepends=True)
    for wrong, code in (("{\n", "JSON"), ('{"text": 7}\n', "SCHEMA")):
        file.write_text("".join([*lines[:20], wrong, *lines[21:]]))
        with pytest.raises(DataError) as caught:
            runs.quiet_train(streamed(tmp_path / "run", qwen25, train, **over))
        text = str(caught.value)
        assert text.startswith(f"[{code}] ") and text.count(f"[{code}]") == 1 and "docs-0.jsonl:21: " in text
        assert "data.stream.wrong: drop" in text and settled()
        assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
        assert pq.read_table(tmp_path / "run/ledger.parquet").num_rows == 12
    file.write_text(right)
    runs.quiet_train(streamed(tmp_path / "run", qwen25, train, **over))
    assert end(tmp_path / "run")[:3] == end(tmp_path / "whole")[:3]


def test_wrong_rows_may_be_dropped(tmp_path: Path, qwen25: Path) -> None:
    """Also a shard that breaks off; every one stands in the ledger, and too many end the run in their window."""
    train = documents(tmp_path, 2, 20)
    file = tmp_path / "docs-0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:5], '{"text": 7}\n', *lines[6:9], '{"text": "cut']))
    over = {"data": {"stream": {"wrong": "drop"}, "max_dropped": 0.2}, "train": {"max_steps": 50, "epochs": 1}}
    out = runs.quiet_train(streamed(tmp_path / "run", qwen25, train, **over)).summary["samples"]
    assert out["by_reason"] == {"JSON": 1, "SCHEMA": 1} and (out["read"], out["train"]) == (30, 28)
    ledger = pq.read_table(tmp_path / "run/ledger.parquet").to_pylist()
    gone = {row["origin"].rsplit("/", 1)[-1]: row["detail"] for row in ledger if row["verdict"] == "drop"}
    assert gone.keys() == {"docs-0.jsonl:6", "docs-0.jsonl:10"} and all(gone.values())
    over["data"]["max_dropped"] = 0.01
    with pytest.raises(DataError, match=r"\[TOO_MANY_DROPPED\].*1 of 13 rows"):
        runs.quiet_train(streamed(tmp_path / "b", qwen25, train, **over))


def test_a_shard_that_vanishes(tmp_path: Path, qwen25: Path, monkeypatch: Any) -> None:
    """It is no wrong row, and the run goes on when it is back."""
    train = documents(tmp_path, 12, 4)
    over = {"data": {"stream": {"wrong": "drop"}}, "train": {"max_steps": 50, "epochs": 1}}
    runs.quiet_train(streamed(tmp_path / "whole", qwen25, train, **over))
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: [f.rename(f.with_suffix(".away")) for f in tmp_path.glob("docs-*.jsonl")])
        with pytest.raises(DataError, match=r"\[SHARD\].*docs-\d+.jsonl"):
            runs.quiet_train(streamed(tmp_path / "run", qwen25, train, **over))
    for file in tmp_path.glob("docs-*.away"):
        file.rename(file.with_suffix(".jsonl"))
    runs.quiet_train(streamed(tmp_path / "run", qwen25, train, **over))
    assert end(tmp_path / "run")[:3] == end(tmp_path / "whole")[:3]


def test_the_end_of_the_stream(tmp_path: Path, qwen25: Path, capsys: Any) -> None:
    """Behind the last step the rest is in the ledger too; the run is whole, and stays so."""
    write_lines(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(12)] + [{"text": " "}] * 2)
    over = {"data": {"max_dropped": 0.5, "workers": 1}, "train": {"max_steps": 50, "epochs": 1}}
    run = streamed(tmp_path / "run", qwen25, str(tmp_path / "a.jsonl"), **over)
    for _ in range(2):
        out = runs.quiet_train(run).summary
        assert "the stream ended after step 3 of 50" in capsys.readouterr().err
        assert (out["steps"], out["samples"]["read"], out["samples"]["dropped"]) == (3, 14, 2)
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match=r"\[NO_SAMPLES\] the stream ended without a sample"):
        runs.quiet_train(streamed(tmp_path / "b", qwen25, str(tmp_path / "a.jsonl"), **over))
    assert settled()


def test_a_full_disk_is_named(tmp_path: Path, qwen25: Path, monkeypatch: Any) -> None:
    def full(self: Any, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SpoolWriter, "add", full)
    run = streamed(tmp_path / "run", qwen25, documents(tmp_path, 1, 9), data={"workers": 1})
    with pytest.raises(RunError, match=r"\[WINDOW\].*window-0000000.*No space left"):
        runs.quiet_train(run)
    assert settled()


def test_evaluation_beside_a_stream_and_stages(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    """A streamed stage, then an indexed one; held-out figures of both; the ledger has the rows of both."""
    docs = documents(tmp_path, 2, 30)
    stages = [
        {"name": "docs", "train": {"max_steps": 3}},
        {"name": "chat", "data": {"train": str(chat), "stream": None}, "train": {"max_steps": 2}},
    ]
    over = {"data": {"eval": str(chat)}, "evaluate": {"every_steps": 2, "before": False}, "stages": stages}
    for step in (1, 3):  # stopped in the first stage, then through
        stages[0]["train"] = {"max_steps": step}
        if step == 1:
            runs.quiet_train(streamed(tmp_path / "run", qwen25, docs, **{**over, "stages": stages[:1]}))
    out = runs.quiet_train(streamed(tmp_path / "run", qwen25, docs, **over)).summary
    runs.quiet_train(streamed(tmp_path / "whole", qwen25, docs, **over))
    assert [s["steps"] for s in out["stages"]] == [3, 2]
    assert [s["samples"]["read"] for s in out["stages"]] == [12, 20]
    assert out["heldout"]["stages"]["docs"]["after"]["loss"] > 0
    assert end(tmp_path / "run")[:3] == end(tmp_path / "whole")[:3]


# --- options and commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        ({"train": {"max_steps": None, "epochs": 1}}, "train.max_steps is not set"),
        ({"data": {"holdout": 0.1}}, "data.holdout"),
        ({"data": {"mixture": {"kind": "temperature"}}}, "data.mixture"),
        ({"data": {"mixture": {"kind": "shares", "by": "tokens"}}}, "data.mixture"),
        ({"batch": {"partial": "drop"}}, "batch.partial"),
        ({"train": {"epochs": 1.5}}, "train.epochs is 1.5"),
        (
            {"data": {"train": [{"path": "{}", "epochs": 0.5}], "mixture": {"kind": "shares"}}},
            r"data.train\[0\].epochs",
        ),
        ({"data": {"train": [{"path": "{}", "share": 0}], **MIXED}}, "has a share"),
    ],
)
def test_what_a_stream_cannot_do(tmp_path: Path, qwen25: Path, chat: Path, over: Any, problem: str) -> None:
    over = json.loads(json.dumps(over).replace("{}", str(chat)))
    with pytest.raises(ConfigError, match=problem):
        prepare(streamed(tmp_path / "run", qwen25, str(chat), **over), Terminal("quiet"))
    assert not (tmp_path / "run").exists()


def test_answers_are_scored_beside_a_stream_without_the_baseline(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    over = {"data": {"eval": str(chat)}, "evaluate": {"generate": {"max_new_tokens": 2}}, "train": {"max_steps": 1}}
    held = runs.quiet_train(streamed(tmp_path / "run", qwen25, str(chat), **over)).summary["heldout"]
    assert "exact_match" in held["after"] and held["n"] > 0 and "baseline" not in held


def test_another_stream_is_refused_at_a_resume(tmp_path: Path, qwen25: Path) -> None:
    """A new shard as well: it would change the order of all."""
    train = [{"path": documents(tmp_path, 2, 9), "share": 2}]
    runs.quiet_train(streamed(tmp_path / "run", qwen25, train, data=MIXED, train={"max_steps": 1}))

    def resumes(field: str, train: Any = train, /, **over: Any) -> None:
        with pytest.raises(RunError, match=rf"\[RESUME\](?s:.*)  {field}: "):
            runs.quiet_train(streamed(tmp_path / "run", qwen25, train, **runs.merge({"data": MIXED}, over)))

    resumes("data.stream", data={"stream": {"window": 12}})
    resumes("data.stream", data={"stream": {"wrong": "drop"}})
    resumes(r"shares and passes \(share, epochs\)", [{**train[0], "share": 1}])
    resumes("data", [{**train[0], "max_samples": 3}])
    (tmp_path / "docs-2.jsonl").write_text('{"text": "new"}\n')
    resumes("num_shards")
    (tmp_path / "docs-2.jsonl").rename(tmp_path / "away.jsonl")
    out = runs.quiet_train(streamed(tmp_path / "run", qwen25, train, data={**MIXED, "workers": 1})).summary
    assert out["steps"] == 6


def test_check_and_show(tmp_path: Path, qwen25: Path, capsys: Any) -> None:
    """Check makes the first window and leaves nothing; a wrong row and too many drops are said."""
    train = documents(tmp_path, 2, 9)
    run = streamed(tmp_path / "run", qwen25, train)
    check_module.check(run, Terminal("json"))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [about] = [r for r in said if r.get("event") == "stream" or r.get("name") == "stream"]
    assert (about["read"], about["train"], about["ended"]) == (12, 12, False)
    assert not (tmp_path / "run").exists()
    check_module.check(streamed(tmp_path / "run", qwen25, train, data={"stream": {"window": 99}}, train={"epochs": 1}),
                       Terminal("normal"))  # fmt: skip
    text = capsys.readouterr()
    assert "the whole stream: read 18 = train 18" in text.out and "6 steps at most of 4 samples" in text.out
    assert "the stream ends after step 5 of 6" in text.out + text.err
    with pytest.raises(ConfigError, match="rows of a stream have no numbers"):
        show(run, 0, Terminal("quiet"))
    (tmp_path / "docs-0.jsonl").write_text('{"text": " "}\n' * 9)
    with pytest.raises(DataError, match="TOO_MANY_DROPPED"):
        check_module.check(run, Terminal("quiet"))
    (tmp_path / "docs-0.jsonl").write_text('{"text": "a"}\n{\n')
    with pytest.raises(DataError, match=r"\[JSON\].*docs-0.jsonl:2"):
        check_module.check(run, Terminal("quiet"))


def test_a_window_is_what_an_index_of_its_rows_is(tmp_path: Path, qwen25: Path, source: list[Any]) -> None:
    """The same measures of the same rows, whichever way they are read."""
    from lensmith.data.index import SCHEMA

    over = {"data": {"mixture": {"kind": "concat"}, "stream": {"window": 99}}, "train": {"epochs": 1}}
    spec, _ = spec_of(whole_run(tmp_path / "run", qwen25, source, **over), tmp_path / "windows")
    window = next(WindowMaker(spec).windows(0, None))
    index = prepare(whole_run(tmp_path / "run", qwen25, source, data={"stream": None}), Terminal("quiet")).read
    unlike = ("row", "line", "offset", "length")
    columns = [name for name in SCHEMA.names if name not in unlike]
    one, other = (
        sorted(i.table.select(columns).to_pylist(), key=lambda row: row["origin"]) for i in (window.index(spec), index)
    )
    assert one == other and len(one) == 32
    assert np.array_equal(np.sort(window.index(spec).column("digest")), np.sort(index.column("digest")))
