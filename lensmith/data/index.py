"""The index is the ledger: one row per sample, made before step 1, kept on disk as Parquet.

Every row of every source is parsed, rendered and measured once (tokens, patches, targets; image sizes from headers, no
pixel decoded) and gets a verdict: `train`, or `drop` with a reason and its origin. Rows that are wrong in a way that
is never skipped are collected and reported together. `read = train + dropped` holds for every index.

An index of a file is cached under a fingerprint of the file's content and of all that changes the counts. Pictures
are files of their own: a sample whose picture files changed since (by size and time), and one that was dropped and has
pictures, is measured again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lensmith.core.encoded import IMAGE
from lensmith.core.errors import ConfigError, DataError, Drop, RunError
from lensmith.core.sample import Text
from lensmith.core.version import VERSION as LENSMITH
from lensmith.data.load import Loader, LoaderSpec, digest_of, portable
from lensmith.data.readers import RowRef

VERSION = 3
CHUNK = 256
PARALLEL_FROM = 2000
"""Below this many rows one process is faster than starting several."""
SHOWN_FAILURES = 10

SCHEMA = pa.schema(
    [
        ("file", pa.int32()), ("row", pa.int64()), ("line", pa.int64()), ("offset", pa.int64()), ("length", pa.int64()),
        ("origin", pa.string()), ("id", pa.string()), ("verdict", pa.string()), ("reason", pa.string()),
        ("detail", pa.string()), ("tokens", pa.int32()), ("supervised", pa.int32()), ("media_tokens", pa.int32()),
        ("patches", pa.int32()), ("images", pa.int32()), ("answers", pa.int32()), ("handles", pa.list_(pa.string())),
        ("digest", pa.int64()), ("stamp", pa.int64()), ("notes", pa.list_(pa.string())),
    ]
)  # fmt: skip

_FAILED = pc.field("verdict") == "fail"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Index:
    """All samples of a run's sources, in file order. `table` has the columns of `SCHEMA`."""

    table: pa.Table
    spec: LoaderSpec
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def trainable(self) -> np.ndarray:
        """Rows with verdict `train`; plans and placements count positions in this list."""
        return np.flatnonzero(self.table["verdict"].to_numpy(zero_copy_only=False) == "train")

    def column(self, name: str) -> np.ndarray:
        """A column over trainable samples only."""
        if name not in self._columns:
            self._columns[name] = self.table[name].to_numpy(zero_copy_only=False)[self.trainable]
        return self._columns[name]

    @cached_property
    def clusters(self) -> np.ndarray:
        """Per trainable sample a number equal for samples whose first picture is the same; -1 without pictures."""
        numbers: dict[str, int] = {}
        firsts = [h[0] if h is not None and len(h) else None for h in self.column("handles")]
        return np.array([-1 if f is None else numbers.setdefault(f, len(numbers)) for f in firsts], np.int64)

    @cached_property
    def weights(self) -> np.ndarray:
        """Loss weight per trainable sample, from its source."""
        return np.array([f.weight for f in self.spec.files], np.float32)[self.column("file")]

    @cached_property
    def dropped(self) -> pa.Table:
        return self.table.filter(pc.field("verdict") == "drop")

    def counts(self) -> dict[str, Any]:
        """read, train, dropped and dropped by reason; `read = train + dropped` is asserted here."""
        reasons = Counter(self.dropped["reason"].to_pylist())
        read, train = self.table.num_rows, len(self.trainable)
        assert read == train + reasons.total(), (read, train, reasons)
        return {"read": read, "train": train, "dropped": reasons.total(), "by_reason": dict(sorted(reasons.items()))}

    def notes(self) -> dict[str, tuple[int, str]]:
        """What was accepted but is counted (`alpha`, `bom`, ...): samples read with this note, and the first one."""
        found: dict[str, tuple[int, str]] = {}
        for origin, notes in zip(self.table["origin"].to_pylist(), self.table["notes"].to_pylist(), strict=True):
            for note in notes:
                count, first = found.get(note, (0, origin))
                found[note] = count + 1, first
        return dict(sorted(found.items()))

    def ref(self, row: int) -> tuple[int, RowRef]:
        """(file, reference) of a table row."""
        r = self.table.slice(row, 1).to_pylist()[0]
        return r["file"], RowRef(r["row"], r["line"], r["offset"], r["length"])

    @cached_property
    def refs(self) -> list[tuple[int, RowRef]]:
        """(file, reference) of every trainable sample."""
        columns = [self.column(n).tolist() for n in ("file", "row", "line", "offset", "length")]
        return [(f, RowRef(a, b, c, d)) for f, a, b, c, d in zip(*columns, strict=True)]

    def select(self, mask: np.ndarray) -> Index:
        return Index(self.table.filter(pa.array(mask)), self.spec)

    def ledger(self) -> pa.Table:
        """What the run folder keeps: one row per sample read, without the columns only the loader needs."""
        names = [
            "row",
            "line",
            "origin",
            "verdict",
            "reason",
            "detail",
            "tokens",
            "supervised",
            "media_tokens",
            "images",
        ]
        sources = pa.array([f.source for f in self.spec.files])
        source = pc.take(sources, self.table["file"]) if len(sources) else pa.array([], pa.string())
        return self.table.select(names).add_column(0, "source", source)


