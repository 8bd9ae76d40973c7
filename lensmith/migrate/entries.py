"""dataset_info.json: where a data set is and how its rows read, as a source of a lensmith run."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lensmith.core.errors import ConfigError
from lensmith.data.readers import EXTENSIONS
from lensmith.data.readers.table_rows import TABLES
from lensmith.migrate.given import Given

FILE = "dataset_info.json"
COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": None, "messages": "conversations",
    "system": None, "tools": None, "images": None, "videos": None, "audios": None, "chosen": None, "rejected": None,
    "kto_tag": None,
}  # fmt: skip
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
KNOWN = (
    "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name", "formatting", "ranking",
    "subset", "split", "folder", "num_samples", "columns", "tags",
)  # fmt: skip
TYPES = (*EXTENSIONS, *TABLES)


@dataclass(frozen=True)
class Entry:
    """A data set. Of `columns` and `tags` an absent one is None: where the file lists some of them, those it does not
    list are switched off."""

    name: str
    where: str
    path: str
    local: bool
    formatting: str = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    num_samples: int | None = None
    columns: Mapping[str, str | None] = field(default_factory=lambda: dict(COLUMNS))
    tags: Mapping[str, str | None] = field(default_factory=lambda: dict(TAGS))
    unknown: tuple[str, ...] = ()

    @property
    def is_labelled(self) -> bool:
        return self.columns["kto_tag"] is not None


class Entries:
    """The entries of `dataset_dir`, read once."""

    def __init__(self, given: Given):
        self.given = given
        self.text = str(given.get("dataset_dir"))
        self.folder: Path | None = None
        self.info: dict[str, Any] = {}
        if self.text == "ONLINE":
            return
        file = self._fetched() if self.text.startswith("REMOTE:") else self._found()
        self.file = str(file)
        self.info = _read(file)

    def _found(self) -> Path:
        """From the folder of the command, as there; else from that of the file, which may have been moved."""
        beside = Path(self.given.tree.file).resolve().parent if self.given.tree.file else self.given.folder
        tried = [self.given.path(self.text), Path(os.path.normpath(beside / self.text))]
        for folder in tried:
            if (folder / FILE).is_file():
                self.folder = folder
                return folder / FILE
        places = " and ".join(dict.fromkeys(map(str, tried)))
        self.given.refuse("dataset_dir", f"there is no {FILE} in {places}", "name the folder that holds it; relative "
                          "paths count from the folder in which the command is called")  # fmt: skip

    def _fetched(self) -> Path:
        from huggingface_hub import hf_hub_download

        repository = self.text.removeprefix("REMOTE:")
        return Path(hf_hub_download(repository, FILE, repo_type="dataset"))

    def entry(self, name: str) -> Entry:
        """Raises `ConfigError` DATASET_INFO."""
        if self.text == "ONLINE":
            return Entry(name, "dataset_dir: ONLINE", f"hf://{name}", local=False)
        if name not in self.info:
            near = difflib.get_close_matches(name, self.info, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"known there: {', '.join(list(self.info)[:12])}"
            raise ConfigError("DATASET_INFO", f"{name!r} is not in {self.file}", remedy=remedy,
                              where=self.given.where("dataset"))  # fmt: skip
        value = self.info[name]
        where = f"{self.file} {name}"
        if not isinstance(value, dict):
            raise _wrong(where, "is not a mapping")
        return self._entry(name, where, cast("dict[str, Any]", value))

    def _entry(self, name: str, where: str, value: dict[str, Any]) -> Entry:
        path, local = self._path(where, value)
        formatting = value.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt", "openai"):
            raise _wrong(where, f"formatting is {formatting!r}", "known: alpaca, sharegpt, openai")
        if value.get("folder"):
            raise _wrong(where, f"folder is {value['folder']!r}: a folder inside a Hub repository is not read",
                         "fetch the files, and name them with file_name")  # fmt: skip
        number = value.get("num_samples")
        if number is not None and (not isinstance(number, int) or number < 1):
            raise _wrong(where, f"num_samples is {number!r}", "write a whole number above 0")
        columns = _listed(value, "columns", COLUMNS, where)
        tags = _listed(value, "tags", TAGS, where) if formatting != "alpaca" else dict(TAGS)
        inside = [f"columns.{k}" for k in value.get("columns") or {} if k not in COLUMNS]
        inside += [f"tags.{k}" for k in value.get("tags") or {} if k not in TAGS]
        return Entry(
            name, where, path, local, formatting, bool(value.get("ranking", False)), value.get("subset"),
            value.get("split") or "train", number, columns, tags, (*(k for k in value if k not in KNOWN), *inside),
        )  # fmt: skip

    def _path(self, where: str, value: dict[str, Any]) -> tuple[str, bool]:
        if value.get("hf_hub_url"):
            return f"hf://{value['hf_hub_url']}", False
        for key in ("ms_hub_url", "om_hub_url"):
            if value.get(key):
                raise _wrong(where, f"{key} is {value[key]!r}: data comes from files or the Hugging Face Hub",
                             "add hf_hub_url, or fetch the files and name them with file_name")  # fmt: skip
        if value.get("script_url"):
            raise _wrong(where, f"script_url is {value['script_url']!r}: code of a data set is never run",
                         "write its rows to a .jsonl or .parquet file and name it with file_name")  # fmt: skip
        if value.get("cloud_file_name"):
            return str(value["cloud_file_name"]), False
        if not value.get("file_name"):
            raise _wrong(where, "names no file", "add file_name")
        return self._local(where, str(value["file_name"])), True

    def _local(self, where: str, name: str) -> str:
        if self.folder is None:
            raise _wrong(where, f"file_name is {name!r}, and dataset_dir is on the Hub", "use hf_hub_url there")
        path = Path(os.path.normpath(self.folder / name))
        if not path.exists():
            raise _wrong(where, f"there is no file {path}", "correct file_name")
        kinds = (
            {path.suffix.lower()}
            if path.is_file()
            else {p.suffix.lower() for p in path.iterdir() if not p.name.startswith(".")}
        )
        if len(kinds) > 1:
            raise _wrong(where, f"{name} holds files of several types: {', '.join(sorted(kinds))}",
                         "keep one type in a folder")  # fmt: skip
        if other := kinds - set(TYPES):
            raise _wrong(where, f"{name} is of type {other.pop() or 'none'!r}, which is not read",
                         "write its rows as .jsonl or .parquet (datasets: Dataset.to_parquet)")  # fmt: skip
        return str(path)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("DATASET_INFO", f"cannot be read: {error}", where=str(file)) from None
    if not isinstance(found, dict):
        raise ConfigError("DATASET_INFO", "is not a mapping of names to data sets", where=str(file))
    return cast("dict[str, Any]", found)


def _listed(value: dict[str, Any], key: str, defaults: Mapping[str, str | None], where: str) -> dict[str, str | None]:
    """The columns or tags of an entry. Listing one switches off every other, defaults too."""
    given = value.get(key)
    if given is None:
        return dict(defaults)
    if not isinstance(given, dict) or not all(v is None or isinstance(v, str) for v in given.values()):
        raise _wrong(where, f"{key} is not a mapping of names to names")
    return {name: cast("dict[str, str | None]", given).get(name) for name in defaults}


def _wrong(where: str, problem: str, remedy: str = "mend the entry") -> ConfigError:
    return ConfigError("DATASET_INFO", problem, where=where, remedy=remedy)
