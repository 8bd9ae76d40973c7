"""What trains: full, freeze by part, or LoRA through PEFT; and the table that says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lensmith.core.errors import ConfigError
from lensmith.model.load import is_tied
from lensmith.model.lora import Adapted, Folders, attach, peft_is_quiet
from lensmith.model.options import Freeze, Full, Lora
from lensmith.model.parts import is_adapter
from lensmith.model.quantize import Residuals
from lensmith.model.value_head import PREFIX, ValueHead

__all__ = ["Tuned", "apply", "count", "is_adapter", "peft_is_quiet", "what_trains"]


class Parts(Protocol):
    def part_of(self, name: str) -> Any: ...
    def blocks(self, model: nn.Module, part: Any) -> Sequence[nn.Module]: ...
    def lora_pattern(self, parts: Sequence[Any]) -> str: ...


class Named(Protocol):
    """A model, or one with what trains beside it."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


@dataclass
class Tuned:
    """The model with `requires_grad` set. `peft` wraps the same modules when adapters were added."""

    model: Any
    peft: Any = None
    adapted: Adapted | None = None
    value_head: ValueHead | None = None
    """Of a reward model."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything, each tensor once, in the model's order."""
        own = [] if self.value_head is None else [(PREFIX + n, p) for n, p in self.value_head.named_parameters()]
        return [*self.model.named_parameters(), *own]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that trains, each tensor once, in the model's order."""
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]


def apply(
    model: Any, tune: Full | Freeze | Lora, family: Parts, new_ids: Sequence[int] = (), folders: Folders | None = None,
    residuals: Residuals | None = None,
) -> Tuned:  # fmt: skip
    """Set what trains. `new_ids`: rows of added tokens, which train in every case; `folders`: where the adapters are
    that `tune` names; `residuals`: what quantisation took away.

    Raises `ConfigError` for a pattern or part that matches nothing.
    """
    if isinstance(tune, Lora):
        adapted = attach(model, tune, family, new_ids, folders or Folders(), residuals)
        return Tuned(model, adapted.peft, adapted)
    if isinstance(tune, Full):
        model.requires_grad_(True)
        return Tuned(model)
    model.requires_grad_(False)
    for part in tune.train:
        _unfreeze(model, part, tune, family)
    head = "embeddings" if is_tied(model) else "head"
    if new_ids and not {"embeddings", head} <= set(tune.train):
        raise ConfigError(
            "TUNE",
            "model.add_tokens needs their rows trained, and tune.train leaves them frozen",
            remedy=f"add embeddings{'' if is_tied(model) else ' and head'} to tune.train",
        )
    return Tuned(model)


def _unfreeze(model: Any, part: str, tune: Freeze, family: Parts) -> None:
    blocks = list(family.blocks(model, part))
    if (tune.first_layers or tune.last_layers) and blocks:
        for key in ("first_layers", "last_layers"):
            if (getattr(tune, key) or 0) > len(blocks):
                raise ConfigError("TUNE", f"tune.{key} is {getattr(tune, key)}; {part!r} has {len(blocks)} layers")
        chosen = [*blocks[: tune.first_layers or 0], *(blocks[-tune.last_layers :] if tune.last_layers else [])]
        for block in chosen:
            block.requires_grad_(True)
        return
    found = [p for n, p in model.named_parameters() if family.part_of(n) == part]
    if not found:
        tied = " (the head is the embedding here: name `embeddings`)" if part == "head" and is_tied(model) else ""
        raise ConfigError("TUNE", f"tune.train names {part!r}, but the model has no such parameters{tied}")
    for p in found:
        p.requires_grad_(True)


def what_trains(model: Named, part_of: Callable[[str], str], lr_of: Any) -> list[dict[str, Any]]:
    """Rows {part, tensors, parameters, trainable, dtype, lr, weight_decay} per part, adapters apart."""
    rows: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        part = part_of(name)
        row = rows.setdefault(
            part,
            {
                "part": part,
                "tensors": 0,
                "parameters": 0,
                "trainable": 0,
                "dtype": set(),
                "lr": 0.0,
                "weight_decay": 0.0,
            },
        )
        row["tensors"] += 1
        row["parameters"] += size_of(p)
        row["dtype"].add(str(p.dtype).removeprefix("torch."))
        if p.requires_grad:
            row["trainable"] += p.numel()
            row["lr"], row["weight_decay"] = lr_of(part)
    for row in rows.values():
        row["dtype"] = "+".join(sorted(row["dtype"]))
    return list(rows.values())


def count(model: Named) -> tuple[int, int]:
    """(trainable, total) parameters; a tied tensor counts once, a quantised one as what it stands for."""
    sizes = [(size_of(p), p.requires_grad) for _, p in model.named_parameters()]
    return sum(n for n, g in sizes if g), sum(n for n, _ in sizes)


def size_of(p: nn.Parameter) -> int:
    """How many numbers a parameter stands for."""
    state: Any = getattr(p, "quant_state", None)
    return p.numel() if state is None else math.prod(state.shape)
