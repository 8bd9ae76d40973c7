"""The base of every option group. Each part of lensmith declares its own options by subclassing `Part`.

Options are keyword-only, frozen and closed: an unknown key is an error. The text under a field is its only
documentation; `lensmith options`, the options page and the JSON schema are made from it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen group of options that refuses unknown keys and wrong types (no silent coercion of strings)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, strict=False)


def named(value: Any) -> Any:
    """A choice may be written by its name alone: `tune: lora` means `tune: {kind: lora}`."""
    return {"kind": value} if isinstance(value, str) else value
