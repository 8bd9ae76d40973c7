"""Making the index: each file of the sources measured once, by several processes, and kept on disk as Arrow.

The index of a file is cached under a fingerprint of the file's content and of all that changes the counts. Rows that
are wrong in a way that is never skipped are collected and reported together, and then nothing is kept. Pictures are
files of their own: a sample whose picture files changed since (by size and time), and one that was dropped and has
pictures, is measured again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lensmith.core.encoded import IMAGE, Encoded
from lensmith.core.errors import ConfigError, DataError, Drop, RunError
from lensmith.core.sample import Image, Sample, Text
from lensmith.core.version import VERSION as LENSMITH
from lensmith.data.collate import Pictures
from lensmith.data.index import SCHEMA, Index, cut_columns
from lensmith.data.load import Loader, LoaderSpec, Seen, digest_of, id_hash, look_of, portable, said_by
from lensmith.data.readers import RowRef
from lensmith.data.split import Cut

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

VERSION = 5
CHUNK = 256
STORED_ROWS = 1 << 14
"""Rows of one batch in a stored index."""
KNOWN_FILES = 1 << 18
"""Picture files whose state is remembered while the stored samples are compared with them."""
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
    index = Index(tuple(map(_open, stored)), spec, space=cache)
    _refuse_duplicate_ids(index)
    return index


def stored_at(spec: LoaderSpec, number: int, cache: Path) -> Path:
    return cache / f"index-{_fingerprint(spec, number, cache)}.arrow"


def index_file(spec: LoaderSpec, number: int, stored: Path, pool: Pool, told: Told) -> Wrong:
    """Make or renew the stored index of one file. With wrong rows, nothing is stored."""
    known = _read_stored(stored)
    old = None if known is None else _changed_rows(known, spec.decode)
    if known is not None and old is None:
        told.rows(known.num_rows)
        return Wrong()
    wrong = Wrong()
    loader = pool.loader
    with _Writer(stored) as out:
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
    loader: Loader, number: int, known: pa.Table, old: np.ndarray, pool: Pool, told: Told, wrong: Wrong, out: _Writer
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
        most = self.loader.spec.files[self.number].max_samples
        count = 0
        try:
            for ref in islice(self.loader.rows(self.number).scan(), most):
                count += 1
                yield ref
        except DataError as error:
            if not count:
                raise
            self.error = error


# --- what is stored ---------------------------------------------------------------------------------------------------


def _open(stored: Path) -> pa.Table:
    with pa.memory_map(str(stored)) as source:
        return pa.ipc.open_file(source).read_all()


def _read_stored(stored: Path) -> pa.Table | None:
    if not stored.is_file():
        return None
    try:
        table = _open(stored)
    except (pa.ArrowException, OSError):  # cut short by a crash of the machine: as if it were not there
        return None
    return table if table.schema.equals(SCHEMA) else None


class _Writer:
    """A stored index that appears when it is whole, in batches of `STORED_ROWS`."""

    def __init__(self, stored: Path):
        self.stored = stored
        self._temporary = stored.with_suffix(f".{os.getpid()}.tmp")
        self._given_up = False
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> _Writer:
        with _CacheErrors(self.stored):
            self.stored.parent.mkdir(parents=True, exist_ok=True)
            self._out = pa.ipc.new_file(str(self._temporary), SCHEMA)
        return self

    def add(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        if sum(map(len, self._waiting)) >= STORED_ROWS:
            self._flush()

    def give_up(self) -> None:
        self._given_up = True

    def _flush(self) -> None:
        with _CacheErrors(self.stored):
            if self._waiting:
                self._out.write_table(pa.Table.from_batches(self._waiting).combine_chunks(), STORED_ROWS)
                self._waiting.clear()

    def __exit__(self, kind: Any, *exc: object) -> None:
        try:
            with _CacheErrors(self.stored):
                if kind is None and not self._given_up:
                    self._flush()
                    self._out.close()
                    os.replace(self._temporary, self.stored)
                else:
                    self._out.close()
        finally:
            self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _CacheErrors:
    stored: Path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            problem = f"the index cache cannot be written: {error.strerror or error}"
            remedy = "set data.cache to a folder with space"
            raise ConfigError("CACHE", problem, where=str(self.stored.parent), remedy=remedy) from None


def _fingerprint(spec: LoaderSpec, number: int, cache: Path) -> str:
    """Content of the file and everything that changes its counts, or whether its rows are read at all."""
    f = spec.files[number]
    said = {
        "version": [VERSION, LENSMITH], "family": repr(spec.family), "path": [f.path, f.shown], "base": f.base,
        "tokenizer": [spec.tokenizer_digest, spec.text_tokens], "roots": spec.roots,
        "format": f.format.model_dump() if f.format else None, "limits": spec.limits.model_dump(),
        "length": [spec.max_tokens, spec.too_long, spec.max_row_bytes], "max_samples": f.max_samples,
        "videos": spec.videos.model_dump(), "dataset": [f.split, f.subset, f.revision],
        "documents": asdict(spec.documents), "content": [_content(p, cache) for p in spec.open(number).content_files()],
    }  # fmt: skip
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _content(path: Path, cache: Path) -> str:
    """Hash of a file's content, remembered under its size and time: a terabyte is not read before every start."""
    found = path.stat()
    key = hashlib.blake2b(
        f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ino}".encode(), digest_size=16
    ).hexdigest()
    known = cache / f"content-{key}.txt"
    if known.is_file() and len(text := known.read_text()) == 32:
        return text
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    # a file written in the same tick of the clock could change without a trace: it is read again next time
    if os.stat(path).st_mtime_ns == found.st_mtime_ns and _settled(found.st_mtime_ns):
        with _CacheErrors(known):
            cache.mkdir(parents=True, exist_ok=True)
            temporary = known.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(h.hexdigest())
            os.replace(temporary, known)
    return h.hexdigest()


