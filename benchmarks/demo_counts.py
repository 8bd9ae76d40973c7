"""LLaMA-Factory's demo run, counted and trained: mllm_demo + identity + alpaca_en_demo on a tiny Qwen2.5-VL.

    python benchmarks/demo_counts.py FOLDER [--train] [--ranks 2]

FOLDER holds mllm_demo.json (with its pictures), identity.json and alpaca_en_demo.json. The model is random and tiny
but has the published 151,936 rows of vocabulary. Checks: 6 + 91 + 999 = 1,096 samples read and trained; with 16
samples a step and 3 epochs 204 steps (`drop`, the published log), 207 (`epoch_end`) and 206 (`carry`, every sample
exactly three times). `--train` also trains all 206 steps and prints the figures of summary.json. `--ranks` trains each
of the three through `lensmith train` and torchrun, with the vocabulary that the tokenizer has, and checks the steps.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny

from lensmith.config.yaml_file import Tree
from lensmith.recipe.prepare import prepare
from lensmith.recipe.run import from_tree
from lensmith.recipe.train import train
from lensmith.report.metrics import read_metrics
from lensmith.report.terminal import Terminal

STEPS = {"drop": 204, "epoch_end": 207, "carry": 206}
ROWS = {"mllm_demo": 6, "identity": 91, "alpaca_en_demo": 999}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def run_values(folder: Path, model: Path, output: Path, partial: str) -> dict:
    """The published settings: LoRA r=8, 16 samples a step, 3 epochs."""
    return {
        "model": {"path": str(model)},
        "data": {
            "train": [
                {
                    "path": str(folder / "mllm_demo.json"),
                    "format": {"kind": "sharegpt", "messages_column": "messages", **TAGS},
                },
                {"path": str(folder / "identity.json"), "format": "alpaca"},
                {"path": str(folder / "alpaca_en_demo.json"), "format": "alpaca"},
            ],
            "max_tokens": 4096,
        },
        "batch": {"samples": 16, "partial": partial, "device_tokens": 4096},
        "tune": {"kind": "lora", "rank": 8},
        "train": {"epochs": 3, "device": "cpu"},
        "output": str(output),
    }


def train_on_ranks(folder: Path, work: Path, ranks: int) -> None:
    """The command as a user gives it, and the steps that it logged."""
    model = tiny.make_model(work / "small", "qwen2_5_vl", max_pixels=12_845_056)
    for partial, steps in STEPS.items():
        output = work / f"ranks-{partial}"
        values = run_values(folder, model, output, partial)
        file = work / f"{partial}.yaml"
        file.write_text(json.dumps(values), encoding="utf-8")
        begin = time.perf_counter()
        command = [sys.executable, "-m", "lensmith", "train", str(file), f"parallel.ranks={ranks}", "--quiet"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        logged = [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "step"]
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        trained = sum(r["samples"] for r in logged)
        assert len(logged) == summary["steps"] == steps, (partial, len(logged))
        assert trained == (3264 if partial == "drop" else 3 * 1096), trained
        print(f"{ranks} ranks, {partial}: {steps} steps, {trained} samples, loss {logged[0]['loss']:.3f} -> "
              f"{logged[-1]['loss']:.3f}, {seconds:.0f} s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--ranks", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = tiny.make_model(work / "model", "qwen2_5_vl", vocab=151_936, max_pixels=12_845_056)
        for partial, steps in STEPS.items():
            located = from_tree(Tree(run_values(arguments.folder.resolve(), model, work / partial, partial)), None)
            prepared = prepare(located, Terminal("quiet"))
            counts = prepared.read.counts()
            per_source = collections.Counter(s for table in prepared.read.ledger() for s in table["source"].to_pylist())
            assert counts["read"] == counts["train"] == 1096, counts
            assert dict(per_source) == ROWS, per_source
            members = collections.Counter(int(m) for step in prepared.plan.steps() for m in step.members)
            assert prepared.plan.num_steps() == steps, (partial, prepared.plan.num_steps())
            assert partial == "drop" or set(members.values()) == {3}
            print(
                f"{partial}: {counts['read']} samples, {steps} steps, each sample {sorted(set(members.values()))} times"
            )
        if arguments.ranks:
            train_on_ranks(arguments.folder.resolve(), work, arguments.ranks)
        if arguments.train:
            outcome = train(from_tree(Tree(run_values(arguments.folder.resolve(), model, work / "run", "carry")), None))
            shown = {k: v for k, v in outcome.summary.items() if k != "losses"}
            print(json.dumps(shown, indent=1))
            print("first and last losses:", outcome.summary["losses"][:2], outcome.summary["losses"][-2:])


if __name__ == "__main__":
    main()
