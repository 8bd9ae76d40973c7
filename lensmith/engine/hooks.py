"""Hooks that name the module where a number stops being finite. Only a step that is computed again runs under them."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True)
class Seen:
    """A module that gave something that is not finite. `bad_input`: it was given such; `bad_parameters`: its own."""

    module: str
    type: str
    bad_input: bool = False
    bad_parameters: tuple[str, ...] = ()
    largest_input: float | None = None
    """Largest finite magnitude among its inputs."""
    input_dtype: str | None = None
    output_dtype: str | None = None


@dataclass
class Trace:
    """A forward pass: the modules whose outputs were not finite, in the order in which they ended (children before
    parents), and the largest finite magnitude that each module gave."""

    seen: list[Seen] = field(default_factory=list[Seen])
    largest: dict[str, float] = field(default_factory=dict[str, float])


def modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of all of a model, itself included."""
    return list(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))


def extremes(tensor: torch.Tensor) -> torch.Tensor:
    """[2]: smallest and largest value, float32; both NaN where one value is. Of 2 million values on a CPU it takes a
    tenth of the time of the infinity norm, and a fifteenth of `isfinite().all()`."""
    return torch.stack(torch.aminmax(tensor.detach())).float()


def is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or bool(torch.isfinite(extremes(tensor)).all())


@contextmanager
def forward_hooks(model: nn.Module) -> Generator[Trace]:
    """Recomputation in the backward pass is not looked at, if the caller leaves this before."""
    trace = Trace()

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs = list(_floats(output))
            bad = next((t for t in outputs if not is_finite(t)), None)
            if bad is not None:
                trace.seen.append(_seen(name, module, [args, _without_masks(kwargs)], bad))
            largest, _ = _largest(outputs)
            if largest is not None:
                trace.largest[name] = max(largest, trace.largest.get(name, 0.0))

        return hook

    with _hooked([m.register_forward_hook(hook_of(n), with_kwargs=True) for n, m in modules(model)]):
        yield trace


@contextmanager
def backward_hooks(model: nn.Module) -> Generator[list[Seen]]:
    """The modules that got a finite gradient of their output and gave one of their input that is not."""
    seen: list[Seen] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, of_input: Any, of_output: Any) -> None:
            outputs = list(_floats(of_output))
            bad = next((t for t in _floats(of_input) if not is_finite(t)), None)
            if bad is not None and all(map(is_finite, outputs)):
                largest, dtype = _largest(outputs)
                seen.append(Seen(name, type(module).__name__, False, (), largest, dtype, str(bad.dtype)))

        return hook

    with warnings.catch_warnings():
        # torch says of modules without a gradient of their input, and of those that give an object, what hooks miss
        warnings.filterwarnings("ignore", "Full backward hook is firing|For backward hooks to be called")
        with _hooked([m.register_full_backward_hook(hook_of(n)) for n, m in modules(model)]):
            yield seen


@contextmanager
def _hooked(handles: list[Any]) -> Generator[None]:
    """Compiled blocks run eagerly meanwhile: hooks inside them would not be called."""
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _seen(name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> Seen:
    given = list(_floats(inputs))
    largest, dtype = _largest(given)
    own = tuple(n for n, p in module.named_parameters(recurse=False) if not is_finite(p))
    bad_input = not all(map(is_finite, given))
    return Seen(name, type(module).__name__, bad_input, own, largest, dtype, str(output.dtype))


def _largest(tensors: list[torch.Tensor]) -> tuple[float | None, str | None]:
    found: tuple[float | None, str | None] = None, None
    for tensor in tensors:
        value = float(torch.nan_to_num(tensor.detach().abs(), 0.0, 0.0, 0.0).max())
        if found[0] is None or value > found[0]:
            found = value, str(tensor.dtype)
    return found


def _without_masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Additive masks are full of infinities."""
    return {name: value for name, value in kwargs.items() if "mask" not in name}


def _floats(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of nested containers; tensors without elements are left out."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            yield from _floats(item)
