"""From a model folder to its family: one entry per file of families, imported only when asked for."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensmith.core.errors import ModelError
from lensmith.core.sample import Conversation, Image, Message, Text
from lensmith.data.encode import Picture, Piece, Template
from lensmith.data.media import VideoLimits
from lensmith.data.tokenizer import TextTokenizer
from lensmith.family.template import default_system, render_vendor
from lensmith.model.loading import refuse_quantised

if TYPE_CHECKING:
    from lensmith.family.layout import LaidOut
    from lensmith.model.loading import Loading

FAMILIES: dict[str, str] = {
    "qwen2_vl": "lensmith.family.qwen_vl",
    "qwen2_5_vl": "lensmith.family.qwen_vl",
    "qwen3_vl": "lensmith.family.qwen_vl",
    "minicpmv": "lensmith.family.minicpm_v",
    "internvl": "lensmith.family.internvl",
    "gemma3": "lensmith.family.gemma3",
    "minicpmv4_6": "lensmith.family.minicpm_v4",
    "minicpmv4_7": "lensmith.family.minicpm_v4",
    "llava": "lensmith.family.llava",
    "llava_next": "lensmith.family.llava",
    "idefics3": "lensmith.family.idefics3",
    "smolvlm": "lensmith.family.idefics3",
}
"""model_type of config.json -> module with `from_config` and `DEFAULT_SYSTEM`."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder; {} when it is not there. Raises `ModelError` MODEL_FILE where it is no object."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("MODEL_FILE", f"not JSON: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        raise ModelError("MODEL_FILE", f"not a JSON object but a {type(found).__name__}", where=str(path),
                         remedy="copy it from the published model")  # fmt: skip
    return found


def _model_type(config: Mapping[str, Any], folder: Path) -> str | None:
    found = config.get("model_type")
    if found is not None and not isinstance(found, str):
        raise ModelError("MODEL_FILE", f"model_type is {found!r}, not a name", where=str(folder / "config.json"),
                         remedy="copy it from the published model")  # fmt: skip
    return found


def load_family(
    folder: Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    check: bool = True,
    video: VideoLimits | None = None,
) -> Any:
    """The family of the model in `folder`, with its own pixel settings (or the given ones) and default system prompt.

    Raises `ModelError` for an unknown model_type, missing control tokens, or a chat template that does not render or
    differs from the family's on a probe. Without `check` such a template is passed over.
    """
    config = read_json(folder / "config.json")
    model_type = _model_type(config, folder)
    if model_type is None or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError("MODEL_TYPE", f"model_type {model_type!r} is not a known family",
                         where=str(folder / "config.json"),
                         remedy=f"known: {known}; docs/adding_a_family.md shows how to add one")  # fmt: skip
    _check_sub_configs(config, model_type, folder)
    _refuse_experts(config, folder)
    refuse_quantised(config.get("quantization_config"), folder)
    newer = read_json(folder / "processor_config.json")  # transformers 5 reads this one first
    older = read_json(folder / "preprocessor_config.json")
    preprocessor = dict(newer.get("image_processor") or older)
    shown = newer.get("video_processor") or read_json(folder / "video_preprocessor_config.json") or older
    if min_pixels or max_pixels:
        size = dict(preprocessor.get("size") or {})
        size |= {"shortest_edge": min_pixels} if min_pixels else {}
        size |= {"longest_edge": max_pixels} if max_pixels else {}
        preprocessor |= {"size": size, "min_pixels": min_pixels or preprocessor.get("min_pixels"),
                         "max_pixels": max_pixels or preprocessor.get("max_pixels")}  # fmt: skip
    template = vendor_template(folder)
    module = importlib.import_module(FAMILIES[model_type])
    system = _default_system(template, module.DEFAULT_SYSTEM[model_type], check)
    try:
        family = module.from_config({**config, "chat_template": template}, preprocessor, system, shown, video)
    except (KeyError, TypeError, AttributeError) as error:
        found = f"there is no {error}" if isinstance(error, KeyError) else f"a value has the wrong type: {error}"
        raise ModelError("MODEL_FILE", f"not the settings of a {model_type} model: {found}", where=str(folder),
                         remedy="compare config.json and preprocessor_config.json with the published ones",
                         ) from None  # fmt: skip
    if (min_pixels or max_pixels) and family.pixels.max_pixels is None:
        raise ModelError("PIXELS", f"the sizes of pictures are fixed by the grid of family {family.name}",
                         remedy="take data.min_pixels and data.max_pixels out of the run file")  # fmt: skip
    if family.pixels.max_pixels is not None and family.pixels.min_pixels > family.pixels.max_pixels:
        raise ModelError("PIXELS", f"min_pixels {family.pixels.min_pixels} > max_pixels {family.pixels.max_pixels}",
                         remedy="set data.min_pixels and data.max_pixels")  # fmt: skip
    tokenizer = TextTokenizer.from_folder(folder)
    for token in family.control_tokens:
        tokenizer.control(token)
    if template and check:
        _check_template(template, family)
    return family


