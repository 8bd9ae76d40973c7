"""The tables of a run as plain text cells, drawn by the terminal and by the page alike. No escaping happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MISSING = "–"
_RATES = ("exact_match", "accuracy")


@dataclass(frozen=True)
class Table:
    """`right` names the columns of numbers; `footer` is a row of totals, or empty."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: frozenset[str] = frozenset()
    footer: tuple[str, ...] = ()


@dataclass
class SourceCount:
    """What became of the samples of one source: `dropped` by reason; tokens and images of the trained ones only."""

    source: str
    train: int = 0
    held_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    tokens: int = 0
    supervised: int = 0
    images: int = 0

    @property
    def read(self) -> int:
        return self.train + self.held_out + sum(self.dropped.values())


def number(value: Any) -> str:
    """`20185088` -> `20,185,088`, `2e-05` -> `2e-05`, `True` -> `yes`, None -> a dash, text as it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def figure(name: str, value: Any) -> str:
    """A value with the unit its name ends in (`_seconds`, `_bytes`, `_per_second`); a rate as per cent.

    Of a dotted name any part may carry the unit: `wall_seconds.train`.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return number(value)
    if name.endswith("_per_second"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    parts = name.split(".")
    if any(part.endswith("seconds") for part in parts):
        return duration(value)
    if any(part.endswith("bytes") for part in parts):
        return size(value)
    if name.split("/")[0] in _RATES:
        return percent(value)
    return f"{value:.4f}" if name == "loss" else number(value)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes in binary units: `512 B`, `1.4 KiB`, `15.9 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def what_trains(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> Table:
    """One row per part of the model, as in `trains.json`."""
    names = ("part", "tensors", "parameters", "trainable", "dtype", "lr", "weight_decay")
    columns = ("Part", "Tensors", "Parameters", "Trainable", "Dtype", "Rate", "Decay")
    cells = [tuple(_trains_cell(row, name) for name in names) for row in rows]
    total = tuple(number(totals[name]) if name in totals else "" for name in names[1:])
    right = frozenset(columns) - {"Part", "Dtype"}
    return Table("What trains", columns, cells, right, ("Total", *total) if totals else ())


def _trains_cell(row: Mapping[str, Any], name: str) -> str:
    of_trained = name in ("lr", "weight_decay")
    return MISSING if of_trained and not row.get("trainable") else number(row.get(name))


def ledger(counts: Sequence[SourceCount]) -> Table:
    """read = trained + held out + dropped, per source and in total, with the reasons of the dropped."""
    columns = ("Source", "Read", "Trained", "Held out", "Dropped", "Reasons", "Tokens", "Supervised", "Images")
    total = SourceCount("Total")
    for count in counts:
        total.train += count.train
        total.held_out += count.held_out
        total.tokens += count.tokens
        total.supervised += count.supervised
        total.images += count.images
        for reason, many in count.dropped.items():
            total.dropped[reason] = total.dropped.get(reason, 0) + many
    rows = [_ledger_row(count) for count in counts]
    return Table("Ledger", columns, rows, frozenset(columns) - {"Source", "Reasons"}, _ledger_row(total))


def _ledger_row(count: SourceCount) -> tuple[str, ...]:
    counts = (count.read, count.train, count.held_out, sum(count.dropped.values()))
    rest = (count.tokens, count.supervised, count.images)
    return (count.source, *map(number, counts), _reasons(count.dropped), *map(number, rest))


def _reasons(found: Mapping[str, int]) -> str:
    by_size = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason}={many:,}" for reason, many in by_size)


def key_figures(summary: Mapping[str, Any]) -> Table:
    """A summary without `heldout`, nested values under dotted names; a unit moves from the name to the value."""
    rest = {name: value for name, value in summary.items() if name != "heldout"}
    rows = [(_label(name), figure(name, value)) for name, value in flat(rest).items()]
    return Table("Key figures", ("Figure", "Value"), rows, frozenset({"Value"}))


def _label(name: str) -> str:
    """`wall_seconds.train` -> `wall: train`; names in capitals (drop reasons) stay as they are."""
    parts = [part.removesuffix("_seconds").removesuffix("_bytes") for part in name.split(".")]
    return ": ".join(part.replace("_", " ") if part.islower() else part for part in parts)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": [1, 2]}` -> `{"a.b": 1, "c": "1, 2"}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found


def held_out(heldout: Mapping[str, Any]) -> Table:
    """Metric by metric: before and after training, and the two controls where they were measured."""
    before, after = heldout.get("before") or {}, heldout.get("after") or {}
    controls = [name for name in ("baseline", "swapped") if heldout.get(name)]
    names = list(dict.fromkeys([*after, *before]))
    columns = ("Metric", "Before", "After", "Change", *(name.capitalize() for name in controls))
    rows = [
        (
            name,
            figure(name, before.get(name)),
            figure(name, after.get(name)),
            _change(name, before.get(name), after.get(name)),
            *(figure(name, heldout[control].get(name)) for control in controls),
        )
        for name in names
    ]
    return Table("Held-out samples", columns, rows, frozenset(columns[1:]))


def _change(name: str, before: Any, after: Any) -> str:
    if before is None or after is None:
        return MISSING
    change = after - before
    return f"{100 * change:+.1f} points" if name.split("/")[0] in _RATES else f"{change:+.4g}"


def held_out_stages(heldout: Mapping[str, Any]) -> Table:
    """`held_out` of every stage that measured anything, one below the other."""
    each = [(name, held_out(found)) for name, found in heldout["stages"].items()]
    columns = ("Stage", *dict.fromkeys(column for _, table in each for column in table.columns))
    rows = [
        (name, *(dict(zip(table.columns, row, strict=True)).get(column, MISSING) for column in columns[1:]))
        for name, table in each
        for row in table.rows
    ]
    return Table("Held-out samples", columns, rows, frozenset(columns[2:]))


def stages(found: Sequence[Mapping[str, Any]]) -> Table:
    """As in `summary.json`; empty for a run without stages."""
    columns = ("Stage", "Steps", "Read", "Trained", "Held out", "Dropped", "Reasons")
    dropped = any(stage["samples"]["dropped"] for stage in found)
    rows = [
        (
            stage["name"],
            number(stage["steps"]),
            *(number(stage["samples"][key]) for key in ("read", "train", "held_out", "dropped")),
            *([_reasons(stage["samples"]["by_reason"])] if dropped else []),
        )
        for stage in found
    ]
    return Table("Stages", columns if dropped else columns[:-1], rows, frozenset(columns[1:-1]))


def sources(found: Sequence[Mapping[str, Any]]) -> Table:
    """As in `summary.json`; empty for a single source, of which the key figures tell."""
    if len(found) < 2:
        return Table("Sources", (), [])
    several = any("stage" in source for source in found)
    columns = ("Source", "Samples", "Passes", "Tokens", "Supervised", "First loss", "Last loss")
    counts, losses = ("tokens", "supervised"), ("loss_first", "loss_last")
    rows = [
        (
            *([str(source.get("stage", ""))] if several else []),
            source["source"],
            number(source["samples"]),
            "" if source["passes"] is None else f"{source['passes']:,.2f}",
            *(number(source[key]) for key in counts),
            *(figure("loss", source[key]) for key in losses),
        )
        for source in found
    ]
    columns = ("Stage", *columns) if several else columns
    return Table("Sources", columns, rows, frozenset(columns) - {"Stage", "Source"})


def balance(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key figures of how even the work was, as in `summary.json`: rows 1, steps 0 when all are alike. One rank is
    always even with itself."""
    rows: list[tuple[str, str]] = []
    if found.get("ranks_predicted", 1) != 1:
        rows.append(("balance of ranks", f"{found['ranks_predicted']:.2f}"))
    for key in ("rows", "steps"):
        if f"{key}_predicted" in found:
            predicted, measured = (found[f"{key}_{how}"] for how in ("predicted", "measured"))
            rows.append((f"balance of {key} (measured)", f"{predicted:.2f} ({measured:.2f})"))
    return rows


def evaluations(records: Sequence[Mapping[str, Any]]) -> Table:
    """The evaluations made while the run went on, one row each."""
    evals = [record for record in records if record["kind"] == "eval"]
    names = list(dict.fromkeys(name for record in evals for name in record.get("metrics") or {}))
    several = any(record.get("stage") for record in evals)
    rows = [
        (
            number(record["step"]),
            *([str(record.get("stage", ""))] if several else []),
            figure("loss", record.get("loss")),
            *(figure(name, (record.get("metrics") or {}).get(name)) for name in names),
        )
        for record in evals
    ]
    columns = ("Step", *(["Stage"] if several else []), "Loss", *names)
    return Table("Evaluations", columns, rows, frozenset(columns) - {"Stage"})
