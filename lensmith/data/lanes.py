"""The order in which a stream's rows are read: pure in (shards, seed, shares), and resumable from a small state.

A *lane* is one source, or all of them together where they are not mixed. Each pass takes a lane's shards in an order of
its own, `OPEN` of them at a time, a row of each in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lensmith.core.errors import DataError
from lensmith.data.mixture import Mixture
from lensmith.data.readers.base import StreamRow
from lensmith.data.readers.stream import Shard

OPEN = 8
"""Shards of a lane that are read at the same time: their rows are neighbours in a window."""


@dataclass(frozen=True)
class LaneSpec:
    """`shards`: (number of the source file that its rows belong to, shard). `passes` None: without end."""

    shards: tuple[tuple[int, Shard], ...]
    share: float = 1.0
    passes: int | None = None


@dataclass
class Lane:
    """One lane while it is read. `state` is all that is needed to go on from here."""

    spec: LaneSpec
    number: int
    seed: int
    epoch: int = 0
    next: int = 0
    """Shards of this pass that were opened."""
    turn: int = 0
    open: list[list[int]] = field(default_factory=list[list[int]])
    """[place in this pass's order, rows read] of the shards in use."""
    drawn: int = 0
    _iterators: dict[int, Iterator[StreamRow]] = field(default_factory=dict[int, Iterator[StreamRow]])

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "next": self.next, "turn": self.turn, "open": [list(o) for o in self.open],
            "drawn": self.drawn,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.next, self.turn = state["epoch"], state["next"], state["turn"]
        self.open, self.drawn = [list(o) for o in state["open"]], state["drawn"]
        self._iterators.clear()

    def draw(self) -> tuple[int, StreamRow] | None:
        """(source file, row); None when all passes are done. Raises `DataError` where a shard cannot be read."""
        while self.spec.passes is None or self.epoch < self.spec.passes:
            while len(self.open) < OPEN and self.next < len(self.spec.shards):
                self.open.append([self.next, 0])
                self.next += 1
            if not self.open:
                if not self.drawn:
                    return None
                self.epoch, self.next, self.turn = self.epoch + 1, 0, 0
                continue
            self.turn %= len(self.open)
            place, read = self.open[self.turn]
            file, shard = self.spec.shards[self._order()[place]]
            row = next(self._rows(place, shard, read), None)
            if row is None:
                self.open.pop(self.turn)
                self._iterators.pop(place, None)
                continue
            self.open[self.turn][1] = row.number + 1
            self.turn += 1
            self.drawn += 1
            return file, row
        return None

    def _rows(self, place: int, shard: Shard, start: int) -> Iterator[StreamRow]:
        if place not in self._iterators:
            self._iterators[place] = _guarded(shard, start)
        return self._iterators[place]

    def _order(self) -> list[int]:
        """The order of the shards in this pass."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch], counter=[0, 0, self.number, 7]))
        return random.permutation(len(self.spec.shards)).tolist()


def _guarded(shard: Shard, start: int) -> Iterator[StreamRow]:
    """A shard that holds no rows gives none; one that breaks off gives its error as its last row."""
    number = start
    try:
        for row in shard.rows(start):
            number = row.number + 1
            yield row
    except DataError as error:
        if error.code != "NO_ROWS":
            yield StreamRow(number, error.where or shard.name, None, error)


class Lanes:
    """Draws rows from several lanes by their shares; a lane whose passes are done is left out."""

    def __init__(self, specs: Sequence[LaneSpec], seed: int):
        self.lanes = [Lane(spec, number, seed) for number, spec in enumerate(specs)]
        self.alive = [spec.share > 0 and bool(spec.shards) for spec in specs]
        self.drawn = 0
        """Draws since the last lane was left out."""
        self._mixture: Mixture | None = None

    def state(self) -> dict[str, Any]:
        return {"lanes": [lane.state() for lane in self.lanes], "alive": list(self.alive), "drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        for lane, own in zip(self.lanes, state["lanes"], strict=True):
            lane.restore(own)
        self.alive, self.drawn, self._mixture = list(state["alive"]), state["drawn"], None

    def draw(self) -> tuple[int, StreamRow] | None:
        """(source file, row); None at the end of all lanes."""
        while any(self.alive):
            if self._mixture is None:
                shares = [lane.spec.share if on else 0.0 for lane, on in zip(self.lanes, self.alive, strict=True)]
                self._mixture = Mixture(shares, [None] * len(shares))
            lane = self._mixture.source(self.drawn)
            found = self.lanes[lane].draw()
            if found is not None:
                self.drawn += 1
                return found
            self.alive[lane], self.drawn, self._mixture = False, 0, None
        return None
