"""Tokens added to a model: recognised in data, their rows trained, saved with the model, tied heads still tied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

from lensmith.core.errors import ConfigError
from lensmith.data.tokenizer import TextTokenizer, with_tokens
from lensmith.recipe.build import build
from lensmith.recipe.export import export
from lensmith.recipe.prepare import prepare
from lensmith.report.terminal import Terminal

NEW = ["<loc>", "<loc_long>"]


@pytest.fixture
def located_data(tmp_path: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"where is {w}? <|im_end|>"},
                {"role": "assistant", "content": f"at <loc>{w}<loc_long>."},
            ]
        }
        for w in tiny.WORDS * 2
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_text_gets_the_added_tokens_and_no_others() -> None:
    tok = TextTokenizer(with_tokens(tiny.tokenizer_json(), NEW), NEW)
    ids, starts, _ = tok.plain("a <loc_long>é<loc><|im_end|>")
    assert ids.tolist().count(tok.added["<loc_long>"]) == ids.tolist().count(tok.added["<loc>"]) == 1
    assert tok.added["<|im_end|>"] not in ids.tolist()
    assert tok.decode(ids.tolist()) == "a <loc_long>é<loc><|im_end|>"
    assert "a <loc_long>é<loc><|im_end|>"[starts[ids.tolist().index(tok.added["<loc>"])] :].startswith("<loc>")


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tune", [{"kind": "lora", "rank": 4}, {"kind": "full"}], ids=["lora", "full"])
def test_their_rows_train_and_are_saved(tmp_path: Path, located_data: Path, tune: dict[str, Any], tie: bool) -> None:
    from transformers import AutoModelForImageTextToText

    base = tiny.make_model(tmp_path / "base", tie=tie, vocab=TextTokenizer(tiny.tokenizer_json()).num_ids)
    over: dict[str, Any] = {"tune": tune, "model": {"add_tokens": NEW}, "train": {"max_steps": 8}}
    before = build(prepare(runs.located(tmp_path / "x", base, located_data, **over), Terminal("quiet")))
    rows = TextTokenizer(with_tokens(tiny.tokenizer_json(), NEW)).num_ids
    start = before.root.model.get_input_embeddings().weight.detach().clone()
    assert start.shape[0] == rows
    out = runs.quiet_train(runs.located(tmp_path / "run", base, located_data, **over))
    assert out.summary["losses"][-1] < out.summary["losses"][0]
    export(out.folder, tmp_path / "model", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=Terminal("quiet"))
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    ids = [TextTokenizer.from_folder(tmp_path / "model").control(t) for t in NEW]
    end = model.get_input_embeddings().weight
    assert end.shape[0] == rows == model.config.text_config.vocab_size
    assert (end[ids] - start[ids]).abs().max() > 1e-4
    if tune["kind"] == "lora":
        old = [i for i in range(rows) if i not in ids]
        assert torch.equal(end[old], start[old])
    assert (model.get_output_embeddings().weight is end) == tie


def test_a_token_that_is_there_keeps_its_row(tmp_path: Path, qwen25: Path, located_data: Path) -> None:
    over: dict[str, Any] = {"tune": {"kind": "full"}, "model": {"add_tokens": ["<tool_call>", "<loc>"]}}
    names = TextTokenizer.from_folder(qwen25).added
    there = names["<tool_call>"]
    plain = build(prepare(runs.located(tmp_path / "a", qwen25, located_data), Terminal("quiet")))
    grown = build(prepare(runs.located(tmp_path / "b", qwen25, located_data, **over), Terminal("quiet")))
    before = plain.root.model.get_input_embeddings().weight
    assert torch.equal(grown.root.model.get_input_embeddings().weight[there], before[there])


def test_frozen_rows_are_refused(tmp_path: Path, qwen25: Path, located_data: Path) -> None:
    run = runs.located(
        tmp_path / "run",
        qwen25,
        located_data,
        model={"add_tokens": NEW},
        tune={"kind": "freeze", "train": ["language"]},
    )
    with pytest.raises(ConfigError, match="embeddings"):
        build(prepare(run, Terminal("quiet")))
