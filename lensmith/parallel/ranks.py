"""The ranks of a run and the few collectives between them. Objects travel as JSON: nothing is unpickled."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from lensmith.core.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def nobody_listens(doing: str) -> None:
    """A sign of life that nothing watches."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. `local_*`: among those of this machine.

    Every method is called by all ranks, in the same order. Raises `RunError` RANKS where another rank is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None
    """Process group of the host collectives; None: the default one."""
    beat: Callable[[str], None] = nobody_listens
    """Called with the name of every collective before it begins."""
    sent: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes handed to collectives by this rank, by kind."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def gather(self, values: Sequence[float], what: str) -> list[list[float]]:
        """The numbers of every rank, by rank; all give the same number of them. Float64, through the host."""
        if not self.several:
            return [list(values)]
        import torch

        mine = torch.tensor(list(values), dtype=torch.float64)
        return self.gather_tensor(mine, what).tolist()

    def gather_tensor(self, mine: torch.Tensor, what: str) -> torch.Tensor:
        """[K] of each rank -> [ranks, K], on the tensor's device."""
        import torch.distributed as dist

        found = mine.new_empty(self.size, len(mine))
        with self.collective(what, "flags", mine):
            if mine.device.type == "cpu":
                dist.all_gather(list(found.unbind(0)), mine, group=self.group)
            else:
                dist.all_gather_into_tensor(found, mine)
        return found

    def gather_json(self, value: Any, what: str) -> list[Any]:
        """A JSON value of every rank, by rank."""
        if not self.several:
            return [value]
        import torch

        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(n) for (n,) in self.gather([len(mine)], what)]
        padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
        rows = self.gather_tensor(padded, what)
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, sizes, strict=True)]

    def broadcast_json(self, value: Any, what: str) -> Any:
        """The first rank's value, on every rank."""
        return self.gather_json(value if self.is_main else None, what)[0]

    def barrier(self, what: str) -> None:
        """Until every rank is here."""
        self.gather([0.0], what)

    def any(self, flag: bool, what: str) -> bool:
        """Whether a rank says so."""
        return any(value > 0 for (value,) in self.gather([float(flag)], what))

    def sum_async(self, tensor: torch.Tensor, what: str) -> Any:
        """Sum over ranks, in place; returns what `wait` is called on."""
        import torch.distributed as dist

        with self.collective(what, "all_reduce", tensor):
            return dist.all_reduce(tensor, dist.ReduceOp.SUM, async_op=True)

    @contextmanager
    def collective(self, what: str, kind: str, tensor: torch.Tensor | None = None) -> Generator[None]:
        """Around a collective: a sign of life before it, its bytes counted, its failure as a `RunError`."""
        self.beat(what)
        if tensor is not None:
            self.sent[kind] = self.sent.get(kind, 0) + tensor.numel() * tensor.element_size()
        try:
            yield
        except RuntimeError as error:
            raise self.gone(error, what) from error

    def gone(self, error: RuntimeError, what: str = "reach the other ranks") -> RunError:
        """A failed collective as what it means."""
        text = str(error).strip().splitlines()[-1][:300]
        return RunError("RANKS", f"rank {self.rank} could not {what}: {text}",
                        remedy="another rank is gone or silent: look at its messages")  # fmt: skip

    def first_then_rest(self, what: str, work: Callable[[], Any]) -> Any:
        """`work` on the first rank of each machine, then on the others, which find in the cache what it made. A rank
        that fails makes all of them fail."""
        found, error = None, None
        for turn in (True, False):
            if (self.local_rank == 0) == turn:
                found, error = attempt(work)
            self.all_well(error, what)
        return found

    def together(self, what: str, work: Callable[[], Any]) -> Any:
        """`work` on every rank at once. A rank that fails makes all of them fail, before the next collective waits."""
        found, error = attempt(work)
        self.all_well(error, what)
        return found

    def all_well(self, error: Exception | None, what: str) -> None:
        """Raises the rank's own error; on a rank without one, `RunError` OTHER_RANK with the first of the others."""
        if not self.several:
            if error is not None:
                raise error
            return
        said = self.gather_json(None if error is None else str(error)[:2000], what)
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise OtherRank(rank, text)

    def twin(self) -> Ranks:
        """The same ranks with a process group of their own, for a thread beside the training."""
        if not self.several:
            return self
        import torch.distributed as dist

        return replace(self, group=dist.new_group(backend="gloo", timeout=PATIENCE), beat=nobody_listens)


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether the libraries that carry collectives raised it, inside an engine that does not say so."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


class OtherRank(RunError):
    """Another rank stopped with an error; this one has nothing to add."""

    def __init__(self, rank: int, text: str):
        super().__init__("OTHER_RANK", f"rank {rank} stopped: {text}")


def attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - raised by the caller, once all ranks know
        return None, error


def from_env() -> Ranks:
    """What the launcher's variables say; alone without them. Raises `ConfigError` for half of them."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Ranks()
    try:
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank, local_size = int(given.get("LOCAL_RANK", 0)), int(given.get("LOCAL_WORLD_SIZE", 1))
    except (KeyError, ValueError):
        raise ConfigError("RANKS", f"a launcher set {given}", remedy="set RANK, WORLD_SIZE, LOCAL_RANK and "
                          "LOCAL_WORLD_SIZE to whole numbers, or none of them") from None  # fmt: skip
    return Ranks(rank, size, local_rank, local_size)


PATIENCE = timedelta(days=1)
"""How long a collective waits. Ranks that hang are the watchdog's business; one that builds an index is not."""


def join(ranks: Ranks, device: torch.device) -> bool:
    """Meet the other ranks; whether they had not met before. On CUDA, tensors on the device go through NCCL and small
    ones on the host through gloo."""
    import torch.distributed as dist

    if not ranks.several or dist.is_initialized():
        return False
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(ranks.local_rank if device.index is None else device.index)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        remedy = "look at MASTER_ADDR and MASTER_PORT; a port that is in use needs another"
        raise RunError("RANKS", f"rank {ranks.rank} does not meet the others: {error}", remedy=remedy) from None
    return True


def leave() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def device_mesh(device: torch.device, shape: Sequence[int], names: Sequence[str]) -> Any:
    """The ranks as a grid, row by row."""
    from torch.distributed.device_mesh import init_device_mesh

    return cast(Any, init_device_mesh)(device.type, tuple(shape), mesh_dim_names=tuple(names))
