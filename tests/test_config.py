"""Run files: rows B69 to B74 of the bad-input list, overrides, and what every option must have."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import runs
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lensmith.config.build import apply_overrides, build, json_schema, models_in
from lensmith.config.yaml_file import MAX_BYTES, Tree, dump, parse_tree, parse_value, read_tree
from lensmith.core.errors import ConfigError
from lensmith.data.formats import Messages
from lensmith.data.options import Batch, Data, Source
from lensmith.engine.options import AdamW, Cosine, PartRate, Train
from lensmith.model.options import Freeze, Full, Lora, Model
from lensmith.recipe.run import Located, Run, load_run

BASE = "model: {path: m}\ndata:\n  train: train.jsonl\n"
LINE = 4  # where a text put behind BASE begins


def run_of(text: str, *overrides: str) -> Run:
    return build(Run, apply_overrides(parse_tree(BASE + text, "run.yaml"), overrides))


def refused(text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        run_of(text, *overrides)
    assert caught.value.exit_code == 64
    return caught.value


# --- scalars (B69) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("2.e3", 2000.0), (".5", 0.5), ("-1.5e+3", -1500.0), ("8", 8), ("010", 10),
        ("+7", 7), ("1_000", 1000), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"), ("0x10", "0x10"), ("0o7", "0o7"), ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"),
        ("=", "="), ("'8'", "8"), ("[1, a, 2e-3]", [1, "a", 2e-3]), ("{a: no}", {"a": "no"}),
    ],
)  # fmt: skip
def test_plain_scalars(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "problem", "remedy"),
    [
        ("optimizer: {lr: '1e-5'}", "optimizer.lr", "must be a number (found '1e-5')", "take the quotes away"),
        ("optimizer: {lr: high}", "optimizer.lr", "must be a number (found 'high')", ""),
        ("optimizer: {lr: true}", "optimizer.lr", "must be a number (found true)", ""),
        ("optimizer: {lr: null}", "optimizer.lr", "must be a number (found null)", ""),
        ("train: {recompute: no}", "train.recompute", "must be true or false (found 'no')", "write false"),
        ("train: {recompute: Yes}", "train.recompute", "must be true or false (found 'Yes')", "write true"),
        ("train: {recompute: 'true'}", "train.recompute", "must be true or false", "take the quotes away"),
        ("train: {recompute: 1}", "train.recompute", "must be true or false (found 1)", ""),
        ("train: {max_steps: 1e4}", "train.max_steps", "must be a whole number (found 10000.0)", ""),
        ("train: {max_steps: '10'}", "train.max_steps", "must be a whole number", "take the quotes away"),
        ("train: {max_steps: true}", "train.max_steps", "must be a whole number (found true)", ""),
        ("train: {seed: 12:30:00}", "train.seed", "must be a whole number (found '12:30:00')", ""),
        ("train: {device: 0}", "train.device", "must be text (found 0)", "put it in quotes"),
        ("output: 2024", "output", "must be text (found 2024)", "put it in quotes"),
        ("output: [a]", "output", "must be text (found a list)", ""),
        ("optimizer: {betas: 3}", "optimizer.betas", "must be a list (found 3)", ""),
        ("optimizer: {betas: [0.9]}", "optimizer.betas", "entry 1 is needed", ""),
        ("tune: 5", "tune", "must be a mapping of options (found 5)", ""),
        ("batch: [1]", "batch", "must be a mapping of options (found a list)", ""),
        ("optimizer: {parts: [a]}", "optimizer.parts", "must be a mapping of keys to values", ""),
        ("optimizer: {lr: .nan}", "optimizer.lr", "finite number", ""),
        ("optimizer: {lr: .inf}", "optimizer.lr", "finite number", ""),
        ("optimizer: {lr: -1e-5}", "optimizer.lr", "greater than or equal to 0 (found -1e-05)", ""),
        ("tune: {kind: lora, rank: 0}", "tune.rank", "greater than or equal to 1", ""),
        ("tune: {kind: freeze, train: [language, visoin]}", "tune.train.1", "no choice 'visoin'", "'vision'"),
        ("optimizer: {parts: {visoin: {lr: 1}}}", "optimizer.parts.visoin", "no choice 'visoin'", "'vision'"),
    ],
)  # fmt: skip
def test_wrong_types_are_located(text: str, key: str, problem: str, remedy: str) -> None:
    error = refused(text)
    assert error.message.startswith(f"run.yaml:{LINE} {key}: ")
    assert problem in error.message
    assert remedy in error.message.partition("-> ")[2]


def test_ints_are_floats_and_lists_are_tuples() -> None:
    run = run_of("optimizer: {lr: 1, betas: [0.5, 0.75]}\ntune: {kind: freeze, train: [vision]}\ntrain: {epochs: 2}")
    assert run.optimizer.lr == 1.0 and type(run.optimizer.lr) is float
    assert run.optimizer.betas == (0.5, 0.75) and run.train.epochs == 2.0
    assert isinstance(run.tune, Freeze) and run.tune.train == ("vision",)


def test_python_callers_get_the_same_strictness() -> None:
    assert Lora(parts=["language"]).parts == ("language",)  # type: ignore[arg-type]
    for group, values in ((AdamW, {"lr": "1e-5"}), (Train, {"recompute": "no"}), (Train, {"seed": True})):
        with pytest.raises(ValidationError):
            group.model_validate(values)
    with pytest.raises(ValidationError):
        Train().seed = 3  # type: ignore[misc]


# --- YAML itself (B69 to B71) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("train: {seed: 1}\ntrain: {seed: 2}", "DUPLICATE_KEY", 5),
        ("train:\n  seed: 1\n  seed: 2", "DUPLICATE_KEY", 6),
        ("model: {path: b}", "DUPLICATE_KEY", 4),
        ("a: !!python/object/apply:os.system [touch /tmp/owned]", "YAML_TAG", 4),
        ("a: !!python/name:os.system", "YAML_TAG", 4),
        ("\na: !mine 3", "YAML_TAG", 5),
        ("a: &x [*x]", "YAML_ALIAS", 4),
        ("a: *x", "YAML", 4),
        ("a: [", "YAML", 4),
        ("\n\ta: 1", "YAML", 5),
        ("1: a", "YAML", 4),
        ("true: a", "YAML", 4),
        ("? [a]\n: b", "YAML", 4),
        ("---\na: 1", "YAML", 4),
    ],
)
def test_yaml_is_refused_at_its_line(text: str, code: str, line: int) -> None:
    error = refused(text)
    assert (error.code, error.where) == (code, f"run.yaml:{line}"), str(error)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just text", "a: \x01", "a: " + "[" * 3000, "a: " + "9" * 5000], ids=lambda t: t[:9]
)
def test_yaml_that_is_no_run_file(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tree(text, "run.yaml")
    assert caught.value.code == "YAML" and caught.value.where == "run.yaml"


def test_an_empty_file_lacks_its_needed_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Run, parse_tree("# nothing\n", "run.yaml"))
    assert caught.value.code == "MISSING_KEY"
    assert "model: this key is needed" in caught.value.message and "data: this key is needed" in caught.value.message


@pytest.mark.parametrize("levels", [9, 50])
def test_alias_bombs_end_early(levels: int) -> None:
    """Nine aliases of nine aliases of ...: below the limit of aliases, 9**9 leaves when walked."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels)]
    begin = time.process_time()
    error = refused("\n".join(lines))
    assert error.code == "YAML_ALIAS" and error.where.startswith("run.yaml")
    assert time.process_time() - begin < 10


