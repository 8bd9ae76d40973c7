"""What the reference model says of the answers that an objective compares.

`cached` (the default): once, before the first step, of every sample that the run will draw, by the model as training
begins; kept in the cache folder under the weights and everything else that they follow from, by sample. So it costs one
forward pass of each sample over all epochs and runs, takes no memory beside the model, and works with every tuning and
engine. A resumed run loads the same base before its own state, so what is missing can be computed then too.
`adapter` and `frozen`: in each step, by the same model without its adapter or by a second one.
"""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and pyarrow leave parts of these types open)

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lensmith.core.encoded import PackedRow
from lensmith.core.errors import ModelError
from lensmith.data.pipeline import Pipeline, no_picture_known
from lensmith.data.plan import Plan, Step
from lensmith.engine.progress import Progress
from lensmith.family.registry import read_json
from lensmith.model import precision
from lensmith.model.load import base_dtype, load_model, widest_dtype
from lensmith.model.lora import Folders
from lensmith.model.root import MOST_POSITIONS, Autocast, Root
from lensmith.model.source import resolve
from lensmith.objective.options import KTO, Adapter, Cached, Frozen, reference_of
from lensmith.objective.preference import log_probabilities
from lensmith.parallel.ranks import Ranks
from lensmith.recipe.build import Built, data_workers, device_of, loading_of, objective_of
from lensmith.recipe.held_out import held_plan
from lensmith.recipe.identity import sampled_weights
from lensmith.recipe.known import Known
from lensmith.recipe.methods import adapter_folders
from lensmith.recipe.prepare import Prepared, cache_folder
from lensmith.recipe.spread import Evened
from lensmith.recipe.together import shared_steps
from lensmith.report.terminal import Terminal

ROWS_AT_ONCE = 8
"""Rows of each rank that are placed together in the pass before training."""

NOT_SAID = ("files", "family", "tokenizer_json", "roots", "max_row_bytes", "decode", "decode_timeout", "mismatched")
"""Of what a loader is told, what changes no answer's log-probability; the tokenizer is said by its digest."""


@dataclass(frozen=True)
class Computing:
    """What the pass before training needs of a model. `forward` gives the figures of a row's positions."""

    forward: Callable[[PackedRow], torch.Tensor]
    root: Root
    evened: Evened | None = None


