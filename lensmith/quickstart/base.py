"""How the embedded base model was made: a random tiny Qwen2.5-VL, trained by lensmith on captions of pictures.

    python -m lensmith.quickstart.base FOLDER

makes the tokenizer, the random model and the caption data in FOLDER, runs the ordinary `train` on them twice (about 15
minutes on one core) and writes FOLDER/after-sentences, which is what `lensmith/assets/tiny_vqa` holds. The base has
seen captions of the training pictures only: no question, and none of the held-out pictures.

Short captions that name colour and shape come first: with all sentences from the start, the model learns the
language and never looks at the picture (measured: caption loss stuck at 0.43, 50 % of "is present" right).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lensmith.quickstart import easy_vqa

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 512
SIDE = 112
"""Pictures are enlarged to 112 x 112: 8 x 8 patches, 16 tokens."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STAGES: dict[str, dict[str, Any]] = {
    "names": {"epochs": 4.0, "schedule": {"kind": "cosine", "warmup_steps": 50, "final": 0.6}, "lr": 1.5e-3},
    "sentences": {"epochs": 7.5, "schedule": {"kind": "cosine", "warmup_steps": 50}, "lr": 1.3e-3},
}


def run_file(stage: str, model: Path, roots: list[str], how: dict[str, Any]) -> dict[str, Any]:
    """An ordinary run: continued pretraining of every parameter on one file of captions. `how`: one of `STAGES`."""
    return {
        "model": {"path": str(model)},
        "data": {"train": [{"path": f"{stage}.jsonl", "format": "document"}], "max_tokens": 512, "media_roots": roots},
        "batch": {"samples": 32, "device_tokens": 8192},
        "tune": "full",
        "optimizer": {"lr": how["lr"], "betas": [0.9, 0.95], "weight_decay": 0.05},
        "schedule": how["schedule"],
        "train": {"epochs": how["epochs"], "device": "cpu", "threads": 1, "seed": 0},
        "save": {"every_steps": 500},
        "output": f"run-{stage}",
    }


def make_tokenizer(folder: Path, texts: list[str], control: tuple[str, ...] = CONTROL) -> dict[str, int]:
    """A byte-level BPE of Qwen's kind over the task's words; returns the control ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tok: Any = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), level])
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VOCABULARY - len(control)
    tok.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    )
    tok.add_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return {name: tok.token_to_id(name) for name in control}


def make_random_model(folder: Path, ids: dict[str, int]) -> None:
    """About a million parameters in the architecture and the file layout of Qwen2.5-VL."""
    import torch
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    text = {
        "vocab_size": max(ids.values()) + 1,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1, 2],
        "initializer_range": 0.08,
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1))


def qwen(folder: Path, texts: list[str]) -> None:
    """The random model that the base begins as."""
    make_random_model(folder, make_tokenizer(folder, texts))


def make(
    folder: Path, begin: Callable[[Path, list[str]], None] = qwen, stages: dict[str, dict[str, Any]] | None = None
) -> Path:
    """Everything, in `folder`; goes on where it stopped when run again. Returns the base model's folder.

    `begin` makes the random model in a folder, with a tokenizer for the texts; `stages`: `STAGES` if left out.
    """
    import yaml

    from lensmith.recipe.export import export
    from lensmith.recipe.train import train
    from lensmith.report.terminal import Terminal

    folder = folder.resolve()
    pictures = easy_vqa.pictures("train")
    if not (folder / "random").is_dir():
        rng = random.Random(1)
        texts = [t for p in pictures for q, a in p.questions for t in (q, a, f"{a}.", f" {a}")]
        texts += [
            easy_vqa.caption(k, rng) for p in pictures for _ in range(4) if (k := easy_vqa.facts(p)).colour or k.shape
        ]
        texts += ["user\n", "assistant\n", "system\n"] * 2000
        begin(folder / "random", texts)
        easy_vqa.write_lines(folder / "names.jsonl", easy_vqa.name_rows("train", 2, folder / "mirrored"))
        easy_vqa.write_lines(folder / "sentences.jsonl", easy_vqa.caption_rows("train", 6, 2, 0, folder / "mirrored"))
    roots = [str(pictures[0].path.parent), str(folder / "mirrored")]
    model = folder / "random"
    for stage, how in (stages or STAGES).items():
        path = folder / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(run_file(stage, model, roots, how), sort_keys=False))
        train(path)
        model = folder / f"after-{stage}"
        if not model.exists():
            export(
                folder / f"run-{stage}",
                model,
                base=None,
                merge=True,
                dtype=None,
                shard_gb=5.0,
                terminal=Terminal("quiet"),
            )
    return model


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
