"""Continued pretraining, then SFT, against SFT alone: a tiny random model, real pictures, the same budget.

    python benchmarks/cpt_then_sft.py FOLDER --seeds 0 1 2

Every seed begins with its own random Qwen2.5-VL of 1.08 million parameters. Arm A reads documents of the training
pictures, then learns the questions on them. Arm B learns the questions from the first step on. Both train every
parameter. All files and runs stay in FOLDER; what is finished there is not done again. Writes FOLDER/results.json and
FOLDER/cpt_then_sft.png. docs/cpt_then_sft.md tells what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from lensmith.quickstart import base, easy_vqa
from lensmith.recipe.train import train
from lensmith.report.terminal import Terminal

CPT_STEPS, SFT_STEPS, SFT_ONLY_STEPS = 1800, 800, 2000
"""Steps of arm A's two stages and of arm B. A step of documents is cheaper than a step of questions."""
DOCUMENTS_HELD_OUT = 100
CPT_LR, SFT_LR, SFT_ONLY_LR = 1.2e-3, 1.5e-3, 7e-4
"""Arm B has a rate of its own: at 1.5e-3 it answers fewer questions."""
GENTLE = {"vision": {"lr": 2e-4}, "projector": {"lr": 2e-4}}
"""SFT after CPT: at the full rate the tower forgets the shapes while the model still learns what a question is."""
EVALUATE_EVERY = {"cpt": 200, "sft": 100, "sft-only": 200}
GROUPS = {"open": "(?!yes$|no$).*", "yes/no": "yes|no"}
COLOURS = {"A": "#3b82f6", "B": "#f97316"}


@dataclass
class Stage:
    """A finished run: its summary and the records of metrics.jsonl."""

    summary: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def model(self) -> Path:
        return Path(self.summary["checkpoint"]) / "model"

    def evals(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every evaluation."""
        found = [(r["step"], {"loss": r["loss"], **r["metrics"]}[key]) for r in self.records if r["kind"] == "eval"]
        return [(step, value) for step, value in found if value is not None]


# -- data -----------------------------------------------------------------------------------------------------------


def named(split: str) -> list[tuple[str, str]]:
    """(path, "a red circle.") of the pictures whose colour and shape both follow from their questions."""
    found = ((p.path, easy_vqa.facts(p)) for p in easy_vqa.pictures(split))
    return [(str(path), f"a {k.colour} {k.shape}.") for path, k in found if k.colour and k.shape]


def documents(split: str, rounds: int, seed: int) -> Iterator[dict[str, Any]]:
    """Two to six pictures in one text, each followed by its caption. A round uses every picture once."""
    rng = random.Random(seed)
    pictures = named(split)
    for _ in range(rounds):
        rng.shuffle(pictures)
        rest = list(pictures)
        while rest:
            count = rng.randint(2, 6)
            group, rest = rest[:count], rest[count:]
            text = " ".join(f"<image>{caption}" for _, caption in group)
            yield {"images": [path for path, _ in group], "text": text}


def captions(split: str) -> Iterable[dict[str, Any]]:
    return ({"images": [path], "text": f"<image>{caption}"} for path, caption in named(split))


def write_data(folder: Path) -> None:
    files = {
        "documents": documents("train", 4, 1),
        "captions": captions("train"),
        "documents-held-out": documents("test", 1, 0),
        "questions": easy_vqa.question_rows("train"),
        "questions-held-out": easy_vqa.question_rows("test"),
    }
    for name, rows in files.items():
        if not (folder / f"{name}.jsonl").is_file():
            easy_vqa.write_lines(folder / f"{name}.jsonl", rows)


def random_model(folder: Path, seed: int) -> Path:
    """The quickstart's architecture and tokenizer (made from the training pictures' texts), weights of `seed`."""
    if not folder.is_dir():
        rng = random.Random(1)
        pictures = easy_vqa.pictures("train")
        texts = [t for p in pictures for q, a in p.questions for t in (q, a, f"{a}.", f" {a}")]
        known = [k for p in pictures if (k := easy_vqa.facts(p)).colour or k.shape]
        texts += [easy_vqa.caption(k, rng) for k in known for _ in range(4)]
        texts += ["user\n", "assistant\n", "system\n"] * 2000
        unfinished = folder.with_name(f".{folder.name}")
        base.make_random_model(unfinished, base.make_tokenizer(unfinished, texts))
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(unfinished), dtype=torch.float32)
        model.generation_config = GenerationConfig.from_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


# -- runs -----------------------------------------------------------------------------------------------------------


def run_file(model: Path, seed: int, steps: int, lr: float, final: float) -> dict[str, Any]:
    """What all stages share; `train.seed` orders the data."""
    return {
        "model": {"path": str(model)},
        "data": {"media_roots": [str(easy_vqa.pictures("train")[0].path.parents[2])], "max_tokens": 512, "workers": 0},
        "tune": "full",
        "optimizer": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.05},
        "schedule": {"kind": "cosine", "warmup_steps": 30, "final": final},
        "train": {"epochs": None, "max_steps": steps, "device": "cpu", "threads": 1, "seed": seed},
    }


def cpt_file(model: Path, seed: int) -> dict[str, Any]:
    """Documents of several pictures and plain captions, half of the samples each."""
    values = run_file(model, seed, CPT_STEPS, CPT_LR, 0.1)
    values["data"]["train"] = [{"path": f"../{n}.jsonl", "format": "document"} for n in ("documents", "captions")]
    values["data"]["eval"] = [
        {"path": "../documents-held-out.jsonl", "format": "document", "max_samples": DOCUMENTS_HELD_OUT}
    ]
    values["batch"] = {"samples": 4}
    values["evaluate"] = {"every_steps": EVALUATE_EVERY["cpt"]}
    return values


def sft_file(model: Path, seed: int, stage: str) -> dict[str, Any]:
    """The quickstart's run, with every parameter trained: 8 pictures a step with their ten or so questions each."""
    steps, lr = (SFT_STEPS, SFT_LR) if stage == "sft" else (SFT_ONLY_STEPS, SFT_ONLY_LR)
    values = run_file(model, seed, steps, lr, 0.0)
    if stage == "sft":
        values["optimizer"]["parts"] = GENTLE
    values["data"]["train"] = [{"path": "../questions.jsonl"}]
    values["data"]["eval"] = [{"path": "../questions-held-out.jsonl"}]
    values["batch"] = {"samples": 8}
    generate = {"max_new_tokens": 4, "groups": GROUPS, "during": 100}
    values["evaluate"] = {"every_steps": EVALUATE_EVERY[stage], "before": False, "loss": False, "generate": generate}
    return values


