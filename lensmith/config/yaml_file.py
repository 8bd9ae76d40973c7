"""Strict YAML for run files: safe tags only, no duplicate keys, few aliases, `2e-5` is a number, every value located.

PyYAML follows YAML 1.1, where `lr: 2e-5` is a string, `no` is False, `010` is 8 and `12:30:00` is 45000. Here the
scalars of the YAML 1.2 core schema hold, so what looks like a number is one and nothing else is.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# PyYAML has no types.

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lensmith.core.errors import ConfigError

MAX_ALIASES = 100
MAX_VALUES = 100_000
MAX_BYTES = 1 << 20
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Tree:
    """A parsed run file: plain values, the line (1-based) each path stands on, and the override that set a path."""

    values: dict[str, Any]
    file: str = ""
    lines: Mapping[Key, int] = field(default_factory=dict[Key, int])
    overrides: Mapping[Key, str] = field(default_factory=dict[Key, str])

    def where(self, path: Key) -> str:
        """`run.yaml:12 batch.samples`, with the line of the nearest known ancestor, or the override it came by."""
        dotted = ".".join(str(p) for p in path)
        for at, text in self.overrides.items():
            if at == path[: len(at)] or (path not in self.lines and path == at[: len(path)]):
                return f"{dotted} (override {text!r})"
        for end in range(len(path), -1, -1):
            if (line := self.lines.get(path[:end])) is not None:
                return f"{self.file}:{line} {dotted}".strip()
        return f"{self.file} {dotted}".strip()


# One pattern per scalar of the YAML 1.2 core schema, with the characters it may begin with. `<<` is YAML 1.1's merge.
_SCALARS = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9](?:_?[0-9])*$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", list("-+.")),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"^<<$", ["<"]),
)


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema for plain scalars."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes what only the core schema reads as a number (`1e5`)."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """PyYAML writes some line separators into plain text and reads them as spaces; quoted they are escaped."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def dump(values: Any) -> str:
    """YAML text that `parse_tree` (and a YAML 1.1 reader) reads as `values`; keys keep their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> Any:
    """The value of an override (`2e-5`, `8`, `[a, b]`), by the same rules as the file."""
    return _parse(text, "")[0]


def read_tree(path: Path) -> Tree:
    """Parse one run file. Raises `ConfigError` with file and line."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("RUN_FILE", error.strerror or "cannot be read", where=str(path),
                          remedy="name an existing run file") from None  # fmt: skip
    if len(raw) > MAX_BYTES:
        raise ConfigError("RUN_FILE", f"more than {MAX_BYTES:,} bytes", where=str(path), remedy="name a run file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError("ENCODING", "not UTF-8", where=f"{path}:{line}", remedy="save the file as UTF-8") from None
    return parse_tree(text, str(path))


def parse_tree(text: str, file: str = "") -> Tree:
    """Raises ConfigError YAML, YAML_TAG, YAML_ALIAS, DUPLICATE_KEY."""
    values, lines = _parse(text, file)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError("YAML", f"the top level is a {type(values).__name__}, not a mapping", where=file,
                          remedy="write `key: value` lines")  # fmt: skip
    return Tree(values, file, lines)


def _parse(text: str, file: str) -> tuple[Any, dict[Key, int]]:
    lines: dict[Key, int] = {}
    try:
        aliases = sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=_Loader))
        if aliases > MAX_ALIASES:
            raise ConfigError("YAML_ALIAS", f"{aliases} aliases; at most {MAX_ALIASES} are read", where=file)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, lines
            _locate(node, (), lines, file, frozenset())
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or str(error)
        code = "YAML_TAG" if "constructor for the tag" in problem else "YAML"
        where = f"{file}:{mark.line + 1}" if mark is not None and file else file
        remedy = "only plain YAML is read: take the tag away" if code == "YAML_TAG" else ""
        raise ConfigError(code, problem, where=where, remedy=remedy) from None
    except yaml.YAMLError as error:
        raise ConfigError("YAML", str(error).replace("\n", " "), where=file) from None
    except ValueError as error:  # a number of more than 4300 digits
        raise ConfigError("YAML", str(error).split(";")[0], where=file) from None
    except RecursionError:
        raise ConfigError("YAML", "nested too deeply", where=file) from None


def _locate(node: yaml.Node, path: Key, lines: dict[Key, int], file: str, above: frozenset[int]) -> None:
    """Record the line of every path; refuse duplicate keys and aliases that contain themselves or multiply."""
    line = node.start_mark.line + 1
    if id(node) in above or len(lines) > MAX_VALUES:
        raise ConfigError("YAML_ALIAS", "an alias refers to itself or expands without end", where=f"{file}:{line}")
    lines[path] = line
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key_node.tag not in _KEY_TAGS:
                shown = repr(key) if isinstance(key_node, yaml.ScalarNode) else "of braces or brackets"
                raise ConfigError("YAML", f"the key {shown} is not text", where=f"{file}:{line}",
                                  remedy="put it in quotes")  # fmt: skip
            if key in seen:
                raise ConfigError("DUPLICATE_KEY", f"{key!r} stands twice (first on line {seen[key]})",
                                  where=f"{file}:{line}", remedy="remove one of the two")  # fmt: skip
            seen[key] = line
            _locate(value_node, (*path, key), lines, file, above)
            lines[(*path, key)] = line
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _locate(item, (*path, position), lines, file, above)
