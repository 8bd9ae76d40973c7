"""Where a long document is cut: pure arithmetic on the token counts of its units.

A document is a list of *units*: a picture or video with the control tokens around it, or a stretch of text. A unit is
tokenised by itself, so a piece is read again from its own units, without the rest of a long document.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

STRETCH = 1 << 14
"""Characters of a text that are tokenised at once. A longer text is divided behind a line, else before a space. A piece
is read from all stretches it touches: with four times as many characters, that takes more than twice as long."""

SENTENCE_ENDS = ".!?…。！？\n"
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*(?=\s)|(?<=[。！？])|\n+")
_LINE = re.compile(r"\n(?=[^\s])")
_SPACE = re.compile(r"(?<=\S)(?= \S)")


@dataclass(frozen=True, slots=True)
class Cut:
    """A piece of a document: from token `start` of unit `first` to before token `stop` of unit `last`.

    The first `context` tokens repeat the end of the piece before and are not trained again.
    """

    first: int
    start: int
    last: int
    stop: int
    context: int = 0

    def slice(self, unit: int, size: int) -> slice:
        """The tokens of `unit` (of `size` tokens) that belong to the piece."""
        return slice(self.start if unit == self.first else 0, self.stop if unit == self.last else size)


@dataclass(frozen=True, slots=True)
class UnitSize:
    """Tokens of a unit. `borders` are the token positions inside a text before which it may be cut, None for what is
    never cut; `sentences` those of them where a sentence begins, and `tokens` where the text ends with one."""

    tokens: int
    images: int = 0
    borders: Sequence[int] | None = None
    sentences: Sequence[int] = ()

    @property
    def is_text(self) -> bool:
        return self.borders is not None


def stretches(text: str) -> Iterator[tuple[int, int]]:
    """[begin, end) of the stretches of a text, at most `STRETCH` characters each.

    Behind a line break that no white space follows, and before a single space, byte-level pre-tokenizers have a border
    anyway, so the tokens are those of the whole text.
    """
    begin = 0
    while len(text) - begin > STRETCH:
        window = text[begin : begin + STRETCH + 1]
        ends = [m.start() + 1 for m in _LINE.finditer(window, STRETCH // 2)]
        ends = ends or [m.start() for m in _SPACE.finditer(window, STRETCH // 2)]
        end = begin + (ends[-1] if ends and ends[-1] <= STRETCH else STRETCH)
        yield begin, end
        begin = end
    yield begin, len(text)


def sentence_ends(text: str) -> set[int]:
    """Characters before which a new sentence or line begins; the space before a sentence belongs to it."""
    return {match.end() for match in _SENTENCE.finditer(text)}


@dataclass
class Splitter:
    """Cuts one document. `max_tokens` and `max_images` bound a piece; `overlap` is how far the next one reaches back.
    Control tokens that are a unit of their own, as the end of the document, stay with the unit before them: a piece of
    nothing else has no target.

    Greedy, and where there is a choice: at a part border, if the text that does not fit any more fits a piece of its
    own (pictures right before it go with it); else behind the last sentence in the second half of the room; else
    before the last token that fits.
    """

    units: Sequence[UnitSize]
    max_tokens: int
    max_images: int
    overlap: int = 0

    def cuts(self) -> Iterator[Cut]:
        """In order. A unit that alone exceeds `max_tokens` and cannot be cut is a piece of its own."""
        at = (0, 0)
        context = 0
        while at[0] < len(self.units):
            end = self._end(at, self.max_tokens - context)
            if context and end == at:  # the context left no room
                context = 0
                continue
            begin = self._back(at, context)
            last, stop = (end[0], end[1]) if end[1] else (end[0] - 1, self.units[end[0] - 1].tokens)
            yield Cut(*begin, last, stop, context)
            at = end
            context = self._context(at) if at[0] < len(self.units) else 0

    def _end(self, at: tuple[int, int], room: int) -> tuple[int, int]:
        """Where the piece that begins at `at` ends."""
        unit, offset = at
        images = 0
        while unit < len(self.units):
            size = self.units[unit]
            left = size.tokens - offset
            images += size.images
            if left + self._behind(unit) > room or images > self.max_images:
                break
            room, unit, offset = room - left, unit + 1, 0
        else:
            return unit, 0
        size = self.units[unit]
        if not size.is_text:
            return (unit, 0) if (unit, offset) != at or room < self.max_tokens else (unit + 1, 0)
        if (unit, offset) != at and self._text_left(unit, offset) <= self.max_tokens and not self._continues(unit):
            return self._with_pictures(at, unit)
        found = self._inside(at, unit, offset, room)
        if found != at or room < self.max_tokens:
            return found
        least = self._least(size, offset)
        return (unit, least) if least < size.tokens else (unit + 1, 0)

    def _behind(self, unit: int) -> int:
        """Control tokens that stay with this unit."""
        after = self.units[unit + 1] if unit + 1 < len(self.units) else None
        return after.tokens if after is not None and not after.is_text and not after.images else 0

    def _text_left(self, unit: int, offset: int) -> int:
        """Tokens from here to the end of the text, over all its stretches."""
        total = -offset
        while unit < len(self.units) and self.units[unit].is_text:
            total += self.units[unit].tokens
            unit += 1
        return total + self._behind(unit - 1)

    def _continues(self, unit: int) -> bool:
        return unit > 0 and self.units[unit - 1].is_text

    def _with_pictures(self, at: tuple[int, int], unit: int) -> tuple[int, int]:
        """The border before the text in `unit`, or before the pictures in front of it when they fit with it."""
        begin, room = unit, self.max_tokens - self._text_left(unit, 0)
        while begin - 1 > at[0] and not self.units[begin - 1].is_text and self.units[begin - 1].tokens <= room:
            begin -= 1
            room -= self.units[begin].tokens
        pulled = begin if begin > at[0] and self._has_text(at[0], begin) else unit
        return pulled, 0

    def _has_text(self, begin: int, end: int) -> bool:
        return any(u.is_text for u in self.units[begin:end])

    def _inside(self, at: tuple[int, int], unit: int, offset: int, room: int) -> tuple[int, int]:
        """The best border in the text of the piece that begins at `at`, of which `room` tokens fit behind (unit,
        offset); that place if there is none behind it."""
        parts = [(unit, offset, offset + room)]  # its stretches, the last one first
        while (first := parts[-1][0]) > at[0] and self.units[first - 1].is_text:
            parts.append((first - 1, at[1] if first - 1 == at[0] else 0, self.units[first - 1].tokens))
        total = before = sum(end - begin for _, begin, end in parts)
        for number, begin, end in parts:
            before -= end - begin
            size = self.units[number].tokens
            sentence = _last_up_to(self.units[number].sentences, end if number < unit else min(end, size - 1))
            if sentence > begin and before + sentence - begin > total // 2:
                return (number, sentence) if sentence < size else (number + 1, 0)
        return unit, max(_last_up_to(self.units[unit].borders or (), offset + room), offset)

    def _least(self, size: UnitSize, offset: int) -> int:
        """The next border: a single character of more tokens than a piece holds is not cut."""
        borders = size.borders or ()
        at = bisect_right(borders, offset)
        return borders[at] if at < len(borders) else size.tokens

    def _context(self, at: tuple[int, int]) -> int:
        """Tokens of text right before `at`, at most `overlap`."""
        unit, found = at[0], at[1]
        while found < self.overlap and unit > 0 and self.units[unit - 1].is_text:
            unit -= 1
            found += self.units[unit].tokens
        return min(found, self.overlap)

    def _back(self, at: tuple[int, int], tokens: int) -> tuple[int, int]:
        unit, offset = at
        while tokens > offset:
            tokens -= offset
            unit -= 1
            offset = self.units[unit].tokens
        return unit, offset - tokens


def _last_up_to(values: Sequence[int], most: int) -> int:
    at = bisect_right(values, most)
    return values[at - 1] if at else -1