def build_index(spec: LoaderSpec, cache: Path | None, *, workers: int = 1, progress: Progress | None = None) -> Index:
    """Index every file of `spec`, from the cache where nothing changed. Raises one `DataError` for all wrong rows."""
    tables = [_file_table(spec, number, cache, workers, progress) for number in range(len(spec.files))]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    _refuse_failures(table)
    _refuse_duplicate_ids(table, spec)
    return Index(table, spec)


def _file_table(spec: LoaderSpec, number: int, cache: Path | None, workers: int, progress: Progress | None) -> pa.Table:
    stored = None if cache is None else cache / f"index-{_fingerprint(spec, number)}.parquet"
    known = _read_stored(stored, number)
    if known is None:
        table = _measure_file(spec, number, workers, progress)
    else:
        table = _measure_again(spec, number, known, workers, progress)
    if stored is not None and table is not known and not table.filter(_FAILED).num_rows:
        _store(table, stored)
    return table


def _measure_file(spec: LoaderSpec, number: int, workers: int, progress: Progress | None) -> pa.Table:
    """A file that breaks off is one more wrong row behind those that were found before."""
    loader = spec.build()
    refs: list[RowRef] = []
    broken: DataError | None = None
    try:
        refs += islice(loader.rows(number).scan(), spec.files[number].max_samples)
    except DataError as error:
        broken = error
    if broken is not None and not refs:
        raise broken
    try:
        loader.detect(number)
    except DataError as error:
        if error.code == "UNKNOWN_FORMAT":  # else each row would repeat it; anything else comes up again below
            raise
    table = _measure_all(spec, loader, number, refs, workers, progress)
    if broken is None:
        return table
    last = {"file": number, "row": len(refs), "origin": broken.where, "notes": [], "verdict": "fail"}
    last |= {"reason": broken.code, "detail": broken.render()}
    return pa.concat_tables([table, pa.Table.from_pylist([last], schema=SCHEMA)])


def _read_stored(stored: Path | None, number: int) -> pa.Table | None:
    if stored is None or not stored.is_file():
        return None
    try:
        table = pq.read_table(stored, schema=SCHEMA)
    except (pa.ArrowException, OSError):  # cut short by a crash of the machine: as if it were not there
        return None
    return table.set_column(0, "file", pa.array([number] * table.num_rows, pa.int32()))


def _store(table: pa.Table, stored: Path) -> None:
    temporary = stored.with_suffix(f".{os.getpid()}.tmp")
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(table, temporary)
            os.replace(temporary, stored)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        problem = f"the index cache cannot be written: {error.strerror or error}"
        remedy = "set data.cache to a folder with space"
        raise ConfigError("CACHE", problem, where=str(stored.parent), remedy=remedy) from None


