"""Several conversations or documents with a common beginning as one sample: the beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lensmith.core.encoded import IMAGE, Encoded, Segment


def join_branches(branches: Sequence[Encoded]) -> Encoded:
    """Conversations with a common beginning as one sample: the beginning once, then each branch behind it.

    The shared prefix is the longest common run of tokens that ends before any branch's first trained token less one,
    so that every target is predicted by a position of its own branch. Each branch keeps the positions it has alone.
    """
    if len(branches) == 1:
        return branches[0]
    shared = _shared_prefix(branches)
    first = branches[0]
    ids, trained, kinds = [first.ids_L[:shared]], [first.trained_L[:shared]], [first.kind_L[:shared]]
    positions = [first.position_ids_3L[:, :shared]]
    num_shared_images = _blocks_within(first, shared)
    segments = [Segment(0, shared)] if shared else []
    images = list(first.images[:num_shared_images])
    at = shared
    for branch in branches:
        own = branch.num_tokens - shared
        segments.append(Segment(at, own, 0, shared))
        ids.append(branch.ids_L[shared:])
        trained.append(branch.trained_L[shared:])
        kinds.append(branch.kind_L[shared:])
        positions.append(branch.position_ids_3L[:, shared:])
        images.extend(branch.images[num_shared_images:])
        at += own
    return Encoded(
        ids_L=np.concatenate(ids),
        trained_L=np.concatenate(trained),
        kind_L=np.concatenate(kinds),
        position_ids_3L=np.concatenate(positions, axis=1),
        segments=tuple(segments),
        images=tuple(images),
        num_answers=len(branches),
    )


def _shared_prefix(branches: Sequence[Encoded]) -> int:
    limit = min(b.num_tokens for b in branches) - 1
    for branch in branches:
        trained = np.flatnonzero(branch.trained_L)
        if len(trained):
            limit = min(limit, int(trained[0]) - 1)
    limit = max(limit, 0)
    first = branches[0]
    for other in branches[1:]:
        same = (first.ids_L[:limit] == other.ids_L[:limit]) & (first.kind_L[:limit] == other.kind_L[:limit])
        limit = limit if same.all() else int(np.argmin(same))
    while limit and not _same_images(branches, limit):
        limit = _before_last_image(first, limit)
    if 0 < limit < first.num_tokens and first.kind_L[limit] == IMAGE == first.kind_L[limit - 1]:
        limit = _before_last_image(first, limit)
    return limit


def _blocks_within(encoded: Encoded, length: int) -> int:
    """How many whole image blocks lie in the first `length` tokens."""
    covered, total = int((encoded.kind_L[:length] == IMAGE).sum()), 0
    for count, block in enumerate(encoded.images):
        total += block.num_tokens
        if total > covered:
            return count
    return len(encoded.images)


def _same_images(branches: Sequence[Encoded], length: int) -> bool:
    count = _blocks_within(branches[0], length)
    return all(b.images[:count] == branches[0].images[:count] for b in branches)


def _before_last_image(encoded: Encoded, length: int) -> int:
    """The longest prefix below `length` that ends before the last image block which begins there."""
    inside = np.flatnonzero(encoded.kind_L[:length] == IMAGE)
    if not len(inside):
        return 0
    last = int(inside[-1])
    while last > 0 and encoded.kind_L[last - 1] == IMAGE:
        last -= 1
    return last
