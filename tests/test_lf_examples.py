"""LLaMA-Factory's example files, but for model path and output folder, on tiny models; and what each key becomes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lf_kit
import pytest
import tiny

from lensmith.core.errors import ConfigError
from lensmith.family.registry import FAMILIES, lora_pattern_of
from lensmith.migrate.convert import Migrated
from lensmith.migrate.templates import TEMPLATES
from lensmith.migrate.training import ALL
from lensmith.recipe.run import Run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("examples")
    return {kind: tiny.make_model(folder / kind, kind, max_pixels=12_845_056) for kind in set(lf_kit.MODELS.values())}


@pytest.fixture
def place(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    lf_kit.workspace(tmp_path)
    (tmp_path / "model").symlink_to(models["qwen2_5_vl"])
    for kind, folder in models.items():
        (tmp_path / kind).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(place: Path, found: Migrated) -> Run:
    return found.located(place / "x.yaml").run


def made(place: Path, **keys: Any) -> Run:
    return run_of(place, lf_kit.made(place, **keys))


# --- the example files ------------------------------------------------------------------------------------------------


def command(place: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    keep = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-m", "lensmith", *arguments], cwd=place, env=keep, text=True,
                          capture_output=True, timeout=300, check=False)  # fmt: skip


def example(place: Path, name: str) -> str:
    file = place / "examples" / f"{name}.yaml"
    file.write_text(f"model_name_or_path: {lf_kit.MODELS[name]}\noutput_dir: saves/{name}\n{lf_kit.EXAMPLES[name]}")
    return f"examples/{name}.yaml"


@pytest.mark.parametrize("name", ["qwen2_5vl_lora_sft", "qwen2vl_full_sft", "qwen3vl_lora_sft", "qwen3vl_full_sft"])
def test_sft_examples_train_as_they_are(place: Path, name: str) -> None:
    done = command(place, "train", example(place, name))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((place / "saves" / name / "summary.json").read_text())
    size = 8 if "lora" in name else 2
    assert summary["samples"]["train"] == 18
    assert summary["steps"] == 3 * -(-18 // size)  # the last step of an epoch has what is left
    assert all(loss is not None for loss in summary["losses"])
    assert "not needed" in done.stdout and "taken with a difference" in done.stdout


def test_a_run_of_two_ranks_by_its_variables(place: Path) -> None:
    file = example(place, "qwen2_5vl_lora_sft")
    done = command(place, "train", file, "num_train_epochs=1", FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr[-2000:]
    output = place / "saves" / "qwen2_5vl_lora_sft"
    assert json.loads((output / "llamafactory.json").read_text())["ranks"] == 2
    assert json.loads((output / "summary.json").read_text())["steps"] == 2  # 16 samples and 2
    assert done.stdout.count("taken as they are") == 1
    again = command(place, "train", file, "num_train_epochs=2")  # on one rank, with the batch of the first start
    assert again.returncode == 0, again.stderr[-2000:]
    assert "keeps them on 1 ranks" in re.sub(r"\s+", " ", again.stdout)
    assert json.loads((output / "summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize("name", lf_kit.EXAMPLES)
def test_every_example_becomes_a_run(place: Path, name: str) -> None:
    file = place / example(place, name)
    run = run_of(place, lf_kit.made(place, file.read_text(), ranks=2))
    lora, size = "lora" in name, 16 if "lora" in name else 4
    assert (run.batch.samples, run.batch.partial, run.train.epochs) == (size, "epoch_end", 3.0)
    assert (run.data.max_tokens, run.data.max_pixels, run.data.video.max_pixels) == (2048, 262144, 16384)
    assert (run.schedule.kind, run.schedule.warmup, run.precision.preset) == ("cosine", 0.1, "bf16")
    assert (run.save.every_steps, run.log.every_steps, run.log.sinks) == (500, 10, ())
    assert run.tune.kind == ("lora" if lora else "freeze")
    assert run.objective.kind == ("dpo" if "dpo" in name else "next_token")
    if not lora:
        assert run.tune.train == ("language", "embeddings")  # type: ignore[union-attr]
        engine = run.parallel.engine
        assert (engine.kind, engine.zero) == ("deepspeed", 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["qwen2_5vl_full_sft", "qwen2_5vl_lora_dpo"])
def test_check_passes_examples(place: Path, name: str) -> None:
    done = command(place, "check", example(place, name))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("stage", ["dpo", "rm", "kto"])
def test_stages_of_preferences_train(place: Path, stage: str) -> None:
    import runs

    rows = [{"messages": lf_kit.CHAT["messages"], "images": [f"pictures/images/{n}.png"], "label": n % 2 == 0}
            for n in range(6)]  # fmt: skip
    lf_kit.write_rows(place, "kto.jsonl", rows)
    lf_kit.info(place, kto={"file_name": "kto.jsonl", "formatting": "sharegpt", "tags": lf_kit.ROLES,
                            "columns": {"messages": "messages", "images": "images", "kto_tag": "label"}})  # fmt: skip
    overrides = (f"stage={stage}", "num_train_epochs=1", *(["dataset=kto"] if stage == "kto" else []))
    file = place / example(place, "qwen2_5vl_lora_dpo")
    found = lf_kit.made(place, file.read_text(), overrides=overrides)
    outcome = runs.quiet_train(found.located(file))
    assert outcome.summary["steps"] == 1 and outcome.summary["losses"][0] > 0


def test_migrate_writes_a_run_that_checks(place: Path) -> None:
    file = example(place, "qwen2_5vl_lora_sft")
    done = command(place, "migrate", file, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    written = place / "examples" / "qwen2_5vl_lora_sft.lensmith.yaml"
    assert f"written: {written.relative_to(place)}" in done.stdout
    assert command(place, "check", str(written)).returncode == 0
    for name in ("migrate", "train"):
        other = command(place, name, file, "leraning_rate=1")
        assert other.returncode == 64 and "did you mean 'learning_rate'?" in other.stderr
    assert command(place, "migrate", str(written)).returncode == 64


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, {"kind": "freeze", "train": ("language", "embeddings")}),
        ({"freeze_vision_tower": False}, {"kind": "freeze", "train": ("language", "vision", "embeddings")}),
        ({"freeze_language_model": True, "freeze_multi_modal_projector": False},
         {"kind": "freeze", "train": ("projector",)}),
        ({"freeze_vision_tower": False, "freeze_multi_modal_projector": False}, {"kind": "full"}),
    ],
)  # fmt: skip
def test_full_tuning_with_its_freezes(place: Path, keys: dict[str, Any], wanted: dict[str, Any]) -> None:
    tune = made(place, finetuning_type="full", **keys).tune.model_dump()
    assert {k: tune[k] for k in wanted} == wanted


def test_an_untied_head_trains_with_the_language_model(place: Path) -> None:
    tiny.make_model(place / "untied", "qwen2_5_vl", tie=False)
    tune = made(place, finetuning_type="full", model_name_or_path="untied").tune
    assert tune.train == ("language", "embeddings", "head")  # type: ignore[union-attr]


def test_full_tuning_says_what_stays_frozen(place: Path) -> None:
    said = lf_kit.made(place, finetuning_type="full").warnings
    assert any("leaves projector and vision frozen" in w for w in said)


def test_layers(place: Path) -> None:
    tune = made(place, finetuning_type="freeze").tune.model_dump()
    assert (tune["train"], tune["last_layers"], tune["first_layers"]) == (("language",), 2, None)
    tune = made(place, finetuning_type="freeze", freeze_trainable_layers=-1).tune.model_dump()
    assert (tune["last_layers"], tune["first_layers"]) == (None, 1)


def test_adapters(place: Path) -> None:
    tune = made(place, lora_rank=4, lora_alpha=32, lora_dropout=0.1, use_rslora=True, use_dora=True,
                freeze_vision_tower=False).tune.model_dump()  # fmt: skip
    wanted = {"kind": "lora", "rank": 4, "alpha": 32.0, "dropout": 0.1, "rslora": True, "dora": True,
              "parts": ("language", "vision"), "pattern": None}  # fmt: skip
    assert {k: tune[k] for k in wanted} == wanted
    assert made(place).tune.model_dump()["alpha"] is None  # twice the rank, as there
    init = made(place, pissa_init=True).tune.model_dump()["init"]
    assert init == "pissa_niter_16"
    assert made(place, pissa_init=True, pissa_iter=-1).tune.model_dump()["init"] == "pissa"
    assert made(place, additional_target="embed_tokens,lm_head").tune.model_dump()["full"] == ("embeddings", "head")
    assert made(place, loraplus_lr_ratio=16.0).optimizer.lora_b_ratio == 16.0


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_named_layers_are_those_of_what_is_not_frozen(place: Path, models: dict[str, Path], kind: str) -> None:
    """Against LLaMA-Factory's own rule: names that hold a target and none of a frozen part."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(models[kind]))
    template = "qwen3_vl_nothink" if kind == "qwen3_vl" else "qwen2_vl"
    frozen = (
        "visual.patch_embed",
        "visual.blocks",
        "visual.merger",
        "visual.deepstack_merger_list",
        "visual.pos_embed",
    )
    for targets in ("q_proj,v_proj", "gate_proj,down_proj"):
        tune = made(place, model_name_or_path=kind, template=template, lora_target=targets).tune
        names = [n for n, _ in model.named_modules()]
        theirs = {n for n in names if any(t in n for t in targets.split(",")) and not any(f in n for f in frozen)}
        assert {n for n in names if re.fullmatch(str(tune.pattern), n)} == theirs != set()  # type: ignore[union-attr]


