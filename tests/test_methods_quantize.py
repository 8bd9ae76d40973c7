"""Frozen weights in 4 bits: what they are, how training goes on them, and what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from method_kit import QUIET, gap, last, live, located, lora, resumed, stock_state
from torch import nn

from lensmith.core.errors import ConfigError, ModelError
from lensmith.model.lora import lora_layers
from lensmith.model.options import Quantize
from lensmith.model.quantize import dequantised, is_quantised, quantise, restore
from lensmith.model.tune import count
from lensmith.recipe.check import check
from lensmith.recipe.export import export

CPU, FULL = torch.device("cpu"), torch.float32
NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)  # fmt: skip
"""arXiv 2305.14314, appendix E."""


@pytest.fixture(autouse=True, scope="module")
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 weights, a block each."""
    folder = tiny.make_model(tmp_path_factory.mktemp("base") / "m", "qwen2_5_vl", hidden=64)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 2, 4]  # heads of 16 values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("data"), 12, pictures=3)


def one_layer(out: int, into: int, **options: Any) -> tuple[torch.Tensor, nn.Module]:
    torch.manual_seed(0)
    model = nn.Module()
    model.part = nn.Linear(into, out)
    weight = model.part.weight.detach().clone()
    quantise(model, ["part"], Quantize(**options), FULL, CPU)
    return weight, model


def test_weights_are_the_nearest_of_the_16_values() -> None:
    weight, model = one_layer(96, 128, double=False)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4)
    nearest = values[(blocks / scale)[..., None].sub(values).abs().argmin(-1)] * scale
    back = dequantised(model.part)
    assert (back - nearest.view_as(back)).abs().max() < 1e-6
    assert model.part.weight.dtype == torch.uint8 and model.part.weight.numel() == weight.numel() // 2


@pytest.mark.parametrize("options", [{}, {"double": False}, {"type": "fp4"}])
def test_a_layer_computes_with_what_comes_back(options: dict[str, Any]) -> None:
    weight, model = one_layer(96, 128, **options)
    x, bias = torch.randn(5, 128, requires_grad=True), model.part.bias
    out = model.part(x)
    back = dequantised(model.part)
    assert torch.allclose(out, x @ back.T + bias, atol=1e-5)
    out.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, back.sum(0).expand(5, -1), atol=1e-5)
    assert 0 < (back - weight).abs().mean() < 0.1 * weight.abs().mean() + 0.02
    restore(model)
    assert type(model.part) is nn.Linear and torch.equal(model.part.weight, back) and model.part.bias is bias


def test_weights_that_do_not_come_back_are_told() -> None:
    """bitsandbytes 0.50 on a CPU reads the scales of rows that are no whole blocks wrongly."""
    with pytest.raises(ModelError, match=r"does not give the weights of part \(64 x 32\) back"):
        one_layer(64, 32)


# -- runs ---------------------------------------------------------------------------------------------------------


def test_the_base_is_in_4_bits_and_counts_as_what_it_is(tmp_path: Path, base: Path, data: Path) -> None:
    built = live(located(tmp_path, base, data, tune=lora(quantize={})))
    plain = live(located(tmp_path, base, data, tune=lora()))
    assert count(built.root.model) == count(plain.root.model)
    held = {n for n, m in built.root.model.named_modules() if is_quantised(m)}
    assert held and all(n.startswith("model.language_model.layers.") for n in held)
    assert len(held) == 2 * 7 and all(n.endswith(".base_layer") for n in held)
    assert {p.dtype for n, p in built.optimizer.named} == {FULL}


@pytest.mark.parametrize("preset", ["fp32", "bf16"])
def test_it_learns_and_resumes_to_the_same_bits(tmp_path: Path, base: Path, data: Path, preset: str) -> None:
    over: dict[str, Any] = {"tune": lora(quantize={}, dropout=0.1), "precision": {"preset": preset}}
    run = located(tmp_path / "learn", base, data, train={"max_steps": 12}, **over)
    losses = runs.quiet_train(run).summary["losses"]
    assert losses[-1] < losses[0] - 0.1
    assert resumed(tmp_path, base, data, 4, 2, evaluate={}, **over)


