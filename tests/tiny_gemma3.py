"""A tiny random Gemma 3 as an ordinary model folder: pictures of 112 pixels and 16 tokens, a window of 10 tokens."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIDE, PER_PICTURE, WINDOW = 112, 16, 10
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
MARKS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
SPACE = "\u2581"
PLAIN = (*("\n" * n for n in range(1, 32)), *(SPACE * n for n in range(2, 32)), "<table>", "</table>", "<td>", "<b>")
"""Added tokens that are no control tokens: the vendor's vocabulary has them as user-defined symbols."""
TEMPLATE = """\
{{- bos_token -}}
{%- set system = messages[0] if messages[0]['role'] == 'system' else none -%}
{%- for m in (messages[1:] if system else messages) -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('user and assistant take turns') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' -}}
    {%- if system and loop.first -%}
        {{- (system['content'] if system['content'] is string else system['content'][0]['text']) + '\\n\\n' -}}
    {%- endif -%}
    {%- if m['content'] is string -%}{{- m['content'] | trim -}}
    {%- else -%}
        {%- for part in m['content'] -%}
            {%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}
            {%- elif part['type'] == 'text' -%}{{- part['text'] | trim -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
"""What the published folders write, in other words."""


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    """A BPE of SentencePiece's kind as transformers converts one: spaces become a letter, bytes stand for what is
    missing, and no word is split off before the merges."""
    split = pre_tokenizers.Split(Regex(rf"\n|{SPACE}?[^{SPACE}\n]+|{SPACE}"), "isolated")
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)  # type: ignore[assignment]
    learner.pre_tokenizer = split  # type: ignore[assignment]
    learner.train_from_iterator(tiny.TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    runs = [p for p in PLAIN if set(p) in ({"\n"}, {SPACE})]
    pieces = [*SPECIAL, *TURNS, *PLAIN, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [p for p in sorted(learned["vocab"], key=learned["vocab"].get) if p not in pieces]
    merges = [(run[:cut], run[cut:]) for run in runs for cut in range(1, len(run)) if run[:cut] in pieces]
    merges = [m for m in merges if m[1] in pieces]
    merges.sort(key=lambda m: (len(m[0]), len(m[1])), reverse=True)
    merges += [(a, b) for a, b in learned["merges"] if a + b not in runs]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", SPACE)  # type: ignore[assignment]
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    tok.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *TURNS)])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in MARKS])
    bos = ("<bos>", vocab["<bos>"])
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])  # type: ignore[assignment]
    return tok.to_str()


def token_id(name: str) -> int:
    return next(t["id"] for t in json.loads(tokenizer_json())["added_tokens"] if t["content"] == name)


def config_of(*, tie: bool = True, window: int = WINDOW) -> dict[str, Any]:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": window,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "vocab_size": Tokenizer.from_str(tokenizer_json()).get_vocab_size(),
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": tie,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": PER_PICTURE,
        "boi_token_index": token_id("<start_of_image>"),
        "eoi_token_index": token_id("<end_of_image>"),
        "image_token_index": token_id("<image_soft_token>"),
        "eos_token_id": [token_id("<eos>"), token_id("<end_of_turn>")],
        "initializer_range": 0.1,
        "tie_word_embeddings": tie,
    }


def make_model(
    folder: Path, *, tie: bool = True, window: int = WINDOW, pan_and_scan: bool = False, seed: int = 0
) -> Path:
    """A model folder as a user has it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_of(tie=tie, window=window)))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name, p in model.named_parameters():  # what begins as zeros would hide mistakes
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if "layer_norm" in name and "bias" not in name else 0.0, 0.2)
        elif "mm_input_projection" in name or "vision_tower" in name:
            torch.nn.init.normal_(p, 0.0, 0.3)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    preprocessor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pan_and_scan": True if pan_and_scan else None,
        "pan_and_scan_min_crop_size": 32 if pan_and_scan else None,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_ratio_to_activate": None,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    kind = {"tokenizer_class": "GemmaTokenizer", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, **names, "extra_special_tokens": extra}))
    ends = {"eos_token_id": [token_id("<eos>"), token_id("<end_of_turn>")], "pad_token_id": 0, "bos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def processor_of(folder: Path) -> Any:
    """transformers' processor over the folder's own files, with the PIL image processor."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    images = Gemma3ImageProcessorPil.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    return Gemma3Processor(images, tokenizer, template, image_seq_length=PER_PICTURE)
