"""A tiny MiniCPM-V-2 learns the quickstart task: a base on captions, then questions by full tuning and LoRA in bf16.

    pip install -e ".[quickstart]"
    python benchmarks/minicpm_v_quickstart.py FOLDER

The base is made as that of the quickstart (lensmith/quickstart/base.py), from a random model of the published form: the
SigLIP tower, the resampler with 16 queries, the language model with its three multipliers. About three quarters of an
hour on one core; a second call goes on where the first stopped. Prints the held-out figures as JSON; docs/log.md has
those so far.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lensmith.model.minicpm_v import MiniCPMV, MiniCPMVConfig
from lensmith.quickstart import base, easy_vqa
from lensmith.recipe.train import train
from lensmith.report.terminal import Terminal

CONTROL = ("<unk>", "<s>", "</s>", "<image>", "</image>", "<slice>", "</slice>")
STAGES = {
    "names": {"epochs": 9.0, "schedule": {"kind": "cosine", "warmup_steps": 50, "final": 0.6}, "lr": 1.5e-3},
    "sentences": {"epochs": 15.0, "schedule": {"kind": "cosine", "warmup_steps": 50}, "lr": 1.3e-3},
}
"""Both take about twice as many steps as in the base of the quickstart: the resampler learns where to look."""
TUNE: dict[str, list[str]] = {
    "full": ["tune=full", "train.epochs=3", "optimizer.lr=1e-3", "optimizer.parts={vision: {lr: 3e-4}}"],
    "lora": ["tune={kind: lora, rank: 32, parts: [language, projector]}", "train.epochs=3", "optimizer.lr=2e-3"],
}


def random_model(folder: Path, texts: list[str]) -> None:
    """About a million parameters; bfloat16 on disk, as the published one."""
    ids = base.make_tokenizer(folder, [*texts, *["用户", "AI"] * 2000], CONTROL)
    apart(folder / "tokenizer.json")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    config: dict[str, Any] = {
        "architectures": ["MiniCPMV"], "model_type": "minicpmv", "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "dim_model_base": 64, "drop_vision_last_layer": True,
        "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.08, "max_position_embeddings": 1024,
        "max_slice_nums": 9, "mm_use_im_start_end": True, "query_num": 16, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 10000.0, "scale_depth": 1.4, "scale_emb": 12, "scale_resolution": base.SIDE, "slice_mode": True,
        "image_size": base.SIDE, "patch_size": 14, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli", "vocab_size": max(ids.values()) + 1,
        "vision_hidden_size": 96, "vision_num_layers": 4, "vision_num_heads": 4, "vision_intermediate_size": 192,
        "vision_side": 8, "resampler_head_size": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = MiniCPMV._from_config(MiniCPMVConfig.from_pretrained(folder), dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    shown = {"image_processor_type": "MiniCPMVImageProcessor", "norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["</s>"], "pad_token_id": 0}))


def apart(file: Path) -> None:
    """`<` and `>` are tokens of their own, as in the published tokenizer: `<AI>` does not grow into the answer."""
    parsed = json.loads(file.read_text(encoding="utf-8"))
    steps = parsed["pre_tokenizer"]["pretokenizers"]
    steps.insert(0, {"type": "Split", "pattern": {"Regex": "[<>]"}, "behavior": "Isolated", "invert": False})
    file.write_text(json.dumps(parsed, ensure_ascii=False), encoding="utf-8")


def questions(folder: Path, model: Path) -> None:
    """Both ways of tuning, and what they answer."""
    found: dict[str, Any] = {}
    for name, changes in TUNE.items():
        out = folder / name
        out.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            easy_vqa.write_lines(out / "data" / f"{split}.jsonl", easy_vqa.question_rows(split))
        pictures = easy_vqa.pictures("train")[0].path.parents[2]
        template = (Path(base.__file__).parent / "quickstart.yaml").read_text(encoding="utf-8")
        run = out / "run.yaml"
        run.write_text(template.format(model=json.dumps(str(model)), pictures=json.dumps(str(pictures))))
        outcome = train(run, [*changes, "precision.preset=bf16"], terminal=Terminal("quiet"))
        found[name] = outcome.summary["heldout"]
        print(json.dumps({name: found[name]}), flush=True)


def main(folder: Path) -> None:
    questions(folder, base.make(folder / "base", random_model, STAGES))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
