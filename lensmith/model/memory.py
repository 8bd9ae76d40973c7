"""Memory that code would need, counted by running it on tensors without values.

Fake tensors of torch have shapes, types, devices and storages of a size, but no memory. A ledger sees each storage when
it is made and when the last tensor on it is gone. So what is kept for the backward pass, what autocast copies, what
recomputing frees and what an update needs for a moment are counted as they happen, for every family and device, and no
formula has to follow the code (docs/memory.md).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lensmith.model.tune import is_adapter

Kind = Literal["weights", "masters", "casts", "gradients", "optimizer", "activations", "logits", "copies"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What code raises that cannot run without values."""


def without_values() -> FakeTensorMode:
    """Tensors made within are fake. Outside, what is computed with a fake tensor is fake, and the rest is real: the
    indices of a row, which decide shapes, keep their values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Ledger(TorchDispatchMode):
    """Bytes of the storages on `device` that live, by kind; `peak`: those at the moment of the largest sum.

    A storage is of the kind in force when it is made (`making`). Among activations, `logits` have the vocabulary along
    their last axis, and `casts` are copies of parameters in another type. Code that asks for a single value is told yes
    (is it finite?) or 1.0 (a norm): sizes do not depend on those. Of a whole number they may, and there it ends.
    """

    def __init__(self, device: torch.device, fake: FakeTensorMode, kept_below: int = 0):
        """`kept_below`: storages of fewer bytes stay with the process when they are freed, for later ones."""
        super().__init__()
        self.device, self.fake, self.kept_below = device, fake, kept_below
        self.vocabulary = -1
        self.live: Counter[Kind] = Counter()
        self.peak: Counter[Kind] = Counter()
        self.resident = 0
        """The largest sum with what was freed and stays."""
        self._sum = self._most = self._small = self._heap = 0
        self._kind: Kind = "weights"
        self._of: dict[weakref.ref[Any], tuple[Kind, int]] = {}
        self._parameters: set[weakref.ref[Any]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = args[0] if func is torch.ops.aten._local_scalar_dense.default else None
        if isinstance(asked, FakeTensor) and (asked.dtype == torch.bool or asked.is_floating_point()):
            return asked.dtype == torch.bool or 1.0
        if func.namespace == "aten" and func.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
            args = (args[0], _places(args[1]), *args[2:])
        with self.fake if func.__name__.startswith("rand") else nullcontext():  # noise of an update: of nothing fake
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device.type:
                self._enter(tensor, func, args)
        return out

    def _enter(self, tensor: torch.Tensor, func: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        ref = weakref.ref(storage, self._gone)
        if ref not in self._of:
            self._of[ref] = self._kind_of(tensor, func, args), storage.nbytes()
            self._add(*self._of[ref])

    def _kind_of(self, tensor: torch.Tensor, func: Any, args: Any) -> Kind:
        if self._kind != "activations" or not tensor.is_floating_point():
            return self._kind
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
            return "logits"
        of_parameter = func is torch.ops.aten._to_copy.default and _ref(args[0]) in self._parameters
        return "casts" if of_parameter else "activations"

    def _gone(self, ref: weakref.ref[Any]) -> None:
        kind, size = self._of.pop(ref)
        self._add(kind, -size)

    def _add(self, kind: Kind, size: int) -> None:
        self.live[kind] += size
        self._sum += size
        if abs(size) < self.kept_below:
            self._small += size
            self._heap = max(self._heap, self._small)
        self.resident = max(self.resident, self._sum - self._small + self._heap)
        if self._sum > self._most:
            self._most, self.peak = self._sum, self.live.copy()

    def name(self, tensors: Iterable[torch.Tensor], kind: Kind) -> None:
        """Say of which kind these tensors are."""
        for ref in map(_ref, tensors):
            if ref in self._of:
                old, size = self._of[ref]
                self._of[ref] = kind, size
                self.live[old] -= size
                self.live[kind] += size

    def hold(self, parameters: Iterable[torch.Tensor]) -> None:
        """Whose copies are casts."""
        self._parameters = {_ref(p) for p in parameters}

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def begin(self) -> None:
        """`peak` and `resident` count from here on."""
        self._most, self.peak = self._sum, self.live.copy()
        self.resident = self._sum - self._small + self._heap


def _places(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks that have values as the places where they are true: fake ones do not say how many these are."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        real = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += index.nonzero(as_tuple=True) if real and index is not None else [index]
    return found


def _ref(tensor: torch.Tensor) -> weakref.ref[Any]:
    return weakref.ref(tensor.untyped_storage())


def make_fake(
    model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype, device: torch.device, files: Sequence[int] = ()
) -> None:
    """Give a model of the meta device fake tensors on `device`, its parameters in `dtype`, adapters in the type that
    they have; tied ones stay one.

    `files`: bytes of weight files that are mapped, not copied. Parameters are views of their file then: it stays in
    memory until the last of them is gone.
    """
    made: dict[int, nn.Parameter] = {}
    mapped = _Files(files, dtype, device)
    with fake:
        for prefix, module in model.named_modules():
            for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(p) not in made:
                    own = is_adapter(f"{prefix}.{name}")
                    tensor = torch.empty(p.shape, dtype=p.dtype, device=device) if own else mapped.next(p.shape)
                    made[id(p)] = nn.Parameter(tensor, p.requires_grad)
                setattr(module, name, made[id(p)])
            for name, b in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device=device))


class _Files:
    """Tensors as views of files, one after the other."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.mapped, self.left = bool(sizes), [size // dtype.itemsize for size in sizes]
        self.how: dict[str, Any] = {"dtype": dtype, "device": device}
        self.file, self.end = torch.empty(0), 0

    def next(self, shape: torch.Size) -> torch.Tensor:
        if not self.mapped:
            return torch.empty(shape, **self.how)
        begin = self.end
        if begin + shape.numel() > self.file.numel():
            begin = 0
            self.file = torch.empty(max(shape.numel(), self.left.pop(0) if self.left else 0), **self.how)
        self.end = begin + shape.numel()
        return self.file[begin : self.end].view(shape)
