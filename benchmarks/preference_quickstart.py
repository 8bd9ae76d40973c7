"""DPO on honest pairs: right and wrong answers to the quickstart's questions.

    python benchmarks/preference_quickstart.py MODEL_FOLDER OUT [key=value ...]

MODEL_FOLDER: a model that has learnt the quickstart's task, or a part of it (`lensmith quickstart`, then
`quickstart/run/checkpoints/step-.../model`). A pair is a question with its right answer and another one of the same
kind: no for yes, another colour, another shape. 2,000 pairs on the training pictures, 1,000 on others are held out.
Prints preference accuracy (the reward of the right answer is the higher one) and the accuracy of generated answers as
training goes on.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from lensmith.config.yaml_file import dump
from lensmith.quickstart import easy_vqa
from lensmith.recipe.train import train
from lensmith.report.metrics import read_metrics
from lensmith.report.terminal import Terminal

PAIRS = {"train": 2000, "test": 1000}


def wrong(answer: str, rng: random.Random) -> str:
    if answer in ("yes", "no"):
        return "no" if answer == "yes" else "yes"
    others = easy_vqa.COLOURS if answer in easy_vqa.COLOURS else easy_vqa.SHAPES
    return rng.choice([other for other in others if other != answer])


def pair_rows(split: str) -> list[dict[str, Any]]:
    """One question each of as many pictures."""
    rng = random.Random(f"pairs {split}")
    chosen = rng.sample(list(easy_vqa.pictures(split)), PAIRS[split])
    rows: list[dict[str, Any]] = []
    for picture in chosen:
        question, answer = rng.choice(picture.questions)
        message = {"role": "user", "content": f"<image>{question}"}
        rows.append(
            {"messages": [message], "chosen": answer, "rejected": wrong(answer, rng), "images": [str(picture.path)]}
        )
    return rows


def main() -> None:
    model, out, *overrides = sys.argv[1:]
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for split in PAIRS:
        rows = pair_rows(split)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = {
        "model": {"path": str(Path(model).resolve())},
        "objective": {"kind": "dpo", "sft_weight": 1.0},
        "data": {
            "train": {"path": "train.jsonl", "name": "pairs"}, "eval": {"path": "test.jsonl", "name": "held"},
            "media_roots": [str(easy_vqa.pictures("train")[0].path.parents[2])], "max_tokens": 256, "cache": "cache",
        },
        "batch": {"samples": 16, "device_tokens": 2048},
        "tune": {"kind": "lora", "rank": 8},
        "optimizer": {"lr": 6e-4},
        "train": {"epochs": 3.0, "device": "cpu"},
        "evaluate": {"every_steps": 25,
                     "generate": {"max_new_tokens": 4, "groups": {"open": "(?!yes$|no$).*", "yes/no": "yes|no"}}},
        "output": "run",
    }  # fmt: skip
    (folder / "run.yaml").write_text(dump(run), encoding="utf-8")
    train(folder / "run.yaml", overrides, terminal=Terminal("normal"))
    names = (
        "accuracy",
        "margin",
        "reward_chosen",
        "reward_rejected",
        "exact_match",
        "exact_match/open",
        "exact_match/yes/no",
    )
    print(f"{'step':>6} {'loss':>8} " + " ".join(f"{name:>18}" for name in names))
    for record in read_metrics(folder / "run/metrics.jsonl"):
        if record["kind"] == "eval":
            found = " ".join(f"{record['metrics'][name]:18.4f}" for name in names)
            print(f"{record['step']:6} {record['loss']:8.4f} {found}")


if __name__ == "__main__":
    main()
