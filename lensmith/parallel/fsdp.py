"""FSDP2: a root module whose parameters are spread over ranks, block by block, by PyTorch's `fully_shard`.

What a frozen tower is stays whole on every rank: it runs under no_grad, also outside the root (pictures are encoded
ahead), and is computed once a picture. Gradients are summed over ranks, not averaged: the step divides once by a count
of all ranks.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lensmith.core.errors import ConfigError
from lensmith.parallel.options import FSDP2
from lensmith.parallel.ranks import Ranks, device_mesh


def shard(
    root: nn.Module,
    blocks: Iterable[tuple[nn.Module, torch.dtype | None]],
    whole: Iterable[nn.Parameter],
    rule: FSDP2,
    ranks: Ranks,
    device: torch.device,
    *,
    compute: torch.dtype | None,
    reduce: torch.dtype,
) -> None:
    """Spread the parameters of `root`, in place: each block's as it stands, the rest together.

    blocks: (module, type its parameters are gathered in for computing; None: their own). whole: parameters that stay
    on every rank. compute: as that of blocks, of the rest. reduce: type in which gradients are summed. Raises
    `ConfigError` for a number of ranks that `rule` does not divide.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    ignored = set(whole)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if rule.offload else OffloadPolicy()
    common: dict[str, Any] = {
        "mesh": mesh_of(rule, ranks, device), "offload_policy": offload, "ignored_params": ignored,
    }  # fmt: skip

    def policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)

    for block, dtype in blocks:
        fully_shard(block, **common, mp_policy=policy(dtype), reshard_after_forward=not rule.keep_blocks)
    fully_shard(root, **common, mp_policy=policy(compute))
    for module in root.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


def mesh_of(rule: FSDP2, ranks: Ranks, device: torch.device) -> Any:
    """One row of ranks, or (HSDP) rows of `rule.shard` that hold copies of each other."""
    if rule.shard is None or rule.shard == ranks.size:
        return device_mesh(device, (ranks.size,), ("shard",))
    if ranks.size % rule.shard:
        raise ConfigError("PARALLEL", f"parallel.engine.shard {rule.shard} does not divide {ranks.size} ranks",
                          remedy="name a divisor, or leave it out: all ranks share one copy")  # fmt: skip
    return device_mesh(device, (ranks.size // rule.shard, rule.shard), ("copy", "shard"))


def last_of_step(root: Any, last: bool) -> None:
    """Copies of shards exchange gradients only behind the last micro-batch."""
    root.set_requires_all_reduce(last)


def give_back(root: nn.Module) -> None:
    """Spread again what a forward pass without a backward pass left whole. Else the next one would compute with that,
    whatever has been written into the shares since."""
    for module in root.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


@contextmanager
def gathered_rest(root: Any) -> Generator[None]:
    """Within, what is in no block is whole, so that parts of the model can be called apart from the root."""
    root.unshard()
    try:
        yield
    finally:
        root.reshard()
