"""Training a stream: rows are read into windows, each measured, shuffled in itself and trained as a small source.

A window holds `stream.window` rows, and a few more until its samples fill whole steps. It is made by a process of its
own while the one before trains: rows go into a spool, measures into a table of the index's columns. So a window is a
pure function of where it begins, and a run goes on from (where its window began, steps taken in it).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lensmith.core.encoded import PackedRow
from lensmith.core.errors import DataError, RunError, UserError
from lensmith.data.index import SCHEMA, Index
from lensmith.data.lanes import Lanes, LaneSpec
from lensmith.data.load import Loader, LoaderSpec
from lensmith.data.measure import measure_row, wrong_row
from lensmith.data.pipeline import Known, Pipeline, StepRows, no_picture_known, start_pool
from lensmith.data.placement import Limits
from lensmith.data.plan import Plan, Step
from lensmith.data.readers.base import StreamRow
from lensmith.data.spool import SUFFIX, SpoolWriter
from lensmith.data.workers import Workers, end_with_parent

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

STORED = SCHEMA.insert(0, pa.field("file", pa.int32()))
MORE = 8
"""A window reads at most so many steps' worth of rows beyond its size to fill its last step."""
_INDEX, _ROWS = "index.arrow", f"rows{SUFFIX}"


@dataclass(frozen=True)
class StreamSpec:
    """All that decides what a stream gives. `loader.files` has one entry per source and folder of pictures, with its
    format; `samples` and `tokens` are the batch rule."""

    loader: LoaderSpec
    lanes: tuple[LaneSpec, ...]
    seed: int
    window: int
    samples: int | None
    tokens: int | None
    folder: Path
    drop_wrong: bool = False


@dataclass(frozen=True)
class Window:
    """A window on disk: its number, where it begins, and whether the stream ends with it."""

    number: int
    begin: dict[str, Any]
    ended: bool

    def folder(self, spec: StreamSpec) -> Path:
        return window_folder(spec.folder, self.number)

    def index(self, spec: StreamSpec) -> Index:
        spool = str(self.folder(spec) / _ROWS)
        files = tuple(replace(f, path=spool) for f in spec.loader.files)
        table = read_window(self.folder(spec))
        each = tuple(table.filter(pc.equal(table["file"], n)).drop_columns(["file"]) for n in range(len(files)))
        return Index(each, replace(spec.loader, files=files))


def window_folder(folder: Path, number: int) -> Path:
    return folder / f"window-{number:07d}"


def window_folders(folder: Path, last: int | None = None) -> list[Path]:
    """The windows that were made, in order, up to number `last`."""
    found = sorted(file.parent for file in folder.glob(f"window-*/{_INDEX}"))
    return found if last is None else [f for f in found if number_of(f) <= last]


