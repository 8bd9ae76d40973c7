"""DeepSpeed's ZeRO-1, -2 and -3 as an engine: the model in DeepSpeed's wrapper, torch's AdamW on this rank's share.

DeepSpeed averages gradients over ranks and counts micro-batches by itself; both are cancelled in `backward`, so that
gradients are sums, as with the other engines. Clipping, loss scale and schedule stay with the step.

Every rank calls the wrapped module equally often in a step. With ZeRO-3 every rank also reaches the same modules in the
same order: parameters are gathered, and fetched ahead, as modules are reached.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of torch leave parts of these types open; DeepSpeed has none)

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import nn

from lensmith.core.errors import ConfigError, RunError
from lensmith.parallel.ranks import Ranks
from lensmith.parallel.shares import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")

Named = Sequence[tuple[str, Any]]
"""(name, parameter); DeepSpeed puts attributes of its own on parameters."""

Read = Callable[[str, int, int], "torch.Tensor | None"]


class Group(Protocol):
    """Parameters of equal part, rate and decay (lensmith/engine/optimizer.py)."""

    part: str
    lr: float
    weight_decay: float
    names: list[str]
    rate: float


def check_installed() -> None:
    """Raises `ConfigError` ENGINE without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("ENGINE", "parallel.engine is deepspeed, and the package is not installed",
                          remedy="DS_BUILD_OPS=0 pip install 'lensmith[deepspeed]'")  # fmt: skip


def load_deepspeed(device: torch.device) -> Any:
    """The package, told which device it is for (left alone it takes a GPU wherever it sees one), and silent but for
    errors. Raises `ConfigError` ENGINE where it has been loaded for another device before."""
    check_installed()
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("error")
    # torch 2.13 has new names for two collectives; DeepSpeed 0.19 uses the old ones
    warnings.filterwarnings("ignore", r".*torch\.distributed\.(all_gather_into|reduce_scatter)_tensor", FutureWarning)
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    found = accelerator.device_name()
    if found != device.type:
        raise ConfigError("ENGINE", f"train.device is {device.type}, and DeepSpeed was loaded for {found}",
                          remedy=f"export DS_ACCELERATOR={device.type}")  # fmt: skip
    return deepspeed


def _meet_alone(ranks: Ranks, device: torch.device) -> None:
    """DeepSpeed wants a process group of one rank too, and to be told the number of its device."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or ranks.local_rank))
    if not ranks.several and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        alone = cast(Any, dist).HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)


class _AdamW(torch.optim.AdamW):
    """Leaves alone the groups that are `idle`: DeepSpeed gives zeros to parameters that no row used, and AdamW would
    go on moving them by their moments and decay."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("idle")]
        super().step(closure)
        self.param_groups = every


