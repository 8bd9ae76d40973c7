"""Arithmetic of a training step: formulas by the model's shapes, and a meter that counts operations as they come.

The formulas (docs/scaling.md) give the floating-point operations of any row from five sums over its samples, so the
work of a step is known from the index alone. The meter sees the operations of one row, run on tensors without values
(lensmith/model/memory.py); it holds the formulas to the code, and knows what moves bytes without computing.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

OUTPUT_OF_ATTENTION = re.compile(r"(attn|attention)\.(o_proj|out_proj|proj|projection_layer)(\.base_layer)?$")
"""The layer behind the heads: its input is as wide as all heads together."""
OF_MERGED = re.compile(r"merger|pooler")
"""Layers of a tower that see merged patches, as many as there are tokens."""


class Family(Protocol):
    def part_of(self, name: str) -> Any: ...
    def blocks(self, model: nn.Module, part: Any) -> Sequence[nn.Module]: ...


@dataclass(frozen=True)
class Amounts:
    """What the formulas need of each sample (or, summed, of a row): numbers or arrays of equal shape."""

    tokens: Any
    supervised: Any
    media_tokens: Any
    patches: Any
    segments: Any
    """Pictures, clips or tiles that attend to themselves alone."""

    @staticmethod
    def of(columns: Callable[[str], np.ndarray], tile: int | None) -> Amounts:
        """From the columns of an index. `tile`: patches of a picture's tile, where a tower sees tiles apart."""
        patches, shown = columns("patches"), columns("images") + columns("videos")
        segments = np.maximum(shown, 1)
        if tile is not None:
            segments = np.maximum(segments, -(-patches // tile))
        return Amounts(columns("tokens"), columns("supervised"), columns("media_tokens"), patches, segments)

    def take(self, numbers: np.ndarray) -> Amounts:
        return Amounts(*(values[numbers] for values in vars(self).values()))


@dataclass(frozen=True)
class Matrices:
    """Values of the matrices of one block or one layer between blocks, what of them trains, and its attention."""

    per: str
    """`tokens`, `patches`, `media_tokens` or `supervised`: how often its values are multiplied."""
    values: int
    trained: int
    attention: int = 0
    """Width of all heads together."""
    window: int | None = None
    """Keys that a query sees at most; None: all of its own sample or picture."""
    block: bool = False
    """Of the repeated blocks: what `train.recompute` computes again."""
    last: int = 0
    """Values of a block's last matrix, whose product is not computed again: nothing in the block needs it."""


@dataclass(frozen=True)
class Work:
    """FLOPs of samples: `vision` forward of a frozen tower, which a cache may save; `rest` all else."""

    vision: Any
    rest: Any

    @property
    def total(self) -> Any:
        return self.vision + self.rest


class Formula:
    """FLOPs of a training step by the shapes of a model whose `requires_grad` is set.

    A matrix of P values costs 2 P for each token forward, 2 P for the gradient of its input where anything before it
    trains, and 2 P for its own gradient where it trains. Attention of width A costs 4 A for each pair of query and key
    forward and 8 A backward; a causal sample of l tokens has l^2 / 2 pairs.
    """

    def __init__(self, model: Any, family: Family, *, recompute: bool = False):
        self.recompute = recompute
        self.layers = layers_of(model, family)
        self.tile = _tile(model.config, family)
        self.vision_trains = any(layer.trained for layer in self.layers if layer.per in ("patches", "media_tokens"))

    def reached(self, part: str, number: int) -> bool:
        """Whether the backward pass comes through a block."""
        per = "patches" if part == "vision" else "tokens"
        blocks = [place for place, layer in enumerate(self.layers) if layer.block and layer.per == per]
        return any(layer.trained for layer in self.layers[: blocks[number] + 1])

    def useful(self, of: Amounts) -> Work:
        """Without what is computed twice: what MFU counts."""
        return self._work(of, recompute=False)

    def executed(self, of: Amounts) -> Work:
        return self._work(of, recompute=self.recompute)

    def _work(self, of: Amounts, *, recompute: bool) -> Work:
        vision, rest, flows = 0.0, 0.0, False
        for layer in self.layers:
            matrix, pairs = 2.0 * layer.values * getattr(of, layer.per), 4.0 * layer.attention * _pairs(layer, of)
            into = flows  # the gradient of what comes into the layer is needed if anything before it trains
            flows = flows or layer.trained > 0
            own = 2.0 * min(layer.trained, layer.values) * getattr(of, layer.per)
            back = own + (matrix if into or (layer.block and flows) else 0.0) + (2.0 * pairs if flows else 0.0)
            skipped = 2.0 * layer.last * getattr(of, layer.per)
            again = matrix - skipped + pairs if recompute and layer.block and flows else 0.0
            if flows:
                rest = rest + matrix + pairs + back + again
            elif layer.per in ("patches", "media_tokens"):
                vision = vision + matrix + pairs
            else:
                rest = rest + matrix + pairs
        return Work(vision + 0.0 * of.tokens, rest + 0.0 * of.tokens)


def _pairs(layer: Matrices, of: Amounts) -> Any:
    """Pairs of query and key of each sample."""
    if not layer.attention:
        return 0.0
    if layer.per == "patches":
        keys = of.patches / of.segments
        return of.patches * (keys if layer.window is None else np.minimum(keys, layer.window))
    length = np.asarray(of.tokens, np.float64)
    if layer.window is None:
        return length**2 / 2
    inside = np.minimum(length, layer.window)
    return inside**2 / 2 + (length - inside) * layer.window


def layers_of(model: Any, family: Family) -> list[Matrices]:
    """The matrices in the order of the forward pass: embedding, tower, projector, blocks, head."""
    blocks = {part: list(family.blocks(model, part)) for part in ("vision", "language")}
    inside = {id(p): part for part, found in blocks.items() for b in found for p in b.parameters()}
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    before: list[Matrices] = []
    between: list[Matrices] = []
    embedding = sum(p.numel() for n, p in model.named_parameters()
                    if p.requires_grad and ".embed_tokens." in n)  # fmt: skip
    for name, p in model.named_parameters():
        if p.ndim < 2 or id(p) in inside or p is head or id(p) in tables or ".embed_tokens." in name:
            continue
        part, values, trained = family.part_of(name), p.numel(), p.numel() * p.requires_grad
        if part == "vision" and not OF_MERGED.search(name):
            before.append(Matrices("patches", values, trained))
        else:
            between.append(Matrices("media_tokens" if part in ("vision", "projector") else "tokens", values, trained))
    config = model.config
    vision = _blocks(blocks["vision"], "patches", _vision_windows(config, len(blocks["vision"])))
    language = _blocks(blocks["language"], "tokens", _language_windows(config, len(blocks["language"])))
    # a look-up is no product, but gradients begin there; transformers makes them begin there wherever it recomputes
    begins = embedding or len(getattr(model, "_require_grads_hooks", None) or ())
    looked_up = [Matrices("tokens", 0, begins)] if begins else []
    last = Matrices("supervised", head.numel(), head.numel() * head.requires_grad)
    return [*before, *vision, *between, *looked_up, *language, last]


def _blocks(blocks: Sequence[nn.Module], per: str, windows: Sequence[int | None]) -> list[Matrices]:
    found: list[Matrices] = []
    for block, window in zip(blocks, windows, strict=True):
        matrices = [p for p in block.parameters() if p.ndim > 1]
        widths = [m.in_features for n, m in block.named_modules()
                  if isinstance(m, nn.Linear) and OUTPUT_OF_ATTENTION.search(n) and "linear_attn" not in n]  # fmt: skip
        values, trained = sum(p.numel() for p in matrices), sum(p.numel() for p in matrices if p.requires_grad)
        linear = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
        # behind an adapter's base its own small products come, and they are needed
        last = 0 if not linear or ".lora_" in linear[-1][0] else linear[-1][1].weight.numel()
        found.append(Matrices(per, values, trained, widths[0] if widths else 0, window, block=True, last=last))
    return found


def _language_windows(config: Any, count: int) -> list[int | None]:
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    return [text.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def _vision_windows(config: Any, count: int) -> list[int | None]:
    """Qwen2.5-VL's tower attends within windows of so many pixels in all but a few blocks."""
    vision = getattr(config, "vision_config", None)
    full = getattr(vision, "fullatt_block_indexes", None)
    if vision is None or full is None:
        return [None] * count
    keys = (vision.window_size // vision.patch_size) ** 2
    return [None if number in full else keys for number in range(count)]


def _tile(config: Any, family: Any) -> int | None:
    """Patches of a tile, in families whose pictures are cut into squares of one size."""
    vision = getattr(config, "vision_config", None)
    if family.pixels.max_pixels is not None or vision is None or not getattr(vision, "image_size", None):
        return None
    side, patch = (v[0] if isinstance(v, list | tuple) else v for v in (vision.image_size, vision.patch_size))
    return (side // patch) ** 2


# -- counting ---------------------------------------------------------------------------------------------------


def _attention(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any) -> int:
    return sdpa_flop(q, k, v) // (2 if causal else 1)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, causal: bool,
                        *_: Any, **__: Any) -> int:  # fmt: skip
    return sdpa_backward_flop(grad, q, k, v) // (2 if causal else 1)


_aten = torch.ops.aten
ON_CPU: Mapping[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Attention on a CPU, which torch's own counter leaves out. It computes a causal half only."""


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """A call with tensors of certain sizes: FLOPs of its matrix products (0 for all else), bytes in and out."""

    func: Any
    arguments: tuple[Any, ...]
    """Positional and named ones, as `frozen` made them."""
    flops: int
    bytes: int
    dtype: torch.dtype
    """Of what it makes."""

    @property
    def name(self) -> str:
        return self.func.overloadpacket.__name__


class Meter(TorchDispatchMode):
    """How often each operation comes. Views cost nothing and are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()

    @property
    def flops(self) -> int:
        return sum(op.flops * count for op, count in self.operations.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if made and not func.is_view and func.namespace == "aten" and func.overloadpacket.__name__ not in FREE:
            self.operations[_operation(func, args, kwargs or {}, out, made)] += 1
        return out


FREE = frozenset(
    {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
)
"""Neither compute nor move anything."""


def _operation(func: Any, args: Any, kwargs: Any, out: Any, made: Sequence[torch.Tensor]) -> Operation:
    packet, flops = func.overloadpacket, 0
    taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if packet in ON_CPU:
        flops = ON_CPU[packet](*(t.shape if isinstance(t, torch.Tensor) else t for t in args), **kwargs)
    elif packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
    moved = sum(t.numel() * t.element_size() for t in (*taken, *made))
    return Operation(func, frozen((args, kwargs)), int(flops), moved, made[0].dtype)


def frozen(value: Any) -> Any:
    """Arguments as something that can be compared and kept: tensors as `Like`, lists and mappings as tuples."""
    if isinstance(value, torch.Tensor):
        return Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, dict):
        return (dict, *((k, frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return (type(value) if type(value) in (list, tuple) else tuple, *map(frozen, value))
    return value


def thawed(value: Any, tensor: Callable[[Like], Any]) -> Any:
    """The opposite of `frozen`."""
    if isinstance(value, Like):
        return tensor(value)
    if isinstance(value, tuple):
        kind, *rest = value
        if kind is dict:
            return {k: thawed(v, tensor) for k, v in rest}
        return kind(thawed(v, tensor) for v in rest)
    return value
