"""The loop: schedules by hand, the guard, clipping, signals, early stop, saving, masters, rates, locks, sinks."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from lensmith.core.errors import RunError
from lensmith.data.pipeline import Pipeline
from lensmith.engine import loop as loop_module
from lensmith.engine.loop import Callbacks, Loop, Signals, score
from lensmith.engine.optimizer import Keep, MasterAdamW
from lensmith.engine.options import WSD, AdamW, Constant, Cosine, EarlyStop, Guard, Linear, Save, Train
from lensmith.engine.progress import Progress
from lensmith.engine.schedule import factor
from lensmith.engine.step import run_step
from lensmith.recipe import session as session_module
from lensmith.recipe import stage
from lensmith.recipe.build import build
from lensmith.recipe.folder import Lock
from lensmith.recipe.prepare import prepare
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
LORA = {"kind": "lora", "rank": 2}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "write_report", lambda folder: folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("chat"), 24)


def run_in(folder: Path, base: Path, chat: Path, **over: Any) -> Any:
    values: dict[str, Any] = {"tune": LORA, "train": {"max_steps": 6}, "batch": {"samples": 4}}
    return runs.located(folder, base, chat, **runs.merge(values, over))


def state(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state" / "training.safetensors")


def records(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


# -- schedules --------------------------------------------------------------------------------------------------------


def factors(schedule: Any, total: int) -> list[float]:
    return [factor(schedule, n, total) for n in range(total)]


def test_schedules_by_hand() -> None:
    """10 updates, 2 of warm-up: 1/2 and 1; then update n of the remaining 8 is n/8 on its way."""
    warm = [0.5, 1.0]
    assert factors(Constant(warmup_steps=2), 10) == [*warm, *[1.0] * 8]
    assert factors(Linear(warmup_steps=2), 10) == pytest.approx([*warm, *[1 - n / 8 for n in range(8)]])
    assert factors(Linear(warmup_steps=2, final=0.2), 10)[-1] == pytest.approx(0.2 + 0.8 / 8)
    half = 0.5 * (1 + math.cos(math.pi * 4 / 8))
    cosine = factors(Cosine(warmup_steps=2), 10)
    assert (
        cosine[:3] == [*warm, 1.0]
        and cosine[6] == pytest.approx(half)
        and cosine[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    )
    assert factors(Cosine(warmup_steps=2, final=0.1), 10)[6] == pytest.approx(0.1 + 0.9 * half)
    # the last 4 of 10 decay: 1, 3/4, 2/4, 1/4
    assert factors(WSD(warmup_steps=2, decay=0.4), 10) == pytest.approx([*warm, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_warm_up_as_a_share() -> None:
    """3 % of 206 is 6.18: 7 updates. No warm-up: the first update has the full rate."""
    found = factors(Constant(warmup=0.03), 206)
    assert found[:8] == pytest.approx([n / 7 for n in range(1, 8)] + [1.0])
    assert factors(Cosine(warmup_steps=0), 5)[0] == 1.0
    assert all(0 < f <= 1 for s in (Cosine(), Linear(), WSD(), Constant()) for f in factors(s, 37))


# -- the loop alone ---------------------------------------------------------------------------------------------------


@dataclass
class Data:
    number: int
    rows: list[Any] = field(default_factory=lambda: [1.0])
    num_samples: int = 1
    num_tokens: int = 1
    num_supervised: float = 1.0
    counts: dict[str, float] = field(default_factory=lambda: {"loss": 1.0})
    wait_seconds: float = 0.0
    num_sources: int = 0

    @property
    def step(self) -> Any:
        return SimpleNamespace(number=self.number, cursor=self.number + 1, epoch=0.0, stream=None)


@dataclass
class Harness:
    """A loop over one weight whose loss is weight x row."""

    steps: int = 10
    metrics: Callable[[int], dict[str, float]] = lambda step: {}
    every: int | None = None
    train: Train = field(default_factory=Train)
    saving: Save = field(default_factory=Save)
    progress: Progress = field(default_factory=Progress)
    rows: Callable[[int], list[Any]] = lambda number: [1.0]
    at_save: Callable[[int], None] = lambda step: None
    schedule: Any = field(default_factory=lambda: Constant(warmup_steps=0))
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        self.optimizer = MasterAdamW([("w", self.weight)], ["language"], AdamW(lr=0.1))
        self.saved: list[tuple[int, dict[str, float] | None]] = []
        self.evaluated: list[int] = []
        self.log: list[tuple[int, bool, float, float]] = []

    def run(self) -> Progress:
        def save(p: Progress, metrics: dict[str, float] | None) -> None:
            self.saved.append((p.step, metrics))
            self.at_save(p.step)

        def evaluate(p: Progress) -> dict[str, float]:
            self.evaluated.append(p.step)
            return self.metrics(p.step)

        def log(p: Progress, data: Any, result: Any, seconds: float) -> None:
            self.log.append((p.step, result.applied, result.rates["language"], float(self.weight.detach())))

        loop = Loop(
            root=lambda row: {"loss": ((self.weight * row).sum(), torch.ones(()))}, optimizer=self.optimizer,
            schedule=self.schedule, part_of=lambda name: "language", train=self.train, saving=self.saving,
            total_steps=self.steps, evaluate_every=self.every, progress=self.progress, guard=self.guard,
            callbacks=Callbacks(log, evaluate, save, lambda row: row, lambda name, fields: None),
        )  # fmt: skip
        data = (
            Data(n, rows=self.rows(n), counts={"loss": float(len(self.rows(n)))})
            for n in range(self.progress.step, self.steps)
        )
        return loop.run(data)


def test_early_stop_and_a_stopped_run_stays_stopped() -> None:
    """Losses 5 4 4 4.5 3: the best is at evaluation 2; 3 and 4 are no better, so patience 2 ends the run at step 8."""
    losses = {2: 5.0, 4: 4.0, 6: 4.0, 8: 4.5, 10: 3.0}
    h = Harness(20, lambda s: {"loss": losses[s]}, every=2, train=Train(early_stop=EarlyStop(patience=2)))
    assert h.run().step == 8
    assert h.evaluated == [2, 4, 6, 8] and h.saved == [(8, {"loss": 4.5})]
    again = Harness(
        20, lambda s: {"loss": 0.0}, every=2, train=Train(early_stop=EarlyStop(patience=2)), progress=h.progress
    )
    assert again.run().step == 8 and again.saved == [] and again.evaluated == []


def test_early_stop_with_min_change_and_nan() -> None:
    """0.50, 0.505 (too little), NaN (never better): patience 2 is used up at the third."""
    values = {1: 0.5, 2: 0.505, 3: math.nan, 4: 1.0}
    rule = EarlyStop(metric="exact_match", patience=2, min_change=0.01)
    h = Harness(9, lambda s: {"exact_match": values[s]}, every=1, train=Train(early_stop=rule))
    assert h.run().step == 3 and h.progress.best == 0.5
    assert score({"loss": math.inf}, "loss") is None is score({}, "loss") and score({"loss": 2.0}, "loss") == -2.0


def test_the_best_is_saved_when_it_is_found_and_metrics_belong_to_their_step() -> None:
    """Evaluated each 2 steps, saved each 3: the best (step 4) gets a checkpoint of its own; steps 3 and 9 have no
    metrics, so an old figure never makes a later checkpoint the best."""
    values = {2: 0.5, 4: 0.9, 6: 0.1, 8: 0.9, 10: math.nan}
    h = Harness(10, lambda s: {"exact_match": values[s]}, every=2, saving=Save(every_steps=3, keep_best="exact_match"))
    h.run()
    assert [(s, m and m["exact_match"]) for s, m in h.saved[:-1]] == [
        (2, 0.5),
        (3, None),
        (4, 0.9),
        (6, 0.1),
        (9, None),
    ]
    assert h.saved[-1][0] == 10


def test_saving_by_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which each step takes 40 s: a save each minute falls on every second step."""
    now = [0.0]
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: now[0])

    tick = MasterAdamW.step

    def step(self: Any, f: float) -> None:
        now[0] += 40
        tick(self, f)

    monkeypatch.setattr(MasterAdamW, "step", step)
    h = Harness(7, saving=Save(every_minutes=1.0))
    h.run()
    assert [s for s, _ in h.saved] == [2, 4, 6, 7]