def test_adapters_that_go_on(place: Path) -> None:
    for name in ("one", "two"):
        (place / name).mkdir()
    found = lf_kit.made(place, adapter_name_or_path="one,two", lora_rank=64)
    tune = run_of(place, found).tune.model_dump()
    assert (tune["adapter"], tune["merge"]) == (str(place / "two"), (str(place / "one"),))
    assert lf_kit.decision(found, "lora_rank").verdict == "not needed"
    tune = made(place, adapter_name_or_path="one,two", create_new_adapter=True, lora_rank=64).tune.model_dump()
    assert (tune["adapter"], tune["merge"], tune["rank"]) == (None, (str(place / "one"), str(place / "two")), 64)


def test_four_bits(place: Path) -> None:
    quantize = lf_kit.made(place, quantization_bit=4, double_quantization=False).tree.values["tune"]["quantize"]
    assert quantize == {"bits": 4, "type": "nf4", "double": False}


@pytest.mark.parametrize(("keys", "preset"), [({"bf16": True}, "bf16"), ({"fp16": True}, "fp16"),
                                              ({"pure_bf16": True}, "bf16-params"), ({}, "auto")])  # fmt: skip
def test_precision(place: Path, keys: dict[str, Any], preset: str) -> None:
    assert made(place, **keys).precision.preset == preset


