"""From a step that is not finite to what is done about it: examine, record, then skip, go back or stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn

from lensmith.core.errors import RunError
from lensmith.engine.forensics import Finding, InStep, Scene, examine
from lensmith.engine.guard import Action, bad_state, decide, to_exclude
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.options import Guard
from lensmith.engine.progress import Progress
from lensmith.engine.step import StepResult
from lensmith.parallel.ranks import Ranks

ADVICE: dict[str, str] = {
    "bad_input": "look at the samples that are named",
    "no_targets": "nothing in these samples is trained: mend them, or divide by the count of the whole step",
    "bad_weights": "compare the tensor hashes of the incident with those of the last checkpoint",
    "forward_overflow": "compute in a type with more range (precision.preset bf16 or fp32), or lower optimizer.lr",
    "backward_only": "lower optimizer.lr or train.clip_norm, or compute in float32 (precision.preset fp32)",
    "loss": "look at the objective: a division by nothing, or the logarithm of zero",
    "overflow": "train with precision.preset bf16, or fp32 where the device has no bfloat16",
    "ranks_differ": "a rank computes something else: look at its device, versions and data",
    "transient": "look at the memory and the device of this machine; the same numbers came out finite",
    "bad_state": "lower optimizer.lr, or look at what else writes into the parameters",
}
"""What a person can do, by cause."""


def advice(found: Finding) -> str:
    if found.cause == "forward_overflow" and found.output_dtype in ("torch.float32", "torch.bfloat16"):
        return "lower optimizer.lr, and look at the weights of this module: its type has all the range there is"
    if found.cause == "backward_only" and found.output_dtype == "torch.float32":
        return "lower optimizer.lr or train.clip_norm, and look at what this module computes: it is float32 already"
    return ADVICE[found.cause]


@dataclass
class Incident:
    """What happened, what was found, what is done. `scene` is None where no step was computed again."""

    kind: Literal["step", "state"]
    step: int
    """Counted from 1, over this stage."""
    finding: Finding
    action: Action
    why: str
    progress: Progress
    optimizer: MasterAdamW
    data: Any = None
    result: StepResult | None = None
    scene: Scene | None = None
    owner: bool = True
    """Whether this rank is the one that found it, which keeps it."""

    @property
    def text(self) -> str:
        f = self.finding
        where = f" in {f.module}" if f.module else f" in {f.bad_parameters[0]}" if f.bad_parameters else ""
        return f"{f.cause}{where}"


@dataclass(frozen=True)
class Rescue:
    """What a run gives the loop for looking into a step and for going back.

    reread: a row of one sample alone. record: keep an incident. keep: put `history` and `excluded` where neither a
    roll-back nor a crash loses them. roll_back: restore the newest checkpoint up to a step and say its progress; raises
    `RunError` where there is none. restart: read data from the progress on, without what it excludes; None where
    samples cannot be left out and nothing can be read again (a stream).
    """

    model: nn.Module
    reread: Callable[[int], Any]
    record: Callable[[Incident], None]
    keep: Callable[[Progress], None]
    roll_back: Callable[[int], Progress]
    restart: Callable[[Progress], None] | None
    in_step: InStep | None = None
    """Where an engine spreads the model over ranks."""
    looking: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around a look into a step, which may take long."""


