"""`lensmith data`: what is in the data of every stage, before anything trains. Loads no weights.

Without `--hash` everything comes from the index. With it every row is read again and every picture once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lensmith.data.describe import describe
from lensmith.data.duplicates import Contents, Hashed, crossings, findings, hash_index
from lensmith.data.holdout import seen_in_training
from lensmith.data.index import Index
from lensmith.recipe.prepare import Prepared, index_workers, prepare
from lensmith.recipe.run import Located
from lensmith.report import data_tables
from lensmith.report.data_page import write_data_page
from lensmith.report.metrics import json_line
from lensmith.report.page import replaced
from lensmith.report.terminal import Terminal

Record = dict[str, Any]


def data(located: Located, terminal: Terminal, *, hashes: bool = False, output: Path | None = None) -> Record:
    """Print the tables and write `data.json` and `data.html`; returns what data.json holds.

    Raises `UserError` for what stops the index. More drops than `data.max_dropped` are only said.
    """
    contents = Contents() if hashes else None
    stages: list[Record] = []
    for stage in located.stages:
        with stage.saying_which():
            record = _stage(stage, terminal, contents)
        if not record["streamed"]:
            which, steps = f"stage {record['name']}: " if record["name"] else "", record["steps"]
            text = f"{which}{steps:,} steps, {record['samples_drawn']:,} samples drawn"
            terminal.event("plan", text, stage=record["name"], steps=steps, samples=record["samples_drawn"])
        for name, table in data_tables.of_stage(record):
            terminal.show(name, table)
        stages.append(record)
    found = {"schema": 1, "name": located.name, "hashed": hashes, "stages": stages}
    folder = located.output if output is None else output
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(json.loads(json_line(found)), indent=1)
    replaced(folder / "data.json", lambda path: path.write_text(whole + "\n", encoding="ascii"))
    page = write_data_page(folder, found)
    terminal.event("data_page", f"page {page}", page=str(page), json=str(folder / "data.json"))
    return found


def _stage(located: Located, terminal: Terminal, contents: Contents | None) -> Record:
    name, options = located.stage_name, located.run.data
    record: Record = {"name": name, "streamed": options.stream is not None, "mixture": options.mixture.kind}
    if options.stream is not None:
        which = f"stage {name}: " if name else ""
        terminal.warning(f"{which}data.stream is trained as it is read: nothing is counted ahead")
        return record | {"steps": located.run.train.max_steps, "warnings": []}
    prepared = prepare(_tolerant(located), terminal)
    train, held = prepared.train, prepared.held
    steps, drawn = planned(prepared)
    sources, bin_tokens = _describe(prepared, train, prepared.read)
    of_held, held_bin_tokens = ([], 0) if held is None else _describe(prepared, held, held if options.eval else None)
    taken = held.source_sizes if held is not None and not options.eval else (0,) * len(sources)
    totals = [n * s["tokens"]["sum"] / max(1, s["samples"]) for n, s in zip(drawn, sources, strict=True)]
    shares = _shares(prepared)
    for n, source in enumerate(sources):
        source["held_out"] = taken[n]
        source["planned"] = {
            "loss_weight": float(train.source_weights[n]), "share": shares[n], "samples": drawn[n],
            "passes": drawn[n] / source["samples"] if source["samples"] else 0.0, "tokens": round(totals[n]),
            "token_share": totals[n] / sum(totals) if sum(totals) else 0.0,
        }  # fmt: skip
    notes = prepared.read.notes().items()
    return record | {
        "steps": steps,
        "samples_drawn": sum(drawn),
        "sources": sources,
        "bin_tokens": bin_tokens,
        "held_out": of_held,
        "held_out_bin_tokens": held_bin_tokens,
        "eval_in_train": None if held is None else seen_in_training(train, held),
        "notes": {note: {"samples": count, "first": first} for note, (count, first) in notes},
        "warnings": [*prepared.notes, *_too_many(located, prepared, terminal)],
        "duplicates": None if contents is None else _duplicates(prepared, contents, terminal),
    }


def _tolerant(located: Located) -> Located:
    """The run, as if any share of the rows might be dropped: here it is to be looked at, not refused."""
    options = located.run.data.model_copy(update={"max_dropped": 1.0})
    found = Located(located.run.model_copy(update={"data": options}), located.file, located.name)
    found.folder, found.output, found.stage = located.folder, located.output, located.stage
    return found


def _too_many(located: Located, prepared: Prepared, terminal: Terminal) -> list[str]:
    counts, limit = prepared.read.counts(), located.run.data.max_dropped
    if counts["dropped"] <= limit * counts["read"]:
        return []
    share = counts["dropped"] / counts["read"]
    note = f"{share:.1%} of the rows are dropped, more than data.max_dropped = {limit}: the run would stop"
    terminal.warning(note)
    return [note]


def _describe(prepared: Prepared, used: Index, read: Index | None) -> tuple[list[Record], int]:
    pixels = prepared.family.pixels
    return describe(used, read, pixels.min_pixels, pixels.max_pixels)


def _shares(prepared: Prepared) -> list[float]:
    """The resolved share of each source in the draws, before any of them is used up."""
    mixture = prepared.mixture
    weights = prepared.train.source_sizes if mixture is None else mixture.weights
    return [weight / sum(weights) for weight in weights]


def planned(prepared: Prepared) -> tuple[int, list[int]]:
    """(steps of the run, samples drawn of each source over all of them)."""
    plan, train = prepared.plan, prepared.train
    steps = plan.num_steps()
    if not steps:
        return 0, [0] * len(train.sources)
    of_sample, count = train.column("source"), len(train.sources)
    if plan.partial == "drop":  # the stream has gaps, so each step is asked
        drawn = np.zeros(count, np.int64)
        for step in plan.steps():
            drawn += np.bincount(of_sample[step.members], minlength=count)
        return steps, drawn.tolist()
    cursor = next(plan.steps(steps - 1)).cursor
    if plan.mixture is not None:
        return steps, list(plan.drawn(cursor))
    epochs, rest = divmod(cursor, len(train.trainable))
    drawn = epochs * np.array(train.source_sizes, np.int64)
    if rest:
        drawn += np.bincount(of_sample[plan.order(epochs)[:rest]], minlength=count)
    return steps, drawn.tolist()


# --- with --hash ------------------------------------------------------------------------------------------------------


def _duplicates(prepared: Prepared, contents: Contents, terminal: Terminal) -> Record:
    train = _hashed(prepared.train, contents, terminal, "training")
    held = None if prepared.held is None else _hashed(prepared.held, contents, terminal, "held-out")
    return {
        "train": findings(train, contents),
        "held_out": None if held is None else findings(held, contents),
        "both": None if held is None else crossings(train, held, contents),
    }


def _hashed(index: Index, contents: Contents, terminal: Terminal, what: str) -> Hashed:
    with terminal.progress(f"Hashing {what} data", len(index.trainable)) as bar:
        return hash_index(index, contents, workers=index_workers(), progress=bar.advance)
