"""A LLaMA-Factory file as its user wrote it: every key known, every value of its type, every place remembered."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from lensmith.config.build import apply_overrides
from lensmith.config.yaml_file import Tree
from lensmith.core.errors import ConfigError
from lensmith.migrate.keys import Key, Kind, all_keys

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NUMBER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?")
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def is_llamafactory(tree: Tree) -> bool:
    """Whether a YAML file is LLaMA-Factory's: lensmith's names its model under `model`."""
    return "model" not in tree.values and (
        "model_name_or_path" in tree.values or {"stage", "template"} <= set(tree.values)
    )


@dataclass(frozen=True)
class Given:
    """The keys that are given, by type, and where each stands. `folder`: what relative paths count from."""

    tree: Tree
    keys: Mapping[str, Key]
    values: Mapping[str, Any]
    env: Mapping[str, str]
    folder: Path = field(default_factory=Path.cwd)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The value, or LLaMA-Factory's default."""
        found = self.values.get(name)
        return self.keys[name].default if found is None else found

    def where(self, name: str) -> str:
        return self.tree.where((name,)) if name in self.values else f"{self.tree.file} {name} (left out)"

    def refuse(self, name: str, problem: str, remedy: str, code: str = "MIGRATE") -> NoReturn:
        """Raises `ConfigError`, with the place and the value of a key."""
        raise ConfigError(code, f"{name} is {shown(self.get(name))}: {problem}", where=self.where(name), remedy=remedy)

    def path(self, text: str) -> Path:
        """A path as LLaMA-Factory takes it: from the folder that the command is called in."""
        return Path(os.path.normpath(self.folder / Path(text).expanduser()))


def read_given(
    tree: Tree, overrides: Sequence[str] = (), env: Mapping[str, str] | None = None, folder: Path | None = None
) -> Given:
    """Raises `ConfigError` UNKNOWN_KEY and MIGRATE for values of another type; OVERRIDE."""
    env = os.environ if env is None else env
    tree, keys = apply_overrides(tree, overrides), all_keys()
    values: dict[str, Any] = {}
    for name, value in tree.values.items():
        key = keys.get(name)
        if key is not None:
            values[name] = None if value is None else _typed(key, value, tree)
        elif not _on(env.get("ALLOW_EXTRA_ARGS", "")):
            near = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
            raise ConfigError("UNKNOWN_KEY", f"unknown key {name!r}: LLaMA-Factory has none of this name",
                              where=tree.where((name,)),
                              remedy=f"did you mean {near[0]!r}?" if near else "take it out")  # fmt: skip
    return Given(tree, keys, values, env, folder or Path.cwd())


def _on(text: str) -> bool:
    return text.lower() in ("true", "y", "1")


def _typed(key: Key, value: Any, tree: Tree) -> Any:
    if isinstance(value, str) and "${" in value:
        raise ConfigError("MIGRATE", f"{key.name} is {value!r}: interpolations are not resolved",
                          where=tree.where((key.name,)), remedy="write the value itself")  # fmt: skip
    try:
        return _as(key.kind, value)
    except ValueError:
        raise ConfigError("MIGRATE", f"{key.name} is {shown(value)}, must be {_TYPES.get(key.kind, key.kind)}",
                          where=tree.where((key.name,)), remedy="mend the value") from None  # fmt: skip


def _as(kind: Kind, value: Any) -> Any:
    if kind == "bool":
        text = str(value).lower()
        if text not in (*_YES, *_NO):
            raise ValueError
        return text in _YES
    if kind in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        if isinstance(value, str):  # PyYAML, and so many a tool that writes these files, leaves 2e-5 a text
            if _NUMBER.fullmatch(value.strip()) is None:
                raise ValueError
            value = float(value)
        if kind == "float":
            return float(value)
        if int(value) != value:
            raise ValueError
        return int(value)
    if kind == "list":
        found = cast("list[Any]", value) if isinstance(value, list) else str(value).split(",")
        return [str(item).strip() for item in found if str(item).strip()]
    if kind == "text":
        if isinstance(value, list | dict):
            raise ValueError
        return str(value).lower() if isinstance(value, bool) else str(value)
    return value


def shown(value: Any) -> str:
    """A value on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return ",".join(map(str, cast("list[Any]", value)))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