def test_evaluation_does_not_touch_the_weights(tmp_path: Path, base: Path, data: Path) -> None:
    """bitsandbytes would pack them anew for inference."""
    built = live(located(tmp_path, base, data, tune=lora(quantize={})))
    layer = next(m for m in built.root.model.modules() if is_quantised(m))
    before = layer.weight.data.clone()
    built.root.eval()
    with torch.no_grad():
        layer(torch.randn(3, layer.in_features))
    assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("init", ["default", "loftq"])
def test_the_merged_model_is_the_one_that_trained(tmp_path: Path, base: Path, data: Path, init: str) -> None:
    run = located(tmp_path / "run", base, data, tune=lora(quantize={}, init=init))
    runs.quiet_train(run)
    built = live(run, last(tmp_path / "run"))
    wanted = stock_state(base)
    for name, layer in lora_layers(built.root.model):
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        wanted[f"{name}.weight"] = (dequantised(layer.base_layer) + product).detach()
    out = export(run.output, tmp_path / "out", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert gap(stock_state(out), wanted) < 1e-5
    adapter = last(run.output) / "model"
    assert json.loads((adapter / "quantization.json").read_text()) == {
        "bits": 4, "type": "nf4", "double": True, "parts": ["language"],
    }  # fmt: skip
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 4


def test_stock_peft_over_a_base_in_4_bits(tmp_path: Path, base: Path, data: Path) -> None:
    """The published adapter is the one that trained, for whoever loads the base in 4 bits as QLoRA's users do."""
    from peft import PeftModel

    from lensmith.model.lora import peft_is_quiet
    from lensmith.recipe.export import _as_quantised  # the weights as they come back

    run = located(tmp_path / "run", base, data, tune=lora(quantize={}))
    runs.quiet_train(run)
    from method_kit import stock

    model = stock(base)
    _as_quantised(model, base, Quantize())
    with peft_is_quiet():
        merged = PeftModel.from_pretrained(model, str(last(run.output) / "model")).merge_and_unload()
    out = export(run.output, tmp_path / "out", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert gap(stock_state(out), dict(merged.state_dict())) < 1e-5


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_loftq_begins_nearer_to_the_base(tmp_path: Path, base: Path, data: Path, alpha: float) -> None:
    """By the best product of that rank (PEFT's own decomposition), whatever the scale."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    built = live(located(tmp_path, base, data, tune=lora(quantize={}, init="loftq", alpha=alpha)))
    weights = stock_state(base)
    for name, layer in lora_layers(built.root.model):
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        lost = weights[f"{name}.weight"] - dequantised(layer.base_layer)
        theirs = _low_rank_decomposition(lost, reduced_rank=4)
        assert (product - theirs["L"] @ theirs["R"]).abs().max() < 1e-5
        assert (lost - product).norm() < 0.95 * lost.norm()


@pytest.mark.parametrize(("over", "message"), [
    ({"tune": {"init": "pissa"}}, r"tune\.init is pissa and tune\.quantize is set"),
    ({"tune": {"merge": ["x"]}}, r"tune\.merge and tune\.quantize"),
    ({"tune": {"full": ["language"]}}, r"tune\.full and tune\.quantize\.parts both name 'language'"),
    ({"parallel": {"engine": "fsdp2"}}, r"parallel\.engine is fsdp2, and tune\.quantize"),
    ({"parallel": {"engine": "deepspeed"}}, r"parallel\.engine is deepspeed, and tune\.quantize"),
])  # fmt: skip
def test_what_does_not_go_together(tmp_path: Path, base: Path, data: Path, over: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        located(tmp_path, base, data, **over | {"tune": lora(quantize={}) | over.get("tune", {})})


def test_check_says_what_it_cannot_predict(tmp_path: Path, base: Path, data: Path, capsys: Any) -> None:
    from lensmith.report.terminal import Terminal

    check(located(tmp_path, base, data, tune=lora(quantize={})), Terminal("json"))
    assert "memory is not predicted" in capsys.readouterr().out
