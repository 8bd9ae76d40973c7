"""The work of a run's steps, from its index and the shapes of its model: what a scaling plan reckons with."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lensmith.core.encoded import PackedRow
from lensmith.core.errors import DataError
from lensmith.data.index import Index
from lensmith.data.pipeline import Pipeline
from lensmith.data.placement import place
from lensmith.data.plan import Plan
from lensmith.model.flops import Amounts, Formula, Meter, Operation, Work
from lensmith.model.memory import Ledger
from lensmith.model.precision import part_in
from lensmith.model.roofline import Rates, measure
from lensmith.parallel.cost import Tensor
from lensmith.parallel.devices import Device
from lensmith.recipe.build import keep_freed_memory
from lensmith.recipe.memory import Prediction, step_peak, update_peak
from lensmith.recipe.prepare import Prepared

LOOKED_AT_STEPS = 20
LOOKED_AT_SECONDS = 4.0
"""Steps, spread over the run, whose placement is looked at for each number of ranks; fewer if it takes longer."""
READ_SAMPLES, READ_SECONDS = 64, 3.0
"""Samples that are read to see how long it takes."""


@dataclass(frozen=True)
class Counted:
    """Operations of a row of middle cost, and of one update."""

    members: np.ndarray
    row: dict[Operation, int]
    update: dict[Operation, int]
    flops: int


def count(found: Prediction, row: PackedRow) -> Counted:
    model: Any = found.built.tuned.model
    fake, of_row, of_update = next(model.parameters()).fake_mode, Meter(), Meter()
    with Ledger(found.device, fake) as ledger:
        with of_row:
            step_peak(ledger, found.built, row, several=False)
        with of_update:
            update_peak(ledger, found.built)
    return Counted(np.array(row.members), dict(of_row.operations), dict(of_update.operations), of_row.flops)


@dataclass(frozen=True)
class Placed:
    """A step as a number of ranks would take it, by seconds of compute."""

    seconds: np.ndarray
    """Of each rank."""
    last_row: float
    """The longest last row of a rank."""
    micro_batches: int
    samples: int
    most_samples: int
    """Of one rank."""

    @property
    def balance(self) -> float:
        """Slowest rank over the mean."""
        return float(self.seconds.max() / self.seconds.mean())


class Workload:
    """A stage's data and model on one device."""

    def __init__(self, prepared: Prepared, index: Index, plan: Plan, steps: int, found: Prediction):
        self.prepared, self.index, self.plan, self.steps, self.found = prepared, index, plan, steps, found
        model = found.built.tuned.model
        self.formula = Formula(model, prepared.family, recompute=prepared.located.run.train.recompute)
        self.amounts = Amounts.of(index.column, self.formula.tile)
        self.looks = index.column("look")
        self._counted: dict[tuple[int, ...], Counted] = {}
        self.counted = self.counted_of(plan, 1)

    def counted_of(self, plan: Plan, ranks: int) -> Counted:
        """Of a row of middle cost of those that so many ranks get. Small rows have another rate than large ones, and a
        head that runs in chunks computes them twice."""
        row = self._middle_row(plan, ranks)
        if row.members not in self._counted:
            self._counted[row.members] = count(self.found, row)
        return self._counted[row.members]

    def _middle_row(self, plan: Plan, ranks: int) -> PackedRow:
        """Of the first steps, a row that can be read; else the largest."""
        pipeline = Pipeline(self.index, plan, self.prepared.limits, ranks=ranks)
        rows = [row for step, _ in zip(plan.steps(), range(LOOKED_AT_STEPS), strict=False)
                for row in pipeline.rows_of(step) if row]  # fmt: skip
        cost = self.index.column("tokens") + self.index.column("patches") / 4.0
        rows.sort(key=lambda row: sum(float(cost[m.number]) for m in row))
        row = pipeline.reread(tuple(m.number for m in rows[len(rows) // 2])) if rows else self.found.row
        return row if row.num_tokens else self.found.row

    # -- one row ------------------------------------------------------------------------------------------------

    def of_row(self, members: np.ndarray) -> Amounts:
        """Of each member; a picture that several of them show is computed once."""
        amounts, looks = self.amounts.take(members), self.looks[members]
        _, first = np.unique(looks, return_index=True)
        again = (looks != 0) & ~np.isin(np.arange(len(members)), first)
        patches, media = np.where(again, 0, amounts.patches), np.where(again, 0, amounts.media_tokens)
        return replace(amounts, patches=patches, media_tokens=media)

    @cached_property
    def formula_over_counted(self) -> float:
        work = self.formula.executed(self.of_row(self.counted.members))
        return float(np.sum(work.total)) / self.counted.flops

    def rate(self, counted: Counted, rates: Rates, mfu: float | None, peak: float) -> float:
        """FLOPs per second, counted as executed, that rows like `counted` get: by `rates`, or so that they reach an
        MFU."""
        row = self.of_row(counted.members)
        executed = float(np.sum(self.formula.executed(row).total))
        if mfu is None:
            return executed / rates.seconds(counted.row)
        return mfu * peak * executed / float(np.sum(self.formula.useful(row).total))

    def rates(self, device: Device | None, counted: Counted | None = None) -> Rates:
        """Of a device of the table; None: of this machine, measured with the operations of rows like `counted`."""
        if device is None:
            keep_freed_memory()
            return measure((counted or self.counted).row | self.counted.update)
        flops = {getattr(torch, name): peak * device.peak_share for name, peak in device.peak.items()}
        return Rates(flops, device.bandwidth * device.bandwidth_share, device.launch_seconds)

    # -- steps --------------------------------------------------------------------------------------------------

    def looked_at(self, plan: Plan) -> list[np.ndarray]:
        """Members of steps that are spread evenly over the run; of a token rule, of the first ones."""
        if plan.tokens is not None:
            return [step.members for step, _ in zip(plan.steps(), range(LOOKED_AT_STEPS), strict=False)]
        steps = plan.num_steps()
        numbers = np.unique(np.linspace(0, steps - 1, min(steps, LOOKED_AT_STEPS)).astype(int))
        return [next(plan.steps(int(n))).members for n in numbers]

    def placed(self, members: np.ndarray, ranks: int, seconds: Callable[[Amounts], float]) -> Placed:
        tokens, patches = self.index.column("tokens")[members], self.index.column("patches")[members]
        looks = self.looks[members]
        rows = place(tokens, patches, tokens + patches / 4.0, np.where(looks == 0, -1, looks), ranks=ranks,
                     limits=self.prepared.limits)  # fmt: skip
        each = [[seconds(self.of_row(members[list(row)])) for row in rank if row] for rank in rows]
        return Placed(
            np.array([sum(of_rank) for of_rank in each]), max(of_rank[-1] for of_rank in each if of_rank),
            max(map(len, each)), len(members), max(sum(map(len, rank)) for rank in rows),
        )  # fmt: skip

    def steps_of(self, plan: Plan, ranks: int, seconds: Callable[[Amounts], float]) -> list[Placed]:
        found: list[Placed] = []
        end = time.perf_counter() + LOOKED_AT_SECONDS
        for members in self.looked_at(plan):
            found.append(self.placed(members, ranks, seconds))
            if time.perf_counter() > end:
                break
        return found

    def useful(self, plan: Plan, hit: float) -> float:
        """Mean FLOPs of a step that MFU counts."""
        steps = [self.formula.useful(self.of_row(members)) for members in self.looked_at(plan)]
        return float(np.mean([np.sum(saved(work, hit)) for work in steps]))

    # -- the vision cache ---------------------------------------------------------------------------------------

    def hits(self, plan: Plan, ranks: int) -> float:
        """Share of the pictures of a frozen tower that a rank has seen before, over the whole run.

        A picture that is shown E times falls on any rank each time; memory of one rank holds it if it fell there
        before: 1 - R / E (1 - (1 - 1/R)^E) on average.
        """
        if self.found.built.root.cache is None:
            return 0.0
        shown, distinct = self.looks[self.looks != 0], len(np.unique(self.looks[self.looks != 0]))
        if not distinct:
            return 0.0
        draws = self.steps * (plan.samples or plan.num_samples / max(1, self.steps)) / plan.num_samples
        each = max(1.0, len(shown) / distinct * draws)
        return 1 - ranks / each * (1 - (1 - 1 / ranks) ** each)

    # -- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def read_seconds(self) -> float:
        """Of one sample, with its pictures, in one process of this machine."""
        pipeline = Pipeline(self.index, self.plan, self.prepared.limits)
        spent = samples = 0.0
        for step in self.plan.steps():
            for row in pipeline.rows_of(step):
                begin = time.thread_time()
                pipeline.reread(tuple(member.number for member in row))
                spent, samples = spent + time.thread_time() - begin, samples + len(row)
                if samples >= READ_SAMPLES or spent > READ_SECONDS:
                    return spent / samples
        if not samples:
            raise DataError("NO_STEPS", "no sample is in any step")
        return spent / samples

    # -- parameters ---------------------------------------------------------------------------------------------

    @cached_property
    def tensors(self) -> list[Tensor]:
        """As engines exchange them: blocks one by one, the rest at once, a frozen tower not at all."""
        built, family, model = self.found.built, self.prepared.family, self.found.built.tuned.model
        whole = {"trained": (), "projector": ("vision",), "frozen": ("vision", "projector")}[built.root.vision_mode]
        units = {
            id(p): (f"{part} {n}", 1 + self.formula.reached(part, n))
            for part in ("vision", "language")
            for n, block in enumerate(family.blocks(model, part))
            for p in block.parameters()
        }
        found: list[Tensor] = []
        for name, p in model.named_parameters():
            part = family.part_of(name)
            unit, gathers = units.get(id(p), ("rest", 1))
            plan, gradient = built.precision.of(part_in(family.part_of, name)), 4
            if p.requires_grad:
                gradient = built.optimizer.keep[name].gradients.itemsize
            travels = min(p.element_size(), plan.compute.itemsize)
            found.append(Tensor(tuple(p.shape), p.requires_grad, p.element_size(), gradient, travels,
                                None if part in whole else unit, gathers))  # fmt: skip
        return found

    @cached_property
    def flags(self) -> tuple[int, int]:
        """(bytes, number) of what ranks tell each other in a step, in float64: nine counts of what they have read; and
        behind it loss, gradient norm of each part, two votes, two sums of each source, and seconds."""
        built = self.found.built
        parts = {built.part_of(name) for name, _ in built.optimizer.named}
        return 8 * (9 + 1 + len(parts) + 2 + 2 * len(self.index.sources) + 1), 2


@dataclass(frozen=True)
class SecondsOf:
    """Amounts of a row -> seconds of its forward and backward passes."""

    formula: Formula
    rate: float
    hit: float
    """Share of the pictures whose features are there already."""
    least: float
    """What starting the operations takes."""

    def __call__(self, of: Amounts) -> float:
        flops = float(np.sum(saved(self.formula.executed(of), self.hit)))
        return max(flops / self.rate, self.least)


def saved(work: Work, hit: float) -> Any:
    """FLOPs without what a cache of a frozen tower saves."""
    return work.vision * (1 - hit) + work.rest
