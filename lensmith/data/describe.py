"""What an index holds, in figures, source by source: rows, drops, lengths, pictures. Nothing of the sources is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute

from lensmith.data.index import Index

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

Record = dict[str, Any]

BINS = 40
"""Most bins of a histogram of lengths."""
SIZES = 400
"""Sizes of pictures that are kept, the commonest first."""
_MERGE = 1 << 20


def describe(used: Index, read: Index | None, min_pixels: int, max_pixels: int | None) -> tuple[list[Record], int]:
    """Of each source its figures, and the width of the bins of their `lengths` in tokens.

    Lengths and pictures are those of `used`, rows and drops those of `read`; without `read`, all are of `used`, and
    nothing is dropped. The area of a picture below `min_pixels` is enlarged, above `max_pixels` reduced;
    None: the model has a grid of its own.
    """
    tallies = _tallies(used if read is None else read, dropped=read is not None)
    pictures = _sizes(used)
    tokens, ends = used.column("tokens"), np.cumsum([0, *used.source_sizes]).tolist()
    width = bin_width(int(tokens.max()) if len(tokens) else 0)
    found: list[Record] = []
    for number, name in enumerate(used.sources):
        own = slice(ends[number], ends[number + 1])
        sums = {key: int(used.column(key)[own].sum()) for key in ("supervised", "media_tokens", "images", "videos")}
        total = int(tokens[own].sum())
        tally = tallies[number]
        found.append({
            "name": name, "rows": tally.rows, "read": tally.read, "samples": ends[number + 1] - ends[number],
            "dropped": sum(n for n, _, _ in tally.reasons.values()),
            "by_reason": {
                reason: {"samples": n, "first": origin, "detail": detail}
                for reason, (n, origin, detail) in sorted(tally.reasons.items(), key=lambda item: (-item[1][0], item))
            },
            "documents_cut": tally.cut, "pieces": tally.pieces, "tokens": _lengths(tokens[own]), **sums,
            "trained_share": sums["supervised"] / total if total else None,
            "lengths": np.bincount(np.maximum(tokens[own] - 1, 0) // width).tolist() if total else [],
            "pictures": pictures[number].figures(min_pixels, max_pixels),
        })  # fmt: skip
    return found, width


def bin_width(longest: int) -> int:
    """1, 2 or 5 times a power of ten, such that `longest` needs at most `BINS` bins: 1 ... width, width + 1 ..."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power * BINS >= longest:
                return step * power
        power *= 10


def _lengths(tokens: np.ndarray) -> Record:
    """`median` and `p95` are lengths that occur: half, or 95 %, of the samples are no longer."""
    if not len(tokens):
        return {"sum": 0, "mean": None, "median": None, "p95": None, "max": None}
    median, p95 = np.percentile(tokens, [50, 95], method="inverted_cdf").tolist()
    total = int(tokens.sum(dtype=np.int64))
    return {"sum": total, "mean": total / len(tokens), "median": int(median), "p95": int(p95), "max": int(tokens.max())}


# --- rows and drops ---------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    rows: int = 0
    """Of the source; a document that is cut is one."""
    read: int = 0
    cut: int = 0
    pieces: int = 0
    reasons: dict[str, tuple[int, str, str]] = field(default_factory=dict[str, tuple[int, str, str]])
    """Reason -> how many, and origin and detail of the first."""


def _tallies(index: Index, *, dropped: bool) -> list[_Tally]:
    found = [_Tally() for _ in index.sources]
    for file, _, batch in index.batches(["verdict", "reason", "piece", "pieces", "origin", "detail", "row"]):
        tally = found[index.source_of[file]]
        drops = pc.equal(batch["verdict"], "drop")
        if not dropped:
            batch = batch.filter(pc.invert(drops))
        pieces = pc.greater(pc.fill_null(batch["pieces"], 1), 1)
        tally.read += len(batch)
        tally.pieces += _count(pieces)
        if dropped:
            first = pc.equal(batch["piece"], 0)
            tally.rows += _count(first)
            tally.cut += _count(pc.and_(first, pieces))
            _reasons(batch.filter(drops), tally.reasons)
        else:  # the first piece of a document may be elsewhere; pieces are neighbours
            rows = batch["row"].to_numpy(zero_copy_only=False)
            new = np.diff(rows, prepend=-1) != 0
            tally.rows += int(new.sum())
            tally.cut += int((new & pieces.to_numpy(zero_copy_only=False)).sum())
    return found


def _reasons(dropped: Any, reasons: dict[str, tuple[int, str, str]]) -> None:
    for reason in dropped["reason"].unique().to_pylist():
        own = dropped.filter(pc.equal(dropped["reason"], reason))
        count, origin, detail = reasons.get(reason, (0, own["origin"][0].as_py(), own["detail"][0].as_py() or ""))
        reasons[reason] = count + len(own), origin, detail


def _count(mask: Any) -> int:
    return pc.sum(mask).as_py() or 0


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass
class _Sizes:
    """Sizes of pictures with their counts. A size is one number: width, then height in the lower half."""

    found: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list[tuple[np.ndarray, np.ndarray]])
    waiting: int = 0

    def add(self, sides: np.ndarray) -> None:
        if not len(sides):
            return
        pairs = sides.astype(np.int64).reshape(-1, 2)
        self.found.append(np.unique(pairs[:, 0] << 32 | pairs[:, 1], return_counts=True))
        self.waiting += len(self.found[-1][0])
        if self.waiting > _MERGE:
            self.merge()

    def merge(self) -> tuple[np.ndarray, np.ndarray]:
        sizes, place = np.unique(np.concatenate([s for s, _ in self.found]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([c for _, c in self.found])).astype(np.int64)
        self.found, self.waiting = [(sizes, counts)], 0
        return sizes, counts

    def figures(self, min_pixels: int, max_pixels: int | None) -> Record | None:
        """None without pictures."""
        if not self.found:
            return None
        sizes, counts = self.merge()
        wide, high, total = sizes >> 32, sizes & 0xFFFFFFFF, int(counts.sum())
        area = wide * high
        order = np.lexsort((sizes, -counts))[:SIZES]
        return {
            "count": total,
            "distinct_sizes": len(sizes),
            "sizes": np.stack([wide, high, counts], axis=1)[order].tolist(),
            "width": _spread(wide, counts),
            "height": _spread(high, counts),
            "mean_pixels": float((area * counts).sum()) / total,
            "enlarged_share": None if max_pixels is None else int(counts[area < min_pixels].sum()) / total,
            "reduced_share": None if max_pixels is None else int(counts[area > max_pixels].sum()) / total,
        }


def _spread(values: np.ndarray, counts: np.ndarray) -> Record:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[order])
    median = values[order][np.searchsorted(2 * reached, reached[-1])]
    return {"min": int(values.min()), "median": int(median), "max": int(values.max())}


def _sizes(index: Index) -> list[_Sizes]:
    found = [_Sizes() for _ in index.sources]
    for file, _, batch in index.batches(["verdict", "sizes"]):
        own = batch.filter(pc.equal(batch["verdict"], "train"))
        found[index.source_of[file]].add(pc.list_flatten(own["sizes"]).to_numpy(zero_copy_only=False))
    return found
