"""What this rank holds of a parameter: all of it, or a share that FSDP2 gave it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lensmith.parallel.ranks import Ranks


@dataclass(frozen=True)
class Piece:
    """Some elements of a named tensor: those from `start` on of the tensor flattened row by row. A tensor of one rank
    alone is a piece too; `shape` is that of the whole."""

    key: str
    values: torch.Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return self.values.numel() == math.prod(self.shape)


def is_sharded(p: torch.Tensor) -> bool:
    """A `DTensor` with a share of its rows on every rank; rows stay whole: a share is a stretch of the flat tensor."""
    return _mesh(p) is not None


def is_here(p: torch.Tensor) -> bool:
    """Whether this rank has all of it: FSDP2 leaves a share, ZeRO-3 an empty tensor."""
    return not is_sharded(p) and getattr(p, "ds_shape", p.shape) == p.shape


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's values, in the memory that they live in; without history."""
    own: Any = p.detach()
    if _mesh(p) is not None:
        return own.to_local()
    return own if is_here(p) else _zero3_share(p)


def _zero3_share(p: Any) -> torch.Tensor:
    """Flat. Shares have the same length on every rank; behind the parameter's end nothing counts."""
    share = p.ds_tensor.detach()
    begin = torch.distributed.get_rank(p.ds_process_group) * share.numel()
    return share.flatten()[: max(0, min(share.numel(), p.ds_numel - begin))]


def start(p: torch.Tensor) -> int:
    """Where this rank's values begin in the flattened tensor. Rows are dealt out as by `torch.chunk`."""
    mesh = _mesh(p)
    if mesh is None or not p.ndim:
        return 0
    each = -(-p.shape[0] // mesh.size(mesh.ndim - 1))
    first = min(mesh.get_local_rank(mesh.ndim - 1) * each, p.shape[0])
    return first * math.prod(p.shape[1:])


def copies(p: torch.Tensor, ranks: Ranks) -> tuple[int, int]:
    """(how many ranks hold the same values as this one, the number of this rank among them)."""
    mesh = _mesh(p)
    if mesh is None:
        return ranks.size, ranks.rank
    return (mesh.size(0), mesh.get_local_rank(0)) if mesh.ndim > 1 else (1, 0)


def writers(named: Iterable[tuple[str, torch.Tensor]], ranks: Ranks) -> set[str]:
    """The names that this rank writes to a checkpoint, so that every value is written once and each of the ranks that
    hold the same values writes about as much."""
    mine: set[str] = set()
    load: dict[int, list[int]] = {}
    for name, p in sorted(named, key=lambda item: (-item[1].numel(), item[0])):
        many, own = copies(p, ranks)
        loads = load.setdefault(many, [0] * many)
        least = min(range(many), key=lambda r: loads[r])
        loads[least] += p.numel()
        if least == own:
            mine.add(name)
    return mine


def _mesh(p: torch.Tensor) -> Any:
    """The mesh that a `DTensor` is spread over; None for any other tensor."""
    return getattr(p, "device_mesh", None)
