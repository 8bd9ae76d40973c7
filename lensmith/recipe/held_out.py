"""Held-out figures of a run, before, during and after training, and the samples its report shows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lensmith.checkpoint.store import write_atomically
from lensmith.core.errors import Drop
from lensmith.data.pipeline import Pipeline
from lensmith.data.plan import Plan
from lensmith.evaluate.held_out import Answered, Answers, Complete, mean_loss
from lensmith.recipe.build import Built
from lensmith.recipe.prepare import Prepared
from lensmith.report.terminal import Terminal

When = Literal["before", "during", "after"]


def held_plan(num_samples: int, most: int | None = None) -> Plan:
    """The steps in which the held-out loss is computed: one pass, or the beginning of it."""
    share = 1.0 if most is None else min(1.0, most / num_samples)
    return Plan(num_samples, seed=0, samples=min(num_samples, 64), partial="carry", epochs=share)


class HeldOut:
    def __init__(self, prepared: Prepared, built: Built, output: Path, terminal: Terminal, *, is_main: bool = True,
                 complete: Complete | None = None):  # fmt: skip
        """`is_main`: whether this rank writes. `complete`: tells the rows of a step what the objective asks."""
        self.is_main, self.complete = is_main, complete
        assert prepared.held is not None
        self.prepared, self.built, self.output, self.terminal = prepared, built, output, terminal
        self.held = prepared.held
        self.rule = prepared.located.run.evaluate
        self.dropped: dict[str, str] = {}
        self._unread: dict[str, str] = {}
        generate = self.rule.generate
        self.answers = Answers(built.root, prepared.family, self.held, generate) if generate is not None else None

    def measure(self, when: When) -> dict[str, Any]:
        """{"when", "scores": loss and exact match, "extra": baseline and swapped (after only)}. With several ranks each
        does all of it: they stay in step, and come to the same figures."""
        with self.built.whole_rest():
            return self._measured(when)

    def _measured(self, when: When) -> dict[str, Any]:
        scores: dict[str, float] = {}
        extra: dict[str, Any] = {}
        root = self.built.root
        training = root.training
        root.eval()
        if self.rule.loss:
            scores |= self._loss(when)
        if self.answers is not None:
            samples = self.answers.samples(self.answers.rule.during if when == "during" else None)
            answered = self._run(samples, f"Answering {len(samples)} held-out samples, {when}")
            scores |= self.answers.scores(answered)
            if when != "during":
                self._show(answered, when)
            if when == "after":
                extra = self._extra(samples, answered)
        root.train(training)
        self._say_dropped()
        extra["dropped"] = len(self.dropped)
        return {"when": when, "scores": scores, "extra": extra}

    @property
    def always_all(self) -> bool:
        """Whether evaluations while training use the whole held-out set too, so that all figures are comparable."""
        most = self.answers.rule.during if self.answers is not None else None
        return most is None or most >= len(self.held.trainable)

    def _say_dropped(self) -> None:
        """Held-out samples whose pictures do not decode, each named once."""
        found = dict(self.answers.dropped) if self.answers is not None else {}
        for origin, reason in (self._unread | found).items():
            if origin not in self.dropped:
                self.dropped[origin] = reason
                self.terminal.warning(f"held-out sample {origin} is left out: {reason}")

    def _loss(self, when: When) -> dict[str, float]:
        n = len(self.held.trainable)
        most = self.answers.rule.during if self.answers is not None and when == "during" else None
        plan = held_plan(n, most or n)
        pipeline = Pipeline(self.held, plan, self.prepared.limits)
        with self.terminal.progress(f"Held-out loss, {when}", math.ceil(n * (plan.epochs or 1))) as bar:
            return mean_loss(
                self.built.root, pipeline, self._unread, lambda done, _: bar.advance(done - bar.done), self.complete
            )

    def _run(self, samples: Sequence[int], title: str, *, swapped: bool = False) -> list[Answered]:
        assert self.answers is not None
        with self.terminal.progress(title, len(samples)) as bar:
            return self.answers.run(samples, swapped=swapped, progress=lambda done, _: bar.advance(done - bar.done))

    def _extra(self, samples: Sequence[int], answered: list[Answered]) -> dict[str, Any]:
        assert self.answers is not None
        extra: dict[str, Any] = {"n": len(answered)}
        if self.answers.rule.baseline and self.prepared.stream is None:  # it needs all answers of the training data
            extra["baseline"] = self.answers.baseline(self.prepared.train, answered)
        if self.answers.rule.swapped:
            other = self._run(samples, "Answering with swapped pictures", swapped=True)
            extra["swapped"] = self.answers.scores(other)
        return extra

    def _show(self, answered: list[Answered], when: When) -> None:
        """samples.json: a few questions with picture and the answers before and after."""
        if not self.is_main:
            return
        assert self.answers is not None
        path = self.output / "samples.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        known = {(r["origin"], r["question"]): r for r in rows}
        for a in _spread(answered, self.answers.rule.show):
            q = a.question
            row = known.setdefault((q.origin, q.text), {
                "origin": q.origin, "question": q.text, "answer": q.reference, "before": None, "after": None,
                "group": _group(q.reference, self.answers.rule.groups), "image": self._picture(a),
            })  # fmt: skip
            row[when] = a.answer
        write_atomically(path, json.dumps(list(known.values()), ensure_ascii=False, indent=1).encode())

    def _picture(self, a: Answered) -> str | None:
        """The first picture of a question, re-encoded as PNG in the run folder."""
        if not a.question.images:
            return None
        from lensmith.data.load import content_key
        from lensmith.data.media_open import open_rgb

        assert self.answers is not None
        try:
            data = self.answers.loader.bytes_of(a.question.file, a.question.images[0], a.question.origin)
        except Drop:  # gone since it was asked about
            return None
        folder = self.output / "pictures"
        folder.mkdir(exist_ok=True)
        name = f"{content_key(data)[:16]}.png"
        if not (folder / name).is_file():
            picture, _ = open_rgb(data, self.held.spec.limits)
            picture.thumbnail((512, 512))
            picture.save(folder / name)
        return f"pictures/{name}"


def _spread(answered: Sequence[Answered], count: int) -> list[Answered]:
    """`count` questions spread evenly over the held-out set, each of another sample where possible."""
    if not answered or not count:
        return []
    stride = max(1, len(answered) // count)
    return list(answered[::stride][:count])


def _group(reference: str, groups: dict[str, str]) -> str | None:
    return next((name for name, pattern in groups.items() if re.fullmatch(pattern, reference.strip())), None)
