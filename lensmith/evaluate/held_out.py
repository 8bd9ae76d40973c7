"""Held-out figures: loss per supervised token, and answers generated for the questions of held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lensmith.core.encoded import PackedRow
from lensmith.core.errors import Drop
from lensmith.core.sample import Document, Image, Sample
from lensmith.data.index import Index
from lensmith.data.load import Loader
from lensmith.data.pipeline import Pipeline
from lensmith.data.plan import Plan
from lensmith.data.questions import Question, load_questions, picture_row, split_question
from lensmith.evaluate.generate import greedy
from lensmith.evaluate.metrics import by_group, commonest_answers, exact_match
from lensmith.evaluate.options import Generate
from lensmith.model.root import Root
from lensmith.objective.by_source import BySource, Pairs, of_figures

Progress = Callable[[int, int], None]
Complete = Callable[[Sequence[PackedRow], Pipeline], None]


@torch.no_grad()
def mean_loss(
    root: Root,
    pipeline: Pipeline,
    dropped: dict[str, str],
    progress: Progress | None = None,
    complete: Complete | None = None,
) -> dict[str, float]:
    """`loss`: each of the objective's terms over the whole held-out set, divided once, and their sum; the objective's
    other figures; `loss/NAME` of each source where there are several, unweighted. Samples whose pictures do not decode
    go into `dropped` (origin -> reason). `complete` is given the rows of a step before they are computed."""
    names: tuple[str, ...] = root.objective.figures
    totals = {name: np.zeros(2) for name in root.objective.units}
    done, sources = 0, BySource(len(names))
    for step in pipeline.steps():
        rows = [row if root.ready(row) else pipeline.reread(row.members) for row in step.rows]
        if complete is not None:
            complete(rows, pipeline)
        for row in rows:
            terms = root(row)
            for name in totals:
                totals[name] += [float(x) for x in terms[name]]
            sources.add(terms)
        for number, reason, detail in step.dropped:
            dropped[pipeline.index.origin(number)] = f"{reason} {detail}"
        done += step.num_samples + len(step.dropped)
        if progress is not None:
            progress(done, pipeline.plan.num_samples)
    parts = [total / count if count else math.nan for total, count in totals.values()]
    figures = dict(zip(names, of_figures(sources.sums(), len(names)), strict=True))
    found = {"loss": float(sum(parts))} | {
        name: mean for name in names[1:] if (mean := _mean(figures[name])) is not None
    }
    each = dict(zip(pipeline.index.sources, figures["loss"], strict=False)) if len(pipeline.index.sources) > 1 else {}
    return found | {f"loss/{name}": loss / n for name, (loss, n) in each.items() if n}


def _mean(pairs: Pairs) -> float | None:
    """Over all sources; None where nothing was counted."""
    count = sum(n for _, n in pairs)
    return sum(s for s, _ in pairs) / count if count else None


@dataclass(frozen=True)
class Answered:
    """One question with its reference and the model's answer."""

    question: Question
    answer: str


