"""A step that was not finite, computed again under hooks: which module, which sample, what kind of fault.

It knows rows only as something that the root takes, with `members`: neither data nor family. Nothing has moved since
the step: weights and moments are as they were, the random state is put back, so the same numbers come again. If they do
not, the fault was transient. Afterwards the random state is what it was before the examination.
"""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from lensmith.engine.determinism import Snapshot, random_state
from lensmith.engine.hooks import Seen, Trace, backward_hooks, forward_hooks, is_finite
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.scale import LossScale
from lensmith.engine.step import Terms, backward, mean_of
from lensmith.parallel.ranks import Ranks
from lensmith.parallel.shares import local

Cause = Literal[
    "bad_input", "no_targets", "bad_weights", "forward_overflow", "backward_only", "loss", "ranks_differ",
    "transient", "bad_state", "overflow",
]  # fmt: skip

RERUNS = 3
"""A fault that does not come again in so many runs is transient."""


@dataclass(frozen=True)
class InStep:
    """Ranks that hold shares of one model examine a step together: each runs as many passes as the others, over the
    same modules. `even`: a row that does so; of None, one of which nothing is trained."""

    ranks: Ranks
    even: Callable[[Any], Any]


@dataclass
class Scene:
    """All that is needed to compute a step again."""

    root: Callable[[Any], Terms]
    model: nn.Module
    """The module whose names are those of the parameters; `root` runs it."""
    rows: Sequence[Any]
    refresh: Callable[[Any], Any]
    reread: Callable[[int], Any]
    """A row of one sample alone, by its number."""
    counts: Mapping[str, float]
    optimizer: MasterAdamW
    part_of: Callable[[str], str]
    random: Snapshot
    scale: LossScale | None = None
    in_step: InStep | None = None
    """Where an engine spreads the model over ranks."""

    def gradient(self, row: Any) -> torch.Tensor:
        """Forward and backward of one row on top of the gradients so far; its part of the loss."""
        loss = self.loss(row)
        self.backward(loss)
        return loss.detach()

    def loss(self, row: Any) -> torch.Tensor:
        return mean_of(self.root(row), self.counts)

    def backward(self, loss: torch.Tensor) -> None:
        backward(loss, self.optimizer, self.scale, last=self.in_step is not None)

    def any(self, flag: bool) -> bool:
        """Whether a rank says so, where the ranks examine together; else whether this one does."""
        return flag if self.in_step is None else self.in_step.ranks.any(flag, "examine a step")

    def gradient_norms(self) -> dict[str, float]:
        """Parameter -> norm of its gradient so far."""
        return {n: float(get_total_norm([g.float()])) for n, g in self.optimizer.gradients()}


