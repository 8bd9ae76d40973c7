"""`report.html`: one page that shows a run, without scripts and without the network."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from lensmith.report import plots, tables
from lensmith.report.escape import cell_safe
from lensmith.report.html import environment, replaced
from lensmith.report.incidents import folder_links, incidents_table, read_incidents, write_incidents_page
from lensmith.report.run_folder import DROPPED_COLUMNS, Ledger, RunFolder, picture, read_run_folder

MAX_DROPPED, MAX_SAMPLES, MAX_EVENTS = 50, 60, 50
_APART = {"schema", "name", "outcome", "heldout", "losses", "stages", "sources", "balance"}
"""What is shown in its own place, or is not for reading."""
_TONES = {"finished": "good", "stopped": "fair", "failed": "bad"}


def write_report(run_folder: Path) -> Path:
    """Write `report.html`, `loss.png` and `dropped.csv` into the run folder; returns the path of the page.

    Raises `DataError` where a file of the folder is broken. What is missing is left out of the page.
    """
    run = read_run_folder(run_folder)
    figures = plots.figures(run.metrics)
    if "loss" in figures:
        replaced(run_folder / "loss.png", lambda path: plots.save_png(figures["loss"], path))
    if run.ledger.counts:
        replaced(run_folder / "dropped.csv", lambda path: _write_dropped(path, run.ledger))
    curves = [Markup(plots.inline_svg(figure, name)) for name, figure in figures.items()]
    html = environment().get_template("page.html.jinja").render(_content(run), curves=curves)
    write_incidents_page(run_folder)
    page = run_folder / "report.html"
    replaced(page, lambda path: path.write_text(html, "utf-8"))
    return page


def _content(run: RunFolder) -> dict[str, Any]:
    summary = {name: value for name, value in run.summary.items() if name not in _APART}
    heldout = run.summary.get("heldout") or {}
    outcome = str(run.summary.get("outcome", "unknown"))
    dropped = list(run.ledger.dropped_rows(MAX_DROPPED))
    ledger = tables.ledger(run.ledger.counts)
    incidents = read_incidents(run.path)
    return {
        "name": run.summary.get("name") or run.path.resolve().name,
        "outcome": outcome,
        "tone": _TONES.get(outcome, "plain"),
        "cards": _cards(heldout),
        "figures": [*tables.key_figures(summary).rows, *tables.balance(run.summary.get("balance") or {})],
        "stages": tables.stages(run.summary.get("stages") or []),
        "sources": tables.sources(run.summary.get("sources") or []),
        "heldout": tables.held_out_stages(heldout) if heldout.get("stages") else tables.held_out(heldout),
        "evaluations": tables.evaluations(run.metrics),
        "ledger": ledger,
        "dropped": tables.Table("First dropped", tuple(n.capitalize() for n in DROPPED_COLUMNS), dropped),
        "num_dropped": sum(count.read - count.train for count in run.ledger.counts),
        "trains": tables.what_trains(run.trains.get("rows", []), run.trains.get("totals", {})),
        "samples": [_sample(run.path, sample) for sample in run.samples[:MAX_SAMPLES]],
        "num_samples": len(run.samples),
        "incidents": incidents_table(incidents),
        "incident_links": folder_links(incidents)[:MAX_EVENTS],
        "events": _events(run),
        "config": run.config,
        "versions": [(name, tables.number(value)) for name, value in tables.flat(run.versions).items()],
        "files": _files(run.path),
    }


def _cards(heldout: dict[str, Any]) -> list[dict[str, str]]:
    """The headline: accuracy after against before, and the controls that tell whether the picture was used."""
    score = {name: scores["exact_match"] for name, scores in heldout.items() if _has_exact_match(scores)}
    cards: list[dict[str, str]] = []
    if "after" in score:
        before = tables.percent(score["before"]) if "before" in score else ""
        note = ""
        if heldout.get("n"):
            low, high = _wilson_interval(score["after"], heldout["n"])
            note = f"{heldout['n']:,} held-out samples, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        cards.append({"label": "Exact match", "before": before, "value": tables.percent(score["after"]), "note": note})
    notes = {"baseline": "commonest training answer to the question", "swapped": "trained, but shown another picture"}
    for name, note in notes.items():
        if name in score:
            cards.append({"label": name.capitalize(), "before": "", "value": tables.percent(score[name]), "note": note})
    return cards


def _has_exact_match(scores: Any) -> bool:
    return isinstance(scores, dict) and scores.get("exact_match") is not None


def _wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """95 % interval of a share that was measured on `count` independent samples."""
    z2 = 1.959964**2
    middle = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (rate * (1 - rate) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _sample(folder: Path, sample: dict[str, Any]) -> dict[str, Any]:
    shown = picture(folder, sample["image"]) if sample.get("image") else ""
    url, width = shown if isinstance(shown, tuple) else ("", 0)
    answer = sample.get("answer")
    return {
        "url": url,
        "small": width < 200,
        "no_picture": shown if not url else "",
        "origin": sample.get("origin", ""),
        "group": sample.get("group") or "",
        "question": sample.get("question", ""),
        "answer": answer,
        "outputs": [
            (label, sample[key], answer is not None and _same(sample[key], answer))
            for label, key in (("Before", "before"), ("After", "after"))
            if sample.get(key) is not None
        ],
    }


def _same(output: str, answer: str) -> bool:
    """Equal apart from case, space and a final full stop."""
    left, right = (" ".join(text.casefold().split()).removesuffix(".") for text in (output, answer))
    return left == right


def _events(run: RunFolder) -> tables.Table:
    events = [record for record in run.metrics if record["kind"] == "event"]
    rows = [
        (
            tables.number(event.get("step")),
            str(event.get("name", "")),
            ", ".join(f"{k}: {tables.figure(k, v)}" for k, v in event.items() if k not in ("kind", "name", "step")),
        )
        for event in events
    ]
    return tables.Table("Events", ("Step", "Event", "Detail"), rows[-MAX_EVENTS:], frozenset({"Step"}))


def _files(folder: Path) -> list[tuple[str, str, str]]:
    """Name, link and size of what lies at the top of the run folder; a folder has the size of its files."""
    files: list[tuple[str, str, str]] = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name.startswith(("report.html", ".")):
            continue
        inside = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
        size = tables.size(sum(inner.stat().st_size for inner in inside))
        name = path.name + "/" * path.is_dir()
        # quoted with ":", so that no name becomes a scheme such as javascript:
        files.append((name, "./" + quote(os.fsencode(name)), size))
    return files


def _write_dropped(path: Path, ledger: Ledger) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(DROPPED_COLUMNS)
        writer.writerows([cell_safe(cell) for cell in row] for row in ledger.dropped_rows())
