"""The base of every option group. Each part of lensmith declares its own options by subclassing `Part`.

Options are keyword-only, frozen and closed: an unknown key is an error. The text under a field is its only
documentation; `lensmith schema`, the options page and the JSON schema are made from it.
"""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

_SCALARS = ("bool", "int", "float", "str")
_NO_SCHEMAS = ("cls", "config", "default", "metadata")


def _make_scalars_strict(schema: object) -> None:
    """`strict=True` in the config would be shorter, but holds for tuples too: YAML and validators give lists."""
    if isinstance(schema, dict):
        found = cast("dict[str, object]", schema)
        kind = found.get("type")
        if isinstance(kind, str) and kind in _SCALARS:
            found["strict"] = True
        for key, value in found.items():
            if key not in _NO_SCHEMAS:
                _make_scalars_strict(value)
    elif isinstance(schema, list | tuple):
        for value in cast("list[object]", schema):
            _make_scalars_strict(value)


class Part(BaseModel):
    """A frozen group of options that refuses unknown keys and wrong types.

    Pydantic would take "no" for a boolean and "1e-5" for a number. Here scalars are strict: nothing but an int for a
    float is converted. Lists still become tuples and mappings option groups.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _make_scalars_strict(schema)
        return schema


def choice(default: str) -> BeforeValidator:
    """A choice may be written by its name alone (`tune: lora`), and its options without its name (`tune: {rank: 16}`
    is the default kind)."""

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        options = cast("dict[str, Any]", value)
        return {"kind": default, **options} if isinstance(value, dict) and "kind" not in options else options

    return BeforeValidator(named)
