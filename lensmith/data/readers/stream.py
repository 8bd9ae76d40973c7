"""Sources read from front to back without an index, in shards. Which process reads which is the caller's matter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lensmith.core.errors import DataError
from lensmith.data.readers.base import MAX_ROW_BYTES, RowFile, StreamRow
from lensmith.data.readers.files import check_extension, expand, open_rows
from lensmith.data.readers.hf_rows import dataset_name, hub_stream, is_hub, stream_hub_rows
from lensmith.data.readers.json_rows import JsonLines, stream_lines
from lensmith.data.readers.parquet_rows import stream_parquet
from lensmith.data.readers.remote import expand_remote, is_remote, mask, open_remote, url_path
from lensmith.data.readers.tar_rows import stream_tar
from lensmith.data.strict_json import printable


class Shard(Protocol):
    """A part of a source that is read by one process. Picklable; opens nothing before `rows`."""

    @property
    def name(self) -> str: ...

    def rows(self, start: int = 0) -> Iterator[StreamRow]:
        """The rows from 0-based row `start` on, the same at every call. Memory: a row, or a Parquet row group.

        A wrong row comes with its error. Raises DataError where the file breaks off, and NO_ROWS.
        """
        ...


def open_shards(
    path: str,
    base: Path,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> list[Shard]:
    """The shards of a source, in order: one for each local or remote file, and for each shard of a Hub dataset.

    Names are seen from `base`. Raises ConfigError NO_FILES, FILE_PATTERN, FILE_TYPE, EXTRA, SPLIT, DATASET_NAME;
    DataError REMOTE, DATASET.
    """
    if is_hub(path):
        count = hub_stream(path, split, subset, revision, os.getpid()).num_shards
        return [HubShard(path, split, subset, revision, i, count, max_row_bytes) for i in range(count)]
    if is_remote(path):
        return [_remote_shard(url, max_row_bytes) for url in expand_remote(path)]
    return [_local_shard(file, base, split, max_row_bytes) for file in expand(path, base)]


def _remote_shard(url: str, max_row_bytes: int) -> Shard:
    check_extension(Path(url_path(url)), mask(url))
    return FileShard(mask(url), url, max_row_bytes)


def _local_shard(file: Path, base: Path, split: str, max_row_bytes: int) -> Shard:
    name = printable(str(file.relative_to(base) if file.is_relative_to(base) else file))
    rows = open_rows(file, name=name, max_row_bytes=max_row_bytes, split=split)
    if isinstance(rows, JsonLines) or file.suffix.lower() in (".parquet", ".tar"):
        return FileShard(name, str(file), max_row_bytes)
    return RowFileShard(name, rows)


@dataclass(frozen=True)
class FileShard:
    """A local or remote file that can be read from front to back."""

    name: str
    path: str
    max_row_bytes: int

    def rows(self, start: int = 0) -> Iterator[StreamRow]:
        remote = is_remote(self.path)
        kind = (url_path(self.path) if remote else Path(self.path)).suffix.lower()
        stream = {".parquet": stream_parquet, ".tar": stream_tar}.get(kind, stream_lines)
        with open_remote(self.path, seek=kind == ".parquet") if remote else open(self.path, "rb") as file:
            yield from stream(file, self.name, start, self.max_row_bytes)


@dataclass(frozen=True)
class RowFileShard:
    """A local JSON array or saved dataset, read by its references."""

    name: str
    file: RowFile

    def rows(self, start: int = 0) -> Iterator[StreamRow]:
        for ref in self.file.scan():
            if ref.number >= start:
                origin = self.file.origin(ref)
                try:
                    yield StreamRow(ref.number, origin, self.file.read(ref))
                except DataError as error:
                    yield StreamRow(ref.number, origin, None, error)


@dataclass(frozen=True)
class HubShard:
    """One of the `count` shards of a dataset on the Hub."""

    path: str
    split: str
    subset: str | None
    revision: str | None
    index: int
    count: int
    max_row_bytes: int

    @property
    def name(self) -> str:
        name = dataset_name(self.path, self.path, self.split, self.subset)
        return f"{name}-{self.index:05}-of-{self.count:05}"

    def rows(self, start: int = 0) -> Iterator[StreamRow]:
        data = hub_stream(self.path, self.split, self.subset, self.revision, os.getpid())
        yield from stream_hub_rows(data.shard(self.count, self.index), self.name, start, self.max_row_bytes)
