"""`<trainable_text>...</trainable_text>`: which text of a document is trained."""

from __future__ import annotations

import re

from lensmith.core.errors import DataError
from lensmith.data.formats.common import Place

OPEN = "<trainable_text>"
CLOSE = "</trainable_text>"
_MARK = re.compile(f"{OPEN}|{CLOSE}")
_EXCERPT = 20


def marked_pieces(text: str, place: Place) -> list[tuple[str, bool]] | None:
    """The text cut at its marks, which are left out, each piece with whether it is marked; None if it has no marks.

    Raises DataError MARKS for a mark inside a marked region, one that is never closed, one that closes nothing.
    """
    pieces: list[tuple[str, bool]] = []
    opened: int | None = None
    start = 0
    for mark in _MARK.finditer(text):
        opens = mark[0] == OPEN
        if opens and opened is not None:
            raise _misplaced(text, mark.start(), f"opens inside the region from character {opened + 1}", place)
        if not opens and opened is None:
            raise _misplaced(text, mark.start(), "closes what was not opened", place)
        pieces.append((text[start : mark.start()], not opens))
        opened = mark.start() if opens else None
        start = mark.end()
    if opened is not None:
        raise _misplaced(text, opened, "is never closed", place)
    return [*pieces, (text[start:], False)] if pieces else None


def _misplaced(text: str, at: int, trouble: str, place: Place) -> DataError:
    mark = OPEN if text.startswith(OPEN, at) else CLOSE
    excerpt = text[max(at - _EXCERPT, 0) : at + len(mark) + _EXCERPT]
    return place.error("MARKS", f"{mark} at character {at + 1} {trouble}: {excerpt!r}",
                       f"write {OPEN} and {CLOSE} in pairs within one text, none inside another; to keep them as plain "
                       "text, set marks: false in the format")  # fmt: skip
