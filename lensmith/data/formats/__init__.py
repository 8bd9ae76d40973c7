"""Row formats: each turns a row as users have it into a `Sample`. A new one is a file here and a name in `Format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from lensmith.core.errors import DataError
from lensmith.data.formats.alpaca import Alpaca
from lensmith.data.formats.document import DocumentFormat
from lensmith.data.formats.interleaved import Interleaved
from lensmith.data.formats.known import KNOWN, Layout, bare_name, known_layout
from lensmith.data.formats.messages import Messages
from lensmith.data.formats.preference import RLHFV, Compare, compared_layout, parse_compared
from lensmith.data.formats.sharegpt import ShareGPT
from lensmith.data.formats.webdataset import KEY, WebDataset
from lensmith.data.strict_json import key_list

__all__ = [
    "RLHFV",
    "Alpaca",
    "Compare",
    "DocumentFormat",
    "Format",
    "Interleaved",
    "Messages",
    "ShareGPT",
    "WebDataset",
    "detect",
    "parse_compared",
]

Format = Annotated[Layout | RLHFV | WebDataset, Field(discriminator="kind"), bare_name]
"""A format's options by its `kind`. In YAML its bare name is enough when the defaults fit: `format: messages`."""

_COMPARED = {"pairs": "answers in pairs", "labels": "labelled answers"}


def detect(row: Mapping[str, Any], origin: str, compare: Compare | None = None) -> Layout | RLHFV | WebDataset:
    """The format of a source whose run file names none, by its first row. `compare`: what is compared in it.

    Raises DataError UNKNOWN_FORMAT.
    """
    if compare is not None:
        layout = compared_layout(row, compare)
        if layout is None:
            raise DataError("UNKNOWN_FORMAT", f"no layout of {_COMPARED[compare]} has the keys {key_list(row)}",
                            where=origin, remedy="name the format and its columns (docs/preferences.md)")  # fmt: skip
        return layout
    found = WebDataset() if row.get(KEY) is not None else known_layout(row, origin)
    if found is None:
        raise DataError("UNKNOWN_FORMAT", f"no known layout has the keys {key_list(row)}", where=origin,
                        remedy=f"name the format and its columns; known: {KNOWN}; {KEY} (webdataset)")  # fmt: skip
    return found
