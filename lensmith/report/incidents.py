"""`incidents.html`: every step of a run that was not finite, what was found and what was done; and its rows in the
report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lensmith.core.errors import DataError
from lensmith.report import tables
from lensmith.report.html import environment, replaced
from lensmith.report.metrics import Record

PAGE = "incidents.html"
NOT_FINITE = "not finite"
MAX_ROWS, MAX_NORMS, MAX_SAMPLES = 200, 12, 20

NEEDED = (
    "step", "cause", "module", "module_type", "part", "direction", "largest_input", "input_dtype", "output_dtype",
    "samples", "every_sample", "bad_parameters", "bad_gradients", "loss", "grad_norm", "action", "why", "advice",
    "reruns", "checkpoint", "time",
)  # fmt: skip
"""Keys of incident.json without which the page says nothing."""

WHAT: dict[str, str] = {
    "bad_input": "The input was not finite before any module saw it.",
    "no_targets": "Nothing of these samples is trained, and the loss divided by that.",
    "bad_weights": "Weights were not finite already.",
    "forward_overflow": "Finite inputs and weights, and an output that is not: too large for its type, or undefined.",
    "backward_only": "The forward pass is finite; the gradient is not.",
    "loss": "Every module is finite; the loss is not.",
    "overflow": "The gradient overflows float16 at the smallest loss scale.",
    "ranks_differ": "The ranks have different gradients where they must have the same.",
    "other_rank": "This rank is finite; another one is not.",
    "transient": "Computed again, the step is finite.",
    "bad_state": "Weights or moments were found not finite when they were looked through.",
}


def read_incidents(run_folder: Path) -> list[Record]:
    """incident.json of each folder, oldest first, with `folder` (its name). Raises `DataError` for a broken one."""
    found: list[tuple[int, str, Record]] = []
    for path in (run_folder / "incidents").glob("step-*/incident.json"):
        try:
            record = json.loads(path.read_bytes())
            if missing := [key for key in NEEDED if key not in record]:
                raise ValueError(f"holds no {missing[0]!r}")
        except (OSError, ValueError, TypeError) as error:
            raise DataError("RUN_FOLDER", str(error), where=str(path),
                            remedy="delete this folder to have a report without it") from None  # fmt: skip
        found.append((path.stat().st_mtime_ns, path.parent.name, record))
    return [{**record, "folder": name} for _, name, record in sorted(found, key=lambda f: f[:2])]


def incidents_table(found: Sequence[Mapping[str, Any]]) -> tables.Table:
    columns = ("Step", "Cause", "Module", "Part", "At fault", "Done", "Folder")
    rows = [
        (
            tables.number(i["step"]), str(i["cause"]), str(i["module"] or tables.MISSING),
            str(i["part"] or tables.MISSING), at_fault(i), f"{i['action']}: {i['why']}", f"incidents/{i['folder']}",
        )
        for i in found[-MAX_ROWS:]
    ]  # fmt: skip
    return tables.Table("Incidents", columns, rows, frozenset({"Step"}))


def at_fault(incident: Mapping[str, Any]) -> str:
    origins = [str(s["origin"]) for s in incident["samples"]]
    more = f" and {len(origins) - MAX_SAMPLES} more" if len(origins) > MAX_SAMPLES else ""
    return ", ".join(origins[:MAX_SAMPLES]) + more or ("every sample" if incident["every_sample"] else "no sample")


def write_incidents_page(run_folder: Path) -> Path | None:
    """Write `incidents.html` into a run folder that has incidents."""
    found = read_incidents(run_folder)
    if not found:
        return None
    html = environment().get_template("incidents.html.jinja").render(
        name=found[-1].get("run") or run_folder.resolve().name, overview=incidents_table(found),
        incidents=[_card(i) for i in reversed(found)], links=folder_links(found),
    )  # fmt: skip
    page = run_folder / PAGE
    replaced(page, lambda path: path.write_text(html, "utf-8"))
    return page


def folder_links(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(name, link) of each folder, newest first."""
    names = [f"incidents/{i['folder']}/" for i in reversed(found)]
    return [(name, "./" + quote(os.fsencode(name))) for name in names]


def _figure(incident: Mapping[str, Any], key: str) -> str:
    if key in incident.get("nonfinite", ()):
        return NOT_FINITE
    return "" if incident[key] is None else tables.figure(key, incident[key])


def _first(names: Sequence[str], number: int | None) -> str:
    """The first name, and how many there are. Of gradients the last in the model is the first of the backward pass."""
    more = (number or len(names)) - 1
    return "" if not names else names[0] + (f" and {more:,} more" if more else "")


def _card(incident: Mapping[str, Any]) -> dict[str, Any]:
    i = incident
    norms = sorted(
        (i.get("gradient_norms") or {}).items(), key=lambda item: -(float("inf") if item[1] is None else item[1])
    )
    largest = i["largest_input"]
    facts = [
        ("module", f"{i['module']} ({i['module_type']})" if i["module"] else ""), ("part", i["part"]),
        ("direction", i["direction"]),
        ("largest finite input", "" if largest is None else f"{largest:.6g} {i['input_dtype']}"),
        ("output", i["output_dtype"]), ("at fault", at_fault(i)),
        ("bad parameters", _first(i["bad_parameters"], i.get("num_bad_parameters"))),
        ("bad gradients", _first(i["bad_gradients"][::-1], i.get("num_bad_gradients"))),
        ("stage", i.get("stage")),
        *((shown, _figure(i, key)) for key, shown in (("loss", "loss"), ("grad_norm", "gradient norm"))),
        ("done", f"{i['action']}: {i['why']}"), ("advice", i["advice"]), ("re-runs", tables.number(i["reruns"])),
        ("last checkpoint", Path(i["checkpoint"]).name if i["checkpoint"] else "none"), ("time", i["time"]),
    ]  # fmt: skip
    rows = [(name, NOT_FINITE if value is None else tables.number(value)) for name, value in norms[:MAX_NORMS]]
    return {
        "title": f"Step {i['step']:,}: {i['cause']}", "what": WHAT.get(i["cause"], ""),
        "tone": {"skip": "fair", "roll_back": "fair", "stop": "bad"}[i["action"]], "action": i["action"],
        "facts": [(name, str(value)) for name, value in facts if value],
        "norms": tables.Table("Largest gradients", ("Parameter", "Norm"), rows, frozenset({"Norm"})),
        "replay": f"lensmith replay incidents/{i['folder']}",
    }  # fmt: skip
