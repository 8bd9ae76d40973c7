"""The guard alone: flags over ranks, decisions by hand, spikes, the loss scale, forensics on small modules, pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lensmith.core.errors import RunError
from lensmith.engine.determinism import Snapshot
from lensmith.engine.forensics import Scene, examine
from lensmith.engine.guard import Flags, History, Mine, agree, bad_state, decide, read_figures, to_exclude
from lensmith.engine.loop import Callbacks, Loop
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.options import AdamW, Constant, Guard, Save, Train
from lensmith.engine.progress import Progress
from lensmith.engine.rescue import Incident, Rescue
from lensmith.engine.scale import MAX_IN_A_ROW, SMALLEST, LossScale
from lensmith.engine.spikes import LEAST, SpikeWindow, look
from lensmith.engine.state import read_state, write_state
from lensmith.engine.step import run_step
from lensmith.engine.watch import Watch
from lensmith.parallel.ranks import Ranks

# -- flags ------------------------------------------------------------------------------------------------------------


def flags(loss: float, norm: float) -> Flags:
    mine = Mine(torch.tensor(loss, dtype=torch.float64), {"language": torch.tensor(norm)}, {})
    return agree(mine, Ranks()).flags


def test_flags_of_one_rank() -> None:
    """Inf is as bad as NaN, in the loss and in the norm."""
    assert flags(2.0, 3.0) == Flags(False, False, False) and flags(2.0, 3.0).good and flags(0.0, 0.0).good
    assert flags(math.nan, 3.0) == Flags(True, False, False)
    assert flags(math.inf, 3.0) == Flags(True, False, False) and flags(-math.inf, 3.0).loss_bad
    assert flags(2.0, math.nan) == flags(2.0, math.inf) == Flags(False, True, False)


def test_norms_that_differ_are_a_disagreement() -> None:
    """Two ranks with the same gradients of part `a` and shares of part `b`: loss, both norms, a vote, two sources,
    seconds. Shares may differ; the norm is that of all of them."""
    mine = Mine(torch.zeros(()), {"a": torch.zeros(())}, {"b": torch.zeros(())}, [0.0], [(0.0, 0.0)] * 2)
    rows = [[1.0, 3.0, 4.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.5], [2.0, 3.0, 12.0, 15.0, 1.0, 3.0, 7.0, 1.0, 0.25]]
    found = read_figures(rows, mine)
    assert found.flags.good and found.loss == 3.0 and found.votes == (15.0,) and found.seconds == (0.5, 0.25)
    assert found.parts == {"a": 3.0, "b": pytest.approx(math.sqrt(16 + 144))}
    assert found.norm == pytest.approx(math.sqrt(9 + 16 + 144)) and found.sources == ((2.0, 5.0), (7.0, 1.0))
    half = read_figures(rows, replace(mine, copies=2, scale=2.0))
    assert half.parts == {"a": 1.5, "b": pytest.approx(math.sqrt(80) / 2)}
    rows[1][1] = 2.9
    assert read_figures(rows, mine).flags == Flags(False, False, True)
    rows[0][1] = math.nan
    assert read_figures(rows, mine).flags == Flags(False, True, False)
    rows[0][1], rows[0][2] = 2.9, math.inf
    assert read_figures(rows, mine).flags == Flags(False, True, False)


def _rank(rank: int, folder: str, steps: int) -> None:
    """A replica with the same rows on both ranks; at step 2 the loss of rank 1 is NaN, at step 4 its gradient is Inf,
    at step 6 its gradient is another one."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    weight = nn.Parameter(torch.arange(1.0, 5.0))
    optimizer = MasterAdamW([("w", weight)], ["language"], AdamW(lr=0.1))
    step = [0]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * {4: math.inf, 6: 1.5}.get(step[0], 1.0) if rank == 1 else gradient

    weight.register_hook(spoil)
    applied, kinds = [], []
    for n in range(1, steps + 1):
        step[0] = n
        by = math.nan if rank == 1 and n == 2 else 1.0

        def root(row: float, by: float = by) -> Any:
            return {"loss": ((weight * row).square().sum() + by - 1.0, torch.ones(()))}

        ranks = Ranks(rank, 2)
        result = run_step(
            root, [1.0 + n], {"loss": 1.0}, optimizer, lambda name: "language", factor=1.0, clip_norm=None, ranks=ranks
        )
        applied.append(result.applied)
        kinds.append(result.disagree)
    gathered = [torch.zeros(4) for _ in range(2)]
    dist.all_gather(gathered, weight.detach())
    same = torch.equal(gathered[0], gathered[1])
    Path(folder, f"rank-{rank}").write_text(repr((applied, kinds, same)))
    dist.destroy_process_group()