class References:
    """Of a stage whose objective measures answers against cached log-probabilities."""

    def __init__(self, prepared: Prepared, ranks: Ranks, terminal: Terminal, begun_from: str = ""):
        """`begun_from`: what the weights follow from beside the model folder."""
        self.prepared, self.ranks, self.terminal = prepared, ranks, terminal
        located = prepared.located
        folder = prepared.model_folder
        asked = reference_of(located.run.objective)
        if isinstance(asked, Cached) and asked.model is not None:
            folder = other_folder(prepared, asked.model)
        cache = cache_folder(located.run.data, located.folder)
        mark = self._mark(folder, begun_from)
        pairs = not isinstance(located.run.objective, KTO)
        self.train = Known(prepared.train, cache / f"reference-{mark}.parquet", pairs)
        self.held = None if prepared.held is None else Known(prepared.held, self.train.file, pairs)

    def _mark(self, folder: Path, begun_from: str) -> str:
        prepared, located = self.prepared, self.prepared.located
        run, spec, asked = located.run, prepared.train.spec, reference_of(located.run.objective)
        other = asked.model if isinstance(asked, Cached) else None
        adapters = adapter_folders(located) if other is None else Folders()
        parts = [p for p in (adapters.adapter, *adapters.merge) if p is not None]
        said = [
            sampled_weights(folder), begun_from, repr(prepared.family), prepared.code and prepared.code.digest,
            other is None, None if other else run.tune.model_dump(mode="json"), [sampled_weights(p) for p in parts],
            {f.name: repr(getattr(spec, f.name)) for f in fields(spec) if f.name not in NOT_SAID},
            spec.tokenizer_digest, run.precision.model_dump(mode="json"), device_of(run).type,
        ]  # fmt: skip
        return hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()

    def complete(self, with_model: Callable[[], Computing], plan: Plan, progress: Progress) -> None:
        """Compute what is missing for the steps from here on and for the held-out samples. All ranks together."""
        mismatched = self.prepared.train.spec.mismatched
        for known in (self.train, self.held):  # each machine may have a cache of its own
            if known is not None:
                known.share(self.ranks)
        steps = list(self._missing(_until_end(plan, progress), plan.num_samples, mismatched))
        held = [] if self.held is None else list(self._missing_held(self.held, mismatched))
        total = sum(len(s.members) for s in chain(steps, held))
        if not total:
            return
        computing = with_model()
        with self.terminal.progress("Log-probabilities of the reference", total) as bar:
            for known, todo in ((self.train, steps), (self.held, held)):
                if known is not None and todo:
                    self._compute(computing, known, todo, bar.advance)
                    known.share(self.ranks)
                    if mismatched:
                        known.give_up(todo)
                    if self.ranks.is_main:
                        known.write()

    def _missing(self, steps: Iterator[Step], num_samples: int, mismatched: bool) -> Iterator[Step]:
        if mismatched:  # whose answer stands behind which prompt is the steps' own
            yield from (step for step in steps if not self.train.knows(step, mismatched=True))
            return
        drawn = np.zeros(num_samples, bool)
        for step in steps:
            drawn[step.members] = True
            if drawn.all():
                break
        drawn &= np.isnan(self.train.values_N2[:, : 1 + self.train.pairs]).any(axis=1)
        yield from self._chunks(self.train, np.flatnonzero(drawn))

    def _missing_held(self, known: Known, mismatched: bool) -> Iterator[Step]:
        number = len(known.values_N2)
        steps = _until_end(held_plan(number), Progress()) if mismatched else self._chunks(known, np.arange(number))
        return (step for step in steps if not known.knows(step, mismatched=mismatched))

    def _chunks(self, known: Known, numbers: np.ndarray) -> Iterator[Step]:
        """Samples in index order, as steps of some rows a rank."""
        tokens = np.cumsum(known.index.column("tokens")[numbers])
        size = self.prepared.limits.device_tokens * self.ranks.size * ROWS_AT_ONCE
        cuts = np.searchsorted(tokens, np.arange(size, int(tokens[-1]) if len(tokens) else 0, size))
        parts = np.split(numbers, np.unique(cuts[cuts > 0]))
        return (Step(n, members, 0.0, 0) for n, members in enumerate(parts) if len(members))

    def _compute(self, computing: Computing, known: Known, steps: list[Step], advance: Callable[[int], Any]) -> None:
        root, cache = computing.root, computing.root.cache
        pipeline = Pipeline(
            known.index, self.prepared.plan, self.prepared.limits, workers=data_workers(self.prepared.located.run),
            rank=self.ranks.rank, ranks=self.ranks.size, known=no_picture_known if cache is None else cache.known,
        )  # fmt: skip
        shared = shared_steps(pipeline.steps_of(iter(steps)), self.ranks, {})
        with torch.no_grad(), evaluating(root):
            for data in shared if computing.evened is None else computing.evened(shared):
                for row in data.rows:
                    row = row if root.ready(row) else pipeline.reread(row.members)
                    known.learn_from(row, computing.forward(row))
                if known.index.spec.mismatched:
                    for row in mismatched_of(data.rows, root, pipeline, computing.evened, self.ranks):
                        known.learn_from(row, computing.forward(row))
                advance(len(data.step.members))


