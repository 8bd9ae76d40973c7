"""Training a stream: rows are read into windows, each measured, shuffled in itself and trained as a small source.

A window holds `stream.window` rows, and a few more until its samples fill whole steps. It is made by a process of its
own while the one before trains: rows go into a spool, measures into a table of the index's columns. So a window is a
pure function of where it begins, and a run goes on from (where its window began, steps taken in it).
"""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from lensmith.core.encoded import PackedRow
from lensmith.core.errors import DataError, RunError, UserError
from lensmith.data.index import SCHEMA, Index
from lensmith.data.index_build import measure_row, wrong_row
from lensmith.data.lanes import Lanes, LaneSpec
from lensmith.data.load import Loader, LoaderSpec
from lensmith.data.pipeline import Known, Pipeline, StepRows, end_with_parent, no_picture_known, start_pool
from lensmith.data.placement import Limits
from lensmith.data.plan import Plan, Step
from lensmith.data.spool import SUFFIX, SpoolWriter

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

STORED = SCHEMA.insert(0, pa.field("file", pa.int32()))
MORE = 8
"""A window reads at most so many steps' worth of rows beyond its size to fill its last step."""


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
    """A window on disk: its number, where it begins and where the next one does."""

    number: int
    begin: dict[str, Any]
    end: dict[str, Any]
    ended: bool

    def folder(self, spec: StreamSpec) -> Path:
        return window_folder(spec.folder, self.number)

    def index(self, spec: StreamSpec) -> Index:
        spool = str(self.folder(spec) / f"rows{SUFFIX}")
        files = tuple(replace(f, path=spool) for f in spec.loader.files)
        table = read_window(self.folder(spec))
        each = tuple(table.filter(pc.equal(table["file"], n)).drop_columns(["file"]) for n in range(len(files)))
        return Index(each, replace(spec.loader, files=files))


def window_folder(folder: Path, number: int) -> Path:
    return folder / f"window-{number:07d}"


def read_window(folder: Path) -> pa.Table:
    with pa.memory_map(str(folder / "index.arrow")) as source:
        return pa.ipc.open_file(source).read_all()


