"""Where the pictures of a data set are: what relative paths count from, and the folders of absolute ones.

LLaMA-Factory opens any file that a row names. Here a row reaches only into folders that the run names, so migration
looks at the first rows and writes their folders into the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from lensmith.core.errors import DataError
from lensmith.data.readers import open_rows

LOOKED_AT = 2000
"""Rows of each file."""
NEVER = tuple(map(Path, ("/", "/etc", "/proc", "/sys", "/dev", "/root", "/home", "/var", "/usr", "/boot", "/run")))
"""Folders that no data set opens by itself."""


def files_of(path: str) -> list[Path]:
    """The files of a data set of one type; none of one that is not here."""
    place = Path(path)
    if "://" in path:
        return []
    return [place] if place.is_file() else sorted(p for p in place.iterdir() if not p.name.startswith("."))


def paths_in(path: str, columns: Sequence[str]) -> list[str]:
    """Pictures and videos that the first rows name by a path."""
    found: list[str] = []
    for file in files_of(path):
        rows = open_rows(file)
        try:
            for ref in islice(rows.scan(), LOOKED_AT):
                row = rows.read(ref)
                for column in columns:
                    found += _texts(row.get(column))
        except DataError:  # told, with its row, when the data is read
            continue
        finally:
            rows.close()
    return found


def first_row(path: str) -> dict[str, object]:
    """{} where it cannot be read, which is told when the data is."""
    for file in files_of(path):
        rows = open_rows(file)
        try:
            return rows.read(next(iter(rows.scan())))
        except (DataError, StopIteration):
            continue
        finally:
            rows.close()
    return {}


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str) and "://" not in value and not value.startswith("data:"):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def counts_from(paths: Sequence[str], media: Path, folder: Path) -> Path:
    """The folder of relative paths: the media folder, or that of the command where a path is only there, as there."""
    for path in paths:
        if not os.path.isabs(path) and not (media / path).is_file() and (folder / path).is_file():
            return folder
    return media


def roots_of(paths: Sequence[str], base: Path) -> list[str]:
    """Folders that these paths lie in, besides `base`: of absolute ones, and where links in `base` lead."""
    parents = {os.path.dirname(os.path.realpath(p)) for p in paths if os.path.isabs(p) and os.path.isfile(p)}
    links = {
        os.path.dirname(os.path.realpath(base / p)) for p in paths if not os.path.isabs(p) and (base / p).is_file()
    }
    outside = {p for p in parents | links if not Path(p).is_relative_to(os.path.realpath(base))}
    return sorted(found for found in _joined(outside) if Path(found) not in NEVER)


def _joined(folders: set[str]) -> set[str]:
    """What the folders have in common, apart for each folder below the root of the file system."""
    groups: dict[str, list[str]] = {}
    for folder in folders:
        groups.setdefault("/".join(folder.split("/")[:3]), []).append(folder)
    return {os.path.commonpath(group) for group in groups.values()}
