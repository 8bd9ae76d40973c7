"""`lensmith plan`: what a run would take on other numbers of ranks and other devices. No weights are loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.index import Index
from lensmith.data.plan import Plan
from lensmith.data.windows import WindowMaker, window_plan
from lensmith.parallel.cost import Exchange, Layout, exchanges, handed, layouts
from lensmith.parallel.devices import CPU, Device, device
from lensmith.recipe.methods import check_predictable
from lensmith.recipe.prepare import Prepared, prepare, require_steps
from lensmith.recipe.run import Located, load_run
from lensmith.report.tables import MISSING, Table, percent, size
from lensmith.report.terminal import Terminal

if TYPE_CHECKING:
    from lensmith.model.roofline import Rates
    from lensmith.recipe.memory import Prediction
    from lensmith.recipe.workload import Placed, Workload

Loads = Callable[[str | Path, Sequence[str]], Located]
Limit = Literal["compute", "network", "data", "memory"]
CPU_NETWORK = 1e9
"""Bytes per second between processes of a machine through gloo, where nothing else is said."""
NEARLY_CHEAPEST = 1.1
"""The recommended row is the fastest of those that cost at most so many times the least."""
DATA_WORKERS = 4


@dataclass(frozen=True)
class Ask:
    """What `lensmith plan` is asked. `network` in bytes per second; `price` of one device for an hour."""

    ranks: tuple[int, ...]
    device: str
    price: float | None = None
    network: float | None = None
    mfu: float | None = None
    samples_per_rank: int | None = None


@dataclass(frozen=True)
class Row:
    """One number of ranks with one engine. Seconds are of a step; `network` what is not hidden behind computing."""

    ranks: int
    engine: str
    memory: dict[str, int]
    """Bytes by kind at the moment of the step or the save, `phase`, that needs most."""
    memory_bytes: int
    phase: str
    loading_bytes: int
    room_bytes: int
    sent: dict[str, int]
    wire_bytes: int
    micro_batches: int
    """Of each rank; `of_steps`: in each of the steps that were looked at."""
    of_steps: tuple[int, ...]
    balance: float
    compute_seconds: float
    update_seconds: float
    network_seconds: float
    data_seconds: float
    step_seconds: float
    samples_per_second: float
    mfu: float
    steps: int
    days: float
    dollars: float | None
    limit: Limit

    @property
    def fits(self) -> bool:
        return max(self.memory_bytes, self.loading_bytes) <= self.room_bytes


def numbers_of(text: str) -> tuple[int, ...]:
    """`8,64` -> (8, 64). Raises `ConfigError` RANKS."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError("RANKS", f"--ranks {text!r} names no numbers of ranks", remedy="for example --ranks 8,64,512")
    return tuple(sorted({int(part) for part in parts}))


def plan(
    file: str | Path, overrides: Sequence[str], terminal: Terminal, ask: Ask, load: Loads = load_run
) -> list[list[Row]]:
    """The rows of each stage. `load`: reads the run file. Raises `ConfigError` DEVICE, and what `check` raises."""
    target = None if ask.device == CPU else device(ask.device)
    found: list[list[Row]] = []
    for stage in _for_device(partial(load, file), overrides, target).stages:
        if stage.stage_name:
            terminal.event("stage", f"stage {stage.stage_name}", stage=stage.stage_name)
        with stage.saying_which():
            found.append(_plan_stage(stage, target, terminal, ask))
    return found


def _for_device(load: Callable[[Sequence[str]], Located], overrides: Sequence[str], target: Device | None) -> Located:
    """The run as it would be there: `auto` precision is that of the device, and tensors without values are made here,
    where there may be no such device."""
    more = ["train.device=cpu"]
    if target is not None and load(overrides).run.precision.preset == "auto":
        more.append("precision.preset=bf16")
    return load([*overrides, *more])


def _plan_stage(stage: Located, target: Device | None, terminal: Terminal, ask: Ask) -> list[Row]:
    prepared = prepare(stage, terminal)
    if prepared.stream is None:
        steps = prepared.plan.num_steps()
        require_steps(prepared, steps)
        return _rows(prepared, prepared.train, prepared.plan, steps, target, terminal, ask)
    with tempfile.TemporaryDirectory(prefix="lensmith-plan-") as folder:
        spec = replace(prepared.stream, folder=Path(folder))
        window = next(WindowMaker(spec).windows(0, None), None)
        if window is None:
            raise DataError("NO_ROWS", "the stream holds no rows", remedy="look at data.train")
        index = window.index(spec)  # the first window stands for the whole
        first = replace(prepared, read=index, train=index)
        steps = stage.run.train.max_steps or 0
        return _rows(first, index, window_plan(spec, 0, index), steps, target, terminal, ask)


