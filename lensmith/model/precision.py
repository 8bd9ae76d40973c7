"""The precision contract: for each part of the model, in which type things are kept, computed, updated and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from lensmith.core.errors import ConfigError, ModelError
from lensmith.model.options import PartPrecision, Precision, PrecisionPart
from lensmith.model.parts import is_adapter, outermost

Update = Literal["plain", "masters", "compensated", "stochastic"]
"""How parameters take an update: in their own float32; through a float32 copy; with the rounding error kept beside them
(Kahan, CACM 8 (1965) 40); or rounded up or down at random so that the mean is right (arXiv 2010.06192)."""
PRECISION_PARTS: tuple[PrecisionPart, ...] = get_args(PrecisionPart)
HALF, FULL, FP16 = torch.bfloat16, torch.float32, torch.float16


@dataclass(frozen=True)
class PartPlan:
    """Types of one part. `trained` and `frozen`: of its parameters that train and that do not."""

    trained: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype
    """Of matrix products; sums in norms, softmax and loss are float32 in every case."""
    gradients: torch.dtype
    """In which gradients are added up over micro-batches and ranks."""
    optimizer: torch.dtype
    """Of the optimizer's moments."""
    saved: torch.dtype
    update: Update


@dataclass(frozen=True)
class PrecisionPlan:
    """The types of every part; `loss_scale`: the loss is scaled up before the backward pass, against underflow."""

    preset: str
    parts: Mapping[str, PartPlan]
    loss_scale: bool = False

    def of(self, part: str) -> PartPlan:
        return self.parts[part]

    @property
    def compute(self) -> torch.dtype:
        """Of the model as a whole; parts that differ switch at their borders."""
        return self.parts["language"].compute

    def table(self) -> dict[str, dict[str, str]]:
        """Part -> role -> type, as text."""
        return {
            part: {k: v if isinstance(v, str) else text(v) for k, v in vars(plan).items()}
            for part, plan in self.parts.items()
        }


@dataclass(frozen=True)
class _Preset:
    trained: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype
    update: Update = "plain"


PRESETS: dict[str, _Preset] = {
    "fp32": _Preset(FULL, FULL, FULL),
    "bf16": _Preset(FULL, HALF, HALF),
    "bf16-params": _Preset(HALF, HALF, HALF, "masters"),
    "bf16-params-compensated": _Preset(HALF, HALF, HALF, "compensated"),
    "bf16-params-stochastic": _Preset(HALF, HALF, HALF, "stochastic"),
    "fp16": _Preset(FULL, FP16, FP16),
}


def text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named(name: str) -> torch.dtype:
    return getattr(torch, name)


def plan(options: Precision, device: torch.device, base: torch.dtype) -> PrecisionPlan:
    """The plan of a run file's options. Full weights are saved in the type the base has on disk, adapters in float32.

    Raises `ConfigError` PRECISION for what device or engine cannot do, and for types that contradict one another.
    """
    name = options.preset
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    preset = PRESETS[name]
    if HALF in (preset.frozen, preset.compute) and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "PRECISION", f"precision.preset {name!r}: this GPU has no bfloat16", remedy="use fp32 or fp16"
        )
    parts: dict[str, PartPlan] = {}
    for part in PRECISION_PARTS:
        adapter = part == "adapter"
        plain = PartPlan(
            FULL if adapter else preset.trained, FULL if adapter else preset.frozen, preset.compute, FULL, FULL,
            FULL if adapter else base, "plain" if adapter else preset.update,
        )  # fmt: skip
        parts[part] = _with(plain, preset, part, options.parts.get(part) or PartPrecision())
    scaled = any(own.compute == FP16 for part, own in parts.items() if part != "adapter")
    return PrecisionPlan(name, parts, scaled)