@dataclass
class Answers:
    """Generates answers for the questions of `index`; `rule` says how."""

    root: Root
    family: Any
    index: Index
    rule: Generate

    def __post_init__(self) -> None:
        self.loader = self.index.spec.build()
        self.dropped: dict[str, str] = {}
        """Origin -> why a held-out sample could not be asked."""
        self._stop = {self.loader.tokenizer.control(self.family.turn_end)}
        self._stop |= {i for n, i in self.loader.tokenizer.added.items() if n == self.family.end_of_document}

    def samples(self, limit: int | None) -> list[int]:
        """At most `limit` samples: always the same ones, drawn over the whole set."""
        n = len(self.index.trainable)
        most = min(x for x in (n, limit, self.rule.max_samples) if x is not None)
        return sorted(Plan(n, seed=0).order(0)[:most].tolist())

    def run(self, samples: Sequence[int], *, swapped: bool = False, progress: Progress | None = None) -> list[Answered]:
        """Answers in sample order. `swapped`: each sample is shown the pictures of another one."""
        pictures = _swaps(self.index, samples) if swapped else {}
        out: list[Answered] = []
        batch: list[Question] = []
        longest = 0
        for n, number in enumerate(samples):
            at = self.index.ref(number)
            try:
                questions = load_questions(self.loader, at.file, at.row, self._pictures_of(pictures.get(number)))
            except Drop as drop:
                self.dropped[self.index.origin(number)] = str(drop)
                continue
            for question in questions:
                longest = max(longest, question.prompt.num_tokens)
                if batch and longest * (len(batch) + 1) > self.rule.batch_tokens:
                    out += self._answer(batch)
                    batch, longest = [], question.prompt.num_tokens
                batch.append(question)
            if progress is not None:
                progress(n + 1, len(samples))
        return out + (self._answer(batch) if batch else [])

    def _pictures_of(self, number: int | None) -> tuple[int, list[Image]] | None:
        if number is None:
            return None
        at = self.index.ref(number)
        return at.file, self.loader.sample(at.file, at.row).images()

    def _answer(self, batch: list[Question]) -> list[Answered]:
        try:
            row = _picture_row(self.loader, batch, self.root)
        except Drop:
            batch = [q for q in batch if self._decodes(q)]
            if not batch:
                return []
            row = _picture_row(self.loader, batch, self.root)
        training = self.root.model.training
        self.root.model.eval()
        with torch.no_grad(), self.root.autocast():
            features = self.root.features(row)
            ids = greedy(
                self.root.model, self.family, [q.prompt for q in batch], features,
                stop=self._stop, max_new_tokens=self.rule.max_new_tokens, device=self.root.device,
            )  # fmt: skip
        self.root.model.train(training)
        return [
            Answered(q, self.loader.tokenizer.decode(i, control=False).strip()) for q, i in zip(batch, ids, strict=True)
        ]

    def _decodes(self, question: Question) -> bool:
        try:
            picture_row(self.loader, [question], {})
        except Drop as drop:
            self.dropped[question.origin] = str(drop)
            return False
        return True

    def scores(self, answered: Sequence[Answered]) -> dict[str, float]:
        references = [a.question.reference for a in answered]
        return by_group(exact_match([a.answer for a in answered], references), references, self.rule.groups)

    def baseline(self, train: Index, answered: Sequence[Answered]) -> dict[str, float]:
        """Scores of the commonest training answer to each question's text ("" for a question never seen)."""
        table = commonest_answers(_pairs(train))
        references = [a.question.reference for a in answered]
        guesses = [table.get(a.question.text, "") for a in answered]
        return by_group(exact_match(guesses, references), references, self.rule.groups)


def _pairs(index: Index) -> Iterable[tuple[str, str]]:
    loader = index.spec.build()
    for number in range(len(index.trainable)):
        at = index.ref(number)
        yield from question_pairs(loader.sample(at.file, at.row))


def question_pairs(sample: Sample) -> list[tuple[str, str]]:
    """(last user text, answer) of each conversation whose answer is a right one."""
    found = [split_question(c) for c in sample.good() if not isinstance(c, Document)]
    return [(f[1], f[2]) for f in found if f is not None]


def _picture_row(loader: Loader, batch: Sequence[Question], root: Root) -> PackedRow:
    """The distinct pictures of a batch of questions, as a row without tokens."""
    handles = {loader.handle(q.file, image, q.origin) for q in batch for image in q.images}
    row = picture_row(loader, batch, root.cache.known(handles) if root.cache is not None else {})
    return row if root.ready(row) else picture_row(loader, batch, {})


def _swaps(index: Index, samples: Sequence[int]) -> dict[int, int]:
    """Sample -> another one with as many pictures, but others; a fixed rotation."""
    images = index.column("images")
    looks = index.column("look")
    by_count: dict[int, list[int]] = {}
    for s in samples:
        if images[s]:
            by_count.setdefault(int(images[s]), []).append(s)
    out: dict[int, int] = {}
    for group in by_count.values():
        for i, s in enumerate(group):
            half = len(group) // 2 or 1
            others = (group[(i + half + k) % len(group)] for k in range(len(group)))
            other = next((o for o in others if looks[o] != looks[s]), None)
            if other is not None:
                out[s] = other
    return out
