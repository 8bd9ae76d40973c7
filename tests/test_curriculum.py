"""Curricula: stages one after the other in one run. What crosses a border, what a kill loses, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from lensmith.checkpoint.store import read_manifest
from lensmith.config.yaml_file import Tree, parse_value
from lensmith.core.errors import ConfigError, DataError, RunError
from lensmith.recipe import export as export_module
from lensmith.recipe import session, stage
from lensmith.recipe.check import check
from lensmith.recipe.export import export
from lensmith.recipe.run import Located, from_tree, load_run
from lensmith.recipe.show import show
from lensmith.recipe.stream import free_name
from lensmith.recipe.train import train
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
UP = "model.language_model.layers.0.mlp.up_proj"
LORA = {"kind": "lora", "rank": 2}
FULL = {"kind": "full"}
TEXT = {"kind": "freeze", "train": ["language"]}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder: folder)


class Data:
    """Documents of text alone (two of three are cut), conversations with pictures, and held-out ones."""

    def __init__(self, folder: Path):
        self.chat = str(tiny.make_chat(folder, 12, pictures=3))
        self.held = str(tiny.make_chat(folder, 3, pictures=3, seed=1, name="held.jsonl"))
        texts = [f"document {i}. " + "red circle blue. " * (3 + 30 * (i % 3)) for i in range(8)]
        self.docs = str(folder / "docs.jsonl")
        Path(self.docs).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

    def mixture(self) -> dict[str, Any]:
        sources = [{"path": self.docs, "share": 1}, {"path": self.chat, "share": 3, "weight": 0.5}]
        return {"train": sources, "mixture": "shares"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    return Data(folder)


def of(name: str, steps: int, /, **over: Any) -> dict[str, Any]:
    return runs.merge({"name": name, "train": {"max_steps": steps}}, over)


def curriculum(folder: Path, base: Path, data: Data, stages: list[dict[str, Any]], /, **over: Any) -> Located:
    values: dict[str, Any] = {"data": {"max_tokens": 200}, "batch": {"samples": 3}, "stages": stages}
    return runs.located(folder, base, Path(data.docs), **runs.merge(values, over))


def records(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] in kinds]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/state/training.safetensors")


def parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")}


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """Of each stage the optimizer's state before its first step, under its name; and all parameters as `all/NAME`."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    begin = stage.StageRun.begin

    def recorded(self: stage.StageRun) -> None:
        begin(self)
        optimizer = {k: v.clone() for k, v in self.built.optimizer.tensors().items()}
        named = self.built.tuned.model.named_parameters()
        found[self.name] = optimizer | {f"all/{n}": p.detach().clone() for n, p in named}

    monkeypatch.setattr(stage.StageRun, "begin", recorded)
    return found


# -- killed and resumed -----------------------------------------------------------------------------------------------

Point = tuple[str, str, int]
"""(where, stage, step of the stage)."""

POINTS: list[Point] = [
    ("saved", "text", 2), ("cross", "text", 0), ("begun", "mixed", 0), ("logged", "mixed", 1), ("logged", "mixed", 2),
    ("saved", "mixed", 2), ("logged", "mixed", 3), ("logged", "mixed", 4), ("evaluated", "mixed", 0),
    ("saved", "mixed", 4), ("cross", "mixed", 0), ("logged", "lora", 1), ("saved", "lora", 2), ("merging", "lora", 0),
    ("merged", "lora", 0), ("begun", "large", 0), ("logged", "large", 1), ("saved", "large", 1),
]  # fmt: skip


def four_stages(folder: Path, base: Path, data: Data) -> Located:
    """Text with the vision tower frozen; a mixture with pictures, everything trains, evaluated; adapters; larger
    pictures on the merged model."""
    held = {"eval": data.held}
    return curriculum(folder, base, data, [
        of("text", 2, tune=TEXT),
        of("mixed", 4, tune=FULL, data={**data.mixture(), **held}, save={"every_steps": 2, "keep_best": "loss"},
           evaluate={"every_steps": 2}),
        of("lora", 2, tune={**LORA, "dropout": 0.1}, data={"train": data.chat}),
        of("large", 2, tune=FULL, data={"train": data.chat, "max_pixels": 6000}, save={"every_steps": 1}),
    ], train={"clip_norm": 1.0}, schedule={"kind": "cosine", "warmup_steps": 1})  # fmt: skip


