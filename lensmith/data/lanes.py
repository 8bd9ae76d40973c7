"""The order in which a stream's rows are read: pure in (shards, seed, shares), and resumable from a small state.

A *lane* is one source, or all of them together where they are not mixed. Each pass takes a lane's shards in an order of
its own, `OPEN` of them at a time, a row of each in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lensmith.core.errors import DataError
from lensmith.data.mixture import Mixture
from lensmith.data.readers.base import StreamRow
from lensmith.data.readers.stream import Shard
from lensmith.data.shuffle import Shuffle

OPEN = 8
"""Shards of a lane that are read at the same time: their rows are neighbours in a window."""
ELSEWHERE = ("REMOTE", "DATASET")
"""Errors of a network: the shard itself may be whole, so they are never a wrong row."""
_ORDER_OF_SHARDS = 1 << 32
"""Of `Shuffle`: no source of a plan has such a number, so nothing else draws the same numbers."""


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
    """[number of the shard, rows read] of the shards in use."""
    drawn: int = 0
    """Rows of this pass."""
    _iterators: dict[int, Iterator[StreamRow]] = field(default_factory=dict[int, Iterator[StreamRow]])
    _order: Shuffle | None = None

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "next": self.next, "turn": self.turn, "open": [list(o) for o in self.open],
            "drawn": self.drawn,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.next, self.turn = state["epoch"], state["next"], state["turn"]
        self.open, self.drawn = [list(o) for o in state["open"]], state["drawn"]
        self._iterators.clear()
        self._order = None

    def draw(self) -> tuple[int, StreamRow] | None:
        """(source file, row); None when all passes are done. A shard that breaks off gives its error as its last row.
        Raises `DataError` SHARD, REMOTE, DATASET where a shard cannot be had."""
        while self.spec.passes is None or self.epoch < self.spec.passes:
            while len(self.open) < OPEN and self.next < len(self.spec.shards):
                self.open.append([self._shard_at(self.next), 0])
                self.next += 1
            if not self.open:
                if not self.drawn:  # nothing but empty shards: the next pass would be the same
                    return None
                self.epoch, self.next, self.turn, self.drawn = self.epoch + 1, 0, 0, 0
                self._order = None
                continue
            self.turn %= len(self.open)
            number, read = self.open[self.turn]
            file, shard = self.spec.shards[number]
            row, more = self._next_of(number, shard, read)
            if more and row is not None:
                self.open[self.turn][1] = row.number + 1
                self.turn += 1
            else:
                self.open.pop(self.turn)
                self._iterators.pop(number, None)
            if row is not None:
                self.drawn += 1
                return file, row
        return None

    def _next_of(self, number: int, shard: Shard, read: int) -> tuple[StreamRow | None, bool]:
        """(row, whether more may follow)."""
        try:
            if number not in self._iterators:
                self._iterators[number] = shard.rows(read)
            return next(self._iterators[number], None), True
        except DataError as error:
            if error.code in ELSEWHERE:
                raise
            return None if error.code == "NO_ROWS" else StreamRow(read, error.where or shard.name, None, error), False
        except OSError as error:
            remedy = "put it back and run again: the run goes on where it was saved"
            problem = f"the shard cannot be read: {error.strerror or error}"
            raise DataError("SHARD", problem, where=shard.name, remedy=remedy) from None

    def _shard_at(self, place: int) -> int:
        """The shard at a place of this pass's order."""
        if self._order is None:
            self._order = Shuffle(len(self.spec.shards), self.seed, self.epoch, _ORDER_OF_SHARDS + self.number)
        return int(self._order.take(place, place + 1)[0])


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
        """(source file, row); None at the end of all lanes. Raises as `Lane.draw`."""
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