def number_of(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def forget_windows(folder: Path, last: int) -> None:
    """Remove what was made behind window `last`, and the rows of all."""
    for found in folder.glob("window-*"):
        if number_of(found) > last:
            shutil.rmtree(found)
        else:
            (found / _ROWS).unlink(missing_ok=True)


def read_window(folder: Path) -> pa.Table:
    with pa.memory_map(str(folder / _INDEX)) as source:
        return pa.ipc.open_file(source).read_all()


def trained_rows(table: pa.Table) -> np.ndarray:
    """The row of a window's table of each sample, as the samples of `Window.index` are numbered."""
    rows = np.argsort(table["file"].to_numpy(), kind="stable")
    return rows[pc.equal(table["verdict"], "train").to_numpy()[rows]]


class WindowMaker:
    """Makes windows one after the other."""

    def __init__(self, spec: StreamSpec):
        self.spec = spec
        self.loader = spec.loader.build()

    def windows(self, number: int, begin: dict[str, Any] | None) -> Iterator[Window]:
        """From window `number` on, which begins at `begin` (None: at the start of the stream).

        Raises DataError for a wrong row, unless `drop_wrong`, and for a shard that cannot be had; RunError WINDOW.
        """
        lanes = Lanes(self.spec.lanes, self.spec.seed)
        if begin is not None:
            lanes.restore(begin)
        while True:
            try:
                window = self._make(number, lanes)
            except OSError as error:  # those of the sources are DataErrors
                raise RunError("WINDOW", f"the window cannot be written: {error.strerror or error}",
                               where=str(window_folder(self.spec.folder, number)),
                               remedy="free some space, or lower data.stream.window") from None  # fmt: skip
            if window is not None:
                yield window
            if window is None or window.ended:
                return
            number += 1

    def _make(self, number: int, lanes: Lanes) -> Window | None:
        begin, drawn = lanes.state(), lanes.draw()
        if drawn is None:
            return None
        folder = window_folder(self.spec.folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        spool = SpoolWriter(folder / _ROWS)
        measured: list[dict[str, Any]] = []
        read = trained = 0
        try:
            while drawn is not None:
                rows = self._measure(*drawn, spool)
                read += 1
                trained += sum(row["verdict"] == "train" for row in rows)
                measured += [{**row, "file": drawn[0]} for row in rows]
                if self._is_full(read, trained):
                    break
                drawn = lanes.draw()
        finally:
            spool.close()
        _write_index(folder, pa.Table.from_pylist(measured, schema=STORED))
        return Window(number, begin, drawn is None)

    def _is_full(self, read: int, trained: int) -> bool:
        window, step = self.spec.window, self.spec.samples or 1
        return read >= window and ((trained > 0 and trained % step == 0) or read >= window + MORE * step)

    def _measure(self, file: int, drawn: StreamRow, spool: SpoolWriter) -> list[dict[str, Any]]:
        if drawn.row is None:
            assert drawn.error is not None
            rows = [wrong_row(drawn.origin, drawn.error)]
        else:
            rows = measure_row(self.loader, file, spool.add(drawn.row, drawn.origin), drawn.origin, drawn.row, {})
        for row in rows:
            if row["verdict"] == "fail":
                if not self.spec.drop_wrong:
                    problem = str(row["detail"]).removeprefix(f"[{row['reason']}] ")
                    raise DataError(row["reason"], problem, remedy="mend the row, or set data.stream.wrong: drop")
                row |= {"verdict": "drop", "detail": str(row["detail"]).split("\n", 1)[0]}
        return rows


def _write_index(folder: Path, table: pa.Table) -> None:
    """All or nothing: a run that goes on makes its window again, and this table is a part of the ledger."""
    temporary = folder / f".{_INDEX}"
    with open(temporary, "wb") as file:
        with pa.ipc.new_file(file, STORED) as out:
            out.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _INDEX)


@dataclass
class StreamPipeline:
    """Steps of packed rows out of a stream; what `Pipeline` is to an index. Close `steps`: it ends the processes."""

    spec: StreamSpec
    limits: Limits
    workers: int = 0
    ahead: int = 2
    known: Known = no_picture_known
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        self._now: Pipeline | None = None
        self._loader: Loader | None = None

    def steps(self, start: int = 0, state: dict[str, Any] | None = None) -> Iterator[StepRows]:
        """From step `start` on; `state` is what `Step.stream` said after the step before. Raises as `WindowMaker` and
        `Pipeline` do, and RunError RESUME where the window of `state` has other rows now."""
        number, begin, used = (state["window"], state["begin"], state["used"]) if state else (0, None, 0)
        samples = state["samples"] if state else 0
        pool = start_pool(self.workers, self.spec.loader) if self.workers else None
        windows = Background(self.spec, number, begin) if self.workers else None
        last, asked = number, time.perf_counter()
        try:
            for window in windows or WindowMaker(self.spec).windows(number, begin):
                last = window.number
                index = window.index(self.spec)
                rows_are = _mark(index)
                if state is not None and last == number and rows_are != state["rows"]:
                    raise self._changed(number)
                passes = float(min(lane["epoch"] for lane in _used_lanes(self.spec, window)))
                for rows in self._of_window(window, index, used, pool):
                    used += 1
                    samples += len(rows.step.members)
                    about = {
                        "window": last, "begin": window.begin, "used": used, "samples": samples, "rows": rows_are,
                    }  # fmt: skip
                    rows.step = Step(start, rows.step.members, passes, samples, about)
                    rows.wait_seconds = time.perf_counter() - asked
                    start += 1
                    yield rows
                    asked = time.perf_counter()
                used = 0
                (window.folder(self.spec) / _ROWS).unlink(missing_ok=True)
            if state is not None and self._now is None:
                raise self._changed(number)
        finally:
            if windows is not None:
                windows.close()
            if pool is not None:
                pool.shutdown()
            forget_windows(self.spec.folder, last)

    def _changed(self, number: int) -> RunError:
        return RunError("RESUME", f"the rows of window {number} are not those that the checkpoint was made with",
                        where=str(window_folder(self.spec.folder, number)),
                        remedy="restore the training data, or start in a new output folder")  # fmt: skip

    def _of_window(self, window: Window, index: Index, used: int, pool: Workers | None) -> Iterator[StepRows]:
        if not len(index.trainable):
            if not window.ended:
                raise _nothing_trains(index)
            return
        if self._now is not None:
            self._loader = self._now.loader
        self._now = Pipeline(
            index, window_plan(self.spec, window.number, index), self.limits, self.workers, self.ahead, self.known,
            self.rank, self.ranks, pool=pool, loader=self._loader,
        )  # fmt: skip
        yield from self._now.steps(used)

    def reread(self, members: tuple[int, ...], others: Sequence[int] = ()) -> PackedRow:
        """A row of the window in use, with all its pixels."""
        assert self._now is not None
        return self._now.reread(members, others)


def window_plan(spec: StreamSpec, number: int, index: Index) -> Plan:
    """The steps of a window."""
    return Plan(
        num_samples=len(index.trainable), seed=(spec.seed * 1_000_003 + number) % 2**63, samples=spec.samples,
        tokens=spec.tokens, epochs=1, num_tokens=index.column("tokens") if spec.tokens else None,
    )  # fmt: skip


def _mark(index: Index) -> str:
    """What the samples of a window say and show, in short."""
    return hashlib.blake2b(np.ascontiguousarray(index.column("digest")).data, digest_size=8).hexdigest()


def _used_lanes(spec: StreamSpec, window: Window) -> list[dict[str, Any]]:
    lanes = zip(window.begin["lanes"], spec.lanes, strict=True)
    return [state for state, lane in lanes if lane.share > 0 and lane.shards]


def _nothing_trains(index: Index) -> DataError:
    """A stream without end could go on like this for ever."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(index.dropped["reason"].to_pylist()).most_common())
    first = "".join(
        f"\n  {r['origin']}: {r['reason']} {r['detail'] or ''}" for r in index.dropped.slice(0, 10).to_pylist()
    )
    return DataError("NO_SAMPLES", f"none of {index.num_rows} rows of a window can be trained: {reasons}{first}",
                     remedy="TOO_LONG: raise data.max_tokens or lower data.max_pixels; else mend the rows")  # fmt: skip


class Background:
    """Windows made by a process of its own: the next one while the one before is in use."""

    def __init__(self, spec: StreamSpec, number: int, begin: dict[str, Any] | None):
        context = multiprocessing.get_context("fork")
        self._mine, its = context.Pipe()
        self._process = context.Process(
            target=_make_windows, args=(spec, number, begin, its, self._mine), daemon=True, name="lensmith-stream"
        )
        self._process.start()
        its.close()

    def __iter__(self) -> Iterator[Window]:
        """Raises what the process met, and `RunError` DATA_WORKER when it died."""
        while True:
            wait([self._mine, self._process.sentinel])
            try:
                found = self._mine.recv()
                if found is None:
                    return
                if isinstance(found, UserError):
                    raise found
                self._mine.send(None)  # make the next one
            except (EOFError, ConnectionError):
                raise self._died() from None
            yield found

    def _died(self) -> Exception:
        self._process.join()
        code = self._process.exitcode or 0
        if code >= 0:
            return RuntimeError("the process that reads the stream failed; its traceback stands above")
        return RunError("DATA_WORKER", f"the process that reads the stream died of {signal.Signals(-code).name}",
                        remedy="look for an out-of-memory kill; lower data.stream.window")  # fmt: skip

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._mine.close()


def _make_windows(spec: StreamSpec, number: int, begin: dict[str, Any] | None, out: Any, parents: Any) -> None:
    parents.close()
    # forked with the loop's handlers. Ctrl-C reaches every process of a terminal: the loop answers it, with a save
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        for window in WindowMaker(spec).windows(number, begin):
            out.send(window)
            out.recv()
        out.send(None)
    except UserError as error:
        out.send(error)
    except (EOFError, ConnectionError):  # nobody listens any more
        pass