def killed(point: Point | None, work: Callable[[], Any]) -> None:
    """Run `work` in a child that is killed at `point`; without one it has to end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads, which do nothing here
        pid = os.fork()
    if pid == 0:
        try:
            if point is not None:
                arm(*point)
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            import traceback

            traceback.print_exc()
            os._exit(99)
    status = os.waitpid(pid, 0)[1]
    if point is None:
        assert os.waitstatus_to_exitcode(status) == 0
    else:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)


def arm(where: str, name: str, step: int) -> None:
    """SIGKILL this process when the run comes to a point: no handler, no `finally` runs."""
    run = stage.StageRun

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(method: str, due: Callable[..., bool]) -> None:
        original = getattr(run, method)

        def wrapped(self: Any, *args: Any) -> Any:
            found = original(self, *args)
            if self.name == name and due(self, *args):
                die()
            return found

        setattr(run, method, wrapped)

    if where == "begun":
        after("begin", lambda self: True)
    elif where == "evaluated":  # at the end of the stage, its figures written
        after("_record_eval", lambda self, p, found: found["when"] == "after")
    elif where in ("logged", "saved"):
        after("_log" if where == "logged" else "_save", lambda self, p, *_: p.step == step)
    elif where == "cross":
        session.Session._cross = lambda self, stage: die()  # type: ignore[method-assign, assignment]
    elif where == "merging":  # the merged model is written and not yet in its place
        export_module.sync_folder = lambda folder: die()  # type: ignore[assignment]
    elif where == "merged":
        session.export = lambda *args, **kwargs: (export(*args, **kwargs), die())  # type: ignore[assignment]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[int, set[str]]]:
    """Writes the samples of every step into the run folder; reads them back: step -> what it was trained on."""
    log = stage.StageRun._log

    def noted(self: stage.StageRun, p: Any, data: Any, *rest: Any) -> None:
        tokens = [row.ids_T.tolist() for row in data.rows]
        line = json.dumps([self.at(p), self.name, data.step.members.tolist(), tokens])
        with (self.output / "seen.jsonl").open("a") as file:
            file.write(line + "\n")
        log(self, p, data, *rest)

    def read(folder: Path) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for line in (folder / "seen.jsonl").read_text().splitlines():
            found.setdefault(json.loads(line)[0], set()).add(line)
        return found

    monkeypatch.setattr(stage.StageRun, "_log", noted)
    return read


TIMED = ("tokens_per_second", "samples_per_second", "step_seconds", "data_wait_seconds", "rss_bytes",
         "row_seconds_spread", "gpu_bytes")  # fmt: skip


def untimed(folder: Path) -> list[dict[str, Any]]:
    """Steps and evaluations in order, less what a clock told."""
    return [{k: v for k, v in r.items() if k not in TIMED} for r in records(folder, "step", "eval")]


def same_ends(one: Path, other: Path, seen: Callable[[Path], dict[int, set[str]]]) -> None:
    for name in ("training", "random"):
        path = f"checkpoints/step-00000010/state/{name}.safetensors"
        assert (one / path).read_bytes() == (other / path).read_bytes()
    assert untimed(one) == untimed(other)
    assert seen(one) == seen(other) and [len(lines) for lines in seen(one).values()] == [1] * 10
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for key in ("losses", "samples", "stages", "sources", "tokens", "heldout", "applied_steps", "steps"):
        assert summaries[0][key] == summaries[1][key], key
    assert pq.read_table(one / "ledger.parquet").equals(pq.read_table(other / "ledger.parquet"))
    kept = [sorted(p.name for p in (folder / "checkpoints").iterdir()) for folder in (one, other)]
    assert kept[0] == kept[1]


@pytest.fixture
def whole(tmp_path: Path, qwen25: Path, data: Data, seen: Any) -> Path:
    """The four stages without an interruption."""
    runs.quiet_train(four_stages(tmp_path / "whole", qwen25, data))  # here, so that its imports serve the children
    return tmp_path / "whole"


def test_killed_at_every_point_in_turn(tmp_path: Path, qwen25: Path, data: Data, whole: Path, seen: Any) -> None:
    """One run, killed 18 times: after steps and saves, at the borders, in the merge. It ends in the same bits."""
    assert [(r["step"], r["stage"]) for r in records(whole, "step")] == [
        *((n, "text") for n in (1, 2)), *((n, "mixed") for n in (3, 4, 5, 6)), *((n, "lora") for n in (7, 8)),
        *((n, "large") for n in (9, 10)),
    ]  # fmt: skip
    folder = tmp_path / "run"
    for point in POINTS:
        killed(point, lambda: runs.quiet_train(four_stages(folder, qwen25, data)))
    killed(None, lambda: runs.quiet_train(four_stages(folder, qwen25, data)))
    same_ends(whole, folder, seen)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS, ids=lambda p: "-".join(map(str, p)))
def test_killed_once_at_any_point(
    tmp_path: Path, qwen25: Path, data: Data, whole: Path, seen: Any, point: Point
) -> None:
    folder = tmp_path / "run"
    killed(point, lambda: runs.quiet_train(four_stages(folder, qwen25, data)))
    killed(None, lambda: runs.quiet_train(four_stages(folder, qwen25, data)))
    same_ends(whole, folder, seen)


# -- what crosses a border --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["keep", "fresh"])
def test_moments_cross_a_border_by_name_or_not_at_all(
    tmp_path: Path, qwen25: Path, data: Data, begun: Any, kept: str
) -> None:
    """Part `language` trains in both stages, the rest only in the second one."""
    stages = [of("one", 2, tune=TEXT), of("two", 1, tune=FULL, optimizer_state=kept)]
    runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, stages))
    border, second = state(tmp_path / "run", 2), begun["two"]
    for name, value in parameters(border).items():
        assert torch.equal(second[f"param/{name}"], value)
    moments = {k for k in border if not k.startswith("param/")}
    assert {k.split("/")[0] for k in moments} == {"step", "exp_avg", "exp_avg_sq"}
    found = {k for k in second if not k.startswith(("param/", "all/"))}
    assert found == (moments if kept == "keep" else set())
    for key in found:
        assert torch.equal(second[key], border[key])
    assert float(state(tmp_path / "run", 3)[f"step/{UP}.weight"]) == (3 if kept == "keep" else 1)


def test_a_stage_begins_from_the_masters(tmp_path: Path, data: Data, begun: Any) -> None:
    """Small updates in bfloat16: what is published is rounded; the next stage goes on from the float32 masters."""
    base = tiny.make_model(tmp_path / "base", dtype=torch.bfloat16)
    stages = [of("one", 2), of("two", 1)]
    over: dict[str, Any] = {"precision": {"preset": "bf16-params"}, "optimizer": {"lr": 1e-5}}
    runs.quiet_train(curriculum(tmp_path / "run", base, data, stages, **over))
    border = tmp_path / "run/checkpoints/step-00000002"
    published = load_file(border / "model/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    master = state(tmp_path / "run", 2)[f"param/{UP}.weight"]
    assert published.dtype == torch.bfloat16 and not torch.equal(published.float(), master)
    assert torch.equal(begun["two"][f"param/{UP}.weight"], master)
    live = begun["two"][f"all/{UP}.weight"]
    assert live.dtype == torch.bfloat16 and torch.equal(live, master.bfloat16())


def test_what_trains_may_change_at_every_border(tmp_path: Path, qwen25: Path, data: Data, begun: Any) -> None:
    """freeze, full, adapters, the same adapters, other adapters (dropout), full: merged where it has to be, once."""
    other = {**LORA, "dropout": 0.5}
    tunes = [("text", TEXT), ("full", FULL), ("one", LORA), ("same", LORA), ("other", other), ("last", FULL)]
    stages = [of(name, 1, tune=tune, data={"train": data.chat}) for name, tune in tunes]
    runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, stages))
    run = tmp_path / "run"
    assert [r["stage"] for r in records(run, "step")] == [name for name, _ in tunes]
    bases = [read_manifest(run / f"checkpoints/step-{n:08d}")["base"] for n in range(1, 7)]
    at = "checkpoints/step-0000000"
    assert bases == [None, f"{at}1/model", f"{at}2/model", f"{at}2/model", "stages/4-same", "stages/5-other"]

    weight = f"{UP}.weight"
    assert torch.equal(begun["full"][f"param/{weight}"], state(run, 1)[f"param/{weight}"])
    trained_full = state(run, 2)[f"param/{weight}"]
    frozen = begun["one"][f"all/{UP}.base_layer.weight"]
    assert torch.equal(frozen, trained_full) and not torch.equal(frozen, begun["text"][f"param/{weight}"])
    # the adapters of `one` go on in `same`; `other` begins with new ones (B = 0) on what was merged
    a, b = f"param/{UP}.lora_A.default.weight", f"param/{UP}.lora_B.default.weight"
    assert not begun["one"][b].any() and begun["same"][b].any()
    for key in (a, b):
        assert torch.equal(begun["same"][key], state(run, 3)[key])
    for begin, end, base in (("other", 4, trained_full), ("last", 5, begun["other"][f"all/{UP}.base_layer.weight"])):
        merged = begun[begin][f"all/{UP}.base_layer.weight" if begin == "other" else f"param/{weight}"]
        by_hand = base + 2 * (state(run, end)[b] @ state(run, end)[a])  # alpha / r = 2
        assert torch.equal(merged, by_hand) or float((merged - by_hand).abs().max()) <= 1e-7
        assert float((merged - base).abs().max()) > 1e-6
    assert not begun["other"][b].any()
    assert not [k for k in begun["other"] if k.startswith("exp_avg/")]


def test_a_stage_that_is_over_lets_go_of_its_model(
    tmp_path: Path, qwen25: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    begin = stage.StageRun.begin

    def counted(self: stage.StageRun) -> None:
        alive.append(sum(ref() is not None for ref in models))
        begin(self)
        models.extend(weakref.ref(x) for x in (self.built.tuned.model, self.built.optimizer))

    monkeypatch.setattr(stage.StageRun, "begin", counted)
    held = {"data": {"eval": data.held}}
    stages = [of("one", 1, **held), of("two", 1, tune=LORA), of("three", 1)]
    runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, stages))
    assert alive == [0, 0, 0]


# -- a finished curriculum --------------------------------------------------------------------------------------------


def stopping(folder: Path, base: Path, data: Data, *, more: int = 0, **over: Any) -> Located:
    """The second stage has a rate of 0, so that its second evaluation is no better than the first and it stops."""
    held = {"train": data.chat, "eval": data.held}
    stages = [
        of("text", 3, tune=TEXT),
        of("stops", 9, data=held, optimizer={"lr": 0.0}, evaluate={"every_steps": 1, "before": True},
           train={"early_stop": {"patience": 1}}, save={"keep_best": "loss", "every_steps": 1}),
        of("last", 3, data={**data.mixture(), "holdout": 0.4}, evaluate={"every_steps": 2}),
        *(of(f"more-{n}", 2, tune=LORA) for n in range(more)),
    ]  # fmt: skip
    return curriculum(folder, base, data, stages, **runs.merge({"save": {"keep_last": 1}}, over))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, qwen25: Path, data: Data) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENSMITH_CACHE", str(folder / "cache"))
        patch.setattr(session, "write_report", lambda folder: folder)
        runs.quiet_train(stopping(folder / "run", qwen25, data))
        yield folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_an_early_stop_goes_on_to_the_next_stage(finished: Path) -> None:
    assert [r["stage"] for r in records(finished, "step")] == ["text"] * 3 + ["stops"] * 2 + ["last"] * 3
    assert [r["step"] for r in records(finished, "step")] == [1, 2, 3, 4, 5, 6, 7, 8]
    stops = [r for r in records(finished, "event") if r["name"] == "early_stop"]
    assert [(r["step"], r["stage"]) for r in stops] == [(5, "stops")]
    evaluated = [(r["step"], r["stage"]) for r in records(finished, "eval")]
    assert evaluated == [(3, "stops"), (4, "stops"), (5, "stops"), (5, "stops"), (5, "last"), (7, "last"), (8, "last")]


def test_borders_and_each_stages_best_are_kept(finished: Path) -> None:
    """keep_last 1: the newest (8) and the borders (3, 5). Of `stops`, step 4 was the best until 5 was as good."""
    assert sorted(int(p.name[5:]) for p in (finished / "checkpoints").iterdir()) == [3, 5, 8]
    manifest = read_manifest(finished / "checkpoints/step-00000008")
    assert manifest["borders"] == [3, 5] and manifest["first_step"] == 5 and manifest["stage"] == 2
    assert [s["stage.name"] for s in manifest["settled"]] == ["text", "stops"]


def test_the_best_of_a_stage_that_is_over_is_kept(tmp_path: Path, qwen25: Path, data: Data) -> None:
    """A rate so high that the first evaluation stays the best one."""
    held = {"train": data.chat, "eval": data.held}
    stages = [
        of("worse", 3, data=held, optimizer={"lr": 1.0}, evaluate={"every_steps": 1}, save={"keep_best": "loss"}),
        of("next", 2, save={"every_steps": 1}),
    ]
    over: dict[str, Any] = {"save": {"keep_last": 1}, "guard": {"max_in_a_row": 9}}
    out = runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, stages, **over))
    scores = [r["loss"] for r in records(tmp_path / "run", "eval") if r["stage"] == "worse"][:3]
    best = min(range(3), key=lambda n: scores[n]) + 1
    assert best < 3, scores
    assert sorted(int(p.name[5:]) for p in (out.folder / "checkpoints").iterdir()) == [best, 3, 5]


def test_figures_of_every_stage(finished: Path, data: Data) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    stages = {s["name"]: s for s in summary["stages"]}
    assert {n: s["steps"] for n, s in stages.items()} == {"text": 3, "stops": 2, "last": 3}
    assert set(summary["heldout"]["stages"]) == {"stops", "last"}
    for name in ("stops", "last"):
        assert {"after"} <= set(summary["heldout"]["stages"][name])
    assert summary["heldout"]["after"] == summary["heldout"]["stages"]["last"]["after"]
    assert summary["heldout"]["stages"]["stops"]["before"] == summary["heldout"]["stages"]["stops"]["after"]  # rate 0

    table = pq.read_table(finished / "ledger.parquet").to_pylist()
    for name, own in stages.items():
        rows = [r for r in table if r["source"].startswith(f"{name}/")]
        verdicts = [r["verdict"] for r in rows]
        samples = own["samples"]
        assert [verdicts.count(v) for v in ("train", "drop", "held_out")] == [
            samples["train"], samples["dropped"], samples["held_out"],
        ]  # fmt: skip
        assert len(rows) == samples["read"]
    assert stages["last"]["samples"]["held_out"] > 0 and stages["text"]["samples"]["read"] > 8  # documents are cut
    total = {k: sum(s["samples"][k] for s in stages.values()) for k in ("read", "train", "dropped", "held_out")}
    assert total == {k: summary["samples"][k] for k in total} and len(table) == total["read"]
    # draws of 1:3, earliest deadline first: chat chat docs chat, twice, and chat
    found = [(s["stage"], s["samples"]) for s in summary["sources"]]
    assert found == [("text", 9), ("stops", 6), ("last", 2), ("last", 7)]


def test_the_run_file_in_the_run_folder_is_the_run(run: Path, finished: Path) -> None:
    """It loads again, says the same, resumes (here: finds everything done), and goes on with one stage more."""
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace(str(finished), str(run)))
    again = load_run(run)
    assert again.resolved_yaml() == (run / "run.yaml").read_text()
    assert [s.stage_name for s in again.stages] == ["text", "stops", "last"]
    before = records(run, "step")
    out = train(run, terminal=QUIET)
    assert records(run, "step") == before and out.summary["steps"] == 8
    assert out.summary["losses"] == json.loads((finished / "summary.json").read_text())["losses"]


def test_a_stage_more_goes_on_from_the_last_border(run: Path, qwen25: Path, data: Data, begun: Any) -> None:
    before = records(run, "step")
    out = runs.quiet_train(stopping(run, qwen25, data, more=2))
    assert records(run, "step")[:8] == before
    assert [(r["step"], r["stage"]) for r in records(run, "step")[8:]] == [
        (9, "more-0"), (10, "more-0"), (11, "more-1"), (12, "more-1"),
    ]  # fmt: skip
    assert list(begun) == ["last", "more-0", "more-1"]
    assert read_manifest(run / "checkpoints/step-00000012")["borders"] == [3, 5, 8, 10]
    assert out.summary["heldout"]["stages"].keys() >= {"stops", "last"}


def changed(number: int, **over: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda stages: [runs.merge(s, over) if n == number else s for n, s in enumerate(stages)]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (changed(0, optimizer={"lr": 5e-4}), "optimizer: checkpoint"),
        (changed(0, train={"max_steps": 4}), "train.max_steps: checkpoint 3, now 4"),
        (changed(0, tune=FULL), "tune: checkpoint"),
        (changed(0, name="texts"), "stage.name: checkpoint text, now texts"),
        (changed(0, data={"max_tokens": 150}), "data.max_tokens: checkpoint 200, now 150"),
        (changed(1, data={"max_pixels": 4000}), "pixels: checkpoint"),
        (changed(1, optimizer_state="fresh"), "stage.optimizer_state: checkpoint keep, now fresh"),
        (lambda s: s[1:], "stage.name: checkpoint text, now stops"),
        (lambda s: [s[1], s[0], s[2]], "stage.name: checkpoint text, now stops"),
        (lambda s: [s[0], s[2], s[1]], "stage.name: checkpoint stops, now last"),
        (lambda s: s[:2], "the checkpoint is of stage 3; the run file has 2"),
        (lambda s: [], "stage.name: checkpoint text, now "),
    ],
    ids=["rate", "length", "tune", "name", "data", "pixels", "moments", "removed", "order", "later", "last", "none"],
)
def test_a_stage_that_is_done_cannot_change(
    run: Path, qwen25: Path, data: Data, change: Callable[..., Any], field: str
) -> None:
    located = stopping(run, qwen25, data)
    stages = [s.model_dump(exclude_defaults=True) for s in (x.stage for x in located.stages) if s is not None]
    told = curriculum(run, qwen25, data, change(stages), save={"keep_last": 1})
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError) as caught:
        runs.quiet_train(told)
    assert field in caught.value.message and caught.value.code == "RESUME"
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_is_not_decided_yet_may_change(tmp_path: Path, qwen25: Path, data: Data) -> None:
    """Evaluation and saving of a stage that is done; the order and the settings of those to come."""
    first, second, third = of("one", 2), of("two", 1), of("three", 1, tune=LORA)
    runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, [first]))
    watched = runs.merge(first, {"save": {"every_steps": 1}, "data": {"workers": 1}, "batch": {"packing": False}})
    out = runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, [watched, third, second]))
    assert [r["stage"] for r in records(tmp_path / "run", "step")] == ["one", "one", "three", "two"]
    assert out.summary["steps"] == 4


def test_a_longer_stage_is_merged_anew(tmp_path: Path, qwen25: Path, data: Data, begun: Any) -> None:
    """The last checkpoint of `two` is taken away to make `one` longer: its merged adapter of before is not taken."""

    def run(steps: int) -> None:
        stages = [of("one", steps, tune=LORA), of("two", 1, tune=FULL)]
        runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, stages))

    run(1)
    first = begun["two"][f"param/{UP}.weight"]
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    run(3)
    at, b, base = state(tmp_path / "run", 3), "lora_B.default.weight", load_file(qwen25 / "model.safetensors")
    by_hand = base["model.layers.0.mlp.up_proj.weight"] + 2 * (
        at[f"param/{UP}.{b}"] @ at[f"param/{UP}.lora_A.default.weight"]
    )
    assert float((begun["two"][f"param/{UP}.weight"] - by_hand).abs().max()) <= 1e-7
    assert float((first - by_hand).abs().max()) > 1e-5


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_behind_a_border(run: Path, finished: Path, qwen25: Path, data: Data) -> None:
    """Only the border verifies: the stage behind it begins again and ends in the same bits; its figures are its own."""
    flip(run / "checkpoints/step-00000008/state/random.safetensors")
    runs.quiet_train(stopping(run, qwen25, data))
    assert untimed(run) == untimed(finished)
    for name in ("training", "random"):
        path = f"checkpoints/step-00000008/state/{name}.safetensors"
        assert (run / path).read_bytes() == (finished / path).read_bytes()
    heldout = [json.loads((f / "summary.json").read_text())["heldout"] for f in (run, finished)]
    assert heldout[0] == heldout[1]


def test_a_damaged_border_is_named(run: Path, qwen25: Path, data: Data) -> None:
    """The stage at hand began from it: what of it is frozen would be read from damaged weights."""
    flip(run / "checkpoints/step-00000005/model/model.safetensors")
    with pytest.raises(RunError, match=r"DAMAGED.*began from it: .*step-00000005/model/model.safetensors"):
        runs.quiet_train(stopping(run, qwen25, data))
    shutil.rmtree(run / "checkpoints/step-00000005")
    with pytest.raises(RunError, match=r"DAMAGED.*step-00000005.* is gone"):
        runs.quiet_train(stopping(run, qwen25, data))


# -- added tokens, export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [LORA, FULL], ids=["lora", "full"])
def test_added_tokens_keep_their_rows(tmp_path: Path, data: Data, begun: Any, last: dict[str, Any]) -> None:
    """Rows that were trained in one stage are where the next begins; the export loads in stock transformers."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    base = tiny.make_model(tmp_path / "base", tie=False)
    texts = [f"a <point> {n} red <point> blue" for n in range(6)]
    (tmp_path / "points.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    points = {"train": str(tmp_path / "points.jsonl")}
    before = LORA if last is FULL else FULL
    stages = [of("one", 2, tune=before, data=points), of("two", 1, tune=last, data=points)]
    located = curriculum(tmp_path / "run", base, data, stages, model={"add_tokens": ["<point>"]})
    out = runs.quiet_train(located)
    export(Path(out.summary["checkpoint"]), tmp_path / "exported", base=None, merge=True, dtype=None, shard_gb=5,
           terminal=QUIET)  # fmt: skip
    number = AutoTokenizer.from_pretrained(tmp_path / "exported").convert_tokens_to_ids("<point>")
    table = "model.language_model.embed_tokens"
    all_rows = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    mean = all_rows[:number].mean(0)
    second = begun["two"]
    rows = second.get(f"all/{table}.weight", second.get(f"all/{table}.token_adapter.base_layer.weight"))
    assert rows is not None
    trained = (
        state(tmp_path / "run", 2)[f"param/{table}.weight"][number]
        if last is LORA
        else state(tmp_path / "run", 2)[f"param/{table}.token_adapter.trainable_tokens_delta.default"][0]
    )
    assert torch.allclose(rows[number], trained) and not torch.allclose(trained, mean, atol=1e-4)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "exported")("a <point>", return_tensors="pt").input_ids
    assert number in ids and torch.isfinite(model(input_ids=ids).logits).all()