@pytest.mark.faults("F53", "a NaN on one of two ranks")
def test_what_is_bad_on_one_rank_is_left_out_on_both(tmp_path: Path) -> None:
    """F53, with two processes: both skip the same steps and their weights stay equal."""
    mp.start_processes(_rank, (str(tmp_path), 7), nprocs=2, start_method="fork")
    wanted = ([True, False, True, False, True, False, True], [n == 5 for n in range(7)], True)
    assert [(tmp_path / f"rank-{r}").read_text() for r in (0, 1)] == [repr(wanted)] * 2


# -- decisions --------------------------------------------------------------------------------------------------------


def decided(
    cause: str = "forward_overflow", rule: Guard | None = None, history: History | None = None, **over: Any
) -> str:
    about: dict[str, Any] = {"step": 1000, "in_a_row": 1, "recent": [1000], **over}
    return decide(rule or Guard(), history or History(), cause=cause, **about)[0]


@pytest.mark.parametrize(
    ("wanted", "over"),
    [
        ("skip", {}),
        ("skip", {"in_a_row": 2}),
        ("roll_back", {"in_a_row": 3}),
        ("skip", {"recent": [600, 700, 800, 900, 1000]}),
        ("roll_back", {"recent": [501, 600, 700, 800, 900, 1000]}),  # 6 of 500 are more than 1 %
        ("skip", {"recent": [500, 600, 700, 800, 900, 1000]}),  # step 500 is not among steps 501 to 1000
        ("stop", {"in_a_row": 3, "history": History(roll_backs=[[850, 800]])}),
        ("roll_back", {"in_a_row": 3, "history": History(roll_backs=[[850, 799]])}),
        ("roll_back", {"cause": "bad_weights"}),
        ("roll_back", {"cause": "bad_state"}),
        ("stop", {"cause": "bad_weights", "frozen": ["model.norm.weight"]}),
        ("stop", {"cause": "overflow"}),
        ("skip", {"cause": "transient", "history": History(transient=1)}),
        ("stop", {"cause": "transient", "history": History(transient=2)}),
        ("stop", {"rule": Guard(on_nonfinite="stop")}),
        ("roll_back", {"rule": Guard(on_nonfinite="roll_back")}),
        ("skip", {"cause": "transient", "rule": Guard(on_nonfinite="roll_back"), "history": History(transient=1)}),
    ],
)  # fmt: skip
def test_decisions(wanted: str, over: dict[str, Any]) -> None:
    assert decided(**over) == wanted


def test_a_sample_is_left_out_after_two_steps() -> None:
    """Sample 7 in steps 3 and 9, sample 5 twice in step 3 (it was computed again after a roll-back), 8 left out."""
    history = History(named=[[7, 3], [5, 3], [5, 3], [8, 1], [8, 2], [7, 9]])
    assert to_exclude(Guard(), history, {8: 4}) == [7]
    assert to_exclude(Guard(exclude_after=1), history, {8: 4}) == [5, 7]
    assert to_exclude(Guard(exclude_after=None), history, {}) == []


def test_bad_state_names_what_is_not_finite() -> None:
    named = [(f"w{n}", nn.Parameter(torch.ones(3, 2))) for n in range(3)]
    optimizer = MasterAdamW(named, ["language"] * 3, AdamW())
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    assert bad_state(optimizer) == []
    optimizer.tensors()["exp_avg/w1"][2, 1] = -math.inf
    named[2][1].data[0, 0] = math.nan
    assert sorted(bad_state(optimizer)) == ["exp_avg/w1", "param/w2"]


