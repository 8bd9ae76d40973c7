"""Adapters through PEFT: how they begin, which go on or are merged first, and what is published of them.

What is published works on the model as it was, in stock PEFT. Where the weights under the adapter were changed (an
initialisation took something out of them, other adapters were merged into them), the change is a product of two small
matrices, and is appended to the trained one: [B, B'] [A; A'] = B A + B' A'.

Shape letters: O output and I input features of a layer, r rank.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lensmith.core.errors import ConfigError
from lensmith.model.adapter_folder import PREFIX, Stored, read_adapter
from lensmith.model.load import is_tied
from lensmith.model.options import Lora, PartName
from lensmith.model.parts import outermost
from lensmith.model.quantize import Residuals

INIT_SEED = 0
"""Of approximate decompositions: the weights under the adapter must be the same in every stage and resume."""


class Parts(Protocol):
    def part_of(self, name: str) -> Any: ...
    def lora_pattern(self, parts: Sequence[Any]) -> str: ...


@dataclass(frozen=True)
class Folders:
    """Where the adapters are that a run goes on with, or merges first."""

    adapter: Path | None = None
    merge: tuple[Path, ...] = ()


Factors = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]
"""Layer -> (A [r, I], B [O, r] with its scale), in float32 on the CPU."""


@dataclass
class Adapted:
    """A model with adapters. `beside`: what its weights have more than those on disk, to be published with them."""

    peft: Any
    full: tuple[str, ...] = ()
    """Modules that train in full."""
    beside: Factors = field(default_factory=dict)

    def published_config(self) -> Any:
        """PEFT's config of what `published_state` gives."""
        config = copy.deepcopy(self.peft.peft_config["default"])
        config.init_lora_weights = True
        config.modules_to_save = list(self.full) or None
        config.ensure_weight_tying = self._tied_in_full is not None
        if self.beside:
            self._widen(config)
        return config

    @property
    def _tied_in_full(self) -> tuple[str, str] | None:
        """(embedding, head) where they are one table that trains in full."""
        model = self.peft.get_base_model()
        head, embeds = model.get_output_embeddings(), model.get_input_embeddings()
        if not is_tied(model) or not any(model.get_submodule(n) is embeds for n in self.full):
            return None
        named = {m: n for n, m in model.named_modules()}
        return named[embeds], named[head]

    def _widen(self, config: Any) -> None:
        """Ranks add up; every scale is 1, for the factors have theirs."""
        own = {name: layer.r["default"] for name, layer in lora_layers(self.peft.get_base_model())}
        ranks = {n: own.get(n, 0) + sum(len(a) for a, _ in self.beside.get(n, ())) for n in {**own, **self.beside}}
        usual = max(set(ranks.values()), key=list(ranks.values()).count)
        config.r = config.lora_alpha = usual
        config.use_rslora = False
        config.rank_pattern = {re.escape(n): r for n, r in ranks.items() if r != usual}
        config.alpha_pattern = dict(config.rank_pattern)
        if set(ranks) != set(own):
            config.target_modules = list(ranks)

    def published_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The adapter's tensors (PEFT's names) with what is published beside them."""
        out = dict(state)
        if (tied := self._tied_in_full) is not None:  # PEFT looks for both
            out[f"{PREFIX}{tied[1]}.weight"] = state[f"{PREFIX}{tied[0]}.weight"].clone()
        if not self.beside:
            return out
        layers = dict(lora_layers(self.peft.get_base_model()))
        for name in {**layers, **self.beside}:
            keys = [f"{PREFIX}{name}.lora_{x}.weight" for x in "AB"]
            extra = self.beside.get(name, [])
            a, b = [x for x, _ in extra], [x for _, x in extra]
            if name in layers:
                scale = layers[name].scaling["default"]
                a, b = [state[keys[0]].float().cpu(), *a], [state[keys[1]].float().cpu() * scale, *b]
            out[keys[0]], out[keys[1]] = torch.cat(a), torch.cat(b, dim=1)
        return out


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    yield from ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.lora_A)


def attach(
    model: Any, tune: Lora, family: Parts, new_ids: Sequence[int], folders: Folders, residuals: Residuals | None = None
) -> Adapted:
    """Put adapters on the model, and set what trains. `residuals`: what quantisation took away, for `loftq`.

    On the meta device names and shapes are checked, and nothing is computed. Raises `ConfigError` and `ModelError`.
    """
    beside: Factors = {}
    for number, folder in enumerate(folders.merge):
        _merge(model, read_adapter(folder, model), beside, f"tune.merge.{number}")
    if folders.adapter is not None:
        return _go_on(model, tune, family, folders.adapter, new_ids, beside)
    names = _layers_of(model, tune, family)
    full = full_modules(model, tune.full, family, names)
    config = _config(model, tune, family, names, new_ids)
    meta = _is_meta(model)
    if not meta and tune.init != "loftq":
        config.init_lora_weights = {"default": True}.get(tune.init, tune.init)
    peft = _wrapped(model, config)
    adapted = Adapted(peft, full, beside)
    if not meta:
        _begin(adapted, tune, residuals)
    train_in_full(model, full)
    return adapted


def _wrapped(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    model.requires_grad_(False)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with peft_is_quiet(), _seeded(str(config.init_lora_weights).startswith("pissa_niter"), devices):
        return get_peft_model(model, config, autocast_adapter_dtype=True)


@contextmanager
def _seeded(fixed: bool, devices: set[torch.device]) -> Iterator[None]:
    if not fixed:
        yield
        return
    with torch.random.fork_rng([d.index or 0 for d in devices]):
        torch.manual_seed(INIT_SEED)
        yield


def _begin(adapted: Adapted, tune: Lora, residuals: Residuals | None) -> None:
    """Behind PEFT's initialisation: what it took out of the weights is published with the adapter, negated."""
    for name, layer in lora_layers(adapted.peft.get_base_model()):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        if tune.init == "loftq":
            assert residuals is not None
            with torch.no_grad():
                for p, value in zip((a, b), residuals.factors(name, len(a)), strict=True):
                    p.copy_(value / (1 if p is a else scale))
        elif tune.init not in ("default", "gaussian"):
            taken = (a.detach().float().cpu().clone(), b.detach().float().cpu() * -scale)
            adapted.beside.setdefault(name, []).append(taken)