def _settled(mtime_ns: int) -> bool:
    import time

    return time.time_ns() - mtime_ns > 2_000_000_000


def _changed_rows(table: pa.Table, decode: bool) -> np.ndarray | None:
    """Numbers of the rows to measure again; None for none. With `decode`, also those whose pictures were not."""
    states: dict[str, str] = {}  # samples of one picture are mostly neighbours
    found: list[int] = []
    for batch in table.select(["row", "verdict", "images", "videos", "handles", "stamp", "decoded"]).to_batches():
        shows = pc.or_(pc.greater(batch["images"], 0), pc.greater(batch["videos"], 0))
        unknown = pc.and_(shows, pc.invert(pc.fill_null(batch["decoded"], False)))
        again = batch.filter(unknown if decode else pc.and_(pc.equal(batch["verdict"], "drop"), unknown))
        found += again["row"].to_pylist()
        kept = batch.filter(batch["stamp"].is_valid())
        columns = (kept[name].to_pylist() for name in ("row", "handles", "stamp"))
        found += [row for row, handles, stamp in zip(*columns, strict=True) if _stamp(handles, states) != stamp]
        if len(states) > KNOWN_FILES:
            states.clear()
    return np.unique(np.array(found, np.int64)) if found else None


def _stamp(handles: Sequence[str], states: dict[str, str]) -> int | None:
    """64 bits over size and time of a sample's picture files; None for a sample without."""
    files = [h for h in handles if os.path.isabs(h)]
    for file in files:
        if file not in states:
            try:
                found = os.stat(file)
                states[file] = f"{found.st_size} {found.st_mtime_ns}"
            except OSError:
                states[file] = "gone"
    text = "\n".join(states[f] for f in files)
    return (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) if files else None
    )


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
        self._pool: ProcessPoolExecutor | None = None
        self._measured = 0

    @cached_property
    def loader(self) -> Loader:
        """This process's own; building one parses the tokenizer, so it is not made for every file."""
        return self.spec.build()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

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
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_start_worker, initargs=(self.spec,)
            )
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
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def measure(loader: Loader, number: int, ref: RowRef) -> list[dict[str, Any]]:
    """The index rows of one row: verdict `train`, `drop` (reason, detail) or `fail` (a wrong row)."""
    rows = loader.rows(number)
    notes: dict[str, None] = dict.fromkeys(rows.notes if ref.number == 0 else ())
    return _measured(loader, number, ref, rows.origin(ref), notes, lambda: loader.sample(number, ref))


def measure_row(
    loader: Loader, number: int, ref: RowRef, origin: str, row: dict[str, Any], notes: dict[str, None]
) -> list[dict[str, Any]]:
    """As `measure`, for a row that is at hand."""
    return _measured(loader, number, ref, origin, notes, lambda: loader.parse(number, row, origin))


def wrong_row(origin: str, error: DataError) -> dict[str, Any]:
    """The index row of a row that could not even be read."""
    return {"row": -1, "piece": 0, "pieces": 1, "origin": origin, "notes": [], "verdict": "fail",
            "reason": error.code, "detail": error.render(), **cut_columns(None)}  # fmt: skip


