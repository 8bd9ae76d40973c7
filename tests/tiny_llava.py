"""Tiny random LLaVA-1.5 and LLaVA-NeXT models as ordinary model folders. No downloads.

The chat templates are those of the published models, in our words.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

TEXTS = [*tiny.TEXTS, "USER: what is it? ASSISTANT: yes [INST] no [/INST] a red circle"] * 4
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
SIDE, PATCH = 42, 14
PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]

VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() }}: {% endif %}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] ~ ' ' }}{% endgeneration %}{% else %}{{ part['text'] ~ ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% set role = m['role'] %}{% set parts = m['content'] %}"
    "{% if role == 'system' %}{{ '<<SYS>>\n' ~ parts[0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif role == 'user' %}{{ '[INST] ' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif role == 'assistant' %}{{ ' ' ~ parts[0]['text'] + '</s> ' }}"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)
TEMPLATES = {"vicuna": VICUNA, "mistral": MISTRAL}


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    """BPE of SentencePiece's kind, as Llama's: a space in front of every text, bytes for what is unknown."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore
    tok.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [w for text in TEXTS for w in text.split()]
    first = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    tok.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, special_tokens=first, show_progress=False))  # type: ignore
    parsed = json.loads(tok.to_str())
    parsed["added_tokens"] = []
    tok = Tokenizer.from_str(json.dumps(parsed))
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return tok.to_str()


def token_id(name: str) -> int:
    return SPECIAL.index(name)


def config_of(model_type: str, language: str = "llama", **over: Any) -> dict[str, Any]:
    """A config of a few ten thousand parameters: a CLIP tower of 3 x 3 patches."""
    vocab = Tokenizer.from_str(tokenizer_json()).get_vocab_size()
    text = {
        "model_type": language, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 4096,
        "initializer_range": 0.1, "rms_norm_eps": 1e-6, "sliding_window": None, "bos_token_id": token_id("<s>"),
        "eos_token_id": token_id("</s>"), "pad_token_id": token_id("<pad>"),
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 3, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 16,
        "initializer_range": 0.1, "initializer_factor": 5.0,
    }  # fmt: skip
    names = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
    config = {
        "architectures": [names[model_type]], "model_type": model_type, "text_config": text, "vision_config": vision,
        "image_token_index": token_id("<image>"), "projector_hidden_act": "gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    }  # fmt: skip
    return config | ({"image_grid_pinpoints": PINPOINTS} if model_type == "llava_next" else {}) | over


def preprocessor_of(model_type: str) -> dict[str, Any]:
    kind = {"llava": "LlavaImageProcessor", "llava_next": "LlavaNextImageProcessor"}[model_type]
    out = {
        "image_processor_type": kind, "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE},
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "resample": 3, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    return out | ({"image_grid_pinpoints": PINPOINTS, "do_pad": True} if model_type == "llava_next" else {})


def make_model(
    folder: Path, model_type: str = "llava", form: str | None = "vicuna", language: str = "llama", **over: Any
) -> Path:
    """A model folder as a user has it; `form` None: without a chat template."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_settings(folder, config_of(model_type, language, **over), preprocessor_of(model_type))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name, p in model.named_parameters():  # biases and norms away from their trivial initial values
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    if form is not None:
        (folder / "chat_template.jinja").write_text(TEMPLATES[form], encoding="utf-8")
    return folder


def write_settings(folder: Path, config: dict[str, Any], preprocessor: dict[str, Any]) -> Path:
    """What a family needs of a model folder; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>", "model_max_length": 4096,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"eos_token_id": token_id("</s>"), "pad_token_id": token_id("<pad>"), "bos_token_id": token_id("<s>")}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder
