"""A run's sources as a stream: their shards, formats and lanes."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.formats import Compare, Format, detect
from lensmith.data.index import Index
from lensmith.data.lanes import LaneSpec
from lensmith.data.load import LoaderSpec, SourceFile
from lensmith.data.options import Concat, Source, data_root
from lensmith.data.readers import StreamRow, expand, is_hub, is_remote, mask, open_shards, pin_revision
from lensmith.data.readers.stream import Shard
from lensmith.data.windows import (
    StreamSpec,
    forget_windows,
    number_of,
    read_window,
    window_folders,
)
from lensmith.objective.options import compares
from lensmith.recipe.run import Located

DETECT_ROWS = 1000
"""Rows of each shard that are looked at for one that can be read."""


def stream_spec(located: Located, loader: LoaderSpec) -> StreamSpec:
    """`loader.files` is replaced by one entry for each source and folder its pictures count from.

    Raises `UserError`s: a source that has no shards, or whose first row tells no format; what a stream cannot do.
    """
    run, assumed = located.run, located.run.data.stream
    assert assumed is not None
    files: list[SourceFile] = []
    lanes: list[LaneSpec] = []
    names: set[str] = set()
    for number, source in enumerate(run.data.train):
        shards = _shards(source, located.folder, loader.max_row_bytes)
        name = source.name or _name(source.path, [shard.name for _, shard in shards])
        name = free_name(name, names)
        names.add(name)
        kind = source.format or _detect([shard for _, shard in shards], compares(run.objective))
        placed: list[tuple[int, Shard]] = []
        for base, shard in shards:
            file = SourceFile(name, "", kind, base, source.weight, source.max_samples, name)
            if file not in files:
                files.append(file)
            own = shard if source.max_samples is None else FirstRows(shard, source.max_samples)
            placed.append((files.index(file), own))
        lanes.append(LaneSpec(tuple(placed), source.share, _passes(located, number)))
    if isinstance(run.data.mixture, Concat):  # all shards are one lane
        lanes = [LaneSpec(tuple(s for lane in lanes for s in lane.shards), 1.0, _passes(located, None))]
    if not any(lane.share for lane in lanes):
        raise ConfigError("CONFIG", "no source of the mixture has a share", remedy="set data.train[].share above 0")
    return StreamSpec(
        replace(loader, files=tuple(files)), tuple(lanes), run.train.seed, assumed.window, run.samples_per_step,
        run.batch.tokens, Path(), assumed.wrong == "drop",
    )  # fmt: skip


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it where another source has it."""
    numbered = (f"{name}-{n}" for n in range(2, len(taken) + 3))
    return name if name not in taken else next(n for n in numbered if n not in taken)


@dataclass(frozen=True)
class FirstRows:
    """The first `most` rows of a shard."""

    shard: Shard
    most: int

    @property
    def name(self) -> str:
        return f"{self.shard.name}[:{self.most}]"

    def rows(self, start: int = 0) -> Iterator[StreamRow]:
        if start < self.most:
            for row in self.shard.rows(start):
                yield row
                if row.number + 1 >= self.most:
                    return


