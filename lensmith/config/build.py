"""From a parsed tree and dotted overrides to a frozen typed object; every mistake is one located `ConfigError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lensmith.config.yaml_file import Key, Tree, parse_scalar
from lensmith.core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """`key.sub=value` on top of the file. A list is reached by position (`data.train.0.path=x.jsonl`)."""
    values = _copy(tree.values)
    for text in overrides:
        dotted, sep, value = text.partition("=")
        if not sep or not dotted:
            raise ConfigError("OVERRIDE", f"{text!r} is not of the form key.sub=value", remedy="e.g. optimizer.lr=2e-5")
        _set(values, [int(p) if p.isdigit() else p for p in dotted.split(".")], parse_scalar(value), text)
    return Tree(values, tree.file, tree.lines)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _set(node: Any, path: list[str | int], value: Any, text: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if not isinstance(head, int) or head >= len(node):
            raise ConfigError("OVERRIDE", f"{text!r}: the list has {len(node)} entries, {head!r} is none of them")
    elif isinstance(node, dict):
        head = str(head)
    else:
        raise ConfigError("OVERRIDE", f"{text!r}: {head!r} lies below a plain value")
    if not rest:
        node[head] = value
        return
    child = node[head] if isinstance(node, list) else node.get(head)
    if not isinstance(child, dict | list):
        child = node[head] = {} if not isinstance(child, str) else {"kind": child}
    _set(child, rest, value, text)


def build(kind: type[M], tree: Tree) -> M:
    """Validate `tree` as `kind`. Raises one `ConfigError` that lists every mistake with file, line, value and remedy."""
    try:
        return kind.model_validate(tree.values)
    except ValidationError as error:
        found = [_explain(kind, tree, e["loc"], e["type"], e["msg"], e.get("input"), e.get("ctx")) for e in error.errors()]
        code, first = found[0]
        raise ConfigError(code, "\n".join([first, *(text for _, text in found[1:])]).strip()) from None


def _explain(kind: type[BaseModel], tree: Tree, loc: Key, error: str, message: str, value: Any, ctx: Any) -> tuple[str, str]:
    path = _in_file(loc, tree.values)
    where = tree.where(path)
    if error == "extra_forbidden":
        names = [name for model in _models_at(kind, loc[:-1]) for name in model.model_fields]
        near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(set(names)))}"
        return "UNKNOWN_KEY", f"{where}: unknown key {loc[-1]!r}\n  -> {hint}"
    if error == "missing":
        return "MISSING_KEY", f"{where}: this key is needed"
    if isinstance(ctx, dict) and isinstance(ctx.get("error"), ConfigError):
        return ctx["error"].code, f"{where}: {ctx['error'].message}" + (f"\n  -> {ctx['error'].remedy}" if ctx["error"].remedy else "")
    text = message.removeprefix("Value error, ")
    shown = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return "CONFIG", f"{where}: {text} (found {shown[:120]})"


def _in_file(loc: Key, values: Any) -> Key:
    """Pydantic's location without the tags of unions, which do not stand in the file."""
    path: list[str | int] = []
    node = values
    for position, step in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict) and step in node:
            node = node[step]
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            node = node[step]
        elif not last:
            continue
        path.append(step)
    return tuple(path)


def _models_at(kind: type[BaseModel], loc: Key) -> list[type[BaseModel]]:
    """The option groups a location may mean (several for a union whose tag is unknown)."""
    models: list[type[BaseModel]] = [kind]
    for step in loc:
        if isinstance(step, int):
            continue
        inner = [m for model in models if step in model.model_fields for m in models_in(model.model_fields[str(step)])]
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
    return schema
