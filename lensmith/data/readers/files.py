"""Which files a path of the run file names, and the reader of each."""

from __future__ import annotations

import glob
import itertools
import math
import re
from pathlib import Path

from lensmith.core.errors import ConfigError
from lensmith.data.readers.base import EXTENSIONS, MAX_ROW_BYTES, RowFile
from lensmith.data.readers.hf_rows import DatasetRows, is_hub, is_saved_dataset
from lensmith.data.readers.json_rows import open_json
from lensmith.data.readers.parquet_rows import ParquetRows
from lensmith.data.readers.table_rows import TABLES, TableRows
from lensmith.data.readers.tar_rows import TarRows
from lensmith.data.strict_json import printable

MAX_FILES = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def open_rows(
    path: Path | str,
    *,
    name: str | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
) -> RowFile:
    """Choose the reader: a Hugging Face dataset (`hf://org/name`, or a folder that `save_to_disk` wrote), else by
    extension; JSON array or JSON lines by the first character of the text.

    `name` is what origins call the file, by default `path` as given; on one line, whatever stands in it. `split`,
    `subset` and `revision` are of Hugging Face datasets. Raises ConfigError FILE_TYPE, EXTRA.
    """
    name = printable(str(path) if name is None else name)
    if is_hub(path) or is_saved_dataset(Path(path)):
        return DatasetRows(path, name, max_row_bytes, split=split, subset=subset, revision=revision)
    path = Path(path)
    if path.suffix.lower() in TABLES:
        return TableRows(path, name, max_row_bytes)
    extension = check_extension(path, name)
    if extension == ".parquet":
        return ParquetRows(path, name, max_row_bytes)
    if extension == ".tar":
        return TarRows(path, name, max_row_bytes)
    return open_json(path, name, max_row_bytes)


def check_extension(path: Path, name: str) -> str:
    """The extension in small letters. Raises ConfigError FILE_TYPE."""
    extension = path.suffix.lower()
    if extension in EXTENSIONS:
        return extension
    if path.name.lower().endswith((".tar.gz", ".tgz")):
        raise ConfigError("FILE_TYPE", "rows of a compressed archive cannot be read at random", where=name,
                          remedy="unpack it to a .tar: `gunzip`, and name that")  # fmt: skip
    raise ConfigError("FILE_TYPE", f"{path.suffix or 'no extension'!r} is not a known file type", where=name,
                      remedy=f"known are {', '.join(EXTENSIONS)}")  # fmt: skip


def expand(path: str, base: Path) -> list[Path]:
    """The files that `path` (a file, a folder, a glob or `shard-{000..009}.tar`, relative to `base`) names, sorted.

    A folder gives its own files with a known extension, dot files left out; one that `save_to_disk` wrote is itself
    the file. Raises ConfigError NO_FILES, FILE_PATTERN.
    """
    target = base / path
    if _is_one(target):
        return [target]
    if target.is_dir():
        found = [p for p in target.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
        return _some([p for p in found if p.is_file()], path, base, f"a folder without {', '.join(EXTENSIONS)} files")
    found = [_some(_matches(base, name), name, base, "no such file, folder or match") for name in expand_braces(path)]
    return sorted(set(itertools.chain(*found)))


def _matches(base: Path, name: str) -> list[Path]:
    names = [name] if _is_one(base / name) else glob.glob(name, root_dir=base, recursive=True)
    return [base / n for n in names if _is_one(base / n)]


def _is_one(path: Path) -> bool:
    return path.is_file() or is_saved_dataset(path)


def _some(files: list[Path], path: str, base: Path, otherwise: str) -> list[Path]:
    if not files:
        raise ConfigError("NO_FILES", f"{path!r} is {otherwise}", where=str(base),
                          remedy="correct the path of this source")  # fmt: skip
    return sorted(files)


def expand_braces(path: str) -> list[str]:
    """`a-{08..10}.{tar,json}` as the six names it stands for; other braces stay. Raises ConfigError FILE_PATTERN."""
    pieces = _BRACES.split(path)
    choices = [_alternatives(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MAX_FILES:
        raise ConfigError("FILE_PATTERN", f"{path!r} stands for more than {MAX_FILES:,} files",
                          remedy="name fewer files, or a folder")  # fmt: skip
    return ["".join(names) for names in itertools.product(*choices)]


def _alternatives(body: str) -> list[str]:
    bounds = _RANGE.fullmatch(body)
    if bounds is None:
        return body.split(",") if "," in body else [f"{{{body}}}"]
    first, last = bounds.groups()
    if int(last) < int(first):
        raise ConfigError("FILE_PATTERN", f"{{{body}}} counts down and names nothing",
                          remedy=f"write {{{last}..{first}}}")  # fmt: skip
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)[: MAX_FILES + 1]]