def test_a_few_aliases_and_merges_are_fine() -> None:
    run = run_of("optimizer: &o {lr: 3e-5, betas: [0.5, 0.9]}\nlog: {every_steps: 2}")
    assert run.optimizer.lr == 3e-5
    text = "optimizer:\n  parts:\n    vision: &p {lr: 1e-6, weight_decay: 0.1}\n    projector: {<<: *p, lr: 2e-6}\n"
    assert run_of(text).optimizer.parts["projector"] == PartRate(lr=2e-6, weight_decay=0.1)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def code(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            read_tree(path)
        assert str(path) in caught.value.where
        return caught.value.code

    assert code(tmp_path / "none.yaml") == "RUN_FILE"
    assert code(tmp_path) == "RUN_FILE"
    (tmp_path / "latin.yaml").write_bytes(BASE.encode() + "output: Käse".encode("latin-1"))
    assert code(tmp_path / "latin.yaml") == "ENCODING"
    (tmp_path / "big.yaml").touch()
    os.truncate(tmp_path / "big.yaml", MAX_BYTES + 1)
    assert code(tmp_path / "big.yaml") == "RUN_FILE"
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert read_tree(tmp_path / "bom.yaml").values["model"] == {"path": "m"}


# --- keys and kinds (B72) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        (
            "optimizer: {learning_rate: 1e-5}",
            "optimizer.learning_rate",
            "known here: betas, eps, kind, lora_b_ratio, lr",
        ),
        ("optimizer: {wieght_decay: 0.1}", "optimizer.wieght_decay", "did you mean 'weight_decay'?"),
        ("optimzer: {}", "optimzer", "did you mean 'optimizer'?"),
        ("tune: {kind: lora, rnak: 8}", "tune.rnak", "did you mean 'rank'?"),
        ("tune: {kind: full, rank: 8}", "tune.rank", "known here: kind"),
        ("optimizer: {parts: {vision: {lrr: 1}}}", "optimizer.parts.vision.lrr", "did you mean 'lr'?"),
        ("schedule: {kind: wsd, decya: 0.2}", "schedule.decya", "did you mean 'decay'?"),
        ("log: {sinks: [tensorboard, {kind: wandb, projct: x}]}", "log.sinks.1.projct", "did you mean 'project'?"),
        ("train: {early_stop: {patence: 2}}", "train.early_stop.patence", "did you mean 'patience'?"),
        ("evaluate: {generate: {max_new: 3}}", "evaluate.generate.max_new", "did you mean 'max_new_tokens'?"),
    ],
)
def test_unknown_keys_name_the_nearest(text: str, key: str, remedy: str) -> None:
    error = refused(text)
    assert error.code == "UNKNOWN_KEY"
    assert error.message.startswith(f"run.yaml:{LINE} {key}: unknown key {key.split('.')[-1]!r}\n  -> {remedy}")


