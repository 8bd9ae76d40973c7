"""Does a model folder say what it holds? Findings as data, from headers and JSON; made for folders of any tool.

A finding is an `error` when something disagrees, or when a loader refuses the folder or reads it as something else than
what was written; a `warning` when the folder loads as it says and a reader should know something all the same.
vLLM takes the type of the root config, then of text_config, vision_config and encoder_config, then of the headers
(`_find_dtype`), and runs float32 in bfloat16. flash-attention takes bfloat16 and float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lensmith.checkpoint import headers
from lensmith.checkpoint.findings import (
    Finding,
    adapter_findings,
    embedding_and_head,
    error,
    file_findings,
    part_findings,
    some,
    tied,
    warning,
)
from lensmith.checkpoint.headers import Contents, name_of, read_contents, said_dtypes
from lensmith.model.load import SCALED

NO_ATTENTION = ("embeddings", "head", "projector")
HALVES = (torch.bfloat16, torch.float16)
COVERS = {
    "vision_config": ("vision", "projector"),
    "text_config": ("language", "embeddings", "head"),
    "llm_config": ("language", "embeddings", "head"),
}
"""Sub-config -> the parts of a family whose types it states; every other (sub-)config speaks for all."""


@dataclass(frozen=True)
class Held:
    """What of a part has one type."""

    num_tensors: int
    num_values: int
    num_bytes: int


@dataclass(frozen=True)
class Inspection:
    contents: Contents
    parts: dict[str, dict[torch.dtype, Held]]
    """Part -> type -> how much; in the order of first occurrence."""
    said: dict[str, str]
    """Dotted config key -> the type it names."""
    read_by_vllm: tuple[str, str] | None
    """(type, where it reads it); None where there is nothing to read, and for adapters."""
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """Type -> number of values in it."""
        out: dict[torch.dtype, int] = {}
        for held in self.parts.values():
            for dtype, amount in held.items():
                out[dtype] = out.get(dtype, 0) + amount.num_values
        return out

    @property
    def natural_dtype(self) -> torch.dtype | None:
        """The type the folder is meant to be in. Of one type: that one. Of several: what the config of the language
        model, or else the root, names if there are tensors of it; else that of most values. None without tensors."""
        amounts = self.dtypes
        if len(amounts) < 2:
            return next(iter(amounts), None)
        named = {name_of(d): d for d in amounts}
        for key in ("text_config.dtype", "text_config.torch_dtype", "dtype", "torch_dtype"):
            if self.said.get(key) in named:
                return named[self.said[key]]
        return max(amounts, key=lambda d: amounts[d])


def inspect(
    folder: Path,
    part_of: Callable[[str], str] | None = None,
    *,
    values: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Inspection:
    """Look at a model or adapter folder.

    Args:
        part_of: tensor name -> part, of the family; None where no family knows the model.
        values: also read every value, for those that are not finite. `tick` is called once a tensor.
    """
    contents = read_contents(folder)
    adapter = contents.adapter
    parts = _parts(contents, _adapter_part if adapter else part_of or _prefix)
    said = {} if adapter else said_dtypes(contents.config)
    vllm = None if adapter or contents.config_error else _read_by_vllm(contents, said)
    found = file_findings(contents)
    if contents.config.get("quantization_config"):
        found.append(
            warning(
                "QUANTISED",
                f"config.json has a quantization_config{_scaled_names(contents)}",
                "several types are meant then: types are not compared",
                "compare them with the tool that made it",
            )
        )
    else:
        found += _scaled(contents)
        wrong = _disagreeing(parts, said, part_of is not None)
        meant = bool(said) and not wrong
        found += wrong + _mixed(parts, adapter, meant)
        found += _readers(parts, said, vllm, meant) if not adapter and parts else []
    if adapter:
        found += adapter_findings(contents)
    elif part_of is not None:
        found += part_findings(contents, part_of)
    if values:
        found += _not_finite(contents, tick) + _two_heads(contents, part_of)
    return Inspection(contents, parts, said, vllm, tuple(found))


def _scaled_names(contents: Contents) -> str:
    """`; F8_E4M3 are model.a.weight, model.b.weight`, or nothing."""
    by_code: dict[str, list[str]] = {}
    for t in contents.tensors:
        if t.code.startswith(SCALED):
            by_code.setdefault(t.code, []).append(t.name)
    return "".join(f"; {code} are {some(names)}" for code, names in by_code.items())


def _scaled(contents: Contents) -> list[Finding]:
    names = _scaled_names(contents)
    if not names:
        return []
    return [
        error(
            "QUANTISED",
            f"config.json has no quantization_config{names}",
            "transformers and vLLM take these numbers for the weights, without the scales that belong to them",
            "restore the quantization_config of the tool that made it, or take the model as it was before",
        )
    ]


def _prefix(name: str) -> str:
    """The part of a tensor of a model that no family knows: `visual`, `model.language_model`."""
    pieces = name.split(".")
    return ".".join(pieces[: 2 if pieces[0] in ("model", "module") and len(pieces) > 2 else 1])


def _adapter_part(name: str) -> str:
    return "adapter" if ".lora_" in name else "modules_to_save"


def _parts(contents: Contents, part_of: Callable[[str], str]) -> dict[str, dict[torch.dtype, Held]]:
    out: dict[str, dict[torch.dtype, Held]] = {}
    for tensor, dtype in contents.floats:
        held = out.setdefault(part_of(tensor.name), {})
        before = held.get(dtype, Held(0, 0, 0))
        held[dtype] = Held(
            before.num_tensors + 1,
            before.num_values + tensor.num_bytes // dtype.itemsize,
            before.num_bytes + tensor.num_bytes,
        )
    return out


def _counts(held: Mapping[torch.dtype, Held]) -> str:
    """`float32 in 50 tensors, bfloat16 in 54`."""
    return ", ".join(f"{name_of(d)} in {h.num_tensors:,} tensors" for d, h in held.items())


def _together(parts: Mapping[str, Mapping[torch.dtype, Held]], names: tuple[str, ...]) -> dict[torch.dtype, Held]:
    """What the parts `names` hold; of all parts where none of them is there."""
    chosen = [parts[n] for n in names if n in parts] or list(parts.values())
    out: dict[torch.dtype, Held] = {}
    for held in chosen:
        for dtype, h in held.items():
            b = out.get(dtype, Held(0, 0, 0))
            out[dtype] = Held(b.num_tensors + h.num_tensors, b.num_values + h.num_values, b.num_bytes + h.num_bytes)
    return out


REPAIR = "lensmith inspect FOLDER --repair (--dtype names another type)"


def _mixed(parts: dict[str, dict[torch.dtype, Held]], adapter: bool, meant: bool) -> list[Finding]:
    """Several types in a part, or in the folder; `meant`: every part's own config names its type."""
    found: list[Finding] = []
    for part, held in parts.items():
        if len(held) > 1:
            found.append(
                error(
                    "MIXED_DTYPES",
                    f"part {part} has {_counts(held)}",
                    "a loader that takes the tensors as they are stops at the first product of two types; one that "
                    "converts them pays for the larger one on disk",
                    REPAIR,
                )
            )
    alone = {part: next(iter(held)) for part, held in parts.items() if len(held) == 1}
    if len(set(alone.values())) > 1 and not adapter:
        found.append(
            Finding(
                "MIXED_PARTS",
                "warning" if meant else "error",
                ", ".join(f"{part} is {name_of(dtype)}" for part, dtype in alone.items()),
                "transformers and vLLM load a model in one type: some part is converted at every load, and a loader "
                "that does not stops where the parts meet",
                REPAIR,
            )
        )
    return found


