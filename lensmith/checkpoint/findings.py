"""What can be wrong with the files, the layers and the adapter of a folder. Types are compared in `inspect.py`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lensmith.checkpoint.headers import Contents, Tensor

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
WEIGHT_PICKLES = ("pytorch_model", "model", "adapter_model", "consolidated")
_LAYER = re.compile(r"((?:.+?\.)?(?:layers?|blocks))\.(\d+)\.(.+)")
SHOWN = 5
FLAT = ("minicpmv",)
"""Model types whose config has no sub-configs."""


@dataclass(frozen=True)
class Finding:
    """`code` is stable: scripts can match it."""

    code: str
    severity: Literal["error", "warning"]
    what: str
    why: str
    remedy: str


def error(code: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(code, "error", what, why, remedy)


def warning(code: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(code, "warning", what, why, remedy)


def some(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# -- files ------------------------------------------------------------------------------------------------------------


def file_findings(contents: Contents) -> list[Finding]:
    """Of the weight files, the index and what belongs beside them."""
    found = _weights(contents) + _index(contents) + _beside(contents) + _pickles(contents)
    if contents.config_error:
        name = "adapter_config.json" if contents.adapter else "config.json"
        found.append(
            error(
                "CONFIG",
                f"{name} {contents.config_error}",
                "nothing loads without it",
                "copy it from the base model or from where the folder was made",
            )
        )
    return found if contents.adapter else found + _companions(contents)


def _weights(contents: Contents) -> list[Finding]:
    again = "copy the folder again from where it was made, or use an earlier checkpoint"
    found = [
        error("HEADER", f"{name}: {reason}", "the file is cut off or damaged; no loader reads it", again)
        for name, reason in contents.unreadable.items()
    ]
    if contents.missing:
        found.append(
            error(
                "SHARD_MISSING",
                f"the index names files that are not there: {some(list(contents.missing))}",
                "their tensors are missing",
                again,
            )
        )
    if not contents.files:
        found.append(
            error(
                "WEIGHTS",
                "no .safetensors file",
                "there is nothing that can be read without running code",
                "convert the weights to safetensors with the tool that made them",
            )
        )
    names = Counter(t.name for t in contents.tensors)
    if twice := [name for name, count in names.items() if count > 1]:
        found.append(
            error(
                "DUPLICATE_TENSOR",
                f"in more than one file: {some(twice)}",
                "which one is loaded depends on the loader",
                again,
            )
        )
    return found


def _index(contents: Contents) -> list[Finding]:
    found: list[Finding] = []
    again = "write the folder again with the tool that made it, or with lensmith export"
    if contents.index_error:
        found.append(
            error(
                "INDEX",
                f"model.safetensors.index.json {contents.index_error}",
                "transformers and vLLM find the tensors by it",
                again,
            )
        )
    elif contents.index is None and len(contents.files) > 1:
        found.append(
            error(
                "INDEX",
                f"{len(contents.files)} weight files and no model.safetensors.index.json",
                "transformers does not find the tensors",
                again,
            )
        )
    elif contents.index is not None:
        there = {t.name: t.file for t in contents.tensors}
        lost = [
            n
            for n, f in contents.index.items()
            if f not in contents.missing + tuple(contents.unreadable) and there.get(n) != f
        ]
        if lost:
            found.append(
                error(
                    "INDEX",
                    f"the index places tensors where they are not: {some(lost)}",
                    "transformers reports them as missing and fills them with random numbers",
                    again,
                )
            )
        if unnamed := [n for n in there if n not in contents.index]:
            found.append(
                error(
                    "INDEX",
                    f"tensors that the index does not name: {some(unnamed)}",
                    "some loaders pass them over",
                    again,
                )
            )
    return found


def _beside(contents: Contents) -> list[Finding]:
    """Weight files that no index names."""
    found: list[Finding] = []
    if contents.index is not None and "model.safetensors" in contents.beside:
        found.append(
            error(
                "TWO_WEIGHTS",
                "model.safetensors beside shards with an index",
                "transformers loads the one file, vLLM the shards",
                "move the set that is not meant out of the folder",
            )
        )
    elif contents.beside:
        found.append(
            warning(
                "BESIDE",
                f"not part of the model: {some(list(contents.beside))}",
                "vLLM reads every .safetensors file of a folder without an index",
                "move them out of the folder if nothing needs them",
            )
        )
    return found


def _pickles(contents: Contents) -> list[Finding]:
    if not contents.pickles:
        return []
    weights = [n for n in contents.pickles if n.startswith(WEIGHT_PICKLES)]
    why = "opening a pickle runs code that it brings; lensmith never does"
    if weights and not contents.files:
        return [
            error(
                "PICKLED",
                f"the weights are pickled: {some(weights)}",
                why,
                "convert them to safetensors with the tool that made them",
            )
        ]
    return [
        warning(
            "PICKLED",
            f"pickles beside the weights: {some(list(contents.pickles))}",
            why,
            "delete them where the folder is only to be loaded; no loader of the model needs them",
        )
    ]


def _companions(contents: Contents) -> list[Finding]:
    folder, found = contents.folder, list[Finding]()
    base = "copy it from the base model"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        found.append(error("TOKENIZER", "no tokenizer (tokenizer.json)", "vLLM and every chat need it", base))
    sees = any(k.startswith("vision") for k in contents.config)
    if sees and not any((folder / n).is_file() for n in ("preprocessor_config.json", "processor_config.json")):
        found.append(
            error(
                "PROCESSOR",
                "no preprocessor_config.json or processor_config.json",
                "transformers and vLLM refuse pictures without it",
                base,
            )
        )
    if not _has_template(folder):
        found.append(
            warning(
                "CHAT_TEMPLATE",
                "no chat template (chat_template.jinja)",
                "a chat server needs one; without it prompts are written by hand",
                base,
            )
        )
    return found


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


# -- parts and layers -------------------------------------------------------------------------------------------------


def part_findings(contents: Contents, part_of: Callable[[str], str]) -> list[Finding]:
    """The config against names and shapes, of a model whose family is known."""
    found = _sub_configs(contents.config)
    text = contents.config.get("text_config")
    text = text if isinstance(text, dict) else contents.config
    vision = contents.config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    for part, config in (("language", text), ("vision", vision)):
        found += _layers([t.name for t in contents.tensors if part_of(t.name) == part], part, config)
    embedding, head = embedding_and_head(contents, part_of)
    found += _shapes(embedding, head, text)
    tie = tied(contents.config)
    if contents.tensors and embedding is None:
        found.append(
            error(
                "TENSORS_MISSING",
                "no embedding of tokens",
                "transformers fills it with random numbers",
                "use another checkpoint",
            )
        )
    elif tie is False and head is None and contents.tensors:
        found.append(
            error(
                "HEAD",
                "no head, and the config does not tie it to the embedding",
                "transformers fills it with random numbers",
                "set tie_word_embeddings: true in config.json if the base model ties them",
            )
        )
    elif tie and head is not None:
        found.append(
            warning(
                "TIED_TWICE",
                f"{head.name} is stored, and the config ties it to the embedding",
                "its bytes are there twice, and loaders keep one of the two; --values compares them",
                "lensmith export writes it once",
            )
        )
    return found


def _sub_configs(config: dict[str, Any]) -> list[Finding]:
    odd = [k for k in ("text_config", "vision_config") if not isinstance(config.get(k, {}), dict)]
    return [
        error(
            "CONFIG",
            f"config.json: {key} is {json.dumps(config[key])}, not an object",
            "transformers builds a part of its default size in its place",
            "copy it from the base model",
        )
        for key in odd
        if config.get("model_type") not in FLAT
    ]


def tied(config: dict[str, Any]) -> bool | None:
    """Whether the config ties head and embedding; None where it does not say."""
    text = config.get("text_config")
    said = [c["tie_word_embeddings"] for c in (config, text) if isinstance(c, dict) and "tie_word_embeddings" in c]
    return any(said) if said else None


def embedding_and_head(contents: Contents, part_of: Callable[[str], str]) -> tuple[Tensor | None, Tensor | None]:
    def only(part: str) -> Tensor | None:
        return next((t for t in contents.tensors if part_of(t.name) == part and t.name.endswith(".weight")), None)

    return only("embeddings"), only("head")


def _shapes(embedding: Tensor | None, head: Tensor | None, text: dict[str, Any]) -> list[Finding]:
    said = (text.get("vocab_size"), text.get("hidden_size"))
    return [
        error(
            "SHAPE",
            f"{t.name} has shape {list(t.shape)}, the config says {list(said)} (vocab_size, hidden_size)",
            "transformers refuses it",
            "set vocab_size in config.json to the rows that were saved, or resize the model",
        )
        for t in (embedding, head)
        if t is not None and None not in said and t.shape != said
    ]


def _layers(names: list[str], part: str, config: dict[str, Any]) -> list[Finding]:
    """The stack of layers of a part: as many as the config says, and alike."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if match := _LAYER.match(name):
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    if not stacks:
        return []
    prefix = max(stacks, key=lambda p: len(stacks[p]))
    layers, found = stacks[prefix], list[Finding]()
    count = config.get("num_hidden_layers") or config.get("depth")
    known = isinstance(count, int)
    wanted = set(range(count if known else max(layers) + 1))
    if missing := sorted(wanted - set(layers)):
        of = f"the {count} layers of the config" if known else f"{max(layers) + 1} layers"
        found.append(
            error(
                "LAYERS",
                f"{prefix}: of {of} {_ranges(missing)} are missing",
                "transformers fills them with random numbers",
                "use another checkpoint",
            )
        )
    if extra := sorted(set(layers) - wanted):
        found.append(
            error(
                "LAYERS",
                f"{prefix}: beside the {count} layers of the config there are {_ranges(extra)}",
                "they are not loaded: the model is not the one that was trained",
                f"set the number of layers of the {part} part in config.json",
            )
        )
    kinds = config.get("layer_types") if part == "language" else None
    kinds = kinds if isinstance(kinds, list) and len(kinds) > max(layers) else None
    lost: list[str] = []
    for kind in {kinds[i] if kinds else "" for i in layers}:
        alike = {i: layers[i] for i in layers if not kinds or kinds[i] == kind}
        whole = set[str]().union(*alike.values())
        lost += [f"{prefix}.{i}.{suffix}" for i in alike for suffix in sorted(whole - alike[i])]
    if lost:
        found.append(
            error(
                "TENSORS_MISSING",
                f"layers lack what their neighbours have: {some(lost)}",
                "transformers fills them with random numbers",
                "use another checkpoint",
            )
        )
    return found


