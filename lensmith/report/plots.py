"""The curves of a run: loss (also source by source), learning rate, gradient norm, throughput.

Figures are made without pyplot and without touching matplotlib's global settings, so that drawing in a library or a
notebook changes nothing there. Lines are inked in one colour that the page's SVG replaces by its own text colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
Borders = Sequence[tuple[float, str]]
"""Of each stage of a curriculum, half a step before its first, and its name."""
INK = "#1f2328"
COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
SIZE_INCHES = (6.4, 3.5)
STAGE_LENGTH = 18
MAX_POINTS = 400  # per curve; more cannot be told apart and make the page heavy


def figures(records: Records) -> dict[str, Figure]:
    """The curves that the records hold data for, by name: `loss`, `sources`, `rewards`, `preference`, `lr`,
    `grad_norm`, `throughput`. Of a curriculum each shows where its stages begin."""
    steps = [record for record in records if record["kind"] == "step"]
    borders = _borders(steps)
    evals = [record for record in records if record["kind"] == "eval"]
    made = {
        "loss": _loss(steps, evals, borders),
        "sources": _loss_by_source(steps, borders),
        "rewards": _rewards(steps, borders),
        "preference": _preference(steps, evals, borders),
        "lr": _learning_rate(steps, borders),
        "grad_norm": _gradient_norm(steps, borders),
        "throughput": _throughput(steps, borders),
    }
    for figure in made.values():
        if figure is not None and len(borders) > 1:
            _mark_stages(figure.axes[0], borders)
    return {name: figure for name, figure in made.items() if figure is not None}


def save_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=160, facecolor="white")


def inline_svg(figure: Figure, prefix: str) -> str:
    """An `<svg>` element for an HTML page; `prefix` keeps its ids apart from those of other figures."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*"', r"\1\2", svg, count=1)
    return svg.replace(INK, "currentColor")


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Weighted mean of each value's neighbours on both sides (Gaussian, sigma `width` steps); NaN has no weight."""
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel)[reach : reach + len(values)]
    weight = np.convolve(known.astype(float), kernel)[reach : reach + len(values)]
    return np.where(weight > 0, total / np.maximum(weight, 1e-300), np.nan)


def _loss(steps: Records, evals: Records, borders: Borders) -> Figure | None:
    x, y = _series(steps, "loss")
    eval_x, eval_y = _series(evals, "loss")
    if not len(x) and not len(eval_x):
        return None
    figure, axes = new("Loss", "mean loss per supervised unit")
    _curve(axes, x, y, COLORS[0], "training", borders)
    if len(eval_x):
        axes.plot(eval_x, eval_y, "o-", color=COLORS[1], linewidth=1.6, markersize=4, label="held out")
    _log_where_wide(axes, y)
    _mark_non_finite(axes, x[~np.isfinite(y)])
    return finish(figure, axes)


def _loss_by_source(steps: Records, borders: Borders) -> Figure | None:
    """The sources with the most supervised tokens, if there are several."""
    weights: dict[str, int] = {}
    for record in steps:
        for name, of_source in (record.get("sources") or {}).items():
            weights[name] = weights.get(name, 0) + of_source["supervised"]
    if len(weights) < 2:
        return None
    names = sorted(weights, key=lambda name: -weights[name])[: len(COLORS)]
    title = "Loss by source" + (f" (the {len(names)} largest of {len(weights)})" if len(weights) > len(names) else "")
    figure, axes = new(title, "mean loss per supervised token")
    shown: list[np.ndarray] = []
    for color, name in zip(cycle(len(names)), names, strict=True):
        found = [(r["step"], r["sources"][name]["loss"]) for r in steps if name in (r.get("sources") or {})]
        x = np.array([step for step, _ in found], dtype=float)
        y = np.array([np.nan if value is None else value for _, value in found], dtype=float)
        _curve(axes, x, y, color, label(name), borders)
        shown.append(y)
    _log_where_wide(axes, np.concatenate(shown))
    return finish(figure, axes)


