"""The table of faults: what every test with `@pytest.mark.faults("F02", "what is done")` amounted to.

`pytest -m faults` prints it; with `--fault-table=docs/reliability.md` it is also put into that page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXPECTED = {
    "F01": "resumes unaided; same weights and losses as undisturbed",
    "F02": "the old or the new checkpoint, nothing else; same end",
    "F03": "as F02",
    "F04": "as F02; what is left of the save is removed at the next start",
    "F05": "the checkpoint before is used; nothing half is seen",
    "F06": "no half-deleted checkpoint can be loaded",
    "F07": "the next resume is the same; no checkpoint is touched",
    "F08": "the exported folder is whole or absent; the next export succeeds",
    "F09": "saved at the border of the step, exit 143; resumes to the same end",
    "F10": "ends at once; the last checkpoint stands",
    "F11": "both save the same step and exit 143",
    "F12": "as F09, exit 130",
    "F13": "as F09, exit 129; ignored under nohup",
    "F14": "a warning before the signal comes; a kill in the save is F02",
    "F15": "the others name the silent rank, dump stacks and end",
    "F16": "goes on; noted as a straggler; same end",
    "F17": "the others end; a restart resumes to the same end",
    "F18": "a failure, not a success",
    "F19": "one decision of all ranks; no hang",
    "F20": "the watchdog, a process of its own, fires",
    "F21": "a Python trace is left; resumes to the same end",
    "F22": "an error that names the samples in flight, exit 74; resumes to the same end",
    "F23": "the sample is named and dropped with DECODE_TIMEOUT; the others train",
    "F24": "the sample is dropped with OOM; the run goes on",
    "F25": "as F01; the next start says that the run was killed, and how much memory it held",
    "F26": "an error that says so, exit 74; no half checkpoint, no picture blamed; same end",
    "F27": "an error that names /dev/shm, exit 74",
    "F28": "exit 74, says what is free; earlier checkpoints stand; no staging folder; same end",
    "F29": "training goes on; one warning; late and lost records are counted",
    "F30": "the save fails and is not tried again on the same file; same end",
    "F31": "as F28",
    "F32": "the folder is made anew with a warning; a checkpoint is in it; no crash loop",
    "F33": "steps are not held up; one save at a time",
    "F34": "refused; earlier checkpoints stand",
    "F35": "the second is refused and told the owner; a stale lock is taken over",
    "F36": "as F28, says that no files are left",
    "F37": "as F28",
    "F38": "refused by file name; the checkpoint before is used, or the run stops if asked to",
    "F39": "as F38",
    "F40": "as F38",
    "F41": "as F38",
    "F42": "as F38",
    "F43": "refused before the model is touched",
    "F44": "refused: update lensmith",
    "F45": "there is no pointer: the checkpoints themselves decide, whatever lies beside them",
    "F46": "stops with a list; never starts over silently",
    "F47": "refused; each field is named with both values",
    "F48": "found and named; goes back; never saved",
    "F49": "the module is named",
    "F50": "the sample is named",
    "F51": "the module is named, and that it is of the backward pass",
    "F52": "NO_TARGETS; no loss is NaN; the others train",
    "F53": "both ranks skip; weights stay equal",
    "F54": "as NaN",
    "F55": "stops at a limit, with advice",
    "F56": "found by the periodic look; never saved",
    "F57": "said not to be reproduced; counted; goes on",
    "F58": "logged as a spike; nothing hidden",
    "F59": "never the best",
    "F60": "the pair is named, the others train",
    "F61": "dropped with IMG_MISSING, in the ledger; the limit holds",
    "F62": "dropped with CHANGED, in the ledger",
    "F63": "the resume is refused",
    "F64": "below the limit: ends, and the ledger balances; above: stops with the reasons; all: stops before step 1",
    "F65": "the same steps on all ranks; no hang",
    "F66": "an error with the line; never dropped silently",
    "F67": "the wait for data is in the metrics; nothing times out",
    "F68": "the same samples in the same steps; losses within the tolerance",
    "F69": "the same bits",
    "F70": "refused; the field is named",
    "F71": "no negative duration, no early timeout; the newest is the one of the highest step",
    "F72": "the same bits",
    "F73": "works",
    "F74": "another port",
}
"""What must come of each, in short."""

BEGIN, END = "<!-- table of faults -->", "<!-- end of the table -->"


@dataclass
class Row:
    what: list[str] = field(default_factory=list)
    passed: int = 0
    ran: int = 0
    seconds: float = 0.0
    figures: list[str] = field(default_factory=list)


def properties(item: Any) -> list[tuple[str, Any]]:
    """Of the marks of a test: what reports carry, also from the processes of pytest-xdist."""
    found = []
    for mark in item.iter_markers("faults"):
        name, *what = mark.args
        assert name in EXPECTED, f"{item.nodeid}: {name} is not in tests/fault_table.py"
        found.append(("fault", [name, " ".join(what)]))
    return found


def rows(reports: list[Any]) -> dict[str, Row]:
    """Fault -> what the tests that carry its name amounted to. A test that fails in its set-up did not pass."""
    found: dict[str, Row] = {}
    for report in reports:
        said = getattr(report, "user_properties", ())
        for name, what in [value for key, value in said if key == "fault"]:
            row = found.setdefault(name, Row())
            row.seconds += report.duration
            if report.when != "call" and not report.failed:
                continue
            row.ran += 1
            row.passed += report.passed
            row.what += [what] if what and what not in row.what else []
            row.figures += [v for key, v in said if key == "figure" and v not in row.figures]
    return dict(sorted(found.items()))


def cells(found: dict[str, Row]) -> list[tuple[str, ...]]:
    return [
        (name, "; ".join(r.what), EXPECTED[name], f"{r.passed} of {r.ran}", f"{r.seconds:.1f}", "; ".join(r.figures))
        for name, r in found.items()
        if r.ran
    ]


HEAD = ("Fault", "What is done", "What must come of it", "Passed", "Seconds", "Figures")


def as_text(found: dict[str, Row]) -> list[str]:
    """For a terminal: one line a fault, and its outcome below."""
    lines = []
    for name, what, expected, passed, seconds, figures in cells(found):
        lines.append(f"{name}  {passed:>9}  {seconds:>7} s  {what}" + (f"  [{figures}]" if figures else ""))
        lines.append(f"{'':28}-> {expected}")
    tests = sum(r.ran for r in found.values())
    good = sum(r.passed == r.ran for r in found.values())
    return [*lines, f"{good} of {len(found)} faults end as they must ({tests} tests)"]


def as_markdown(found: dict[str, Row]) -> str:
    escaped = [[c.replace("|", "\\|") for c in row] for row in [HEAD, ("---",) * len(HEAD), *cells(found)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def write(page: Path, found: dict[str, Row]) -> None:
    """Put the table into a page, between its two marks. Rows of faults that did not run stay."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    kept = {line.split(" | ")[0].strip("| "): line for line in old.strip().splitlines()[2:]}
    head, rule, *new = as_markdown(found).splitlines()
    kept |= {line.split(" | ")[0].strip("| "): line for line in new}
    body = "\n".join([head, rule, *(kept[name] for name in sorted(kept))])
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def ids_in(page: Path) -> list[str]:
    return re.findall(r"^\| (F\d\d) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
