"""What is saved loads elsewhere: the adapter in stock PEFT, merged weights in stock transformers, in the asked type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file, save_file

from lensmith.core.errors import ConfigError, ModelError, RunError
from lensmith.model.load import read_header
from lensmith.model.tune import peft_is_quiet
from lensmith.recipe.export import export
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def adapter_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, run folder) of a short LoRA run with DoRA and rsLoRA off and a rate that moves the weights."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny.make_model(folder / "base", request.param)
    data = tiny.make_chat(folder, 12, pictures=3)
    run = runs.located(
        folder / "run", base, data, tune={"kind": "lora", "rank": 4}, optimizer={"kind": "adamw", "lr": 0.01}
    )
    return base, runs.quiet_train(run).folder


def logits(model: Any, folder: Path) -> torch.Tensor:
    """Of one fixed prompt with a picture, through the stock forward."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    inputs: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)([picture], return_tensors="pt")
    num_image = int(inputs["image_grid_thw"].prod()) // 4
    image, start, end = (tiny.token_id(n) for n in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"))
    ids = torch.tensor([[5, 6, start, *[image] * num_image, end, 7, 8, 9]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, mm_token_type_ids=(ids == image).int(), **inputs).logits.float()


def stock(folder: Path, dtype: Any = torch.float32) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def test_merged_weights_are_base_and_adapter(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    base, run = adapter_run
    adapter = export(run, tmp_path / "adapter", base=None, merge=False, dtype=None, shard_gb=5.0, terminal=QUIET)
    merged = export(run, tmp_path / "merged", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    with peft_is_quiet():
        wanted = logits(PeftModel.from_pretrained(stock(base), str(adapter)), base)
    assert (logits(stock(merged), merged) - wanted).abs().max() < 1e-4
    assert (logits(stock(base), base) - wanted).abs().max() > 1e-2
    names = {n for f in merged.glob("*.safetensors") for n in read_header(f)}
    assert names == {n for f in base.glob("*.safetensors") for n in read_header(f)}
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes() or name == "preprocessor_config.json"


def test_types_and_shards(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = adapter_run
    out = export(run, tmp_path / "half", base=None, merge=True, dtype="bfloat16", shard_gb=1e-4, terminal=QUIET)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1 and (out / "model.safetensors.index.json").is_file()
    assert {e["dtype"] for f in files for e in read_header(f).values()} == {"BF16"}
    model = stock(out, "auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config.dtype == model.config.vision_config.dtype == torch.bfloat16


def test_full_weights_load_in_stock_transformers(tmp_path: Path, qwen25: Path) -> None:
    """The live weights of the run and the published folder give the same logits."""
    data = tiny.make_chat(tmp_path, 8, pictures=2)
    out = runs.quiet_train(runs.located(tmp_path / "run", qwen25, data, data={"max_pixels": 40_000}))
    folder = Path(out.summary["checkpoint"]) / "model"
    copied = export(out.folder, tmp_path / "model", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert torch.equal(logits(stock(folder), folder), logits(stock(copied), copied))
    assert (logits(stock(folder), folder) - logits(stock(qwen25), qwen25)).abs().max() > 1e-3
    pixels = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    assert pixels["longest_edge"] == 40_000


def test_refusals(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = adapter_run
    with pytest.raises(ConfigError, match="exists"):
        export(run, tmp_path, base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    with pytest.raises(ConfigError, match="float8"):
        export(run, tmp_path / "x", base=None, merge=True, dtype="float8", shard_gb=5.0, terminal=QUIET)
    with pytest.raises(ModelError, match="neither"):
        export(tmp_path, tmp_path / "x", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    checkpoint = next((run / "checkpoints").glob("step-*"))
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter_config"):
        export(damaged, tmp_path / "x", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*staging"))


@pytest.mark.parametrize(("text", "said"), [("[]", "not a JSON object"), ('{"r": 4}', "names no base model.*--base")])
def test_an_adapter_that_names_no_base(adapter_run: tuple[Path, Path], tmp_path: Path, text: str, said: str) -> None:
    adapter = Path(
        shutil.copytree(next((adapter_run[1] / "checkpoints").glob("step-*")) / "model", tmp_path / "adapter")
    )
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=f"(?s){said}"):
        export(adapter, tmp_path / "x", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)


def test_what_float16_does_not_hold_is_not_published(tmp_path: Path, qwen25: Path) -> None:
    """By an export and by the save of a run; nothing is left behind."""
    base = Path(shutil.copytree(qwen25, tmp_path / "base"))
    state = load_file(base / "model.safetensors")
    name = next(n for n in state if n.endswith("merger.mlp.2.bias"))
    state[name][0] = 1e5
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"OVERFLOW.*{name}"):
        export(base, tmp_path / "x", base=None, merge=True, dtype="float16", shard_gb=5.0, terminal=QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    over: Any = {"tune": {"kind": "freeze", "train": ["language"]}, "train": {"max_steps": 1}}
    saved = {"precision": {"parts": {"projector": {"saved": "float16"}}}}
    run = runs.located(tmp_path / "run", base, tiny.make_chat(tmp_path, 8, pictures=2), **over, **saved)
    with pytest.raises(RunError, match=r"(?s)OVERFLOW.*merger\.mlp\.2\.bias.*saved"):
        runs.quiet_train(run)
    assert not list((run.output / "checkpoints").glob("step-*"))
