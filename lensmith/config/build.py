"""From a parsed tree and dotted overrides to a frozen typed object; every mistake is one located `ConfigError`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lensmith.config.yaml_file import Key, Tree, parse_value
from lensmith.core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
V = TypeVar("V")
_Step = str | int

_WANTED = {
    "bool_type": ("true or false", bool),
    "int_type": ("a whole number", int),
    "float_type": ("a number", (int, float)),
    "string_type": ("text", str),
    "tuple_type": ("a list", ()),
    "dict_type": ("a mapping of keys to values", ()),
    "model_type": ("a mapping of options", ()),
    "model_attributes_type": ("a mapping of options", ()),
}
"""Pydantic's type errors: what to write instead, and the Python type that it gives."""
_DOTTED = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """`key.sub=value` on top of the file. A list is reached by position (`data.train.0.path=x.jsonl`).

    Raises ConfigError OVERRIDE.
    """
    values, said = _copy(tree.values), dict(tree.overrides)
    for text in overrides:
        dotted, sep, value = text.partition("=")
        names = dotted.split(".")
        if not sep or not all(names):
            raise _refused(text, "not of the form key.sub=value", "e.g. optimizer.lr=2e-5")
        path: list[_Step] = [int(n) if n.isdecimal() and n.isascii() else n for n in names]
        try:
            parsed = parse_value(value)
        except ConfigError as error:
            raise _refused(text, error.message, "quote the value as in YAML") from None
        said[_set(values, path, parsed, text)] = text
    return Tree(values, tree.file, tree.lines, said)


def _refused(text: str, problem: str, remedy: str = "") -> ConfigError:
    return ConfigError("OVERRIDE", f"{text!r}: {problem}", remedy=remedy)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in cast("dict[Any, Any]", value).items()}
    return [_copy(v) for v in cast("list[Any]", value)] if isinstance(value, list) else value


def _set(node: Any, path: Sequence[_Step], value: Any, text: str) -> Key:
    """Put `value` at `path` below `node`; the path as it stands in the tree. Mappings on the way are made."""
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        items = cast("list[Any]", node)
        if not isinstance(head, int) or head >= len(items):
            raise _refused(text, f"the list has {len(items)} entries, {head!r} is none of them", "count from 0")
        node, child = cast("Any", items), items[head]
    else:
        head = str(head)
        child = node.get(head)
    if not rest:
        node[head] = value
        return (head,)
    if child is None:
        child = node[head] = {}
    elif isinstance(child, str) and isinstance(rest[0], str):
        child = node[head] = {"kind": child}  # `tune: lora` and tune.rank=16
    elif not isinstance(child, dict | list):
        remedy = f"write it as a list in the run file, or set {head} as a whole" if isinstance(rest[0], int) else ""
        raise _refused(text, f"{rest[0]!r} lies below a plain value ({head}: {child!r})", remedy)
    return (head, *_set(child, rest, value, text))


def without(tree: Tree, keys: Sequence[str]) -> Tree:
    """The tree less some of its top-level keys."""
    return Tree({k: v for k, v in tree.values.items() if k not in keys}, tree.file, tree.lines, tree.overrides)


def merged(kind: type[BaseModel], base: Tree, tree: Tree, path: Key, skip: Sequence[str] = ()) -> Tree:
    """`base`, a tree of `kind`, with the mapping that stands at `path` in `tree` laid over it; every value keeps its
    own line.

    Mappings are merged key by key, everything else is replaced; so is a choice of another kind.
    """
    over: Any = tree.values
    for step in path:
        over = over[step]
    values, replaced = _copy(base.values), list[Key]()
    for key in (k for k in over if k not in skip):
        _lay_over(kind, values, over[key], (key,), replaced)

    def places(of_base: Mapping[Key, V], of_tree: Mapping[Key, V]) -> dict[Key, V]:
        kept = {at: v for at, v in of_base.items() if not any(at[: len(r)] == r for r in replaced)}
        inside = {at[len(path) :]: v for at, v in of_tree.items() if at[: len(path)] == path and len(at) > len(path)}
        return kept | inside

    return Tree(values, base.file, places(base.lines, tree.lines), places(base.overrides, tree.overrides))


def _lay_over(kind: type[BaseModel], values: dict[str, Any], over: Any, path: Key, replaced: list[Key]) -> None:
    node: Any = values
    for step in path[:-1]:
        node = node[step]
    key = path[-1]
    default = _default_kind(kind, path)
    if default is not None:  # `tune: lora`, `tune: {rank: 4}` and `tune: {kind: lora}` are of one kind
        node[key] = _with_kind(node.get(key), default)
        over = {"kind": over} if isinstance(over, str) else over
    below: Any = node.get(key)
    if not isinstance(below, dict) or not isinstance(over, dict) or _another_kind(cast(Any, below), cast(Any, over)):
        node[key] = _copy(over)
        replaced.append(path)
        return
    for name, value in cast("dict[str, Any]", over).items():
        _lay_over(kind, values, value, (*path, name), replaced)


def _with_kind(choice: Any, default: str) -> Any:
    return {"kind": default, **cast("Any", choice)} if isinstance(choice, dict) else {"kind": choice or default}


def _another_kind(below: dict[str, Any], over: dict[str, Any]) -> bool:
    return "kind" in over and over["kind"] != below.get("kind")


def _default_kind(kind: type[BaseModel], path: Key) -> str | None:
    """The kind of the choice at `path` when none is named; None for what is no choice."""
    for model in _models_at(kind, path[:-1]):
        field = model.model_fields.get(str(path[-1]))
        default = None if field is None else field.get_default(call_default_factory=False)
        if isinstance(default, BaseModel) and _tags(type(default)):
            return _tags(type(default))[0]
    return None