# -- layers and ranks ---------------------------------------------------------------------------------------------


def _layers_of(model: Any, tune: Lora, family: Parts) -> list[str]:
    """Full names of the linear layers that get adapters."""
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
            remedy="leave lm_head out of tune.pattern, or train it in full: tune.full: [embeddings]",
        )
    return names


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError("TUNE", f"tune.pattern {pattern!r} is not a regular expression: {error}") from None


def _config(model: Any, tune: Lora, family: Parts, names: Sequence[str], new_ids: Sequence[int]) -> Any:
    from peft import LoraConfig

    alpha = tune.alpha if tune.alpha is not None else 2 * tune.rank
    ranks, alphas = _patterns(tune, family, names, alpha)
    _check_ranks(model, tune, names, ranks)
    return LoraConfig(
        r=tune.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=tune.dropout,
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        target_modules=tune.pattern or family.lora_pattern(tune.parts),
        trainable_token_indices=_token_rows(model, new_ids, tune.full),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _patterns(tune: Lora, family: Parts, names: Sequence[str], alpha: float) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's rank_pattern and alpha_pattern: full names, so that they hold whatever `pattern` is."""
    parts = {n: family.part_of(f"{n}.weight") for n in names}
    for key, given in (("ranks", tune.ranks), ("alphas", tune.alphas)):
        if unused := set(given) - set(parts.values()):
            raise ConfigError("TUNE", f"tune.{key} names {sorted(unused)[0]!r}, which has no adapters",
                              remedy=f"adapters are in: {', '.join(sorted(set(parts.values())))}")  # fmt: skip
    ranks: dict[str, int] = {re.escape(n): tune.ranks[p] for n, p in parts.items() if p in tune.ranks}
    alphas: dict[str, float] = {}
    for n, p in parts.items():
        if p in tune.alphas or p in tune.ranks:
            alphas[re.escape(n)] = tune.alphas.get(p, alpha * tune.ranks.get(p, tune.rank) / tune.rank)
    return ranks, alphas


def _check_ranks(model: Any, tune: Lora, names: Sequence[str], ranks: Mapping[str, int]) -> None:
    """What is decomposed has no more directions than its smaller side."""
    if tune.init in ("default", "gaussian"):
        return
    for n in names:
        layer, rank = model.get_submodule(n), ranks.get(re.escape(n), tune.rank)
        if rank > min(layer.in_features, layer.out_features):
            raise ConfigError("TUNE", f"tune.rank {rank} is above the smaller side of {n} "
                              f"({layer.out_features} x {layer.in_features}), which tune.init {tune.init} takes apart",
                              remedy="lower the rank, or use tune.init: default")  # fmt: skip


def _token_rows(model: Any, new_ids: Sequence[int], full: Sequence[str]) -> dict[str, list[int]] | None:
    """PEFT trains single rows of the embedding; a tied head follows by itself, an untied one is named too."""
    tables = ["embed_tokens"] if "embeddings" not in full else []
    if not is_tied(model) and "head" not in full:
        tables.append("lm_head")
    return {table: list(new_ids) for table in tables} if new_ids and tables else None


# -- parts that train in full -------------------------------------------------------------------------------------


def full_modules(model: Any, parts: Sequence[PartName], family: Parts, adapted: Sequence[str]) -> tuple[str, ...]:
    """The modules of `parts`, as large as they are of one part: what PEFT calls modules_to_save."""
    found: list[str] = []
    held = {family.part_of(f"{n}.weight") for n in adapted}
    for part in parts:
        if part in held:
            raise ConfigError("TUNE", f"tune.full names {part!r}, which has adapters too",
                              remedy="take it out of tune.full, or out of tune.parts")  # fmt: skip
        tied = part == "head" and is_tied(model)
        names = [] if tied else [n for n, p in outermost(model, family.part_of) if p == part]
        if not names:
            why = " (the head is the embedding here: name `embeddings`)" if tied else ""
            raise ConfigError("TUNE", f"tune.full names {part!r}, but the model has no such parameters{why}")
        found += names
    return tuple(found)


def train_in_full(model: Any, full: Sequence[str]) -> None:
    """The modules themselves, not copies of them: they keep their types, their tie and their place in the model."""
    for name in full:
        model.get_submodule(name).requires_grad_(True)


# -- adapters that are there ----------------------------------------------------------------------------------------


def _go_on(model: Any, tune: Lora, family: Parts, folder: Path, new_ids: Sequence[int], beside: Factors) -> Adapted:
    """Train an adapter further, as it is."""
    stored = read_adapter(folder, model)
    _check_same(tune, stored)
    rows = stored.config.trainable_token_indices
    if new_ids and not stored.full and set(new_ids) - {i for ids in (rows or {}).values() for i in ids}:
        raise ConfigError("TUNE", "model.add_tokens names tokens whose rows the adapter of tune.adapter does not train",
                          remedy="take them out, or merge the adapter (tune.merge) and begin a new one")  # fmt: skip
    if beside and stored.config.use_dora:
        raise ConfigError("TUNE", "tune.adapter is a DoRA adapter: it cannot be published with those of tune.merge",
                          remedy="export them merged first (lensmith export), and begin from that model")  # fmt: skip
    stored.fit_embeddings(model)
    full = tuple(dict.fromkeys([*stored.full, *full_modules(model, tune.full, family, stored.layers)]))
    config = copy.deepcopy(stored.config)
    config.lora_dropout, config.modules_to_save, config.inference_mode = tune.dropout, None, False
    peft = _wrapped(model, config)
    stored.load(peft, model)
    train_in_full(model, full)
    return Adapted(peft, full, beside)


def _check_same(tune: Lora, stored: Stored) -> None:
    """Raises `ConfigError` for an option that was changed from its default and is not the adapter's."""
    theirs = stored.config
    own_values = {
        "rank": theirs.r, "alpha": theirs.lora_alpha, "rslora": theirs.use_rslora, "dora": theirs.use_dora,
        "pattern": theirs.target_modules,
    }  # fmt: skip
    for key in ("rank", "alpha", "rslora", "dora", "pattern", "init", "ranks", "alphas", "parts"):
        ours, own = getattr(tune, key), own_values.get(key, "its own")
        usual = Lora.model_fields[key].get_default(call_default_factory=True)
        if ours not in (usual, own):
            raise ConfigError("TUNE", f"tune.{key} is {ours!r}; the adapter of tune.adapter has {own!r}",
                              where=str(stored.folder), remedy=f"leave tune.{key} out")  # fmt: skip


def _merge(model: Any, stored: Stored, beside: Factors, key: str) -> None:
    """Into the weights, in place; its factors go into `beside`."""
    held = "modules in full" if stored.full else "rows of tokens" if stored.config.trainable_token_indices else ""
    if stored.config.use_dora:
        held = "DoRA's magnitudes"
    if held:
        raise ConfigError("TUNE", f"{key} is an adapter with {held}: what trains on it could not be published for the "
                          "model as it was", where=str(stored.folder),
                          remedy="export it merged (lensmith export), and begin from that model")  # fmt: skip
    if _is_meta(model):
        return
    peft = _wrapped(model, copy.deepcopy(stored.config))
    stored.load(peft, model)
    for name, layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        factors = a.detach().float().cpu().clone(), b.detach().float().cpu() * layer.scaling["default"]
        beside.setdefault(name, []).append(factors)
    unwrapped(peft)


def merged(model: Any, folder: Path) -> Any:
    """The model with an adapter merged into it: what `lensmith export` writes."""
    stored = read_adapter(folder, model)
    stored.fit_embeddings(model)
    config = copy.deepcopy(stored.config)
    config.modules_to_save = None
    peft = _wrapped(model, config)
    stored.load(peft, model)
    return unwrapped(peft)


def unwrapped(peft: Any) -> Any:
    with peft_is_quiet():
        model = peft.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _is_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


@contextmanager
def peft_is_quiet() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers 5.23 deprecates, whenever it wraps a model, and loads bitsandbytes
    where it is installed, which speaks of kernels that are not needed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
