"""Strict YAML for run files: safe tags only, no duplicate keys, few aliases, `2e-5` is a number, every value located.

PyYAML follows YAML 1.1, where `lr: 2e-5` is a string, `no` is False, `010` is 8 and `12:30:00` is 45000. Here the
scalars of the YAML 1.2 core schema hold, so what looks like a number is one and nothing else is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lensmith.core.errors import ConfigError

MAX_ALIASES = 100
MAX_BYTES = 4 << 20
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Tree:
    """A parsed run file: plain values, and the line (1-based) each dotted path stands on."""

    values: dict[str, Any]
    file: str = ""
    lines: dict[Key, int] = field(default_factory=dict[Key, int])

    def where(self, path: Key) -> str:
        """`run.yaml:12 batch.samples`, with the line of the nearest known ancestor."""
        dotted = ".".join(str(p) for p in path)
        for end in range(len(path), -1, -1):
            if (line := self.lines.get(path[:end])) is not None:
                return f"{self.file}:{line} {dotted}".strip()
        return f"{self.file} {dotted}".strip()


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema for plain scalars."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9](?:_?[0-9])*$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_scalar(text: str) -> Any:
    """The value of an override (`lr=2e-5`, `rank=8`, `patterns=[a, b]`), by the same rules as the file."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError("OVERRIDE", f"cannot read the value {text!r}: {error}", remedy="quote it as in YAML") from None


def read_tree(path: Path) -> Tree:
    """Parse one run file. Raises `ConfigError` with file and line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError("RUN_FILE", f"cannot read {path}: {error.strerror}", remedy="name an existing run file") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError("RUN_FILE", f"{path} has {len(raw)} bytes; a run file is text below {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("ENCODING", f"not UTF-8 at byte {error.start}", where=str(path)) from None
    return parse_tree(text, str(path))


def parse_tree(text: str, file: str = "") -> Tree:
    lines: dict[Key, int] = {}
    try:
        aliases = sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=_Loader))
        if aliases > MAX_ALIASES:
            raise ConfigError("YAML_ALIAS", f"{aliases} aliases; at most {MAX_ALIASES} are read", where=file)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Tree({}, file, lines)
            _locate(node, (), lines, file, set())
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError("YAML_TAG", f"{error.problem}", where=f"{file}:{line}", remedy="only plain YAML is read") from None
    except yaml.YAMLError as error:
        raise ConfigError("YAML", str(error).replace("\n", " "), where=file) from None
    except RecursionError:
        raise ConfigError("YAML", "nested too deeply", where=file) from None
    if not isinstance(values, dict):
        raise ConfigError("YAML", f"the top level is a {type(values).__name__}, not a mapping", where=file)
    return Tree(values, file, lines)


def _locate(node: yaml.Node, path: Key, lines: dict[Key, int], file: str, above: set[int]) -> None:
    """Record the line of every path; refuse duplicate keys and aliases that contain themselves or multiply."""
    if id(node) in above or len(lines) > 100_000:
        raise ConfigError("YAML_ALIAS", "an alias refers to itself or expands without end", where=f"{file}:{path}")
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                raise ConfigError(
                    "DUPLICATE_KEY", f"{key!r} stands twice (first on line {seen[key]})", where=f"{file}:{line}",
                    remedy="remove one of the two",
                )  # fmt: skip
            seen[key] = line
            _locate(value_node, (*path, key), lines, file, above | {id(node)})
            lines[(*path, key)] = line
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _locate(item, (*path, position), lines, file, above | {id(node)})
