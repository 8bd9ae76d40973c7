"""DeepSpeed's configuration: what a run makes, and a user's own file held against it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lensmith.core.errors import ConfigError
from lensmith.engine.optimizer import Keep
from lensmith.parallel.zero_config import BUCKET, Facts, kept_types, settings

ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
FACTS = Facts(2, False, "float32", "float32", 1.0, ADAMW, 10**9, 3584)
LLAMA_FACTORY: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}
"""The keys of LLaMA-Factory's example files, which are those of transformers'."""
STAGE_2 = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False,
    "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True,
}  # fmt: skip
STAGE_3 = {
    "stage": 3, "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9,
    "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
HOST = {"device": "cpu", "pin_memory": True}


def made(tmp_path: Path, found: Any, facts: Facts = FACTS) -> Any:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(found))
    return settings(facts, path)


def test_of_the_run_alone() -> None:
    config = settings(FACTS).config
    assert config["gradient_clipping"] == 0.0 and config["zero_force_ds_cpu_optimizer"] is False
    assert config["communication_data_type"] == "fp32" and config["bf16"] == {"enabled": False}
    zero = config["zero_optimization"]
    assert zero["overlap_comm"] is False and zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == BUCKET
    assert "offload_optimizer" not in zero and "optimizer" not in config


def test_buckets_are_no_larger_than_what_trains() -> None:
    assert (
        settings(replace(FACTS, trainable=20_185_087)).config["zero_optimization"]["reduce_bucket_size"] == 20_185_088
    )


def test_zero_3_leaves_torch_as_it_is() -> None:
    assert settings(replace(FACTS, zero=3)).config["zero_optimization"]["memory_efficient_linear"] is False


def test_a_file_for_zero_2(tmp_path: Path) -> None:
    found = made(tmp_path, {**LLAMA_FACTORY, "zero_optimization": STAGE_2})
    zero = found.config["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 500_000_000
    assert "round_robin_gradients" not in zero and found.config["train_micro_batch_size_per_gpu"] == 1
    assert any("round_robin_gradients is left out" in w for w in found.warnings)
    assert any("zero_allow_untested_optimizer" in w for w in found.warnings)


def test_a_file_for_zero_3_with_offload(tmp_path: Path) -> None:
    own = {**STAGE_3, "offload_optimizer": HOST, "offload_param": HOST}
    found = made(tmp_path, {**LLAMA_FACTORY, "zero_optimization": own}, replace(FACTS, zero=3, offload=True))
    zero = found.config["zero_optimization"]
    assert zero["reduce_bucket_size"] == BUCKET and zero["sub_group_size"] == 10**9
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 3584 * 3584)
    assert zero["stage3_param_persistence_threshold"] == 10 * 3584
    assert zero["offload_optimizer"] == zero["offload_param"] == HOST
    assert any("stage3_gather_16bit_weights_on_model_save" in w for w in found.warnings)


def test_overlap_is_taken_with_a_warning(tmp_path: Path) -> None:
    found = made(tmp_path, {"zero_optimization": {"overlap_comm": True}})
    assert found.config["zero_optimization"]["overlap_comm"] is True and "raced" in found.warnings[0]


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16: batch.samples"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5: train.clip_norm is 1.0"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb"'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "optimizer.params.lr is 1e-05"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {"weightdecay": 0}}}, "optimizer.params.weightdecay"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type is "WarmupLR"'),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true: the parameters that train are float32"),
        ({"communication_data_type": "bf16"}, 'communication_data_type is "bf16"'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        ({"prescale_gradients": True}, "prescale_gradients is true"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op is "sum"'),
        ({"amp": {"enabled": True}}, "amp is "),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3: parallel.engine.zero is 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer.device"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "keeps no state on disk"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param.device"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_optimization.zero_quantized_gradients"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com is no key"),
        ({"gradient_cliping": 1.0}, "gradient_cliping is no key"),
    ],
)
def test_what_contradicts_the_run(tmp_path: Path, found: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        made(tmp_path, found)
    assert named in error.value.message and error.value.where.endswith("ds.json") and error.value.remedy


def test_offload_of_the_run_alone_is_no_contradiction(tmp_path: Path) -> None:
    facts = replace(FACTS, offload=True)
    assert made(tmp_path, {}, facts).config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(ConfigError, match=r"parallel\.engine\.offload is true"):
        made(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "none"}}}, facts)


def test_equal_values_are_no_contradiction(tmp_path: Path) -> None:
    own = {
        "gradient_clipping": 1.0, "bf16": {"enabled": False}, "amp": {"enabled": False}, "gradient_predivide_factor": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": "auto"}},
    }  # fmt: skip
    assert made(tmp_path, own).config == settings(FACTS).config


@pytest.mark.parametrize("text", ["{", "[]"])
def test_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match="JSON"):
        settings(FACTS, tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        settings(FACTS, tmp_path / "none.json")


HALF = Keep("masters", torch.bfloat16, torch.float32)


def test_types_of_what_trains() -> None:
    assert kept_types({"a": Keep(), "b": Keep()}, [("base", torch.bfloat16)]) == ("float32", "float32")
    assert kept_types({"a": HALF}, [("base", torch.bfloat16)]) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("keeps", "frozen", "named"),
    [
        ({"a": Keep("compensated", torch.bfloat16)}, [], "a is to be kept compensated"),
        ({"a": Keep(moments=torch.bfloat16)}, [], "bfloat16 moments"),
        ({"a": HALF, "b": Keep()}, [], "a is bfloat16 with float32 gradients, b float32"),
        ({"a": HALF}, [("tower", torch.float32)], "tower is to be float32"),
    ],
)
def test_precision_that_it_cannot_keep(keeps: dict[str, Keep], frozen: list[Any], named: str) -> None:
    with pytest.raises(ConfigError, match="PRECISION") as error:
        kept_types(keeps, frozen)
    assert named in error.value.message
