"""Which samples train in which step: a pure function of (index, seed, batch rule, exclusions).

The stream is endless: epoch after epoch, each its own permutation; of a mixture, draws from sources of which each has
epochs of its own. It knows nothing of ranks, workers or packing, so a run resumes from a step number and a cursor with
any number of ranks. The length (`epochs`, `max_steps`) only says where the stream is cut, so a run can be made longer
later. Nothing is as large as the data: orders and token counts are read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lensmith.data.mixture import Mixture
from lensmith.data.shuffle import Shuffle

Partial = Literal["carry", "epoch_end", "drop"]

CHUNK = 65_536
"""Stream positions whose tokens are summed at once."""


@dataclass(frozen=True, slots=True)
class Step:
    """The members of global step `number` (from 0): positions in the list of trainable samples."""

    number: int
    members: np.ndarray
    epoch: float
    """Epochs completed after this step. Of a mixture: draws over samples of all sources."""
    cursor: int
    """Position in the stream after this step."""
    stream: dict[str, Any] | None = None
    """Of a stream that is not planned: where to go on after this step (see `windows`)."""


@dataclass(frozen=True)
class Plan:
    """`num_tokens[i]` is needed only for a token rule; it may be a memory map. `epochs` None: endless (bounded by
    `max_steps`). With a `mixture`, source s has the `sizes[s]` samples that follow those of the sources before it;
    an epoch is as many draws as there are samples, and the stream ends where the mixture does, if that is earlier."""

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

    sizes: tuple[int, ...] = ()
    """Samples of each source of a mixture."""
    mixture: Mixture | None = None
    """None: all samples are one source."""

    def __post_init__(self) -> None:
        if self.mixture is not None:
            assert sum(self.sizes) == self.num_samples and len(self.sizes) == len(self.mixture.weights)
            assert all(n or not w for n, w in zip(self.sizes, self.mixture.weights, strict=True)), "an empty source"

    def order(self, epoch: int, source: int = 0) -> np.ndarray:
        """The permutation of one epoch of a source, whole."""
        size = self._sizes[source]
        return Shuffle(size, self.seed, epoch, source).take(0, size)

    def drawn(self, position: int) -> tuple[int, ...]:
        """Draws of each source before a position in the stream; without a mixture all samples are one source."""
        return (position,) if self.mixture is None else self.mixture.counts(position)

    def epochs_of(self, position: int) -> tuple[float, ...]:
        """Passes over each source before a position in the stream."""
        return tuple(d / n if n else 0.0 for d, n in zip(self.drawn(position), self._sizes, strict=True))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.num_samples,) if self.mixture is None else self.sizes

    @property
    def epoch_samples(self) -> int:
        """Draws that make an epoch: the samples of all sources that are drawn at all."""
        if self.mixture is None:
            return self.num_samples
        return sum(size for size, weight in zip(self.sizes, self.mixture.weights, strict=True) if weight)

    @property
    def end(self) -> int | None:
        """Stream position where the last epoch ends, or where every source of the mixture is used up."""
        last = None if self.epochs is None else round(self.epoch_samples * self.epochs)
        own = None if self.mixture is None else self.mixture.end
        return own if last is None else last if own is None else min(last, own)

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
        n, size = self.epoch_samples, self.samples
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
            yield Step(number, members, end / self.epoch_samples, end)

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
        whole, rest = divmod(self.epoch_samples, self.samples)
        per_epoch = whole + bool(rest) if self.partial == "epoch_end" else whole
        epoch, within = divmod(step, max(per_epoch, 1))
        return epoch * self.epoch_samples + within * self.samples

    def _next(self, position: int, walk: _Walk) -> tuple[int, int] | None:
        """The stretch of the step that begins at `position` (or, with `drop`, at the next epoch); None at the end."""
        end = self.end
        while end is None or position < end:
            epoch_end = (position // self.epoch_samples + 1) * self.epoch_samples
            limit = end if self.partial == "carry" else epoch_end if end is None else min(epoch_end, end)
            stop, full = walk.fill(position, limit)
            if full or self.partial != "drop":
                return position, stop
            if position % self.epoch_samples == 0:  # a whole epoch is less than a step: it would be dropped for ever
                return None
            position = epoch_end
        return None


class _Walk:
    """The pieces of orders and token sums in use of one walk along the stream."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._starts = np.cumsum([0, *plan._sizes]).tolist()
        self._shuffles: dict[int, dict[int, Shuffle]] = {}
        self._begin = 0
        self._sums = np.zeros(1, np.int64)
        """Tokens of the first so many samples from stream position `_begin` on."""

    def fill(self, position: int, limit: int | None) -> tuple[int, bool]:
        """(where the step that begins at `position` stops, whether it stops for being full)."""
        plan = self.plan
        if plan.tokens is None:
            assert plan.samples is not None
            stop = position + plan.samples
            return (stop, True) if limit is None or stop <= limit else (limit, False)
        stop, left = position, plan.tokens
        while limit is None or stop < limit:
            offset, sums = self._sums_at(stop)
            most = int(np.searchsorted(sums, sums[offset] + left, side="right")) - 1 - offset
            if limit is not None:
                most = min(most, limit - stop)
            left -= int(sums[offset + most] - sums[offset])
            stop += most
            if offset + most < len(sums) - 1:
                break
        if stop == position:  # a sample of more tokens than a step has: alone
            return position + 1, True
        return stop, left == 0 or limit is None or stop < limit

    def members(self, begin: int, end: int) -> np.ndarray:
        """The samples at stream positions `begin` to `end`."""
        mixture = self.plan.mixture
        if mixture is None:
            return self._draws(0, begin, end)
        sources, draws = mixture.draws(begin, end)
        by_source = np.argsort(sources, kind="stable")
        found, done = [np.zeros(0, np.int64)], 0
        for source, times in enumerate(np.bincount(sources).tolist()):
            if times:
                first = int(draws[by_source[done]])
                found.append(self._starts[source] + self._draws(source, first, first + times))
                done += times
        members = np.empty(end - begin, np.int64)
        members[by_source] = np.concatenate(found)
        return members

    def _draws(self, source: int, begin: int, end: int) -> np.ndarray:
        """The samples of a source's draws `begin` to `end`, epoch after epoch."""
        size = self.plan._sizes[source]
        found = [np.zeros(0, np.int64)]
        while begin < end:
            epoch, offset = divmod(begin, size)
            found.append(self._shuffle(source, epoch).take(offset, min(size, offset + end - begin)))
            begin += len(found[-1])
        return np.concatenate(found)

    def _shuffle(self, source: int, epoch: int) -> Shuffle:
        """Two epochs of a source are kept: sums look ahead into the next one."""
        kept = self._shuffles.setdefault(source, {})
        if epoch not in kept:
            if len(kept) == 2:
                del kept[next(iter(kept))]
            kept[epoch] = Shuffle(self.plan._sizes[source], self.plan.seed, epoch, source)
        return kept[epoch]

    def _sums_at(self, position: int) -> tuple[int, np.ndarray]:
        """(offset of a stream position in sums of tokens, these sums); at least one sample follows there."""
        if not self._begin <= position < self._begin + len(self._sums) - 1:
            num_tokens, end = self.plan.num_tokens, self.plan.end
            assert num_tokens is not None
            size = min(CHUNK, max(512, 2 * len(self._sums)))  # a short walk reads little
            members = self.members(position, position + size if end is None else min(position + size, end))
            self._begin = position
            self._sums = np.concatenate([[0], np.cumsum(num_tokens[members], dtype=np.int64)])
        return position - self._begin, self._sums
