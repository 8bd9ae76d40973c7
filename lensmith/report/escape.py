"""Text from data made safe for a terminal, an HTML page and a spreadsheet cell. Nothing else in lensmith escapes."""

from __future__ import annotations

import re

from markupsafe import Markup
from markupsafe import escape as _escape_html

# C0, DEL, C1, line and paragraph separators, bidi embeddings, overrides and isolates; lone surrogates cannot be encoded
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _visible(match: re.Match[str]) -> str:
    char = match[0]
    return _NAMED.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}")


def terminal_safe(text: str) -> str:
    """One line that cannot move the cursor, start a new log line or turn the reading direction: `\\x1b[2J`, `\\n`."""
    return _UNSAFE.sub(_visible, text)


def html_safe(value: object) -> Markup:
    """Text for an element or a quoted attribute; newlines and tabs stay, other control characters become visible."""
    if isinstance(value, Markup):
        return value
    text = str(value).replace("\r\n", "\n")
    return _escape_html(_UNSAFE.sub(lambda m: m[0] if m[0] in "\n\t" else _visible(m), text))


def cell_safe(text: str) -> str:
    """One cell that a spreadsheet reads as text, never as a formula; the `csv` module still quotes it."""
    return ("'" if text.startswith(_FORMULA_START) else "") + terminal_safe(text)
