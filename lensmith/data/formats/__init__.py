"""Row formats: each turns a row as users have it into a `Sample`. A new one is a file here and a name in `Format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lensmith.core.errors import DataError
from lensmith.data.formats.alpaca import Alpaca
from lensmith.data.formats.document import DocumentFormat
from lensmith.data.formats.messages import Messages
from lensmith.data.formats.sharegpt import ShareGPT
from lensmith.data.strict_json import key_list

__all__ = ["Alpaca", "DocumentFormat", "Format", "Messages", "ShareGPT", "detect"]

_KNOWN = (
    "messages: [{role, content}] (messages); conversations: [{from, value}] (sharegpt); instruction, output (alpaca); "
    "text or parts (document)"
)


def _named(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


Format = Annotated[Messages | ShareGPT | Alpaca | DocumentFormat, Field(discriminator="kind"), BeforeValidator(_named)]
"""A format's options by its `kind`. In YAML its bare name is enough when the defaults fit: `format: messages`."""


def detect(row: Mapping[str, Any], origin: str) -> Messages | ShareGPT | Alpaca | DocumentFormat:
    """The format of a source whose run file names none, by its first row. Raises DataError UNKNOWN_FORMAT."""
    keys = {key for key, value in row.items() if value is not None}
    images = "image" if "image" in keys and "images" not in keys else "images"
    if {"chosen", "rejected"} <= keys:
        raise DataError("UNKNOWN_FORMAT", "the row holds preferences (chosen, rejected)", where=origin,
                        remedy="name the format of this source in the run file")  # fmt: skip
    for column in ("messages", "conversations"):
        turns = row.get(column)
        first = turns[0] if isinstance(turns, (list, tuple)) and turns else None
        if isinstance(first, Mapping) and "role" in first:
            return Messages(messages_column=column, images_column=images)
        if isinstance(first, Mapping) and "from" in first:
            return ShareGPT(messages_column=column, images_column=images)
    if "branches" in keys:
        return Messages(images_column=images)
    if {"instruction", "output"} <= keys:
        return Alpaca(images_column=images)
    if keys & {"text", "parts"}:
        return DocumentFormat(images_column=images)
    raise DataError("UNKNOWN_FORMAT", f"no known layout has the keys {key_list(row)}",
                    where=origin, remedy=f"name the format and its columns; known: {_KNOWN}")  # fmt: skip