def mismatched_of(
    rows: Sequence[PackedRow], root: Root, pipeline: Any, evened: Evened | None, ranks: Ranks
) -> Iterator[PackedRow]:
    """The rows of mismatched answers that go with rows, each with all that a forward pass needs when it is given out.
    Where an engine spreads the model, every rank gets as many, over the same modules."""
    found = [None if row.compared is None else row.compared.mismatched for row in rows]
    most = max((len(row.supervised_S) for row in found if row is not None), default=0)
    if evened is not None:
        most = int(max(n for (n,) in ranks.gather([float(most)], "even the mismatched answers")))
    for row in found:
        if row is not None and row.compared is not None and not root.ready(row):
            again = pipeline.reread(row.members, tuple(row.compared.other_B.tolist()))
            row = None if again.compared is None else again.compared.mismatched
        if evened is not None:
            row = evened.one(row)
            row.meta[MOST_POSITIONS] = most
        if row is not None:
            yield row


def _until_end(plan: Plan, progress: Progress) -> Iterator[Step]:
    total = plan.num_steps(progress.step, progress.cursor)
    for step in plan.steps(progress.step, progress.cursor):
        if step.number >= total:
            return
        yield step


@contextmanager
def evaluating(root: torch.nn.Module) -> Iterator[None]:
    training = root.training
    root.eval()
    try:
        yield
    finally:
        root.train(training)


# -- models -----------------------------------------------------------------------------------------------------------


def other_folder(prepared: Prepared, name: str) -> Path:
    located = prepared.located
    folder = resolve(located.run.model.model_copy(update={"path": name, "revision": None}), located.folder)
    mine, its = (read_json(f / "config.json").get("model_type") for f in (prepared.model_folder, folder))
    if mine != its:
        raise ModelError("REFERENCE", f"a {its!r}, and the model is a {mine!r}",
                         where=str(folder), remedy="the reference must be of the same family")  # fmt: skip
    return folder


def frozen_model(prepared: Prepared, folder: Path) -> Any:
    """A model of which nothing trains, with the types that the run's frozen parts have."""
    run = prepared.located.run
    device = device_of(run)
    plan = precision.plan(run.precision, device, base_dtype(folder))
    model = load_model(folder, widest_dtype(folder), device, loading_of(prepared))
    model.requires_grad_(False)
    model.eval()
    precision.cast(model, plan, prepared.family.part_of)
    precision.PartCompute(plan, device).attach(model, prepared.family.part_of)
    return model


def other_model(prepared: Prepared, name: str) -> Computing:
    """The model that the run file names as reference, by itself on each rank."""
    run = prepared.located.run
    folder = other_folder(prepared, name)
    model, device = frozen_model(prepared, folder), device_of(run)
    compute = precision.plan(run.precision, device, base_dtype(folder)).compute
    autocast = Autocast(device.type, None if compute == torch.float32 else compute)
    root = Root(model, prepared.family, objective_of(run.objective), autocast=autocast)
    return Computing(lambda row: root(row, figures_only=True)["at"][0], root)


def in_each_step(prepared: Prepared, built: Built, asked: Adapter | Frozen) -> Callable[[PackedRow], None]:
    """What tells a row what the reference says, computed there and then."""
    root = built.root
    frozen = None
    if isinstance(asked, Frozen):
        frozen = frozen_model(prepared, prepared.model_folder)

    @torch.no_grad()
    def tell(row: PackedRow) -> None:
        if row.compared is None or row.compared.reference_B is not None:
            return
        if frozen is None:
            with built.tuned.peft.disable_adapter(), evaluating(root.model):
                at_SK = root.figures(row, root.model, root.features(row))
        else:
            at_SK = root.figures(row, frozen, features_under(root, row, frozen))
        row.compared.reference_B = log_probabilities(at_SK[:, 0], row).float().cpu().numpy()

    return tell


def features_under(root: Root, row: PackedRow, model: Any) -> torch.Tensor | None:
    """Image features as a frozen copy of the model gives them; what cannot differ is taken from the run's own."""
    if root.vision_mode == "frozen" or not len(row.image_keys):
        return root.features(row)
    return root.features(row, model)