# -- run files --------------------------------------------------------------------------------------------------------

RUN_FILE = """\
model: {{path: {model}, template: force}}
data: {{train: {docs}, max_tokens: 200}}
batch: {{samples: 3, device_tokens: 512}}
tune: {{rank: 4}}
schedule: {{warmup: 0.1}}
train: {{device: cpu, threads: 1, max_steps: 2}}
output: out
stages:
  - name: text
    tune: {{kind: lora, dropout: 0.5}}
    schedule: {{kind: cosine, final: 0.2}}
  - name: chat
    data:
      train:
        - path: {chat}
          share: 1
      mixture: shares
      max_tokens: 400
    tune: full
  - name: last
    data: {{train: {chat}}}
    tune: lora
"""


def written(folder: Path, base: Path, data: Data, **changes: str) -> Path:
    text = RUN_FILE.format(model=base, docs=data.docs, chat=data.chat)
    for old, new in changes.items():
        before = {"one": "dropout: 0.5", "two": "share: 1", "three": "max_tokens: 400", "four": "name: last"}[old]
        assert before in text
        text = text.replace(before, new)
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_a_choice_of_the_same_kind_is_merged(tmp_path: Path, qwen25: Path, data: Data) -> None:
    """However the kind is written: `{rank: 4}`, `{kind: lora}` and `lora` are one kind, so the rank stays 4."""
    stages = [s.run for s in load_run(written(tmp_path, qwen25, data)).stages]
    assert [(s.tune.kind, getattr(s.tune, "rank", None)) for s in stages] == [("lora", 4), ("full", None), ("lora", 4)]
    assert (stages[0].tune.dropout, stages[2].tune.dropout) == (0.5, 0.0)  # type: ignore[union-attr]
    assert (stages[0].schedule.warmup, stages[0].schedule.final) == (0.1, 0.2)  # type: ignore[union-attr]
    assert [s.data.max_tokens for s in stages] == [200, 400, 200]
    assert [s.data.mixture.kind for s in stages] == ["concat", "shares", "concat"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"one": "droput: 0.5"}, "run.yaml:10 tune.lora.droput|run.yaml:10 tune.droput"),
        ({"two": "shares: 1"}, "run.yaml:16 data.train.0.shares"),
        ({"two": "share: -1"}, "run.yaml:16 data.train.0.share"),
        ({"three": "max_tokens: many"}, "run.yaml:18 data.max_tokens"),
        ({"three": "max_tokens: 1000"}, "run.yaml:18: |run.yaml:3 batch.device_tokens"),
        ({"four": "name: text"}, "run.yaml:8 stages"),
        ({"four": "name: a/b"}, "run.yaml:20 stages.2.name"),
        ({"four": "name: last\n    optimiser: {lr: 1}"}, "run.yaml:21 stages.2.optimiser"),
    ],
)
def test_a_mistake_in_a_stage_names_its_line(
    tmp_path: Path, qwen25: Path, data: Data, change: dict[str, str], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(written(tmp_path, qwen25, data, **change))
    assert any(place in str(caught.value) for place in expected.split("|")), str(caught.value)


def test_overrides_reach_a_stage(tmp_path: Path, qwen25: Path, data: Data) -> None:
    path = written(tmp_path, qwen25, data)
    stages = load_run(path, ["stages.1.data.max_tokens=300", "data.max_tokens=128"]).stages
    assert [s.run.data.max_tokens for s in stages] == [128, 300, 128]
    with pytest.raises(ConfigError, match=r"data.max_tokens \(override 'stages.1.data.max_tokens=x'\)"):
        load_run(path, ["stages.1.data.max_tokens=x"])
    with pytest.raises(ConfigError, match=r"run\.yaml:18 data\.max_tokens"):  # what the stage says, not the override
        load_run(written(tmp_path, qwen25, data, three="max_tokens: many"), ["data.max_tokens=128"])


def test_dry_run_check_and_show(tmp_path: Path, qwen25: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    located = load_run(written(tmp_path, qwen25, data))
    out = train(located, terminal=QUIET, dry_run=True)
    assert [s["steps"] for s in out.summary["stages"]] == [1, 1, 1] and not (tmp_path / "out").exists()
    capsys.readouterr()
    check(located, Terminal("json"))
    events = [parse_value(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["stage"] for e in events if e.get("event", e.get("kind")) == "stage"] == ["text", "chat", "last"]
    assert sum(e.get("event", e.get("kind")) == "plan" for e in events) == 3
    for stage_of, name in ((located, "docs"), (located.of("chat"), "train")):
        show(stage_of, 0, Terminal("json"))
        assert f"{name}.jsonl:1" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"STAGE.*'large'"):
        located.of("large")


def test_check_and_train_see_every_stage_first(tmp_path: Path, qwen25: Path, data: Data) -> None:
    """What stops the last stage stops the run before its first step, and names the stage."""
    (tmp_path / "empty.jsonl").write_text("")
    for change, code in (
        ({"train": str(tmp_path / "empty.jsonl")}, "NO_ROWS"),
        ({"train": data.docs, "max_tokens": 8, "documents": {"too_long": "drop"}}, "NO_SAMPLES"),
    ):
        located = curriculum(tmp_path / "run", qwen25, data, [of("one", 1), of("two", 1, data=change)])
        for go in (lambda x=located: check(x, QUIET), lambda x=located: runs.quiet_train(x)):
            with pytest.raises(DataError, match=f"{code}.*stage 'two': "):
                go()
    stages = [of("one", 1), of("two", 1, batch={"samples": 99, "partial": "drop"})]
    with pytest.raises(DataError, match=r"NO_STEPS.*stage 'two': "):
        runs.quiet_train(curriculum(tmp_path / "run", qwen25, data, stages))
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tune": {"kind": "lora", "pattern": "nomatch"}}, "nomatch"),
        ({"tune": {"kind": "freeze", "train": ["language"], "last_layers": 50}}, "tune.last_layers is 50"),
        ({"optimizer": {"parts": {"vision": {"lr": 1e-5}}}, "tune": "lora"}, "of which nothing trains"),
    ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first(
    tmp_path: Path, qwen25: Path, change: dict[str, Any], problem: str
) -> None:
    """Also by check, and without weights."""
    (tmp_path / "t.jsonl").write_text('{"text": "a red circle"}\n' * 4)
    tree = {
        "model": {"path": str(qwen25), "template": "force"}, "data": {"train": "t.jsonl", "max_tokens": 512},
        "batch": {"samples": 4, "device_tokens": 512}, "train": {"max_steps": 1, "device": "cpu", "threads": 1},
        "stages": [{"name": "one", "tune": "full"}, {"name": "two", **change}], "output": "out",
    }  # fmt: skip
    located = from_tree(Tree(tree), tmp_path / "run.yaml")
    for work in (check, lambda located, terminal: train(located, terminal=terminal)):
        with pytest.raises(ConfigError, match=f"stage 'two'.*{problem}"):
            work(located, Terminal("quiet"))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_names_of_sources_are_made_apart() -> None:
    names: set[str] = set()
    for said in ("x", "x-2", "x", "x"):
        names.add(free_name(said, names))
    assert names == {"x", "x-2", "x-3", "x-4"}
