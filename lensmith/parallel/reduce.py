"""Data parallel: gradients are summed over ranks in buckets, behind the last backward pass of a step.

torch's DistributedDataParallel averages, wants gradients in the type of their parameters, and has to be told of
parameters that a rank's rows do not use. Here gradients are summed in whatever type they are added up in, a parameter
that no rank used keeps no gradient, and one that only some ranks used counts as zero on the others.
"""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lensmith.parallel.ranks import Ranks

BUCKET_BYTES = 25 << 20
"""As in torch's own: large enough for bandwidth, small enough to begin early."""


class Bucket:
    """Parameters whose gradients travel together, and a flag for each that says whether this rank has one."""

    def __init__(self, params: list[nn.Parameter], dtype: torch.dtype):
        self.params, self.dtype = params, dtype
        self.waiting = len(params)
        self.flat: torch.Tensor | None = None
        self.work: Any = None

    def launch(self, ranks: Ranks) -> None:
        parts = [
            torch.zeros(p.numel(), dtype=self.dtype, device=p.device) if p.grad is None else p.grad.flatten()
            for p in self.params
        ]
        has = torch.tensor([p.grad is not None for p in self.params], dtype=self.dtype, device=parts[0].device)
        self.flat = torch.cat([*parts, has])
        self.work = ranks.sum_async(self.flat, "sum gradients")

    def take(self) -> None:
        """Put the sums where the gradients are, and get ready for the next step."""
        assert self.flat is not None
        self.work.wait()
        sums, has = self.flat[: -len(self.params)], self.flat[-len(self.params) :].tolist()
        for p, part, used in zip(self.params, sums.split([p.numel() for p in self.params]), has, strict=True):
            if not used:
                p.grad = None
            elif p.grad is None:
                p.grad = part.view(p.shape).clone()
            else:
                p.grad.copy_(part.view(p.shape))
        self.flat, self.work, self.waiting = None, None, len(self.params)


class Reducer:
    """Buckets go out in a fixed order, the last parameters of the model first, as the backward pass reaches them."""

    def __init__(self, params: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype], ranks: Ranks):
        """`dtypes`: of each parameter's gradient."""
        self.ranks = ranks
        self.buckets: list[Bucket] = []
        self._of: dict[nn.Parameter, Bucket] = {}
        self._next = 0
        self._armed = False
        for p, dtype in reversed(list(zip(params, dtypes, strict=True))):
            self._add(p, dtype)
        for p in params:
            p.register_post_accumulate_grad_hook(self._ready)

    def _add(self, p: nn.Parameter, dtype: torch.dtype) -> None:
        last = self.buckets[-1] if self.buckets else None
        size = 0 if last is None else sum(q.numel() for q in last.params) * last.dtype.itemsize
        if last is None or last.dtype != dtype or last.params[0].device != p.device or size >= BUCKET_BYTES:
            self.buckets.append(Bucket([], dtype))
        self.buckets[-1].params.append(p)
        self.buckets[-1].waiting += 1
        self._of[p] = self.buckets[-1]

    def arm(self) -> None:
        """The next backward pass is the last of the step: its gradients are whole when they arrive."""
        self._armed = True

    def _ready(self, p: nn.Parameter) -> None:
        if self._armed:
            self._of[p].waiting -= 1
            self._go_on()

    def _go_on(self, *, all_of_them: bool = False) -> None:
        while self._next < len(self.buckets) and (all_of_them or self.buckets[self._next].waiting <= 0):
            self.buckets[self._next].launch(self.ranks)
            self._next += 1

    def finish(self) -> None:
        """Until every gradient is the sum over ranks."""
        self._go_on(all_of_them=True)
        for bucket in self.buckets:
            bucket.take()
        self._next, self._armed = 0, False
