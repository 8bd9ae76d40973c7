"""What LLaMA-Factory refuses because two keys contradict each other, refused here too, before anything is read."""

from __future__ import annotations

from collections.abc import Callable

from lensmith.migrate.given import Given
from lensmith.migrate.parallel import stage_of

_Rule = tuple[str, Callable[[Given], object], str, str]


def _sft(g: Given) -> bool:
    return g.get("stage") == "sft"


def _lora(g: Given) -> bool:
    return g.get("finetuning_type") == "lora"


def _has_reference(g: Given) -> bool:
    return g.get("stage") == "kto" or (g.get("stage") == "dpo" and g.get("pref_loss") not in ("orpo", "simpo"))


RULES: tuple[_Rule, ...] = (
    ("neat_packing", lambda g: not _sft(g), "the stage is not sft", "take it out"),
    ("train_on_prompt", lambda g: not _sft(g), "the stage is not sft", "take it out"),
    ("mask_history", lambda g: not _sft(g), "the stage is not sft", "take it out"),
    ("mask_history", lambda g: g.get("train_on_prompt"), "train_on_prompt is set too", "keep one of the two"),
    (
        "predict_with_generate",
        lambda g: True,
        "lensmith has no such evaluation",
        "take it out; `evaluate.generate` of a lensmith run file asks for held-out answers",
    ),
    (
        "do_eval",
        lambda g: not g.has("eval_dataset") and not g.get("val_size"),
        "there is no held-out data",
        "set eval_dataset or val_size",
    ),
    (
        "adapter_name_or_path",
        lambda g: not _lora(g),
        "finetuning_type is not lora",
        "merge the adapter with `lensmith export` and name that folder as the model",
    ),
    ("quantization_bit", lambda g: not _lora(g), "finetuning_type is not lora", "set finetuning_type: lora"),
    ("quantization_bit", lambda g: g.get("resize_vocab"), "resize_vocab is set too", "take resize_vocab out"),
    ("quantization_bit", lambda g: g.get("pissa_init"), "pissa_init is set too", "take pissa_init out"),
    (
        "quantization_bit",
        lambda g: len(g.get("adapter_name_or_path") or []) > 1,
        "several adapters are named",
        "merge them first, with `lensmith export`",
    ),
    (
        "quantization_bit",
        lambda g: g.get("create_new_adapter") and g.has("adapter_name_or_path"),
        "an adapter cannot be merged into 4 bits",
        "take create_new_adapter out",
    ),
    ("pissa_init", lambda g: stage_of(g) == 3, "deepspeed is ZeRO-3", "use ZeRO-2 or fsdp"),
    ("pissa_init", _has_reference, "the stage needs a reference, which PiSSA changes", "take pissa_init out"),
    ("pure_bf16", lambda g: stage_of(g) == 3, "deepspeed is ZeRO-3", "set bf16: true instead"),
    (
        "resume_from_checkpoint",
        lambda g: g.get("stage") == "rm" and not _lora(g),
        "LLaMA-Factory cannot resume reward models in full either",
        "name another output_dir",
    ),
    ("load_best_model_at_end", lambda g: g.get("stage") == "rm", "not with stage rm, as there", "take it out"),
    ("lora_alpha", lambda g: g.get("lora_alpha") <= 0, "below 1", "write a number above 0"),
    ("lora_rank", lambda g: g.get("lora_rank") < 1, "below 1", "write a number above 0"),
)
"""Key, when it is refused although it is set, why, and what to do."""


def check(given: Given) -> None:
    """Raises `ConfigError` MIGRATE."""
    for name, refused, problem, remedy in RULES:
        if given.get(name) and refused(given):
            given.refuse(name, problem, remedy)