def test_a_vetoed_step_moves_nothing_and_the_schedule_waits() -> None:
    """Loss inf at step 3, NaN gradient at step 5 (of 0..9): rates of a linear schedule go on where they were."""
    bad = {3: [math.inf], 5: [math.nan]}
    h = Harness(8, rows=lambda n: bad.get(n, [1.0]), schedule=Linear(warmup_steps=0))
    p = h.run()
    assert (p.step, p.applied, p.samples) == (8, 6, 6)
    assert [ok for _, ok, _, _ in h.log] == [True, True, True, False, True, False, True, True]
    weights = [w for *_, w in h.log]
    assert weights[3] == weights[2] and weights[5] == weights[4] and len(set(weights)) == 6
    rates = [r for _, ok, r, _ in h.log if ok]
    assert rates == pytest.approx([0.1 * (1 - n / 8) for n in range(6)])


@pytest.mark.parametrize("most", [1, 3])
def test_bad_steps_in_a_row_end_a_run_that_cannot_go_back(most: int) -> None:
    h = Harness(20, rows=lambda n: [math.nan] if n >= 4 or n == 1 else [1.0], guard=Guard(max_in_a_row=most))
    with pytest.raises(RunError, match=f"NONFINITE.*{most} steps in a row.*no way back"):
        h.run()
    assert h.progress.step == (2 if most == 1 else 4 + most)
    assert h.saved == []


