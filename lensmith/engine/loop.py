"""The training loop. It is handed an iterator of steps, a module and callbacks, and knows neither data nor family."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any, Protocol

from lensmith.engine.determinism import Snapshot
from lensmith.engine.forensics import Scene
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.options import WSD, Constant, Cosine, Guard, Linear, Save, Train
from lensmith.engine.progress import Progress
from lensmith.engine.rescue import Rescue, Rescuer
from lensmith.engine.schedule import factor
from lensmith.engine.spikes import look
from lensmith.engine.step import StepResult, Terms, run_step
from lensmith.engine.watch import Watch
from lensmith.parallel.ranks import Ranks


class StepInput(Protocol):
    """What the loop needs of a step's data."""

    @property
    def step(self) -> Any: ...

    rows: list[Any]
    """This rank's micro-batches."""
    num_samples: int
    num_tokens: int
    num_supervised: float
    """These three are of all ranks."""
    counts: Mapping[str, float]
    """What the terms of the loss are divided by."""
    num_sources: int
    wait_seconds: float


@dataclass(frozen=True)
class Callbacks:
    """What happens at step borders. `evaluate` returns held-out metrics; `save` publishes a checkpoint."""

    log: Callable[[Progress, StepInput, StepResult, float], None]
    evaluate: Callable[[Progress], dict[str, float]]
    save: Callable[[Progress, dict[str, float] | None], None]
    refresh: Callable[[Any], Any]
    event: Callable[[str, dict[str, Any]], None]
    ask: Callable[[Sequence[Any]], None] | None = None
    """What an objective wants to know of the whole step before it is computed, for this rank's rows."""