# -- spikes and the loss scale ----------------------------------------------------------------------------------------


def test_spikes_by_hand() -> None:
    """Losses 1 and 3 in turn: mean 2, deviation 1; norms 10 and 30: mean 20, deviation 10. (8.5, 85) is 6.5 away."""
    window, rule = SpikeWindow(), Guard(spike_window=20)
    for n in range(20):
        assert not look(rule, window, 1.0 + n % 2 * 2, 10.0 + n % 2 * 20).is_spike
    before = list(window.losses)
    spike = look(rule, window, 8.5, 85.0)
    assert spike.is_spike and (spike.loss_z, spike.norm_z) == (6.5, 6.5) and spike.norm_limit == 80.0
    assert window.losses == [*before[1:], 8.0]  # it enters as the limit, and the window keeps its length
    assert not look(Guard(spike_window=20, spike_z=50), SpikeWindow(before, before), 8.5, 2.0).is_spike


def test_a_spike_is_one_of_loss_and_norm_together() -> None:
    window = SpikeWindow([1.0, 3.0] * 10, [10.0, 30.0] * 10)
    assert not look(Guard(), window, 100.0, 20.0).is_spike
    assert not look(Guard(), window, 2.0, 1000.0).is_spike


def test_too_few_steps_make_no_spike() -> None:
    window = SpikeWindow([1.0] * (LEAST - 1), [1.0] * (LEAST - 1))
    assert not look(Guard(), window, 1e9, 1e9).is_spike
    assert look(Guard(), SpikeWindow([1.0] * LEAST, [1.0] * LEAST), 1e9, 1e9).is_spike


def test_the_loss_scale_by_hand() -> None:
    scale = LossScale()
    for _ in range(1999):
        scale.applied()
    assert scale.value == 2.0**16
    scale.applied()
    assert scale == LossScale(2.0**17, 0, 0, 0)
    scale.overflowed()
    assert (scale.value, scale.in_a_row, scale.is_exhausted) == (2.0**16, 1, False)
    scale.applied()
    assert scale.in_a_row == 0 and scale.overflows == 1
    small = LossScale(2.0**-4)
    small.overflowed()
    assert small.value == SMALLEST and small.is_exhausted


def test_scaled_gradients_are_those_without_a_scale() -> None:
    """A power of two: the same bits. The norm that is reported is that without the scale too."""
    found = []
    for scale in (None, LossScale(2.0**10)):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(8))
        optimizer = MasterAdamW([("w", weight)], ["language"], AdamW(lr=0.1))

        def root(row: float, weight: nn.Parameter = weight) -> Any:
            return {"loss": ((weight**3).sum() * row, torch.ones(()))}

        result = run_step(
            root, [0.3, 0.7], {"loss": 2.0}, optimizer, lambda n: n, factor=1.0, clip_norm=0.5, scale=scale
        )
        found.append((result.loss, result.grad_norm, result.clipped_to, weight.detach().clone()))
    assert found[0][:3] == found[1][:3] and torch.equal(found[0][3], found[1][3])


# -- a loop with a small model ----------------------------------------------------------------------------------------


@dataclass
class Row:
    members: tuple[int, ...]
    sample_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass
class Data:
    number: int
    rows: list[Row]
    num_supervised: float = 1.0
    counts: dict[str, float] = field(default_factory=lambda: {"loss": 1.0})
    num_samples: int = 1
    num_tokens: int = 1
    wait_seconds: float = 0.0
    num_sources: int = 0

    @property
    def step(self) -> Any:
        return SimpleNamespace(number=self.number, cursor=self.number + 1, epoch=0.0, stream=None)