def test_an_ignored_signal_stays_ignored_and_handlers_come_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.caught == signal.SIGTERM
            assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)


# -- one step ---------------------------------------------------------------------------------------------------------


def test_clipping_is_torchs() -> None:
    torch.manual_seed(0)
    named = [(f"w{i}", nn.Parameter(torch.randn(3, i + 1))) for i in range(4)]
    rows = [torch.randn(()) * 30 for _ in range(3)]
    seen: dict[str, torch.Tensor] = {}

    class Seen(MasterAdamW):
        def step(self, factor: float) -> None:
            seen.update({n: g.clone() for n, g in self.gradients()})

    def root(row: Any) -> Any:
        return {"loss": (sum((p**3).sum() for _, p in named) * row, torch.ones(()))}

    optimizer = Seen(named, ["language", "vision"] * 2, AdamW())
    result = run_step(root, rows, {"loss": 2.0}, optimizer, lambda n: n, factor=1.0, clip_norm=0.7)
    for row in rows:
        (root(row)["loss"][0] / 2.0).backward()
    norm = nn.utils.clip_grad_norm_([p for _, p in named], 0.7)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-6) and result.grad_norm > 0.7
    for name, p in named:
        assert p.grad is not None and torch.allclose(seen[name], p.grad, rtol=1e-5, atol=0)
    assert math.sqrt(sum(v**2 for v in result.grad_norm_parts.values())) == pytest.approx(result.grad_norm)


def test_masters_accumulate_in_float32() -> None:
    """One large and seven small micro-batches: bfloat16 sums lose the small ones altogether (1 + 2^-9 = 1 in
    bfloat16), float32 masters keep them; the update too small for bfloat16 is kept in the master."""
    p = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", p)], ["language"], AdamW(lr=1e-4), {"w": Keep("masters", torch.bfloat16)})
    optimizer.settle()
    scales = [1.0, *[2.0**-9] * 7]
    seen = {}

    class Seen:
        def __getattr__(self, name: str) -> Any:
            return getattr(optimizer, name)

        def step(self, factor: float) -> None:
            seen["gradient"] = dict(optimizer.gradients())["w"].clone()
            optimizer.step(factor)

    def root(scale: float) -> Any:
        return {"loss": ((p.float() * scale).sum(), torch.ones(()))}

    run_step(root, scales, {"loss": 1.0}, Seen(), lambda n: n, factor=1.0, clip_norm=None)  # type: ignore[arg-type]
    reference = torch.full((4,), 1.0 + 7 * 2.0**-9)
    assert seen["gradient"].dtype == torch.float32 and torch.equal(seen["gradient"], reference)
    half = torch.tensor(0.0, dtype=torch.bfloat16)
    for s in scales:
        half += torch.tensor(s, dtype=torch.bfloat16)
    assert float(half) == 1.0  # what bfloat16 accumulation would have given
    master = optimizer.tensors()["param/w"]
    assert torch.allclose(master, torch.full((4,), 1 - 1e-4), atol=1e-9)  # AdamW's first step is lr x sign
    assert (p == 1).all() and p.dtype == torch.bfloat16
    for _ in range(60):
        run_step(root, scales, {"loss": 1.0}, optimizer, lambda n: n, factor=1.0, clip_norm=None)
    assert (p < 1).all()  # 61 updates that bfloat16 alone would have lost one by one


