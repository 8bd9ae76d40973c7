"""Samples -> one packed row: tokens side by side, segments moved, each distinct picture once. No padding, ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lensmith.core.encoded import IGNORED, Encoded, PackedRow, Segment
from lensmith.core.errors import Drop
from lensmith.data.load import Loader, content_key
from lensmith.data.readers import RowRef


@dataclass(frozen=True, slots=True)
class Member:
    """One sample to be loaded: its number among the trainable ones, where its row is, its loss weight."""

    number: int
    file: int
    ref: RowRef
    weight: float = 1.0
    tokens: int = -1


Grid = tuple[int, int, int]


@dataclass
class Pictures:
    """Distinct pictures of a row. `known` maps a handle to the key of a picture whose features are already cached."""

    loader: Loader
    known: dict[str, str]
    keys: list[str] = field(default_factory=list)
    handles: dict[str, str] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    pixels: dict[int, np.ndarray] = field(default_factory=dict)
    _of: dict[tuple[str, Grid], int] = field(default_factory=dict)
    _numbers: dict[tuple[str, Grid], int] = field(default_factory=dict)

    def add(self, file: int, encoded: Encoded, origin: str) -> list[int]:
        """Numbers of the sample's pictures among the distinct ones. Raises `Drop` for one that does not decode; then
        none of the sample's pictures is added."""
        order = [(self.loader.handle(file, block.image, origin), block.grid_thw) for block in encoded.images]
        read: dict[tuple[str, Grid], tuple[str, np.ndarray | None]] = {}
        for block, at in zip(encoded.images, order, strict=True):
            if at in self._of or at in read:
                continue
            if (key := self.known.get(at[0])) is not None:
                read[at] = key, None
            else:
                data = self.loader.bytes_of(file, block.image, origin)
                read[at] = content_key(data), self.loader.patches(data, block)
        for (handle, grid), (key, patches) in read.items():
            self.handles[handle] = key
            self._of[(handle, grid)] = self._number(key, grid, patches)
        return [self._of[at] for at in order]

    def _number(self, key: str, grid: Grid, patches: np.ndarray | None) -> int:
        """Two places may hold the same bytes: one picture."""
        number = self._numbers.setdefault((key, grid), len(self.keys))
        if number == len(self.keys):
            self.keys.append(key)
            self.grids.append(grid)
            if patches is not None:
                self.pixels[number] = patches
        return number

    def fill(self, row: PackedRow, order: list[int]) -> None:
        """Put the pictures into `row`; `order` is the distinct number of every placed image."""
        have = sorted(self.pixels)
        row.image_keys = self.keys
        row.image_grids_I3 = np.array(self.grids, np.int32).reshape(-1, 3)
        row.image_of_block = np.array(order, np.int32)
        row.pixel_image = np.array(have, np.int32)
        row.pixels_PD = np.concatenate([self.pixels[i] for i in have]) if have else np.zeros((0, 0), np.uint8)
        row.meta["handles"] = self.handles


def load_row(
    loader: Loader,
    members: Sequence[Member],
    known: dict[str, str],
    encode: Callable[[Member], tuple[str, Encoded]] | None = None,
) -> PackedRow:
    """Read, render and decode `members` into one row. A picture that fails now is a drop of its sample, noted in the
    row; the other samples train."""
    pictures = Pictures(loader, known)
    kept: list[tuple[Member, Encoded, list[int]]] = []
    dropped: list[tuple[int, str, str]] = []
    for member in members:
        try:
            origin, encoded = (encode or (lambda m: _encode(loader, m)))(member)
            if member.tokens >= 0 and encoded.num_tokens != member.tokens:
                raise Drop("CHANGED", f"{encoded.num_tokens} tokens, {member.tokens} in the index")
            kept.append((member, encoded, pictures.add(member.file, encoded, origin)))
        except Drop as drop:
            dropped.append((member.number, drop.reason, drop.detail))
    return _join(kept, pictures, tuple(dropped))


def _encode(loader: Loader, member: Member) -> tuple[str, Encoded]:
    sample = loader.sample(member.file, member.ref)
    return sample.origin, loader.encode(member.file, sample)


def _join(
    kept: list[tuple[Member, Encoded, list[int]]], pictures: Pictures, dropped: tuple[tuple[int, str, str], ...]
) -> PackedRow:
    offsets = np.cumsum([0, *(e.num_tokens for _, e, _ in kept)])
    segments: list[Segment] = []
    targets, weights, owners = [], [], []
    for (member, encoded, _), offset in zip(kept, offsets, strict=False):
        segments += [s.moved(int(offset)) for s in encoded.segments]
        target = encoded.target_L
        targets.append(target)
        weights.append(np.full(len(target), member.weight, np.float32))
        owners.append(np.full(len(target), member.number, np.int32))
    empty = np.zeros(0, np.int32)
    target_T = np.concatenate(targets) if targets else empty
    supervised = np.flatnonzero(target_T != IGNORED).astype(np.int32)
    row = PackedRow(
        ids_T=np.concatenate([e.ids_L for _, e, _ in kept]) if kept else empty,
        kind_T=np.concatenate([e.kind_L for _, e, _ in kept]) if kept else np.zeros(0, np.int8),
        position_ids_3T=np.concatenate([e.position_ids_3L for _, e, _ in kept], axis=1)
        if kept
        else np.zeros((3, 0), np.int32),
        segments=tuple(segments),
        supervised_S=supervised,
        target_S=target_T[supervised],
        weight_S=(np.concatenate(weights) if weights else np.zeros(0, np.float32))[supervised],
        sample_S=(np.concatenate(owners) if owners else empty)[supervised],
        members=tuple(m.number for m, _, _ in kept),
        dropped=dropped,
    )
    pictures.fill(row, [i for _, _, found in kept for i in found])
    return row