class Harness:
    """A loop over `model`; one row of `members(step)` a step. The loss is `objective(model(members), members)`."""

    def __init__(
        self,
        model: nn.Module,
        members: Callable[[int], tuple[int, ...]],
        folder: Path,
        objective: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor] = lambda out, members: out.sum(),
        **guard: Any,
    ):
        self.model, self.members, self.folder, self.objective = model, members, folder, objective
        named = list(model.named_parameters())
        self.optimizer = MasterAdamW(named, ["language"] * len(named), AdamW(lr=1e-3))
        self.progress = Progress()
        self.guard = Guard(**guard)
        self.incidents: list[Incident] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.saved: list[int] = []
        self.trained: list[tuple[int, ...]] = []

    def save(self, p: Progress, metrics: Any) -> None:
        write_state(self.folder / str(p.step), self.optimizer, p)
        self.saved.append(p.step)

    def roll_back(self, last: int) -> Progress:
        steps = [s for s in self.saved if s <= last]
        if not steps:
            raise RunError("NONFINITE", "nothing was saved")
        return read_state(self.folder / str(steps[-1]), self.optimizer)

    def data(self, steps: int) -> Any:
        while self.progress.step < steps:
            n = self.progress.step
            members = tuple(m for m in self.members(n) if self.progress.excluded.get(m, n + 1) > n)
            yield Data(n, [Row(members, np.repeat(members, 2))], counts={"loss": float(len(members))})

    def log(self, p: Progress, data: Data, result: Any, seconds: float) -> None:
        if result.applied:
            self.trained.append(data.rows[0].members)

    def run(self, steps: int, every: int | None = 1) -> Progress:
        rescue = Rescue(
            self.model, lambda n: Row((n,), np.repeat(n, 2)), self.incidents.append, lambda p: None, self.roll_back,
            lambda p: None,
        )  # fmt: skip
        loop = Loop(
            root=lambda row: {"loss": (self.objective(self.model(row.members), row.members), torch.ones(()))},
            optimizer=self.optimizer,
            schedule=Constant(warmup_steps=0), part_of=lambda name: "language", train=Train(), progress=self.progress,
            saving=Save(every_steps=every), total_steps=steps, evaluate_every=None, guard=self.guard, rescue=rescue,
            callbacks=Callbacks(self.log, lambda p: {}, self.save, lambda row: row,
                                lambda name, about: self.events.append((name, about))),
        )  # fmt: skip
        return loop.run(self.data(steps))


