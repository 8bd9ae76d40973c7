"""Which rank and packed row each member of a step goes to: a pure function that changes speed, never the result.

Members are packed into rows by best fit, rows are spread over ranks by cost, and every rank gets the same number of
rows (filled with empty ones, which have no weight). Members that show the same pictures stay together while they fit,
so that a frozen tower sees them once.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
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

    clusters: members with equal values show the same pictures (-1: none).
    """
    sizes, costs = [int(t) for t in tokens.tolist()], [float(c) for c in cost.tolist()]
    pixels = [int(p) for p in patches.tolist()]
    rows = [row.members for row in _pack(_items(sizes, pixels, clusters.tolist(), limits), limits)]
    return _to_ranks(_split(rows, ranks, costs), ranks, costs)


def _items(tokens: list[int], patches: list[int], clusters: list[int], limits: Limits) -> list[_Row]:
    """Members that stay together: same pictures, as long as they fit one row. The pictures count once."""
    if not limits.packing:
        return [_Row(t, p, [i]) for i, (t, p) in enumerate(zip(tokens, patches, strict=True))]
    open_items: dict[int, _Row] = {}
    items: list[_Row] = []
    for i, cluster in enumerate(clusters):
        item = open_items.get(cluster) if cluster != -1 else None
        if item is None or item.tokens + tokens[i] > limits.device_tokens:
            item = _Row()
            items.append(item)
            open_items[cluster] = item
        item.tokens += tokens[i]
        item.patches = max(item.patches, patches[i])
        item.members.append(i)
    return items


def _pack(items: list[_Row], limits: Limits) -> list[_Row]:
    """Best fit decreasing: each item goes to the fullest row that takes it. Ties go by position in the step and by
    age of the row, so the result depends on nothing else."""
    if not limits.packing:
        return items
    most = math.inf if limits.device_patches is None else limits.device_patches
    rows: list[_Row] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for item in sorted(items, key=lambda item: (-item.tokens, item.members[0])):
        at = bisect_left(room, (item.tokens, -1))
        while at < len(room) and rows[room[at][1]].patches + item.patches > most:
            at += 1
        if at == len(room):
            rows.append(_Row())
            number = len(rows) - 1
        else:
            number = room.pop(at)[1]
        row = rows[number]
        row.tokens, row.patches = row.tokens + item.tokens, row.patches + item.patches
        row.members += item.members
        insort(room, (limits.device_tokens - row.tokens, number))
    return rows


def _split(rows: list[list[int]], ranks: int, cost: list[float]) -> list[list[int]]:
    """Fewer rows than ranks: halve the dearest row that has several members, until each rank has one. A part of a row
    is within the limits because the row was."""
    rows = [row for row in rows if row]
    while len(rows) < ranks:
        several = [row for row in rows if len(row) > 1]
        if not several:
            break
        dearest = max(several, key=lambda row: (sum(cost[j] for j in row), -min(row)))
        halves: tuple[list[int], list[int]] = ([], [])
        loads = [0.0, 0.0]
        for j in sorted(dearest, key=lambda j: (-cost[j], j)):
            half = 1 if loads[1] < loads[0] else 0
            halves[half].append(j)
            loads[half] += cost[j]
        if not halves[1]:  # members without cost
            halves[1].append(halves[0].pop())
        rows.remove(dearest)
        rows += halves
    return rows


def _to_ranks(rows: list[list[int]], ranks: int, cost: list[float]) -> list[list[tuple[int, ...]]]:
    """Dearest row first to the cheapest rank that has room."""
    per_rank = -(-len(rows) // ranks)
    placed: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    costs = {min(row): sum(cost[j] for j in sorted(row)) for row in rows}
    for row in sorted(rows, key=lambda row: (-costs[min(row)], min(row))):
        rank = min((r for r in range(ranks) if len(placed[r]) < per_rank), key=lambda r: (load[r], r))
        placed[rank].append(tuple(sorted(row)))
        load[rank] += costs[min(row)]
    for mine in placed:
        mine.extend(() for _ in range(per_rank - len(mine)))
    return placed