@dataclass
class Rescuer:
    """`rescue` None: nothing is examined, and nothing can be gone back to."""

    rule: Guard
    progress: Progress
    optimizer: MasterAdamW
    rescue: Rescue | None
    event: Callable[[str, dict[str, Any]], None]
    first_step: int = 0
    ranks: Ranks = field(default_factory=Ranks)

    def answer(self, data: Any, result: StepResult, scene: Scene | None) -> bool:
        """To a step that was not finite; whether the run went back. Raises `RunError` NONFINITE to stop."""
        with nullcontext() if self.rescue is None else self.rescue.looking():
            found, owner = self._common(_finding(result, scene))
        return self._act(Incident("step", self.progress.step, found, "skip", "", self.progress, self.optimizer, data,
                                  result, scene, owner))  # fmt: skip

    def _common(self, found: Finding) -> tuple[Finding, bool]:
        """What the ranks found together: the first that saw a fault in its own rows, or of the others the first that
        says anything else than that it was gone. Whether it is this one."""
        said = self.ranks.gather_json(found.to_json(), "agree on a cause")
        order = sorted(range(len(said)), key=lambda rank: (said[rank]["cause"] == "transient", rank))
        owner = order[0]
        if owner == self.ranks.rank:
            return found, True
        return replace(Finding(**said[owner]), random=found.random), False

    def is_sound(self) -> bool:
        """Looks through weights and moments. False: they were not finite, and the run went back."""
        bad = bad_state(self.optimizer)
        if not self.ranks.any(bool(bad), "look through the state"):
            return True
        everywhere = self.ranks.gather_json(bad, "name what is not finite")
        found = Finding("bad_state", bad_parameters=sorted({name for names in everywhere for name in names}))
        owner = next(rank for rank, names in enumerate(everywhere) if names) == self.ranks.rank
        return not self._act(
            Incident("state", self.progress.step, found, "skip", "", self.progress, self.optimizer, owner=owner)
        )

    def _act(self, incident: Incident) -> bool:
        p, history, found = self.progress, self.progress.history, incident.finding
        history.incidents += 1
        history.transient += found.cause == "transient"
        if self.rescue is not None and self.rescue.restart is not None:
            history.named += [[sample, p.step - 1] for sample in found.samples]
        trained = {n for n, _ in self.optimizer.named}
        frozen = [n for n in found.bad_parameters if found.cause == "bad_weights" and n not in trained]
        incident.action, incident.why = decide(
            self.rule, history, step=p.step, in_a_row=p.bad_in_a_row, recent=p.recent_bad, cause=found.cause,
            frozen=frozen,
        )  # fmt: skip
        if self.rescue is not None:
            self._try("incident_lost", incident, lambda rescue: rescue.record(incident))
            self._keep(incident)
        if incident.action == "stop":
            raise self._stopped(incident, incident.why)
        if incident.action == "roll_back":
            self._go_back(incident)
            return True
        self._exclude(incident, to_exclude(self.rule, history, p.excluded))
        return False

    def _keep(self, incident: Incident) -> None:
        self._try("history_lost", incident, lambda rescue: rescue.keep(self.progress))

    def _try(self, lost: str, incident: Incident, work: Callable[[Rescue], None]) -> None:
        """What cannot be written is said; the step is answered all the same."""
        try:
            if self.rescue is not None:
                work(self.rescue)
        except OSError as error:
            about = {"step": self.first_step + incident.step, "cause": incident.finding.cause}
            self.event(lost, about | {"why": error.strerror or str(error)})

    def _exclude(self, incident: Incident, samples: list[int]) -> None:
        step = self.progress.step
        if samples and self.rescue is not None and self.rescue.restart is not None:
            self.progress.excluded |= dict.fromkeys(samples, step)
            self._keep(incident)
            self.rescue.restart(self.progress)
            self.event("excluded", {"step": self.first_step + step, "samples": samples})

    def _go_back(self, incident: Incident) -> None:
        """To the last checkpoint, without the samples that were at fault since then. What went wrong stays known."""
        p, rescue = self.progress, self.rescue
        if rescue is None or rescue.restart is None:
            raise self._stopped(incident, f"{incident.why}, and there is no way back")
        try:
            back = rescue.roll_back(self._last_good(incident))
        except RunError as error:
            raise self._stopped(incident, f"{incident.why}, and {error.message}") from None
        reached, history = p.step, p.history
        history.roll_backs.append([reached, back.step])
        named = sorted({s for s, number in history.named if number >= back.step and s not in p.excluded})
        excluded = p.excluded | dict.fromkeys(named, back.step)
        for of in fields(p):
            setattr(p, of.name, getattr(back, of.name))
        p.history, p.excluded, p.bad_in_a_row, p.recent_bad = history, excluded, 0, []
        self._keep(incident)
        rescue.restart(p)
        step, reached = self.first_step + p.step, self.first_step + reached
        self.event("roll_back", {"step": step, "reached": reached, "excluded": named, "why": incident.why})

    def _last_good(self, incident: Incident) -> int:
        """Step of the last checkpoint worth going back to. The weights that fail are those since the last update that
        was applied. If they are finite and fail with every sample, the fault came with that update at the latest."""
        p, found = self.progress, incident.finding
        applied = p.step - p.bad_in_a_row
        return applied - 1 if found.every_sample and found.cause != "bad_weights" else applied

    def _stopped(self, incident: Incident, why: str) -> RunError:
        step = self.first_step + incident.step
        return RunError("NONFINITE", f"step {step} is not finite ({incident.text}); the run stops: {why}",
                        remedy=advice(incident.finding))  # fmt: skip


def _finding(result: StepResult, scene: Scene | None) -> Finding:
    if result.disagree:
        return Finding("ranks_differ")
    if scene is None:
        return Finding("loss")
    found = examine(scene)
    if result.overflow:
        found.cause = "overflow"
    return found