def test_unknown_key_of_a_source() -> None:
    text = "model: {path: m}\ndata:\n  train:\n  - a.jsonl\n  - path: b.jsonl\n    wieght: 2\n"
    with pytest.raises(ConfigError, match=r"run\.yaml:6 data\.train\.1\.wieght: .*\n.*'weight'"):
        build(Run, parse_tree(text, "run.yaml"))
    text = "model: {path: m}\ndata:\n  train:\n    path: b\n    format:\n      kind: alpaca\n      output_colum: a\n"
    with pytest.raises(ConfigError, match=r"run\.yaml:7 data\.train.*output_colum'\n.*'output_column'"):
        build(Run, parse_tree(text, "run.yaml"))


@pytest.mark.parametrize(
    ("text", "key", "kinds"),
    [
        ("tune: qlora", "tune", "full, freeze, lora"),
        ("tune: {kind: qlora}", "tune", "full, freeze, lora"),
        ("schedule: cos", "schedule", "constant, linear, cosine, wsd"),
        ("optimizer: sgd", "optimizer", "adamw, adamw_8bit, muon, adafactor"),
        ("objective: ppo", "objective", "next_token, dpo, orpo, simpo, kto, reward"),
        ("objective: {kind: dpo, reference: copy}", "objective.reference", "cached, adapter, frozen"),
        ("log: {sinks: [comet]}", "log.sinks.0", "tensorboard, wandb, trackio, mlflow"),
    ],
)
def test_unknown_kinds_list_the_known(text: str, key: str, kinds: str) -> None:
    error = refused(text)
    assert error.message.startswith(f"run.yaml:{LINE} {key}: ")
    assert error.message.endswith(f"-> known here: {kinds}")


def test_options_without_a_kind_are_of_the_default_kind() -> None:
    assert run_of("tune: {rank: 16}").tune == run_of("", "tune.rank=16").tune == Lora(rank=16)
    assert run_of("schedule: {warmup: 0.5}").schedule == Cosine(warmup=0.5)
    assert "did you mean 'rank'?" in refused("tune: {rnak: 16}").message