def _disagreeing(parts: dict[str, dict[torch.dtype, Held]], said: dict[str, str], known: bool) -> list[Finding]:
    """Configs that name another type than the tensors they speak for. The root speaks for the parts that have no
    config of their own that names a type, and for the language model."""
    found: list[Finding] = []
    sections = {key.split(".")[0] for key in said if "." in key}
    own = {part for section in sections for part in COVERS.get(section, ())} - set(COVERS["text_config"])
    for key, dtype in said.items():
        covered = COVERS.get(key.split(".")[0], ()) if "." in key else tuple(p for p in parts if p not in own)
        held = _together(parts, covered if known else ())
        if held and {name_of(d) for d in held} != {dtype}:
            about = ", ".join(p for p in covered if p in parts) if known and covered != tuple(parts) else ""
            found.append(
                error(
                    "CONFIG_DTYPE",
                    f"config.json: {key} says {dtype}, the tensors{f' of {about}' if about else ''} are "
                    f"{_counts(held)}",
                    _why_config(key, dtype),
                    REPAIR,
                )
            )
    return found


def _why_config(key: str, dtype: str) -> str:
    if key in ("dtype", "torch_dtype"):
        return f"transformers (dtype auto) and vLLM read this key first: the whole model is loaded as {dtype}"
    half = dtype in {name_of(d) for d in HALVES}
    flash = "" if half else f", and flash-attention refuses {dtype}"
    return f"what builds this part by its own config builds it as {dtype}{flash}"


