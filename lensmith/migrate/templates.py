"""LLaMA-Factory's templates of the families that lensmith has: for which models they are, and which system prompt they
put in front.

The chat format is the family's in every case; it is held against the model's own template. What a template here does
otherwise is said by name.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from lensmith.core.errors import ConfigError
from lensmith.family.registry import FAMILIES, default_system_of, read_json
from lensmith.migrate.draft import Draft

_HELPFUL = "You are a helpful assistant."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_INTERN = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


@dataclass(frozen=True, slots=True)
class Template:
    """`models`: model types of config.json. `system`: its default system prompt. `line_feed`: it trains the line feed
    behind the end of an answer. `thinks`: it puts an empty thought before answers unless told otherwise."""

    models: tuple[str, ...]
    system: str | None = None
    line_feed: bool = True
    thinks: bool = False


TEMPLATES: dict[str, Template] = {
    "qwen2_vl": Template(("qwen2_vl", "qwen2_5_vl"), _HELPFUL),
    "qwen3_vl": Template(("qwen3_vl",), thinks=True),
    "qwen3_vl_nothink": Template(("qwen3_vl",)),
    "minicpm_v": Template(("minicpmv",), _HELPFUL),
    "minicpm_v_4_6": Template(("minicpmv4_6", "minicpmv4_7"), _HELPFUL),
    "llava": Template(("llava",), _VICUNA, line_feed=False),
    "llava_next": Template(("llava_next",), _VICUNA, line_feed=False),
    "llava_next_mistral": Template(("llava_next",), line_feed=False),
    "gemma3": Template(("gemma3",)),
    "intern_vl": Template(("internvl",), _INTERN),
}
RENAMED = {"qwen2vl": "qwen2_vl", "qwen2_5_vl": "qwen2_vl"}
"""Names of older releases."""


def choose(draft: Draft, model_type: str | None, folder: Path | None) -> Template | None:
    """The template that is asked for, or that of the model; with its decision and warnings.

    Raises `ConfigError` MIGRATE for a name that no family here has.
    """
    given = draft.given
    name = given.get("template")
    if name is None:
        found = next((t for t in TEMPLATES.values() if model_type in t.models), None)
        draft.warn("template is left out: LLaMA-Factory would read the tokenizer's own template and refuse pictures; "
                   "here the family of the model decides")  # fmt: skip
        return found
    found = TEMPLATES.get(RENAMED.get(str(name), str(name)))
    if found is None:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.5)
        known = ", ".join(TEMPLATES)
        raise ConfigError("MIGRATE", f"template is {name}: no family of lensmith has this chat format",
                          where=given.where("template"),
                          remedy=(f"did you mean {near[0]!r}? " if near else "") + f"known: {known}")  # fmt: skip
    if model_type is not None and model_type not in found.models:
        draft.decide("template", "taken with a difference", f"the model is {model_type}, whose own format is trained")
        draft.warn(f"template {name} is for {' and '.join(found.models)}, and the model is {model_type}: LLaMA-Factory "
                   "would train the wrong format; here the model's own is trained")  # fmt: skip
        found = next((t for t in TEMPLATES.values() if model_type in t.models), found)
    elif found.thinks and given.get("enable_thinking") is not False:
        draft.decide("template", "taken with a difference", "no empty thought is put in front of answers")
        draft.warn("template qwen3_vl with enable_thinking (its default) puts <think>\\n\\n</think>\\n\\n before every "
                   "answer and trains it; here it does not. Instruct models want qwen3_vl_nothink")  # fmt: skip
    system(draft, found, folder)
    return found


def system(draft: Draft, template: Template, folder: Path | None) -> None:
    """The system prompt of rows that have none, where it is not what the model's own template writes."""
    given = draft.given
    wanted = given.get("default_system") or template.system
    own = (
        None
        if folder is None or read_json(folder / "config.json").get("model_type") not in FAMILIES
        else (default_system_of(folder))
    )
    if wanted and wanted != own:
        draft.system = wanted
        if not given.has("default_system") and folder is not None:
            draft.warn(f"template {given.get('template')} puts the system prompt {wanted!r} in front, and the model's "
                       f"own chat template {repr(own) if own else 'none'}: LLaMA-Factory's is trained")  # fmt: skip
    elif not wanted and own:
        draft.warn(f"the model's own chat template puts the system prompt {own!r} in front, and template "
                   f"{given.get('template')} none: the model's own is trained")  # fmt: skip
