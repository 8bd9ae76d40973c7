"""What a DPO step costs: with the common prefix computed once or twice, and with the reference asked in each step or
before the first one.

    python benchmarks/dpo_cost.py [--folder DIR]

The model of `memory_check.py` (101 million parameters), LoRA 16, bfloat16, four pairs a step in rows of up to 2,048
tokens; a pair shows a picture of 1,024 patches (256 tokens) with about 150 tokens of prompt text, 100 of each answer.
Each variant in a process of its own with one thread; seconds are processor time of a step behind the first, memory is
the peak above what the imports leave. The pass before training is timed by itself.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import memory_check
import runs
from tiny import WORDS

from lensmith.report.terminal import Terminal

STEPS = 6
VARIANTS = {
    "plain": ("apart", "adapter"),
    "prefix once": ("shared", "adapter"),
    "reference kept": ("apart", "cached"),
    "both": ("shared", "cached"),
}


def make_pairs(folder: Path, count: int = 32) -> Path:
    rng = random.Random(0)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((448, 448)).save(folder / f"pictures/{n}.png")
        words: Callable[[int], str] = lambda k: " ".join(rng.choice(WORDS) for _ in range(k))  # noqa: E731
        row = {"messages": [{"role": "user", "content": f"<image>{words(100)}"}], "chosen": words(60),
               "rejected": words(60), "images": [f"pictures/{n}.png"]}  # fmt: skip
        lines.append(json.dumps(row))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Watching(Terminal):
    def __init__(self) -> None:
        super().__init__("quiet", err=io.StringIO())
        self.seen: list[float] = []

    def event(self, name: str, message: str = "", **fields: Any) -> None:
        if name == "step":
            self.seen.append(time.process_time())


def measure(folder: Path, name: str) -> None:
    import lensmith.recipe.session  # noqa: F401
    from lensmith.data import branches
    from lensmith.recipe.reference import References

    prefix, reference = VARIANTS[name]
    if prefix == "apart":
        branches._shared_prefix = lambda parts: 0
    before, ahead = memory_check.memory("VmRSS"), [0.0]
    complete = References.complete

    def timed(*args: Any) -> None:
        begin = time.process_time()
        complete(*args)
        ahead[0] = time.process_time() - begin

    References.complete = timed
    watching, out = Watching(), Path(tempfile.mkdtemp())
    run = runs.located(
        out / "run", folder / "qwen2_5_vl", folder / "pairs.jsonl",
        objective={"kind": "dpo", "reference": {"kind": reference}},
        tune={"kind": "lora", "rank": 16}, precision={"preset": "bf16"}, batch={"samples": 4, "device_tokens": 2048},
        data={"max_tokens": 1024, "cache": str(out / "cache"), "max_pixels": 448 * 448}, train={"max_steps": STEPS},
        log={"every_steps": 1}, save={"every_minutes": None}, guard={"watch_every": 0, "check_every": 0},
        vision_cache={"enabled": False},
    )  # fmt: skip
    from lensmith.recipe.train import train

    outcome = train(run, terminal=watching)
    step = (watching.seen[-1] - watching.seen[0]) / (len(watching.seen) - 1)
    memory = memory_check.memory("VmHWM") - before
    print(json.dumps({"step": step, "ahead": ahead[0], "memory": memory, "losses": outcome.summary["losses"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args.folder, args.one)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        memory_check.make_base(folder / "qwen2_5_vl", "qwen2_5_vl")
        make_pairs(folder)
        found: dict[str, Any] = {}
        for name in VARIANTS:
            command = [sys.executable, __file__, "--folder", str(folder), "--one", name]
            told = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if told.returncode:
                raise SystemExit(told.stderr[-2000:])
            found[name] = json.loads(told.stdout.splitlines()[-1])
        plain = found["plain"]
        print(f"{'':16} {'s a step':>9} {'':6} {'MiB':>7} {'':6} {'s before':>9}  largest difference of a loss")
        for name, own in found.items():
            apart = max(abs(a - b) for a, b in zip(own["losses"], plain["losses"], strict=True))
            print(f"{name:16} {own['step']:9.2f} {plain['step'] / own['step']:5.2f}x {own['memory'] >> 20:7,} "
                  f"{own['memory'] / plain['memory']:5.2f}x {own['ahead']:9.1f}  {apart:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