def _read_by_vllm(contents: Contents, said: dict[str, str]) -> tuple[str, str] | None:
    for section in ("", "text_config.", "vision_config.", "encoder_config."):
        for key in (f"{section}dtype", f"{section}torch_dtype"):
            if key in said:
                return said[key], key
    sizes = {dtype for _, dtype in contents.floats}
    return (name_of(max(sizes, key=lambda d: d.itemsize)), "the headers") if sizes else None


def _readers(
    parts: dict[str, dict[torch.dtype, Held]], said: dict[str, str], vllm: tuple[str, str] | None, meant: bool
) -> list[Finding]:
    found: list[Finding] = []
    all_held = _together(parts, ())
    if not said:
        found.append(
            warning(
                "DTYPE_MISSING",
                "config.json names no dtype",
                "transformers (dtype auto) takes that of the first tensor, vLLM that of the headers",
                REPAIR,
            )
        )
    if vllm is not None and vllm[0] not in {name_of(d) for d in all_held}:
        runs = "bfloat16" if vllm[0] == "float32" else vllm[0]
        found.append(
            error(
                "VLLM_DTYPE",
                f"vLLM reads {vllm[0]} from {vllm[1]} and runs the model in {runs}; "
                f"the tensors are {_counts(all_held)}",
                "it runs in a type that nobody trained or saved",
                REPAIR,
            )
        )
    refused = [p for p, held in parts.items() if p not in NO_ATTENTION and any(d not in HALVES for d in held)]
    if refused:
        some_half = any(d in HALVES for d in all_held)
        found.append(
            Finding(
                "FLASH_ATTENTION",
                "error" if some_half and not meant else "warning",
                f"tensors of {', '.join(refused)} are not bfloat16 or float16",
                "flash-attention refuses them unless they are converted when they are loaded",
                "lensmith inspect FOLDER --repair --dtype bfloat16",
            )
        )
    return found


def _not_finite(contents: Contents, tick: Callable[[], None]) -> list[Finding]:
    bad: dict[str, int] = {}
    for tensor, _ in contents.floats:
        count = sum(
            int((~torch.isfinite(piece)).sum()) for piece in headers.values(contents.folder / tensor.file, tensor)
        )
        if count:
            bad[tensor.name] = count
        tick()
    if not bad:
        return []
    text = some([f"{name} ({count:,})" for name, count in bad.items()])
    return [
        error(
            "NOT_FINITE",
            f"{len(bad):,} tensors hold NaN or infinity: {text}",
            "every output that depends on them is NaN",
            "use an earlier checkpoint",
        )
    ]


def _two_heads(contents: Contents, part_of: Callable[[str], str] | None) -> list[Finding]:
    """A tied head that is stored beside the embedding, and differs from it."""
    pair = embedding_and_head(contents, part_of) if part_of is not None else (None, None)
    one, other = pair
    if one is None or other is None or not tied(contents.config):
        return []
    if (one.shape, one.dtype) == (other.shape, other.dtype):
        streams = (headers.raw_chunks(contents.folder / t.file, t) for t in (one, other))
        if all(a == b for a, b in zip(*streams, strict=True)):
            return []
    return [
        error(
            "TIED_DIFFERS",
            f"{other.name} is not {one.name}, and the config ties them",
            "a loader keeps one of the two, and which one depends on the loader",
            "set tie_word_embeddings: false in config.json if the head was trained on its own",
        )
    ]
