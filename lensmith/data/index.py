"""The index is the ledger: one row per sample, made before step 1, kept on disk and mapped into memory.

Every row of every source is parsed, rendered and measured once (tokens, patches, targets; image sizes from headers, no
pixel decoded) and gets a verdict: `train`, or `drop` with a reason and its origin. A document that is cut gives a row
for each piece. `read = train + dropped` holds for every index.

`index_build` makes it, file by file. Here it is asked: columns over the trainable samples are gathered once, above
`SMALL` rows into an unlinked file that is mapped, so that memory does not grow with the data.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lensmith.data.load import LoaderSpec, SampleRef
from lensmith.data.readers import RowRef
from lensmith.data.split import Cut

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

SMALL = 1 << 20
"""Up to so many rows, columns are ordinary arrays."""

SCHEMA = pa.schema(
    [
        ("row", pa.int64()), ("line", pa.int64()), ("offset", pa.int64()), ("length", pa.int64()),
        ("piece", pa.int32()), ("pieces", pa.int32()), ("first", pa.int32()), ("start", pa.int32()),
        ("last", pa.int32()), ("stop", pa.int32()), ("context", pa.int32()),
        ("origin", pa.string()), ("id", pa.string()), ("verdict", pa.string()), ("reason", pa.string()),
        ("detail", pa.string()), ("tokens", pa.int32()), ("supervised", pa.int32()), ("media_tokens", pa.int32()),
        ("patches", pa.int32()), ("images", pa.int32()), ("videos", pa.int32()), ("answers", pa.int32()),
        ("chosen", pa.int32()),
        ("handles", pa.list_(pa.string())), ("look", pa.int64()), ("digest", pa.int64()), ("id_hash", pa.int64()),
        ("stamp", pa.int64()), ("decoded", pa.bool_()), ("sizes", pa.list_(pa.int32())),
        ("notes", pa.list_(pa.string())),
    ]
)  # fmt: skip
"""piece, pieces: which piece of how many of its row's document; first ... context: its `Cut`, -1 for a whole sample.
handles: where its pictures are; look: a hash of them, 0 without; stamp: a hash over size and time of the picture files;
id_hash: of the row's own id, 0 without; decoded: its pictures were, and not only their headers read; sizes: width,
height of each picture in turn;
chosen: of tokens supervised, those of the first branch."""

LEDGER = ("row", "line", "origin", "verdict", "reason", "detail", "tokens", "supervised", "media_tokens", "images")


@dataclass(frozen=True)
class Index:
    """All samples of a run's sources, in file order. `tables` has one table of `SCHEMA` per file of `spec`."""

    tables: tuple[pa.Table, ...]
    spec: LoaderSpec
    keep: np.ndarray | None = None
    """The rows of the tables that belong to this index; None for all."""
    space: Path | None = None
    """A folder with room for large columns; None for the system's temporary folder."""
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    # -- rows ---------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        return self._total if self.keep is None else int(np.count_nonzero(self.keep))

    @cached_property
    def _total(self) -> int:
        return int(self._begins[-1])

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where each file's rows begin, and the end."""
        return np.cumsum([0, *(t.num_rows for t in self.tables)])

    def batches(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """(file, number of its first row over all files, rows), the rows that are not kept left out."""
        for file, table in enumerate(self.tables):
            at = int(self._begins[file])
            for batch in table.select(columns).to_batches():
                kept = batch if self.keep is None else batch.filter(pa.array(self.keep[at : at + len(batch)]))
                yield file, at, kept
                at += len(batch)

    @cached_property
    def table(self) -> pa.Table:
        """All rows of this index; small where this is a part."""
        whole = pa.concat_tables(self.tables) if self.tables else SCHEMA.empty_table()
        return whole if self.keep is None else whole.filter(pa.array(self.keep))

    def select(self, mask: np.ndarray) -> Index:
        """The rows of this index where `mask` (bool, one value a row) is true."""
        keep = np.zeros(self._total, bool)
        keep[np.flatnonzero(self.keep) if self.keep is not None else slice(None)] = mask
        return Index(self.tables, self.spec, keep, self.space)

    # -- trainable samples --------------------------------------------------------------------------------------

    @cached_property
    def trainable(self) -> np.ndarray:
        """Rows over all files with verdict `train`; plans and placements count positions in this list."""
        return self._joined(np.dtype(np.int64), self._trainable_rows())

    def _trainable_rows(self) -> Iterator[np.ndarray]:
        begin = 0
        for batch in chain.from_iterable(table.select(["verdict"]).to_batches() for table in self.tables):
            mask = _trains(batch)
            if self.keep is not None:
                mask &= self.keep[begin : begin + len(batch)]
            yield np.flatnonzero(mask) + begin
            begin += len(batch)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers over trainable samples only; also `file` and `source` (their numbers)."""
        if name not in self._columns:
            self._columns[name] = self._gather(name)
        return self._columns[name]

    def _gather(self, name: str) -> np.ndarray:
        if name == "source":
            return self._fill(np.dtype(np.int32), lambda file, batch: np.full(len(batch), self.source_of[file]))
        if name == "file":
            return self._fill(np.dtype(np.int32), lambda file, batch: np.full(len(batch), file))
        kind = np.dtype(SCHEMA.field(name).type.to_pandas_dtype())
        return self._fill(kind, lambda _, batch: pc.fill_null(batch[name], 0).to_numpy(zero_copy_only=False), name)

    def _fill(self, dtype: np.dtype, values: Callable[[int, pa.RecordBatch], np.ndarray], *names: str) -> np.ndarray:
        batches = self.batches(["verdict", *names])
        return self._joined(dtype, (values(file, batch)[_trains(batch)] for file, _, batch in batches))

    def _joined(self, dtype: np.dtype, parts: Iterable[np.ndarray]) -> np.ndarray:
        if self.num_rows <= SMALL:
            return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)
        if self.space is not None:
            self.space.mkdir(parents=True, exist_ok=True)
        count = 0
        with tempfile.TemporaryFile(dir=self.space) as file:  # written, not mapped: a full disk is an error, no signal
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).data)
                count += len(part)
            file.flush()
            return np.memmap(file, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(dict.fromkeys(f.source for f in self.spec.files))

    @cached_property
    def source_of(self) -> np.ndarray:
        """The number of each file's source."""
        return np.array([self.sources.index(f.source) for f in self.spec.files], np.int32)

    @cached_property
    def source_weights(self) -> np.ndarray:
        """Loss weight of each source."""
        return np.array([next(f.weight for f in self.spec.files if f.source == s) for s in self.sources], np.float32)

    @property
    def weights(self) -> np.ndarray:
        """Loss weight per trainable sample, from its source."""
        return self.source_weights[self.column("source")]

    @cached_property
    def source_sizes(self) -> tuple[int, ...]:
        """Trainable samples of each source. They follow each other in the order of the sources."""
        return tuple(np.bincount(self.column("source"), minlength=len(self.sources)).tolist())

    def place(self, number: int) -> tuple[int, int]:
        """(file, row of its table) of a trainable sample."""
        row = int(self.trainable[number])
        file = int(np.searchsorted(self._begins, row, side="right")) - 1
        return file, row - int(self._begins[file])

    def value(self, number: int, name: str) -> Any:
        """One value of a trainable sample, of any column."""
        file, row = self.place(number)
        return self.tables[file][name][row].as_py()

    def origin(self, number: int) -> str:
        return self.value(number, "origin")

    def origins(self, numbers: Iterable[int]) -> list[str]:
        return [self.origin(int(n)) for n in numbers]

    def handles(self, number: int) -> tuple[str, ...]:
        """Where the pictures of a sample are, each once."""
        return tuple(self.value(number, "handles") or ()) if self.column("look")[number] else ()

    def ref(self, number: int) -> SampleRef:
        """Where a trainable sample is read from."""
        file, row = self.place(number)
        return _sample_ref(file, self.tables[file], row)

    def row_ref(self, row: int) -> SampleRef:
        """Where a row of this index is read from, whatever its verdict."""
        if self.keep is not None:
            row = int(np.flatnonzero(self.keep)[row])
        file = int(np.searchsorted(self._begins, row, side="right")) - 1
        return _sample_ref(file, self.tables[file], row - int(self._begins[file]))

    def numbers_of(self, origins: Iterable[str]) -> dict[str, int]:
        """Origin -> number of a trainable sample, for those that there are."""
        wanted = pa.array(list(origins), pa.string())
        if not len(wanted):
            return {}
        found: dict[str, int] = {}
        for file, table in enumerate(self.tables):
            rows = np.flatnonzero(pc.is_in(table["origin"], value_set=wanted).to_numpy())
            for row in rows.tolist():
                at = int(np.searchsorted(self.trainable, row + int(self._begins[file])))
                if at < len(self.trainable) and self.trainable[at] == row + self._begins[file]:
                    found[table["origin"][row].as_py()] = at
        return found

    # -- sums ---------------------------------------------------------------------------------------------------

    @cached_property
    def dropped(self) -> pa.Table:
        return pa.Table.from_batches(
            (b.filter(pc.equal(b["verdict"], "drop")) for _, _, b in self.batches()), schema=SCHEMA
        )

    def counts(self) -> dict[str, Any]:
        """read, train, dropped and dropped by reason; `read = train + dropped` is asserted here. `rows`: rows of the
        sources, fewer than `read` when documents were cut."""
        reasons: Counter[str] = Counter()
        rows = 0
        for _, _, batch in self.batches(["verdict", "reason", "piece"]):
            rows += pc.sum(pc.equal(batch["piece"], 0)).as_py() or 0
            dropped = batch["reason"].filter(pc.equal(batch["verdict"], "drop"))
            reasons.update({r["values"]: r["counts"] for r in pc.value_counts(dropped).to_pylist()})
        read, train = self.num_rows, len(self.trainable)
        assert read == train + reasons.total(), (read, train, reasons)
        return {
            "read": read, "train": train, "dropped": reasons.total(), "by_reason": dict(sorted(reasons.items())),
            "rows": rows,
        }  # fmt: skip

    def notes(self) -> dict[str, tuple[int, str]]:
        """What was accepted but is counted (`alpha`, `bom`, ...): samples read with this note, and the first one."""
        found: dict[str, tuple[int, str]] = {}
        for _, _, batch in self.batches(["notes", "origin"]):
            flat, parents = pc.list_flatten(batch["notes"]), pc.list_parent_indices(batch["notes"])
            for note in flat.unique().to_pylist():
                rows = pc.filter(parents, pc.equal(flat, note))
                count, first = found.get(note, (0, batch["origin"][rows[0].as_py()].as_py()))
                found[note] = count + len(rows), first
        return dict(sorted(found.items()))

    def ledger(self) -> Iterator[pa.RecordBatch]:
        """What the run folder keeps: one row per sample read, without the columns only the loader needs."""
        for file, _, batch in self.batches(LEDGER):
            source = pa.array([self.spec.files[file].source]).take(pa.array(np.zeros(len(batch), np.int32)))
            yield pa.RecordBatch.from_arrays([source, *(batch[n] for n in LEDGER)], schema=LEDGER_SCHEMA)


LEDGER_SCHEMA = pa.schema([("source", pa.string()), *((n, SCHEMA.field(n).type) for n in LEDGER)])


def _trains(batch: pa.RecordBatch) -> np.ndarray:
    return pc.equal(batch["verdict"], "train").to_numpy(zero_copy_only=False)


_ROW, _CUT = ("row", "line", "offset", "length"), ("first", "start", "last", "stop", "context")


def _sample_ref(file: int, table: pa.Table, row: int) -> SampleRef:
    place = RowRef(*(table[name][row].as_py() for name in _ROW))
    cut = Cut(*(table[name][row].as_py() for name in _CUT)) if table["first"][row].as_py() >= 0 else None
    return SampleRef(file, place, cut)


def cut_columns(cut: Cut | None) -> dict[str, int]:
    return dict(zip(_CUT, (cut.first, cut.start, cut.last, cut.stop, cut.context) if cut else (-1,) * 5, strict=True))
