"""`lensmith check`: everything that can go wrong before weights are loaded, and what the run amounts to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.core.errors import DataError
from lensmith.data.pipeline import Pipeline
from lensmith.data.plan import Plan
from lensmith.data.windows import StreamSpec, WindowMaker, window_plan
from lensmith.recipe.prepare import Prepared, check_counts, prepare, require_steps
from lensmith.recipe.run import Located
from lensmith.report.tables import MISSING, Table, size
from lensmith.report.terminal import Terminal

if TYPE_CHECKING:
    from lensmith.recipe.memory import Prediction

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
    _show_memory(prepared, plan, terminal)


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


# -- precision and memory ---------------------------------------------------------------------------------------


def _show_memory(prepared: Prepared, plan: Plan, terminal: Terminal) -> None:
    from lensmith.model.memory import NEEDS_VALUES
    from lensmith.recipe.memory import predict, room

    try:
        with terminal.progress("Predicting memory", None, counted=False):
            found = predict(prepared, prepared.train, plan)
    except NEEDS_VALUES as error:
        terminal.show("precision", precision_table(prepared))
        terminal.warning(f"memory is not predicted: the model cannot run without values ({error})")
        return
    terminal.show("precision", precision_table(prepared))
    if found is None:
        terminal.warning("memory is not predicted: no sample of the largest row can be read")
        return
    terminal.show("memory", memory_table(found))
    peak, most = found.peak, room(found.device)
    kind = "GPU" if found.device.type == "cuda" else "machine"
    terminal.event(
        "peak",
        f"predicted peak {size(peak.total)} of the {kind}'s {size(most)}, in {peak.name.lower()} of a row of "
        f"{found.row.num_tokens:,} tokens",
        bytes=peak.total, room_bytes=most, phase=peak.name, tokens=found.row.num_tokens,
        by_kind={**peak.kinds, "features": peak.features, "allocator": peak.allocator},
    )  # fmt: skip
    if peak.total > most:
        terminal.warning(
            f"the predicted peak {size(peak.total)} is more than the {kind} has ({size(most)}); {_what_helps(prepared)}"
        )


def _what_helps(prepared: Prepared) -> str:
    run = prepared.located.run
    helps = [] if run.train.recompute else ["train.recompute: true"]
    helps.append(f"batch.device_tokens below {run.device_tokens:,}")
    if run.tune.kind != "lora":
        helps += ["precision.preset: bf16-params-compensated", "tune: {kind: lora}"]
    return f"what helps: {', '.join(helps)}"


def precision_table(prepared: Prepared) -> Table:
    """One row per part: types on disk, in memory, in compute, of gradients and optimizer, and as saved. With
    adapters, only they and what trains beside them are saved."""
    from lensmith.model.load import tensor_dtypes
    from lensmith.recipe.memory import kept_parts

    plan, parts = kept_parts(prepared)
    part_of, on_disk = prepared.family.part_of, tensor_dtypes(prepared.model_folder)
    single, lora = len(set(on_disk.values())) == 1, prepared.located.run.tune.kind == "lora"
    rows: list[tuple[str, ...]] = []
    for part, kept in parts.items():
        own, trained = plan.of(part), [k for k in kept if k.trained]
        files = [] if part == "adapter" else [d for name, d in on_disk.items() if single or part_of(name) == part]
        update = "" if own.update == "plain" else f", {own.update}"
        moments = "8 bits" if prepared.located.run.optimizer.kind == "adamw_8bit" else _types([own.optimizer])
        saved = [plan.of("adapter" if lora else part).saved] if trained or not lora else []
        rows.append(
            (
                part, f"{sum(k.count for k in kept):,}", _types(files),
                _types(k.type for k in kept if not k.trained), _types(k.type for k in trained),
                _types([own.compute]), _types([own.gradients] if trained else []),
                moments + update if trained else MISSING, _types(saved),
                size(sum(k.num_bytes for k in kept)),
            )
        )  # fmt: skip
    columns = ("Part", "Parameters", "On disk", "Frozen", "Trained", "Compute", "Gradients", "Optimizer", "Saved",
               "In memory")  # fmt: skip
    return Table(f"Precision ({plan.preset})", columns, rows, frozenset({"Parameters", "In memory"}))


def _types(dtypes: Iterable[Any]) -> str:
    short = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float64": "fp64"}
    return " + ".join(sorted({short.get(str(d), str(d)) for d in dtypes})) or MISSING


def memory_table(found: Prediction) -> Table:
    """One column per phase: what there is at the moment that needs most."""
    from lensmith.model.memory import KINDS

    phases = found.phases
    rows = [(kind, [phase.kinds.get(kind, 0) for phase in phases]) for kind in KINDS]
    rows += [("vision cache", [phase.features for phase in phases]), ("allocator", [p.allocator for p in phases])]
    cells = [(name, *(size(b) if b else MISSING for b in counts)) for name, counts in rows if any(counts)]
    names = tuple(phase.name for phase in phases)
    total = ("Peak", *(size(phase.total) for phase in phases))
    return Table("Memory", ("Kind", *names), cells, frozenset(names), total)
