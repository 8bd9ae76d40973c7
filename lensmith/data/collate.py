"""Samples -> one packed row: tokens side by side, segments moved, each distinct picture once. No padding, ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lensmith.core.encoded import (
    BAD,
    CHOSEN,
    GOOD,
    IGNORED,
    REJECTED,
    Compared,
    Encoded,
    ImageBlock,
    PackedRow,
    Segment,
)
from lensmith.core.errors import Drop
from lensmith.core.sample import Conversation, Sample, Video
from lensmith.data.load import Loader, SampleRef, content_key


@dataclass(frozen=True, slots=True)
class Member:
    """One sample to be loaded: its number among the trainable ones, where it is, its loss weight and its source."""

    number: int
    at: SampleRef
    weight: float = 1.0
    tokens: int = -1
    source: int = 0
    other: tuple[int, SampleRef] | None = None
    """Number and place of the sample whose answer is read behind this one's prompt too, where mismatched answers are
    asked for."""


Grid = tuple[int, int, int]
At = tuple[str, Grid]


@dataclass
class Pictures:
    """Distinct pictures of a row. `known` maps a handle to the key of a picture whose features are already cached."""

    loader: Loader
    known: dict[str, str]
    keys: list[str] = field(default_factory=list)
    handles: dict[str, str] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    views: list[tuple[int, ...]] = field(default_factory=list)
    pixels: dict[int, np.ndarray] = field(default_factory=dict)
    _of: dict[At, int] = field(default_factory=dict)
    _numbers: dict[At, int] = field(default_factory=dict)

    def add(self, file: int, encoded: Encoded, origin: str) -> list[int]:
        """Numbers of the sample's pictures among the distinct ones. Raises `Drop` for one that does not decode; then
        none of the sample's pictures is added."""
        order = self._keys(file, encoded, origin)
        fresh = {at: b for at, b in zip(order, encoded.images, strict=True) if at not in self._of}
        read: dict[At, tuple[str, np.ndarray | None]] = {}
        read |= {at: (self.known[at[0]], None) for at in fresh if at[0] in self.known}
        missing: dict[int, dict[At, ImageBlock]] = {}
        for at, block in fresh.items():
            if at not in read:
                missing.setdefault(id(block.image), {})[at] = block
        for blocks in missing.values():
            read |= self._read(file, blocks, origin)
        for (handle, grid), block in fresh.items():
            key, patches = read[handle, grid]
            self.handles[handle] = key
            self._of[(handle, grid)] = self._number(key, grid, block.view, patches)
        return [self._of[at] for at in order]

    def _read(self, file: int, blocks: dict[At, ImageBlock], origin: str) -> dict[At, tuple[str, np.ndarray]]:
        """Key and patches of blocks of one picture or video, which is decoded once."""
        image, found = next(iter(blocks.values())).image, list(blocks.values())
        if isinstance(image, Video):
            clips = self.loader.video_patches(file, found, origin)
            # a key of the pixels: clips that look the same are one, whatever file and frames they come from
            return {at: (content_key(clip.tobytes()), clip) for at, clip in zip(blocks, clips, strict=True)}
        data = self.loader.bytes_of(file, image, origin)
        key, patches = content_key(data), self.loader.patches(data, found)
        return {
            at: (".".join([key, *map(str, block.view)]), pixels)
            for (at, block), pixels in zip(blocks.items(), patches, strict=True)
        }

    def _keys(self, file: int, encoded: Encoded, origin: str) -> list[At]:
        """What tells the sample's blocks apart: handle, the frames of a clip or the view of a picture, and grid."""
        found = {id(b.image): b.image for b in encoded.images}
        handles = {n: self.loader.handle(file, image, origin) for n, image in found.items()}
        parts = (b.frames or b.view for b in encoded.images)
        shown = (f"\n{','.join(map(str, part))}" if part else "" for part in parts)
        return [(handles[id(b.image)] + part, b.grid_thw) for b, part in zip(encoded.images, shown, strict=True)]

    def _number(self, key: str, grid: Grid, view: tuple[int, ...], patches: np.ndarray | None) -> int:
        """Two places may hold the same bytes: one picture."""
        number = self._numbers.setdefault((key, grid), len(self.keys))
        if number == len(self.keys):
            self.keys.append(key)
            self.grids.append(grid)
            self.views.append(view)
            if patches is not None:
                self.pixels[number] = patches
        return number

    def fill(self, row: PackedRow, order: list[int]) -> None:
        """Put the pictures into `row`; `order` is the distinct number of every placed image."""
        have = sorted(self.pixels)
        row.image_keys = self.keys
        row.image_grids_I3 = np.array(self.grids, np.int32).reshape(-1, 3)
        row.image_views = self.views
        row.image_of_block = np.array(order, np.int32)
        row.pixel_image = np.array(have, np.int32)
        row.pixels_PD = _joined([self.pixels[i] for i in have])
        row.meta["handles"] = self.handles


