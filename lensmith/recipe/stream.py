"""A run's sources as a stream: their shards, formats and lanes."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from lensmith.core.errors import DataError
from lensmith.data.formats import detect
from lensmith.data.index import Index
from lensmith.data.lanes import LaneSpec
from lensmith.data.load import LoaderSpec, SourceFile
from lensmith.data.options import Concat, Source
from lensmith.data.readers import is_hub, is_remote, open_shards, pin_revision
from lensmith.data.readers.stream import FileShard, Shard
from lensmith.data.windows import StreamSpec, read_window
from lensmith.recipe.run import Located


def stream_spec(located: Located, loader: LoaderSpec) -> StreamSpec:
    """`loader.files` is replaced by one entry for each source and folder its pictures count from.

    Raises `UserError`s: a source that has no shards, or whose first row tells no format.
    """
    run, assumed = located.run, located.run.data.stream
    assert assumed is not None
    files: list[SourceFile] = []
    lanes: list[LaneSpec] = []
    names: set[str] = set()
    for source in run.data.train:
        shards = _shards(source, located.folder, loader.max_row_bytes)
        name = source.name or Path(shards[0].name).stem
        name = name if name not in names else f"{name}-{len(names)}"
        names.add(name)
        kind = source.format or _detect(shards[0])
        own = SourceFile(name, "", kind, "", source.weight, None, name)
        placed: list[tuple[int, Shard]] = []
        for shard in shards:
            file = replace(own, base=_base(source, shard, located.folder))
            if file not in files:
                files.append(file)
            placed.append((files.index(file), shard))
        lanes.append(LaneSpec(tuple(placed), source.share, _passes(located, source)))
    if isinstance(run.data.mixture, Concat):  # all shards are one lane
        lanes = [LaneSpec(tuple(s for lane in lanes for s in lane.shards), 1.0, _passes(located, None))]
    return StreamSpec(
        replace(loader, files=tuple(files)), tuple(lanes), run.train.seed, assumed.window, run.samples_per_step,
        run.batch.tokens, Path(), assumed.wrong == "drop",
    )  # fmt: skip


class OpenStream:
    """A stage's stream in the run folder: its windows, of which the tables stay as the ledger."""

    def __init__(self, spec: StreamSpec, output: Path, stage: int):
        self.folder = stream_folder(output, stage)
        self.spec = replace(spec, folder=self.folder)
        self._window = -1
        self._counts: dict[int, dict[str, Any]] = {}

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Forget the windows from where the run goes on: they are made again."""
        first = state["window"] if state else 0
        for folder in window_folders(self.folder):
            if int(folder.name.rsplit("-", 1)[1]) >= first:
                shutil.rmtree(folder)

    def now_in(self, window: int) -> bool:
        """Whether this is another window than the last time."""
        another, self._window = window != self._window, window
        return another

    def windows(self) -> list[Path]:
        """The windows up to the one in use; of a stage that is over, all."""
        return window_folders(self.folder, self._window if self._window >= 0 else None)

    def counts(self) -> dict[str, Any]:
        """read, train, dropped, by_reason, rows of these windows."""
        for folder in self.windows():
            number = int(folder.name.rsplit("-", 1)[1])
            if number not in self._counts:
                self._counts[number] = Index((read_window(folder).drop_columns(["file"]),), self._one_file()).counts()
        total: dict[str, Any] = {
            k: sum(c[k] for c in self._counts.values()) for k in ("read", "train", "dropped", "rows")
        }
        reasons = sum((Counter(c["by_reason"]) for c in self._counts.values()), Counter[str]())
        return {**total, "by_reason": dict(sorted(reasons.items()))}

    def _one_file(self) -> LoaderSpec:
        return replace(self.spec.loader, files=self.spec.loader.files[:1])


def stream_folder(output: Path, stage: int) -> Path:
    return output / "stream" / f"stage-{stage + 1}"


def window_folders(folder: Path, last: int | None = None) -> list[Path]:
    """The windows made so far, in order, up to number `last`."""
    found = sorted(folder.glob("window-*"))
    return found if last is None else [f for f in found if int(f.name.rsplit("-", 1)[1]) <= last]


def stream_identity(spec: StreamSpec) -> dict[str, Any]:
    """What must not change between a checkpoint and its resume: the shards by name, and how they are drawn."""
    shards = [[shard.name for _, shard in lane.shards] for lane in spec.lanes]
    return {
        "data": hashlib.blake2b(repr(shards).encode(), digest_size=12).hexdigest(),
        "num_shards": [len(s) for s in shards],
        "source weights": [f.weight for f in spec.loader.files],
        "shares": [[lane.share, lane.passes] for lane in spec.lanes],
        "data.stream": [spec.window, spec.drop_wrong],
    }


def _shards(source: Source, folder: Path, max_row_bytes: int) -> list[Shard]:
    revision = pin_revision(source.path, source.revision) if is_hub(source.path) else None
    return open_shards(
        source.path, folder, split=source.split, subset=source.subset, revision=revision, max_row_bytes=max_row_bytes
    )


def _base(source: Source, shard: Shard, folder: Path) -> str:
    if source.media_dir:
        return str((folder / source.media_dir).resolve())
    if isinstance(shard, FileShard) and not is_remote(shard.path):
        return str(Path(shard.path).parent.resolve())
    return str(folder.resolve())


def _detect(shard: Shard) -> Any:
    for row in shard.rows():
        if row.row is not None:
            return detect(row.row, row.origin)
    raise DataError("NO_ROWS", "the shard holds no row that can be read", where=shard.name)


def _passes(located: Located, source: Source | None) -> int | None:
    """Passes over a lane: its own `epochs`, else once with `exhausted: leave_out`, else `train.epochs` of everything
    (without end for a mixture that repeats)."""
    run = located.run
    if source is None:
        return None if run.train.epochs is None else max(1, round(run.train.epochs))
    if source.epochs is not None:
        return max(1, round(source.epochs))
    return 1 if getattr(run.data.mixture, "exhausted", "") == "leave_out" else None