def test_rates_and_decay_by_part_and_never_on_vectors() -> None:
    """Zero gradients: what moves is decay alone, p x (1 - lr x decay)."""
    parts: Any = {"vision": {"lr": 0.01}, "head": {"weight_decay": 0.0}}
    options = AdamW(lr=0.1, weight_decay=0.5, parts=parts)
    shapes = {"v": (2, 2), "l": (2, 2), "h": (2, 2), "norm": (2,)}
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    optimizer = MasterAdamW(named, ["vision", "language", "head", "language"], options)
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)
    found = {n: float(p.detach().flatten()[0]) for n, p in named}
    assert found == pytest.approx({"v": 1 - 0.005 * 0.5, "l": 1 - 0.05 * 0.5, "h": 1.0, "norm": 1.0})
    assert optimizer.rates() == pytest.approx({"vision": 0.005, "language": 0.05, "head": 0.05})


@pytest.mark.parametrize("tune", [LORA, {"kind": "full"}], ids=["lora", "full"])
def test_recomputation_changes_no_gradient(tmp_path: Path, qwen25: Path, chat: Path, tune: Any) -> None:
    """Blocks run twice (counted), losses and gradients are equal."""
    found, calls = {}, {}
    for recompute in (False, True):
        p = prepare(run_in(tmp_path / "run", qwen25, chat, tune=tune, train={"recompute": recompute}), QUIET)
        built = build(p)
        count = calls[recompute] = [0]
        block = built.root.family.blocks(built.root.model, "language")[0]
        block.input_layernorm.register_forward_hook(lambda *a, count=count: count.__setitem__(0, count[0] + 1))
        data = next(Pipeline(p.train, p.plan, p.limits).steps())
        gradients: dict[str, torch.Tensor] = {}

        class Keep(type(built.optimizer)):  # type: ignore[misc]
            def step(self, factor: float) -> None:
                gradients.update({n: g.clone() for n, g in self.gradients()})  # noqa: B023

        built.optimizer.__class__ = Keep
        result = run_step(
            built.root,
            data.rows,
            {"loss": data.num_supervised},
            built.optimizer,
            built.part_of,
            factor=1.0,
            clip_norm=None,
        )
        found[recompute] = (result.loss, gradients)
    assert calls[True][0] == 2 * calls[False][0] > 0
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-6)
    for name, g in found[False][1].items():
        assert torch.allclose(found[True][1][name], g, rtol=1e-6, atol=1e-6 * float(g.abs().max())), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own code
