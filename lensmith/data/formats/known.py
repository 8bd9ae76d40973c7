"""The layouts that a row's keys tell apart. A row of a tar archive may hold any of them as its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lensmith.core.errors import DataError
from lensmith.data.formats.alpaca import Alpaca
from lensmith.data.formats.document import DocumentFormat
from lensmith.data.formats.interleaved import Interleaved
from lensmith.data.formats.messages import Messages
from lensmith.data.formats.sharegpt import ShareGPT

KNOWN = (
    "messages: [{role, content}] (messages); conversations: [{from, value}] (sharegpt); instruction, output or query, "
    "response (alpaca); prompt, completion (messages); "
    "text or parts (document); texts, images or text_list, image_info (interleaved)"
)


def _by_name(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


bare_name = BeforeValidator(_by_name)
"""A format may be written by its bare name."""

Layout = Messages | ShareGPT | Alpaca | DocumentFormat | Interleaved
RowFormat = Annotated[Layout, Field(discriminator="kind"), bare_name]


def known_layout(row: Mapping[str, Any], origin: str) -> Layout | None:
    """The format with the keys of this row; None if there is none. Raises DataError UNKNOWN_FORMAT for preferences."""
    keys = {key for key, value in row.items() if value is not None}
    images = "image" if "image" in keys and "images" not in keys else "images"
    if {"chosen", "rejected"} <= keys:
        raise DataError("UNKNOWN_FORMAT", "the row holds preferences (chosen, rejected)", where=origin,
                        remedy="set objective: dpo (orpo, simpo, reward), or name the format of this source in the run "
                        "file to learn what else the row holds")  # fmt: skip
    for column in ("messages", "conversations"):
        turns = row.get(column)
        first = turns[0] if isinstance(turns, (list, tuple)) and turns else None
        if isinstance(first, Mapping) and "role" in first:
            return Messages(messages_column=column, images_column=images)
        if isinstance(first, Mapping) and "from" in first:
            return ShareGPT(messages_column=column, images_column=images)
    if "branches" in keys:
        return Messages(images_column=images)
    if {"prompt", "completion"} <= keys:
        return Messages(images_column=images)
    if {"instruction", "output"} <= keys:
        return Alpaca(images_column=images)
    if {"query", "response"} <= keys:
        return Alpaca(instruction_column="query", input_column="", output_column="response", images_column=images)
    if keys & {"text", "parts"}:
        return DocumentFormat(images_column=images)
    if "text_list" in keys or {"texts", images} <= keys:
        return Interleaved(images_column=images)
    return None
