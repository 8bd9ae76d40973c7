"""Rows of Hugging Face datasets: a folder that `save_to_disk` wrote, or `hf://org/name` on the Hub.

Rows are taken as Arrow stores them, so nothing is decoded: a picture is `{"bytes": ..., "path": ...}` at any depth.
`datasets` is imported on use; it is an extra.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from lensmith.core.errors import ConfigError, DataError, UserError
from lensmith.data.readers.base import RowRef, StreamRow, no_rows
from lensmith.data.readers.parquet_rows import table_row
from lensmith.data.strict_json import parse_json, printable

_HUB = re.compile(r"hf://(?:datasets/)?([\w.-]+(?:/[\w.-]+)?)/?")
_NO_SPLIT = re.compile(r"(?:Unknown|Bad) split")


def is_hub(path: Path | str) -> bool:
    return str(path).startswith("hf://")


def is_saved_dataset(path: Path) -> bool:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    single = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return single or _is_dict(path)


def dataset_name(path: Path | str, name: str, split: str, subset: str | None) -> str:
    """What origins call a dataset: with its split, for a run may read several of one dataset."""
    subset = f"/{subset}" if subset else ""
    return f"{name}{subset}[{split}]" if is_hub(path) or _is_dict(Path(path)) else name


def _is_dict(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def pin_revision(path: str, revision: str | None) -> str | None:
    """The commit that `revision` of a Hub dataset is now, so that all processes and a resumed run read the same rows;
    `revision` itself where the Hub is offline. Raises ConfigError DATASET_NAME, DataError DATASET."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    name = _repository(path)
    if is_offline_mode():
        return revision
    with _named_errors(path):
        return HfApi().dataset_info(name, revision=revision).sha


class DatasetRows:
    """Rows by number, memory-mapped. `split` of a folder that holds one split only is not looked at."""

    def __init__(
        self, path: Path | str, name: str, max_row_bytes: int, *, split: str, subset: str | None, revision: str | None
    ):
        self.notes: tuple[str, ...] = ()
        self._path = path
        self._name = dataset_name(path, name, split, subset)
        self._max_row_bytes = max_row_bytes
        self._split = split
        self._subset = subset
        self._revision = revision
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def close(self) -> None:
        self._data: Any = None

    def origin(self, ref: RowRef) -> str:
        return f"{self._name}:{ref.line}"

    def content_files(self) -> list[Path]:
        data = self._opened()
        about = []
        if not is_hub(self._path):
            about = [f for f in sorted(self._folder().glob("*.json")) if f.name in ("state.json", "dataset_info.json")]
        return [*about, *(Path(file["filename"]) for file in data.cache_files)]

    def scan(self) -> Iterator[RowRef]:
        num_rows = len(self._opened())
        if not num_rows:
            raise no_rows(self._name)
        for number in range(num_rows):
            yield RowRef(number, number + 1, -1, -1)

    def read(self, ref: RowRef) -> dict[str, Any]:
        data, origin = self._opened(), self.origin(ref)
        with _named_errors(origin):
            one: pa.Table = data[ref.number]
            return _row(one, data.features, origin, self._max_row_bytes)

    def _opened(self) -> Any:
        # shared over forks: the memory map has no file position
        if self._data is None:
            with _named_errors(self._name):
                self._data = self._load().with_format("arrow")
        return self._data

    def _load(self) -> Any:
        if is_hub(self._path):
            return load_hub(str(self._path), self._split, self._subset, self._revision, streaming=False)
        return _datasets(self._name).Dataset.load_from_disk(str(self._folder()), keep_in_memory=False)

    def _folder(self) -> Path:
        folder = Path(self._path)
        if not _is_dict(folder):
            return folder
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if self._split not in splits:
            raise ConfigError("SPLIT", f"there is no split {self._split!r}, only {printable(', '.join(splits))}",
                              where=self._name, remedy="set the split of this source to one of these")  # fmt: skip
        return folder / self._split


def load_hub(path: str, split: str, subset: str | None, revision: str | None, *, streaming: bool) -> Any:
    """Raises ConfigError DATASET_NAME, EXTRA, SPLIT; DataError DATASET."""
    name = _repository(path)
    load = _datasets(path).load_dataset
    with _named_errors(path):
        # with the prefix, a folder of that name in the working directory is not taken for it
        return load(f"hf://datasets/{name}", subset, split=split, revision=revision, streaming=streaming)


@lru_cache(maxsize=8)
def hub_stream(path: str, split: str, subset: str | None, revision: str | None, process: int) -> Any:
    """The dataset for streaming, opened once a process: the Hub counts requests."""
    assert process == os.getpid()
    return load_hub(path, split, subset, revision, streaming=True).with_format("arrow")


def stream_hub_rows(data: Any, name: str, start: int, max_row_bytes: int) -> Iterator[StreamRow]:
    """The rows of one shard from row `start` on. Raises DataError DATASET when it breaks off."""
    rows = iter(data.skip(start))
    number = start
    while (one := _next(rows, name)) is not None:
        origin = f"{name}:{number + 1}"
        try:
            yield StreamRow(number, origin, _row(one, data.features, origin, max_row_bytes))
        except DataError as error:
            yield StreamRow(number, origin, None, error)
        number += 1


def _next(rows: Iterator[pa.Table], name: str) -> pa.Table | None:
    with _named_errors(name):
        return next(rows, None)


def _row(one: pa.Table, features: Any, origin: str, max_row_bytes: int) -> dict[str, Any]:
    return _parsed(features, table_row(one, origin, max_row_bytes), origin)


def _parsed(feature: Any, value: Any, origin: str) -> Any:
    """`value` with its columns of JSON text parsed."""
    kind = type(feature).__name__
    if value is None or feature is None:
        return value
    if kind == "Json":
        return parse_json(value.encode(), origin) if feature.decode else value
    if isinstance(feature, dict):
        return {key: _parsed(feature.get(key), item, origin) for key, item in value.items()}
    if kind in ("List", "LargeList"):
        return [_parsed(feature.feature, item, origin) for item in value]
    return value


def _repository(path: str) -> str:
    found = _HUB.fullmatch(path)
    if found is None:
        raise ConfigError("DATASET_NAME", f"{path!r} is no name of a dataset on the Hub",
                          remedy="write hf://organisation/name; split, subset and revision are options")  # fmt: skip
    return found[1]


def _datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ConfigError("EXTRA", "Hugging Face datasets need the package `datasets`", where=name,
                          remedy='pip install "lensmith[datasets]"') from None  # fmt: skip
    return datasets


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 the errors of datasets, pyarrow, httpx and fsspec share no base
        said = printable(" ".join(str(error).split()))[:400]
        if _NO_SPLIT.search(said):
            raise ConfigError("SPLIT", said, where=name, remedy="set the split of this source") from None
        remedy = "correct path, subset, split and revision; a private one needs `hf auth login`"
        raise DataError("DATASET", f"{type(error).__name__}: {said}", where=name, remedy=remedy) from None
