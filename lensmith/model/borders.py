"""The precision contract where parts meet: one tiny forward and backward pass before the first step.

Types that do not fit are otherwise found by torch, as `mat1 and mat2 must have the same dtype, but got Float and
BFloat16` out of the middle of a model. Here the same error names the module, the tensor that differs and the line of
the run file. And what does not fail but computes in another type than promised is found too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lensmith.core.errors import ModelError
from lensmith.model.precision import FULL, PrecisionPlan, is_adapter, part_in, text

MISMATCH = re.compile(
    r"same dtype|mixed dtype|expect\w* .*scalar type|expected .*dtype|dtypes? .*(differ|mismatch|to match)", re.I
)
Where = Callable[[str, str], str]
"""(part, role) -> the place in the run file: `run.yaml:12 precision.parts.vision.compute`."""


@dataclass
class _Watch:
    """Which modules are running, what came into them, and in which type matrix products came out."""

    part_of: Callable[[str], str]
    stack: list[str] = field(default_factory=list[str])
    inputs: dict[str, list[torch.dtype]] = field(default_factory=dict[str, list[torch.dtype]])
    computed: dict[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])

    def attach(self, model: nn.Module) -> list[Any]:
        handles: list[Any] = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name)))
        return handles

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            self.inputs[name] = [x.dtype for x in _floats((args, kwargs))]

        return enter

    def _leave(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.stack.pop()  # not reached when the module fails: the stack then says where
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and torch.is_tensor(out):
                self.computed[name] = out.dtype

        return leave


def check(root: Any, row: Any, plan: PrecisionPlan, where: Where) -> None:
    """Run `row` through `root` (lensmith/model/root.py) forward and backward; gradients are taken away again.

    Raises `ModelError` DTYPE with the module, both types and the line of the run file to change.
    """
    part_of = root.family.part_of
    watch = _Watch(part_of)
    handles = watch.attach(root.model)
    cache, root.cache = root.cache, None
    try:
        loss, _ = root(row)["loss"]
        if loss.requires_grad:
            loss.backward()
        _computed_as_promised(watch, plan, part_of, where)
        _gradients_as_promised(root.model, plan, part_of, where)
    except RuntimeError as error:
        if not MISMATCH.search(str(error)) or not watch.stack:
            raise
        raise _explained(root.model, watch, plan, str(error), where) from error
    finally:
        root.cache = cache
        for handle in handles:
            handle.remove()
        for p in root.parameters():
            p.grad = None


def _explained(model: nn.Module, watch: _Watch, plan: PrecisionPlan, said: str, where: Where) -> ModelError:
    """The innermost running module, and the nearest tensor around it whose type is not that of its part."""
    name = watch.stack[-1]
    part = _part_of_module(model, watch.part_of, name)
    want = _types_of(model, name) or {plan.of(part).frozen}
    came = sorted({text(d) for d in watch.inputs.get(name, ())})
    odd = next(_odd_tensors(model, watch.stack, want), None)
    what = f"{name} ({type(model.get_submodule(name)).__name__}) has {' and '.join(sorted(map(text, want)))} parameters"
    message = f"{what} and is given {' and '.join(came) or 'nothing'}; torch says: {said.splitlines()[0]}"
    keys = f"precision.parts.{part}"
    if odd is None:
        remedy = (
            f"set {keys}.parameters and .compute to the type that part {part} is given, or change the part before it"
        )
        return ModelError("DTYPE", message, where=where(part, "compute"), remedy=remedy)
    kind, tensor, dtype = odd
    remedy = f"cast {tensor} to the type of its input where the model uses it, or set {keys}.parameters: {text(dtype)}"
    return ModelError(
        "DTYPE",
        f"{message}\n  {kind} {tensor} is {text(dtype)}",
        where=where(part, "parameters"),
        remedy=f"{remedy} and .compute: {text(dtype)}",
    )


def _odd_tensors(model: nn.Module, stack: list[str], want: set[torch.dtype]) -> Iterator[tuple[str, str, torch.dtype]]:
    """Tensors of the running modules, from the inside out, whose type is another: parameters, buffers, and tensors that
    are plain attributes, which nothing ever casts."""
    for name in reversed(stack):
        module = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        plain = {k: v for k, v in vars(module).items() if torch.is_tensor(v)}
        groups = (
            ("buffer", dict(module.named_buffers(recurse=False))),
            ("tensor", plain),
            ("parameter", dict(module.named_parameters(recurse=False))),
        )
        for kind, tensors in groups:
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and tensor.dtype not in want:
                    yield kind, prefix + key, tensor.dtype


def _types_of(model: nn.Module, name: str) -> set[torch.dtype]:
    return {p.dtype for p in model.get_submodule(name).parameters() if p.is_floating_point()}


def _part_of_module(model: nn.Module, part_of: Callable[[str], str], name: str) -> str:
    inside = next((n for n, _ in model.get_submodule(name).named_parameters()), "")
    return part_of(f"{name}.{inside}" if inside else f"{name}.weight")


def _computed_as_promised(watch: _Watch, plan: PrecisionPlan, part_of: Callable[[str], str], where: Where) -> None:
    for name, dtype in watch.computed.items():
        if is_adapter(f"{name}."):
            continue
        part = part_of(f"{name}.weight")
        if dtype != plan.of(part).compute:
            raise ModelError("DTYPE", f"{name} computes in {text(dtype)}; part {part} was promised "
                             f"{text(plan.of(part).compute)}", where=where(part, "compute"),
                             remedy=f"set precision.parts.{part}.compute: {text(dtype)}, or report this")  # fmt: skip


def _gradients_as_promised(model: nn.Module, plan: PrecisionPlan, part_of: Callable[[str], str], where: Where) -> None:
    for name, p in model.named_parameters():
        part = part_in(part_of, name)
        if p.grad is not None and p.grad.dtype not in (plan.of(part).gradients, FULL):
            raise ModelError("DTYPE", f"the gradient of {name} is {text(p.grad.dtype)}; part {part} was promised "
                             f"{text(plan.of(part).gradients)}", where=where(part, "gradients"),
                             remedy=f"set precision.parts.{part}.gradients: {text(p.grad.dtype)}")  # fmt: skip


def _floats(value: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [x for x in tree_leaves(value) if torch.is_tensor(x) and x.is_floating_point()]
