"""The split by picture, and what held-out data shares with the training data."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from lensmith.data.index import Index
from lensmith.data.load import portable

_AT_ONCE = 1 << 20


def hold_out(index: Index, share: float, seed: int) -> tuple[Index, Index]:
    """Split off about `share` of the pictures with all their samples: (train, held out). No picture is in both, and
    neither are pieces of one document. Memory grows with the number of distinct pictures."""
    groups = _Groups()
    rows, alone = array("q"), array("b")  # the group of each row; -1 for one on its own, of which `alone` tells
    before, document = (-1, -1), -1
    for file, _, batch in index.batches(["handles", "digest", "pieces", "row"]):
        columns = [batch[name].to_pylist() for name in ("handles", "digest", "pieces", "row")]
        for handles, digest, pieces, row in zip(*columns, strict=True):
            cut = (pieces or 1) > 1
            if not handles and not cut:
                rows.append(-1)
                alone.append(_share_of(f"{seed}:text:{digest}") < share)
                continue
            own = [groups.of(h) for h in handles or ([] if digest is None else [f"text:{digest}"])]
            if cut:
                if (file, row) != before:  # pieces are neighbours
                    before, document = (file, row), groups.add("")
                own.append(document)
            groups.join(own)
            rows.append(own[0])
            alone.append(False)
    bases = sorted({f.base for f in index.spec.files}, key=len, reverse=True)
    of_group = np.array([_share_of(f"{seed}:{portable(n, bases)}") < share for n in groups.roots()] + [False], bool)
    held = of_group[np.frombuffer(rows, np.int64)] | np.frombuffer(alone, bool)
    return index.select(~held), index.select(held)


class _Groups:
    """Names that belong together; a group is named by the first name of its first member."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._names: list[str] = []
        self._parent = array("q")

    def of(self, name: str) -> int:
        number = self._number.get(name)
        if number is None:
            number = self._number[name] = self.add(name)
        return number

    def add(self, name: str) -> int:
        self._names.append(name)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def join(self, members: list[int]) -> None:
        for other in members[1:]:
            self._parent[self._root(other)] = self._root(members[0])

    def _root(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def roots(self) -> list[str]:
        """The name of each member's group."""
        return [self._names[self._root(n)] for n in range(len(self._parent))]


def _share_of(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


def seen_in_training(train: Index, held: Index) -> int:
    """Held-out samples whose text and pictures stand in the training data too."""
    digests, looks = held.column("digest"), held.column("look")
    said, each = np.unique(digests ^ looks, return_inverse=True)
    if not len(said):
        return 0
    seen = np.zeros(len(said), bool)
    digests, looks = train.column("digest"), train.column("look")
    for begin in range(0, len(digests), _AT_ONCE):
        own = digests[begin : begin + _AT_ONCE] ^ looks[begin : begin + _AT_ONCE]
        at = np.minimum(np.searchsorted(said, own), len(said) - 1)
        seen[at[said[at] == own]] = True
    return int(seen[each].sum())