class WindowMaker:
    """Makes windows one after the other."""

    def __init__(self, spec: StreamSpec):
        self.spec = spec
        self.loader = spec.loader.build()

    def windows(self, number: int, begin: dict[str, Any] | None) -> Iterator[Window]:
        """From window `number` on, which begins at `begin` (None: at the start of the stream).

        Raises DataError for a wrong row, unless `drop_wrong`.
        """
        lanes = Lanes(self.spec.lanes, self.spec.seed)
        if begin is not None:
            lanes.restore(begin)
        while True:
            window = self._make(number, lanes)
            if window is not None:
                yield window
            if window is None or window.ended:
                return
            number += 1

    def _make(self, number: int, lanes: Lanes) -> Window | None:
        spec, begin = self.spec, lanes.state()
        folder = window_folder(spec.folder, number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        spool = SpoolWriter(folder / f"rows{SUFFIX}")
        measured: list[dict[str, Any]] = []
        read = trained = 0
        step = spec.samples or 1
        ended = False
        while read < spec.window or (trained % step and read < spec.window + MORE * step):
            drawn = lanes.draw()
            if drawn is None:
                ended = True
                break
            rows = self._measure(*drawn, spool)
            read += 1
            trained += sum(row["verdict"] == "train" for row in rows)
            measured += [{**row, "file": drawn[0]} for row in rows]
        spool.close()
        if not read:
            shutil.rmtree(folder)
            return None
        with pa.ipc.new_file(str(folder / "index.arrow"), STORED) as out:
            out.write_table(pa.Table.from_pylist(measured, schema=STORED))
        return Window(number, begin, lanes.state(), ended)

    def _measure(self, file: int, drawn: Any, spool: SpoolWriter) -> list[dict[str, Any]]:
        error = drawn.error
        rows: list[dict[str, Any]] = []
        if error is None:
            try:
                ref = spool.add(drawn.row, drawn.origin)
                rows = measure_row(self.loader, file, ref, drawn.origin, drawn.row, {})
            except DataError as found:
                error = found
        if error is not None:
            rows = [wrong_row(drawn.origin, error)]
        for row in rows:
            if row["verdict"] == "fail":
                if not self.spec.drop_wrong:
                    raise DataError(row["reason"], row["detail"], remedy="mend the row, or set data.stream.wrong: drop")
                row |= {"verdict": "drop", "detail": str(row["detail"]).split("\n", 1)[0]}
        return rows


@dataclass
class StreamPipeline:
    """Steps of packed rows out of a stream; what `Pipeline` is to an index."""

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
        """From step `start` on; `state` is what `Step.stream` said after the step before."""
        number, begin, used = (state["window"], state["begin"], state["used"]) if state else (0, None, 0)
        pool = start_pool(self.workers, self.spec.loader) if self.workers else None
        windows = (Background if self.workers else _made_here)(self.spec, number, begin)
        samples = state["samples"] if state else 0
        try:
            for window in windows:
                index = window.index(self.spec)
                for rows in self._of_window(window, index, used, pool):
                    used += 1
                    samples += len(rows.step.members)
                    about = {"window": window.number, "begin": window.begin, "used": used, "samples": samples}
                    passes = min((lane["epoch"] for lane in window.begin["lanes"]), default=0)
                    rows.step = Step(start, rows.step.members, float(passes), samples, about)
                    start += 1
                    yield rows
                used = 0
                (window.folder(self.spec) / f"rows{SUFFIX}").unlink(missing_ok=True)
        finally:
            if isinstance(windows, Background):
                windows.close()
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _of_window(
        self, window: Window, index: Index, used: int, pool: ProcessPoolExecutor | None
    ) -> Iterator[StepRows]:
        if not len(index.trainable):
            return
        plan = Plan(
            num_samples=len(index.trainable), seed=(self.spec.seed * 1_000_003 + window.number) % 2**63,
            samples=self.spec.samples, tokens=self.spec.tokens, epochs=1,
            num_tokens=index.column("tokens") if self.spec.tokens else None,
        )  # fmt: skip
        if self._loader is None and not self.workers:
            self._loader = index.spec.build()
        self._now = Pipeline(
            index, plan, self.limits, self.workers, self.ahead, self.known, self.rank, self.ranks,
            pool=pool, loader=self._loader,
        )  # fmt: skip
        yield from self._now.steps(used)

    def reread(self, members: tuple[int, ...]) -> PackedRow:
        """A row of the window in use, with all its pixels."""
        assert self._now is not None
        return self._now.reread(members)


def _made_here(spec: StreamSpec, number: int, begin: dict[str, Any] | None) -> Iterator[Window]:
    return WindowMaker(spec).windows(number, begin)


class Background:
    """Windows made by a process of its own, one ahead."""

    def __init__(self, spec: StreamSpec, number: int, begin: dict[str, Any] | None):
        context = multiprocessing.get_context("fork")
        self._queue: Any = context.Queue(1)
        self._process = context.Process(target=_make_windows, args=(spec, number, begin, self._queue), daemon=True)
        self._process.start()

    def __iter__(self) -> Iterator[Window]:
        """Raises what the process met, and `RunError` DATA_WORKER when it died."""
        while True:
            try:
                found = self._queue.get(timeout=1.0)
            except queue.Empty:
                if self._process.is_alive():
                    continue
                raise RunError("DATA_WORKER", "the process that reads the stream died",
                               remedy="look for an out-of-memory kill; lower data.stream.window") from None  # fmt: skip
            if isinstance(found, UserError):
                raise found
            if found is None:
                return
            yield found

    def close(self) -> None:
        self._process.kill()  # it has the loop's signal handlers, which answer SIGTERM by remembering it
        self._process.join()


def _make_windows(spec: StreamSpec, number: int, begin: dict[str, Any] | None, out: Any) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        for window in WindowMaker(spec).windows(number, begin):
            out.put(window)
        out.put(None)
    except UserError as error:
        out.put(error)
