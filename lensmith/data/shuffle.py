"""The order of a source's samples in one epoch: a permutation that is read in pieces.

Up to `FULL` samples it is a full shuffle. Above, neighbouring samples form blocks, the blocks are put in random order
and some hundred consecutive blocks of that order, a window, are shuffled together. Every place is closed-form, so a run
jumps anywhere, and no more than two windows are held, however many samples there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

FULL = 1 << 20
BLOCK = 1024
WINDOW = 256
ROUNDS = 12
_WINDOWS_KEPT = 2  # a reader of tokens looks ahead into the next window, then the members are read from this one


class Shuffle:
    """A permutation of [0, `num_items`), one for each (`seed`, `source`, `epoch`).

    All randomness is Philox with the key (`seed`, `epoch`); the words of its counter are (running, window, `source`,
    use), so no two uses share a number. Use 0 shuffles (the whole, or window w as number w + 1), use 1 orders blocks.

    How far it is from a full shuffle, with B samples a block, m blocks and c = m / windows blocks a window (205 to 256,
    as FULL leaves five windows or more): two neighbours in the order are of one block with probability
    (B - 1) / (cB - 1), about 1 / c, where a full shuffle has (B - 1) / (n - 1), about 1 / m. Otherwise they are of two
    blocks, and any two blocks are as likely as any other: the distance between neighbours is distributed as in a full
    shuffle. So the distances differ in total variation by at most 1 / c - 1 / m: 0.4 % for c = 256. The samples of the
    short block, if there is one, never come to the last places of a window's range, as many as that block lacks: at
    most 0.5 % of them.
    """

    def __init__(
        self,
        num_items: int,
        seed: int,
        epoch: int,
        source: int = 0,
        *,
        full: int = FULL,
        block: int = BLOCK,
        window: int = WINDOW,
    ):
        self.num_items, self.seed, self.epoch, self.source = num_items, seed, epoch, source
        self._block = num_items if num_items <= full else block
        self._num_blocks = -(-num_items // self._block) if num_items else 0
        self._num_windows = -(-self._num_blocks // window)
        self._windows: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        self._missing = self._num_blocks * self._block - num_items
        """What the last block, the short one, lacks."""
        self._order: Bijection | None = None
        self._short_at = 0
        if self._num_blocks > 1:
            self._order = Bijection(self._num_blocks, self._philox(0, use=1).random_raw(ROUNDS))
            self._short_at = int(self._order.inverse(np.array([self._num_blocks - 1]))[0])

    def take(self, begin: int, end: int) -> np.ndarray:
        """The items at places `begin` to `end` of the permutation."""
        assert 0 <= begin <= end <= self.num_items
        found = [np.zeros(0, np.int64)]
        while begin < end:
            first, blocks, order = self._window(self._window_at(begin))
            local = order[begin - first : end - first].astype(np.int64)
            found.append(blocks[local // self._block] * self._block + local % self._block)
            begin += len(local)
        return np.concatenate(found)

    def _window_at(self, place: int) -> int:
        """The blocks are spread evenly over the windows: a last window of one block would be a run of neighbours."""
        before_short = place < self._begin_of(self._short_at + 1)
        ordinal = (place if before_short else place + self._missing) // self._block
        return ((ordinal + 1) * self._num_windows - 1) // self._num_blocks

    def _begin_of(self, ordinal: int) -> int:
        """The place where the block with this ordinal in the order of blocks would begin."""
        return ordinal * self._block - (self._missing if ordinal > self._short_at else 0)

    def _window(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(its first place, its blocks, its samples in shuffled order as block ordinal * block size + offset)."""
        if number not in self._windows:
            if len(self._windows) == _WINDOWS_KEPT:
                del self._windows[next(iter(self._windows))]
            begin, end = (w * self._num_blocks // self._num_windows for w in (number, number + 1))
            ordinals = np.arange(begin, end)
            blocks = ordinals if self._order is None else self._order(ordinals)
            if begin <= self._short_at < end:  # to the end of its window, so that places within blocks stay regular
                blocks = np.append(np.delete(blocks, self._short_at - begin), self._num_blocks - 1)
            first, size = self._begin_of(begin), self._begin_of(end) - self._begin_of(begin)
            philox = self._philox(0 if self._order is None else number + 1, use=0)
            order = np.random.Generator(philox).permutation(size).astype(np.uint32)
            self._windows[number] = first, blocks, order
        return self._windows[number]

    def _philox(self, window: int, use: int) -> np.random.Philox:
        return np.random.Philox(key=[self.seed, self.epoch], counter=[0, window, self.source, use])


class Bijection:
    """A keyed permutation of [0, `size`), computed for any members alone: a Feistel network on pairs (x // b, x % b)
    that adds modulo the halves' own sizes a and b. As a * b exceeds `size` by less than b, few members are sent
    outside; these walk on along their cycle until they are inside again."""

    def __init__(self, size: int, keys: np.ndarray):
        self.size, self.keys = size, keys.astype(np.uint64)
        right = math.isqrt(size - 1) + 1
        self._halves = np.uint64(-(-size // right)), np.uint64(right)

    def __call__(self, members: np.ndarray) -> np.ndarray:
        return self._walk(members, self._forward)

    def inverse(self, members: np.ndarray) -> np.ndarray:
        return self._walk(members, self._backward)

    def _walk(self, members: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        found = step(members.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= self.size)):
            found[outside] = step(found[outside])
        return found.astype(np.int64)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        a, b = self._halves
        left, right = x // b, x % b
        for number, key in enumerate(self.keys):
            if number % 2:
                right = (right + _mix(left + key) % b) % b
            else:
                left = (left + _mix(right + key) % a) % a
        return left * b + right

    def _backward(self, x: np.ndarray) -> np.ndarray:
        a, b = self._halves
        left, right = x // b, x % b
        for number, key in reversed(list(enumerate(self.keys))):
            if number % 2:
                right = (right + b - _mix(left + key) % b) % b
            else:
                left = (left + a - _mix(right + key) % a) % a
        return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64; arithmetic modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