def test_names_stand_for_choices() -> None:
    run = run_of("tune: full\noptimizer: adamw\nschedule: cosine\nobjective: next_token\nlog: {sinks: [tensorboard]}")
    assert (run.tune, run.optimizer, run.schedule) == (Full(), AdamW(), Cosine())
    assert run.log.sinks[0].kind == "tensorboard"
    sources = {"train": ["a.jsonl", {"path": "b.jsonl", "format": "messages"}], "eval": "c.jsonl"}
    data = build(Run, Tree({"model": {"path": "m"}, "data": sources})).data
    assert data.train == (Source(path="a.jsonl"), Source(path="b.jsonl", format=Messages()))
    assert data.eval == (Source(path="c.jsonl"),)


def test_all_mistakes_are_reported_at_once() -> None:
    error = refused("optimizer: {lr: x}\ntrain: {seeed: 1}\ntune: nope\n")
    assert [f"run.yaml:{line}" in error.message for line in (4, 5, 6)] == [True] * 3


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_change_the_file_and_leave_it_alone() -> None:
    tree = parse_tree("model: {path: m}\ndata: {train: [{path: a}, {path: b}]}\ntune: lora\n", "run.yaml")
    run = build(Run, apply_overrides(tree, [
        "optimizer.lr=2e-5", "tune.rank=16", "tune.parts=[vision, language]", "data.train.1.path=c",
        "data.train.0.weight=2", "train.clip_norm=", "log.sinks=[tensorboard]", "output=a=b", "train.max_steps=010",
    ]))  # fmt: skip
    assert run.optimizer.lr == 2e-5 and run.tune == Lora(rank=16, parts=("vision", "language"))
    assert [s.path for s in run.data.train] == ["a", "c"] and run.data.train[0].weight == 2.0
    assert run.train.clip_norm is None and run.train.max_steps == 10 and run.output == "a=b"
    assert tree.values["data"]["train"][1] == {"path": "b"} and tree.values["tune"] == "lora"


def test_later_overrides_win() -> None:
    assert run_of("tune: full", "tune=lora", "tune.rank=4", "tune.rank=5").tune == Lora(rank=5)
    assert run_of("", "tune.kind=freeze", "tune.last_layers=2").tune == Freeze(last_layers=2)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lr", "not of the form key.sub=value"),
        ("=3", "not of the form key.sub=value"),
        ("a..b=3", "not of the form key.sub=value"),
        ("data.train.0.path=x", "lies below a plain value"),
        ("model.path=[", "expected the node content"),
        ("model.path=!!python/name:os.system", "could not determine a constructor"),
        ("tune={kind: lora, kind: full}", "'kind' stands twice"),
    ],
)
def test_overrides_that_cannot_be_applied(override: str, problem: str) -> None:
    error = refused("", override)
    assert error.code == "OVERRIDE" and repr(override) in error.message and problem in error.message


def test_a_plain_value_has_nothing_below() -> None:
    error = refused("optimizer: {lr: 1e-5}", "optimizer.lr.x=1")
    assert error.code == "OVERRIDE" and "below a plain value" in error.message


def test_list_positions() -> None:
    text = "log: {sinks: [tensorboard]}"
    assert run_of(text, "log.sinks.0=wandb").log.sinks[0].kind == "wandb"
    for position in ("1", "-1", "x"):
        assert "the list has 1 entries" in refused(text, f"log.sinks.{position}=wandb").message


def test_a_wrong_override_is_named_instead_of_a_line() -> None:
    error = refused("optimizer: {lr: 1e-5}", "optimizer.lr=abc")
    assert error.message.startswith("optimizer.lr (override 'optimizer.lr=abc'): must be a number")
    error = refused("", "data.max_tokns=5")
    assert error.message.startswith("data.max_tokns (override 'data.max_tokns=5'): unknown key")
    assert "'max_tokens'" in error.message