def _rows(
    prepared: Prepared, index: Index, plan: Plan, steps: int, target: Device | None, terminal: Terminal, ask: Ask
) -> list[Row]:
    from lensmith.recipe.memory import predict
    from lensmith.recipe.workload import Workload

    check_predictable(prepared.located.run)
    with terminal.progress("Counting the work of a step", None, counted=False):
        found = predict(prepared, index, plan)
        if found is None:
            raise DataError("NO_SAMPLES", "no sample of the largest row can be read", remedy="run lensmith check")
        work = Workload(prepared, index, plan, steps, found)
        planner = Planner(work, target, ask)
    rows = [row for ranks in ask.ranks for row in planner.rows(ranks)]
    best = recommended(rows)
    terminal.show("memory_per_rank", memory_table(rows))
    terminal.show("scaling", step_table(rows, best))
    for row in rows if terminal.mode == "json" else ():
        terminal.event("row", recommended=row is best, **asdict(row))
    terminal.event("assumed", planner.assumed(), formula_over_counted=work.formula_over_counted)
    if best is None:
        terminal.warning("no row fits the memory of the device; what helps: docs/memory.md")
    return rows


class Planner:
    """Rows of a workload on a device; None: on processes of this machine."""

    def __init__(self, work: Workload, target: Device | None, ask: Ask):
        self.work, self.ask, self.host = work, ask, target is None
        self.rates: Rates = work.rates(target)
        found = _this_machine(self.rates, work) if target is None else target
        network = ask.network or found.network
        self.device = replace(found, network=network, link=network if target is None else found.link)
        compute = str(work.found.built.precision.compute).removeprefix("torch.")
        self.peak = self.device.peak[compute]  # type: ignore[index]
        self.update_seconds = self.rates.seconds(work.counted.update)
        asked = work.prepared.located.run.data.workers
        self.workers = DATA_WORKERS if asked is None else asked

    def rows(self, ranks: int) -> list[Row]:
        """One for each engine that so many ranks can have."""
        from lensmith.recipe.workload import SecondsOf

        work, plan, steps = self.work, self.work.plan, self.work.steps
        if self.ask.samples_per_rank is not None:
            plan = replace(plan, samples=ranks * self.ask.samples_per_rank, tokens=None)
            steps = plan.num_steps()
            if not steps:
                raise DataError("NO_STEPS", f"{plan.num_samples:,} samples do not fill a step of {plan.samples:,}")
        memory = self._predicted(plan, ranks)
        hit = work.hits(plan, ranks)
        counted = work.counted_of(plan, ranks)
        rates = work.rates(None, counted) if self.host and counted is not work.counted else self.rates
        least = sum(counted.row.values()) * rates.launch
        seconds = SecondsOf(work.formula, work.rate(counted, rates, self.ask.mfu, self.peak), hit, least)
        placed = work.steps_of(plan, ranks, seconds)
        useful = work.useful(plan, hit)
        return [self._row(layout, memory, placed, steps, useful) for layout in layouts(ranks, self.device.per_node)]

    def _predicted(self, plan: Plan, ranks: int) -> Prediction:
        """Of the largest row that one of so many ranks gets."""
        from lensmith.recipe.memory import predict

        work = self.work
        same = ranks == 1 and plan is work.plan
        return (None if same else predict(work.prepared, work.index, plan, ranks)) or work.found

    def _row(self, layout: Layout, found: Prediction, placed: Sequence[Placed], steps: int, useful: float) -> Row:
        from lensmith.recipe.rank_memory import loading_of, peak_of

        work, price = self.work, self.ask.price
        memory = peak_of(found, layout, work.tensors, host=self.host)
        room = self.device.memory_bytes // (layout.ranks if self.host else 1)
        micro = round(_mean([step.micro_batches for step in placed]))
        compute = _mean([float(step.seconds.max()) for step in placed])
        update = self.update_seconds / (layout.shard if layout.spreads_state else 1)
        sent = exchanges(layout, work.tensors, micro, work.flags)
        network = sum(self._exposed(layout, exchange, compute, placed) for exchange in sent)
        reading = work.read_seconds * _mean([step.most_samples for step in placed]) / max(1, self.workers)
        rest = compute + update + network
        step = max(rest, reading) if self.workers else rest + reading
        days = steps * step / 86_400
        parts: dict[Limit, float] = {"compute": compute + update, "network": network, "data": step - rest}
        fits = max(memory.total, loading_of(found)) <= room
        limit: Limit = max(parts, key=lambda name: parts[name]) if fits else "memory"
        return Row(
            ranks=layout.ranks, engine=layout.engine, memory=memory.kinds, memory_bytes=memory.total,
            phase=memory.phase, loading_bytes=loading_of(found), room_bytes=room, sent=handed(sent),
            wire_bytes=round(sum(e.wire for e in sent)),
            micro_batches=micro, of_steps=tuple(step.micro_batches for step in placed),
            balance=_mean([step.balance for step in placed]), compute_seconds=compute, update_seconds=update,
            network_seconds=network, data_seconds=reading, step_seconds=step,
            samples_per_second=_mean([step.samples for step in placed]) / step,
            mfu=useful / (step * layout.ranks * self.peak), steps=steps, days=days,
            dollars=None if price is None else days * 24 * layout.ranks * price, limit=limit,
        )  # fmt: skip

    def _exposed(self, layout: Layout, exchange: Exchange, compute: float, placed: Sequence[Placed]) -> float:
        """Seconds of an exchange that computing does not hide. Sums of gradients go out during the last backward pass,
        two thirds of the last row; FSDP2 fetches the next unit while one computes, but for the first; DeepSpeed's
        `overlap_comm` is off."""
        seconds = exchange.seconds(self.device)
        if not self.device.overlaps or exchange.kind == "flags":
            return seconds
        if layout.engine == "local":
            return max(0.0, seconds - 2 / 3 * _mean([step.last_row for step in placed]))
        if layout.engine in ("fsdp2", "hsdp"):
            hidden = compute * (2 / 3 if exchange.kind == "all_gather" else 1 / 3)
            return max(seconds / max(1, exchange.times), seconds - hidden)
        return seconds

    def assumed(self) -> str:
        """What the figures rest on."""
        d, by = self.device, "measured here" if self.host else "of its data sheet (docs/scaling.md)"
        of_rows = self.work.rate(self.work.counted, self.rates, self.ask.mfu, self.peak)
        rate = f"rows compute at {of_rows / 1e12:,.2f} TFLOP/s"
        return (
            f"{d.name}: {self.peak / 1e12:,.2f} TFLOP/s {by}; {rate}; {d.link / 1e9:,.0f} GB/s within a node of "
            f"{d.per_node}, {d.network / 1e9:,.1f} GB/s between nodes, of which {percent(d.link_share)} are reached; "
            f"{self.work.read_seconds * 1e3:,.1f} ms to read a sample on a processor of this machine, "
            f"{self.workers} data workers a rank"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _this_machine(rates: Rates, work: Workload) -> Device:
    """Its rates are measured, so all of them is what is reached; its processes share its memory."""
    from lensmith.recipe.memory import room

    flops = {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.flops.items()}
    peak: Any = dict.fromkeys(("float32", "bfloat16", "float16"), max(flops.values())) | flops
    return Device("this machine", peak, room(work.found.device), rates.bytes, CPU_NETWORK, CPU_NETWORK,
                  per_node=1 << 20, peak_share=1.0, bandwidth_share=1.0, link_share=1.0, overlaps=False)  # fmt: skip


# -- what is shown ----------------------------------------------------------------------------------------------


def recommended(rows: Sequence[Row]) -> Row | None:
    """The fastest of those that fit and cost nearly as little as the cheapest."""
    fit = [row for row in rows if row.fits]
    if not fit:
        return None
    least = min(row.days * row.ranks for row in fit)
    return min((row for row in fit if row.days * row.ranks <= NEARLY_CHEAPEST * least), key=lambda row: row.days)


SHOWN: dict[str, tuple[str, ...]] = {
    "Weights": ("weights",),
    "Gradients": ("gradients",),
    "Optimizer": ("masters", "optimizer"),
    "Activations": ("activations", "casts"),
    "Logits": ("logits",),
    "Exchange": ("exchange",),
}
"""Columns and the kinds of memory in them."""


def memory_table(rows: Sequence[Row]) -> Table:
    """One row for each, at the moment that needs most."""
    cells: list[tuple[str, ...]] = []
    for row in rows:
        shown = [sum(row.memory.get(kind, 0) for kind in kinds) for kinds in SHOWN.values()]
        shown.append(row.memory_bytes - sum(shown))
        shown += [row.memory_bytes, row.loading_bytes]
        cells.append((str(row.ranks), row.engine, *(size(b) if b else MISSING for b in shown)))
    names = (*SHOWN, "Other", "Peak", "Loading")
    title = f"Memory of a rank, which has {size(min(row.room_bytes for row in rows))}"
    return Table(title, ("Ranks", "Engine", *names), cells, frozenset({"Ranks", *names}))


def step_table(rows: Sequence[Row], best: Row | None) -> Table:
    """Seconds of a step, and the whole run. The recommended row has an arrow."""
    cells = [
        (
            f"-> {row.ranks}" if row is best else str(row.ranks), row.engine, size(row.wire_bytes),
            *(f"{s:,.3g}" for s in (row.compute_seconds + row.update_seconds, row.network_seconds, row.data_seconds,
                                    row.step_seconds)),
            f"{row.balance:.2f}", percent(row.mfu), f"{row.samples_per_second:,.1f}", f"{row.days:,.3g}",
            MISSING if row.dollars is None else f"{row.dollars:,.0f}", row.limit,
        )
        for row in rows
    ]  # fmt: skip
    numbers = ("Ranks", "Sent", "Compute", "Network", "Data", "Step s", "Balance", "MFU", "Per s", "Days", "Dollars")
    title = f"Time, {rows[0].steps:,} steps" if len({row.steps for row in rows}) == 1 else "Time"
    return Table(title, ("Ranks", "Engine", *numbers[1:], "Limit"), cells, frozenset(numbers))
