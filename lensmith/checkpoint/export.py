"""Model folders that stock transformers, PEFT and vLLM load: dtypes as promised, in every tensor and (sub-)config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lensmith.checkpoint.headers import read_tensors, values
from lensmith.core.errors import RunError
from lensmith.model.adapter_folder import PREFIX
from lensmith.model.lora import Adapted
from lensmith.model.parts import is_adapter
from lensmith.model.precision import PrecisionPlan, part_in, text

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "tokenizer.model",
)  # fmt: skip
"""Files of the base model that belong to every model made from it."""
QUANTIZED = "quantization.json"
"""Beside an adapter: how the base under it was quantised while it trained (`tune.quantize`)."""


@dataclass(frozen=True)
class SavedTypes:
    """In which type each tensor is saved, by its live name or that on disk, and what each sub-config says."""

    root: torch.dtype
    of: Callable[[str], torch.dtype]
    configs: Mapping[str, torch.dtype]

    @staticmethod
    def all(dtype: torch.dtype) -> SavedTypes:
        return SavedTypes(dtype, lambda name: dtype, {})

    @staticmethod
    def planned(plan: PrecisionPlan, part_of: Callable[[str], str]) -> SavedTypes:
        configs = {"text_config": plan.of("language").saved, "vision_config": plan.of("vision").saved}
        return SavedTypes(configs["text_config"], lambda name: plan.of(part_in(part_of, name)).saved, configs)

    def of_config(self, name: str) -> torch.dtype:
        """Of the sub-config of this name; "" is the root."""
        return self.configs.get(name, self.root)


def write_model(
    folder: Path,
    model: Any,
    base: Path,
    types: SavedTypes,
    *,
    shard_gb: float = 5.0,
    pixels: dict[str, int] | None = None,
) -> None:
    """Full weights in the vendor's tensor names and the promised types, with config, tokenizer, processor and pixel
    settings.

    transformers' save_pretrained rewrites only the root dtype and leaves the sub-configs at the load-time one, so a
    model saved in bfloat16 claims a float32 tower (LLaMA-Factory issue 7401): here config and tensors are set together
    and then verified on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _converted(model.state_dict(), types)
    restore = saved_config(model, types)
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=f"{shard_gb}GB", safe_serialization=True)
    finally:
        restore()
    finish_config(folder / "config.json", types)
    carry(folder, base, pixels)
    carry_code(folder, base)
    verify_dtypes(folder, types)


def _converted(state: dict[str, torch.Tensor], types: SavedTypes) -> dict[str, torch.Tensor]:
    """Tensors that share memory (a tied head) share it still, or they would be written twice."""
    done: dict[tuple[int, int], torch.Tensor] = {}
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel())
        if key not in done or done[key].shape != tensor.shape:
            done[key] = tensor.to(types.of(name)) if tensor.is_floating_point() else tensor
        out[name] = done[key]
    return out


def saved_config(model: Any, types: SavedTypes) -> Callable[[], None]:
    """Set root and sub-config dtypes for the time of a save; returns what puts them back."""
    config = model.config
    names = [n for n in getattr(config, "sub_configs", {}) if getattr(config, n, None) is not None]
    configs = {"": config, **{name: getattr(config, name) for name in names}}
    before = [(c, c.dtype) for c in configs.values()]
    for name, c in configs.items():
        c.dtype = types.of_config(name)

    def restore() -> None:
        for c, old in before:
            c.dtype = old

    return restore


