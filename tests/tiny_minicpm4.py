"""Tiny random MiniCPM-V 4.6 and 4.7 models as ordinary model folders, and transformers' processor over them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Tokenizer

NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
SCALE, MOST = 112, 9
"""Side of a slice and most slices: pictures of a few hundred pixels are cut as those of a thousand are."""

TEMPLATE = """\
{%- macro said(content, shows=true) -%}
  {%- if content is string -%}{{ content }}{%- else -%}
    {%- for block in content -%}
      {%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
      {%- if block.type == 'image' and not shows -%}{{ raise_exception('no picture here') }}{%- endif -%}
      {%- if block.type == 'image' -%}<|image_pad|>{%- else -%}{{ block.text }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set found = namespace(question=messages | length) -%}
{%- for m in messages if m.role == 'user' -%}
  {%- set text = said(m.content) | trim -%}
  {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) -%}
    {%- set found.question = messages.index(m) -%}
  {%- endif -%}
{%- endfor -%}
{%- set system = (said(messages[0].content, false) | trim) if messages[0].role == 'system' else none -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' + tools_head -}}
  {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
  {{- tools_tail + ('\\n\\n' + system if system else '') + '<|im_end|>\\n' -}}
{%- elif system is not none -%}
  {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- set text = said(m.content) | trim -%}
  {%- if m.role == 'user' -%}
    {{- '<|im_start|>user\\n' + text + '<|im_end|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif m.role == 'assistant' -%}
    {%- set ns = namespace(reasoning='', answer=text) -%}
    {%- if '</think>' in text -%}
      {%- set ns.reasoning = text.split('</think>')[0].split('<think>')[-1] | trim -%}
      {%- set ns.answer = text.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > found.question -%}{{- '<think>\\n' + ns.reasoning + '\\n</think>\\n\\n' -}}{%- endif -%}
    {{- ns.answer -}}
    {%- for call in m.tool_calls or [] -%}
      {{- ('\\n' if not loop.first else '\\n\\n' if ns.answer | trim else '') + '<tool_call>\\n' -}}
      {{- '<function=' + call.function.name + '>\\n' -}}
      {%- for key, value in call.function.arguments.items() -%}
        {%- set listed = value is mapping or (value is sequence and value is not string) -%}
        {{- '<parameter=' + key + '>\\n' + (value | tojson if listed else value | string) + '\\n</parameter>\\n' -}}
      {%- endfor -%}
      {{- '</function>\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n<think>\\n' + ('' if enable_thinking | default(thinks) else '\\n</think>\\n\\n') -}}
{%- endif -%}
"""
"""The form of the published template, in our own words."""


def template(*, thinks: bool = False) -> str:
    from lensmith.family.minicpm_v4_chat import TOOLS_HEAD, TOOLS_TAIL

    given = {"tools_head": TOOLS_HEAD, "tools_tail": TOOLS_TAIL}
    lines = [f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in given.items()]
    return "".join([*lines, f"{{%- set thinks = {str(thinks).lower()} -%}}\n", TEMPLATE])


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    tok = Tokenizer.from_str(tiny.tokenizer_json())
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in list(NAMES.values())[2:]])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return tok.to_str()


def token_id(name: str) -> int:
    found = Tokenizer.from_str(tokenizer_json()).token_to_id(name)
    assert found is not None, name
    return found


def preprocessor_of(mode: str = "16x") -> dict[str, Any]:
    return {
        "image_processor_type": "MiniCPMV4_6ImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 14,
        "scale_resolution": SCALE,
        "max_slice_nums": MOST,
        "slice_mode": True,
        "use_image_id": True,
        "downsample_mode": mode,
    }


def config_of(model_type: str, *, mode: str = "16x", hidden: int = 32, tie: bool = True) -> dict[str, Any]:
    """Two linear-attention layers about one of full attention; a tower of three layers, merged behind the second."""
    vocab = Tokenizer.from_str(tokenizer_json()).get_vocab_size()
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    if model_type == "minicpmv4_7":
        rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        "model_type": "qwen3_5_text", "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": vocab,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "max_position_embeddings": 4096, "initializer_range": 0.1, "rope_parameters": rope,
        "tie_word_embeddings": tie, "eos_token_id": token_id("<|im_end|>"),
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 70, "patch_size": 14, "initializer_range": 0.1,
    }  # fmt: skip
    config = {
        "model_type": model_type, "text_config": text, "vision_config": vision, "insert_layer_id": 1,
        "image_size": SCALE, "downsample_mode": mode, "tie_word_embeddings": tie,
        "image_token_id": token_id("<|image_pad|>"), "video_token_id": token_id("<|video_pad|>"),
    }  # fmt: skip
    if model_type == "minicpmv4_7":
        marks = {f"{n}_id": token_id(NAMES[f"{n}_token"]) for n in
                 ("image_start", "image_end", "slice_start", "slice_end")}  # fmt: skip
        config |= {**marks, "newline_id": token_id("Ċ")}
    return config


def make_model(
    folder: Path, model_type: str = "minicpmv4_6", *, mode: str = "16x", seed: int = 0, tie: bool = True
) -> Path:
    """A model folder as a user has it: config, safetensors, tokenizer, processor, chat template."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_of(model_type, mode=mode, tie=tie)))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "A_log" in name:  # slow decay, so that a state reaches over many tokens
                p.copy_(torch.rand_like(p) * 2 - 3)
            elif p.ndim == 1:  # biases and norms away from their trivial initial values
                around = 1.0 if "norm" in name and "vision" in name else 0.0
                p.copy_(torch.randn_like(p) * 0.1 + around)
            elif "vit_merger" in name or "merger.mlp" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template(), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_of(mode)))
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "model_max_length": 4096, "extra_special_tokens": NAMES,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    stops = [token_id("<|endoftext|>"), token_id("<|im_end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "pad_token_id": stops[0]}))
    return folder


def processor_of_images(mode: str = "16x") -> Any:
    """transformers' image processor, without torchvision."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil(downsample_mode=mode)


def processor_of(folder: Path) -> Any:
    """transformers' processor of the folder's kind, without a video processor: those need torchvision."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
    from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
    from transformers.models.minicpmv4_7.processing_minicpmv4_7 import MiniCPMV4_7Processor

    config = json.loads((folder / "config.json").read_text())
    kind = MiniCPMV4_7Processor if config["model_type"] == "minicpmv4_7" else MiniCPMV4_6Processor

    class WithoutVideos(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
            return type(value)

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings.pop("image_processor_type")
    images = MiniCPMV4_6ImageProcessorPil(**settings)
    videos = SimpleNamespace(slice_mode=True, downsample_mode="16x")
    return WithoutVideos(images, videos, AutoTokenizer.from_pretrained(folder))