def test_compile_trains(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    plain = runs.quiet_train(run_in(tmp_path / "plain", qwen25, chat)).summary["losses"]
    compiled = runs.quiet_train(run_in(tmp_path / "compiled", qwen25, chat, train={"compile": True})).summary["losses"]
    assert compiled == pytest.approx(plain, abs=1e-4)


# -- real runs --------------------------------------------------------------------------------------------------------


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """One gradient is NaN in the steps (counted from 1) for which `when` holds, also when they are computed again."""
    step = [0]

    def built(prepared: Any, **_: Any) -> Any:
        found = build(prepared)
        found.optimizer.named[-1][1].register_hook(lambda g: torch.full_like(g, math.nan) if when(step[0]) else g)
        return found

    def counted(*args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        return run_step(*args, **kwargs)

    monkeypatch.setattr(stage, "build", built)
    monkeypatch.setattr(loop_module, "run_step", counted)


def test_nothing_non_finite_is_applied_or_saved(
    tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any, capsys: Any
) -> None:
    """One NaN in one weight's gradient at step 3: that step is vetoed, named with its samples, and the rest trains."""
    spoil_gradients(monkeypatch, lambda n: n == 3)
    run = run_in(
        tmp_path / "run",
        qwen25,
        chat,
        save={"every_steps": 1, "keep_last": 9},
        batch={"device_tokens": 4096, "samples": 4},
    )
    out = runs.quiet_train(run)
    steps = records(tmp_path / "run")
    assert [r["applied"] for r in steps] == [True, True, False, True, True, True]
    assert out.summary["applied_steps"] == 5 and out.summary["steps"] == 6
    assert math.isfinite(steps[2]["loss"]) and steps[2]["grad_norm"] is None and steps[2]["nonfinite"]
    said = capsys.readouterr().err
    assert "step 3" in said and "not applied" in said and "train.jsonl:" in said
    checkpoints = tmp_path / "run" / "checkpoints"  # of step 3 there is none: it would be that of step 2 again
    assert sorted(int(p.name[5:]) for p in checkpoints.iterdir()) == [1, 2, 4, 5, 6]
    assert all(
        t.isfinite().all()
        for p in checkpoints.rglob("*.safetensors")
        for t in load_file(p).values()
        if t.is_floating_point()
    )


def test_non_finite_steps_end_the_run(tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any) -> None:
    """From step 3 on all are bad, with every sample: after three the run goes back to the checkpoint of step 1, for the
    weights of step 2 are those that failed. After three more it stops."""
    spoil_gradients(monkeypatch, lambda n: n > 2)
    run = run_in(tmp_path / "run", qwen25, chat, train={"max_steps": 20},
                 save={"every_steps": 1, "keep_last": 9}, batch={"device_tokens": 4096})  # fmt: skip
    with pytest.raises(RunError, match="3 steps in a row were not finite, and the run went back 3 steps ago"):
        runs.quiet_train(run)
    assert [(r["reached"], r["step"]) for r in records(tmp_path / "run", "event") if r["name"] == "roll_back"] == [
        (5, 1)
    ]
    assert all(t.isfinite().all() for t in state(tmp_path / "run").values())
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "lock").exists()


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any
) -> None:
    """Something else wrote a NaN into a parameter: nothing is saved, and the run goes back to the checkpoint before.
    It happens again: the run stops."""
    log = stage.StageRun._log

    def spoils(self: Any, p: Any, *args: Any) -> None:
        log(self, p, *args)
        if p.step == 3:
            self.built.optimizer.named[0][1].data[0, 0] = math.nan

    monkeypatch.setattr(stage.StageRun, "_log", spoils)
    with pytest.raises(RunError, match=r"NONFINITE.*bad_state.*the run went back 1 steps ago"):
        runs.quiet_train(run_in(tmp_path / "run", qwen25, chat, save={"every_steps": 1, "keep_last": 9}))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def child(
    run: Any, at_step: dict[int, list[int]], *, second: int | None = None, before: Callable[[], None] | None = None
) -> int:
    """Wait status of `lensmith train` in a forked process, which signals itself after the given steps; `second` comes
    while the first is being answered by a save."""
    file = run.output.parent / "run.yaml"
    file.write_text(run.resolved_yaml(), encoding="utf-8")
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        sys.stderr = sys.stdout = (run.output.parent / "said.txt").open("a")
        if before is not None:
            before()
        log, save = stage.StageRun._log, stage.StageRun._save

        def signals(self: Any, p: Any, *args: Any) -> None:
            log(self, p, *args)
            for number in at_step.get(p.step, ()):
                os.kill(os.getpid(), number)

        def saves(self: Any, p: Any, metrics: Any) -> None:
            if second is not None:
                os.kill(os.getpid(), second)
            save(self, p, metrics)

        stage.StageRun._log, stage.StageRun._save = signals, saves  # type: ignore[method-assign]
        from lensmith.cli import main

        main(["train", str(file), "--quiet"])
        os._exit(0)
    except SystemExit as done:
        sys.stderr.flush()
        os._exit(int(done.code or 0))
    except BaseException:  # noqa: BLE001 - the forked child must not go on as a second pytest
        os._exit(99)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, qwen25: Path, chat: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENSMITH_CACHE", str(folder.parent / "cache"))
        patch.setattr(session_module, "write_report", lambda folder: folder)
        runs.quiet_train(run_in(folder, qwen25, chat, tune={**LORA, "dropout": 0.1}))
    return folder


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.faults("F09", "between two steps")),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.faults("F12", "SIGINT to the process")),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.faults("F13", "SIGHUP")),
    ],
)
def test_a_signal_saves_and_the_run_resumes(
    tmp_path: Path, qwen25: Path, chat: Path, whole: Path, number: int, code: int
) -> None:
    """Saved at the border of the step it came in; afterwards the same bits, each step logged once."""
    run = run_in(tmp_path / "run", qwen25, chat, tune={**LORA, "dropout": 0.1}, log={"sinks": ["tensorboard"]})
    assert os.waitstatus_to_exitcode(child(run, {3: [number]})) == code
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    assert "after step 3; the run is saved" in (tmp_path / "said.txt").read_text()
    assert not (tmp_path / "run/lock").exists() and not (tmp_path / "run/summary.json").exists()
    assert os.waitstatus_to_exitcode(child(run, {})) == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    found, wanted = state(tmp_path / "run"), state(whole)
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    losses = [json.loads((f / "summary.json").read_text())["losses"] for f in (tmp_path / "run", whole)]
    assert losses[0] == losses[1]
    if number == signal.SIGTERM:
        assert tensorboard_losses(tmp_path / "run") == pytest.approx(losses[0])