def _with(plan: PartPlan, preset: _Preset, part: str, own: PartPrecision) -> PartPlan:
    """A part's plan with what the run file says of it."""
    key = f"precision.parts.{part}"
    if own.parameters is not None:
        dtype = named(own.parameters)
        update = "plain" if dtype == FULL else preset.update if preset.update != "plain" else "masters"
        plan = replace(plan, trained=dtype, frozen=dtype, update=update)
    given = {role: named(v) for role in ("compute", "gradients", "optimizer", "saved") if (v := getattr(own, role))}
    if part == "adapter" and "compute" in given:
        raise ConfigError("PRECISION", f"{key}.compute: an adapter computes in the type of the part that it is in",
                          remedy="set compute of that part")  # fmt: skip
    plan = replace(plan, **given)
    if plan.compute == FULL and part != "adapter" and (plan.frozen != FULL or plan.trained != FULL):
        raise ConfigError("PRECISION", f"{key}: float32 compute over {text(plan.frozen)} parameters",
                          remedy=f"set {key}.parameters: float32 too")  # fmt: skip
    if {plan.trained, plan.frozen, plan.compute} >= {HALF, FP16}:
        raise ConfigError("PRECISION", f"{key}: bfloat16 and float16 in one part",
                          remedy="keep one of them (docs/numerics.md)")  # fmt: skip
    if plan.trained == FP16 and plan.update != "masters":
        raise ConfigError("PRECISION", f"{key}: float16 parameters need float32 masters", remedy="use bfloat16")
    if plan.gradients == FP16 or plan.optimizer == FP16:
        raise ConfigError("PRECISION", f"{key}: gradients and moments in float16 would over- and underflow",
                          remedy="use float32 or bfloat16")  # fmt: skip
    if plan.trained == FULL and plan.gradients != FULL:
        raise ConfigError("PRECISION", f"{key}: {text(plan.gradients)} gradients of float32 parameters",
                          remedy=f"leave {key}.gradients out, or set parameters: bfloat16")  # fmt: skip
    return plan


def part_in(part_of: Callable[[str], str], name: str) -> str:
    """The part whose types a parameter has: adapters are a part of their own, wherever they are."""
    return "adapter" if is_adapter(name) else part_of(name)


def cast(model: nn.Module, plan: PrecisionPlan, part_of: Callable[[str], str], *, trained: bool | None = None) -> None:
    """Put parameters into their types, in place; tied tensors stay one, buffers (rotary tables) stay as they are.

    `trained` True or False: only those that train, or do not.
    """
    for name, p in model.named_parameters():
        if p.is_floating_point() and trained in (None, p.requires_grad):
            own = plan.of(part_in(part_of, name))
            p.data = p.data.to(own.trained if p.requires_grad else own.frozen)


def verify(model: nn.Module, plan: PrecisionPlan, part_of: Callable[[str], str]) -> None:
    """Every floating-point parameter has its type. Raises `ModelError` PRECISION, naming the first that has not."""
    for name, p in model.named_parameters():
        part = part_in(part_of, name)
        want = plan.of(part).trained if p.requires_grad else plan.of(part).frozen
        if p.is_floating_point() and p.dtype != want:
            found, key = text(p.dtype), f"precision.parts.{part}.parameters"
            raise ModelError("PRECISION", f"{name} is {found}; part {part} was promised in {text(want)}",
                             remedy=f"set {key}: {found}, or report this")  # fmt: skip


class PartCompute:
    """Makes parts compute in their own type where it is not that of the whole.

    `attach` puts hooks on all modules of such a part: a family may call any of them. A part in float32 leaves autocast,
    and what comes in is widened; one in half precision enters autocast of its type. Beside a float32 part, parts with
    half-precision parameters have what comes in rounded to their type: autocast leaves norms alone, and they refuse
    float32 beside half-precision weights on a CPU.
    """

    def __init__(self, plan: PrecisionPlan, device: torch.device):
        self.plan, self.device = plan, device
        self._open: list[torch.autocast] = []

    def attach(self, model: nn.Module, part_of: Callable[[str], str]) -> None:
        other = {p for p, own in self.plan.parts.items() if p != "adapter" and own.compute != self.plan.compute}
        widened = any(self.plan.of(part).compute == FULL for part in other)
        for name, part in outermost(model, part_of) if other else ():
            compute, modules = self.plan.of(part).compute, model.get_submodule(name).modules()
            for module in modules if part in other else ():
                module.register_forward_pre_hook(self._entering(compute), with_kwargs=True)
                module.register_forward_hook(self._left, always_call=True)
            for module in modules if part not in other and widened else ():
                types = {p.dtype for p in module.parameters(recurse=False)}
                if len(types) == 1 and types < {HALF, FP16}:
                    module.register_forward_pre_hook(_narrowing(types.pop()))

    def _entering(self, compute: torch.dtype) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            full = compute == FULL
            context = torch.autocast(self.device.type, dtype=HALF if full else compute, enabled=not full)
            context.__enter__()
            self._open.append(context)
            return (_widened(args), _widened(kwargs)) if full else None

        return enter

    def _left(self, module: nn.Module, args: Any, out: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def _narrowing(dtype: torch.dtype) -> Any:
    """Rounds the first argument, the hidden states; tables of positions stay as they are."""

    def enter(module: nn.Module, args: Any) -> Any:
        if args and torch.is_tensor(args[0]) and args[0].dtype == FULL:
            return (args[0].to(dtype), *args[1:])
        return None

    return enter


def _widened(value: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.float() if torch.is_tensor(x) and x.is_floating_point() else x, value)
