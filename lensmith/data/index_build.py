"""Making the index: each file of the sources measured once, by several processes, and kept on disk as Arrow.

Rows that are wrong in a way that is never skipped are collected and reported together, and then nothing of their file
is kept.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lensmith.core.errors import DataError, RunError
from lensmith.data.index import SCHEMA, Index
from lensmith.data.index_store import Writer, changed_rows, open_stored, read_stored, stored_at
from lensmith.data.load import Loader, LoaderSpec
from lensmith.data.measure import measure
from lensmith.data.readers import RowRef
from lensmith.data.workers import Workers

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

CHUNK = 256
PARALLEL_FROM = 2000
"""Below this many rows one process is faster than starting several."""
SHOWN_FAILURES = 10
_BUCKET = 1 << 22

Progress = Callable[[int, int], None]
"""(rows done, rows in all as far as known)."""


def build_index(spec: LoaderSpec, cache: Path | None, *, workers: int = 1, progress: Progress | None = None) -> Index:
    """Index every file of `spec`, from the cache where nothing changed. Raises one `DataError` for all wrong rows."""
    if cache is None:  # what is mapped stays readable when its file has no name any more
        with tempfile.TemporaryDirectory(prefix="lensmith-index-") as folder:
            return replace(_build(spec, Path(folder), workers, progress), space=None)
    return _build(spec, cache, workers, progress)


def _build(spec: LoaderSpec, cache: Path, workers: int, progress: Progress | None) -> Index:
    wrong = Wrong()
    told = Told(spec, progress)
    stored: list[Path] = []
    with Pool(spec, workers) as pool:
        for number in range(len(spec.files)):
            path = stored_at(spec, number, cache)
            wrong.add(index_file(spec, number, path, pool, told))
            stored.append(path)
            told.file_done(number)
    wrong.refuse()
    index = Index(tuple(map(open_stored, stored)), spec, space=cache)
    _refuse_duplicate_ids(index)
    return index


def index_file(spec: LoaderSpec, number: int, stored: Path, pool: Pool, told: Told) -> Wrong:
    """Make or renew the stored index of one file. With wrong rows, nothing is stored."""
    known = read_stored(stored)
    old = None if known is None else changed_rows(known, spec.decode)
    if known is not None and old is None:
        told.rows(known.num_rows)
        return Wrong()
    wrong = Wrong()
    loader = pool.loader
    with Writer(stored) as out:
        if known is None or old is None:
            scan = _Scan(loader, number)
            for batch in pool.measure(loader, number, scan, told):
                out.add(wrong.split(batch))
            if scan.error is not None:
                wrong.broken(scan.error)
        else:
            _renew(loader, number, known, old, pool, told, wrong, out)
        if wrong.count:
            out.give_up()
    return wrong


def _renew(
    loader: Loader, number: int, known: pa.Table, old: np.ndarray, pool: Pool, told: Told, wrong: Wrong, out: Writer
) -> None:
    """The rows in `old` measured again, in their places."""
    values = pa.array(old)
    places = known.select(["row", "line", "offset", "length"])
    before = places.filter(pc.and_(pc.is_in(known["row"], value_set=values), pc.equal(known["piece"], 0)))
    refs = [RowRef(**r) for r in before.rename_columns(["number", "line", "offset", "length"]).to_pylist()]
    after = pa.Table.from_batches(
        (wrong.split(batch) for batch in pool.measure(loader, number, refs, told)), schema=SCHEMA
    )
    for batch in known.to_batches():
        kept = pa.Table.from_batches([batch.filter(pc.invert(pc.is_in(batch["row"], value_set=values)))])
        own = pc.less_equal(after["row"], batch["row"][-1])
        merged = pa.concat_tables([kept, after.filter(own)]).sort_by([("row", "ascending"), ("piece", "ascending")])
        after = after.filter(pc.invert(own))
        for part in merged.combine_chunks().to_batches():
            out.add(part)


class _Scan:
    """The rows of a file in order. A file that breaks off is one more wrong row behind those found before."""

    def __init__(self, loader: Loader, number: int):
        self.loader, self.number = loader, number
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[RowRef]:
        file = self.loader.spec.files[self.number]
        count = 0
        try:
            rows = islice(self._refs(file.chosen, file.max_samples), None if file.chosen else file.max_samples)
            for ref in rows:
                count += 1
                yield ref
        except DataError as error:
            if not count:
                raise
            self.error = error

    def _refs(self, chosen: tuple[int, int] | None, most: int | None) -> Iterator[RowRef]:
        rows = self.loader.rows(self.number)
        if chosen is None:
            return rows.scan()
        count, seed = chosen
        every = np.random.RandomState(seed).permutation(sum(1 for _ in rows.scan()))
        picked = set(every[: min(count, most or count)].tolist())
        return (ref for ref in rows.scan() if ref.number in picked)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """Progress over all files: the rows in all are reckoned from the bytes that are read."""

    spec: LoaderSpec
    progress: Progress | None
    done: int = 0
    read: float = 0.0
    now: float = 0.0
    total: float = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [max(1, sum(p.stat().st_size for p in self.spec.open(n).content_files())) for n in self._numbers()]
        self.total = sum(self.sizes)

    def _numbers(self) -> range:
        return range(len(self.spec.files) if self.progress is not None else 0)

    def rows(self, count: int, byte: int = 0) -> None:
        self.done += count
        self.now = max(self.now, byte)
        self._tell()

    def file_done(self, number: int) -> None:
        if self.progress is not None:
            self.read, self.now = self.read + self.sizes[number], 0.0
            self._tell()

    def _tell(self) -> None:
        if self.progress is not None and self.done:
            share = min(1.0, (self.read + self.now) / self.total)
            self.progress(self.done, max(self.done, round(self.done / share)) if share else 0)


class Pool:
    """Processes that measure chunks of rows; none for `workers` 1, and none before there is enough to do."""

    def __init__(self, spec: LoaderSpec, workers: int):
        self.spec, self.workers = spec, workers
        self._pool: Workers | None = None
        self._measured = 0

    @cached_property
    def loader(self) -> Loader:
        """This process's own; building one parses the tokenizer, so it is not made for every file."""
        return self.spec.build()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def measure(self, loader: Loader, number: int, refs: Iterable[RowRef], told: Told) -> Iterator[pa.RecordBatch]:
        """The index rows of `refs`, in order."""
        iterator = iter(refs)
        first = list(islice(iterator, PARALLEL_FROM))
        if first:
            _settle_format(loader, number)
        chunks = _chunks(chain(first, iterator))
        self._measured += len(first)  # many small files are as much to do as a large one
        several = self.workers > 1 and (self._pool is not None or self._measured >= PARALLEL_FROM)
        for refs_, batch in self._spread(number, chunks) if several else _alone(loader, number, chunks):
            told.rows(len(refs_), refs_[-1].offset + refs_[-1].length)
            yield batch

    def _spread(self, number: int, chunks: Iterator[list[RowRef]]) -> Iterator[tuple[list[RowRef], pa.RecordBatch]]:
        if self._pool is None:
            self._pool = Workers(self.workers, _start_worker, (self.spec,))
        waiting: deque[tuple[list[RowRef], Future[pa.RecordBatch]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, self._pool.submit(_measure_in_worker, number, chunk)))
                if len(waiting) > 4 * self.workers:
                    refs, future = waiting.popleft()
                    yield refs, future.result()
            while waiting:
                refs, future = waiting.popleft()
                yield refs, future.result()
        except BrokenProcessPool:
            raise RunError("DATA_WORKER", "a process that indexes the data died", where=self.spec.files[number].path,
                           remedy="look for an out-of-memory kill; lower data.max_row_bytes") from None  # fmt: skip