def _measured(
    loader: Loader, number: int, ref: RowRef, origin: str, notes: dict[str, None], sample_of: Callable[[], Sample]
) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"row": ref.number, "line": ref.line, "offset": ref.offset, "length": ref.length}
    row |= {"piece": 0, "pieces": 1, "origin": origin, "notes": list(notes), **cut_columns(None)}
    try:
        sample = sample_of()
    except Drop as drop:
        return [row | {"verdict": "drop", "reason": drop.reason, "detail": drop.detail}]
    except DataError as error:
        return [row | {"verdict": "fail", "reason": error.code, "detail": error.render()}]
    row |= {"id": sample.id, "id_hash": id_hash(sample.id)}
    return measure_sample(loader, number, sample, row, notes)


def measure_sample(
    loader: Loader, number: int, sample: Sample, row: dict[str, Any], notes: dict[str, None]
) -> list[dict[str, Any]]:
    """The index rows of one sample on top of `row`, one for each piece of a document that is cut."""
    seen = Seen(notes | dict.fromkeys(sample.notes))
    row |= {"images": len(sample.images()), "videos": len(sample.videos())}
    try:
        pieces = loader.pieces(number, sample, seen)
    except Drop as drop:
        return [row | {"verdict": "drop", "reason": drop.reason, "detail": drop.detail, "notes": list(seen.notes)}]
    except DataError as error:
        return [row | {"verdict": "fail", "reason": error.code, "detail": error.render()}]
    if any(loader.tokenizer.mentions_control(p.text) for p in sample.parts() if isinstance(p, Text)):
        seen.notes["special_in_text"] = None
    found: list[dict[str, Any]] = []
    whole = _Whole(loader, number, sample, seen)
    for count, (cut, encoded) in enumerate(pieces):
        own = row | {
            "piece": count,
            "pieces": len(pieces),
            **cut_columns(cut),
            "notes": [] if count else list(seen.notes),
        }
        if len(pieces) > 1:
            own["origin"] = f"{row['origin']}[{count + 1}/{len(pieces)}]"
            own["id_hash"] = 0 if count else own["id_hash"]
        if isinstance(encoded, Drop):
            own |= {"verdict": "drop", "reason": encoded.reason, "detail": encoded.detail}
        else:
            own |= whole.measured(cut, encoded)
            if loader.spec.decode and encoded.images:
                own |= _decoded(loader, number, encoded, sample.origin)
        found.append(own)
    return found


def _decoded(loader: Loader, number: int, encoded: Encoded, origin: str) -> dict[str, Any]:
    """What becomes of a sample whose pictures are decoded."""
    try:
        Pictures(loader, {}).add(number, encoded, origin)
    except Drop as drop:
        return {"decoded": True, "verdict": "drop", "reason": drop.reason, "detail": drop.detail}
    return {"decoded": True}


class _Whole:
    """A sample whose pieces are measured."""

    def __init__(self, loader: Loader, number: int, sample: Sample, seen: Seen):
        self.loader, self.number, self.sample, self.seen = loader, number, sample, seen
        self._said = said_by(sample)
        self._short = hashlib.blake2b(self._said, digest_size=16).digest()

    def measured(self, cut: Cut | None, encoded: Encoded) -> dict[str, Any]:
        shown = [block.image for block in encoded.images] if cut is not None else self.sample.media()
        origin = self.sample.origin
        handles = [h for image in shown for h in self.loader.handles(self.number, image, origin)]
        each = tuple(dict.fromkeys(handles))
        images = sum(not block.frames for block in encoded.images) if cut is not None else len(self.sample.images())
        return {
            "verdict": "train",
            "tokens": encoded.num_tokens,
            "supervised": encoded.num_supervised,
            "media_tokens": int((encoded.kind_L == IMAGE).sum()),
            "patches": encoded.num_patches,
            "images": images,
            "videos": len({id(b.image) for b in encoded.images if b.frames}),
            "answers": encoded.num_answers,
            "handles": list(each),
            "look": look_of(each),
            "digest": self._digest(handles, cut),
            "stamp": _stamp(each, {}),
            "sizes": [side for image in shown if isinstance(image, Image) for side in self.seen.sizes[image]],
        }

    def _digest(self, handles: Sequence[str], cut: Cut | None) -> int:
        base = self.loader.spec.files[self.number].base
        return digest_of(self._said if cut is None else self._short, [portable(h, [base]) for h in handles], cut)


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
