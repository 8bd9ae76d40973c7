"""The index is the ledger: one row per sample, made before step 1, kept on disk as Parquet.

Every row of every source is parsed, rendered and measured once (tokens, patches, targets; image sizes from headers, no
pixel decoded) and gets a verdict: `train`, or `drop` with a reason and its origin. Rows that are wrong in a way that
is never skipped are collected and reported together. `read = train + dropped` holds for every index.

An index of a file is cached under a fingerprint of the file's content and of all that changes the counts.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lensmith.core.encoded import IMAGE
from lensmith.core.errors import DataError, Drop
from lensmith.data.load import Loader, LoaderSpec, digest_of
from lensmith.data.readers import RowRef

VERSION = 1
CHUNK = 256
PARALLEL_FROM = 2000
"""Below this many rows one process is faster than starting several."""

SCHEMA = pa.schema(
    [
        ("file", pa.int32()), ("row", pa.int64()), ("line", pa.int64()), ("offset", pa.int64()), ("length", pa.int64()),
        ("origin", pa.string()), ("id", pa.string()), ("verdict", pa.string()), ("reason", pa.string()),
        ("detail", pa.string()), ("tokens", pa.int32()), ("supervised", pa.int32()), ("media_tokens", pa.int32()),
        ("patches", pa.int32()), ("images", pa.int32()), ("answers", pa.int32()), ("handles", pa.list_(pa.string())),
        ("digest", pa.int64()), ("notes", pa.list_(pa.string())),
    ]
)  # fmt: skip

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

    def counts(self) -> dict[str, Any]:
        """read, train, dropped and dropped by reason; `read = train + dropped` is asserted here."""
        reasons = Counter(self.table.filter(pc.equal(self.table["verdict"], "drop"))["reason"].to_pylist())
        read, train = self.table.num_rows, len(self.trainable)
        assert read == train + reasons.total(), (read, train, reasons)
        return {"read": read, "train": train, "dropped": reasons.total(), "by_reason": dict(sorted(reasons.items()))}

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
        names = ["row", "line", "origin", "verdict", "reason", "detail", "tokens", "supervised", "media_tokens", "images"]
        sources = pa.array([f.source for f in self.spec.files])
        source = pc.take(sources, self.table["file"]) if len(sources) else pa.array([], pa.string())
        return self.table.select(names).add_column(0, "source", source)


def build_index(spec: LoaderSpec, cache: Path | None, *, workers: int = 1, progress: Progress | None = None) -> Index:
    """Index every file of `spec`, from the cache where nothing changed. Raises one `DataError` for all wrong rows."""
    tables = [_file_table(spec, number, cache, workers, progress) for number in range(len(spec.files))]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    _refuse_failures(table)
    _refuse_duplicate_ids(table)
    return Index(table, spec)


def _file_table(spec: LoaderSpec, number: int, cache: Path | None, workers: int, progress: Progress | None) -> pa.Table:
    stored = None
    if cache is not None:
        stored = cache / f"index-{_fingerprint(spec, number)}.parquet"
        if stored.is_file():
            table = pq.read_table(stored)
            return table.set_column(0, "file", pa.array([number] * table.num_rows, pa.int32()))
    table = pa.Table.from_pylist(list(_measure_all(spec, number, workers, progress)), schema=SCHEMA)
    if stored is not None and not pc.any(pc.equal(table["verdict"], "fail")).as_py():
        stored.parent.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_suffix(f".{os.getpid()}.tmp")
        pq.write_table(table, temporary)
        os.replace(temporary, stored)
    return table


def _fingerprint(spec: LoaderSpec, number: int) -> str:
    """Content of the file and everything that changes its counts."""
    f = spec.files[number]
    h = hashlib.blake2b(digest_size=16)
    with open(f.path, "rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    said = {
        "version": VERSION, "family": repr(spec.family), "tokenizer": hashlib.sha256(spec.tokenizer_json.encode()).hexdigest(),
        "format": f.format.model_dump() if f.format else None, "base": f.base, "roots": spec.roots, "name": Path(f.path).name,
        "limits": spec.limits.model_dump(), "length": [spec.max_tokens, spec.too_long], "max_samples": f.max_samples,
    }  # fmt: skip
    h.update(json.dumps(said, sort_keys=True, default=str).encode())
    return h.hexdigest()


def _measure_all(spec: LoaderSpec, number: int, workers: int, progress: Progress | None) -> Iterator[dict[str, Any]]:
    loader = spec.build()
    refs = list(loader.rows(number).scan())[: spec.files[number].max_samples]
    chunks = [refs[i : i + CHUNK] for i in range(0, len(refs), CHUNK)]
    done = 0
    for rows in _map_chunks(spec, loader, number, chunks, workers if len(refs) >= PARALLEL_FROM else 1):
        done += len(rows)
        if progress is not None:
            progress(done, len(refs))
        yield from rows


def _map_chunks(
    spec: LoaderSpec, loader: Loader, number: int, chunks: Sequence[list[RowRef]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    if workers <= 1:
        for chunk in chunks:
            yield [measure(loader, number, ref) for ref in chunk]
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(spec,)) as pool:
        yield from pool.map(_measure_chunk, [number] * len(chunks), chunks)


_worker: dict[str, Loader] = {}


def _start_worker(spec: LoaderSpec) -> None:
    _worker["loader"] = spec.build()


def _measure_chunk(number: int, chunk: list[RowRef]) -> list[dict[str, Any]]:
    return [measure(_worker["loader"], number, ref) for ref in chunk]


def measure(loader: Loader, number: int, ref: RowRef) -> dict[str, Any]:
    """The index row of one sample: verdict `train`, `drop` (reason, detail) or `fail` (a wrong row)."""
    row: dict[str, Any] = {"file": number, **{k: v for k, v in asdict(ref).items() if k != "number"}, "row": ref.number}
    row["origin"] = loader.rows(number).origin(ref)
    try:
        sample = loader.sample(number, ref)
        row |= {"id": sample.id, "notes": list(sample.notes), "images": len(sample.images())}
        encoded = loader.encode(number, sample)
        handles = [loader.handle(number, image, sample.origin) for image in sample.images()]
    except Drop as drop:
        return row | {"verdict": "drop", "reason": drop.reason, "detail": drop.detail}
    except DataError as error:
        return row | {"verdict": "fail", "reason": error.code, "detail": error.render()}
    texts = [p.text for p in _text_parts(sample.content)]
    if any(loader.tokenizer.mentions_control(t) for t in texts):
        row["notes"] = [*row["notes"], "special_in_text"]
    return row | {
        "verdict": "train",
        "tokens": encoded.num_tokens,
        "supervised": encoded.num_supervised,
        "media_tokens": int((encoded.kind_L == IMAGE).sum()),
        "patches": encoded.num_patches,
        "answers": encoded.num_answers,
        "handles": list(dict.fromkeys(handles)),
        "digest": digest_of(sample, handles),
    }


def _text_parts(content: Any) -> Iterator[Any]:
    parts = content.parts if not isinstance(content, tuple) else [p for c in content for m in c.messages for p in m.parts]
    return (p for p in parts if hasattr(p, "text"))


def _refuse_failures(table: pa.Table, most: int = 10) -> None:
    failed = table.filter(pc.equal(table["verdict"], "fail"))
    if not failed.num_rows:
        return
    first = failed.slice(0, most).to_pylist()
    more = f"\n... and {failed.num_rows - most} more" if failed.num_rows > most else ""
    lines = "\n".join(r["detail"] for r in first)
    raise DataError(first[0]["reason"], f"{failed.num_rows} of {table.num_rows} rows are wrong:\n{lines}{more}")


def _refuse_duplicate_ids(table: pa.Table) -> None:
    ids = table.filter(pc.is_valid(table["id"]))
    counts = pc.value_counts(ids["id"])
    for entry in counts.to_pylist() if len(counts) < ids.num_rows else []:
        if entry["counts"] > 1:
            where = ids.filter(pc.equal(ids["id"], entry["values"]))["origin"].to_pylist()
            remedy = "give each row its own id, or remove the repeats"
            raise DataError("DUP_ID", f"the id {entry['values']!r} stands in {', '.join(where[:5])}", remedy=remedy)


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
    held = np.array([_share_of(f"{seed}:{root(k)}") < share for k in keys], bool)
    return index.select(~held), index.select(held)


def _share_of(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


def seen_in_training(train: Index, held: Index) -> int:
    """Held-out samples whose text and pictures stand in the training data too."""
    known = set(train.column("digest").tolist())
    return sum(d in known for d in held.column("digest").tolist())
