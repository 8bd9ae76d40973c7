"""The stage: which loss, and what it is measured against."""

from __future__ import annotations

from typing import Any

from lensmith.migrate.draft import Draft
from lensmith.migrate.keys import UNNEEDED

STAGES = ("pt", "sft", "dpo", "kto", "rm")
LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
_OF_PREFERENCES = (
    "pref_beta", "pref_ftx", "pref_loss", "dpo_label_smoothing", "kto_chosen_weight", "kto_rejected_weight",
    "simpo_gamma", "ref_model",
)  # fmt: skip

_KEYS = {
    "loss": "pref_loss", "beta": "pref_beta", "label_smoothing": "dpo_label_smoothing", "sft_weight": "pref_ftx",
    "gamma": "simpo_gamma", "desirable_weight": "kto_chosen_weight", "undesirable_weight": "kto_rejected_weight",
    "reference": "ref_model",
}  # fmt: skip
"""Option of `objective` -> the key that it comes from."""


def add(draft: Draft) -> None:
    given, stage = draft.given, draft.given.get("stage")
    if stage not in STAGES:
        given.refuse("stage", "lensmith does not train so", f"known: {', '.join(STAGES)}")
    made = {"pt": _next_token, "sft": _next_token, "dpo": _pairs, "kto": _labels, "rm": _reward}[stage](draft)
    if made:
        draft.put("objective", made, "stage", _KEYS)
    used = {"dpo": _OF_PREFERENCES, "kto": _OF_PREFERENCES}.get(stage, ())
    for key in _OF_PREFERENCES:
        if given.has(key) and key not in used:
            draft.decide(key, UNNEEDED, f"of preferences; the stage is {stage}", "")


def _next_token(draft: Draft) -> dict[str, Any]:
    smoothing = draft.given.get("label_smoothing_factor")
    return {"kind": "next_token", "label_smoothing": smoothing} if smoothing else {}


def _pairs(draft: Draft) -> dict[str, Any]:
    given, loss = draft.given, draft.given.get("pref_loss")
    if loss not in LOSSES:
        given.refuse("pref_loss", "lensmith has no such loss", f"known: {', '.join(LOSSES)}; for kto use stage: kto")
    beta, chosen = given.get("pref_beta"), given.get("pref_ftx")
    if loss == "orpo":
        if chosen:
            given.refuse("pref_ftx", "not with orpo, which has this term already", "take it out")
        return {"kind": "orpo", "beta": beta}
    if loss == "simpo":
        made: dict[str, Any] = {"kind": "simpo", "beta": beta, "gamma": given.get("simpo_gamma")}
        return made | ({"sft_weight": chosen} if chosen else {})
    made = {"kind": "dpo", "loss": loss, "beta": beta}
    if smoothing := given.get("dpo_label_smoothing"):
        if loss != "sigmoid":
            given.refuse("dpo_label_smoothing", f"pref_loss is {loss}", "use it with sigmoid alone")
        made["label_smoothing"] = smoothing
    made |= {"length_normalised": True} if loss == "ipo" else {}
    made |= {"sft_weight": chosen, "sft_average": "sequences"} if chosen else {}
    return made | _reference(draft)


def _labels(draft: Draft) -> dict[str, Any]:
    given = draft.given
    if given.get("pref_ftx"):
        given.refuse("pref_ftx", "not with stage kto here", "take it out")
    return {
        "kind": "kto",
        "beta": given.get("pref_beta"),
        "desirable_weight": given.get("kto_chosen_weight"),
        "undesirable_weight": given.get("kto_rejected_weight"),
        **_reference(draft),
    }


def _reward(draft: Draft) -> dict[str, Any]:
    return {"kind": "reward"}


def _reference(draft: Draft) -> dict[str, Any]:
    """By default the model as training begins; with an adapter that is continued the base without it, as there."""
    given = draft.given
    if given.has("ref_model"):
        name = given.get("ref_model")
        folder = given.path(name)
        return {"reference": {"model": str(folder) if folder.is_dir() else name}}
    adapters = given.get("adapter_name_or_path") or []
    if not adapters or given.get("create_new_adapter"):
        return {}
    if len(adapters) > 1:
        draft.warn("the reference is the model as training begins; with several adapters LLaMA-Factory's is the base "
                   "with all but the last merged")  # fmt: skip
        return {}
    return {"reference": {"model": draft.at("model.path")}}