class Small(nn.Module):
    """Sum over samples of (w x)^2, where x is the sample's number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self, members: tuple[int, ...]) -> torch.Tensor:
        return self.inner(torch.tensor([[float(m)] for m in members])).square().sum()


class Half(Small):
    """Its scaled gradient is Inf in the steps that `when` says: beyond what float16 holds."""

    def __init__(self, when: Callable[[int], bool]) -> None:
        super().__init__()
        self.step, self.when = 0, when
        self.inner.weight.register_hook(lambda g: g * math.inf if self.when(self.step) else g)


@pytest.mark.faults("F55", "fp16: overflows now and then, and without end")
def test_overflows_halve_the_scale_and_too_many_stop(tmp_path: Path) -> None:
    """F55. Now and then: skipped, counted, no incident. Without end: the 20th in a row is one, and says what to do."""
    model = Half(lambda n: n in (2, 5))
    h = Harness(model, lambda n: (setattr(model, "step", n), (1, 2))[1], tmp_path / "some")
    h.progress.scale = LossScale()
    p = h.run(8)
    assert (p.applied, p.bad_in_a_row, p.history.skipped, h.incidents) == (6, 0, 0, [])
    assert p.scale == LossScale(2.0**14, 2, 0, 2)
    assert read_state(tmp_path / "some" / "8", h.optimizer).scale == p.scale
    model = Half(lambda n: n >= 3)
    h = Harness(model, lambda n: (setattr(model, "step", n), (1, 2))[1], tmp_path / "always")
    h.progress.scale = LossScale()
    with pytest.raises(RunError, match=r"overflow in inner.*loss scale(.|\n)*bf16"):
        h.run(60)
    assert h.progress.step == 3 + MAX_IN_A_ROW and h.progress.applied == 3
    assert [i.finding.cause for i in h.incidents] == ["overflow"] and h.incidents[0].scene is not None
    assert h.incidents[0].scene.scale == LossScale(2.0**16 / 2 ** (MAX_IN_A_ROW - 1), 0, MAX_IN_A_ROW - 1, 19)


@pytest.mark.faults("F52", "all labels of a step masked")
def test_a_step_without_targets_is_no_incident(tmp_path: Path) -> None:
    """F52, the whole batch: nothing has a weight, nothing moves, nothing is counted as bad."""
    h = Harness(Small(), lambda n: () if n == 2 else (1, 2), tmp_path)
    p = h.run(5)
    assert (p.applied, p.bad_in_a_row, p.history.skipped, h.incidents) == (4, 0, 0, [])


class Policy(nn.Module):
    """A margin for every pair: log-probability of its chosen less that of its rejected answer."""

    def __init__(self) -> None:
        super().__init__()
        self.margins = nn.Embedding(16, 1)

    def forward(self, members: tuple[int, ...]) -> torch.Tensor:
        return self.margins(torch.tensor(members, dtype=torch.long)).squeeze(1)


@pytest.mark.faults("F60", "a reference of probability zero")
def test_a_pair_without_a_reference_is_named_and_the_others_train(tmp_path: Path) -> None:
    """F60: the reference gives the rejected answer of pair 3 a probability of zero, whose logarithm is -inf. The step
    is skipped and the pair named; from the next epoch on it is left out, and the pairs beside it train."""
    chosen, rejected = torch.linspace(-3, -2, 8), torch.linspace(-4, -3, 8)
    rejected[3] = -math.inf

    def preference(margins: torch.Tensor, members: tuple[int, ...]) -> torch.Tensor:
        at = list(members)
        return -nn.functional.logsigmoid(margins - (chosen[at] - rejected[at])).sum()

    torch.manual_seed(0)
    model = Policy()
    before = model.margins.weight.detach().clone()
    h = Harness(model, lambda n: tuple(range(n % 2 * 4, n % 2 * 4 + 4)), tmp_path, preference, exclude_after=1)
    p = h.run(6)
    (incident,) = h.incidents
    assert incident.finding.cause == "loss" and incident.finding.samples == [3] and incident.action == "skip"
    assert p.excluded == {3: 1} and ("excluded", {"step": 1, "samples": [3]}) in h.events
    assert h.trained == [(4, 5, 6, 7), (0, 1, 2), (4, 5, 6, 7), (0, 1, 2), (4, 5, 6, 7)]
    moved = (model.margins.weight.detach() != before).squeeze(1).tolist()
    assert moved[:8] == [n != 3 for n in range(8)] and bool(model.margins.weight.isfinite().all())


def test_a_second_way_back_within_the_window_stops(tmp_path: Path) -> None:
    """A NaN in the weights behind steps 5 and 9: the first goes back to 5 (the save before), the second stops."""
    h = Harness(Small(), lambda n: (1, 2), tmp_path)
    hits: list[int] = []

    def log(p: Progress, data: Any, result: Any, seconds: float) -> None:
        if p.step in (6, 9) and p.step not in hits:
            hits.append(p.step)
            h.model.inner.weight.data.fill_(math.nan)  # type: ignore[union-attr]

    h.log = log  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"bad_state in param/inner\.weight.*went back 4 steps ago"):
        h.run(12)
    assert h.progress.history.roll_backs == [[6, 5]] and h.saved == [1, 2, 3, 4, 5, 6, 7, 8]
    assert h.progress.history.incidents == 2


# -- forensics on small modules ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Finite projections, and scores between them that are not: a fault of no child."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.by = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((self.q(x) * self.by) * (self.k(x) * self.by))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(4, 4), Attention(), nn.Linear(4, 1)

    def forward(self, members: tuple[int, ...]) -> torch.Tensor:
        x = torch.stack([torch.full((4,), float(m)) for m in members])
        return self.last(self.attention(self.first(x))).sum()


def scene(model: nn.Module, rows: list[tuple[int, ...]]) -> Scene:
    torch.manual_seed(0)
    named = list(model.named_parameters())
    return Scene(
        lambda row: {"loss": (model(row.members), torch.ones(()))}, model,
        [Row(m, np.repeat(m, 1)) for m in rows], lambda row: row, lambda n: Row((n,), np.array([n])), {"loss": 1.0},
        MasterAdamW(named, ["language"] * len(named), AdamW()), lambda name: name.split(".")[0], Snapshot(),
    )  # fmt: skip


def test_a_fault_between_children_is_the_parents() -> None:
    """`out` is the first with a bad output, but it was given one: `attention` had finite inputs."""
    model = Net()
    model.attention.by = 1e25
    found = examine(scene(model, [(1, 2), (3,)]))
    assert (found.cause, found.module, found.part, found.row) == ("forward_overflow", "attention", "attention", 0)
    assert found.every_sample and found.samples == [] and found.direction == "forward"


class Exponential(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


def test_the_row_and_the_sample_are_found() -> None:
    """exp(100) is beyond float32. Sample 100 is the second of the third row; the finite input is what `first` gives."""
    model = Net()
    model.attention = Exponential()  # type: ignore[assignment]
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(4))
        model.first.bias.zero_()
    found = examine(scene(model, [(1, 2), (0, 3), (4, 100, 6)]))
    assert (found.cause, found.module, found.module_type) == ("forward_overflow", "attention", "Exponential")
    assert (found.row, found.samples, found.every_sample, found.largest_input) == (2, [100], False, 100.0)


def test_nothing_wrong_is_transient_and_leaves_no_trace() -> None:
    s = scene(Net(), [(1,), (2,)])
    state = torch.get_rng_state()
    found = examine(s)
    assert (found.cause, found.reruns) == ("transient", 3)
    assert torch.equal(torch.get_rng_state(), state) and s.optimizer.gradients() == []
    assert not any(m._forward_hooks or m._backward_hooks for m in s.model.modules())


def test_a_norm_beyond_its_type_names_the_largest_gradient() -> None:
    """Each gradient has a finite norm; the sum of their squares has not."""
    model = Net()
    s = scene(model, [(1,)])
    for p in (model.last.weight, model.first.weight):
        p.register_hook(lambda g: torch.full_like(g, 1.5e19 / g.numel() ** 0.5))
    found = examine(s)
    assert found.cause == "backward_only" and len(found.bad_gradients) == 1
    assert all(math.isfinite(v) for v in found.gradient_norms.values())


# -- early warning ----------------------------------------------------------------------------------------------------


def test_watched_figures_by_hand() -> None:
    """Linear of weight 2 and bias 1 over inputs 3 and -5: outputs 7 and -9. All weights move by 0.1."""
    model = nn.Sequential(nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].bias.fill_(1.0)
    named = list(model.named_parameters())
    watch = Watch(model, MasterAdamW(named, ["a", "b"], AdamW()), lambda n: "bias" if n.endswith("bias") else "weight")
    model(torch.tensor([[3.0], [-5.0]]))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    found = watch.figures()
    assert found["activation_max"] == {"weight": 9.0}
    assert found["update_ratio"] == pytest.approx({"weight": 0.05, "bias": 0.1}, rel=1e-5)
    assert not model[0]._forward_hooks


def test_progress_survives_json(tmp_path: Path) -> None:
    p = Progress(
        step=7, excluded={5: 3}, history=History(2, 1, roll_backs=[[4, 3]], named=[[5, 3]]), recent_bad=[4],
        spikes=SpikeWindow([0.1, 1 / 3], [2.0]), scale=LossScale(8.0, 3),
    )  # fmt: skip
    optimizer = MasterAdamW([("w", nn.Parameter(torch.ones(2)))], ["language"], AdamW())
    write_state(tmp_path / "state", optimizer, p)
    assert read_state(tmp_path / "state", optimizer) == p
