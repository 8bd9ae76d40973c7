"""JSON as RFC 8259 has it, and nothing that readers disagree about.

Python's `json` lets duplicate keys, NaN, 1e999 and lone surrogates through and recurses without a limit of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from lensmith.core.errors import DataError

MAX_DEPTH = 64
LAYOUT = "a file holds one JSON object per line, or one array of objects, in UTF-8"


def parse_json(data: bytes, where: str) -> object:
    """Parse UTF-8 JSON, refusing what other readers would take differently or choke on.

    Raises DataError ENCODING, UNICODE (NUL, lone surrogate), JSON_DEPTH, JSON_DUP_KEY, JSON_NUMBER, JSON.
    """
    text = _decode(data, where)
    _check_depth(data, where)
    try:
        value = _DECODER.decode(text)
    except DataError as error:  # from the hooks below, which do not know the place
        raise DataError(error.code, error.message, where=where, remedy=error.remedy) from None
    except json.JSONDecodeError as error:
        found = f", found {text[error.pos : error.pos + 40]!r}" if error.pos < len(text) else ", found the end"
        raise DataError("JSON", f"not JSON: {error.msg} at character {error.pos + 1}{found}", where=where,
                        remedy=LAYOUT) from None  # fmt: skip
    except ValueError as error:  # int() refuses more than 4300 digits
        raise DataError("JSON_NUMBER", str(error).split(";")[0], where=where) from None
    if _SUSPECT_ESCAPE.search(data):
        check_strings(value, where)
    return value


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data[:4]:
        raise DataError("ENCODING", "NUL bytes: UTF-16 or not text", where=where, remedy="save the file as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at byte {error.start + 1} of the row"
        raise DataError("ENCODING", f"not UTF-8: {found}", where=where, remedy="save the file as UTF-8") from None
    if "\0" in text:
        raise DataError("UNICODE", f"a NUL character at character {text.index(chr(0)) + 1} of the row", where=where)
    return text


def _check_depth(data: bytes, where: str) -> None:
    """Raise JSON_DEPTH ahead of the parser, which recurses per level.

    In JSON a backslash stands only inside a string, so with the escapes gone every quote opens or closes a string. In
    text that is not JSON this holds up to the first error, and the parser gets no further than that.
    """
    if data.count(b"{") + data.count(b"[") <= MAX_DEPTH:
        return
    outside = b"".join(data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    depth = 0
    for byte in outside.translate(None, delete=_NOT_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_DEPTH:
            raise DataError("JSON_DEPTH", f"nested more than {MAX_DEPTH} levels deep", where=where)


def printable(text: str) -> str:
    """`text` on one line, characters that draw nothing or turn the reading direction as escapes. For messages."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def key_list(row: Mapping[str, Any]) -> str:
    """The keys of a row for a message."""
    text = printable(", ".join(map(str, row)))
    return f"{text[:200]}..." if len(text) > 200 else text or "nothing"


def check_strings(value: object, where: str, path: str = "") -> None:
    """Raise UNICODE for NUL or half a surrogate pair in any key or text of `value`."""
    if isinstance(value, str):
        if bad := _BAD_CHARACTER.search(value):
            kind = "a NUL character" if bad[0] == "\0" else f"half a surrogate pair (\\u{ord(bad[0]):04x})"
            raise DataError("UNICODE", f"{printable(path) or 'the row'}: {kind} in the text", where=where)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_strings(key, where, "a key")
            check_strings(item, where, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_strings(item, where, f"{path}[{index}]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError("JSON_DUP_KEY", f"key {twice!r} stands twice in one object", remedy="keep one of the two")
    return result


def _finite(literal: str) -> float:
    value = float(literal)
    if value in (float("inf"), float("-inf")):
        raise DataError("JSON_NUMBER", f"{literal[:40]} is too large for a number")
    return value


def _no_constant(literal: str) -> NoReturn:
    raise DataError("JSON_NUMBER", f"{literal} is not JSON", remedy="write null or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)
_SUSPECT_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_BAD_CHARACTER = re.compile("[\0\ud800-\udfff]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
