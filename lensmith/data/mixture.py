"""Which source each draw of a mixed stream is from. Integers only: every machine draws the same.

The weights are integers that sum to at most 65,536, so a schedule repeats after that many draws; one period is a table.
In every prefix each source is within one draw of its weight. A source that has reached its cap is left out from there
on: a new phase begins, with a table of the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property
from heapq import heappop, heappush

import numpy as np

from lensmith.data.options import Shares, Temperature

PERIOD = 1 << 16
"""Longest period of a schedule in draws, so the finest share: 1 / 65,536."""


@dataclass(frozen=True)
class Mixture:
    """Draws from sources in proportion to `shares`. A source with a cap is drawn so many times, then no more."""

    shares: Sequence[Fraction | float]
    caps: Sequence[int | None]
    _known: list[_Phase] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.shares) == len(self.caps) and any(self._first_weights), "nothing can be drawn"

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """The resolved shares: draws of each source in `sum(weights)` draws. Exact where this is at most `PERIOD`, else
        rounded to 65,536ths, and every positive share at least one."""
        return resolved(self.shares)

    @property
    def end(self) -> int | None:
        """Draws after which every source has reached its cap; None if a source has none."""
        caps = [c for c, w in zip(self.caps, self.weights, strict=True) if w]
        finite = [c for c in caps if c is not None]
        return sum(finite) if len(finite) == len(caps) else None

    def source(self, number: int) -> int:
        """The source of a draw, counted from 0."""
        return int(self.draws(number, number + 1)[0][0])

    def count(self, source: int, number: int) -> int:
        """Draws of a source among the first `number` draws."""
        return self.counts(number)[source]

    def counts(self, number: int) -> tuple[int, ...]:
        """Draws of each source among the first `number` draws."""
        return tuple(self._phase_at(number).counts(number).tolist())

    def draws(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many draws of this source came before) of each draw from `begin` to `end`."""
        assert begin >= 0 and (self.end is None or end <= self.end)
        sources, before = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        while begin < end:
            phase = self._phase_at(begin)
            stop = end if phase.end is None else min(end, phase.end)
            numbers = np.arange(begin, stop) - phase.begin
            taken = phase.table[numbers % len(phase.table)]
            sources.append(taken)
            periods = numbers // len(phase.table)
            before.append(phase.before[taken] + periods * phase.weights[taken] + phase.nth[numbers % len(phase.table)])
            begin = stop
        return np.concatenate(sources), np.concatenate(before)

    @property
    def _first_weights(self) -> list[int]:
        return [0 if c == 0 else w for w, c in zip(self.weights, self.caps, strict=True)]

    def _phase_at(self, number: int) -> _Phase:
        known = self._known
        if not known:
            known.append(_Phase.of(0, np.zeros(len(self.caps), np.int64), self._first_weights, self.caps))
        while (border := known[-1].end) is not None and border <= number and border != self.end:
            counts = known[-1].counts(border)
            left = [0 if c == n else w for w, c, n in zip(self.weights, self.caps, counts.tolist(), strict=True)]
            known.append(_Phase.of(border, counts, left, self.caps))
        return known[bisect_right(known, number, key=lambda p: p.begin) - 1]


