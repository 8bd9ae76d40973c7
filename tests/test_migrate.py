"""A LLaMA-Factory file read: its keys, their types and places, what is decided on each, contradictions, the launch."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import lf_kit
import pytest
import tiny

from lensmith.config.yaml_file import parse_tree
from lensmith.core.errors import ConfigError
from lensmith.migrate import page
from lensmith.migrate.convert import RECORD, load_any, migrate, record
from lensmith.migrate.given import is_llamafactory, read_given
from lensmith.migrate.keys import UNSUPPORTED, all_keys
from lensmith.migrate.launch import REFUSED, launch_of
from lensmith.migrate.rules import RULES
from lensmith.migrate.write import text, write
from lensmith.recipe.run import Run, load_run

KEYS: dict[str, dict[str, str | None]] = json.loads((tiny.DATA / "llamafactory_keys.json").read_text())
"""LLaMA-Factory's classes at commit ff6d4d12, with the defaults that they declare; transformers' names."""
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small data and a model; commands are called in it."""
    lf_kit.workspace(tmp_path)
    tiny.make_model(tmp_path / "model", "qwen2_5_vl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(place: Path, *said: str, code: str = "MIGRATE", **keys: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        lf_kit.made(place, **keys).located(place / "x.yaml")
    assert caught.value.code == code, caught.value
    for part in said:
        assert part in str(caught.value), caught.value
    return caught.value


# --- the table of keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", KEYS)
def test_every_key_is_decided_and_documented(group: str) -> None:
    known, shown = all_keys(), (DOCS / "llamafactory.md").read_text(encoding="utf-8")
    for name in KEYS[group]:
        assert name in known, name
        assert f"| `{name}` |" in shown, name


def test_defaults_are_those_of_llamafactory() -> None:
    """As its source writes them; what cannot be read as a value (an enumeration, a needed key) is looked at by hand."""
    ours, looked_at = all_keys(), set[str]()
    by_hand = {"flash_attn": "auto", "infer_backend": "huggingface", "quantization_method": "bnb", "seed": 42,
               "download_mode": "reuse_dataset_if_exists", "task": None}  # fmt: skip
    for group, keys in KEYS.items():
        if not group.endswith(("Arguments", "Argument")) or group == "MegatronBridgeArguments":
            continue
        for name, default in keys.items():
            if name in by_hand:
                assert ours[name].default == by_hand[name]
                continue
            source = str(default).split(" (init=False")[0]
            product = [int(n) for n in source.split("*")] if re.fullmatch(r"\d+ \* \d+", source) else []
            wanted = product[0] * product[1] if product else ast.literal_eval(source)
            assert ours[name].default == wanted or name.startswith("overwrite_output"), name
            looked_at.add(name)
    assert len(looked_at) > 200


def test_the_page_is_that_of_the_keys() -> None:
    shown = (DOCS / "llamafactory.md").read_text(encoding="utf-8")
    assert shown == page.page(shown), "python -m lensmith.migrate.page docs/llamafactory.md"


def test_options_that_the_table_names_exist() -> None:
    """Every place in a lensmith run file that a decision names is one."""
    from lensmith.config.build import models_in

    def options(model: Any, at: str = "") -> set[str]:
        found: set[str] = set()
        for name, field in model.model_fields.items():
            here = f"{at}.{name}".strip(".")
            found.add(here)
            for inner in models_in(field):
                if here.count(".") < 4:
                    found |= options(inner, here)
        return found

    known = options(Run)
    for key in all_keys().values():
        for name in filter(None, key.to.split(", ")):
            assert name.partition(":")[0].replace("[]", "") in known, (key.name, name)


def test_a_remedy_stands_beside_every_key_that_is_not_supported() -> None:
    assert all(key.about for key in all_keys().values() if key.verdict == UNSUPPORTED)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_files_are_told_apart() -> None:
    assert is_llamafactory(parse_tree("model_name_or_path: x"))
    assert is_llamafactory(parse_tree("stage: sft\ntemplate: qwen2_vl"))
    assert not is_llamafactory(parse_tree("model: {path: x}\ndata: {train: x.jsonl}"))
    assert not is_llamafactory(parse_tree("stage: sft"))


@pytest.mark.parametrize(
    ("line", "name", "wanted"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),
        ("learning_rate: '2e-5'", "learning_rate", 2e-5),
        ("learning_rate: 1.0e-4", "learning_rate", 1e-4),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("cutoff_len: 2048.0", "cutoff_len", 2048),
        ("max_steps: '100'", "max_steps", 100),
        ("bf16: 'true'", "bf16", True),
        ("bf16: yes", "bf16", True),
        ("bf16: 0", "bf16", False),
        ("dataset: a, b,c ", "dataset", ["a", "b", "c"]),
        ("dataset: [a, b]", "dataset", ["a", "b"]),
        ("report_to: none", "report_to", ["none"]),
        ("lora_target: q_proj,v_proj", "lora_target", ["q_proj", "v_proj"]),
        ("resume_from_checkpoint: null", "resume_from_checkpoint", None),
        ("save_strategy: no", "save_strategy", "no"),
        ("image_max_pixels: 589824", "image_max_pixels", 589824),
    ],
)
def test_values_have_their_types(line: str, name: str, wanted: Any) -> None:
    assert read_given(parse_tree(line), env={}).values[name] == wanted


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate: fast", "must be a number"),
        ("cutoff_len: 1.5", "must be a whole number"),
        ("bf16: maybe", "must be true or false"),
        ("cutoff_len: true", "must be a whole number"),
        ("output_dir: [a]", "must be text"),
        ("output_dir: ${oc.env:HOME}/x", "interpolations are not resolved"),
    ],
)
def test_values_of_another_type_are_located(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_given(parse_tree(f"stage: sft\n{line}", "x.yaml"), env={})
    assert caught.value.where.startswith("x.yaml:2 ") and caught.value.remedy


def test_an_unknown_key_is_an_error_with_the_nearest_name() -> None:
    tree = parse_tree("stage: sft\nleraning_rate: 1e-4", "x.yaml")
    with pytest.raises(ConfigError, match="unknown key 'leraning_rate'") as caught:
        read_given(tree, env={})
    assert caught.value.code == "UNKNOWN_KEY" and caught.value.remedy == "did you mean 'learning_rate'?"
    assert caught.value.where == "x.yaml:2 leraning_rate"
    assert "leraning_rate" not in read_given(tree, env={"ALLOW_EXTRA_ARGS": "1"}).values


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("a: !!python/object/apply:os.system [id]", "YAML_TAG"),
        ("stage: sft\nstage: pt", "DUPLICATE_KEY"),
        ("a: &a [x]\nb: [" + "*a, " * 200 + "*a]", "YAML_ALIAS"),
    ],
)
def test_yaml_is_read_safely(line: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"model_name_or_path: m\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_any(file)
    assert caught.value.code == code


def test_overrides_of_both_kinds(place: Path) -> None:
    found = lf_kit.made(place, learning_rate=1e-4, overrides=("learning_rate=3e-4", "train.threads=1", "cutoff_len=64"))
    run = found.located(place / "x.yaml").run
    assert (run.optimizer.lr, run.train.threads, run.data.max_tokens) == (3e-4, 1, 64)
    assert lf_kit.decision(found, "learning_rate").value == "0.0003"


def test_a_mistake_in_the_run_is_located_at_the_key_it_came_from(place: Path) -> None:
    head = "model_name_or_path: model\nstage: sft\ntemplate: qwen2_vl\ndataset: identity\n"
    file = f"{head}output_dir: o\nlora_dropout: 2\n"
    tree = parse_tree(file, "x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml:\d+ tune\.dropout") as caught:
        migrate(tree, env={}, ranks=1).located(place / "x.yaml")
    assert "less than 1" in str(caught.value)


# --- decisions --------------------------------------------------------------------------------------------------------


def test_every_given_key_is_decided_and_defaults_that_matter_too(place: Path) -> None:
    found = lf_kit.made(place, plot_loss=True, lora_rank=4)
    given = [d.key for d in found.decisions if d.given]
    assert given == ["model_name_or_path", "stage", "template", "dataset", "output_dir", "plot_loss", "lora_rank"]
    defaults = {d.key: d.value for d in found.decisions if not d.given}
    assert defaults["learning_rate"] == "5e-05" and defaults["num_train_epochs"] == "3"
    assert defaults["freeze_vision_tower"] == "true" and defaults["image_max_pixels"] == "589824"
    assert lf_kit.decision(found, "plot_loss").verdict == "not needed"


@pytest.mark.parametrize("name", [k.name for k in all_keys().values() if k.verdict == UNSUPPORTED])
def test_what_is_not_supported_is_an_error_and_off_is_fine(place: Path, name: str) -> None:
    key = all_keys()[name]
    value: Any = {"bool": True, "int": 3, "float": 0.5, "text": "x", "list": "x", "mapping": {"a": 1}, "any": 3}[
        key.kind
    ]
    error = refused(place, name, **{name: value})
    assert error.remedy and ("x.yaml:" in error.where)
    off: Any = key.default if key.default is not None else None
    if name not in ("predict_with_generate",):
        assert lf_kit.decision(lf_kit.made(place, **{name: off}), name).verdict in ("not needed", "taken")


def test_keys_of_engines_it_does_not_have_are_passed_over_with_a_message(place: Path) -> None:
    found = lf_kit.made(place, ppo_epochs=2, galore_rank=8, swanlab_project="x", vllm_maxlen=10, kt_weight_path="w")
    for name in ("ppo_epochs", "galore_rank", "swanlab_project", "vllm_maxlen", "kt_weight_path"):
        assert lf_kit.decision(found, name).verdict == "not needed"
        assert lf_kit.decision(found, name).about


RULE_KEYS: dict[str, dict[str, Any]] = {
    "neat_packing": {"stage": "pt"},
    "train_on_prompt": {"stage": "pt"},
    "mask_history": {"train_on_prompt": True},
    "quantization_bit": {"finetuning_type": "full"},
    "adapter_name_or_path": {"finetuning_type": "full"},
    "pissa_init": {"stage": "kto"},
    "resume_from_checkpoint": {"stage": "rm", "finetuning_type": "full"},
    "load_best_model_at_end": {"stage": "rm"},
    "lora_alpha": {},
    "lora_rank": {},
    "do_eval": {},
    "predict_with_generate": {},
    "pure_bf16": {"deepspeed": "examples/deepspeed/ds_z3_config.json"},
}


@pytest.mark.parametrize("name", sorted({rule[0] for rule in RULES}))
def test_contradictions_are_refused(place: Path, name: str) -> None:
    values = {"quantization_bit": 4, "adapter_name_or_path": "a", "lora_alpha": -1, "lora_rank": -1,
              "resume_from_checkpoint": "x"}  # fmt: skip
    refused(place, name, **{**RULE_KEYS[name], name: values.get(name, True)})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"bf16": True, "fp16": True}, "both set"),
        ({"deepspeed": "examples/deepspeed/ds_z3_config.json", "fsdp": "full_shard"}, "deepspeed is set too"),
        ({"lora_rank": 0}, "tune.rank: Input should be greater than or equal to 1"),
        ({"stage": "ppo"}, "known: pt, sft, dpo, kto, rm"),
        ({"finetuning_type": "oft"}, "known: lora, freeze, full"),
        ({"val_size": 0.1, "eval_dataset": "identity"}, "eval_dataset is set too"),
        ({"eval_strategy": "steps"}, "there is no held-out data"),
        ({"freeze_language_model": True}, "all frozen"),
        ({"quantization_bit": 8}, "only 4 bits"),
        ({"optim": "lion_32bit"}, "no such optimizer"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "no such schedule"),
        ({"report_to": "swanlab"}, "not supported"),
        ({"streaming": True}, "max_steps is not set"),
        ({"interleave_probs": "0.5,0.5"}, "mix_strategy is concat"),
        ({"template": "qwen3_vl_nothing"}, "did you mean 'qwen3_vl_nothink'?"),
    ],
)
def test_other_things_that_cannot_be(place: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        lf_kit.made(place, **keys).located(place / "x.yaml")
    assert caught.value.exit_code == 64


# --- the launch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "devices", "ranks", "here"),
    [
        ({}, 0, 1, 1),
        ({}, 4, 4, 4),  # several devices: LLaMA-Factory's command starts torchrun by itself
        ({"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}, 0, 2, 2),
        ({"FORCE_TORCHRUN": "1"}, 0, 1, 1),
        ({"NPROC_PER_NODE": "2"}, 0, 1, 1),  # means something only with torchrun
        ({"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1"}, 8, 16, 1),
        ({"RANK": "3", "WORLD_SIZE": "6"}, 2, 6, 1),
        ({"USE_RAY": "1"}, 0, 5, 5),
    ],
)
def test_ranks_are_those_that_llamafactory_would_start(
    env: dict[str, str], devices: int, ranks: int, here: int
) -> None:
    found = launch_of(env, lambda: devices, None, 5)
    assert (found.ranks, found.here) == (ranks, here)


def test_several_nodes_become_a_torchrun_command() -> None:
    env = {"FORCE_TORCHRUN": "1", "NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4", "MASTER_ADDR": "10.0.0.1",
           "MASTER_PORT": "29501"}  # fmt: skip
    command = launch_of(env, lambda: 0, None, 1).torchrun
    assert command[1:] == ("-m", "torch.distributed.run", "--nnodes=2", "--node_rank=1", "--nproc_per_node=4",
                           "--master_addr=10.0.0.1", "--master_port=29501", "-m", "lensmith")  # fmt: skip


@pytest.mark.parametrize("name", [*REFUSED, "IMAGE_PLACEHOLDER", "DOWNSAMPLE_MODE"])
def test_variables_of_engines_it_does_not_have(name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        launch_of({name: "1"}, lambda: 0, None, 1)
    assert caught.value.remedy.startswith("unset")


def test_variables_without_effect_are_said(place: Path) -> None:
    assert any("DISABLE_VERSION_CHECK" in w for w in lf_kit.made(place, env={"DISABLE_VERSION_CHECK": "1"}).warnings)


def test_the_batch_is_that_of_all_ranks(place: Path) -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for ranks in (1, 3):
        run = lf_kit.made(place, ranks=ranks, **keys).located(place / "x.yaml").run
        assert (run.batch.samples, run.batch.partial) == (8 * ranks, "epoch_end")


def test_the_batch_of_the_first_start_is_kept_by_a_resume_on_other_ranks(place: Path) -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    first = lf_kit.made(place, ranks=2, **keys)
    output = first.located(place / "x.yaml").output
    record(first, output)
    assert json.loads((output / RECORD).read_text())["ranks"] == 2
    again = lf_kit.made(place, ranks=1, **keys)
    assert again.tree.values["batch"]["samples"] == 8  # nothing was trained yet: the start does not count
    (output / "checkpoints" / "step-00000001").mkdir(parents=True)
    again = lf_kit.made(place, ranks=1, **keys)
    assert again.tree.values["batch"]["samples"] == 16
    assert any("keeps them on 1 ranks" in w for w in again.warnings)
    record(again, output)
    assert json.loads((output / RECORD).read_text())["ranks"] == 2
    other = lf_kit.made(place, ranks=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert other.tree.values["batch"]["samples"] == 4  # another batch was asked for: the resume itself refuses it


# --- the run file -----------------------------------------------------------------------------------------------------


def test_the_written_run_is_the_one_that_trains(place: Path) -> None:
    file = place / "lora.yaml"
    file.write_text("model_name_or_path: model\n" + lf_kit.EXAMPLES["qwen2_5vl_lora_sft"] + "output_dir: saves/a\n")
    migrated = migrate(lf_kit.tree_of(file.read_text()), env={}, ranks=2)
    path = write(migrated, file, None)
    assert path == place / "lora.lensmith.yaml"
    assert load_run(path).run == migrated.located(file).run
    shown = path.read_text()
    for d in migrated.decisions:
        assert f"# {d.key}: " in shown
    assert write(migrated, file, None) == path
    path.write_text("changed")
    with pytest.raises(ConfigError, match="is there already"):
        write(migrated, file, None)
    assert text(migrated, file).count("\n# - ") == len(migrated.warnings)
