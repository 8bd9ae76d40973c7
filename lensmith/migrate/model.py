"""The model, what of it trains, and in which precision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError
from lensmith.family.registry import FAMILIES, lora_pattern_of, read_json
from lensmith.migrate.draft import Draft
from lensmith.migrate.given import Given
from lensmith.migrate.keys import DIFFERS, TAKEN, UNNEEDED

FULL_PARTS = {
    "embed_tokens": "embeddings", "wte": "embeddings", "lm_head": "head", "merger": "projector",
    "visual.merger": "projector", "multi_modal_projector": "projector", "resampler": "projector",
    "connector": "projector", "mlp1": "projector",
}  # fmt: skip
"""Modules that users name in `additional_target`, and the parts they are."""
_KEYS = {
    "rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora",
    "init": "pissa_init", "parts": "freeze_vision_tower", "train": "freeze_vision_tower", "pattern": "lora_target",
    "full": "additional_target", "adapter": "adapter_name_or_path", "merge": "adapter_name_or_path",
    "last_layers": "freeze_trainable_layers", "first_layers": "freeze_trainable_layers", "quantize": "quantization_bit",
}  # fmt: skip
"""Option of `tune` -> the key that it comes from."""
_NO_LANGUAGE = r"(?!.*(?:visual|vision_tower|vision_model|vpm|resampler|merger|multi_modal_projector|connector)\.)"


@dataclass(frozen=True)
class About:
    """What is known of the model before it is loaded. `folder` is None for one on the Hub; `config` may be empty."""

    path: str
    folder: Path | None
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str | None:
        return self.config.get("model_type")

    @property
    def is_tied(self) -> bool:
        text = self.config.get("text_config") or {}
        return bool(self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def about(given: Given) -> About:
    """Raises `ConfigError` MIGRATE where no model is named."""
    if not given.has("model_name_or_path"):
        given.refuse("model_name_or_path", "no model is named", "name a folder or a model on the Hub")
    name = given.get("model_name_or_path")
    folder = given.path(name)
    if folder.is_dir():
        return About(str(folder), folder, read_json(folder / "config.json"))
    return About(name, None, _hub_config(name, given.get("model_revision")))


def _hub_config(name: str, revision: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return read_json(Path(hf_hub_download(name, "config.json", revision=revision)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):  # told when the model is fetched
        return {}


def add(draft: Draft, model: About) -> None:
    given = draft.given
    draft.put("model.path", model.path, "model_name_or_path")
    if given.get("model_revision") != "main":
        draft.put("model.revision", given.get("model_revision"), "model_revision")
    if tokens := [*(given.get("add_tokens") or []), *(given.get("add_special_tokens") or [])]:
        draft.put("model.add_tokens", tokens, "add_tokens" if given.has("add_tokens") else "add_special_tokens")
    kind = given.get("finetuning_type")
    if kind not in _KINDS:
        given.refuse("finetuning_type", "lensmith does not train so", f"known: {', '.join(_KINDS)}")
    _KINDS[kind](draft, model)
    quantization(draft)
    precision(draft)


# --- what trains ------------------------------------------------------------------------------------------------------


def _unfrozen(given: Given) -> list[str]:
    flags = {"language": "freeze_language_model", "vision": "freeze_vision_tower",
             "projector": "freeze_multi_modal_projector"}  # fmt: skip
    parts = [part for part, flag in flags.items() if not given.get(flag)]
    if not parts:
        given.refuse("freeze_language_model", "vision tower, projector and language model are all frozen",
                     "set one of the three freeze keys to false")  # fmt: skip
    return parts


def _full(draft: Draft, model: About) -> None:
    parts = _unfrozen(draft.given)
    if len(parts) == 3:
        draft.put("tune", {"kind": "full"}, "finetuning_type")
        return
    if "language" in parts:
        parts += ["embeddings"] if model.is_tied else ["embeddings", "head"]
    draft.put("tune", {"kind": "freeze", "train": parts}, "finetuning_type", _KEYS)
    frozen = sorted({"language", "vision", "projector"} - set(parts))
    draft.decide("finetuning_type", TAKEN, f"frozen all the same: {' and '.join(frozen)}", "tune: freeze")
    if not draft.given.has("freeze_vision_tower") or not draft.given.has("freeze_multi_modal_projector"):
        draft.warn(f"finetuning_type: full leaves {' and '.join(frozen)} frozen, by LLaMA-Factory's defaults "
                   "(freeze_vision_tower and freeze_multi_modal_projector are true unless set)")  # fmt: skip


def _freeze(draft: Draft, model: About) -> None:
    given = draft.given
    if given.get("freeze_trainable_modules") not in ("all", ["all"]):
        given.refuse("freeze_trainable_modules", "single modules of a layer are not supported", "set it to all")
    parts, layers = _unfrozen(given), given.get("freeze_trainable_layers")
    made: dict[str, Any] = {"kind": "freeze", "train": parts}
    if layers == 0:
        given.refuse("freeze_trainable_layers", "nothing would train", "name a number of layers")
    made["last_layers" if layers > 0 else "first_layers"] = abs(layers)
    draft.put("tune", made, "finetuning_type", _KEYS)
    if "vision" in parts:
        draft.decide("freeze_trainable_layers", DIFFERS, "the last (first) layers of the vision tower are counted in "
                     "the tower; LLaMA-Factory takes those of the language model's numbers")  # fmt: skip


def _lora(draft: Draft, model: About) -> None:
    given = draft.given
    made: dict[str, Any] = {"kind": "lora"}
    adapters = [_adapter(given, name) for name in given.get("adapter_name_or_path") or []]
    if adapters and not given.get("create_new_adapter"):
        made |= {"adapter": adapters[-1]} | ({"merge": adapters[:-1]} if adapters[1:] else {})
        for key in ("lora_rank", "lora_alpha", "lora_target", "lora_dropout", "use_rslora", "use_dora", "pissa_init"):
            if given.has(key):
                draft.decide(key, UNNEEDED, "the adapter's own holds, as there", "")
    else:
        made |= {"merge": adapters} if adapters else {}
        made |= _new_adapter(draft, model)
    if given.has("additional_target"):
        made["full"] = list(dict.fromkeys(_part(given, name) for name in given.get("additional_target")))
    draft.put("tune", made, "finetuning_type", _KEYS)
    if given.get("loraplus_lr_ratio"):
        draft.put("optimizer.lora_b_ratio", given.get("loraplus_lr_ratio"), "loraplus_lr_ratio")


def _adapter(given: Given, name: str) -> str:
    path = given.path(given.get("adapter_folder")) / name if given.has("adapter_folder") else given.path(name)
    return str(path) if path.is_dir() else name


def _new_adapter(draft: Draft, model: About) -> dict[str, Any]:
    given = draft.given
    made: dict[str, Any] = {"rank": given.get("lora_rank")}
    made |= {"alpha": float(given.get("lora_alpha"))} if given.has("lora_alpha") else {}
    made |= {"dropout": given.get("lora_dropout")} if given.get("lora_dropout") else {}
    made |= {"rslora": True} if given.get("use_rslora") else {}
    made |= {"dora": True} if given.get("use_dora") else {}
    if given.get("pissa_init"):
        rounds = given.get("pissa_iter")
        made["init"] = "pissa" if rounds == -1 else f"pissa_niter_{rounds}"
    parts, target = _unfrozen(given), given.get("lora_target")
    if "projector" in parts:
        draft.warn("freeze_multi_modal_projector: false gives every linear layer of the projector an adapter; "
                   "LLaMA-Factory gives one only to those whose name another part has too")  # fmt: skip
    if target in ("all", ["all"]):
        return made | {"parts": parts}
    names = "|".join(re.escape(name) for name in target)
    if model.model_type in FAMILIES:
        inside = lora_pattern_of(str(model.model_type), parts)
        return made | {"pattern": rf"(?=(?:{inside})$).*(?:{names}).*"}
    return made | {"pattern": rf"{_NO_LANGUAGE if parts == ['language'] else ''}.*\.(?:{names})"}


def _part(given: Given, name: str) -> str:
    if name not in FULL_PARTS:
        given.refuse("additional_target", f"{name!r} is no part that trains in full beside adapters",
                     f"known: {', '.join(FULL_PARTS)}")  # fmt: skip
    return FULL_PARTS[name]


_KINDS = {"lora": _lora, "freeze": _freeze, "full": _full}


# --- precision --------------------------------------------------------------------------------------------------------


def quantization(draft: Draft) -> None:
    given = draft.given
    if not given.has("quantization_bit"):
        return
    if given.get("quantization_bit") != 4:
        given.refuse("quantization_bit", "only 4 bits are supported", "set it to 4, or take it out")
    if given.get("quantization_method").lower() not in ("bnb", "bitsandbytes"):
        given.refuse("quantization_method", "only bitsandbytes is supported", "set it to bnb")
    tune = draft.at("tune")
    tune["quantize"] = {
        "bits": 4, "type": given.get("quantization_type"), "double": given.get("double_quantization"),
    }  # fmt: skip
    draft.decide("quantization_bit", DIFFERS, "of the language model's layers; the vision tower stays as it is")


def precision(draft: Draft) -> None:
    given = draft.given
    wanted = [key for key in ("pure_bf16", "fp16", "bf16") if given.get(key)]
    if {"fp16"} < set(wanted):
        raise ConfigError("MIGRATE", f"{' and '.join(wanted)} are both set", where=given.where(wanted[0]),
                          remedy="keep one of them")  # fmt: skip
    presets = {"pure_bf16": "bf16-params", "fp16": "fp16", "bf16": "bf16"}
    if wanted:
        draft.put("precision.preset", presets[wanted[0]], wanted[0])