def run(folder: Path, stage: str, values: dict[str, Any], terminal: Terminal) -> Stage:
    """Train where FOLDER/STAGE has no summary yet; an interrupted run goes on."""
    path = folder / f"{stage}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**values, "output": stage}, sort_keys=False), encoding="utf-8")
    summary = folder / stage / "summary.json"
    if not summary.is_file():
        train(path, terminal=terminal)
    lines = (folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Stage(json.loads(summary.read_text(encoding="utf-8")), [json.loads(line) for line in lines])


def run_seed(folder: Path, seed: int, terminal: Terminal) -> dict[str, Stage]:
    model = random_model(folder / f"random-{seed}", seed)
    here = folder / f"seed-{seed}"
    cpt = run(here, "cpt", cpt_file(model, seed), terminal)
    return {
        "cpt": cpt,
        "sft": run(here, "sft", sft_file(cpt.model, seed, "sft"), terminal),
        "sft-only": run(here, "sft-only", sft_file(model, seed, "sft-only"), terminal),
    }


def bounds(folder: Path) -> tuple[float, float]:
    """Held-out caption loss of one who sees all, and of one who sees every colour and no shape.

    Neither knows how many pictures a text will have; both know how often each number and each shape comes.
    """
    tokenizer = Tokenizer.from_file(str(next(folder.glob("random-*/tokenizer.json"))))
    train_rows = [*documents("train", 4, 1), *captions("train")]
    lengths = Counter(len(row["images"]) for row in train_rows)
    known = Counter(caption for _, caption in named("train"))
    colours = Counter(caption.split()[1] for _, caption in named("train"))
    tokens, end, shape = 0, 0.0, 0.0
    for row in list(documents("test", 1, 0))[:DOCUMENTS_HELD_OUT]:
        pieces = row["text"].split("<image>")[1:]
        tokens += 1 + sum(len(tokenizer.encode(piece).ids) for piece in pieces)
        end -= math.log(lengths[len(pieces)] / len(train_rows))
        shape -= sum(math.log(known[p.strip()] / colours[p.split()[1]]) for p in pieces)
    return end / tokens, (end + shape) / tokens


# -- results --------------------------------------------------------------------------------------------------------


def arm(stages: list[Stage]) -> dict[str, Any]:
    """Cost of all stages, and the held-out figures of the last. Evaluation is in no cost."""
    after = stages[-1].summary["heldout"]["after"]
    return {
        "all": after["exact_match"],
        "open": after["exact_match/open"],
        "yes/no": after["exact_match/yes/no"],
        "cpu_seconds": sum(s.summary["cpu_seconds"]["train"] for s in stages),
        "steps": sum(s.summary["steps"] for s in stages),
        "tokens": sum(s.summary["tokens"]["total"] for s in stages),
    }


def results(seeds: dict[int, dict[str, Stage]]) -> list[dict[str, Any]]:
    """One row per seed."""
    return [
        {
            "seed": seed,
            "caption_loss": [s["cpt"].summary["heldout"][when]["loss"] for when in ("before", "after")],
            "A": arm([s["cpt"], s["sft"]]),
            "B": arm([s["sft-only"]]),
        }
        for seed, s in seeds.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seeds, then the mean."""

    def mean(name: str, key: str) -> float:
        return sum(row[name][key] for row in rows) / len(rows)

    def cells(name: str, value: Any) -> str:
        rates = [f"{100 * value(name, key):.1f} %" for key in ("all", "open", "yes/no")]
        return " | ".join(rates + [f"{value(name, key):,.0f}" for key in ("steps", "tokens", "cpu_seconds")])

    lines = ["| seed | arm | all | open | yes/no | steps | tokens | CPU-s |", "| --- | --- |" + " ---: |" * 6]
    for row in rows:
        lines += [f"| {row['seed']} | {n} | {cells(n, lambda n, k, r=row: r[n][k])} |" for n in ("A", "B")]
    lines += [f"| mean | {n} | {cells(n, mean)} |" for n in ("A", "B")]
    lines += ["", "| seed | held-out caption loss before | after |", "| --- | ---: | ---: |"]
    lines += ["| {} | {:.3f} | {:.3f} |".format(row["seed"], *row["caption_loss"]) for row in rows]
    return "\n".join(lines)


# -- the figure -----------------------------------------------------------------------------------------------------


def cpu_at(stage: Stage, step: int) -> float:
    """CPU-seconds of training up to a step: the run's total, spread by the wall time of its steps."""
    seconds = list(accumulate(r["step_seconds"] for r in stage.records if r["kind"] == "step"))
    return stage.summary["cpu_seconds"]["train"] * seconds[step - 1] / seconds[-1]


def accuracy(stages: dict[str, Stage], name: str, key: str) -> tuple[list[tuple[float, float]], float]:
    """Points (CPU-seconds since the random model, % right of a part of the held-out questions), and % right of all."""
    last, spent = stages["sft-only"], 0.0
    if name == "A":
        last, spent = stages["sft"], stages["cpt"].summary["cpu_seconds"]["train"]
    *during, (_, after) = last.evals(key)
    return [(spent + cpu_at(last, step), 100 * value) for step, value in during], 100 * after


def mean_curve(curves: list[list[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Means over the seeds of both coordinates, evaluation by evaluation."""
    pairs = [tuple(zip(*together, strict=True)) for together in zip(*curves, strict=True)]
    return [sum(x) / len(x) for x, _ in pairs], [sum(y) / len(y) for _, y in pairs]


def draw_curves(axes: Axes, curves: list[list[tuple[float, float]]], colour: str, label: str, style: str) -> None:
    """Thin lines for the seeds, a thick one for their mean."""
    for curve in curves:
        axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.4, linewidth=0.9, linestyle=style)
    axes.plot(*mean_curve(curves), color=colour, linewidth=2.2, label=label, linestyle=style)


def draw(folder: Path, seeds: dict[int, dict[str, Stage]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [[(float(step), loss) for step, loss in s["cpt"].evals("loss")] for s in seeds.values()]
    draw_curves(left, losses, COLOURS["A"], "held-out documents, mean of the seeds", "-")
    for bound, text, style in zip(
        bounds(folder), ("all seen", "colours seen, shapes guessed"), (":", "--"), strict=True
    ):
        left.axhline(bound, color="gray", linewidth=1, linestyle=style, label=f"{text}: {bound:.3f}")
    left.set_yscale("log")
    left.yaxis.set_major_locator(ticker.FixedLocator([0.1, 0.2, 0.3, 0.5, 1, 2, 5]))
    left.yaxis.set_minor_locator(ticker.NullLocator())
    left.yaxis.set_major_formatter("{x:g}")
    left.set(title="Continued pretraining: held-out caption loss", xlabel="step", ylabel="loss per token")
    for name, label in (("A", "documents, then questions"), ("B", "questions only")):
        for key, what, style, mark in (("exact_match", "all", "-", "o"), ("exact_match/open", "open", "--", "s")):
            found = [accuracy(s, name, key) for s in seeds.values()]
            draw_curves(right, [points for points, _ in found], COLOURS[name], f"{label}: {what}", style)
            for points, after in found:
                right.plot(points[-1][0], after, mark, color=COLOURS[name], markersize=5, markeredgecolor="white")
    right.set(title="Questions: held-out exact match", xlabel="CPU-seconds of training, all stages", ylabel="% right")
    right.set_xlim(left=0)
    for axes, corner in ((left, "upper right"), (right, "lower right")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15)
        axes.legend(fontsize=8, frameon=False, loc=corner)
    figure.savefig(path, dpi=130, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    write_data(folder)
    seeds: dict[int, dict[str, Stage]] = {}
    for seed in arguments.seeds:
        seeds[seed] = run_seed(folder, seed, Terminal("normal"))
        rows = results(seeds)
        (folder / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        draw(folder, seeds, folder / "cpt_then_sft.png")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