def _settle_format(loader: Loader, number: int) -> None:
    try:
        loader.detect(number)
    except DataError as error:
        if error.code == "UNKNOWN_FORMAT":  # else each row would repeat it; anything else comes up again with its row
            raise


def _chunks(refs: Iterator[RowRef]) -> Iterator[list[RowRef]]:
    while chunk := list(islice(refs, CHUNK)):
        yield chunk


def _alone(
    loader: Loader, number: int, chunks: Iterator[list[RowRef]]
) -> Iterator[tuple[list[RowRef], pa.RecordBatch]]:
    for chunk in chunks:
        yield chunk, measure_chunk(loader, number, chunk)


_worker: dict[str, Loader] = {}


def _start_worker(spec: LoaderSpec) -> None:
    _worker["loader"] = spec.build()


def _measure_in_worker(number: int, chunk: list[RowRef]) -> pa.RecordBatch:
    return measure_chunk(_worker["loader"], number, chunk)


def measure_chunk(loader: Loader, number: int, refs: Sequence[RowRef]) -> pa.RecordBatch:
    rows = [row for ref in refs for row in measure(loader, number, ref)]
    if loader.spec.drop_wrong:
        rows = [
            {**row, "verdict": "drop"} if row["verdict"] == "fail" and may_drop(row["reason"]) else row for row in rows
        ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def may_drop(reason: str) -> bool:
    """Whether a wrong row may be dropped: not one that reaches where the run file did not allow it."""
    return not reason.startswith(("PATH_", "URL_"))


# --- wrong rows -------------------------------------------------------------------------------------------------------


@dataclass
class Wrong:
    """Rows that are wrong, over all files: how many, and the first of them in words."""

    count: int = 0
    rows: int = 0
    code: str = ""
    first: list[str] = field(default_factory=list[str])

    def split(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of `batch` that are not wrong."""
        self.rows += pc.sum(pc.equal(batch["piece"], 0)).as_py() or 0
        fails = pc.equal(batch["verdict"], "fail")
        failed = batch.filter(fails)
        if not len(failed):
            return batch
        for row in failed.select(["reason", "detail"]).slice(0, SHOWN_FAILURES).to_pylist():
            self._one(row["reason"], row["detail"])
        self.count += len(failed)
        return batch.filter(pc.invert(fails))

    def broken(self, error: DataError) -> None:
        self.rows, self.count = self.rows + 1, self.count + 1
        self._one(error.code, error.render())

    def _one(self, code: str, detail: str) -> None:
        self.code = self.code or code
        if len(self.first) < SHOWN_FAILURES:
            self.first.append(detail)

    def add(self, other: Wrong) -> None:
        self.count, self.rows = self.count + other.count, self.rows + other.rows
        self.code = self.code or other.code
        self.first = (self.first + other.first)[:SHOWN_FAILURES]

    def refuse(self) -> None:
        """Raises `DataError` if there is any."""
        if self.count:
            more = f"\n... and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
            lines = "\n".join(self.first)
            raise DataError(self.code, f"{self.count:,} of {self.rows:,} rows are wrong:\n{lines}{more}")


def _refuse_duplicate_ids(index: Index) -> None:
    """Within a source: data sets that are mixed number their rows independently."""
    for number, source in enumerate(index.sources):
        files = [f for f in range(len(index.tables)) if index.source_of[f] == number]
        twice = _twice([index.tables[f]["id_hash"] for f in files])
        if not len(twice):
            continue
        where: dict[str, list[str]] = {}
        for f in files:
            table = index.tables[f]
            rows = table.filter(
                pc.and_(pc.is_in(table["id_hash"], value_set=pa.array(twice)), pc.equal(table["piece"], 0))
            )
            for row in rows.select(["id", "origin"]).to_pylist():
                where.setdefault(row["id"], []).append(row["origin"])
        lines = [f"{key!r} stands in {', '.join(at[:5])}" for key, at in where.items() if len(at) > 1]
        if not lines:  # two ids of one hash
            continue
        more = f"\n... and {len(lines) - SHOWN_FAILURES:,} more" if len(lines) > SHOWN_FAILURES else ""
        remedy = (
            "give each row its own id; if these are no ids, set the id_column of this source's format to a key that no "
            "row has"
        )
        shown = "\n".join(lines[:SHOWN_FAILURES])
        raise DataError("DUP_ID", f"{len(lines):,} ids of {source!r} stand twice:\n{shown}{more}", remedy=remedy)


def _twice(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """Values but 0 that stand twice, found in parts of about `_BUCKET` rows, so that memory does not grow."""
    parts = max(1, sum(len(c) for c in columns) // _BUCKET)
    found: list[np.ndarray] = []
    for part in range(parts):
        values: list[np.ndarray] = []
        for chunk in chain.from_iterable(c.chunks for c in columns):
            own = pc.fill_null(chunk, 0).to_numpy(zero_copy_only=False)
            values.append(own[(own != 0) & (own.view(np.uint64) % np.uint64(parts) == part)])
        each = np.sort(np.concatenate(values)) if values else np.zeros(0, np.int64)
        found.append(np.unique(each[1:][each[1:] == each[:-1]]))
    return np.concatenate(found)
