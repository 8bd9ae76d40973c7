"""What ranks exchange in a step, by engine, and how long it takes: formulas (docs/scaling.md), no torch.

Two counts of bytes are told apart. `handed` is what a rank hands to collectives, as `Ranks.sent` counts it. `wire` is
what then leaves the rank in a ring of R: 2 (R - 1) / R of what is summed, (R - 1) / R of what is summed and scattered,
(R - 1) times a share that everyone gets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lensmith.parallel.devices import Device

EngineName = Literal["local", "fsdp2", "hsdp", "zero-1", "zero-2", "zero-3"]
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "flags"]
BUCKET_BYTES = 25 << 20
"""Of gradients that are summed at once (lensmith/parallel/reduce.py)."""
ZERO_BUCKET_BYTES = 4 * 200_000_000
"""`reduce_bucket_size` of 2e8 values, in float32 (lensmith/parallel/zero_config.py)."""


@dataclass(frozen=True)
class Tensor:
    """A parameter: sizes of one value in bytes."""

    shape: tuple[int, ...]
    trained: bool
    kept: int
    """As it is kept."""
    gradient: int
    """In the type that gradients are added up in."""
    travels: int
    """In the type that it is gathered in."""
    unit: str | None
    """What an engine gathers at once; None: every rank holds it, as it does a frozen tower."""
    gathers: int = 2
    """How often its unit is gathered for a micro-batch: once for each pass that reaches it; what is in no block stays
    whole in between."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def share(self, ranks: int) -> int:
        """Values of one rank, with those that fill up the last rows."""
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:]) if self.shape else 1


@dataclass(frozen=True)
class Layout:
    """How an engine spreads a model over `ranks`, of which `shard` share one copy."""

    engine: EngineName
    ranks: int
    shard: int = 1

    @property
    def spreads_parameters(self) -> bool:
        return self.engine in ("fsdp2", "hsdp", "zero-3")

    @property
    def spreads_gradients(self) -> bool:
        return self.spreads_parameters or self.engine == "zero-2"

    @property
    def spreads_state(self) -> bool:
        return self.engine != "local"

    @property
    def copies(self) -> int:
        return self.ranks // self.shard


def layouts(ranks: int, per_node: int) -> list[Layout]:
    """The engines that so many ranks can have. HSDP shares a copy within each node."""
    if ranks == 1:
        return [Layout("local", 1)]
    found = [Layout("local", ranks), Layout("fsdp2", ranks, ranks)]
    if ranks > per_node and ranks % per_node == 0:
        found.append(Layout("hsdp", ranks, per_node))
    zeros: tuple[EngineName, ...] = ("zero-1", "zero-2", "zero-3")
    return [*found, *(Layout(name, ranks, ranks) for name in zeros)]


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind of a step, together."""

    kind: Kind
    handed: int
    """Bytes that a rank hands over."""
    among: int
    """Ranks of the group."""
    times: int = 1

    @property
    def wire(self) -> float:
        """Bytes that leave the rank."""
        r = self.among
        part = {"all_reduce": 2 * (r - 1) / r, "reduce_scatter": (r - 1) / r, "all_gather": r - 1.0, "flags": r - 1.0}
        return part[self.kind] * self.handed

    @property
    def copied(self) -> float:
        """Bytes that are read and written on the way: into one tensor and, of a sum, out of it again; of what is
        gathered, the share into it and the whole out of it."""
        part = {"all_reduce": 4, "reduce_scatter": 2, "all_gather": 2 * (1 + self.among), "flags": 0}
        return part[self.kind] * self.handed

    def seconds(self, device: Device) -> float:
        """On the slowest link of the ring; a group of one node stays within it. Each takes 2 (R - 1) hops besides."""
        rate = (device.link if self.among <= device.per_node else device.network) * device.link_share
        copying = self.copied / (device.bandwidth * device.bandwidth_share)
        return self.wire / rate + copying + self.times * 2 * (self.among - 1) * device.hop_seconds


def exchanges(layout: Layout, tensors: Sequence[Tensor], micro_batches: int, flags: tuple[int, int]) -> list[Exchange]:
    """What a rank takes part in during one step. `flags`: bytes and number of the small gathers of a step."""
    if layout.ranks == 1:
        return []
    found = [Exchange("flags", flags[0], layout.ranks, flags[1])]
    if layout.engine in ("zero-1", "zero-2"):
        found += _of_zero(layout, [t for t in tensors if t.trained], micro_batches)
    else:
        spread = [t for t in tensors if layout.spreads_parameters and t.unit is not None]
        found += _of_shares(layout, spread, micro_batches)
        found += _summed(layout, [t for t in tensors if t.trained and not (layout.spreads_parameters and t.unit)])
    return [exchange for exchange in found if exchange.handed]


def _of_zero(layout: Layout, trained: Sequence[Tensor], micro_batches: int) -> list[Exchange]:
    """Gradients go to the rank that updates them, with ZeRO-2 after every micro-batch, for nobody keeps the rest; then
    everyone gets what was updated."""
    times = micro_batches if layout.engine == "zero-2" else 1
    gradients = sum(t.count * t.gradient for t in trained)
    updated = sum(t.count * t.kept for t in trained) // layout.ranks
    return [
        Exchange("reduce_scatter", times * gradients, layout.ranks, times * -(-gradients // ZERO_BUCKET_BYTES)),
        Exchange("all_gather", updated, layout.ranks),
    ]


def _of_shares(layout: Layout, spread: Sequence[Tensor], micro_batches: int) -> list[Exchange]:
    """Every unit is gathered before it computes; the gradients of every micro-batch go to the ranks that have the
    shares. Copies of shares are summed once a step."""
    if not spread:
        return []
    s = layout.shard
    units = len({t.unit for t in spread})
    gathered = sum(t.gathers * t.share(s) * t.travels for t in spread)
    scattered = sum(s * t.share(s) * t.gradient for t in spread if t.trained)
    found = [
        Exchange("all_gather", micro_batches * gathered, s, 2 * micro_batches * units),
        Exchange("reduce_scatter", micro_batches * scattered, s, micro_batches * units),
    ]
    return [*found, Exchange("all_reduce", scattered // s, layout.copies, units)] if layout.copies > 1 else found


def _summed(layout: Layout, whole: Sequence[Tensor]) -> list[Exchange]:
    """One sum of the gradients of a step, in which every tensor has one more number: whether a rank used it."""
    size = sum((t.count + 1) * t.gradient for t in whole)
    return [Exchange("all_reduce", size, layout.ranks, -(-size // BUCKET_BYTES))]


def handed(found: Sequence[Exchange]) -> dict[str, int]:
    """Kind -> bytes, as `Ranks.sent` counts them."""
    sums: Counter[str] = Counter()
    for exchange in found:
        sums[exchange.kind] += exchange.handed
    return dict(sums)
