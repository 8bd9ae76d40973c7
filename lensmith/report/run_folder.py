"""Reading what a run left in its folder. Every file is optional; one that is there but broken is a `DataError`."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from lensmith.core.errors import DataError
from lensmith.report.metrics import Record, read_metrics
from lensmith.report.tables import SourceCount

DROPPED_COLUMNS = ("origin", "source", "reason", "detail")
PICTURE_PIXELS = 448  # longest side of a picture on the page


@dataclass(frozen=True)
class Ledger:
    """Counts per source in order of appearance, and the rows that were not trained."""

    counts: list[SourceCount] = field(default_factory=list[SourceCount])
    dropped: pa.Table | None = None

    def dropped_rows(self, limit: int | None = None) -> Iterator[tuple[str, ...]]:
        """`DROPPED_COLUMNS` as text, in the order of the ledger."""
        if self.dropped is not None:
            for batch in self.dropped.slice(0, limit).to_batches():
                for row in batch.to_pylist():
                    yield tuple("" if row[name] is None else str(row[name]) for name in DROPPED_COLUMNS)


@dataclass(frozen=True)
class RunFolder:
    path: Path
    metrics: list[Record]
    summary: Record
    trains: Record
    versions: Record
    samples: list[Record]
    ledger: Ledger
    config: str


def read_run_folder(path: Path) -> RunFolder:
    """Raises `DataError` for a broken file, and for a folder that is not there."""
    if not path.is_dir():
        raise DataError("RUN_FOLDER", "not a folder", where=str(path), remedy="name the folder of a run")
    config = path / "run.yaml"
    return RunFolder(
        path=path,
        metrics=read_metrics(path / "metrics.jsonl"),
        summary=_read_json(path / "summary.json", {}),
        trains=_read_json(path / "trains.json", {}),
        versions=_read_json(path / "versions.json", {}),
        samples=_read_json(path / "samples.json", []),
        ledger=read_ledger(path / "ledger.parquet"),
        config=config.read_text("utf-8", errors="replace") if config.exists() else "",
    )


def read_ledger(path: Path) -> Ledger:
    """Counts are made column-wise: a ledger may have millions of rows."""
    if not path.exists():
        return Ledger()
    columns = ["source", "verdict", "tokens", "supervised", "images", "origin", "reason", "detail"]
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, str(error)) from None
    trained = pc.field("verdict") == "train"
    held = pc.field("verdict") == "held_out"
    dropped = table.filter(~trained & ~held)
    counts = {source: SourceCount(source) for source in table["source"].unique().to_pylist()}
    sums = [(name, "sum") for name in ("tokens", "supervised", "images")]
    for row in table.filter(trained).group_by("source").aggregate([("verdict", "count"), *sums]).to_pylist():
        count = counts[row["source"]]
        count.train = row["verdict_count"]
        count.tokens, count.supervised, count.images = (row[f"{name}_sum"] or 0 for name, _ in sums)
    for row in table.filter(held).group_by("source").aggregate([("verdict", "count")]).to_pylist():
        counts[row["source"]].held_out = row["verdict_count"]
    for row in dropped.group_by(["source", "reason"]).aggregate([("verdict", "count")]).to_pylist():
        counts[row["source"]].dropped[str(row["reason"])] = row["verdict_count"]
    return Ledger(list(counts.values()), dropped.select(list(DROPPED_COLUMNS)))


def picture(folder: Path, name: str) -> tuple[str, int] | str:
    """A PNG or JPEG of the run folder as a `data:` URL with its width in pixels, or the reason why it is not shown.

    It is decoded and encoded anew, so that only pixels reach the page.
    """
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "outside the run folder"
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
                return _data_url(image.convert("RGB")), image.width
    except FileNotFoundError:
        return "file not found"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "cannot be decoded"


def _data_url(image: Image.Image) -> str:
    best = b""
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=85)
        best = min(best or buffer.getvalue(), buffer.getvalue(), key=len)
    kind = "png" if best.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(best).decode()}"


def _read_json(path: Path, absent: Any) -> Any:
    if not path.exists():
        return absent
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise _broken(path, str(error)) from None
    if not isinstance(value, type(absent)):
        raise _broken(path, f"the top level is a {type(value).__name__}")
    return value


def _broken(path: Path, what: str) -> DataError:
    return DataError("RUN_FOLDER", what, where=str(path), remedy="delete this file to have a report without it")