def finish_config(path: Path, types: SavedTypes) -> None:
    """save_pretrained sets the root to the dtype of the live model's first parameter, not of the given tensors."""
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = text(types.root)
    for name, sub in config.items():
        if isinstance(sub, dict) and "dtype" in sub:
            sub["dtype"] = text(types.of_config(name))
    config.pop("use_cache", None)
    for sub in config.values():
        if isinstance(sub, dict):
            sub.pop("use_cache", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_adapter(
    folder: Path,
    peft: Any,
    base: Path,
    base_name: str,
    dtype: torch.dtype = torch.float32,
    *,
    revision: str | None = None,
    pixels: dict[str, int] | None = None,
    state: dict[str, torch.Tensor] | None = None,
    adapted: Adapted | None = None,
    quantize: Mapping[str, Any] | None = None,
) -> None:
    """A PEFT adapter folder; its tensors in `dtype` (float32 unless told otherwise). `state`: those of `adapter_state`,
    where they had to be gathered; `adapted`: what trains beside the adapter, and what the weights under it have more
    than `base`; `quantize`: how those were quantised."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {n: t.to(dtype).cpu().contiguous() for n, t in (state or adapter_state(peft, None, adapted)).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = (adapted or Adapted(peft)).published_config()
    config.base_model_name_or_path, config.inference_mode, config.revision = base_name, True, revision
    config.save_pretrained(folder)
    if quantize is not None:
        (folder / QUANTIZED).write_text(json.dumps(quantize, indent=2) + "\n", encoding="utf-8")
    carry(folder, base, pixels)
    verify_dtypes(folder, SavedTypes.all(dtype), config=False)


def adapter_state(
    peft: Any, trained: Mapping[str, torch.Tensor] | None = None, adapted: Adapted | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in PEFT's names, with those of parts that train in full. `trained`: what trains, by
    the model's names, where the model holds only shares of it."""
    from peft import get_peft_model_state_dict

    state = None if trained is None else {PREFIX + name: t for name, t in trained.items()}
    found = get_peft_model_state_dict(peft, state_dict=state, save_embedding_layers=False)
    if trained is None:
        trained = {n: p for n, p in peft.get_base_model().named_parameters() if p.requires_grad}
    found |= {PREFIX + name: t for name, t in trained.items() if not is_adapter(name)}
    found = {n: t.detach() for n, t in found.items()}
    return found if adapted is None else adapted.published_state(found)


def carry(folder: Path, base: Path, pixels: dict[str, int] | None) -> None:
    """Tokenizer, processor, chat template and generation config of the base; `pixels` replaces its pixel limits, in
    `preprocessor_config.json` and in the `processor_config.json` that transformers 5 reads first."""
    for name in CARRIED:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for name, inner in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        settings = config if inner is None else config.get(inner)
        if not pixels or not settings:
            continue
        settings["size"] = {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}
        for key in ("min_pixels", "max_pixels"):
            if key in settings:
                settings[key] = pixels[key]
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def carry_code(folder: Path, base: Path) -> None:
    """The vendor's own code beside full weights, where the base has it: its config names it (`auto_map`), and loaders
    that have no class of their own for this model look for it there. It is copied, not run."""
    for file in sorted(base.glob("*.py")):
        shutil.copyfile(file, folder / file.name)


def verify_dtypes(folder: Path, types: SavedTypes, *, config: bool = True) -> None:
    """Every tensor on disk, and every (sub-)config that names a dtype, must be as promised. Raises `RunError` DTYPE,
    and OVERFLOW where float16, whose largest number is 65,504, did not hold what was saved."""
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in read_tensors(file):
            if tensor.dtype is not None and tensor.dtype != (want := types.of(tensor.name)):
                raise RunError(
                    "DTYPE", f"tensor {tensor.name} was saved as {tensor.dtype}, not {want}", where=str(file)
                )
            if tensor.dtype == torch.float16 and any(bool(piece.isinf().any()) for piece in values(file, tensor)):
                raise RunError("OVERFLOW", f"{tensor.name} has values that float16 does not hold", where=str(file),
                               remedy="use bfloat16 or float32: precision.parts.PART.saved of a run, --dtype of an "
                               "export")  # fmt: skip
    if not config:
        return
    parsed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = {"": parsed, **{k: v for k, v in parsed.items() if isinstance(v, dict)}}
    for name, sub in named.items():
        said = sub.get("dtype") or sub.get("torch_dtype")
        if (said is not None or name == "") and said != text(want := types.of_config(name)):
            raise RunError(
                "DTYPE",
                f"{name or 'config'} says dtype {said}, the tensors are {want}",
                where=str(folder / "config.json"),
            )
