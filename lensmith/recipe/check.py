"""`lensmith check`: everything that can go wrong before weights are loaded, and what the run amounts to."""

from __future__ import annotations

import numpy as np

from lensmith.core.errors import DataError
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.recipe.run import Located
from lensmith.report.tables import Table
from lensmith.report.terminal import Terminal

SHOWN_DROPS = 50


def check(located: Located, terminal: Terminal) -> Prepared:
    """Raises `UserError` for what would stop the run."""
    for sink in located.run.log.sinks:
        sink.check()
    prepared = prepare(located, terminal)
    train = prepared.train
    tokens, supervised, media = (train.column(n) for n in ("tokens", "supervised", "media_tokens"))
    rows = [
        (
            source,
            *(
                f"{int(v):,}"
                for v in (mask.sum(), *(n[mask].sum() for n in (tokens, supervised, media)), tokens[mask].max())
            ),
        )
        for source, mask in _by_source(prepared)
    ]
    numbers = ("Samples", "Tokens", "Trained tokens", "Image tokens", "Longest")
    terminal.show("data", Table("Data that trains", ("Source", *numbers), rows, right=frozenset(numbers)))
    dropped = prepared.read.dropped
    if dropped.num_rows:
        lines = [(r["origin"], r["reason"], r["detail"] or "") for r in dropped.slice(0, SHOWN_DROPS).to_pylist()]
        more = f" (first {SHOWN_DROPS} of {dropped.num_rows:,})" if dropped.num_rows > SHOWN_DROPS else ""
        terminal.show("dropped", Table(f"Dropped{more}", ("Origin", "Reason", "Detail"), lines))
    noted = [(note, f"{count:,}", first) for note, (count, first) in prepared.read.notes().items()]
    if noted:
        title = "Accepted with a note (docs/data.md)"
        terminal.show("notes", Table(title, ("Note", "Samples", "First"), noted, right=frozenset(["Samples"])))
    steps = prepared.plan.num_steps()
    if not steps:
        raise DataError("NO_STEPS", f"{len(train.trainable)} samples do not fill one step, and batch.partial is drop",
                        remedy="lower batch.samples, or set batch.partial: carry")  # fmt: skip
    first = next(prepared.plan.steps())
    packed = _rows_of_first_steps(prepared)
    terminal.event(
        "plan",
        f"{steps:,} steps of {len(first.members)} samples; about {packed:.1f} packed rows of at most "
        f"{prepared.limits.device_tokens:,} tokens a step",
        steps=steps, rows_per_step=packed,
    )  # fmt: skip
    return prepared


def _by_source(prepared: Prepared) -> list[tuple[str, np.ndarray]]:
    files = prepared.train.column("file")
    names = [f.source for f in prepared.train.spec.files]
    found = [(name, np.isin(files, [i for i, n in enumerate(names) if n == name])) for name in dict.fromkeys(names)]
    return [(name, mask) for name, mask in found if mask.any()]


def _rows_of_first_steps(prepared: Prepared, count: int = 10) -> float:
    from lensmith.data.pipeline import Pipeline

    pipeline = Pipeline(prepared.train, prepared.plan, prepared.limits)
    found = [len(pipeline.rows_of(step)) for step, _ in zip(prepared.plan.steps(), range(count), strict=False)]
    return float(np.mean(found))