@dataclass(frozen=True)
class _Phase:
    """The draws from `begin` to `end`, between which no source reaches its cap."""

    begin: int
    end: int | None
    before: np.ndarray
    """Draws of each source before `begin`."""
    weights: np.ndarray
    """Draws of each source in a period; 0 where it is left out."""
    table: np.ndarray
    """The source of each draw of a period."""
    nth: np.ndarray
    """How many draws of the same source came before it in the period."""

    @staticmethod
    def of(begin: int, before: np.ndarray, weights: Sequence[int], caps: Sequence[int | None]) -> _Phase:
        divisor = math.gcd(*weights)
        reduced = np.array([w // divisor for w in weights], np.int64)
        table = schedule(reduced.tolist())
        by_source = np.argsort(table, kind="stable")
        nth = np.empty(len(table), np.int64)
        nth[by_source] = np.arange(len(table)) - (np.cumsum(reduced) - reduced)[table[by_source]]
        ends: list[int] = []
        for source, cap in enumerate(caps):
            if cap is not None and reduced[source]:
                periods, rest = divmod(cap - int(before[source]) - 1, int(reduced[source]))
                ends.append(begin + periods * len(table) + int(np.flatnonzero(table == source)[rest]) + 1)
        return _Phase(begin, min(ends, default=None), before, reduced, table, nth)

    def counts(self, number: int) -> np.ndarray:
        periods, rest = divmod(number - self.begin, len(self.table))
        return self.before + periods * self.weights + np.bincount(self.table[:rest], minlength=len(self.weights))


def schedule(weights: Sequence[int]) -> np.ndarray:
    """One period of `sum(weights)` draws in which every prefix of n has n * weight / period draws of each source,
    give or take less than one (Tijdeman 1980, The chairman assignment problem).

    Less than one too many: draw j of a source with the share w comes not before slot floor((j - 1) / w) + 1. Less than
    one too few: not after slot ceil(j / w). Whatever the shares are such a schedule exists, so the earliest deadline
    first finds it.
    """
    period = sum(weights)
    waiting = [(1, s) for s, w in enumerate(weights) if w]
    ready: list[tuple[int, int]] = []
    done = [0] * len(weights)
    table = np.empty(period, np.int32)
    for slot in range(1, period + 1):
        while waiting and waiting[0][0] <= slot:
            source = heappop(waiting)[1]
            heappush(ready, (-(-(done[source] + 1) * period // weights[source]), source))
        source = heappop(ready)[1]
        table[slot - 1] = source
        done[source] += 1
        if done[source] < weights[source]:
            heappush(waiting, (done[source] * period // weights[source] + 1, source))
    return table


def resolved(shares: Sequence[Fraction | float], most: int = PERIOD) -> tuple[int, ...]:
    """Integers in the proportions of `shares` (floats as they are written) that sum to at most `most`: exact, or by
    largest remainder with at least 1 for every positive share."""
    exact = [s if isinstance(s, Fraction) else Fraction(str(s)) for s in shares]
    whole = math.lcm(*(s.denominator for s in exact))
    numbers = [int(s * whole) for s in exact]
    if sum(numbers) > most * math.gcd(*numbers):
        numbers = _largest_remainder(numbers, most)
    divisor = max(1, math.gcd(*numbers))
    return tuple(n // divisor for n in numbers)


def _largest_remainder(numbers: list[int], most: int) -> list[int]:
    found = [0] * len(numbers)
    free = [i for i, n in enumerate(numbers) if n]
    assert len(free) <= most
    total = sum(numbers)
    while small := {i for i in free if numbers[i] * most < total}:  # their 1 is taken from the others
        free = [i for i in free if i not in small]
        most -= len(small)
        total = sum(numbers[i] for i in free)
        for i in small:
            found[i] = 1
    for i in free:
        found[i] = numbers[i] * most // total
    rest = most - sum(found[i] for i in free)
    for i in sorted(free, key=lambda i: (-(numbers[i] * most % total), i))[:rest]:
        found[i] += 1
    return found


def shares_of(
    options: Shares | Temperature, sizes: Sequence[int], tokens: Sequence[int], share: Sequence[float]
) -> list[Fraction]:
    """What each source is drawn in proportion to. `sizes` and `tokens` are the sums of its trainable samples. A source
    without samples gets 0."""
    found: list[Fraction] = []
    for size, its_tokens, its_share in zip(sizes, tokens, share, strict=True):
        exact = Fraction(str(its_share)) if size else Fraction(0)
        if isinstance(options, Temperature):
            exact *= _root(size, options.temperature)
        elif options.by == "tokens" and size:
            exact = exact * size / its_tokens
        found.append(exact)
    return found


def _root(size: int, temperature: float) -> Fraction:
    """size^(1 / temperature). In decimals: a power of floats differs in its last digit from machine to machine."""
    context = Context(prec=30)
    power = context.power(Decimal(size), context.divide(Decimal(1), Decimal(str(temperature)))) if size else Decimal(0)
    return Fraction(Context(prec=15).plus(power))


def caps_of(
    options: Shares | Temperature, sizes: Sequence[int], epochs: Sequence[float | None]
) -> tuple[int | None, ...]:
    """How often each source may be drawn: its own `epochs`, else once through with `exhausted: leave_out`."""
    left_out = 1.0 if options.exhausted == "leave_out" else None
    passes = [left_out if e is None else e for e in epochs]
    return tuple(None if p is None else max(1, round(n * p)) for n, p in zip(sizes, passes, strict=True))
