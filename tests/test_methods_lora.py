"""Ranks, initialisations, adapters that go on or are merged, parts in full: what is trained and what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from method_kit import (
    EXACT,
    QUIET,
    as_published,
    gap,
    last,
    live,
    located,
    lora,
    merged_state,
    resumed,
    stock_state,
    trained,
)
from pydantic import ValidationError

from lensmith.core.errors import ConfigError, ModelError
from lensmith.model.lora import lora_layers
from lensmith.model.options import Lora
from lensmith.recipe.check import check
from lensmith.recipe.export import export
from lensmith.report.terminal import Terminal


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny.make_model(folder / "tied", "qwen2_5_vl", tie=True)
    tiny.make_model(folder / "untied", "qwen2_5_vl", tie=False)
    tiny.make_chat(folder, 12, pictures=3)
    return folder


@pytest.fixture(scope="module")
def data(here: Path) -> Path:
    return tiny.make_chat(here / "data", 12, pictures=3)


# -- ranks --------------------------------------------------------------------------------------------------------


def test_parts_have_their_own_ranks_and_alphas(tmp_path: Path, here: Path, data: Path) -> None:
    options = lora(parts=["language", "vision", "projector"], alpha=6, ranks={"vision": 2, "projector": 3},
                   alphas={"projector": 7})  # fmt: skip
    _, folder = as_published(tmp_path / "run", here / "tied", data, tune=options)
    built = live(located(tmp_path / "run", here / "tied", data, tune=options))
    found: dict[str, set[tuple[int, float]]] = {}
    for name, layer in lora_layers(built.root.model):
        part = built.root.family.part_of(f"{name}.weight")
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"]
        found.setdefault(part, set()).add((layer.r["default"], layer.scaling["default"]))
    assert found == {"language": {(4, 1.5)}, "vision": {(2, 1.5)}, "projector": {(3, 7 / 3)}}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and set(config["rank_pattern"].values()) == {2, 3}


def test_a_rank_of_a_part_without_adapters_is_refused(tmp_path: Path, here: Path, data: Path) -> None:
    for key in ("ranks", "alphas"):
        with pytest.raises(ConfigError, match=rf"tune\.{key} names 'vision', which has no adapters"):
            live(located(tmp_path, here / "tied", data, tune=lora(**{key: {"vision": 4}})))


# -- initialisations ----------------------------------------------------------------------------------------------

INITS = ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("init", INITS)
def test_weights_are_taken_apart_and_the_start_is_the_base(tmp_path: Path, here: Path, data: Path, init: str) -> None:
    built = live(located(tmp_path, here / "tied", data, tune=lora(init=init)))
    base = stock_state(here / "tied")
    layers = dict(lora_layers(built.root.model))
    layer = layers["model.language_model.layers.0.mlp.up_proj"]
    weight = base["model.language_model.layers.0.mlp.up_proj.weight"]
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert (layer.base_layer.weight + product - weight).abs().max() < 1e-6
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :4] * s[:4] @ v[:4]
    q, r = torch.linalg.qr(weight)
    if init == "pissa_niter_4":  # nearly as much as the best matrix of that rank
        assert (weight - product).norm() < 1.02 * (weight - best).norm()
    else:
        wanted = {"pissa": best, "olora": layer.scaling["default"] * q[:, :4] @ r[:4]}[init]
        assert (product - wanted).norm() / wanted.norm() < 1e-5
    assert gap(merged_state(built), base) < EXACT


@pytest.mark.parametrize("init", ["gaussian", *INITS])
def test_what_is_published_works_on_the_original_base(tmp_path: Path, here: Path, data: Path, init: str) -> None:
    _, folder = as_published(tmp_path / "run", here / "tied", data, tune=lora(init=init, rslora=True, alpha=5))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == (4 if init == "gaussian" else 8)


@pytest.mark.parametrize("init", INITS)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, here: Path, data: Path, init: str) -> None:
    tune = lora(init=init, dropout=0.1, parts=["language", "vision"], ranks={"vision": 2})
    assert resumed(tmp_path, here / "tied", data, 4, 2, tune=tune)


def test_the_weights_under_an_approximate_start_do_not_depend_on_the_seed(
    tmp_path: Path, here: Path, data: Path
) -> None:
    """A later stage may have another seed, and goes on with the same adapters."""
    first, second = (
        live(located(tmp_path, here / "tied", data, tune=lora(init="pissa_niter_2"), train={"seed": seed}))
        for seed in (0, 1)
    )
    for (_, a), (_, b) in zip(lora_layers(first.root.model), lora_layers(second.root.model), strict=True):
        assert torch.equal(a.base_layer.weight, b.base_layer.weight)


@pytest.mark.parametrize(("options", "message"), [
    ({"init": "pissa", "dora": True}, r"tune\.dora is true and tune\.init is pissa"),
    ({"merge": ["a"], "dora": True}, r"tune\.dora is true and tune\.merge is set"),
    ({"init": "loftq"}, r"tune\.init is loftq.*tune\.quantize is\s+not set"),
    ({"init": "eva"}, "should match pattern"),
    ({"init": "olora", "saved": "bfloat16"}, r"precision\.parts\.adapter\.saved is bfloat16"),
])  # fmt: skip
def test_what_does_not_go_together(tmp_path: Path, here: Path, data: Path, options: Any, message: str) -> None:
    precision = {"preset": "fp32", "parts": {"adapter": {"saved": options.get("saved")}}}
    tune = lora(**{k: v for k, v in options.items() if k != "saved"})
    with pytest.raises(ConfigError, match=message):
        located(tmp_path, here / "tied", data, tune=tune, precision=precision)


@pytest.mark.parametrize("options", [
    {"init": "pissa"}, {"init": "pissa_niter_4"}, {"init": "olora"}, {"full": ["embeddings", "projector"]},
    {"ranks": {"language": 2}}, {"adapter": "first"}, {"merge": ["first"], "init": "pissa"},
])  # fmt: skip
def test_check_and_plan_without_weights(
    tmp_path: Path, here: Path, data: Path, first: Path, options: Any, capsys: Any
) -> None:
    named = {k: str(first) if v == "first" else [str(first)] if v == ["first"] else v for k, v in options.items()}
    check(located(tmp_path, here / "tied", data, tune=lora(**named)), Terminal("json"))
    assert "predicted peak" in capsys.readouterr().out


def test_a_rank_that_cannot_is_told_by_check(tmp_path: Path, here: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.rank 33"):
        check(located(tmp_path, here / "tied", data, tune=lora(init="pissa") | {"rank": 33}), QUIET)


def test_a_rank_above_the_smaller_side(tmp_path: Path, here: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.rank 33 is above the smaller side"):
        live(located(tmp_path, here / "tied", data, tune=lora(init="pissa") | {"rank": 33}))


# -- adapters that are there ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(here: Path, data: Path) -> Path:
    """A run with plain adapters."""
    trained(here / "first", here / "tied", data, tune=lora(dropout=0.1))
    return here / "first"


def test_an_adapter_goes_on(tmp_path: Path, here: Path, data: Path, first: Path) -> None:
    """From a run folder, a checkpoint or a model folder; at its first step it is what it was."""
    wanted = stock_state(here / "tied", last(first) / "model")
    for path in (first, last(first), last(first) / "model"):
        built = live(located(tmp_path, here / "tied", data, tune=lora(adapter=str(path))))
        assert gap(merged_state(built), wanted) < 1e-7
    weights, _ = as_published(tmp_path / "run", here / "tied", data, tune=lora(adapter=str(first)))
    assert gap(weights, wanted) > 1e-3
    assert resumed(tmp_path, here / "tied", data, 4, 2, tune=lora(adapter=str(first)))


def test_adapters_are_merged_in_order_and_published_with_the_new_one(
    tmp_path: Path, here: Path, data: Path, first: Path
) -> None:
    second = tmp_path / "second"
    trained(second, here / "tied", data, tune=lora(parts=["vision"]) | {"rank": 2})
    merge = [str(first), str(second)]
    built = live(located(tmp_path, here / "tied", data, tune=lora(merge=merge)))
    wanted = stock_state(here / "tied", last(first) / "model", last(second) / "model")
    assert gap(merged_state(built), wanted) < 1e-6
    _, folder = as_published(tmp_path / "run", here / "tied", data, tune=lora(merge=merge, init="pissa"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 12 and set(config["rank_pattern"].values()) == {2}  # 4 + 4 + 4, and vision alone
    assert resumed(tmp_path, here / "tied", data, 4, 2, tune=lora(merge=merge))


def test_merged_adapters_are_of_the_run(tmp_path: Path, here: Path, data: Path, first: Path) -> None:
    """Another adapter under the same name would be other weights under the trained one."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (last(first) / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    over: dict[str, Any] = {"tune": lora(merge=[str(copy)])}
    trained(tmp_path / "run", here / "tied", data, **over)
    raw = bytearray((copy / "adapter_model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(bytes(raw))
    with pytest.raises(Exception, match=r"weights of tune\.merge"):
        runs.quiet_train(located(tmp_path / "run", here / "tied", data, train={"max_steps": 6}, **over))


def test_the_options_of_an_adapter_are_its_own(tmp_path: Path, here: Path, data: Path, first: Path) -> None:
    for options, message in (
        ({"rank": 5}, r"tune\.rank is 5; the adapter of tune\.adapter has 4"),
        ({"alpha": 3.0}, r"tune\.alpha is 3\.0; the adapter of tune\.adapter has 8"),
        ({"dora": True}, r"tune\.dora is True"),
        ({"init": "pissa"}, r"tune\.init is 'pissa'"),
    ):
        with pytest.raises(ConfigError, match=message):
            live(located(tmp_path, here / "tied", data, tune=lora(adapter=str(first)) | options))


def test_folders_that_are_no_adapters(tmp_path: Path, here: Path, data: Path, first: Path) -> None:
    def broken(name: str, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes((last(first) / "model" / file).read_bytes())
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return str(folder)

    pickled = broken("pickled")
    (Path(pickled) / "adapter_model.safetensors").rename(Path(pickled) / "adapter_model.bin")
    other = tiny.make_model(tmp_path / "wide", "qwen2_5_vl", hidden=64)
    for base, path, message in (
        (here / "tied", str(here / "tied"), "no adapter_config.json"),
        (here / "tied", pickled, "is a pickle and is never read"),
        (here / "tied", broken("oft", peft_type="OFT"), "peft_type is 'OFT'"),
        (here / "tied", broken("bias", bias="all"), "bias is 'all'"),
        (here / "tied", broken("pissa", init_lora_weights="pissa_niter_16"), "belongs to a changed base model"),
        (other, str(last(first) / "model"), r"the model's is 64 x 128"),
    ):
        with pytest.raises(ModelError, match=message):
            live(located(tmp_path / "x", base, data, tune=lora(adapter=path)))


def test_a_later_stage_says_what_becomes_of_the_adapter(tmp_path: Path, here: Path, data: Path, first: Path) -> None:
    stages = [{"name": "one"}, {"name": "two", "tune": {"rank": 2}}]
    with pytest.raises(ConfigError, match=r"tune\.adapter holds for stage 'two'"):
        located(tmp_path, here / "tied", data, tune=lora(adapter=str(first)), stages=stages)
    stages[1] = {"name": "two", "tune": {"rank": 2, "adapter": None}}
    located(tmp_path, here / "tied", data, tune=lora(adapter=str(first)), stages=stages)


# -- parts in full ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_parts_train_in_full_beside_adapters(tmp_path: Path, here: Path, data: Path, tie: str) -> None:
    full = ["embeddings", "projector"] + ["head"] * (tie == "untied")
    weights, folder = as_published(tmp_path / "run", here / tie, data, tune=lora(full=full))
    base = stock_state(here / tie)
    moved = {n.split(".layers")[0] for n, t in weights.items() if not torch.equal(t, base[n])}
    names = {"model.language_model.embed_tokens.weight", "lm_head.weight", "model.language_model"}
    assert names <= moved and all(n in names or n.startswith("model.visual.merger") for n in moved)
    assert torch.equal(weights["lm_head.weight"], weights["model.language_model.embed_tokens.weight"]) == (
        tie == "tied"
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] == (tie == "tied") and "model.visual.merger" in config["modules_to_save"]
    built = live(located(tmp_path / "on", here / tie, data, tune=lora(adapter=str(folder))))
    assert gap(merged_state(built), weights) < EXACT
    assert resumed(tmp_path, here / tie, data, 4, 2, tune=lora(full=full))


def test_they_keep_float32_over_a_bfloat16_base(tmp_path: Path, here: Path, data: Path) -> None:
    """PEFT's modules_to_save would stay in bfloat16, where small updates are lost."""
    over: dict[str, Any] = {"tune": lora(full=["projector"]), "precision": {"preset": "bf16"}}
    built = live(located(tmp_path, here / "tied", data, **over))
    types = {built.root.family.part_of(n): p.dtype for n, p in built.root.model.named_parameters() if ".lora_" not in n}
    assert types["projector"] == torch.float32 and types["vision"] == types["language"] == torch.bfloat16


@pytest.mark.parametrize(("options", "message"), [
    ({"full": ["language"]}, r"tune\.full names 'language', which has adapters too"),
    ({"full": ["head"]}, "name `embeddings`"),
])  # fmt: skip
def test_parts_that_cannot(tmp_path: Path, here: Path, data: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        live(located(tmp_path, here / "tied", data, tune=lora(**options)))


def test_added_tokens_beside_other_starts(tmp_path: Path, here: Path, data: Path) -> None:
    """Their rows train and are published with the converted adapter, which another run goes on with."""
    over: dict[str, Any] = {"model": {"path": str(here / "tied"), "add_tokens": ["<loc>"]}}
    run, checkpoint = trained(tmp_path / "run", here / "tied", data, tune=lora(init="pissa"), **over)
    weights = merged_state(live(run, checkpoint))
    out = export(run.output, tmp_path / "out", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert gap(weights, stock_state(out)) < EXACT
    start = merged_state(
        live(located(tmp_path, here / "tied", data, tune=lora(adapter=str(run.output)) | {"rank": 8}, **over))
    )
    assert gap(weights, start) < EXACT
    over["model"]["add_tokens"] = ["<loc>", "<more>"]
    with pytest.raises(ConfigError, match=r"tokens whose rows the adapter of tune\.adapter does not train"):
        live(located(tmp_path, here / "tied", data, tune=lora(adapter=str(run.output)) | {"rank": 8}, **over))


def test_options_are_closed() -> None:
    with pytest.raises(ValidationError):
        Lora(ranks={"head": 4})  # type: ignore[dict-item]
    with pytest.raises(ValidationError):
        Lora(ranks={"vision": 0})