def _rewards(steps: Records, borders: Borders) -> Figure | None:
    """Of objectives that compare answers."""
    sides = (
        ("reward_chosen", "chosen"),
        ("reward_rejected", "rejected"),
        ("reward_good", "good"),
        ("reward_bad", "bad"),
    )
    found = [(text, *_of_objective(steps, name)) for name, text in sides]
    shown = [(text, x, y) for text, x, y in found if len(x)]
    if not shown:
        return None
    figure, axes = new("Rewards", "mean reward of the answers")
    for color, (text, x, y) in zip(COLORS, shown, strict=False):
        _curve(axes, x, y, color, text, borders)
    return finish(figure, axes)


def _preference(steps: Records, evals: Records, borders: Borders) -> Figure | None:
    """The share of pairs whose chosen answer has the higher reward."""
    x, y = _of_objective(steps, "accuracy")
    if not len(x):
        return None
    figure, axes = new("Preference accuracy", "pairs told right")
    _curve(axes, x, y, COLORS[0], "training", borders)
    held = [
        (r["step"], r["metrics"]["accuracy"]) for r in evals if (r.get("metrics") or {}).get("accuracy") is not None
    ]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color=COLORS[1], linewidth=1.6, markersize=4, label="held out")
    axes.set_ylim(-0.02, 1.02)
    return finish(figure, axes)


