"""Which samples train in which step: a pure function of (index, seed, batch rule, exclusions).

The stream is endless: epoch after epoch, each its own permutation. It knows nothing of ranks, workers or packing, so
a run resumes from a step number (and, for `batch.tokens`, a cursor) with any number of ranks.
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

    def num_steps(self) -> int:
        """Steps of the whole run. For a token rule this walks the stream once."""
        if self.tokens is not None:
            count = sum(1 for _ in self.steps())
        elif self.end is None:
            assert self.max_steps is not None, "an endless plan needs max_steps"
            count = self.max_steps
        else:
            count = self._steps_until(self.end)
        return count if self.max_steps is None else min(count, self.max_steps)

    def _steps_until(self, position: int) -> int:
        assert self.samples is not None
        if self.partial == "carry":
            return -(-position // self.samples)
        whole, rest = divmod(position, self.num_samples)
        if self.partial == "epoch_end":
            return whole * -(-self.num_samples // self.samples) + -(-rest // self.samples)
        return whole * (self.num_samples // self.samples) + rest // self.samples

    def steps(self, start: int = 0, cursor: int | None = None) -> Iterator[Step]:
        """Steps from `start` on. With a token rule `cursor` is the saved stream position of that step."""
        position = self._position_of(start) if cursor is None else cursor
        number = start
        orders: dict[int, np.ndarray] = {}
        while self.max_steps is None or number < self.max_steps:
            stretch = self._next(position, orders)
            if stretch is None:
                return
            begin, end, position = stretch
            members = self._members(begin, end, orders)
            if self.excluded:
                keep = [m for m in members.tolist() if self.excluded.get(m, number + 1) > number]
                members = np.array(keep, members.dtype)
            yield Step(number, members, position / self.num_samples, position)
            number += 1

    def _position_of(self, step: int) -> int:
        if self.tokens is not None:
            position = 0
            for found in self.steps(cursor=0):
                if found.number >= step:
                    break
                position = found.cursor
            return position if step else 0
        assert self.samples is not None
        if self.partial == "carry":
            return step * self.samples
        per_epoch = -(-self.num_samples // self.samples) if self.partial == "epoch_end" else self.num_samples // self.samples
        epoch, within = divmod(step, max(per_epoch, 1))
        return epoch * self.num_samples + within * self.samples

    def _next(self, position: int, orders: dict[int, np.ndarray]) -> tuple[int, int, int] | None:
        """(first, last + 1, where the step after it begins) in the stream, or None at the end."""
        end = self.end
        while True:
            if end is not None and position >= end:
                return None
            epoch_end = (position // self.num_samples + 1) * self.num_samples
            limit = end if self.partial == "carry" else min(epoch_end, end or epoch_end)
            stop = self._fill(position, limit, orders)
            full = limit is None or stop < limit or self._is_full(position, stop, orders)
            if full or self.partial != "drop":
                return position, stop, stop
            if self._smaller_than_a_step(position, limit):
                return None
            position = epoch_end

    def _smaller_than_a_step(self, position: int, limit: int | None) -> bool:
        """`drop` on data smaller than one step would never end."""
        return limit is not None and position % self.num_samples == 0

    def _is_full(self, begin: int, stop: int, orders: dict[int, np.ndarray]) -> bool:
        if self.samples is not None and self.tokens is None:
            return stop - begin == self.samples
        return False

    def _fill(self, position: int, limit: int | None, orders: dict[int, np.ndarray]) -> int:
        if self.tokens is None:
            assert self.samples is not None
            stop = position + self.samples
            return stop if limit is None else min(stop, limit)
        assert self.num_tokens is not None
        used, stop = 0, position
        while limit is None or stop < limit:
            more = int(self.num_tokens[self._members(stop, stop + 1, orders)[0]])
            if stop > position and used + more > self.tokens:
                break
            used, stop = used + more, stop + 1
        return stop

    def _members(self, begin: int, end: int, orders: dict[int, np.ndarray]) -> np.ndarray:
        found: list[np.ndarray] = []
        while begin < end:
            epoch, offset = divmod(begin, self.num_samples)
            if epoch not in orders:
                for old in [e for e in orders if e < epoch - 1]:
                    del orders[old]
                orders[epoch] = self.order(epoch)
            taken = orders[epoch][offset : offset + end - begin]
            found.append(taken)
            begin += len(taken)
        return np.concatenate(found)
