"""Which samples train in which step: a pure function of (index, seed, batch rule, exclusions).

The stream is endless: epoch after epoch, each its own permutation. It knows nothing of ranks, workers or packing, so
a run resumes from a step number and a cursor with any number of ranks. The length (`epochs`, `max_steps`) only says
where the stream is cut, so a run can be made longer later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Partial = Literal["carry", "epoch_end", "drop"]


@dataclass(frozen=True, slots=True)
class Step:
    """The members of global step `number` (from 0): positions in the list of trainable samples."""

    number: int
    members: np.ndarray
    epoch: float
    """Epochs completed after this step."""
    cursor: int
    """Position in the stream after this step."""


@dataclass(frozen=True)
class Plan:
    """`num_tokens[i]` is needed only for a token rule. `epochs` None: endless (bounded by `max_steps`)."""

    num_samples: int
    seed: int
    samples: int | None = 16
    tokens: int | None = None
    partial: Partial = "carry"
    epochs: float | None = 1
    max_steps: int | None = None
    num_tokens: np.ndarray | None = None
    excluded: Mapping[int, int] = field(default_factory=dict)
    """Sample -> first step that leaves it out. Append-only, saved with the run."""

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch; counter-based, so any epoch is reached without the ones before it."""
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_samples)

    @property
    def end(self) -> int | None:
        """Stream position where the last epoch ends."""
        return None if self.epochs is None else round(self.num_samples * self.epochs)

    def num_steps(self, done: int = 0, cursor: int = 0) -> int:
        """Steps of the whole run, of which `done` are taken and led to `cursor`. A token rule walks the rest of the
        stream once."""
        if self.end is None:
            assert self.max_steps is not None, "an endless plan needs max_steps"
            return self.max_steps if next(self._stretches(done, cursor), None) else done
        if self.tokens is not None:
            return done + sum(1 for _ in self._stretches(done, cursor))
        count = done + self._steps_between(cursor, self.end)
        return count if self.max_steps is None else max(done, min(count, self.max_steps))

    def _steps_between(self, begin: int, end: int) -> int:
        """By count of samples. `begin` is where a step begins."""
        n, size = self.num_samples, self.samples
        assert size is not None
        if begin >= end:
            return 0
        if self.partial == "carry":
            return -(-(end - begin) // size)

        def steps(samples: int) -> int:
            return -(-samples // size) if self.partial == "epoch_end" else samples // size

        own_end = (begin // n + 1) * n
        if end <= own_end:
            return steps(end - begin)
        whole, rest = divmod(end - own_end, n)
        return steps(own_end - begin) + whole * steps(n) + steps(rest)

    def steps(self, start: int = 0, cursor: int | None = None) -> Iterator[Step]:
        """Steps from `start` on. `cursor` is the saved stream position of that step; without it the position is
        counted out as if the run had been planned with this length from the beginning."""
        walk = _Walk(self)
        for number, begin, end in self._stretches(start, self._position_of(start) if cursor is None else cursor, walk):
            members = walk.members(begin, end)
            if self.excluded:
                keep = [m for m in members.tolist() if self.excluded.get(m, number + 1) > number]
                members = np.array(keep, members.dtype)
            yield Step(number, members, end / self.num_samples, end)

    def _stretches(self, start: int, position: int, walk: _Walk | None = None) -> Iterator[tuple[int, int, int]]:
        """(step, first, last + 1) in the stream."""
        walk = walk or _Walk(self)
        number = start
        while self.max_steps is None or number < self.max_steps:
            stretch = self._next(position, walk)
            if stretch is None:
                return
            yield number, *stretch
            number, position = number + 1, stretch[1]

    def _position_of(self, step: int) -> int:
        if self.tokens is not None:
            position = 0
            for number, _, end in self._stretches(0, 0):
                if number >= step:
                    break
                position = end
            return position
        assert self.samples is not None
        if self.partial == "carry":
            return step * self.samples
        per_epoch = (
            -(-self.num_samples // self.samples) if self.partial == "epoch_end" else self.num_samples // self.samples
        )
        epoch, within = divmod(step, max(per_epoch, 1))
        return epoch * self.num_samples + within * self.samples

    def _next(self, position: int, walk: _Walk) -> tuple[int, int] | None:
        """The stretch of the step that begins at `position` (or, with `drop`, at the next epoch); None at the end."""
        end = self.end
        while end is None or position < end:
            epoch_end = (position // self.num_samples + 1) * self.num_samples
            limit = end if self.partial == "carry" else epoch_end if end is None else min(epoch_end, end)
            stop, full = walk.fill(position, limit)
            if full or self.partial != "drop":
                return position, stop
            if position % self.num_samples == 0:  # a whole epoch is less than a step: it would be dropped for ever
                return None
            position = epoch_end
        return None


class _Walk:
    """The epochs in use of one walk along the stream."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._orders: dict[int, np.ndarray] = {}
        self._sums: dict[int, np.ndarray] = {}

    def fill(self, position: int, limit: int | None) -> tuple[int, bool]:
        """(where the step that begins at `position` stops, whether it stops for being full)."""
        plan = self.plan
        if plan.tokens is None:
            assert plan.samples is not None
            stop = position + plan.samples
            return (stop, True) if limit is None or stop <= limit else (limit, False)
        stop, left = position, plan.tokens
        while limit is None or stop < limit:
            epoch, offset = divmod(stop, plan.num_samples)
            sums = self._sums_of(epoch)
            most = int(np.searchsorted(sums, sums[offset] + left, side="right")) - 1 - offset
            if limit is not None:
                most = min(most, limit - stop)
            left -= int(sums[offset + most] - sums[offset])
            stop += most
            if offset + most < plan.num_samples:
                break
        if stop == position:  # a sample of more tokens than a step has: alone
            return position + 1, True
        return stop, left == 0 or limit is None or stop < limit

    def members(self, begin: int, end: int) -> np.ndarray:
        found: list[np.ndarray] = []
        while begin < end:
            epoch, offset = divmod(begin, self.plan.num_samples)
            taken = self._order(epoch)[offset : offset + end - begin]
            found.append(taken)
            begin += len(taken)
        return np.concatenate(found)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            for kept in (self._orders, self._sums):
                for old in [e for e in kept if e < epoch - 1]:
                    del kept[old]
            self._orders[epoch] = self.plan.order(epoch)
        return self._orders[epoch]

    def _sums_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._sums:
            assert self.plan.num_tokens is not None
            order = self._order(epoch)
            self._sums[epoch] = np.concatenate([[0], np.cumsum(self.plan.num_tokens[order].astype(np.int64))])
        return self._sums[epoch]