# --- settings that contradict each other (B73) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("batch: {samples: 8, tokens: 100}", "run.yaml:4 batch.samples", "batch.samples and batch.tokens are both set"),
        ("batch: {device_tokens: 100}", "run.yaml:4 batch.device_tokens", "is below data.max_tokens 2048"),
        ("train:\n  epochs: null", "run.yaml:5 train.epochs", "train.max_steps is not set"),
        ("evaluate: {every_steps: 5}", "run.yaml", "no held-out data"),
        ("evaluate: {generate: {}}", "run.yaml", "no held-out data"),
        ("train: {early_stop: {}}", "run.yaml", "no held-out data"),
        ("save: {keep_best: loss}", "run.yaml", "no held-out data"),
    ],
)
def test_contradictions(text: str, where: str, problem: str) -> None:
    error = refused(text)
    assert error.code == "CONFIG" and error.where == where and problem in error.message and error.remedy


@pytest.mark.parametrize(
    "text",
    [
        "train: {epochs: 0}", "train: {epochs: null, max_steps: 0}", "batch: {samples: 0}", "batch: {samples: -1}",
        "save: {keep_last: 0}", "schedule: {kind: cosine, warmup: 1.5}", "optimizer: {eps: 0}", "train: {clip_norm: 0}",
        "tune: {kind: lora, dropout: 1}", "tune: {kind: lora, alpha: 0}", "precision: {preset: fp8}",
    ],
)  # fmt: skip
def test_values_out_of_range(text: str) -> None:
    assert refused(text).message.startswith(f"run.yaml:{LINE} ")


def test_consistent_settings_pass() -> None:
    assert run_of("train: {epochs: null, max_steps: 5}").train.max_steps == 5
    assert run_of("batch: {tokens: 9000}").samples_per_step is None
    assert run_of("", "data.holdout=0.1", "evaluate.every_steps=5").evaluate.every_steps == 5


# --- writing ----------------------------------------------------------------------------------------------------------

_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["no", "1e5", "1e-5", "010", "0x1F", "12:30:00", "null", "~", "", " a ", "<<", "=", "a: b", "- x", "#",
     "2024-01-01", "'", '"', "\\n", "1_0", ".5", "+1", "é", "\x85", "\u2028", "\ufeff", "\t", "\x1b[2J"]
)  # fmt: skip
_finite = st.floats(0, 1e6, allow_nan=False)
_tunes = st.one_of(
    st.builds(Full),
    st.builds(Freeze, train=st.just(("vision", "head")), last_layers=st.none() | st.integers(1, 50)),
    st.builds(
        Lora,
        rank=st.integers(1, 256),
        alpha=st.none() | st.floats(1e-9, 1e9),
        dropout=st.floats(0, 0.99),
        rslora=st.booleans(),
        pattern=st.none() | _text,
    ),
)
_runs = st.builds(
    Run,
    model=st.builds(Model, path=_text, revision=st.none() | _text),
    data=st.builds(
        Data,
        train=st.lists(st.builds(Source, path=_text, name=st.none() | _text, weight=_finite), max_size=3).map(tuple),
        media_roots=st.lists(_text, max_size=2).map(tuple),
    ),
    batch=st.builds(Batch, samples=st.none() | st.integers(1, 10**18), partial=st.sampled_from(["carry", "drop"])),
    tune=_tunes,
    optimizer=st.builds(AdamW, lr=_finite, parts=st.dictionaries(st.just("vision"), st.builds(PartRate, lr=_finite))),
    train=st.builds(Train, seed=st.integers(0, 2**63 - 1), epochs=st.floats(1e-6, 1e6)),
    output=st.none() | _text,
)


@settings(max_examples=150, deadline=None)
@given(_runs)
def test_load_of_dump_is_the_same(run: Run) -> None:
    text = dump(run.model_dump(mode="json"))
    assert build(Run, parse_tree(text)) == run
    assert build(Run, Tree(yaml.safe_load(text))) == run, "another YAML reader sees another run"


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _text,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3)))  # fmt: skip
def test_dump_of_anything_reads_back(value: Any) -> None:
    found = parse_value(dump(value))
    assert found == value and repr(found) == repr(value)


