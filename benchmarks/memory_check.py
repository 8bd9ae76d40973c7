"""Predicted peak memory of `lensmith check` against the measured one of `lensmith train`, on a CPU.

    python benchmarks/memory_check.py [SETTING ...] [--folder DIR]

A random Qwen2.5-VL (once a Qwen3-VL) of 101 million parameters in bfloat16, conversations of about 200 tokens with and
without pictures in packed rows, three steps and a save. Each measurement is a process of its own: the peak resident
memory (`VmHWM`) less what is resident after everything is imported. The bases are made once in `--folder` (default: a
temporary one).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import runs
import tiny
import torch

from lensmith.recipe.run import Located

BF16 = {"preset": "bf16"}
SETTINGS: dict[str, dict[str, Any]] = {
    "full, fp32": {"precision": {"preset": "fp32"}},
    "full, bf16": {"precision": BF16},
    "full, bf16, recompute": {"precision": BF16, "train": {"recompute": True}, "batch": {"device_tokens": 4096}},
    "full, bf16-params-compensated": {"precision": {"preset": "bf16-params-compensated"}},
    "freeze (language), bf16-params": {
        "precision": {"preset": "bf16-params"},
        "tune": {"kind": "freeze", "train": ["language"]},
        "batch": {"device_tokens": 3072},
    },
    "LoRA, bf16": {"precision": BF16, "tune": {"kind": "lora"}, "batch": {"device_tokens": 4096}},
    "Qwen3-VL, all but the head, bf16": {
        "model": {"path": "qwen3_vl"},
        "precision": BF16,
        "tune": {"kind": "freeze", "train": ["vision", "projector", "language"]},
        "batch": {"device_tokens": 3072},
    },
}


def make_base(folder: Path, model_type: str) -> Path:
    if (folder / "model.safetensors").is_file():
        return folder
    plain = tiny.config_of

    def large(model_type: str, vocab: int, **kwargs: Any) -> dict[str, Any]:
        config = plain(model_type, vocab, **{**kwargs, "hidden": 768, "layers": 10})
        text = config.get("text_config", config)
        text |= {"intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
        text |= {"initializer_range": 0.02}
        text.get("rope_parameters", config.get("rope_scaling"))["mrope_section"] = [8, 12, 12]
        config["vision_config"] |= {"depth": 6, "hidden_size": 256, "intermediate_size": 768}
        return config

    with mock.patch.object(tiny, "config_of", large):
        return tiny.make_model(folder, model_type, dtype=torch.bfloat16, vocab=40_000, max_pixels=(14 * 32) ** 2)


def make_data(folder: Path) -> Path:
    """Conversations with longer answers, so that many positions are supervised."""
    rng = np.random.default_rng(0)
    rows = [json.loads(line) for line in tiny.make_chat(folder, 120, pictures=8).read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = " ".join(rng.choice(tiny.WORDS, 120))
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def located(name: str, folder: Path, output: Path) -> Located:
    over = SETTINGS[name]
    base = folder / over.get("model", {}).get("path", "qwen2_5_vl")
    batch = {"samples": 16, "device_tokens": 2048} | over.get("batch", {})
    train = {"max_steps": 3, "threads": 2} | over.get("train", {})
    same = {"batch": batch, "train": train, "model": {"path": str(base)}, "data": {"cache": str(folder / "cache")}}
    return runs.located(output, base, folder / "long.jsonl", **{**over, **same})


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) << 10


def measure(name: str, folder: Path) -> dict[str, float]:
    """Peak resident bytes of a run above those of the imports."""
    import peft  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401

    import lensmith.recipe.session  # noqa: F401

    base = memory("VmRSS")
    with tempfile.TemporaryDirectory() as output:
        runs.quiet_train(located(name, folder, Path(output)))
    return {"bytes": memory("VmHWM") - base}


def predict(name: str, folder: Path) -> dict[str, float]:
    import time

    from lensmith.recipe import memory as of_run
    from lensmith.recipe.prepare import prepare
    from lensmith.report.terminal import Terminal

    prepared = prepare(located(name, folder, folder / "none"), Terminal("quiet"))
    begin = time.perf_counter()
    found = of_run.predict(prepared, prepared.train, prepared.plan)
    assert found is not None
    peak = found.peak
    return {"bytes": peak.total, "seconds": time.perf_counter() - begin, **peak.kinds, "allocator": peak.allocator}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", choices=["measure", "predict"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = (measure if args.one == "measure" else predict)(args.settings[0], args.folder)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = args.folder or Path(temporary)
        for model_type in ("qwen2_5_vl", "qwen3_vl"):
            make_base(folder / model_type, model_type)
        make_data(folder)
        for name in args.settings:
            results = [_alone(name, folder, what) for what in ("predict", "measure")]
            predicted, measured = (r["bytes"] / 2**20 for r in results)
            kinds = {k: f"{v / 2**20:.0f}" for k, v in results[0].items() if k not in ("bytes", "seconds")}
            off, seconds = 100 * (predicted / measured - 1), results[0]["seconds"]
            figures = f"predicted {predicted:,.0f} MiB in {seconds:.1f} s, measured {measured:,.0f} MiB, {off:+.1f} %"
            print(f"{name}: {figures}; {kinds}", flush=True)


def _alone(name: str, folder: Path, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, name, "--folder", str(folder), "--one", what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