def _measure_again(spec: LoaderSpec, number: int, table: pa.Table, workers: int, progress: Progress | None) -> pa.Table:
    """`table` itself where no picture changed."""
    states: dict[str, str] = {}
    old = np.zeros(table.num_rows, bool)
    columns = [table[name].to_pylist() for name in ("verdict", "images", "handles", "stamp")]
    for position, (verdict, images, handles, stamp) in enumerate(zip(*columns, strict=True)):
        old[position] = _stamp(handles, states) != stamp if verdict == "train" else bool(images)
    if not old.any():
        return table
    before = table.filter(pa.array(old))
    refs = [RowRef(r["row"], r["line"], r["offset"], r["length"]) for r in before.to_pylist()]
    after = _measure_all(spec, spec.build(), number, refs, workers, progress)
    if after.equals(before):
        return table
    return pa.concat_tables([table.filter(pa.array(~old)), after]).sort_by("row")


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


def _fingerprint(spec: LoaderSpec, number: int) -> str:
    """Content of the file and everything that changes its counts, or whether its rows are read at all."""
    f = spec.files[number]
    h = hashlib.blake2b(digest_size=16)
    with open(f.path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    said = {
        "version": [VERSION, LENSMITH], "family": repr(spec.family), "path": [f.path, f.shown], "base": f.base,
        "tokenizer": [hashlib.sha256(spec.tokenizer_json.encode()).hexdigest(), spec.text_tokens], "roots": spec.roots,
        "format": f.format.model_dump() if f.format else None, "limits": spec.limits.model_dump(),
        "length": [spec.max_tokens, spec.too_long, spec.max_row_bytes], "max_samples": f.max_samples,
    }  # fmt: skip
    h.update(json.dumps(said, sort_keys=True, default=str).encode())
    return h.hexdigest()


def _measure_all(
    spec: LoaderSpec, loader: Loader, number: int, refs: list[RowRef], workers: int, progress: Progress | None
) -> pa.Table:
    chunks = [refs[i : i + CHUNK] for i in range(0, len(refs), CHUNK)]
    measured: list[dict[str, Any]] = []
    for rows in _map_chunks(spec, loader, number, chunks, workers if len(refs) >= PARALLEL_FROM else 1):
        measured += rows
        if progress is not None:
            progress(len(measured), len(refs))
    return pa.Table.from_pylist(measured, schema=SCHEMA)


def _map_chunks(
    spec: LoaderSpec, loader: Loader, number: int, chunks: Sequence[list[RowRef]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    if workers <= 1:
        for chunk in chunks:
            yield [measure(loader, number, ref) for ref in chunk]
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(spec,)) as pool:
        try:
            yield from pool.map(_measure_chunk, [number] * len(chunks), chunks)
        except BrokenProcessPool:
            raise RunError("DATA_WORKER", "a process that indexes the data died", where=spec.files[number].path,
                           remedy="look for an out-of-memory kill; lower data.max_row_bytes") from None  # fmt: skip


_worker: dict[str, Loader] = {}


def _start_worker(spec: LoaderSpec) -> None:
    _worker["loader"] = spec.build()


def _measure_chunk(number: int, chunk: list[RowRef]) -> list[dict[str, Any]]:
    return [measure(_worker["loader"], number, ref) for ref in chunk]


def measure(loader: Loader, number: int, ref: RowRef) -> dict[str, Any]:
    """The index row of one sample: verdict `train`, `drop` (reason, detail) or `fail` (a wrong row)."""
    rows = loader.rows(number)
    notes: dict[str, None] = dict.fromkeys(rows.notes if ref.number == 0 else ())
    row: dict[str, Any] = {"file": number, **{k: v for k, v in asdict(ref).items() if k != "number"}, "row": ref.number}
    row |= {"origin": rows.origin(ref), "notes": list(notes)}
    try:
        sample = loader.sample(number, ref)
        row |= {"id": sample.id, "images": len(sample.images())}
        notes |= dict.fromkeys(sample.notes)
        encoded = loader.encode(number, sample, notes)
        handles = [loader.handle(number, image, sample.origin) for image in sample.images()]
    except Drop as drop:
        return row | {"verdict": "drop", "reason": drop.reason, "detail": drop.detail, "notes": list(notes)}
    except DataError as error:
        return row | {"verdict": "fail", "reason": error.code, "detail": error.render()}
    if any(loader.tokenizer.mentions_control(p.text) for p in sample.parts() if isinstance(p, Text)):
        notes["special_in_text"] = None
    return row | {
        "verdict": "train",
        "tokens": encoded.num_tokens,
        "supervised": encoded.num_supervised,
        "media_tokens": int((encoded.kind_L == IMAGE).sum()),
        "patches": encoded.num_patches,
        "answers": encoded.num_answers,
        "handles": list(dict.fromkeys(handles)),
        "digest": digest_of(sample, [portable(h, [loader.spec.files[number].base]) for h in handles]),
        "stamp": _stamp(list(dict.fromkeys(handles)), {}),
        "notes": list(notes),
    }


def _refuse_failures(table: pa.Table) -> None:
    failed = table.filter(_FAILED)
    if not failed.num_rows:
        return
    first = failed.slice(0, SHOWN_FAILURES).to_pylist()
    more = f"\n... and {failed.num_rows - SHOWN_FAILURES:,} more" if failed.num_rows > SHOWN_FAILURES else ""
    lines = "\n".join(r["detail"] for r in first)
    raise DataError(first[0]["reason"], f"{failed.num_rows:,} of {table.num_rows:,} rows are wrong:\n{lines}{more}")


def _refuse_duplicate_ids(table: pa.Table, spec: LoaderSpec) -> None:
    """Within a source: data sets that are mixed number their rows independently."""
    named = table.filter(pc.field("id").is_valid()).select(["file", "id", "origin"])
    for source in dict.fromkeys(f.source for f in spec.files):
        rows = named.filter(pc.field("file").isin([i for i, f in enumerate(spec.files) if f.source == source]))
        if len(rows["id"].unique()) == rows.num_rows:
            continue
        where: dict[str, list[str]] = {}
        for row in rows.to_pylist():
            where.setdefault(row["id"], []).append(row["origin"])
        twice = {key: places for key, places in where.items() if len(places) > 1}
        lines = [f"{key!r} stands in {', '.join(places[:5])}" for key, places in twice.items()]
        more = f"\n... and {len(lines) - SHOWN_FAILURES:,} more" if len(lines) > SHOWN_FAILURES else ""
        remedy = (
            "give each row its own id; if these are no ids, set the id_column of this source's format to a key that no "
            "row has"
        )
        shown = "\n".join(lines[:SHOWN_FAILURES])
        raise DataError("DUP_ID", f"{len(lines):,} ids of {source!r} stand twice:\n{shown}{more}", remedy=remedy)


def hold_out(index: Index, share: float, seed: int) -> tuple[Index, Index]:
    """Split off about `share` of the pictures with all their samples: (train, held out). No picture is in both."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = []
    for handles, digest in zip(index.table["handles"].to_pylist(), index.table["digest"].to_pylist(), strict=True):
        own = handles or [f"text:{digest}"]
        for other in own[1:]:
            parent[root(other)] = root(own[0])
        keys.append(own[0])
    bases = sorted({f.base for f in index.spec.files}, key=len, reverse=True)
    held = np.array([_share_of(f"{seed}:{portable(root(k), bases)}") < share for k in keys], bool)
    return index.select(~held), index.select(held)


def _share_of(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


def seen_in_training(train: Index, held: Index) -> int:
    """Held-out samples whose text and pictures stand in the training data too."""
    known = set(_said(train))
    return sum(said in known for said in _said(held))


def _said(index: Index) -> Iterator[tuple[int, tuple[str, ...]]]:
    return ((d, tuple(h)) for d, h in zip(index.column("digest").tolist(), index.column("handles"), strict=True))