def _ranges(numbers: list[int]) -> str:
    """`3, 7 to 9`."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return some([str(a) if a == b else f"{a} to {b}" for a, b in out])


# -- adapters ---------------------------------------------------------------------------------------------------------


def modules_to_save(config: dict[str, Any]) -> list[str]:
    """The names of an adapter's whole modules; one name counts as a list of one."""
    found = config.get("modules_to_save")
    found = [found] if isinstance(found, str) else found
    return [m for m in found if isinstance(m, str)] if isinstance(found, list) else []


def adapter_findings(contents: Contents) -> list[Finding]:
    """The adapter's config against its tensors, and what vLLM refuses of it."""
    config, found = contents.config, list[Finding]()
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        found.append(
            warning(
                "BASE",
                "adapter_config.json names no base model",
                "PEFT asks for it by this name",
                "set base_model_name_or_path",
            )
        )
    elif Path(base).is_absolute() and not Path(base).is_dir():
        found.append(
            warning(
                "BASE",
                f"the base model {base} is not on this machine",
                "PEFT looks for it there",
                "give lensmith export the base with --base, or set base_model_name_or_path",
            )
        )
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    if other := [t.name for t in contents.tensors if ".lora_A" in t.name and t.shape and t.shape[0] not in ranks]:
        found.append(
            error(
                "RANK",
                f"the config says rank {config.get('r')}, otherwise of {some(other)}",
                "PEFT refuses the shapes",
                "restore the adapter_config.json that was saved with it",
            )
        )
    saved = modules_to_save(config)
    if lost := [m for m in saved if not any(f".{m}." in f".{t.name}." for t in contents.tensors)]:
        found.append(
            error(
                "MODULES_TO_SAVE",
                f"modules_to_save names {some(lost)}, of which nothing is saved",
                "PEFT fills them from the base model: what was trained is lost",
                "use another checkpoint",
            )
        )
    refused = [f"modules_to_save ({some(saved)})"] if saved else []
    refused += ["DoRA"] if config.get("use_dora") else []
    refused += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    if refused:
        found.append(
            warning(
                "VLLM_ADAPTER",
                f"vLLM refuses adapters with {' and '.join(refused)}",
                "it only adds low-rank updates",
                "merge it: lensmith export FOLDER OUTPUT",
            )
        )
    return found