@dataclass
class Finding:
    """What an examination found. `module` is its name in the model, `row` the number of the micro-batch."""

    cause: Cause
    module: str | None = None
    module_type: str | None = None
    part: str | None = None
    direction: Literal["forward", "backward"] | None = None
    row: int | None = None
    samples: list[int] = field(default_factory=list[int])
    """Those that are at fault: alone they are not finite, and others are."""
    every_sample: bool = False
    """Every sample is not finite: the fault is not in the data."""
    largest_input: float | None = None
    input_dtype: str | None = None
    output_dtype: str | None = None
    bad_parameters: list[str] = field(default_factory=list[str])
    bad_gradients: list[str] = field(default_factory=list[str])
    gradient_norms: dict[str, float] = field(default_factory=dict[str, float])
    """Parameter -> norm of its gradient, in the row where the fault showed."""
    largest_outputs: dict[str, float] = field(default_factory=dict[str, float])
    """Module -> largest finite magnitude that it gave in that row."""
    reruns: int = 0
    random: tuple[dict[str, torch.Tensor], str] | None = None
    """The random state just before the row, as `random_state` gives it."""

    def to_json(self) -> dict[str, Any]:
        """Without the random state, which is each rank's own."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "random"}


@dataclass
class _Fault:
    number: int
    row: Any
    random: tuple[dict[str, torch.Tensor], str]
    before: Snapshot
    loss: torch.Tensor
    trace: Trace
    norms: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def shows(self) -> bool:
        total = torch.tensor([0.0, *self.norms.values()]).square().sum()
        return not is_finite(self.loss) or not is_finite(total)


def examine(scene: Scene) -> Finding:
    """Compute the step again until the fault shows, and say what it is. Gradients are gone afterwards."""
    now = Snapshot()
    try:
        for run in range(1, RERUNS + 1):
            fault = _rerun(scene)
            if fault is not None:
                found = _classified(scene, fault)
                found.reruns, found.row, found.random = run, fault.number, fault.random
                found.gradient_norms, found.largest_outputs = fault.norms, fault.trace.largest
                return found
        return Finding("transient", reruns=RERUNS)
    finally:
        scene.optimizer.zero_grad()
        scene.optimizer.give_back()
        now.restore()


def _rerun(scene: Scene) -> _Fault | None:
    """The first micro-batch after which loss or gradient is not finite."""
    scene.random.restore()
    scene.optimizer.zero_grad()
    for number, row in enumerate(scene.rows):
        before, random = Snapshot(), random_state()
        row = scene.refresh(row)
        if scene.in_step is not None:  # its gradients are exchanged with each row
            scene.optimizer.zero_grad()
        with forward_hooks(scene.model) as trace:
            loss = scene.loss(row)
        fault = _Fault(number, row, random, before, loss.detach(), trace)
        if not scene.any(fault.shows):
            scene.backward(loss)
            fault.norms = scene.gradient_norms()
            if not scene.any(fault.shows):
                continue
        return fault
    return None


def _classified(scene: Scene, fault: _Fault) -> Finding:
    bad_parameters = [n for n, p in scene.model.named_parameters() if not is_finite(local(p))]
    forward_bad = bool(fault.trace.seen) or not is_finite(fault.loss)
    elsewhere = scene.any(forward_bad) and not forward_bad
    seen = next((s for s in fault.trace.seen if not s.bad_input), None)
    if scene.any(bool(bad_parameters)):
        if not bad_parameters:  # in another rank's share
            return Finding("transient")
        own = next((s for s in fault.trace.seen if s.bad_parameters), None)
        found = _at(scene, "bad_weights", "forward", own or Seen(_owner(bad_parameters[0]), ""))
        found.bad_parameters = bad_parameters
        return found
    if seen is not None:
        found = _at(scene, "forward_overflow", "forward", seen)
    elif fault.trace.seen:
        found = _at(scene, "bad_input", "forward", fault.trace.seen[0])
    elif not is_finite(fault.loss):
        found = Finding("loss")
    elif elsewhere:
        found = Finding("transient")
    else:
        found = _backward(scene, fault)
    _bisect(scene, fault, found)
    if found.cause == "loss" and (empty := _without_targets(fault.row)):
        found.cause, found.samples, found.every_sample = "no_targets", empty, False
    return found


def _at(scene: Scene, cause: Cause, direction: Literal["forward", "backward"], seen: Seen) -> Finding:
    part = scene.part_of(f"{seen.module}.weight") if seen.module else None
    return Finding(
        cause, seen.module, seen.type or type(scene.model.get_submodule(seen.module)).__name__, part, direction,
        largest_input=seen.largest_input, input_dtype=seen.input_dtype, output_dtype=seen.output_dtype,
    )  # fmt: skip


def _backward(scene: Scene, fault: _Fault) -> Finding:
    """Which module gives a gradient that is not finite while it gets a finite one. Where none does, the gradient of a
    parameter alone is bad: the last of its kind in the model's order, the first of the backward pass."""
    fault.before.restore()
    scene.optimizer.zero_grad()
    with backward_hooks(scene.model) as seen:
        scene.gradient(scene.refresh(fault.row))
    elsewhere = scene.any(bool(seen)) and not seen
    names, mine = _bad_gradients(scene, fault)
    if not seen and (elsewhere or not mine):  # another rank's rows, or shares
        return Finding("transient")
    found = _at(scene, "backward_only", "backward", seen[0] if seen else Seen(_owner(names[-1]), ""))
    found.bad_gradients = names
    return found


