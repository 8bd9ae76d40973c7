"""LLaMA-Factory's files for tests: its dataset_info.json over its demo data, and the example files written anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from lensmith.config.yaml_file import Tree, parse_tree
from lensmith.migrate.convert import Migrated, migrate

"""LLaMA-Factory's demo data, where it is at hand."""
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
CHAT = {
    "messages": [{"role": "user", "content": "<image>What is in it?"}, {"role": "assistant", "content": "A circle."}],
}  # fmt: skip

_COMMON = """
trust_remote_code: true
image_max_pixels: 262144
video_max_pixels: 16384
do_train: true
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]
per_device_train_batch_size: 1
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
_LORA = "finetuning_type: lora\nlora_rank: 8\nlora_target: all\ngradient_accumulation_steps: 8\n"
_FULL = (
    "finetuning_type: full\nfreeze_vision_tower: true\nfreeze_multi_modal_projector: true\n"
    "freeze_language_model: false\n"
    "deepspeed: examples/deepspeed/ds_z3_config.json\ngradient_accumulation_steps: 2\n"
)
_DPO = "pref_beta: 0.1\npref_loss: sigmoid  # choices: [sigmoid (dpo), orpo, simpo]\n"
_SFT = "stage: sft\ndataset: mllm_demo,identity,alpaca_en_demo\n"
EXAMPLES = {
    "qwen2_5vl_lora_sft": f"{_SFT}template: qwen2_vl\nlearning_rate: 1.0e-4\noverwrite_cache: true\n{_LORA}{_COMMON}",
    "qwen2vl_full_sft": f"{_SFT}template: qwen2_vl\nlearning_rate: 1.0e-5\noverwrite_cache: true\n{_FULL}{_COMMON}",
    "qwen2_5vl_full_sft": f"{_SFT}template: qwen2_vl\nlearning_rate: 1.0e-5\noverwrite_cache: true\n{_FULL}{_COMMON}",
    "qwen3vl_lora_sft": f"{_SFT}template: qwen3_vl_nothink\nlearning_rate: 1.0e-4\n{_LORA}{_COMMON}",
    "qwen3vl_full_sft": f"{_SFT}template: qwen3_vl_nothink\nlearning_rate: 1.0e-5\n{_FULL}{_COMMON}",
    "qwen2_5vl_lora_dpo": f"stage: dpo\ndataset: rlhf_v\ntemplate: qwen2_vl\nlearning_rate: 5.0e-6\n"
    f"{_DPO}{_LORA}{_COMMON}",
    "qwen3vl_lora_dpo": f"stage: dpo\ndataset: rlhf_v\ntemplate: qwen3_vl_nothink\nlearning_rate: 5.0e-6\n"
    f"{_DPO}{_LORA}{_COMMON}",
}  # fmt: skip
MODELS = {name: {"qwen2v": "qwen2_vl", "qwen2_": "qwen2_5_vl", "qwen3v": "qwen3_vl"}[name[:6]] for name in EXAMPLES}
ZERO3 = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
             "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3, "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip
"""A DeepSpeed file as LLaMA-Factory's examples name one."""


def workspace(folder: Path, rows: int = 6) -> Path:
    """A folder as users call the command in: dataset_info.json, small data with pictures, a DeepSpeed file."""
    data = folder / "data"
    (folder / "examples" / "deepspeed").mkdir(parents=True, exist_ok=True)
    (folder / "examples" / "deepspeed" / "ds_z3_config.json").write_text(json.dumps(ZERO3))
    data.mkdir(exist_ok=True)
    pictures = tiny.make_pictures(data / "pictures", rows)
    names = [f"pictures/{name}" for name in pictures]
    chats = [{**CHAT, "images": [name]} for name in names]
    plain = [{"instruction": f"What is {n}?", "input": "", "output": f"It is number {n}."} for n in range(rows)]
    pairs = [
        {"conversations": [{"from": "human", "value": "<image>What is it?"}], "images": [name],
         "chosen": {"from": "gpt", "value": f"A circle {n}."}, "rejected": {"from": "gpt", "value": "No idea."}}
        for n, name in enumerate(names)
    ]  # fmt: skip
    for name, found in (("mllm_demo", chats), ("identity", plain), ("alpaca_en_demo", plain), ("rlhf_v", pairs)):
        (data / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    info: dict[str, Any] = {
        "mllm_demo": {"file_name": "mllm_demo.json", "formatting": "sharegpt",
                      "columns": {"messages": "messages", "images": "images"}, "tags": ROLES},
        "identity": {"file_name": "identity.json"},
        "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
        "rlhf_v": {"file_name": "rlhf_v.json", "ranking": True, "formatting": "sharegpt",
                   "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected",
                               "images": "images"}},
    }  # fmt: skip
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def info(folder: Path, /, **entries: Any) -> None:
    """More entries of dataset_info.json."""
    file = folder / "data" / "dataset_info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}), encoding="utf-8")


def write_rows(folder: Path, name: str, rows: list[Any]) -> str:
    file = folder / "data" / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(lines if name.endswith("l") else json.dumps(rows), encoding="utf-8")
    return name


def tree_of(text: str, **more: Any) -> Tree:
    added = "".join(f"{key}: {json.dumps(value)}\n" for key, value in more.items())
    return parse_tree(f"{text}\n{added}", "x.yaml")


def made(folder: Path, text: str = "", *, env: dict[str, str] | None = None, overrides: tuple[str, ...] = (),
         ranks: int | None = 1, **more: Any) -> Migrated:  # fmt: skip
    """What a file in `folder` becomes. Keys that every file needs are put in where they are not given."""
    needed = {"model_name_or_path": "model", "stage": "sft", "template": "qwen2_vl", "dataset": "identity",
              "output_dir": "saves/x"}  # fmt: skip
    given = tree_of(text, **more)
    tree = tree_of(text, **{k: v for k, v in needed.items() if k not in given.values}, **more)
    return migrate(tree, overrides, env=env or {}, folder=folder, ranks=ranks, devices=lambda: 0)


def decision(migrated: Migrated, key: str) -> Any:
    return next(d for d in migrated.decisions if d.key == key)
