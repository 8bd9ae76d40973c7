"""What trains: full, freeze by part, or LoRA through PEFT; and the table that says so."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lensmith.core.errors import ConfigError
from lensmith.model.load import is_tied
from lensmith.model.options import Freeze, Full, Lora


class Parts(Protocol):
    def part_of(self, name: str) -> Any: ...
    def blocks(self, model: nn.Module, part: Any) -> Sequence[nn.Module]: ...
    def lora_pattern(self, parts: Sequence[Any]) -> str: ...


@dataclass
class Tuned:
    """The model with `requires_grad` set. `peft` wraps the same modules when adapters were added."""

    model: Any
    peft: Any = None

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that trains, each tensor once, in the model's order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]


def apply(model: Any, tune: Full | Freeze | Lora, family: Parts, new_ids: Sequence[int] = ()) -> Tuned:
    """Set what trains. `new_ids`: rows of added tokens, which train in every case.

    Raises `ConfigError` for a pattern or part that matches nothing.
    """
    if isinstance(tune, Lora):
        return _lora(model, tune, family, new_ids)
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


def _lora(model: Any, tune: Lora, family: Parts, new_ids: Sequence[int]) -> Tuned:
    from peft import LoraConfig, get_peft_model

    pattern = tune.pattern or family.lora_pattern(tune.parts)
    hit = {n: m for n, m in model.named_modules() if n and _matches(pattern, n)}
    names = [n for n, m in hit.items() if isinstance(m, nn.Linear)]
    if other := [n for n in hit if n not in names]:
        raise ConfigError(
            "TUNE",
            f"tune.pattern {pattern!r} also matches {other[0]!r}, which is no linear layer",
            remedy="end the pattern with the names of the layers, e.g. (q_proj|v_proj)",
        )
    if not names:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise ConfigError(
            "TUNE",
            f"tune.pattern {pattern!r} matches none of {len(linear)} linear layers",
            remedy=f"full module names look like {linear[-1]!r}",
        )
    if is_tied(model) and any("lm_head" in n for n in names):
        raise ConfigError(
            "TIED_HEAD",
            "adapters on a tied lm_head would untie it from the embedding",
            remedy="leave lm_head out of tune.pattern, or train `embeddings` with tune: freeze",
        )
    config = LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha if tune.alpha is not None else 2 * tune.rank,  # type: ignore[arg-type]
        lora_dropout=tune.dropout,
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        target_modules=pattern,
        trainable_token_indices=_token_rows(model, new_ids),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    with peft_is_quiet():
        peft = get_peft_model(model, config, autocast_adapter_dtype=True)
    return Tuned(model, peft)


def _token_rows(model: Any, new_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT trains single rows of the embedding; a tied head follows by itself, an untied one is named too."""
    if not new_ids:
        return None
    return {"embed_tokens": list(new_ids), **({} if is_tied(model) else {"lm_head": list(new_ids)})}


@contextmanager
def peft_is_quiet() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers 5.23 deprecates, whenever it wraps a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError("TUNE", f"tune.pattern {pattern!r} is not a regular expression: {error}") from None


def is_adapter(name: str) -> bool:
    """LoRA's matrices and magnitudes, and the rows that PEFT trains for added tokens."""
    return ".lora_" in name or "trainable_tokens" in name


def what_trains(model: nn.Module, part_of: Callable[[str], str], lr_of: Any) -> list[dict[str, Any]]:
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
        row["parameters"] += p.numel()
        row["dtype"].add(str(p.dtype).removeprefix("torch."))
        if p.requires_grad:
            row["trainable"] += p.numel()
            row["lr"], row["weight_decay"] = lr_of(part)
    for row in rows.values():
        row["dtype"] = "+".join(sorted(row["dtype"]))
    return list(rows.values())


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a tied tensor counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, g in sizes if g), sum(n for n, _ in sizes)
