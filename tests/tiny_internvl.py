"""A tiny random InternVL as an ordinary model folder: 56-pixel tiles of four tokens, at most six of a picture."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Tokenizer

SIDE, PER_TILE, MOST_TILES = 56, 4, 6
MARKS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
TEMPLATE = """\
{%- for m in messages -%}
    {{- '<|im_start|>' + m['role'] + '\\n' -}}
    {%- if m['content'] is string -%}{{- m['content'] -}}
    {%- else -%}
        {%- for part in m['content'] -%}
            {%- if part['type'] == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}
            {%- elif part['type'] == 'text' -%}{{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""What the published folders write, in other words."""


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    tokenizer = Tokenizer.from_str(tiny.tokenizer_json())
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in MARKS])
    return tokenizer.to_str()


def token_id(name: str) -> int:
    return next(t["id"] for t in json.loads(tokenizer_json())["added_tokens"] if t["content"] == name)


def config_of(text: str = "qwen2", *, layers: int = 2, tie: bool = True) -> dict[str, Any]:
    language = {
        "model_type": text,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": Tokenizer.from_str(tokenizer_json()).get_vocab_size(),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tie,
        "initializer_range": 0.1,
        "use_sliding_window": False,
        "bos_token_id": tiny.token_id("<|endoftext|>"),
        "eos_token_id": tiny.token_id("<|im_end|>"),
    }
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [SIDE, SIDE],
        "patch_size": [14, 14],
        "attention_bias": True,
        "initializer_range": 0.1,
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": language,
        "vision_config": vision,
        "image_token_id": token_id("<IMG_CONTEXT>"),
        "image_seq_length": PER_TILE,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": tie,
    }


def make_model(folder: Path, text: str = "qwen2", *, layers: int = 2, tie: bool = True, seed: int = 0) -> Path:
    """A model folder as a user has it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_of(text, layers=layers, tie=tie)))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name, p in model.named_parameters():  # what begins as zeros or ones would hide mistakes
        if p.ndim == 1 or "position_embeddings" in name or "cls_token" in name:
            torch.nn.init.normal_(p, 1.0 if "norm" in name and "bias" not in name else 0.0, 0.3)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    preprocessor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "crop_to_patches": False,  # as published; the processor asks for tiles whatever this says
        "min_patches": 1,
        "max_patches": MOST_TILES,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    extra = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    names = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**names, "model_max_length": 4096, "extra_special_tokens": {**extra, "video_token": "<video>"}})
    )
    ends = {"eos_token_id": tiny.token_id("<|im_end|>"), "pad_token_id": tiny.token_id("<|endoftext|>")}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def processor_of(folder: Path) -> Any:
    """transformers' processor over the folder's own files. Its class wants a video processor, which is there only with
    torchvision, so it is built from the parts that pictures need."""
    from transformers import AutoTokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    class Stills(InternVLProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None):
            super().__init__(image_processor, tokenizer, None, image_seq_length=PER_TILE, chat_template=chat_template)

    images = GotOcr2ImageProcessorPil.from_pretrained(folder)
    return Stills(images, AutoTokenizer.from_pretrained(folder), (folder / "chat_template.jinja").read_text())