def test_every_family_has_a_pattern_and_templates_name_known_models() -> None:
    for kind in FAMILIES:
        assert "language" in lora_pattern_of(kind, ["language"]) or lora_pattern_of(kind, ["language"])
    assert {m for t in TEMPLATES.values() for m in t.models} <= set(FAMILIES)


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "template", "said"),
    [
        ("qwen3_vl", "qwen2_vl", "template qwen2_vl is for qwen2_vl and qwen2_5_vl, and the model is qwen3_vl"),
        ("qwen3_vl", "qwen3_vl", "puts <think>"),
        ("qwen2_5_vl", None, "template is left out"),
    ],
)
def test_warnings_of_templates(place: Path, model: str, template: str | None, said: str) -> None:
    found = lf_kit.made(place, model_name_or_path=model, template=template)
    assert any(said in w for w in found.warnings)


def test_no_warning_where_template_and_model_agree(place: Path) -> None:
    for model, template in (("qwen3_vl", "qwen3_vl_nothink"), ("qwen2_5_vl", "qwen2_vl")):
        found = lf_kit.made(place, model_name_or_path=model, template=template)
        assert not [w for w in found.warnings if "template " in w]


def test_a_default_system_prompt_that_the_model_lacks_is_written_out(place: Path) -> None:
    tiny.make_model(place / "other", "qwen2_5_vl")
    file = place / "other" / "chat_template.jinja"
    file.write_text(file.read_text().replace("You are a helpful assistant.", "Be kind."))
    found = lf_kit.made(place, model_name_or_path="other")
    assert found.tree.values["data"]["train"][0]["format"]["default_system"] == "You are a helpful assistant."
    assert any("'Be kind.'" in w for w in found.warnings)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"pref_beta": 0.2}, {"kind": "dpo", "loss": "sigmoid", "beta": 0.2, "length_normalised": False}),
        ({"pref_loss": "hinge"}, {"kind": "dpo", "loss": "hinge"}),
        ({"pref_loss": "ipo"}, {"kind": "dpo", "loss": "ipo", "length_normalised": True}),
        ({"dpo_label_smoothing": 0.1}, {"kind": "dpo", "label_smoothing": 0.1}),
        ({"pref_ftx": 0.5}, {"kind": "dpo", "sft_weight": 0.5, "sft_average": "sequences"}),
        ({"pref_loss": "orpo"}, {"kind": "orpo", "beta": 0.1}),
        ({"pref_loss": "simpo", "simpo_gamma": 1.5, "pref_beta": 2.0}, {"kind": "simpo", "beta": 2.0, "gamma": 1.5}),
        ({"stage": "rm"}, {"kind": "reward"}),
    ],
)
def test_losses_of_pairs(place: Path, keys: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = made(place, **{"stage": "dpo", "dataset": "rlhf_v", **keys}).objective.model_dump()
    assert {k: found[k] for k in wanted} == wanted


def test_labelled_answers(place: Path) -> None:
    rows = [{"messages": lf_kit.CHAT["messages"], "images": ["pictures/images/0.png"], "label": True}]
    lf_kit.write_rows(place, "kto.jsonl", rows)
    lf_kit.info(place, kto={"file_name": "kto.jsonl", "formatting": "sharegpt", "tags": lf_kit.ROLES,
                            "columns": {"messages": "messages", "images": "images", "kto_tag": "label"}})  # fmt: skip
    run = made(place, stage="kto", dataset="kto", kto_chosen_weight=2.0, kto_rejected_weight=0.5)
    found = run.objective.model_dump()
    assert (found["kind"], found["desirable_weight"], found["undesirable_weight"]) == ("kto", 2.0, 0.5)
    assert run.data.train[0].format.label_column == "label"  # type: ignore[union-attr]


def test_references(place: Path) -> None:
    def reference(**keys: Any) -> dict[str, Any]:
        return made(place, stage="dpo", dataset="rlhf_v", **keys).objective.model_dump()["reference"]

    assert reference()["kind"] == "cached" and reference()["model"] is None
    assert reference(ref_model="qwen2_vl")["model"] == str(place / "qwen2_vl")
    (place / "adapter").mkdir()
    assert reference(adapter_name_or_path="adapter")["model"] == str(place / "model")  # the base without it, as there
    assert reference(adapter_name_or_path="adapter", create_new_adapter=True)["model"] is None


@pytest.mark.parametrize(
    "keys", [{"pref_loss": "kto_pair"}, {"pref_loss": "hinge", "dpo_label_smoothing": 0.1},
             {"pref_loss": "orpo", "pref_ftx": 1.0}]
)  # fmt: skip
def test_losses_it_does_not_have(place: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        made(place, stage="dpo", dataset="rlhf_v", **keys)
    assert caught.value.code == "MIGRATE"


def test_pretraining_reads_documents_and_shows_their_pictures(place: Path) -> None:
    lf_kit.write_rows(place, "docs.jsonl", [{"text": "<image>One.", "images": ["pictures/images/0.png"]}] * 3)
    lf_kit.info(place, docs={"file_name": "docs.jsonl", "columns": {"prompt": "text", "images": "images"}})
    found = lf_kit.made(place, stage="pt", dataset="docs", cutoff_len=128, per_device_train_batch_size=2)
    run = run_of(place, found)
    assert (run.batch.tokens, run.data.max_tokens) == (256, 128)  # packing is the default of this stage
    assert any("leaves the pictures of stage pt out" in w for w in found.warnings)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, {"kind": "linear", "warmup": 0.0, "warmup_steps": None}),
        ({"warmup_ratio": 0.1}, {"kind": "linear", "warmup": 0.1}),
        ({"warmup_ratio": 0.1, "warmup_steps": 20}, {"warmup_steps": 20}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 20}, {"kind": "constant", "warmup": 0.0}),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20}, {"kind": "constant", "warmup_steps": 20}),
        ({"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-4, "lr_scheduler_kwargs": {"min_lr": 1e-5}},
         {"kind": "cosine", "final": 0.1}),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
         {"kind": "cosine", "final": 0.2}),
        ({"lr_scheduler_type": "warmup_stable_decay", "max_steps": 100, "lr_scheduler_kwargs": {"num_decay_steps": 20}},
         {"kind": "wsd", "decay": 0.2}),
    ],
)  # fmt: skip
def test_schedules(place: Path, keys: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = made(place, **keys).schedule.model_dump()
    assert {k: found.get(k) for k in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    "more", [{"num_cycles": 3}, {"unheard": 1}]
)  # fmt: skip
def test_schedules_it_does_not_have(place: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs"):
        made(place, lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs=more)


def test_optimizer_defaults_are_those_of_transformers(place: Path) -> None:
    run = made(place)
    assert run.optimizer.model_dump(include={"kind", "lr", "betas", "eps", "weight_decay"}) == {
        "kind": "adamw", "lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # fmt: skip
    assert (run.train.epochs, run.train.clip_norm, run.train.seed, run.train.recompute) == (3.0, 1.0, 42, True)
    assert (run.save.every_steps, run.save.keep_last, run.batch.samples) == (500, ALL, 8)
    assert made(place, max_grad_norm=0).train.clip_norm is None
    assert made(place, disable_gradient_checkpointing=True).train.recompute is False
    for name, kind in (("adamw_bnb_8bit", "adamw_8bit"), ("adafactor", "adafactor"), ("paged_adamw_32bit", "adamw")):
        assert lf_kit.made(place, optim=name).tree.values["optimizer"]["kind"] == kind
    assert lf_kit.made(place, use_muon=True).tree.values["optimizer"]["kind"] == "muon"
    assert made(place, neftune_noise_alpha=5).train.neftune_alpha == 5.0


def test_length_and_batch(place: Path) -> None:
    run = made(place, max_steps=7)
    assert (run.train.max_steps, run.train.epochs) == (7, None)
    assert made(place, dataloader_drop_last=True).batch.partial == "drop"
    assert made(place, use_cpu=True).train.device == "cpu"


def test_saving(place: Path) -> None:
    save = made(place, save_strategy="no").save
    assert (save.every_steps, save.every_minutes) == (None, None)
    assert made(place, save_total_limit=3).save.keep_last == 3
    run = made(place, load_best_model_at_end=True, val_size=0.3, eval_strategy="steps", eval_steps=5,
               early_stopping_steps=4)  # fmt: skip
    assert (run.save.keep_best, run.train.early_stop.patience) == ("loss", 4)  # type: ignore[union-attr]


def test_reports(place: Path) -> None:
    env = {"WANDB_PROJECT": "mine"}
    found = lf_kit.made(place, report_to=["wandb", "tensorboard"], env=env)
    assert found.tree.values["log"]["sinks"] == [{"kind": "wandb", "project": "mine"}, {"kind": "tensorboard"}]
    assert made(place, report_to="none").log.sinks == ()


def test_a_checkpoint_of_transformers_is_not_resumed(place: Path) -> None:
    (place / "saves" / "x" / "checkpoint-5").mkdir(parents=True)
    (place / "saves" / "x" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="pickled state") as caught:
        made(place, resume_from_checkpoint="saves/x/checkpoint-5")
    assert "adapter_name_or_path" in caught.value.remedy


def test_a_run_goes_on_by_itself_and_says_so(place: Path) -> None:
    for keys in ({}, {"overwrite_output_dir": True}):
        assert any("goes on from the newest one by itself" in w for w in lf_kit.made(place, **keys).warnings)


# --- several devices --------------------------------------------------------------------------------------------------


def test_deepspeed_files(place: Path) -> None:
    file = place / "ds.json"
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({**lf_kit.ZERO3, "zero_optimization": zero}))
    engine = made(place, deepspeed="ds.json").parallel.engine.model_dump()
    assert engine == {"kind": "deepspeed", "zero": 2, "offload": True, "config": str(file)}
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    assert made(place, deepspeed="ds.json").parallel.engine.kind == "local"
    for value in ("nowhere.json", {"zero_optimization": {}}):
        with pytest.raises(ConfigError, match="deepspeed"):
            made(place, deepspeed=value)


def test_deepspeed_values_that_are_auto_are_filled_by_the_run(place: Path) -> None:
    from lensmith.parallel.zero_config import Facts, settings

    facts = Facts(3, False, "float32", "float32", 1.0, {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8,
                                                        "weight_decay": 0.0}, 1000, 32)  # fmt: skip
    made_of = settings(facts, place / "examples" / "deepspeed" / "ds_z3_config.json").config
    zero = made_of["zero_optimization"]
    assert (zero["stage3_prefetch_bucket_size"], zero["stage3_param_persistence_threshold"]) == (921, 320)
    assert "auto" not in json.dumps(made_of)


def test_fsdp(place: Path) -> None:
    engine = made(place, fsdp="full_shard auto_wrap offload").parallel.engine.model_dump()
    assert (engine["kind"], engine["offload"]) == ("fsdp2", True)
    assert made(place, fsdp="shard_grad_op").parallel.engine.model_dump()["keep_blocks"] is True
    with pytest.raises(ConfigError, match="hybrid_shard"):
        made(place, fsdp="hybrid_shard")
