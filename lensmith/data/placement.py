"""Which rank and packed row each member of a step goes to: a pure function that changes speed, never the result.

Members are packed into rows by best fit, rows are spread over ranks by cost, and every rank gets the same number of
rows (filled with empty ones, which have no weight). Members that show the same picture stay together while they fit,
so that a frozen tower sees it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Limits:
    """What one row holds. `packing` False: one sample per row."""

    device_tokens: int
    device_patches: int | None = None
    packing: bool = True


@dataclass
class _Row:
    tokens: int = 0
    patches: int = 0
    cost: float = 0.0
    members: list[int] = field(default_factory=list)


def place(
    tokens: np.ndarray,
    patches: np.ndarray,
    cost: np.ndarray,
    clusters: np.ndarray,
    *,
    ranks: int,
    limits: Limits,
) -> list[list[tuple[int, ...]]]:
    """rows[rank][micro_batch] = positions in the step's member list; all arguments are per member.

    clusters: members with equal values show the same picture (-1: none).
    """
    rows = _pack(_items(tokens, clusters, limits), tokens, patches, cost, limits)
    if len(rows) < ranks:
        rows = _spread(rows, ranks, cost)
    return _to_ranks(rows, ranks)


def _items(tokens: np.ndarray, clusters: np.ndarray, limits: Limits) -> list[list[int]]:
    """Members that stay together: same picture, as long as they fit one row."""
    if not limits.packing:
        return [[i] for i in range(len(tokens))]
    by_cluster: dict[int, list[int]] = {}
    items: list[list[int]] = []
    for i, cluster in enumerate(clusters.tolist()):
        open_item = by_cluster.get(cluster) if cluster != -1 else None
        if open_item is not None and sum(tokens[j] for j in open_item) + tokens[i] <= limits.device_tokens:
            open_item.append(i)
        else:
            item = [i]
            items.append(item)
            by_cluster[cluster] = item
    return items


def _pack(items: list[list[int]], tokens: np.ndarray, patches: np.ndarray, cost: np.ndarray, limits: Limits) -> list[_Row]:
    """Best fit decreasing. Ties go by the position in the step, so the result depends on nothing else."""
    sizes = [int(sum(tokens[j] for j in item)) for item in items]
    rows: list[_Row] = []
    for k in sorted(range(len(items)), key=lambda k: (-sizes[k], items[k][0])):
        item, size = items[k], sizes[k]
        own = int(max(patches[j] for j in item))
        best: _Row | None = None
        for row in rows if limits.packing else ():
            fits = row.tokens + size <= limits.device_tokens
            fits = fits and (limits.device_patches is None or row.patches + own <= limits.device_patches)
            if fits and (best is None or row.tokens > best.tokens):
                best = row
        if best is None:
            best = _Row()
            rows.append(best)
        best.tokens, best.patches = best.tokens + size, best.patches + own
        best.cost += float(sum(cost[j] for j in item))
        best.members += item
    return rows


def _spread(rows: list[_Row], ranks: int, cost: np.ndarray) -> list[_Row]:
    """Fewer rows than ranks: deal the members out, dearest first, to the cheapest of `ranks` rows."""
    dealt = [_Row() for _ in range(ranks)]
    for i in sorted((j for row in rows for j in row.members), key=lambda j: (-cost[j], j)):
        row = min(dealt, key=lambda r: r.cost)
        row.members.append(i)
        row.cost += float(cost[i])
    return [row for row in dealt if row.members]


def _to_ranks(rows: Sequence[_Row], ranks: int) -> list[list[tuple[int, ...]]]:
    """Dearest row first to the cheapest rank that has room."""
    per_rank = -(-len(rows) // ranks)
    placed: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for row in sorted(rows, key=lambda r: (-r.cost, min(r.members))):
        rank = min((r for r in range(ranks) if len(placed[r]) < per_rank), key=lambda r: (load[r], r))
        placed[rank].append(tuple(sorted(row.members)))
        load[rank] += row.cost
    for mine in placed:
        mine.extend(() for _ in range(per_rank - len(mine)))
    return placed
