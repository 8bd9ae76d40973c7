"""Adapters on disk: PEFT folders, whoever wrote them, in the names of the model as transformers builds it today."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lensmith.core.errors import ModelError
from lensmith.model.load import is_tied
from lensmith.model.parts import is_adapter

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take something out of the weights under the adapter."""
NOT_READ = (
    "lora_bias", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config", "fan_in_fan_out",
)  # fmt: skip
"""Of an adapter's config: what is refused where it is set."""


@dataclass(frozen=True)
class Stored:
    """An adapter as it was saved. `config`: PEFT's, of today; `tensors`: by the model's names, without an adapter's."""

    folder: Path
    config: Any
    tensors: dict[str, torch.Tensor]
    layers: tuple[str, ...]
    """Those with an adapter."""
    full: tuple[str, ...]
    """Modules that were trained in full."""

    def fit_embeddings(self, model: Any) -> None:
        """Give the model as many rows for tokens as the adapter's own tables have."""
        for get in (model.get_input_embeddings, model.get_output_embeddings):
            table = get()
            name = next(n for n, m in model.named_modules() if m is table)
            own = self.tensors.get(f"{name}.weight")
            if own is not None and len(own) > len(table.weight):
                model.resize_token_embeddings(len(own), mean_resizing=False)

    def load(self, peft: Any, model: Any) -> None:
        """The values into a model that PEFT has wrapped as `config` says. Raises `ModelError` ADAPTER."""
        from peft import set_peft_model_state_dict

        if next(model.parameters()).is_meta:
            return
        names = {n for n in self.tensors if self._in_full(n)}
        found = set_peft_model_state_dict(peft, {PREFIX + n: t for n, t in self.tensors.items() if n not in names})
        live = dict(peft.named_parameters(remove_duplicate=False))
        absent = {n for n in found.missing_keys if n in live and is_adapter(n)}
        there = {id(p) for n, p in live.items() if n not in absent}  # the rows of a tied head are the embedding's
        missing = [n for n in absent if id(live[n]) not in there]
        if wrong := [*found.unexpected_keys, *missing]:
            raise self.error(f"{len(wrong)} tensors do not fit the model: {', '.join(sorted(wrong)[:3])}")
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).copy_(self.tensors[name])

    def _in_full(self, name: str) -> bool:
        return any(name.startswith(f"{module}.") for module in self.full)

    def error(self, message: str, remedy: str = "") -> ModelError:
        return ModelError("ADAPTER", message, where=str(self.folder), remedy=remedy)