def _joined(pixels: list[np.ndarray]) -> np.ndarray:
    """One array [P, D]. Beside videos a still picture is repeated in time; alone it stays narrow.

    D counts channel (3), time, row, column.
    """
    if not pixels:
        return np.zeros((0, 0), np.uint8)
    widest = max(p.shape[1] for p in pixels)
    wide = [p.reshape(len(p), 3, 1, -1).repeat(widest // p.shape[1], 2).reshape(len(p), -1) for p in pixels]
    return np.concatenate(wide)


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
            kept.append((member, encoded, pictures.add(member.at.file, encoded, origin)))
        except (Drop, MemoryError) as problem:
            drop = problem if isinstance(problem, Drop) else Drop("OOM", "its pictures do not fit into memory")
            dropped.append((member.number, drop.reason, drop.detail))
    return _join(kept, pictures, tuple(dropped))


def load_compared(loader: Loader, members: Sequence[Member], known: dict[str, str]) -> PackedRow:
    """As `load_row`; the row has its prompts with the answers of `Member.other` too, for the members that it kept."""
    row = load_row(loader, members, known)
    kept = [replace(m, tokens=-1) for m in members if m.number in row.members and m.other is not None]
    if kept and row.compared is not None:
        found = load_row(loader, kept, known, lambda m: _encode_mismatched(loader, m))
        if found.compared is not None:
            rest = iter(kept)  # a step that goes over an epoch's end may have a sample twice, with two others
            others = [next(m.other[0] for m in rest if m.number == n and m.other is not None) for n in found.members]
            found.compared.other_B = np.array(others, np.int64)
            row.compared.mismatched = found
    return row


def _encode_mismatched(loader: Loader, member: Member) -> tuple[str, Encoded]:
    """The prompt of a sample with the answer of another one."""
    assert member.other is not None
    sample, other = (
        loader.sample(member.at.file, member.at.row),
        loader.sample(member.other[1].file, member.other[1].row),
    )
    return sample.origin, loader.encode(member.at.file, mismatched(sample, other))


def _encode(loader: Loader, member: Member) -> tuple[str, Encoded]:
    sample = loader.sample(member.at.file, member.at.row)
    return sample.origin, loader.encode(member.at.file, sample, member.at.cut)


def _join(
    kept: list[tuple[Member, Encoded, list[int]]], pictures: Pictures, dropped: tuple[tuple[int, str, str], ...]
) -> PackedRow:
    offsets = np.cumsum([0, *(e.num_tokens for _, e, _ in kept)])
    segments: list[Segment] = []
    targets, weights, owners, sources = [], [], [], []
    for (member, encoded, _), offset in zip(kept, offsets, strict=False):
        segments += [s.moved(int(offset)) for s in encoded.segments]
        target = encoded.target_L
        targets.append(target)
        weights.append(np.full(len(target), member.weight, np.float32))
        owners.append(np.full(len(target), member.number, np.int64))
        sources.append(np.full(len(target), member.source, np.int32))
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
        sample_S=(np.concatenate(owners) if owners else np.zeros(0, np.int64))[supervised],
        source_S=(np.concatenate(sources) if sources else empty)[supervised],
        members=tuple(m.number for m, _, _ in kept),
        dropped=dropped,
    )
    if kept and kept[0][1].preference is not None:
        row.compared = _compared(kept, offsets.tolist(), supervised)
    pictures.fill(row, [i for _, _, found in kept for i in found])
    return row


def _compared(
    kept: list[tuple[Member, Encoded, list[int]]], offsets: Sequence[int], supervised_S: np.ndarray
) -> Compared:
    """The sequences of samples that compare answers, in order of their positions."""
    sequences = [
        (member, encoded, role, segment, int(offset))
        for (member, encoded, _), offset in zip(kept, offsets, strict=False)
        for role, segment in zip(_roles(encoded), encoded.branches, strict=True)
    ]
    begins = np.array([offset + segment.start for _, _, _, segment, offset in sequences])
    sequence_S = np.searchsorted(begins, supervised_S, side="right").astype(np.int32) - 1
    members = [member for member, *_ in sequences]
    last = [offset + _last_trained(encoded, segment) for _, encoded, _, segment, offset in sequences]
    return Compared(
        sequence_S=sequence_S,
        role_B=np.array([role for _, _, role, _, _ in sequences], np.int8),
        length_B=np.bincount(sequence_S, minlength=len(sequences)).astype(np.int32),
        last_B=np.array(last, np.int32),
        margin_B=np.array([e.preference.margin if e.preference else 0.0 for _, e, *_ in sequences], np.float32),
        sample_B=np.array([m.number for m in members], np.int64),
        source_B=np.array([m.source for m in members], np.int32),
        weight_B=np.array([m.weight for m in members], np.float32),
        other_B=np.full(len(members), -1, np.int64),
    )


def _last_trained(encoded: Encoded, segment: Segment) -> int:
    inside = encoded.trained_L[segment.start : segment.start + segment.length]
    return segment.start + int(np.flatnonzero(inside)[-1])


def _roles(encoded: Encoded) -> tuple[int, ...]:
    assert encoded.preference is not None
    label = encoded.preference.label
    return (CHOSEN, REJECTED) if label is None else (GOOD,) if label else (BAD,)


def mismatched(sample: Sample, other: Sample) -> Sample:
    """The prompt of a labelled sample behind which the answer of another one stands."""
    mine, its = _talk(sample), _talk(other)
    prompt = tuple(m for m in mine.messages if not m.trained)
    answer = tuple(m for m in its.messages if m.trained)
    return replace(sample, content=(replace(mine, messages=(*prompt, *answer)),))


def _talk(sample: Sample) -> Conversation:
    assert isinstance(sample.content, tuple) and isinstance(sample.content[0], Conversation)
    return sample.content[0]
