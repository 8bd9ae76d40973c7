"""What trains: counts of the published models, and full, freeze and LoRA on tiny ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from lensmith.core.errors import ConfigError
from lensmith.family.qwen_vl import QwenVL, from_config
from lensmith.family.registry import load_family
from lensmith.model import precision, tune
from lensmith.model.load import is_tied, load_model
from lensmith.model.options import Freeze, Full, Lora, Precision

PUBLISHED = json.loads((tiny.DATA / "published_configs.json").read_text())

LORA_R8 = {
    # name: trainable with r = 8 on the language model's linear layers, all parameters without adapters
    "Qwen2-VL-7B": (20_185_088, 8_291_375_616),
    "Qwen2.5-VL-7B": (20_185_088, 8_292_166_656),
    "Qwen2.5-VL-3B": (14_966_784, 3_754_622_976),
    "Qwen3-VL-2B": (8_716_288, 2_127_532_032),
    "Qwen3-VL-4B": (16_515_072, 4_437_815_808),
    "Qwen3-VL-8B": (21_823_488, 8_767_123_696),
}


def published(name: str) -> tuple[Any, QwenVL]:
    """The full-size model without memory, and its family."""
    config = dict(PUBLISHED[name])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    return model, from_config(config, {}, None)


@pytest.mark.parametrize("name", LORA_R8)
def test_lora_counts_of_published_models(name: str) -> None:
    model, family = published(name)
    trainable, total = LORA_R8[name]
    assert tune.count(model)[1] == total
    tuned = tune.apply(model, Lora(rank=8), family)
    assert tune.count(tuned.model) == (trainable, total + trainable)
    assert {n.split(".lora_")[0].split(".")[1] for n, _ in tuned.trainable()} == {"language_model"}
    assert all(p.dtype == torch.float32 for _, p in tuned.trainable())
    if name == "Qwen2.5-VL-7B":  # a published LLaMA-Factory log, to the digit
        assert tune.count(tuned.model) == (20_185_088, 8_312_351_744)


def test_lora_count_by_hand() -> None:
    """Qwen2.5-VL-7B: r * (in + out) of q, k, v, o, gate, up and down, in 28 layers."""
    h, kv, inner = 3584, 4 * 128, 18944
    per_layer = 2 * (h + h) + 2 * (h + kv) + 3 * (h + inner)
    assert 8 * per_layer * 28 == LORA_R8["Qwen2.5-VL-7B"][0]


def test_suffixes_alone_would_train_the_vision_mlp() -> None:
    """The trap the anchored pattern is there for: 3,609,600 parameters more."""
    model, family = published("Qwen2.5-VL-7B")
    suffixes = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    assert tune.count(tune.apply(model, Lora(rank=8, pattern=suffixes), family).model)[0] == 23_794_688


def test_parts_of_published_models() -> None:
    """Vision, projector and language of the published models."""
    model, family = published("Qwen2.5-VL-7B")
    sizes: dict[str, int] = dict.fromkeys(["vision", "projector", "language", "embeddings", "head"], 0)
    for name, p in model.named_parameters():
        sizes[family.part_of(name)] += p.numel()
    assert sizes["projector"] == 44_574_464 and sizes["vision"] + sizes["projector"] == 676_550_144
    assert (
        sizes["language"] + sizes["embeddings"] == 7_070_619_136
        and sizes["head"] == sizes["embeddings"] == 152_064 * 3584
    )
    assert len(family.blocks(model, "vision")) == 32 and len(family.blocks(model, "language")) == 28


# -- tiny models --------------------------------------------------------------------------------------------------


@cache
def folder(root: Path, name: str, tie: bool) -> Path:
    return tiny.make_model(root / f"{name}-{tie}", name, tie=tie)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(models: Path, name: str = "qwen2_5_vl", tie: bool = True) -> tuple[Any, Any]:
    path = folder(models, name, tie)
    return load_model(path, torch.float32, torch.device("cpu")), load_family(path)


def trained(tuned: tune.Tuned) -> set[str]:
    return {n for n, _ in tuned.trainable()}


def linear_names(model: nn.Module, inside: str) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and inside in n}


ALL = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", ALL)
def test_lora_by_part_hits_every_linear_layer_of_the_part(models: Path, name: str) -> None:
    for parts, inside in (
        (("language",), "language_model."),
        (("vision",), "visual."),
        (("projector",), "visual.merger."),
    ):
        model, family = load(models, name)
        expected = {n for n in linear_names(model, inside) if family.part_of(n + ".weight") == parts[0]}
        found = {n.split(".lora_")[0] for n in trained(tune.apply(model, Lora(parts=parts), family))}
        assert found == expected, parts
    model, family = load(models, name)
    everything = tune.apply(model, Lora(parts=("language", "vision", "projector")), family)
    assert {n.split(".lora_")[0] for n in trained(everything)} == {
        n
        for n in (x.removesuffix(".base_layer") for x in linear_names(model, ""))
        if "lm_head" not in n and ".lora_" not in n
    }


@pytest.mark.parametrize("name", ALL)
def test_lora_by_default_leaves_vision_alone(models: Path, name: str) -> None:
    model, family = load(models, name)
    names = trained(tune.apply(model, Lora(), family))
    assert names and all(n.startswith("model.language_model.layers.") and ".lora_" in n for n in names)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_" not in n)


def first_lora(tuned: tune.Tuned) -> Any:
    return next(m for m in tuned.model.modules() if hasattr(m, "lora_A"))


def test_lora_scaling(models: Path) -> None:
    model, family = load(models)
    assert first_lora(tune.apply(model, Lora(rank=4), family)).scaling["default"] == 2.0
    model, family = load(models)
    assert first_lora(tune.apply(model, Lora(rank=4, alpha=3), family)).scaling["default"] == 0.75
    model, family = load(models)
    assert first_lora(tune.apply(model, Lora(rank=4, alpha=3, rslora=True), family)).scaling["default"] == 1.5


def test_lora_starts_as_the_base_and_moves_with_its_factor(models: Path) -> None:
    """W x + scale * B A x, with B = 0 at first."""
    model, family = load(models)
    layer = model.model.language_model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    before = layer(x)
    tuned = tune.apply(model, Lora(rank=4, alpha=6), family)
    adapted = tuned.model.model.language_model.layers[0].mlp.up_proj
    assert torch.equal(adapted(x), before)
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
    assert torch.allclose(adapted(x), before + 1.5 * x @ a.T @ b.T, atol=1e-5)


def test_dora(models: Path) -> None:
    """A magnitude per output: its norm over the weight's own, so the start is the base again."""
    model, family = load(models)
    layer = model.model.language_model.layers[0].mlp.up_proj
    x, weight = torch.randn(3, 32), layer.weight.detach().clone()
    before = layer(x)
    tuned = tune.apply(model, Lora(rank=4, dora=True), family)
    magnitudes = {n: p for n, p in tuned.trainable() if "magnitude" in n}
    assert len(magnitudes) == 2 * 7 and all(tune.is_adapter(n) for n in magnitudes)
    name = next(n for n in magnitudes if "layers.0.mlp.up_proj" in n)
    assert torch.allclose(magnitudes[name], weight.norm(dim=1))
    assert torch.allclose(tuned.model.model.language_model.layers[0].mlp.up_proj(x), before, atol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    (Lora(pattern="q_proj"), r"matches none of \d+ linear layers"),
    (Lora(pattern=r".*\.q_porj"), "full module names look like"),
    (Lora(pattern="(["), "not a regular expression"),
    (Lora(pattern=r".*\.norm"), "no linear layer"),
])  # fmt: skip
def test_patterns_that_match_nothing(models: Path, options: Lora, message: str) -> None:
    model, family = load(models)
    with pytest.raises(ConfigError, match=message):
        tune.apply(model, options, family)