def read_adapter(folder: Path, model: Any) -> Stored:
    """Config and tensors of a PEFT LoRA folder, and which of the model's layers they belong to; `model` may be on the
    meta device. Raises `ModelError` for what lensmith cannot go on with."""
    from safetensors.torch import load_file

    raw = _config_of(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError("UNSAFE_FORMAT" if pickled else "ADAPTER", f"there is no {WEIGHTS}"
                         + ("; adapter_model.bin is a pickle and is never read" if pickled else ""), where=str(folder),
                         remedy="save the adapter as safetensors" if pickled else "")  # fmt: skip
    rename = renaming(model)
    tensors = {rename(n.removeprefix(PREFIX)): t for n, t in load_file(file).items()}
    layers = tuple(dict.fromkeys(n.split(".lora_")[0] for n in tensors if ".lora_" in n))
    full = _full(raw.get("modules_to_save") or (), tensors, model, folder)
    stored = Stored(folder, _peft_config(raw, layers, model), tensors, layers, full)
    _check_shapes(stored, model)
    return stored


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError("ADAPTER", "there is no adapter_config.json: not a PEFT adapter", where=str(folder))
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("ADAPTER", f"not JSON: {error}", where=str(path)) from None
    if raw.get("peft_type") != "LORA":
        raise ModelError(
            "ADAPTER", f"peft_type is {raw.get('peft_type')!r}", where=str(path), remedy="only LORA is read"
        )
    if set_ := [key for key in NOT_READ if raw.get(key)]:
        raise ModelError("ADAPTER", f"{set_[0]} is {raw[set_[0]]!r}, which lensmith does not train", where=str(path))
    if raw.get("bias", "none") != "none":
        raise ModelError("ADAPTER", f"bias is {raw['bias']!r}, which lensmith does not train", where=str(path))
    if str(raw.get("init_lora_weights")).startswith(CHANGES_THE_BASE):
        raise ModelError("ADAPTER", f"init_lora_weights is {raw['init_lora_weights']!r}: it belongs to a changed base "
                         "model", where=str(path),
                         remedy="name the adapter that was converted to a plain one (PEFT: "
                         "path_initial_model_for_weight_conversion; LLaMA-Factory: pissa_convert)")  # fmt: skip
    return raw


def _peft_config(raw: dict[str, Any], layers: Sequence[str], model: Any) -> Any:
    """PEFT's config of today, that hits just the layers that have tensors."""
    from peft import LoraConfig
    from peft.utils.other import match_target_against_key

    known = {f.name for f in fields(LoraConfig) if f.init}
    config = LoraConfig(
        **{k: v for k, v in raw.items() if k in known and k not in ("modules_to_save", "runtime_config")}
    )
    config.init_lora_weights, config.inference_mode, config.task_type = True, False, "CAUSAL_LM"
    config.base_model_name_or_path = None  # one base has many names; shapes are compared
    config.ensure_weight_tying = False  # what trains in full is not PEFT's here
    target = config.target_modules
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if isinstance(target, str):
        hit = [n for n in names if match_target_against_key(target, n)]
    else:
        suffixes = tuple(f".{t}" for t in target or ())
        hit = [n for n in names if f".{n}".endswith(suffixes)]
    if set(hit) != set(layers) or config.layers_to_transform or config.exclude_modules:
        config.target_modules = list(layers)
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return config


def renaming(model: nn.Module) -> Callable[[str], str]:
    """Names of older transformers into those of today, as the model's own weights are renamed when they are loaded. A
    name whose module is there stays."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    modules = {n for n, _ in model.named_modules()}
    rules = [
        (pattern, entry.target_patterns[0])
        for entry in get_model_conversion_mapping(model)  # type: ignore[arg-type]
        if type(entry).__name__ == "WeightRenaming"
        for pattern in entry.source_patterns
    ]

    def module_of(name: str) -> str:
        return re.split(r"\.(?:lora_|token_adapter|base_layer)|\.[^.]+$", name)[0]

    def rename(name: str) -> str:
        if module_of(name) in modules:
            return name
        for pattern, target in rules:
            new = re.sub(pattern, target, name, count=1)
            if new != name and module_of(new) in modules:
                return new
        return name

    return rename


def _full(saved: Sequence[str], tensors: dict[str, torch.Tensor], model: nn.Module, folder: Path) -> tuple[str, ...]:
    """PEFT's modules_to_save, by their full names. A tied head that was saved beside its embedding must be equal."""
    modules = {n for n, _ in model.named_modules()}
    full: list[str] = []
    for name in tensors:
        if ".lora_" in name or "trainable_tokens" in name or "token_adapter" in name:
            continue
        hit = [m for m in modules if name.startswith(f"{m}.") and any(m == s or m.endswith(f".{s}") for s in saved)]
        if not hit:
            known = [m for m in modules if m and name.startswith(f"{m}.")]
            if not known:
                raise ModelError("ADAPTER", f"the model has no {name}", where=str(folder),
                                 remedy="is this the adapter of another model?")  # fmt: skip
            hit = known
        full.append(max(hit, key=len))
    if is_tied(model):
        head, embeds = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        names = dict(model.named_modules())
        both = [n for n in dict.fromkeys(full) if names[n] in (head, embeds)]
        values = [tensors[f"{n}.weight"] for n in both]
        if len(both) == 2 and not torch.equal(*values):
            raise ModelError("TIED_HEAD", "the adapter has a head of its own; the model's is its embedding",
                             where=str(folder), remedy="export it merged with the tool that made it")  # fmt: skip
        full = [n for n in full if names[n] is not head or len(both) == 1]
    return tuple(dict.fromkeys(full))


def _check_shapes(stored: Stored, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for name in stored.layers:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise stored.error(f"it adapts {name}, which is no linear layer of the model",
                               "is this the adapter of another model?")  # fmt: skip
        a, b = (stored.tensors.get(f"{name}.lora_{x}.weight") for x in "AB")
        if a is None or b is None:
            raise stored.error(f"{name} has only one of lora_A and lora_B", "restore the folder")
        found, want = (b.shape[0], a.shape[1]), (layer.out_features, layer.in_features)
        if found != want:
            raise stored.error(f"it adapts {name} as {found[0]} x {found[1]}; the model's is {want[0]} x {want[1]}",
                               "is this the adapter of another model?")  # fmt: skip
