"""The options of training on several devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lensmith.config.part import Part, choice


class Local(Part):
    """Every rank holds the whole model; gradients are summed over ranks (data parallel)."""

    kind: Literal["local"] = "local"


class FSDP2(Part):
    """PyTorch's `fully_shard`: parameters, gradients and moments are spread over ranks, block by block."""

    kind: Literal["fsdp2"] = "fsdp2"
    shard: int | None = Field(default=None, ge=1)
    """Ranks that share one copy of the model (HSDP); groups of so many ranks hold copies of each other. Left out: all
    ranks share one."""
    offload: bool = False
    """Keep shards, gradients and moments in host memory; blocks come to the device when they compute."""
    keep_blocks: bool = False
    """Keep a block's parameters between its forward and its backward pass: one all-gather less, more memory."""


class DeepSpeed(Part):
    """DeepSpeed's ZeRO (extra `deepspeed`)."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero: Literal[1, 2, 3] = 2
    """What is spread over ranks: 1 moments, 2 gradients too, 3 parameters too."""
    offload: bool = False
    """Keep moments and float32 parameters in host memory, and update there."""
    config: str | None = None
    """A DeepSpeed JSON file of your own, relative to the run file. What contradicts the run is refused."""


Engine = Annotated[Local | FSDP2 | DeepSpeed, Field(discriminator="kind"), choice("local")]


class Parallel(Part):
    """Several devices. A launcher (torchrun, deepspeed, Slurm, Ray) says by its variables how many ranks there are."""

    ranks: int = Field(default=1, ge=1)
    """Processes that `lensmith train` starts on this machine, one for each device. Of no meaning under a launcher."""
    engine: Engine = Local()
    """`local` (data parallel), `fsdp2` or `deepspeed`."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds without a sign of life after which a rank counts as hung and all ranks end with a report."""
    restarts: int = Field(default=0, ge=0)
    """How often all ranks are started again after a failure; they resume by themselves."""