class ZeroAdamW:
    """What the training loop asks of an optimizer (lensmith/engine/optimizer.py), over DeepSpeed; `engine` is what is
    called with a batch.

    Every parameter is flattened and every rank has one stretch of it, or none; gradients, parameters and moments are
    the tensors that DeepSpeed works on.
    """

    def __init__(
        self,
        root: nn.Module,
        named: Named,
        groups: Sequence[Group],
        settings: Mapping[str, Any],
        ranks: Ranks,
        device: torch.device,
        *,
        betas: tuple[float, float],
        eps: float,
        masters: Mapping[str, torch.Tensor] | None = None,
    ):
        """`settings`: DeepSpeed's configuration, as `zero_config.settings` makes it. `masters`: of parameters that are
        in half precision already, float32 values from before they were rounded. Ranks have met before."""
        deepspeed = load_deepspeed(device)
        _meet_alone(ranks, device)
        self.named, self.groups, self.ranks = list(named), list(groups), ranks
        self._by_name = dict(self.named)
        self._shapes = {n: tuple(p.shape) for n, p in self.named}
        self.torch = _AdamW(
            [
                {"params": [self._by_name[n] for n in g.names], "lr": g.lr, "weight_decay": g.weight_decay}
                for g in groups
            ],
            betas=betas, eps=eps, fused=True,
        )  # fmt: skip
        self._used: set[int] = set()
        """Groups that have had a gradient in this step; the same on every rank."""
        for index, group in enumerate(groups):
            for name in group.names:
                self._by_name[name].register_post_accumulate_grad_hook(lambda _, index=index: self._used.add(index))
        with redirect_stdout(io.StringIO()):  # it prints what it compiles
            self.engine: Any = deepspeed.initialize(
                model=root, optimizer=self.torch, config=dict(settings), dist_init_required=False
            )[0]
        shares = _Stage3 if settings["zero_optimization"]["stage"] == 3 else _Stage12
        self._dirty = False
        self._shares: _Stage3 | _Stage12 = shares(self.engine, self.torch, self.named, ranks)
        if masters:
            self._load_masters(masters)

    # -- gradients -----------------------------------------------------------------------------------------------------

    @property
    def copies(self) -> int:
        """How many ranks hold each share."""
        return 1

    def is_sharded(self, name: str) -> bool:
        """Whether this rank has only a share of the gradient: its squares are summed over ranks."""
        return True

    def settle(self) -> None:
        """Parameters have their types since the wrapper was made."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch. `last`: of the step. ZeRO-2 and -3 exchange gradients in every one."""
        self._dirty = True
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)

    def reduce(self) -> None:
        """Gradients are exchanged as they arrive."""

    def gradients(self) -> list[tuple[str, torch.Tensor]]:
        """(name, this rank's stretch of the gradient), behind the last `backward` of a step."""
        used = {name for index in self._used for name in self.groups[index].names}
        return [(n, g) for n, p in self.named if n in used and (g := self._shares.gradient(p)) is not None]

    def scale_gradients(self, factor: float) -> None:
        for _, p in self.named:
            self._shares.scale_gradient(p, factor)

    def parameters(self) -> list[torch.Tensor]:
        return [p for _, p in self.named]

    def zero_grad(self) -> None:
        """Nothing of the gradients remains, whether they were applied or not, and whatever was in them."""
        self.engine.optimizer.zero_grad()
        if self._dirty:
            self._shares.clear()
        self._dirty = False
        self._used.clear()

    # -- update --------------------------------------------------------------------------------------------------------

    def step(self, factor: float) -> None:
        """One update at `factor` of each group's peak rate. Raises `RunError` ENGINE where DeepSpeed left it out by
        itself: the loop has looked at the gradient and found it finite."""
        for index, (group, own) in enumerate(zip(self.torch.param_groups, self.groups, strict=True)):
            group["lr"], group["idle"] = own.lr * factor, index not in self._used
            own.rate = own.lr * factor
        self.engine.step()
        if self.engine.skipped_steps:
            raise RunError("ENGINE", "DeepSpeed left out an update whose gradient is finite",
                           remedy="resume from the last checkpoint; report this")  # fmt: skip

    def rates(self) -> dict[str, float]:
        """Learning rate of the last update per part."""
        return {own.part: own.rate for own in self.groups}

    # -- training state ------------------------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the whole parameter."""
        return dict(self._shapes)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's stretches of the training state: `param/NAME` in float32 and its moments."""
        yield from ((piece.key, piece.values) for piece in self.pieces())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of `items` at once."""
        return dict(self.items())

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of the training state: over all ranks every element once."""
        for name, p in self.named:
            start, size = self._shares.stretch(p)
            if not size:
                continue
            yield Piece(f"param/{name}", self._shares.value(p), start, self._shapes[name])
            if not (state := self._shares.state(p)):
                continue
            for key in MOMENTS:
                yield Piece(f"{key}/{name}", self._shares.moment(p, key), start, self._shapes[name])
            if start == 0:
                yield Piece(f"step/{name}", state["step"].clone(), 0, ())

    def moments(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of a parameter's moments the name and the shape of the whole."""
        return {"step": (), **dict.fromkeys(MOMENTS, self._shapes[name])}

    def begin_without(self, has: Callable[[str], bool]) -> None:
        """Begin anew the moments that `has` does not know."""
        with torch.no_grad():
            for key, value in self.items():
                if not has(key):
                    value.zero_()

    def give_back(self) -> None:
        """Parameters that an examination left gathered are shares again."""
        self._shares.prepare()

    def load_pieces(self, read: Read) -> None:
        """Take up a training state. `read(key, start, stop)`: those elements of a flattened tensor, or None where the
        state has none. Names and shapes were checked by the caller. All ranks together.

        Raises `RunError` ENGINE where parameters of one group have been updated a different number of times: DeepSpeed
        counts the updates of a group, not of a parameter.
        """
        self.give_back()
        for index, group in enumerate(self.groups):
            steps = {n: None if (s := read(f"step/{n}", 0, 1)) is None else float(s) for n in group.names}
            if len(set(steps.values())) > 1:
                one, other = group.names[0], next(n for n in group.names if steps[n] != steps[group.names[0]])
                raise RunError(
                    "ENGINE",
                    f"{one} has had {steps[one] or 0:.0f} updates and {other} {steps[other] or 0:.0f}; "
                    "DeepSpeed counts those of a whole group",
                    remedy="use parallel.engine local or fsdp2, or begin without the moments of the stage before",
                )
            self._shares.begin_moments(index, steps[group.names[0]])
        for name, p in self.named:
            start, size = self._shares.stretch(p)
            for key in ("param", *MOMENTS) if size else ():
                if (values := read(f"{key}/{name}", start, start + size)) is not None:
                    self._shares.put(p, None if key == "param" else key, values)
        self._shares.settle()

    def _load_masters(self, masters: Mapping[str, torch.Tensor]) -> None:
        def read(key: str, start: int, stop: int) -> torch.Tensor | None:
            kind, _, name = key.partition("/")
            return masters[name].flatten()[start:stop] if kind == "param" and name in masters else None

        self.load_pieces(read)

    def whole(self, p: nn.Parameter) -> torch.Tensor:
        """All of a parameter, frozen or not, as the model computes with it: a copy. All ranks together, for the same
        parameters in the same order: ZeRO-3 gathers it from them, one at a time, so the model is never whole."""
        with self._shares.whole(p):
            return p.detach().clone()

    def full_tensors(self, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, `whole` on the CPU) of each."""
        yield from ((name, self.whole(p).to("cpu")) for name, p in named)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.engine.destroy()


class _Stage12:
    """ZeRO-1 and -2. DeepSpeed's by-name functions for these (`safe_get_full_fp32_param` and its like) put whole
    tensors together, with an all-reduce for each. What they read a rank's own stretch from is `_hp_mapping`: a
    `deepspeed.utils.tensor_fragment` with the address in the flattened parameter, and that in the flat tensor of its
    optimizer group, which is the one parameter that the group has in our AdamW."""

    def __init__(self, engine: Any, adam: torch.optim.AdamW, named: Named, ranks: Ranks):
        self.engine, self.adam, self.named = engine, adam, named
        self.offloads = bool(engine.zero_cpu_offload())

    def stretch(self, p: Any) -> tuple[int, int]:
        """(first element of this rank in the flattened parameter, how many)."""
        if p._hp_mapping is None:
            return 0, 0
        address = p._hp_mapping.lp_fragment_address
        return address.start, address.numel

    def gradient(self, p: Any) -> torch.Tensor | None:
        """ZeRO-1 in half precision keeps whole gradients on every rank; else there is only the rank's part."""
        m = p._hp_mapping
        if m is None:
            return None
        held = m.offload_gradient_dict if m.use_offload else m.gradient_dict
        if held.get(m.param_group_index) is None:
            return None
        start, size = self.stretch(p)
        found = m.get_lp_grad_fragment(p._index_in_param_group).view(-1)
        return found if found.numel() == size else found.narrow(0, start, size)

    def scale_gradient(self, p: Any, factor: float) -> None:
        if (gradient := self.gradient(p)) is not None:
            gradient.mul_(factor)

    def clear(self) -> None:
        """What is added up in float32 beside half-precision parameters, or in host memory, DeepSpeed empties behind an
        update; behind a step that was left out it would be added to the next one's. Zeroed, not scaled: 0 * NaN."""
        optimizer = self.engine.optimizer
        for _, p in self.named:
            if (m := p._hp_mapping) is not None:
                for held in (m.gradient_dict, m.offload_gradient_dict or {}):
                    for gradient in held.get(m.param_group_index) or ():
                        gradient.zero_()
        for gradient in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
            gradient.zero_()
        if self.offloads:
            optimizer.reset_cpu_buffers()

    def value(self, p: Any) -> torch.Tensor:
        return p._hp_mapping.hp_fragment.detach()

    def state(self, p: Any) -> dict[str, torch.Tensor]:
        return self.adam.state.get(self._flat(p._hp_mapping.param_group_index), {})

    def moment(self, p: Any, key: str) -> torch.Tensor:
        address = p._hp_mapping.hp_fragment_address
        return self.state(p)[key].narrow(0, address.start, address.numel)

    def _flat(self, group: int) -> torch.Tensor:
        return self.adam.param_groups[group]["params"][0]

    def prepare(self) -> None:
        """Before values are put."""

    def begin_moments(self, group: int, step: float | None) -> None:
        """Zero moments of a group that has had `step` updates; None: as before its first."""
        _begin(self.adam, self._flat(group), step)

    def put(self, p: Any, key: str | None, values: torch.Tensor) -> None:
        """This rank's stretch of a parameter's float32 value, or of a moment."""
        (self.value(p) if key is None else self.moment(p, key)).copy_(values)

    def settle(self) -> None:
        """The parameters that the model computes with, from the float32 values of all ranks."""
        self.engine.optimizer.update_lp_params()

    def whole(self, p: nn.Parameter) -> AbstractContextManager[Any]:
        return nullcontext(p)


class _Stage3:
    """ZeRO-3, through DeepSpeed's by-name functions for a rank's own part. That part is padded to the same length on
    every rank; here only what is in the parameter counts."""

    def __init__(self, engine: Any, adam: torch.optim.AdamW, named: Named, ranks: Ranks):
        import deepspeed

        self.engine, self.adam, self.named, self.ranks = engine, adam, named, ranks
        self.api, self.zero = deepspeed.utils, deepspeed.zero

    def stretch(self, p: Any) -> tuple[int, int]:
        start = min(self.ranks.rank * p.ds_tensor.numel(), p.ds_numel)
        return start, min(p.ds_tensor.numel(), p.ds_numel - start)

    def gradient(self, p: Any) -> torch.Tensor | None:
        size = self.stretch(p)[1]
        return self.api.safe_get_local_grad(p).narrow(0, 0, size) if size else None

    def scale_gradient(self, p: Any, factor: float) -> None:
        self.api.safe_set_local_grad(p, self.api.safe_get_local_grad(p) * factor)

    def clear(self) -> None:
        """A parameter that has no gradient in a step would be updated with what it had in the one before."""
        for _, p in self.named:
            self.api.safe_set_local_grad(p, torch.zeros_like(self.api.safe_get_local_grad(p)))

    def value(self, p: Any) -> torch.Tensor:
        return self.api.safe_get_local_fp32_param(p).detach().narrow(0, 0, self.stretch(p)[1])

    def state(self, p: Any) -> dict[str, torch.Tensor]:
        zero = self.engine.optimizer
        return self.adam.state.get(zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(p)][0]], {})

    def moment(self, p: Any, key: str) -> torch.Tensor:
        return self.api.safe_get_local_optimizer_state(p, key).narrow(0, 0, self.stretch(p)[1])

    def prepare(self) -> None:
        """Parameters that were left gathered would hide what is put into their parts."""
        self.engine.empty_partition_cache()

    def begin_moments(self, group: int, step: float | None) -> None:
        zero = self.engine.optimizer
        for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if zero.sub_group_to_group_id[sub_group] == group:
                _begin(self.adam, flat, step)

    def put(self, p: Any, key: str | None, values: torch.Tensor) -> None:
        padded = torch.zeros(p.ds_tensor.numel(), device=values.device)
        padded[: values.numel()] = values
        if key is not None:
            self.api.safe_set_local_optimizer_state(p, padded, key)
            return
        self.api.safe_set_local_fp32_param(p, padded)
        p.ds_tensor.detach().copy_(padded)

    def settle(self) -> None:
        """Parts are gathered when the model next needs them."""

    def whole(self, p: nn.Parameter) -> AbstractContextManager[Any]:
        return self.zero.GatheredParameters([p])


def _begin(adam: torch.optim.AdamW, flat: torch.Tensor, step: float | None) -> None:
    if step is None:
        adam.state.pop(flat, None)
    else:
        count = torch.tensor(step, dtype=torch.float32, device=flat.device)  # fused AdamW wants it beside the parameter
        adam.state[flat] = {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}