def tensorboard_losses(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    events = found.Scalars("train/loss")
    assert [e.step for e in events] == list(range(1, len(events) + 1))
    return [e.value for e in events]


@pytest.mark.faults("F10", "a second SIGTERM or SIGINT while the first one saves")
@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, qwen25: Path, chat: Path, second: int, code: int) -> None:
    run = run_in(tmp_path / "run", qwen25, chat)
    assert os.waitstatus_to_exitcode(child(run, {3: [signal.SIGTERM]}, second=second)) == code
    assert list((tmp_path / "run/checkpoints").glob("step-*")) == []
    assert os.waitstatus_to_exitcode(child(run, {})) == 0  # a lock that is left does not matter
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.faults("F13", "SIGHUP under nohup")
def test_nohup(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    """A run that was told to ignore SIGHUP goes on when the terminal closes."""
    run = run_in(tmp_path / "run", qwen25, chat)
    status = child(run, {2: [signal.SIGHUP]}, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert os.waitstatus_to_exitcode(status) == 0 and len(records(tmp_path / "run")) == 6


@pytest.mark.faults("F09", "in the last save")
def test_a_signal_in_the_last_save_is_not_lost(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    run = run_in(tmp_path / "run", qwen25, chat)
    assert os.waitstatus_to_exitcode(child(run, {}, second=signal.SIGTERM)) == 143
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]
    assert os.waitstatus_to_exitcode(child(run, {})) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 6


@pytest.mark.faults("F35", "a second run; then the first is killed")
def test_one_run_in_a_folder(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    """Another process holds the lock: refused with its number, and nothing is touched. It is killed: taken over."""
    run = run_in(tmp_path / "run", qwen25, chat, train={"max_steps": 1})
    (tmp_path / "run").mkdir()
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        Lock(tmp_path / "run/lock").acquire()
        os.write(theirs, b"x")
        signal.pause()
        os._exit(0)
    os.read(mine, 1)
    with pytest.raises(RunError, match=f"LOCKED.*process {pid} is running"):
        runs.quiet_train(run)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "run/lock").read_text().split()[0] == str(pid)
    runs.quiet_train(run)
    assert not (tmp_path / "run/lock").exists()


@pytest.mark.faults("F35", "the number was given out again")
def test_a_lock_with_the_number_of_a_living_stranger_is_stale(tmp_path: Path) -> None:
    """Numbers are given out again, in a container most of all."""
    (tmp_path / "lock").write_text("1")
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    assert (tmp_path / "lock").read_text().split()[0] == str(os.getpid())
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_a_dry_run_keeps_nothing(tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    out = runs.quiet_train(run_in(tmp_path / "run", qwen25, chat), dry_run=True)
    assert out.summary["steps"] == 1
    assert not (tmp_path / "run").exists() and not list((tmp_path / "tmp").iterdir())


def test_a_run_that_is_made_longer_is_measured_anew(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    """Held-out figures of the earlier end are not shown as those of the later one; an unchanged run is not measured
    again. Metrics of an attempt without a checkpoint are gone."""
    over: dict[str, Any] = {
        "data": {"holdout": 0.3},
        "evaluate": {"loss": True},
        "tune": {"kind": "full"},
        "optimizer": {"lr": 1e-2},
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(
        '{"kind": "eval", "step": 0, "loss": 9}\n{"kind": "step", "step": 1, "loss": 9}\n'
    )
    (tmp_path / "run/heldout.json").write_text('{"before": {"loss": 9}, "after": {"loss": 9}}')
    first = runs.quiet_train(run_in(tmp_path / "run", qwen25, chat, **over)).summary
    evals = records(tmp_path / "run", "eval")
    assert first["heldout"]["after"]["loss"] != 9 and all(r["loss"] != 9 for r in evals)
    same = runs.quiet_train(run_in(tmp_path / "run", qwen25, chat, **over)).summary
    assert same["heldout"] == first["heldout"] and records(tmp_path / "run", "eval") == evals
    longer = runs.quiet_train(
        run_in(tmp_path / "run", qwen25, chat, **runs.merge(over, {"train": {"max_steps": 9}}))
    ).summary
    assert longer["heldout"]["after"]["loss"] != first["heldout"]["after"]["loss"]
    assert longer["heldout"].get("before") == first["heldout"].get("before")
