"""The pictures of `lensmith data`: lengths, sizes, drops, and what the run draws of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.report.plots import INK, cycle, finish, label, new

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
MOST = 8
"""Sources, or reasons, that are told apart; the others are one."""
NAME_LENGTH = 24


def figures(stage: Record) -> dict[str, Figure]:
    """By name: `lengths`, `sizes`, `drawn`, `drops`, for which there is anything to draw."""
    sources = stage.get("sources") or []
    colors = dict(zip((s["name"] for s in sources), cycle(len(sources)), strict=True))
    made = {
        "lengths": _lengths(sources, stage.get("bin_tokens") or 1, colors),
        "sizes": _sizes([s for s in sources if s["pictures"]], colors),
        "drawn": _drawn(sources),
        "drops": _drops([s for s in sources if s["by_reason"]]),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _lengths(sources: Sequence[Record], width: int, colors: Mapping[str, str]) -> Figure | None:
    from matplotlib.ticker import MaxNLocator

    known = sorted((s for s in sources if s["lengths"]), key=lambda s: -s["samples"])
    if not known:
        return None
    count = max(len(s["lengths"]) for s in known)
    lines = [(colors[s["name"]], _name(s), _padded(s["lengths"], count)) for s in known[:MOST]]
    if rest := known[MOST:]:
        lines.append((INK, f"{len(rest)} others", np.sum([_padded(s["lengths"], count) for s in rest], axis=0)))
    figure, axes = new("Lengths", "samples", "tokens per sample")
    edges = np.arange(count + 1) * width
    for color, name, counts in lines:
        axes.stairs(counts, edges, color=color, alpha=0.7 if len(lines) == 1 else 0.15, fill=True)
        axes.stairs(counts, edges, color=color, linewidth=1.6, label=name)
    peaks = [counts.max() for _, _, counts in lines]
    if max(peaks) > 50 * min(peaks):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(_thousands)
    axes.xaxis.set_major_formatter(_thousands)
    finish(figure, axes)
    if (legend := axes.get_legend()) is not None:  # "best" does not see these patches
        legend.set_loc("upper right")
    return figure


def _padded(counts: Sequence[int], length: int) -> np.ndarray:
    return np.pad(np.array(counts), (0, length - len(counts)))


def _sizes(sources: Sequence[Record], colors: Mapping[str, str]) -> Figure | None:
    if not sources:
        return None
    figure, axes = new("Sizes of pictures", "height in pixels", "width in pixels")
    known = sorted(sources, key=lambda s: -s["pictures"]["count"])[:MOST]
    most = max(s["pictures"]["sizes"][0][2] for s in known)
    sides: list[int] = []
    for source in known:
        wide, high, counts = np.array(source["pictures"]["sizes"]).T
        sides += [*wide.tolist(), *high.tolist()]
        area, color = 8 + 152 * counts / most, colors[source["name"]]
        axes.scatter(wide, high, s=area, color=color, alpha=0.45, linewidths=0, label=_name(source))
    if max(sides) > 8 * min(sides):
        axes.set_xscale("log")
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_thousands)
        axis.set_minor_formatter(lambda value, _: "")
    finish(figure, axes)
    axes.margins(0.08)
    legend = axes.get_legend()
    for mark in legend.legend_handles if legend is not None else ():
        mark.set_sizes([30])  # type: ignore[union-attr]
    return figure


def _drawn(sources: Sequence[Record]) -> Figure | None:
    if len(sources) < 2 or not any(s["planned"]["samples"] for s in sources):
        return None
    known = sorted(sources, key=lambda s: -s["planned"]["samples"])[: 2 * MOST]
    samples, drawn = (sum(x) for x in zip(*((s["samples"], s["planned"]["samples"]) for s in sources), strict=True))
    shares = {
        "of the samples that there are": [s["samples"] / samples for s in known],
        "of the samples drawn": [s["planned"]["samples"] / drawn for s in known],
        "of the tokens drawn": [s["planned"]["token_share"] for s in known],
    }
    figure, axes = _bars("What the run draws of each source", "share in %", known)
    for place, (color, (name, values)) in enumerate(zip(cycle(3), shares.items(), strict=True)):
        at = np.arange(len(known)) + (place - 1) * 0.26
        axes.barh(at, 100 * np.array(values), 0.24, color=color, alpha=0.85, label=name)
    return finish(figure, axes)


def _drops(sources: Sequence[Record]) -> Figure | None:
    if not sources:
        return None
    known = sorted(sources, key=lambda s: -s["dropped"])[: 2 * MOST]
    totals: dict[str, int] = {}
    for source in known:
        for reason, found in source["by_reason"].items():
            totals[reason] = totals.get(reason, 0) + found["samples"]
    reasons = sorted(totals, key=lambda reason: (-totals[reason], reason))
    figure, axes = _bars("Dropped, by reason", "samples", known)
    left = np.zeros(len(known))
    for color, reason in zip(cycle(len(reasons[:MOST])), reasons[:MOST], strict=True):
        values = np.array([s["by_reason"].get(reason, {}).get("samples", 0) for s in known], float)
        axes.barh(np.arange(len(known)), values, 0.6, left=left, color=color, alpha=0.85, label=label(reason))
        left += values
    others = np.array([s["dropped"] for s in known]) - left
    if others.any():
        axes.barh(np.arange(len(known)), others, 0.6, left=left, color=INK, alpha=0.4, label="others")
    axes.xaxis.set_major_formatter(_thousands)
    return finish(figure, axes, always=True)


def _bars(title: str, unit: str, sources: Sequence[Record]) -> tuple[Figure, Axes]:
    """One bar a source, the first at the top."""
    figure, axes = new(title, "", unit)
    axes.set_yticks(np.arange(len(sources)), [_name(s) for s in sources], parse_math=False)
    axes.set_ylim(max(len(sources), 2) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _name(source: Record) -> str:
    name = label(source["name"])
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."


def _thousands(value: float, _: float) -> str:
    return f"{value:,.0f}" if value == round(value) else ""