def test_resolved_yaml_of_a_run(tmp_path: Path) -> None:
    """Paths are made absolute, so it says the same from any folder; all else is as it was."""
    located = Located(run_of("tune: {kind: lora, rank: 4}\noptimizer: {lr: 1e-5}", "output=out"), tmp_path / "run.yaml")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "again.yaml").write_text(located.resolved_yaml(), encoding="utf-8")
    again = load_run(tmp_path / "sub" / "again.yaml")
    assert again.output == located.output and again.run.data.train[0].path == str(tmp_path / "train.jsonl")
    assert again.resolved_yaml() == located.resolved_yaml()
    same = {"data": located.run.data, "output": located.run.output}
    assert again.run.model_copy(update=same) == located.run


def test_no_token_of_the_environment_is_written(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_SecretSecretSecretSecretSecret"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    outcome = runs.quiet_train(
        runs.located(tmp_path / "out", qwen25, tiny.make_chat(tmp_path, 4), train={"max_steps": 1})
    )
    files = [p for p in outcome.folder.rglob("*") if p.is_file()]
    assert (outcome.folder / "run.yaml") in files
    assert not [p for p in files if secret.encode() in p.read_bytes()]


# --- what every option has --------------------------------------------------------------------------------------------


def groups(kind: type[BaseModel], seen: dict[type[BaseModel], str], path: str = "") -> dict[type[BaseModel], str]:
    if kind not in seen:
        seen[kind] = path
        for name, option in kind.model_fields.items():
            for inner in models_in(option):
                groups(inner, seen, f"{path}.{name}" if path else name)
    return seen


def test_every_option_is_documented_and_closed() -> None:
    found = groups(Run, {})
    assert len(found) > 25
    missing = [
        f"{path}.{name} ({kind.__name__})"
        for kind, path in found.items()
        for name, option in kind.model_fields.items()
        if name != "kind" and not (option.description or "").strip()
    ]
    assert not missing
    assert not [kind.__name__ for kind in found if not (kind.__doc__ or "").strip()]
    assert all(k.model_config.get("extra") == "forbid" and k.model_config.get("frozen") for k in found)


def test_every_choice_has_its_name_as_default() -> None:
    for kind in groups(Run, {}):
        if "kind" in kind.model_fields:
            assert get_args(kind.model_fields["kind"].annotation) == (kind.model_fields["kind"].default,)


SCHEMA = jsonschema.Draft202012Validator(json_schema(Run))


@pytest.mark.parametrize(
    "values",
    [
        {"tune": "lora", "optimizer": "adamw", "schedule": "wsd", "objective": "next_token"},
        {"tune": {"kind": "freeze", "train": ["vision"]}, "optimizer": {"lr": 1, "parts": {"vision": {"lr": 1e-6}}}},
        {"log": {"sinks": ["tensorboard", {"kind": "wandb", "project": "x"}]}},
        {"train": {"epochs": None, "max_steps": 3}},
        {"tune": {"rank": 16}, "schedule": {"warmup": 0.1}},
        {"data": {"train": [{"path": "a", "format": "alpaca"}, {"path": "b", "format": {"kind": "messages"}}]}},
        {"evaluate": {"generate": {"groups": {"n": "[0-9]+"}}}, "data": {"train": [{"path": "a"}], "holdout": 0.1}},
    ],
)  # fmt: skip
def test_json_schema_agrees_with_the_reader(values: dict[str, Any]) -> None:
    whole = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, **values}
    assert not list(SCHEMA.iter_errors(whole))
    run = build(Run, Tree(whole))
    assert not list(SCHEMA.iter_errors(run.model_dump(mode="json")))


@pytest.mark.parametrize(
    "values",
    [
        {"tune": "qlora"},
        {"tune": {"kind": "lora", "rnak": 8}},
        {"optimizer": {"lr": "1e-5"}},
        {"optimzer": {}},
        {"train": {"recompute": "no"}},
        {"batch": {"samples": 0}},
    ],
)
def test_json_schema_refuses_what_the_reader_refuses(values: dict[str, Any]) -> None:
    whole = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, **values}
    assert list(SCHEMA.iter_errors(whole))
    with pytest.raises(ConfigError):
        build(Run, Tree(whole))


def test_json_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)
    assert not math.isnan(len(json.dumps(SCHEMA.schema, allow_nan=False)))