def _of_objective(steps: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a figure of the objective; nothing where it is in none of them."""
    found = [(r["step"], r["objective"][name]) for r in steps if name in (r.get("objective") or {})]
    values = [np.nan if value is None else value for _, value in found]
    return np.array([step for step, _ in found], dtype=float), np.array(values, dtype=float)


def _borders(steps: Records) -> list[tuple[float, str]]:
    found: list[tuple[float, str]] = []
    for record in steps:
        name = record.get("stage", "")
        if name and (not found or found[-1][1] != name):
            found.append((record["step"] - 0.5, name))
    return found


def _mark_stages(axes: Axes, borders: Borders) -> None:
    for number, (x, name) in enumerate(borders):
        if number:
            axes.axvline(x, color=INK, alpha=0.45, linewidth=0.9, linestyle=(0, (4, 3)))
        text = label(name)
        text = text if len(text) <= STAGE_LENGTH else text[: STAGE_LENGTH - 2] + ".."
        axes.annotate(
            text, (x if number else x + 0.5, 1), (3, -2), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", rotation=90, va="top", fontsize=7, color=INK, alpha=0.7, parse_math=False,
        )  # fmt: skip


def _learning_rate(steps: Records, borders: Borders) -> Figure | None:
    parts = _parts(steps, "lr")
    if not parts:
        return None
    lines: dict[bytes, tuple[np.ndarray, np.ndarray, list[str]]] = {}  # parts with the same rates are one line
    for part in parts:
        x, y = _series(steps, "lr", part)
        lines.setdefault(y.tobytes(), (x, y, []))[2].append(label(part))
    figure, axes = new("Learning rate", "learning rate")
    for color, (x, y, names) in zip(cycle(len(lines)), lines.values(), strict=True):
        _line(axes, x, y, color, ", ".join(names), borders)
    axes.yaxis.set_major_formatter(lambda value, _: _scientific(value))
    axes.set_ylim(bottom=0)
    return finish(figure, axes)


def _gradient_norm(steps: Records, borders: Borders) -> Figure | None:
    x, y = _series(steps, "grad_norm")
    if not len(x):
        return None
    parts = _parts(steps, "grad_norm_parts")
    figure, axes = new("Gradient norm", "L2 norm before clipping")
    _curve(axes, x, y, COLORS[0], "all", borders)
    for color, part in zip(cycle(len(parts) + 1)[1:], parts, strict=True):
        _curve(axes, *_series(steps, "grad_norm_parts", part), color, label(part), borders)
    _log_where_wide(axes, y)
    _mark_non_finite(axes, x[~np.isfinite(y)])
    return finish(figure, axes)


def _throughput(steps: Records, borders: Borders) -> Figure | None:
    x, y = _series(steps, "tokens_per_second")
    if not len(x):
        return None
    figure, axes = new("Throughput", "tokens per second")
    _curve(axes, x, y, COLORS[2], "all ranks", borders)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return finish(figure, axes)


def new(title: str, unit: str, across: str = "step (optimizer updates)") -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, color=INK, labelcolor=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, alpha=0.4)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    return figure, axes


def finish(figure: Figure, axes: Axes, *, always: bool = False) -> Figure:
    """With a legend, where there is more than one line or `always`."""
    axes.margins(x=0.02)
    if always or len(axes.get_legend_handles_labels()[0]) > 1:
        legend = axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str, borders: Borders) -> None:
    """The smoothed line over faint points, anew in each stage. Every spike keeps its point, however long the run."""
    kept = _thin(y)
    axes.plot(x[kept], y[kept], "o", color=color, alpha=0.3, markersize=2.4, markeredgewidth=0)
    lines = [smooth(y[own], width=min(200, max(1, len(y) / 80))) for own in _stretches(x, borders)]
    _line(axes, x, np.concatenate([np.zeros(0), *lines]), color, label, borders)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str, borders: Borders) -> None:
    """A line with a gap between stages."""
    xs, ys = [np.zeros(0)], [np.zeros(0)]
    for own in _stretches(x, borders):
        kept = _thin(y[own])
        xs += [x[own][kept], np.full(1, np.nan)]
        ys += [y[own][kept], np.full(1, np.nan)]
    axes.plot(np.concatenate(xs)[:-1], np.concatenate(ys)[:-1], color=color, linewidth=1.8, label=label)


def _stretches(x: np.ndarray, borders: Borders) -> list[slice]:
    """The positions of each stage that has any."""
    cuts = [0, *np.searchsorted(x, [border for border, _ in borders[1:]]).tolist(), len(x)]
    return [slice(begin, end) for begin, end in pairwise(cuts) if begin < end]


def _log_where_wide(axes: Axes, y: np.ndarray) -> None:
    """Where a few values are over a hundred times the usual one, only a logarithmic axis shows the rest."""
    values = y[np.isfinite(y) & (y > 0)]
    if len(values) and values.max() > 100 * np.median(values):
        axes.set_yscale("log")


def _mark_non_finite(axes: Axes, x: np.ndarray) -> None:
    if len(x):
        x = x[:MAX_POINTS]
        axes.plot(
            x, np.full(len(x), 0.02), "x", color=COLORS[4], markersize=6, transform=axes.get_xaxis_transform(),
            clip_on=False, label="not finite",
        )  # fmt: skip


def _thin(values: np.ndarray) -> np.ndarray:
    """Positions to draw: all, or the lowest and the highest of each of `MAX_POINTS` / 2 stretches."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    kept: set[int] = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        part = np.nan_to_num(values[stretch], nan=0.0)
        kept.update((int(stretch[part.argmin()]), int(stretch[part.argmax()])))
    return np.array(sorted(kept))


def _series(records: Records, name: str, part: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have the name; null, which stands for non-finite, becomes NaN."""
    found = [(r["step"], r[name] if part is None else r[name].get(part)) for r in records if name in r]
    x = np.array([step for step, _ in found], dtype=float)
    return x, np.array([np.nan if value is None else value for _, value in found], dtype=float)


def _parts(steps: Records, name: str) -> list[str]:
    return list(dict.fromkeys(part for record in steps for part in record.get(name) or {}))


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def cycle(count: int) -> list[str]:
    return [COLORS[position % len(COLORS)] for position in range(count)]


def label(name: str) -> str:
    """ASCII: the bundled font warns about glyphs it lacks. matplotlib hides labels that begin with an underscore."""
    return ascii(name)[1:-1].lstrip("_")
