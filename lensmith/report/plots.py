"""The curves of a run: loss, learning rate, gradient norm, throughput.

Figures are made without pyplot and without touching matplotlib's global settings, so that drawing in a library or a
notebook changes nothing there. Lines are inked in one colour that the page's SVG replaces by its own text colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
INK = "#1f2328"
COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
SIZE_INCHES = (6.4, 3.5)
MAX_POINTS = 400  # per curve; more cannot be told apart and make the page heavy


def figures(records: Records) -> dict[str, Figure]:
    """The curves that the records hold data for, by name: `loss`, `lr`, `grad_norm`, `throughput`."""
    steps = [record for record in records if record["kind"] == "step"]
    made = {
        "loss": _loss(steps, [record for record in records if record["kind"] == "eval"]),
        "lr": _learning_rate(steps),
        "grad_norm": _gradient_norm(steps),
        "throughput": _throughput(steps),
    }
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


def _loss(steps: Records, evals: Records) -> Figure | None:
    x, y = _series(steps, "loss")
    eval_x, eval_y = _series(evals, "loss")
    if not len(x) and not len(eval_x):
        return None
    figure, axes = _new("Loss", "mean loss per supervised unit")
    _curve(axes, x, y, COLORS[0], "training")
    if len(eval_x):
        axes.plot(eval_x, eval_y, "o-", color=COLORS[1], linewidth=1.6, markersize=4, label="held out")
    _log_where_wide(axes, y)
    _mark_non_finite(axes, x[~np.isfinite(y)])
    return _finish(figure, axes)


def _learning_rate(steps: Records) -> Figure | None:
    parts = _parts(steps, "lr")
    if not parts:
        return None
    lines: dict[bytes, tuple[np.ndarray, np.ndarray, list[str]]] = {}  # parts with the same rates are one line
    for part in parts:
        x, y = _series(steps, "lr", part)
        lines.setdefault(y.tobytes(), (x, y, []))[2].append(_label(part))
    figure, axes = _new("Learning rate", "learning rate")
    for color, (x, y, names) in zip(_cycle(len(lines)), lines.values(), strict=True):
        kept = _thin(y)
        axes.plot(x[kept], y[kept], color=color, linewidth=1.6, label=", ".join(names))
    axes.yaxis.set_major_formatter(lambda value, _: _scientific(value))
    axes.set_ylim(bottom=0)
    return _finish(figure, axes)


def _gradient_norm(steps: Records) -> Figure | None:
    x, y = _series(steps, "grad_norm")
    if not len(x):
        return None
    parts = _parts(steps, "grad_norm_parts")
    figure, axes = _new("Gradient norm", "L2 norm before clipping")
    _curve(axes, x, y, COLORS[0], "all")
    for color, part in zip(_cycle(len(parts) + 1)[1:], parts, strict=True):
        _curve(axes, *_series(steps, "grad_norm_parts", part), color, _label(part))
    _log_where_wide(axes, y)
    _mark_non_finite(axes, x[~np.isfinite(y)])
    return _finish(figure, axes)


def _throughput(steps: Records) -> Figure | None:
    x, y = _series(steps, "tokens_per_second")
    if not len(x):
        return None
    figure, axes = _new("Throughput", "tokens per second")
    _curve(axes, x, y, COLORS[2], "all ranks")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _finish(figure, axes)


def _new(title: str, unit: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step (optimizer updates)", fontsize=9, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, color=INK, labelcolor=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, alpha=0.4)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    return figure, axes


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.margins(x=0.02)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        legend = axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    """The smoothed line over faint points. Every spike keeps its point, however long the run."""
    kept = _thin(y)
    axes.plot(x[kept], y[kept], "o", color=color, alpha=0.3, markersize=2.4, markeredgewidth=0)
    line = smooth(y, width=min(200, max(1, len(y) / 80)))
    kept = _thin(line)
    axes.plot(x[kept], line[kept], color=color, linewidth=1.8, label=label)


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


def _cycle(count: int) -> list[str]:
    return [COLORS[position % len(COLORS)] for position in range(count)]


def _label(name: str) -> str:
    """ASCII: the bundled font warns about glyphs it lacks. matplotlib hides labels that begin with an underscore."""
    return ascii(name)[1:-1].lstrip("_")
