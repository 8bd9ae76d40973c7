"""How long operations take: on a device of a data sheet by what they compute and move, on this machine by doing them.

An operation of a data sheet takes the largest of its FLOPs over a rate, its bytes over a bandwidth, and what the host
needs to start it. Of this machine every operation of a row is done once or twice on tensors of its sizes, those of the
most work first, for some seconds; the rest have the rates of those (docs/scaling.md).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lensmith.model.flops import Like, Operation, thawed

MEASURED_SECONDS = 15.0
"""Of processor time: longest that `measure` takes, but for its last operation."""
REPEATS = 2
KEPT_BYTES = 1 << 29
GUESS = (50e9, 5e9)
"""FLOPs and bytes per second by which operations are put in order before anything is measured."""


@dataclass(frozen=True)
class Rates:
    """Per second: FLOPs by type and bytes; and seconds from one operation to the next."""

    flops: Mapping[torch.dtype, float]
    bytes: float
    launch: float = 0.0
    known: Mapping[Operation, float] = field(default_factory=dict)
    """Seconds of single operations, as measured."""

    def seconds(self, operations: Mapping[Operation, int]) -> float:
        return sum(count * self.of(op) for op, count in operations.items())

    def of(self, op: Operation) -> float:
        if op in self.known:
            return self.known[op]
        rate = self.flops.get(op.dtype) or min(self.flops.values())
        return max(op.flops / rate, op.bytes / self.bytes, self.launch)


def measure(operations: Mapping[Operation, int], limit_seconds: float = MEASURED_SECONDS) -> Rates:
    """What this machine does now, with the threads that torch has."""

    def guess(op: Operation) -> float:
        return operations[op] * (op.flops / GUESS[0] + op.bytes / GUESS[1])

    known: dict[Operation, float] = {}
    kept = _Kept()
    end = time.process_time() + limit_seconds
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for op in sorted(operations, key=guess, reverse=True):
            if time.process_time() > end:
                break
            known[op] = _seconds(op, kept)
    flops: dict[torch.dtype, float] = {}
    for dtype in {op.dtype for op in known if op.flops}:
        own = [op for op in known if op.dtype == dtype and op.flops]
        flops[dtype] = sum(op.flops for op in own) / sum(known[op] for op in own)
    moving = [op for op in known if not op.flops]
    moved = sum(op.bytes for op in moving) / sum(known[op] for op in moving) if moving else GUESS[1]
    return Rates(flops or {torch.float32: GUESS[0]}, moved, known=known)


class _Kept:
    """What the last operations took and made. Memory that is let go at once is taken again while a cache still has it,
    as in no training: a product of 9 MiB took 2.8 ms so, and 4.6 ms where its result was kept."""

    def __init__(self) -> None:
        self.values: deque[tuple[int, Any]] = deque()
        self.bytes = 0

    def add(self, op: Operation, value: Any) -> None:
        self.values.append((op.bytes, value))
        self.bytes += op.bytes
        while self.bytes > KEPT_BYTES and len(self.values) > 1:
            self.bytes -= self.values.popleft()[0]


def _seconds(op: Operation, kept: _Kept) -> float:
    """Mean of a few, after one that is not counted. With one thread in its own processor time, so that others on the
    machine, who come and go, have no part in it."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found: list[float] = []
    for _ in range(1 + REPEATS):
        args, kwargs = thawed(op.arguments, _tensor)
        begin = clock()
        out = op.func(*args, **kwargs)
        found.append(clock() - begin)
        kept.add(op, (args, kwargs, out))
    return sum(found[1:]) / REPEATS


def _tensor(like: Like) -> torch.Tensor:
    """Zeros where they may be places in another tensor."""
    tensor = torch.empty_strided(like.shape, like.stride, dtype=like.dtype)
    return tensor.fill_(0.5) if like.dtype.is_floating_point else tensor.zero_()
