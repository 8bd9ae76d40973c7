"""The options page, made from the fields of `Run`: names, types, defaults, and the text under each field.

`python -m lensmith.recipe.options > docs/run_file.md` makes the page anew.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limit
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lensmith.config.build import models_in
from lensmith.recipe.run import Run

HEAD = """# The run file

This page is generated: `python -m lensmith.recipe.options > docs/run_file.md`.

A run file is YAML. Only `model.path` and `data.train` are needed. Paths in it count from its own folder. An unknown
key, a wrong type or a value out of range is an error that names the line and the nearest known key.

- Any key can be set on the command line, on top of the file: `lensmith train run.yaml optimizer.lr=2e-5`. An entry
  of a list that holds mappings is reached by position: `data.train.0.weight=0.5`.
- A choice is a mapping with `kind`; where its defaults fit, its name is enough: `tune: full`.
- `lensmith schema` prints the JSON schema for editors. `run.yaml` in the run folder has every default written out.
- Numbers are YAML 1.2's: `2e-5` is a number, `no` is text, `010` is ten.

The rows of a table below are keys of the mapping that its heading names.
"""
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}


def options_page() -> str:
    """docs/run_file.md."""
    return "\n".join([HEAD, *_group("", Run, {})])


def _group(path: str, model: type[BaseModel], seen: dict[type[BaseModel], str]) -> Iterator[str]:
    """The table of one option group, then the groups in it. A group that stands twice is told once."""
    seen[model] = path
    shown = {name: field for name, field in model.model_fields.items() if name != "kind"}
    yield _heading(path, model)
    if shown:
        yield from ("| Key | Type | Default | What it does |", "| --- | --- | --- | --- |")
        yield from (_row(name, field) for name, field in shown.items())
        yield ""
    for name, field in shown.items():
        here = f"{path.partition(':')[0]}.{name}".removeprefix(".") + _inside(field)
        groups = models_in(field)
        if known := list(dict.fromkeys(seen[group] for group in groups if group in seen)):
            told = ", ".join(f"[`{path}`](#{_anchor(path)})" for path in known)
            yield f"{_title(here)}\nThe keys of {told}.\n"
        for group in (g for g in groups if g not in seen):
            yield from _group(f"{here}: {_kind(group)}" if _kind(group) else here, group, seen)


def _heading(path: str, model: type[BaseModel]) -> str:
    about = " ".join((model.__doc__ or "").split())
    return f"{_title(path)}\n{about}\n" if path else "## Top level\n"


def _title(path: str) -> str:
    return f"{'#' * min(4, 2 + path.count('.'))} `{path}`\n"


def _anchor(path: str) -> str:
    """As GitHub makes it from a heading."""
    return "".join(c for c in path.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _inside(field: FieldInfo) -> str:
    """What stands between a key and the keys of its group: a position in a list, a name in a mapping."""
    text = str(field.annotation)
    return "[]" if text.startswith("tuple[") else ".NAME" if text.startswith("dict[") else ""


def _kind(model: type[BaseModel]) -> str:
    field = model.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field is not None else ""


def _row(name: str, field: FieldInfo) -> str:
    about = " ".join((field.description or "").split())
    kind = _type(field.annotation) + _limits(field)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", kind, _default(field), about)) + " |"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "needed"
    if isinstance(value, BaseModel):
        return f"`{_kind(type(value))}`" if _kind(type(value)) else "see there"
    if isinstance(value, str | float):
        return f"`{value}`" if isinstance(value, str) else f"`{value:g}`"
    return f"`{json.dumps(value)}`"


def _limits(field: FieldInfo) -> str:
    """`, at least 1`, from the field's constraints."""
    found: list[str] = []
    for rule in field.metadata:
        if isinstance(rule, limit.Ge):
            found.append(f"at least {rule.ge:g}")
        elif isinstance(rule, limit.Gt):
            found.append(f"above {rule.gt:g}")
        elif isinstance(rule, limit.Le):
            found.append(f"at most {rule.le:g}")
        elif isinstance(rule, limit.Lt) and rule.lt != 2**63:
            found.append(f"below {rule.lt:g}")
        elif isinstance(rule, limit.MinLen):
            found.append("not empty")
    return ", " + ", ".join(found) if found else ""


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return _union([a for a in inner if a is not type(None)]) + (" or null" if type(None) in inner else "")
    if origin is tuple:
        many = f"list of {_type(inner[0])}" if inner[-1] is Ellipsis else f"list of {len(inner)} {_type(inner[0])}s"
        return many.replace("mapping", "mappings")
    if origin is dict:
        return f"mapping from {_type(inner[0])} to {_type(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{_kind(annotation)}`" if _kind(annotation) else "mapping"
    return _PLAIN.get(annotation, str(annotation))


def _union(choices: list[Any]) -> str:
    return ", ".join(_type(choice) for choice in choices)


if __name__ == "__main__":
    print(options_page(), end="")