def _check_sub_configs(config: Mapping[str, Any], model_type: str, folder: Path) -> None:
    """In place of one that is no object transformers builds a part of its default size, of billions of parameters.
    A config class of our own has no sub-configs."""
    if _laid_out(model_type).loading.native is not None:
        return
    for key in ("text_config", "vision_config"):
        if not isinstance(config.get(key, {}), dict):
            raise ModelError("MODEL_FILE", f"{key} is {json.dumps(config[key])}, not an object (wrong type)",
                             where=str(folder / "config.json"), remedy="copy it from the published model")  # fmt: skip


def _refuse_experts(config: Mapping[str, Any], folder: Path) -> None:
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if isinstance(kind, str) and re.search(r"moe|mixtral|gpt_oss", kind):
        raise ModelError("MODEL_FORM", f"its language model, {kind!r}, is a mixture of experts",
                         where=str(folder / "config.json"),
                         remedy="take a dense model of this family; experts are not trained here")  # fmt: skip


def default_system_of(folder: Path) -> str | None:
    """The system prompt that the model's own chat template puts in front, as `load_family` finds it."""
    model_type = read_json(folder / "config.json")["model_type"]
    usual = importlib.import_module(FAMILIES[model_type]).DEFAULT_SYSTEM[model_type]
    return _default_system(vendor_template(folder), usual, check=False)


def part_of_kind(model_type: str) -> Callable[[str], str]:
    """Tensor name -> part, of the family of this model type."""
    return _laid_out(model_type).part_of


def lora_pattern_of(model_type: str, parts: Sequence[str]) -> str:
    """A full-match pattern for the linear layers of `parts`, of the family of this model type."""
    layers = _laid_out(model_type).layout.lora
    return "|".join(f"({pattern})" for part, pattern in layers.items() if part in parts)


def _laid_out(model_type: str) -> type[LaidOut]:
    from lensmith.family.layout import LaidOut

    module = importlib.import_module(FAMILIES[model_type])
    kinds = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, LaidOut) and c is not LaidOut]
    return kinds[0]


def loading_of(folder: Path) -> Loading:
    """How the model in `folder` is built; as transformers builds it where no family knows it."""
    from lensmith.model.loading import Loading

    known = _model_type(read_json(folder / "config.json"), folder) in FAMILIES
    return load_family(folder, check=False).loading if known else Loading()


def _default_system(template: str | None, usual: str | None, check: bool) -> str | None:
    """The system prompt of the model's own template; the family's usual one where no template says."""
    if template is None:
        return usual
    try:
        return default_system(template)
    except ModelError:
        if check:
            raise
        return usual


def vendor_template(folder: Path) -> str | None:
    """The model's own chat template: chat_template.jinja, chat_template.json or tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several by name: tool use apart, in older files
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return None


PROBE = Conversation(
    (
        Message("system", (Text("S "),)),
        Message("user", (Text(" a\n"),)),
        Message("assistant", (Text("\nb\n"),)),
        Message("user", (Text("c "), Image(path="1"), Text("\n"), Image(path="2"))),
        Message("assistant", (Text("d "),)),
    )
)


def _check_template(template: str, family: Any) -> None:
    """Equal text is equal tokens: both are tokenised alike. A picture is one image token before it is expanded."""
    words = "the words of a probe"
    blocks = words not in render_vendor(template, Conversation((Message("user", (Text(words),)),)))
    for conversation, ask in ((PROBE, False), (Conversation(PROBE.messages[:-1]), True)):
        ours = "".join(_as_vendor(piece, family) for piece in family.render(conversation, ask=ask))
        theirs = render_vendor(template, conversation, add_generation_prompt=ask, blocks=blocks)
        if ours != theirs:
            raise ModelError("TEMPLATE", f"the model's chat template renders a probe otherwise than family "
                             f"{family.name}:\n  model:  {theirs!r}\n  family: {ours!r}",
                             remedy="set model.template: force to train on the family's form all the same")  # fmt: skip


def _as_vendor(piece: Piece, family: Any) -> str:
    if isinstance(piece, Picture):
        return family.image_in_template
    if isinstance(piece, Template) and piece.vendor is not None:
        return piece.vendor
    return piece.text  # type: ignore[union-attr]
