"""Tiny random Idefics3 and SmolVLM models as ordinary model folders. No downloads.

The chat template is that of the published models, in our words.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import AddedToken, Tokenizer

CONTROLS = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|begin_of_text|>",
    "<|end_of_text|>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
)  # fmt: skip
PATCH, SHUFFLE = 14, 2
SIDES = {"idefics3": 60, "smolvlm": 56}
"""60 is not a multiple of the patch: the tower looks at 56 pixels."""
STARTS = {"idefics3": "<|begin_of_text|>", "smolvlm": "<|im_start|>"}


def template(start: str) -> str:
    return start + (
        "{% for m in messages %}{{ m['role'].capitalize() }}:"
        "{% if m['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
        "{{ '<end_of_utterance>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    tok = Tokenizer.from_str(tiny.tokenizer_json())
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROLS])
    return tok.to_str()


def token_id(name: str) -> int:
    found = Tokenizer.from_str(tokenizer_json()).token_to_id(name)
    assert found is not None
    return found


def config_of(model_type: str, **over: Any) -> dict[str, Any]:
    """A config of a few ten thousand parameters: tiles of 4 x 4 patches, 4 tokens."""
    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "vocab_size": Tokenizer.from_str(tokenizer_json()).get_vocab_size(), "initializer_range": 0.1,
        "bos_token_id": token_id(STARTS[model_type]), "eos_token_id": token_id("<end_of_utterance>"),
        "pad_token_id": token_id("<|im_end|>"),
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": SIDES[model_type], "patch_size": PATCH, "initializer_range": 0.1,
    }  # fmt: skip
    names = {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}
    return {
        "architectures": [names[model_type]], "model_type": model_type, "text_config": text, "vision_config": vision,
        "scale_factor": SHUFFLE, "image_token_id": token_id("<image>"), "tie_word_embeddings": False,
    } | over  # fmt: skip


def preprocessor_of(model_type: str) -> dict[str, Any]:
    side, half = SIDES[model_type], [0.5, 0.5, 0.5]
    return {
        "image_processor_type": names_of(model_type)[0], "size": {"longest_edge": 4 * side}, "resample": 1,
        "max_image_size": {"longest_edge": side}, "do_image_splitting": True, "do_convert_rgb": True, "do_pad": True,
        "do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": half, "image_std": half,
    }  # fmt: skip


def names_of(model_type: str) -> tuple[str, str]:
    kind = "Idefics3" if model_type == "idefics3" else "SmolVLM"
    return f"{kind}ImageProcessor", f"{kind}Processor"


def make_model(folder: Path, model_type: str = "smolvlm", **over: Any) -> Path:
    """A model folder as a user has it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_settings(folder, model_type, config_of(model_type, **over), preprocessor_of(model_type))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name, p in model.named_parameters():  # biases and norms away from their trivial initial values
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.1)
        elif "vision_model" in name:
            torch.nn.init.normal_(p, 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def write_settings(folder: Path, model_type: str, config: dict[str, Any], preprocessor: dict[str, Any]) -> Path:
    """What a family needs of a model folder; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template(STARTS[model_type]), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": STARTS[model_type],
        "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>", "model_max_length": 4096,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"eos_token_id": token_id("<end_of_utterance>"), "pad_token_id": token_id("<|im_end|>"),
           "bos_token_id": token_id(STARTS[model_type])}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder
