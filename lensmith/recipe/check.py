"""`lensmith check`: everything that can go wrong before weights are loaded, and what the run amounts to."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from lensmith.core.errors import DataError
from lensmith.data.pipeline import Pipeline
from lensmith.data.plan import Plan
from lensmith.data.windows import StreamSpec, WindowMaker, window_plan
from lensmith.recipe.prepare import Prepared, check_counts, prepare, require_steps
from lensmith.recipe.run import Located
from lensmith.report.tables import Table
from lensmith.report.terminal import Terminal

SHOWN_DROPS = 50


def check(located: Located, terminal: Terminal) -> list[Prepared]:
    """What each stage prepares. Raises `UserError` for what would stop the run, in any of them."""
    from lensmith.recipe.build import rehearse  # loads torch: a wrong run file is told before

    found: list[Prepared] = []
    for sink in located.run.log.sinks:
        sink.check()
    for number, stage in enumerate(located.stages):
        if stage.stage_name:
            text = f"stage {number + 1} of {len(located.stages)}: {stage.stage_name}"
            terminal.event("stage", text, stage=stage.stage_name)
        with stage.saying_which():
            found.append(prepare(stage, terminal))
            rehearse(found[-1])
            _check_stage(found[-1], terminal)
    return found


def _check_stage(prepared: Prepared, terminal: Terminal) -> None:
    if prepared.stream is not None:
        with tempfile.TemporaryDirectory(prefix="lensmith-check-") as folder:
            _check_stream(prepared, replace(prepared.stream, folder=Path(folder)), terminal)
        return
    _show(prepared, terminal)
    steps = prepared.plan.num_steps()
    require_steps(prepared, steps)
    _show_plan(prepared, prepared.plan, f"{steps:,} steps", steps, terminal)


def _check_stream(prepared: Prepared, spec: StreamSpec, terminal: Terminal) -> None:
    """The first window stands for the whole."""
    window = next(WindowMaker(spec).windows(0, None), None)
    if window is None:
        raise DataError("NO_ROWS", "the stream holds no rows", remedy="look at data.train")
    index, run = window.index(spec), prepared.located.run
    counts, whole = index.counts(), "the whole stream" if window.ended else "the first window of the stream"
    text = f"{whole}: read {counts['read']:,} = train {counts['train']:,} + dropped {counts['dropped']:,}"
    terminal.event("stream", text, ended=window.ended, **counts)
    for note in check_counts(run.data, index, index):
        terminal.warning(note)
    plan, steps = window_plan(spec, 0, index), run.train.max_steps or 0
    found = plan.num_steps()
    if window.ended and found < steps:
        terminal.warning(f"the stream ends after step {found} of {steps}")
    first = replace(prepared, read=index, train=index)
    _show(first, terminal)
    _show_plan(first, plan, f"{steps:,} steps at most", steps, terminal)


def _show(prepared: Prepared, terminal: Terminal) -> None:
    _show_data(prepared, terminal)
    _show_dropped(prepared, terminal)
    _show_notes(prepared, terminal)


def _show_plan(prepared: Prepared, plan: Plan, text: str, steps: int, terminal: Terminal) -> None:
    first = next(plan.steps())
    packed = _rows_of_first_steps(prepared, plan)
    terminal.event(
        "plan",
        f"{text} of {len(first.members)} samples; about {packed:.1f} packed rows of at most "
        f"{prepared.limits.device_tokens:,} tokens a step",
        steps=steps, rows_per_step=packed,
    )  # fmt: skip


def _show_data(prepared: Prepared, terminal: Terminal) -> None:
    train = prepared.train
    sums = {"Tokens": "tokens", "Trained tokens": "supervised", "Image tokens": "media_tokens"}
    rows: list[tuple[str, ...]] = []
    for source, mask in _by_source(prepared):
        totals = [train.column(name)[mask].sum() for name in sums.values()]
        longest = train.column("tokens")[mask].max()
        rows.append((source, *(f"{int(v):,}" for v in (mask.sum(), *totals, longest))))
    numbers = ("Samples", *sums, "Longest")
    terminal.show("data", Table("Data that trains", ("Source", *numbers), rows, right=frozenset(numbers)))


def _show_dropped(prepared: Prepared, terminal: Terminal) -> None:
    dropped = prepared.read.dropped.select(["origin", "reason", "detail"])
    if not dropped.num_rows:
        return
    rows = dropped.slice(0, SHOWN_DROPS).to_pylist()
    more = f" (first {SHOWN_DROPS} of {dropped.num_rows:,})" if dropped.num_rows > SHOWN_DROPS else ""
    cells = [tuple(value or "" for value in row.values()) for row in rows]
    table = Table(f"Dropped{more}", ("Origin", "Reason", "Detail"), cells)
    terminal.show("dropped", table)


def _show_notes(prepared: Prepared, terminal: Terminal) -> None:
    notes = prepared.read.notes()
    if not notes:
        return
    rows = [(note, f"{count:,}", first) for note, (count, first) in notes.items()]
    title = "Accepted with a note (docs/data.md)"
    terminal.show("notes", Table(title, ("Note", "Samples", "First"), rows, right=frozenset(["Samples"])))


def _by_source(prepared: Prepared) -> list[tuple[str, np.ndarray]]:
    sources = prepared.train.column("source")
    found = [(name, sources == number) for number, name in enumerate(prepared.train.sources)]
    return [(name, mask) for name, mask in found if mask.any()]


def _rows_of_first_steps(prepared: Prepared, plan: Plan, count: int = 10) -> float:
    pipeline = Pipeline(prepared.train, plan, prepared.limits)
    found = [len(pipeline.rows_of(step)) for step, _ in zip(plan.steps(), range(count), strict=False)]
    return float(np.mean(found))
