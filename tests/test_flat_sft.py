"""`examples/flat_sft.py`, the same fine-tuning without abstractions, gives the losses of the engine."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import runs
import tiny
import torch

from lensmith.model.tune import peft_is_quiet

FILE = Path(__file__).parents[1] / "examples" / "flat_sft.py"
STEPS, SAMPLES, LR, RANK = 6, 5, 1e-3, 4
ROWS = [
    [("system", "Answer in one word."), ("user", "<image>a picture<image>?"), ("assistant", "red")],
    [("user", "what<image>"), ("assistant", "\n\n a square\n"), ("user", " \nand 中文 😀"), ("assistant", " no")],
    [("user", "yes or no"), ("assistant", "yes")],
]
"""A system prompt, pictures inside a text, tokens that merge across the border of template and content, text only."""


@pytest.fixture(scope="module")
def flat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flat_sft", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 rows, so that steps of 5 run over the border of an epoch: `make_chat`'s and those above."""
    path = tiny.make_chat(tmp_path_factory.mktemp("chat"), 14, pictures=5)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for turns in ROWS:
        marks = sum(text.count("<image>") for _, text in turns)
        messages = [{"role": role, "content": text} for role, text in turns]
        rows.append({"messages": messages, "images": ["images/0.png", "images/3.png"][:marks]})
    images = {len(row.get("images", ())) for row in rows}
    assert images == {0, 1, 2}
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("rank", [0, RANK], ids=["full", "lora"])
def test_losses_equal_the_engines(tmp_path: Path, flat: ModuleType, qwen25: Path, chat: Path, rank: int) -> None:
    """Packed rows, warm-up, cosine and clipping on one side; one sample at a time on the other."""
    tune = {"kind": "lora", "rank": rank} if rank else {"kind": "full"}
    run = runs.located(
        tmp_path / "run", qwen25, chat, tune=tune, optimizer={"kind": "adamw", "lr": LR}, schedule={"kind": "cosine"},
        batch={"samples": SAMPLES}, train={"max_steps": STEPS, "clip_norm": 1.0},
    )  # fmt: skip
    engine = runs.quiet_train(run).summary
    assert engine["samples"]["train"] == 17
    with peft_is_quiet():
        losses = flat.train(qwen25, chat, tmp_path / "tuned", steps=STEPS, samples=SAMPLES, lr=LR, lora=rank)
    assert losses == pytest.approx(engine["losses"], abs=1e-5)
    assert losses[-1] < losses[0]
    assert _weights(qwen25, tmp_path / "tuned", rank) == pytest.approx(
        _weights(qwen25, Path(engine["checkpoint"]) / "model", rank), abs=1e-3
    )


def _weights(base: Path, folder: Path, rank: int) -> dict[str, float]:
    """Norms of the tensors of what was saved, through the library that users load it with."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base if rank else folder, dtype=torch.float32)
    with peft_is_quiet():
        model = PeftModel.from_pretrained(model, str(folder)) if rank else model
    return {name: float(p.detach().norm()) for name, p in model.named_parameters()}


def test_the_file_is_short_and_stands_alone() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in found]
    assert not [name for name in names if name.startswith("lensmith")]


def test_it_runs_from_the_command_line(
    tmp_path: Path,
    flat: ModuleType,
    qwen25: Path,
    chat: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "tuned"
    words = [str(qwen25), str(chat), "--steps", "2", "--samples", "2", "--lr", "1e-4", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["flat_sft.py", *words])
    flat.main()
    assert capsys.readouterr().out.count("loss") == 2
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"} <= {
        p.name for p in output.iterdir()
    }