class OpenStream:
    """A stage's stream in the run folder: its windows, of which the tables stay as the ledger. Every rank reads all of
    it and makes the same windows; those of the first rank are the ledger, those of the others go when they are used."""

    def __init__(self, spec: StreamSpec, output: Path, stage: int, rank: int = 0):
        folder = stream_folder(output, stage)
        self.folder = folder.with_name(f"{folder.name}.rank-{rank}") if rank else folder
        self._rank = rank
        self.spec = replace(spec, folder=self.folder)
        self._window = -1
        self._counts: dict[int, dict[str, Any]] = {}
        self._total: tuple[int, dict[str, Any]] | None = None

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Forget the windows behind the one in use: they are made again. At the beginning, all."""
        if state is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            forget_windows(self.folder, state["window"])

    def now_in(self, window: int) -> bool:
        """Whether this is another window than the last time."""
        another, self._window = window != self._window, window
        return another

    def is_over(self) -> None:
        """The pipeline is closed: it left the windows that were used."""
        self._window = -1
        if self._rank:
            shutil.rmtree(self.folder, ignore_errors=True)

    def windows(self) -> list[Path]:
        """The windows up to the one in use; of a stage that is over, all."""
        return window_folders(self.folder, self._window if self._window >= 0 else None)

    def counts(self) -> dict[str, Any]:
        """read, train, dropped, by_reason, rows of these windows."""
        if self._total is None or self._total[0] != self._window or self._window < 0:
            self._total = self._window, self._summed()
        return self._total[1]

    def _summed(self) -> dict[str, Any]:
        each: list[dict[str, Any]] = []
        for folder in self.windows():
            number = number_of(folder)
            if number not in self._counts:
                self._counts[number] = _counts_of(self.spec.loader, folder)
            each.append(self._counts[number])
        total: dict[str, Any] = {k: sum(c[k] for c in each) for k in ("read", "train", "dropped", "rows")}
        reasons = sum((Counter(c["by_reason"]) for c in each), Counter[str]())
        return {**total, "by_reason": dict(sorted(reasons.items()))}


def _counts_of(loader: LoaderSpec, folder: Path) -> dict[str, Any]:
    return Index((read_window(folder).drop_columns(["file"]),), replace(loader, files=loader.files[:1])).counts()


def stream_folder(output: Path, stage: int) -> Path:
    return output / "stream" / f"stage-{stage + 1}"


def stream_identity(spec: StreamSpec) -> dict[str, Any]:
    """What must not change between a checkpoint and its resume: the shards by name, and how they are drawn."""
    shards = [[shard.name for _, shard in lane.shards] for lane in spec.lanes]
    return {
        "data": hashlib.blake2b(repr(shards).encode(), digest_size=12).hexdigest(),
        "num_shards": [len(s) for s in shards],
        "source weights": [f.weight for f in spec.loader.files],
        "shares and passes (share, epochs)": [[lane.share, lane.passes] for lane in spec.lanes],
        "data.stream": {"window": spec.window, "wrong": "drop" if spec.drop_wrong else "stop"},
    }


def _shards(source: Source, folder: Path, max_row_bytes: int) -> list[tuple[str, Shard]]:
    """(folder its pictures count from, shard)."""
    revision = pin_revision(source.path, source.revision) if is_hub(source.path) else None
    shards = open_shards(
        source.path, folder, split=source.split, subset=source.subset, revision=revision, max_row_bytes=max_row_bytes
    )
    if is_hub(source.path) or is_remote(source.path):
        elsewhere = str((folder / source.media_dir).resolve() if source.media_dir else folder.resolve())
        return [(elsewhere, shard) for shard in shards]
    files = expand(source.path, folder)  # one shard each
    return [(str(data_root(f, source.media_dir, folder)), shard) for f, shard in zip(files, shards, strict=True)]


def _name(path: str, shards: list[str]) -> str:
    """As a source of an index is named: after its file; after the path where that names several."""
    shown = path if is_hub(path) else shards[0] if len(shards) == 1 else mask(path)
    last = shown.rstrip("/").rsplit("/", 1)[-1]
    return (last.rsplit(".", 1)[0] if len(shards) == 1 or is_hub(path) else last) or shown


def _detect(shards: list[Shard], compare: Compare | None) -> Format:
    """By the first row that can be read. Raises DataError UNKNOWN_FORMAT, NO_ROWS, and what the shards raise."""
    wrong: DataError | None = None
    for shard in shards:
        try:
            for row in islice(shard.rows(), DETECT_ROWS):
                if row.row is not None:
                    return detect(row.row, row.origin, compare)
                wrong = wrong or row.error
        except DataError as error:
            if error.code != "NO_ROWS":
                raise
    problem, where = "no row can be read", shards[0].name
    raise wrong or DataError("NO_ROWS", problem, where=where, remedy="take it out of the run file")


def _passes(located: Located, number: int | None) -> int | None:
    """Passes over a lane: its own `epochs`, else once with `exhausted: leave_out`, else `train.epochs` of everything
    (without end for a mixture that repeats)."""
    run = located.run
    if number is None:
        key, epochs = "train.epochs", run.train.epochs
    else:
        once = 1.0 if getattr(run.data.mixture, "exhausted", "") == "leave_out" else None
        own = run.data.train[number].epochs
        key, epochs = f"data.train[{number}].epochs", once if own is None else own
    if epochs is not None and epochs != int(epochs):
        raise ConfigError("CONFIG", f"{key} is {epochs}, and a stream is read in whole passes",
                          remedy="set a whole number, and train.max_steps for the length")  # fmt: skip
    return None if epochs is None else int(epochs)
