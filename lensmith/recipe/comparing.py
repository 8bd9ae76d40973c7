"""A stage whose objective compares answers: rows are told what the reference says of them, and, for KTO, how far the
model of this step is from the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lensmith.checkpoint.store import MANIFEST, Published, read_manifest
from lensmith.core.encoded import PackedRow
from lensmith.data.pipeline import Pipeline
from lensmith.engine.progress import Progress
from lensmith.engine.state import carry_state, read_progress
from lensmith.model.options import Lora
from lensmith.objective.options import KTO, Cached, compares, reference_of
from lensmith.objective.preference import log_probabilities
from lensmith.recipe.known import Known
from lensmith.recipe.reference import Computing, References, evaluating, in_each_step, mismatched_of, other_model

if TYPE_CHECKING:
    from lensmith.recipe.stage import StageRun


def begin_comparing(stage: StageRun) -> Comparing | None:
    """Before the stage reads its own state, while the model is still the one that training begins with."""
    objective = stage.run_file.objective
    if compares(objective) is None:
        return None
    asked, references = reference_of(objective), None
    if isinstance(asked, Cached):
        references = _computed(stage, asked)
    elif asked is not None:
        stage.built.root.reference = in_each_step(stage.prepared, stage.built, asked)
    return Comparing(stage, references)


def _computed(stage: StageRun, asked: Cached) -> References:
    border, resume = _border(stage), stage.start.resume
    manifest = b"" if border is None else (border.folder / MANIFEST).read_bytes()
    begun_from = hashlib.sha256(manifest).hexdigest() if manifest else ""
    found = References(stage.prepared, stage.ranks, stage.terminal, begun_from)

    def with_model() -> Computing:
        if border is not None and stage.start.border is None:  # the run's own state, read later, goes over it
            carry_state(border.folder / "state", stage.built.optimizer, moments=False)
        if asked.model is not None:
            return other_model(stage.prepared, asked.model)
        forward = stage.built.forward
        return Computing(lambda row: forward(row, figures_only=True)["at"][0], stage.built.root, stage.evened)

    p = Progress() if resume is None else read_progress(resume.folder / "state")
    plan = replace(stage.prepared.plan, excluded=dict(p.excluded))
    if stage.session.dry_run:
        plan = replace(plan, max_steps=p.step + 1)
    with stage.session.dog.phase("reference"):
        stage.warm(Pipeline(stage.prepared.train, plan, stage.prepared.limits))
        found.complete(with_model, plan, p)
    return found


def _border(stage: StageRun) -> Published | None:
    """The checkpoint of the stage before whose parameters this one began with, also when it goes on later; None where
    they are in its model folder."""
    if stage.start.border is not None or stage.start.resume is None or not stage.number:
        return stage.start.border
    before, mine = (stage.session.located.stages[n].run.tune for n in (stage.number - 1, stage.number))
    if isinstance(before, Lora) and before != mine:
        return None
    folder = stage.store.path(stage.session.borders[stage.number - 1])
    return Published(folder, read_manifest(folder))


class Comparing:
    def __init__(self, stage: StageRun, references: References | None):
        self.stage, self.references = stage, references
        self.asks = isinstance(stage.run_file.objective, KTO)
        self.kl = 0.0
        """Of the last step."""

    def complete(self, row: PackedRow) -> PackedRow:
        """A row of the training data that knows what the objective asks."""
        if row.compared is not None:
            row.compared.statistic = self.kl
            if self.references is not None:
                self.references.train.tell(row)
        return row

    def complete_held(self, rows: Sequence[PackedRow], pipeline: Pipeline) -> None:
        known = None if self.references is None else self.references.held
        if known is not None:
            for row in rows:
                known.tell(row)
        self._ask(rows, known, pipeline)

    def ask(self, rows: Sequence[PackedRow]) -> None:
        self._ask(rows, None if self.references is None else self.references.train, self.stage.pipeline)

    @torch.no_grad()
    def _ask(self, rows: Sequence[PackedRow], known: Known | None, pipeline: Any) -> None:
        """KTO's KL to the reference: the mean of log pi/ref of the mismatched answers of all ranks, at least 0."""
        if not self.asks:
            return
        root, stage = self.stage.built.root, self.stage
        others = mismatched_of(rows, root, pipeline, stage.evened, stage.ranks)
        with evaluating(root):
            ratios = np.concatenate([np.zeros(0), *(self._ratios(other, known) for other in others)])
        said = stage.ranks.gather(
            [float(ratios[np.isfinite(ratios)].sum()), float(np.isfinite(ratios).sum())],
            "agree on the KL to the reference",
        )
        count = sum(n for _, n in said)
        if count:  # behind an exclusion nothing may be known of a step's pairs: the last figure stands
            self.kl = max(0.0, sum(total for total, _ in said) / count)
        for row in rows:
            if row.compared is not None:
                row.compared.statistic = self.kl

    def _ratios(self, row: PackedRow, known: Known | None) -> np.ndarray:
        """log pi/ref of the answers of a row; NaN where the reference's side is not known."""
        root = self.stage.built.root
        if known is not None:
            known.tell(row)
        elif root.reference is not None:
            with root.autocast():
                root.reference(row)
        at_SK = self.stage.built.forward(row, figures_only=True)["at"][0]
        if row.compared is None or row.compared.reference_B is None:
            return np.zeros(0)
        return log_probabilities(at_SK[:, 0], row).cpu().numpy() - row.compared.reference_B