@dataclass
class Loop:
    root: Callable[[Any], Terms]
    optimizer: MasterAdamW
    schedule: Constant | Linear | Cosine | WSD
    part_of: Callable[[str], str]
    train: Train
    saving: Save
    total_steps: int
    evaluate_every: int | None
    callbacks: Callbacks
    progress: Progress = field(default_factory=Progress)
    first_step: int = 0
    """Steps of the stages before; only said."""
    guard: Guard = field(default_factory=Guard)
    rescue: Rescue | None = None
    """None: a step that is not finite is left out without a look into it, and nothing can be gone back to."""
    figures: Sequence[str] = ("loss",)
    """What the objective says of each source."""
    ranks: Ranks = field(default_factory=Ranks)
    """All of them run this loop, and take every turn of it together: what only one of them knows is asked before."""

    def __post_init__(self) -> None:
        self._rescuer = Rescuer(
            self.guard, self.progress, self.optimizer, self.rescue, self.callbacks.event, self.first_step, self.ranks
        )

    def run(self, steps: Iterator[StepInput]) -> Progress:
        """Until the steps end, `max_steps`, an early stop or a signal; always saves at the end. A roll-back makes
        `steps` go on from an earlier step, also after their end.

        Raises `Interrupted` after a save when SIGTERM, SIGINT or SIGHUP arrived, and `RunError` NONFINITE.
        """
        self._saved_at, self._last_save = self.progress.step, time.monotonic()
        if self.is_over:  # an early stop whose run is started again stays stopped
            return self.progress
        with Signals() as signals:
            self._signals = signals
            while self._pass(steps) or (self._saved_at != self.progress.step and not self._save(None)):
                pass
            self._signal = max(v for (v,) in self.ranks.gather([signals.caught or 0], "end the loop"))
            self._leave_if_told()
        return self.progress

    def _votes(self) -> tuple[float, float]:
        """A signal that this rank caught, and whether its clock says that a save is due."""
        minutes = self.saving.every_minutes
        late = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        return float(self._signals.caught or 0), float(late)

    def _leave_if_told(self) -> None:
        if self._signal:
            raise Interrupted(int(self._signal), self.first_step + self.progress.step)

    def _pass(self, steps: Iterator[StepInput]) -> bool:
        """Steps up to the end of `steps` or an early stop. Whether the last thing was a roll-back."""
        went_back = False
        for data in steps:
            done = data.step.number + 1
            went_back = self._one(data)
            if not self.ranks.several:  # what came in while the step was logged counts for this one
                self._signal, self._late = self._votes()
            went_back = went_back or not self._behind(done)
            if not self.ranks.several and self._saved_at == self.progress.step:  # one that came in while it was saved
                self._signal = float(self._signals.caught or 0)
            self._leave_if_told()
            if not went_back and self._evaluation_due(done) and self.is_over:
                self.callbacks.event("early_stop", {"step": self.first_step + done})
                break
        return went_back

    def _behind(self, done: int) -> bool:
        """What is due behind a step. False: the state was not finite, and the run went back."""
        if self._check_due(done) and not self._sound():
            return False
        metrics = self.callbacks.evaluate(self.progress) if self._evaluation_due(done) else None
        best = metrics is not None and self._is_best(metrics)
        if metrics is not None:
            self._count_worse(metrics)
        stop = metrics is not None and self.is_over
        if self._save_due(done) or self._signal or stop or best:
            return self._save(metrics)
        return True

    def _save(self, metrics: dict[str, float] | None) -> bool:
        """Publish a checkpoint, if the state is finite; else the run went back, and this is False."""
        if not self._sound():
            return False
        self.callbacks.save(self.progress, metrics)
        self._last_save, self._saved_at = time.monotonic(), self.progress.step
        return True

    def _sound(self) -> bool:
        return self._rescuer.is_sound() or self._is_back()

    def _is_back(self) -> bool:
        """The state is that of a checkpoint now."""
        self._last_save, self._saved_at = time.monotonic(), self.progress.step
        return False

    def _one(self, data: StepInput) -> bool:
        """One step; whether the run went back."""
        begin = time.perf_counter()
        p, before = self.progress, Snapshot()
        watch = self._watch(data.step.number)
        if data.counts["loss"] > 0:
            if self.callbacks.ask is not None:
                self.callbacks.ask(data.rows)
            result = run_step(
                self.root,
                data.rows,
                data.counts,
                self.optimizer,
                self.part_of,
                factor=factor(self.schedule, p.applied, self.total_steps),
                clip_norm=self.train.clip_norm,
                scale=p.scale,
                look=partial(look, self.guard, p.spikes),
                clip_spikes=self.guard.clip_spikes,
                ranks=self.ranks,
                votes=self._votes,
                num_sources=data.num_sources,
                figures=self.figures,
                refresh=self.callbacks.refresh,
            )
        else:
            votes = zip(*self.ranks.gather(self._votes(), "agree on an empty step"), strict=True)
            result = StepResult(
                math.nan, 0.0, {}, False, self.optimizer.rates(), empty=True, votes=tuple(max(v) for v in votes)
            )
        self._signal, self._late = result.votes
        if watch is not None:
            result = replace(result, watched=watch.figures())
        p.step, p.cursor, p.epoch = data.step.number + 1, data.step.cursor, data.step.epoch
        p.stream = data.step.stream
        scale = replace(p.scale) if p.scale is not None else None  # the one that the step was computed with
        bad = self._count(data, result)
        self.callbacks.log(p, data, result, time.perf_counter() - begin)
        if not bad:
            return False
        scene = None if self.rescue is None else Scene(
            self.root, self.rescue.model, data.rows, self.callbacks.refresh, self.rescue.reread, data.counts,
            self.optimizer, self.part_of, before, scale, self.rescue.in_step,
        )  # fmt: skip
        return self._rescuer.answer(data, result, scene) and not self._is_back()

    def _count(self, data: StepInput, result: StepResult) -> bool:
        """Enter a step into the progress. Whether it is one that something must be done about."""
        p = self.progress
        if result.applied:
            p.applied, p.bad_in_a_row = p.applied + 1, 0
            p.tokens, p.samples = p.tokens + data.num_tokens, p.samples + data.num_samples
            p.supervised += data.num_supervised
            p.history.spikes += result.spike is not None and result.spike.is_spike
            if p.scale is not None:
                p.scale.applied()
            return False
        if result.empty:
            return False
        if result.overflow and p.scale is not None:
            p.scale.overflowed()
            return p.scale.is_exhausted
        p.bad_in_a_row += 1
        p.history.skipped += 1
        p.recent_bad = [n for n in p.recent_bad if n > p.step - self.guard.share_window] + [p.step]
        return True

    def _watch(self, number: int) -> Watch | None:
        every = self.guard.watch_every
        due = self.rescue is not None and every > 0 and number % every == 0
        if not due or self.rescue is None:
            return None
        return Watch(self.rescue.model, self.optimizer, self.part_of, activations=not self.train.compile)

    def _check_due(self, done: int) -> bool:
        return self.guard.check_every > 0 and done % self.guard.check_every == 0

    def _save_due(self, done: int) -> bool:
        if self.progress.bad_in_a_row:  # the same weights again, and they would push out those to go back to
            return False
        s = self.saving
        by_steps = s.every_steps is not None and done % s.every_steps == 0
        return by_steps or bool(self._late)

    def _evaluation_due(self, done: int) -> bool:
        """Every so many steps, and at the last one, so that the last checkpoint has figures."""
        every = self.evaluate_every
        return every is not None and (done % every == 0 or done == self.total_steps)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        """Whether `save.keep_best` asks for a checkpoint here."""
        value, p = score(metrics, self.saving.keep_best or ""), self.progress
        if value is None or (p.best_kept is not None and value <= p.best_kept):
            return False
        p.best_kept = value
        return True

    def _count_worse(self, metrics: dict[str, float]) -> None:
        rule, p = self.train.early_stop, self.progress
        if rule is None:
            return
        value = score(metrics, rule.metric)
        if value is not None and (p.best is None or value > p.best + rule.min_change):
            p.best, p.worse = value, 0
        else:
            p.worse += 1

    @property
    def is_over(self) -> bool:
        """Whether the early stop has come."""
        return self.train.early_stop is not None and self.progress.worse >= self.train.early_stop.patience


def score(metrics: dict[str, float], name: str) -> float | None:
    """A metric as larger-is-better; None when it is missing or not finite (never the best)."""
    value = metrics.get(name)
    if value is None or value - value != 0.0:
        return None
    return -value if name == "loss" else value


class Interrupted(Exception):
    """A signal ended the run at a step border, after a save."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; the run is saved and resumes from there"
        )

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class Signals:
    """Remembers the first SIGTERM, SIGINT or SIGHUP; a second one acts at once as it did before. A signal that was
    ignored (SIGHUP under nohup) stays ignored."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before = signal.getsignal(number)
            if before in (signal.SIG_IGN, None):
                continue
            try:
                signal.signal(number, self._catch)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
            self._before[number] = before
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __exit__(self, *exc: object) -> None:
        self._restore()
