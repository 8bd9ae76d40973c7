"""The training loop. It is handed an iterator of steps, a module and callbacks, and knows neither data nor family."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from lensmith.core.errors import RunError
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.options import WSD, Constant, Cosine, Linear, Save, Train
from lensmith.engine.schedule import factor
from lensmith.engine.step import StepResult, Terms, run_step


class StepInput(Protocol):
    """What the loop needs of a step's data."""

    @property
    def step(self) -> Any: ...

    rows: list[Any]
    num_samples: int
    num_tokens: int
    num_supervised: float
    wait_seconds: float


@dataclass
class Progress:
    """Where a run is: everything of the loop that a checkpoint holds beside tensors."""

    step: int = 0
    """Plan steps done, vetoed ones included."""
    applied: int = 0
    """Updates applied; what the schedule counts."""
    cursor: int = 0
    epoch: float = 0.0
    tokens: int = 0
    supervised: float = 0.0
    samples: int = 0
    best: float | None = None
    """The early stop's best score."""
    worse: int = 0
    """Evaluations since then."""
    best_kept: float | None = None
    """The best score that has a checkpoint."""
    bad_in_a_row: int = 0
    excluded: dict[int, int] = field(default_factory=dict[int, int])
    stream: dict[str, Any] | None = None
    """Where a stream goes on; None for planned data."""


@dataclass(frozen=True)
class Callbacks:
    """What happens at step borders. `evaluate` returns held-out metrics; `save` publishes a checkpoint."""

    log: Callable[[Progress, StepInput, StepResult, float], None]
    evaluate: Callable[[Progress], dict[str, float]]
    save: Callable[[Progress, dict[str, float] | None], None]
    refresh: Callable[[Any], Any]
    event: Callable[[str, dict[str, Any]], None]


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

    def run(self, steps: Iterator[StepInput]) -> Progress:
        """Until the steps end, `max_steps`, an early stop or a signal; always saves at the end.

        Raises `Interrupted` after a save when SIGTERM, SIGINT or SIGHUP arrived, and `RunError` NONFINITE.
        """
        last_save, saved_at = time.monotonic(), self.progress.step
        if self.is_over:  # an early stop whose run is started again stays stopped
            return self.progress
        with Signals() as signals:
            for data in steps:
                self._one(data)
                done = self.progress.step
                metrics = self.callbacks.evaluate(self.progress) if self._evaluation_due(done) else None
                best = metrics is not None and self._is_best(metrics)
                if metrics is not None:
                    self._count_worse(metrics)
                stop = metrics is not None and self.is_over
                if self._save_due(done, last_save) or signals.caught is not None or stop or best:
                    self.callbacks.save(self.progress, metrics)
                    last_save, saved_at = time.monotonic(), done
                if signals.caught is not None:
                    raise Interrupted(signals.caught, self.first_step + done)
                if stop:
                    self.callbacks.event("early_stop", {"step": self.first_step + done})
                    break
            if saved_at != self.progress.step:
                self.callbacks.save(self.progress, None)
            if signals.caught is not None:
                raise Interrupted(signals.caught, self.first_step + self.progress.step)
        return self.progress

    def _one(self, data: StepInput) -> None:
        begin = time.perf_counter()
        p = self.progress
        if data.num_supervised > 0:
            result = run_step(
                self.root,
                map(self.callbacks.refresh, data.rows),
                data.num_supervised,
                self.optimizer,
                self.part_of,
                factor=factor(self.schedule, p.applied, self.total_steps),
                clip_norm=self.train.clip_norm,
            )
        else:
            result = StepResult(math.nan, 0.0, {}, False, self.optimizer.rates(), empty=True)
        p.step, p.cursor, p.epoch = data.step.number + 1, data.step.cursor, data.step.epoch
        p.stream = data.step.stream
        if result.applied:
            p.applied, p.bad_in_a_row = p.applied + 1, 0
            p.tokens, p.samples = p.tokens + data.num_tokens, p.samples + data.num_samples
            p.supervised += data.num_supervised
        elif not result.empty:
            p.bad_in_a_row += 1
        self.callbacks.log(p, data, result, time.perf_counter() - begin)
        if p.bad_in_a_row > self.train.max_bad_steps:
            raise RunError(
                "NONFINITE",
                f"loss or gradient was not finite in {p.bad_in_a_row} steps in a row, up to step "
                f"{self.first_step + p.step}; none was applied",
                remedy="lower optimizer.lr, or look at the samples of these steps with `lensmith show`",
            )

    def _save_due(self, done: int, last_save: float) -> bool:
        s = self.saving
        by_steps = s.every_steps is not None and done % s.every_steps == 0
        return by_steps or (s.every_minutes is not None and time.monotonic() - last_save >= 60 * s.every_minutes)

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
