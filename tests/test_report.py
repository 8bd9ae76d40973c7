"""The reporting part on a made-up run in the style of easy-VQA: what is written, what is shown, what fails safely."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pydantic import TypeAdapter

from lensmith.config.build import build, json_schema
from lensmith.config.part import Part
from lensmith.config.yaml_file import parse_tree
from lensmith.core.errors import ConfigError, DataError
from lensmith.report import plots, tables
from lensmith.report.escape import cell_safe, html_safe, terminal_safe
from lensmith.report.metrics import MetricsWriter, read_metrics
from lensmith.report.page import write_report
from lensmith.report.run_folder import read_ledger
from lensmith.report.sinks import MLflow, SinkConfig, Sinks, TensorBoard, Trackio, WandB, flatten, make_sinks
from lensmith.report.terminal import Terminal

IMG_TAG = "<img src=x onerror=alert(1)>"
END_TAG = "</pre></script><script>alert(1)</script>"
COLORS = ("red", "green", "blue", "yellow", "teal", "brown", "gray", "black")
SHAPES = ("circle", "rectangle", "triangle")


def make_run(folder: Path, steps: int = 40, evil: str = "") -> Path:
    """A finished run; `evil` is put into every text that comes from data."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    _make_metrics(folder, steps, rng, evil)
    _make_ledger(folder, evil)
    _make_samples(folder, rng, evil)
    heldout = {
        "before": {"exact_match": 0.0123, "exact_match/open": 0.0, "exact_match/yes_no": 0.021},
        "after": {"exact_match": 0.8413, "exact_match/open": 0.802, "exact_match/yes_no": 0.868, f"extra{evil}": 1.5},
        "baseline": {"exact_match": 0.4127, "exact_match/open": 0.151, "exact_match/yes_no": 0.598},
        "swapped": {"exact_match": 0.3981, "exact_match/open": 0.142, "exact_match/yes_no": 0.571},
        "n": 9673,
    }
    summary = {
        "name": f"easy-vqa, SmolVLM-256M, LoRA r=8{evil}", "outcome": "finished", "steps": steps, "epochs": 1.0,
        "samples": 38575, "tokens": 3_912_004, "total_seconds": 5312.4, "peak_rss_bytes": 4_812_333_056,
        "tokens_per_second": 736.4, "heldout": heldout,
    }  # fmt: skip
    row = {"tensors": 98, "parameters": 256_484_928, "trainable": 0, "dtype": "bfloat16", "lr": None}
    parts = [
        {"part": "vision", **row, "weight_decay": None},
        {"part": f"projector{evil}", "tensors": 2, "parameters": 7_077_888, "trainable": 7_077_888, "dtype": "float32",
         "lr": 1e-4, "weight_decay": 0.0},
        {"part": "adapter", "tensors": 420, "parameters": 2_441_216, "trainable": 2_441_216, "dtype": "float32",
         "lr": 2e-4, "weight_decay": 0.0},
    ]  # fmt: skip
    totals = {"tensors": 520, "parameters": 266_004_032, "trainable": 9_519_104}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "trains.json").write_text(json.dumps({"rows": parts, "totals": totals}))
    (folder / "versions.json").write_text(json.dumps({"lensmith": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}))
    (folder / "run.yaml").write_text(
        f"model:\n  path: SmolVLM-256M-Instruct\ntune:\n  kind: lora\n  rank: 8\nnote: '{evil}'\nbatch:\n  samples: 16\n"
    )
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"\0" * 5000)
    if evil:
        (folder / f"{evil.replace('/', '')}.txt").write_text("x")
    return folder


def _make_metrics(folder: Path, steps: int, rng: random.Random, evil: str) -> None:
    writer = MetricsWriter(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        done = step / steps
        lr = 2e-4 * min(1, 10 * done) * 0.5 * (1 + math.cos(math.pi * done))
        norm = (0.4 + 2 * math.exp(-8 * done)) * rng.lognormvariate(0, 0.25)
        loss = 0.25 + 3 * math.exp(-9 * done) + 0.12 * rng.random()
        writer.write({
            "kind": "step", "step": step, "loss": math.nan if step == steps // 2 else loss,
            "lr": {"adapter": lr, "projector": lr / 2}, "grad_norm": norm,
            "grad_norm_parts": {"adapter": 0.8 * norm, f"projector{evil}": 0.5 * norm}, "tokens": 1620, "supervised": 48,
            "samples": 16, "tokens_per_second": rng.gauss(740, 25), "samples_per_second": 7.3, "rss_bytes": 4_600_000_000,
            "data_wait_seconds": 0.002, "step_seconds": 2.2, "padding": 0,
        })  # fmt: skip
        if step % (steps // 5) == 0:
            metrics = {"exact_match": 0.9 * done, f"exact_match/open{evil}": 0.8 * done}
            writer.write({"kind": "eval", "step": step, "loss": 0.4 + 2 * math.exp(-9 * done), "metrics": metrics})
            writer.write({"kind": "event", "name": f"checkpoint{evil}", "step": step})
    writer.close()


def _make_ledger(folder: Path, evil: str) -> None:
    rows = [_ledger_row("easy_vqa/train.jsonl", row, "train", "", "") for row in range(300)]
    rows += [_ledger_row("more.jsonl", row, "train", "", "") for row in range(80)]
    rows += [_ledger_row("more.jsonl", 80 + row, "drop", "TOO_LONG", "5,120 tokens > 4,096") for row in range(58)]
    rows += [_ledger_row("more.jsonl", 138, "drop", "IMAGE_MISSING", f"pictures/17.png{evil}")]
    rows += [_ledger_row("more.jsonl", 139, "drop", "IMAGE_BROKEN", '=HYPERLINK("http://x.example","click")')]
    pq.write_table(pa.Table.from_pylist(rows[::-1]), folder / "ledger.parquet")


def _ledger_row(source: str, row: int, verdict: str, reason: str, detail: str) -> dict[str, object]:
    return {
        "source": source, "row": row, "line": row + 1, "origin": f"{source}:{row + 1}", "verdict": verdict, "reason": reason,
        "detail": detail, "tokens": 101, "supervised": 3, "media_tokens": 64, "images": 1,
    }  # fmt: skip


def _make_samples(folder: Path, rng: random.Random, evil: str) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    samples: list[dict[str, object]] = []
    for number in range(11):
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        _draw(folder / f"samples/{number}.png", color, shape, rng)
        samples.append({
            "origin": f"easy_vqa/test.jsonl:{number * 31 + 7}", "question": f"what color is the {shape}?{evil}", "answer": color,
            "before": "The image shows a simple geometric shape on a plain background." + evil,
            "after": f"{color.capitalize()}." if number % 4 else rng.choice(COLORS), "group": "open",
            "image": f"samples/{number}.png",
        })  # fmt: skip
    samples[9]["image"] = "../../etc/passwd.png"
    samples[10]["image"] = None
    (folder / "samples.json").write_text(json.dumps(samples))


def _draw(path: Path, color: str, shape: str, rng: random.Random) -> None:
    image = Image.new("RGB", (64, 64), (rng.randint(228, 255),) * 3)
    x, y, half = rng.randint(18, 46), rng.randint(18, 46), rng.randint(9, 16)
    box = (x - half, y - half, x + half, y + half)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "rectangle":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=color)
    image.save(path)