def _bad_gradients(scene: Scene, fault: _Fault) -> tuple[list[str], bool]:
    """Names in the model's order, of all ranks that have shares of the gradients, and whether the last of them is bad
    on this rank, and on none before it. Where no gradient is bad, but the norm over all is too large for its type, the
    name is that of the largest."""
    norms = {n: norm for n, norm in fault.norms.items() if not math.isfinite(norm)}
    if not scene.any(bool(norms)):
        norms = fault.norms
        norms = {n: norms[n] for n in sorted(norms, key=lambda n: norms[n])[-1:]}
    if scene.in_step is None:
        return list(norms), bool(norms)
    said = scene.in_step.ranks.gather_json(norms, "compare gradients")
    every = {n: v for rank in said for n, v in rank.items()}
    order = [n for n, _ in scene.optimizer.named if n in every]
    if all(map(math.isfinite, every.values())):
        order = sorted(order, key=lambda n: every[n])[-1:]
    first = next((rank for rank, its in enumerate(said) if order and order[-1] in its), -1)
    return order, first == scene.in_step.ranks.rank


def _bisect(scene: Scene, fault: _Fault, found: Finding) -> None:
    """Each sample of the row alone. If all of them are bad, one of another row tells whether any sample would be. The
    only sample of a step is compared with none: it is at fault only if what came in was bad."""
    if scene.in_step is not None:
        _bisect_together(scene, scene.in_step, fault, found)
        return
    members = list(fault.row.members)
    if len(members) == 1 and len(scene.rows) == 1 and found.cause in ("bad_input", "no_targets"):
        found.samples = members
        return
    bad = [m for m in members if _is_bad(scene, fault, m)]
    others = [m for n, row in enumerate(scene.rows) if n != fault.number for m in row.members]
    found.every_sample = bad == members and (not others or _is_bad(scene, fault, others[0]))
    found.samples = [] if found.every_sample else bad


def _bisect_together(scene: Scene, together: InStep, fault: _Fault, found: Finding) -> None:
    """Each sample of the row at fault on the rank that has it; rows of which nothing is trained on the others."""
    ranks, members = together.ranks, list(fault.row.members)
    said = ranks.gather([float(found.cause != "transient"), len(members)], "say whose row it is")
    owner = next((rank for rank, (mine, _) in enumerate(said) if mine), 0)
    mine = ranks.rank == owner
    bad = [
        ranks.any(_is_bad(scene, fault, members[n] if mine else None), "try a sample")
        for n in range(int(said[owner][1]))
    ]
    if not mine:
        found.cause = "transient"
        return
    at_fault = [m for m, is_bad in zip(members, bad, strict=True) if is_bad]
    found.every_sample = all(bad) and len(bad) > 1
    found.samples = [] if found.every_sample or (len(bad) == 1 and found.cause != "bad_input") else at_fault


def _is_bad(scene: Scene, fault: _Fault, sample: int | None) -> bool:
    """`sample` None: another rank tries one of its own."""
    fault.before.restore()
    scene.optimizer.zero_grad()
    row = None if sample is None else scene.reread(sample)
    if row is not None and not row.members:  # its picture cannot be read any more
        row = None
    if scene.in_step is not None:
        row = scene.in_step.even(row)
    if row is None:
        return False
    loss = scene.gradient(row)
    return _Fault(0, row, fault.random, fault.before, loss, Trace(), scene.gradient_norms()).shows


def _without_targets(row: Any) -> list[int]:
    """Samples of a row of which nothing is trained."""
    trained = set(row.sample_S.tolist())
    return [m for m in row.members if m not in trained]


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