def test_lora_on_the_head(models: Path) -> None:
    """A tied head would come untied; one of its own may have an adapter."""
    pattern = r"lm_head|.*\.q_proj"
    model, family = load(models, tie=True)
    with pytest.raises(ConfigError, match="TIED_HEAD"):
        tune.apply(model, Lora(pattern=pattern), family)
    model, family = load(models, tie=False)
    assert not is_tied(model)
    assert any(n.startswith("lm_head.lora_") for n in trained(tune.apply(model, Lora(pattern=pattern), family)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "parts", [("vision",), ("projector",), ("language",), ("embeddings",), ("projector", "language")]
)
def test_freeze_by_part(models: Path, name: str, parts: tuple[Any, ...]) -> None:
    model, family = load(models, name)
    names = trained(tune.apply(model, Freeze(train=parts), family))
    assert names == {n for n, _ in model.named_parameters() if family.part_of(n) in parts}
    assert is_tied(model)


@pytest.mark.parametrize("name", ALL)
def test_parts_are_the_modules_they_name(models: Path, name: str) -> None:
    model, family = load(models, name, tie=False)
    assert all(
        family.part_of(n) in ("vision", "projector", "language", "embeddings", "head")
        for n, _ in model.named_parameters()
    )
    by_part = {
        p: {n for n, _ in model.named_parameters() if family.part_of(n) == p}
        for p in ("projector", "embeddings", "head")
    }
    assert by_part["projector"] == {f"model.visual.merger.{n}" for n, _ in model.model.visual.merger.named_parameters()}
    assert by_part["embeddings"] == {"model.language_model.embed_tokens.weight"} and by_part["head"] == {
        "lm_head.weight"
    }


def test_freeze_by_layers(models: Path) -> None:
    def layers(tune_options: Freeze) -> set[str]:
        model, family = load(models)
        names = trained(tune.apply(model, tune_options, family))
        return {".".join(n.split(".")[1:4]) for n in names}

    text = "language_model.layers."
    assert layers(Freeze(first_layers=1)) == {text + "0"}
    assert layers(Freeze(last_layers=1)) == {text + "1"}
    assert layers(Freeze(first_layers=1, last_layers=1)) == layers(Freeze(last_layers=2)) == {text + "0", text + "1"}
    with pytest.raises(ConfigError, match=r"tune\.last_layers is 9; 'language' has 2 layers"):
        layers(Freeze(last_layers=9))
    assert layers(Freeze(train=("vision",), last_layers=1)) == {"visual.blocks.1"}
    assert layers(Freeze(train=("projector", "language"), last_layers=1)) == {
        "visual.merger.ln_q",
        "visual.merger.mlp",
        text + "1",
    }


def test_freezing_all_but_a_tied_head_names_the_remedy(models: Path) -> None:
    model, family = load(models)
    with pytest.raises(ConfigError, match="name `embeddings`"):
        tune.apply(model, Freeze(train=("head",)), family)
    model, family = load(models, tie=False)
    assert trained(tune.apply(model, Freeze(train=("head",)), family)) == {"lm_head.weight"}


@pytest.mark.parametrize("name", ALL)
def test_full_trains_all_and_keeps_the_tie(models: Path, name: str) -> None:
    model, family = load(models, name)
    tuned = tune.apply(model, Full(), family)
    assert tune.count(model)[0] == tune.count(model)[1] == sum(p.numel() for _, p in tuned.trainable())
    assert trained(tuned) == {n for n, _ in model.named_parameters()} and "lm_head.weight" not in trained(tuned)
    cpu, half = torch.device("cpu"), torch.bfloat16
    precision.cast(model, precision.plan(Precision(preset="bf16-params"), cpu, half), family.part_of)
    assert is_tied(model) and model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_table_of_what_trains(models: Path) -> None:
    model, family = load(models)
    total = tune.count(model)[1]
    tuned = tune.apply(model, Lora(rank=2), family)

    def part_of(name: str) -> str:
        return "adapter" if tune.is_adapter(name) else family.part_of(name)

    rows = {r["part"]: r for r in tune.what_trains(tuned.model, part_of, lambda part: (1e-4, 0.0))}
    assert set(rows) == {"vision", "projector", "language", "embeddings", "adapter"}
    assert sum(r["parameters"] for p, r in rows.items() if p != "adapter") == total
    assert {p for p, r in rows.items() if r["trainable"]} == {"adapter"} and rows["adapter"]["lr"] == 1e-4
    assert rows["adapter"]["trainable"] == rows["adapter"]["parameters"] == tune.count(tuned.model)[0]
