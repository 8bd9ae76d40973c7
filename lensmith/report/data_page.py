"""`data.html`: one page that shows what is in the data, without scripts and without the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lensmith.report import data_plots, data_tables, plots
from lensmith.report.html import environment, replaced
from lensmith.report.tables import Table, percent


def write_data_page(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write `data.html` from what data.json holds; returns its path."""
    stages = [_stage(stage, number) for number, stage in enumerate(found["stages"])]
    html = (
        environment()
        .get_template("data_page.html.jinja")
        .render(name=found["name"], hashed=found["hashed"], stages=stages, several=len(stages) > 1)
    )
    page = folder / "data.html"
    replaced(page, lambda path: path.write_text(html, "utf-8"))
    return page


def _stage(stage: Mapping[str, Any], number: int) -> dict[str, Any]:
    sources, held = stage.get("sources") or [], stage.get("held_out") or []
    found = stage.get("duplicates")
    figures = data_plots.figures(stage)
    nothing = Table("", (), [])
    return {
        "name": stage["name"],
        "id": f"stage-{number}",
        "streamed": stage["streamed"],
        "warnings": stage["warnings"],
        "cards": [] if stage["streamed"] else _cards(stage),
        "curves": [Markup(plots.inline_svg(figure, f"{name}-{number}")) for name, figure in figures.items()],
        "tables": [
            data_tables.data_that_trains(sources), data_tables.lengths(sources), data_tables.mixture(sources),
            data_tables.pictures(sources), data_tables.sizes(sources, commonest=False), data_tables.held_out(held),
        ],
        "sizes": data_tables.common_sizes(sources),
        "dropped": data_tables.dropped([*sources, *held], details=True),
        "notes": data_tables.notes(stage.get("notes") or {}),
        "duplicates": data_tables.duplicates(found) if found else nothing,
        "first_duplicates": data_tables.first_duplicates(found, files=True) if found else nothing,
    }  # fmt: skip


def _cards(stage: Mapping[str, Any]) -> list[dict[str, str]]:
    sources, held = stage["sources"], stage["held_out"]
    samples, tokens = sum(s["samples"] for s in sources), sum(s["tokens"]["sum"] for s in sources)
    dropped, read = sum(s["dropped"] for s in sources), sum(s["read"] for s in sources)
    trained = sum(s["supervised"] for s in sources)
    cards = [
        _card("Samples", samples, f"{sum(s['images'] for s in sources):,} pictures, {_count(len(sources), 'source')}"),
        _card("Tokens", tokens, f"{percent(trained / tokens) if tokens else 'none'} of them trained"),
        _card("Dropped", dropped, f"{percent(dropped / read) if read else 'none'} of what was read"),
        _card("Steps", stage["steps"], f"{stage['samples_drawn']:,} samples drawn"),
    ]
    if held:
        both = stage["eval_in_train"]
        note = f"{both:,} of them in the training data too" if both else "none of them in the training data"
        cards.append(_card("Held out", sum(s["samples"] for s in held), note))
    return cards


def _card(label: str, value: int, note: str) -> dict[str, str]:
    return {"label": label, "value": f"{value:,}", "note": note}


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