def build(kind: type[M], tree: Tree) -> M:
    """Validate `tree` as `kind`. Raises one `ConfigError` with every mistake: file, line, value and remedy."""
    try:
        return kind.model_validate(tree.values)
    except ValidationError as error:
        found = [_explain(kind, tree, each) for each in error.errors()]
        raise ConfigError(found[0][0], "\n".join(text for _, text in found)) from None
    except ConfigError as error:  # from a validator that weighs options against each other
        where = error.where or _where_named(error.message, tree)
        raise ConfigError(error.code, error.message, where=where, remedy=error.remedy) from None


def _where_named(message: str, tree: Tree) -> str:
    """The place of the first option that `message` names."""
    for name in _DOTTED.findall(message):
        path = tuple(name.split("."))
        if path in tree.lines or path in tree.overrides:
            return tree.where(path)
    return tree.file


def _explain(kind: type[BaseModel], tree: Tree, details: ErrorDetails) -> tuple[str, str]:
    """(code, text) of one of pydantic's errors."""
    loc, error, value = details["loc"], details["type"], details["input"]
    path = _in_file(loc, tree.values)
    code, problem, remedy = "CONFIG", details["msg"].removeprefix("Value error, "), ""
    if error == "extra_forbidden":
        code, problem = "UNKNOWN_KEY", f"unknown key {path[-1]!r}"
        remedy = _known_keys(_models_at(kind, loc[:-1]), str(path[-1]))
    elif error == "missing":
        place = f"entry {loc[-1]}" if isinstance(loc[-1], int) else "this key"
        code, problem = "MISSING_KEY", f"{place} is needed"
    elif error in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [str(tag) for model in _models_at(kind, loc) for tag in _tags(model)]
        said = cast("dict[str, Any]", value).get("kind") if isinstance(value, dict) else None
        problem = "`kind` is needed here" if said is None else f"there is no kind {said!r}"
        remedy = f"known here: {', '.join(kinds)}"
    elif error == "literal_error":
        problem, remedy = f"there is no choice {_short(value)}", f"known here: {details.get('ctx', {}).get('expected')}"
    elif error in _WANTED:
        problem, remedy = _wrong_type(error, value)
    else:
        problem = f"{problem} (found {_short(value)})"
    return code, f"{tree.where(path)}: {problem}" + (f"\n  -> {remedy}" if remedy else "")


def _known_keys(models: Sequence[type[BaseModel]], wrong: str) -> str:
    names = sorted({name for model in models for name in model.model_fields})
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"


def _wrong_type(error: str, value: Any) -> tuple[str, str]:
    wanted, kind = _WANTED[error]
    problem = f"must be {wanted} (found {_short(value)})"
    if kind is bool and str(value).lower() in ("yes", "on", "no", "off"):
        return problem, f"write {str(str(value).lower() in ('yes', 'on')).lower()}"
    if kind is str and isinstance(value, bool | int | float):
        return problem, "put it in quotes"
    if isinstance(value, str) and kind is not str and _reads_as(value, kind):
        return problem, "take the quotes away"
    return problem, ""


def _reads_as(text: str, kind: Any) -> bool:
    try:
        found = parse_value(text)
    except ConfigError:
        return False
    return isinstance(found, kind) and isinstance(found, bool) == (kind is bool)


def _short(value: Any) -> str:
    """What stands in the file, on one line."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _in_file(loc: Key, values: Any) -> Key:
    """Pydantic's location without the tags of unions and marks of keys, which do not stand in the file."""
    path: list[_Step] = []
    node = values
    for position, step in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict) and step in node:
            node = cast("dict[Any, Any]", node)[step]
        elif isinstance(node, list) and isinstance(step, int) and step < len(cast("list[Any]", node)):
            node = cast("list[Any]", node)[step]
        elif not last or step == "[key]" or not isinstance(node, dict):
            continue
        path.append(step)
    return tuple(path)


def _models_at(kind: type[BaseModel], loc: Key) -> list[type[BaseModel]]:
    """The option groups a location may mean (several for a union whose tag is unknown)."""
    models: list[type[BaseModel]] = [kind]
    for step in loc:
        if isinstance(step, int):
            continue
        inner = [m for model in models if step in model.model_fields for m in models_in(model.model_fields[step])]
        tagged = [m for m in models if step in _tags(m)]
        models = inner or tagged or models
    return models


def models_in(field: FieldInfo) -> list[type[BaseModel]]:
    """Every option group in a field's type, through unions, lists and dicts."""
    return list(_walk(field.annotation))


def _walk(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _walk(inner)


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field is not None else ()


def json_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema editors use to complete and check run files."""
    schema = TypeAdapter(kind).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    groups: dict[str, Any] = schema.get("$defs", {})
    for group in (schema, *groups.values()):
        for option in group.get("properties", {}).values():
            for choice in (option, *option.get("anyOf", ())):
                _allow_name(choice, groups)
    return schema


def _allow_name(choice: dict[str, Any], groups: dict[str, Any]) -> None:
    """`tune: lora` stands for `tune: {kind: lora}` (`part.choice`), which pydantic's schema does not know."""
    kinds = list(choice.get("discriminator", {}).get("mapping", ()))
    if "$ref" in choice:
        own = groups[choice["$ref"].rsplit("/", 1)[1]].get("properties", {}).get("kind", {})
        kinds = [own["const"]] if "const" in own else []
    if kinds:
        members = choice.pop("oneOf", None) or [{"$ref": choice.pop("$ref")}]
        choice.pop("discriminator", None)
        choice["anyOf"] = [{"enum": kinds}, *members]
