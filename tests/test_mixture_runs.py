"""Mixtures of sources with faults planted in each: every row is accounted for, every draw is the plan's, every loss has
its weight; and any number of workers and processes trains the same samples in the same steps."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny
import torch
from test_cpt_exactness import plain_loop

from lensmith.core.errors import RunError
from lensmith.data.pipeline import Pipeline
from lensmith.data.placement import Limits
from lensmith.recipe import session
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
TRAIN, LOAD = "train", "LOAD_IMG_TRUNCATED"
NAMES = ("captions", "pages", "chat", "text", "parquet")
SHARES = (4, 2, 3, 1, 2)
WEIGHTS = (1.0, 0.5, 2.0, 0.0, 3.0)
MAX_TOKENS = 57


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder: folder)


@dataclass
class Planted:
    """Rows of a source, and of each what must become of it: one verdict for a sample, several for pieces."""

    rows: list[Any] = field(default_factory=list)
    fates: list[str] = field(default_factory=list)
    """`ROW FATE`, in the order of the ledger."""

    def add(self, row: Any, *fates: str) -> None:
        self.fates += [f"{len(self.rows) + 1} {fate}" for fate in fates or (TRAIN,)]
        self.rows.append(row)


@dataclass
class Five:
    """The five sources and their folder."""

    folder: Path
    planted: dict[str, Planted]

    def sources(self, **each: Sequence[Any]) -> list[dict[str, Any]]:
        paths = [f"{name}.{'parquet' if name == 'parquet' else 'jsonl'}" for name in NAMES]
        found: list[dict[str, Any]] = [
            {"name": name, "path": str(self.folder / path), "share": share, "weight": weight}
            for name, path, share, weight in zip(NAMES, paths, SHARES, WEIGHTS, strict=True)
        ]
        for key, values in each.items():
            for source, value in zip(found, values, strict=True):
                source[key] = value
        return found


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Five:
    """`cut.png` has a whole header and not all of its pixels (found at load), `no.png` is no picture, `gone.png` is not
    there, `wide` alone has more tokens than a sample may have."""
    folder = tmp_path_factory.mktemp("five")
    fine = tiny.make_pictures(folder, 4, sizes=(60, 110))
    wide = f"wide/{tiny.make_pictures(folder / 'wide', 1, seed=9, sizes=(600, 700))[0]}"
    (folder / "no.png").write_bytes(b"this is no picture at all, whatever its name says")
    (folder / "cut.png").write_bytes((folder / fine[0]).read_bytes()[:-40])
    planted = {
        "captions": captions(fine, wide), "pages": pages(fine, wide), "chat": chat(fine, wide), "text": text(),
        "parquet": parquet(folder, fine, wide),
    }  # fmt: skip
    for name in NAMES[:-1]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in planted[name].rows]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return Five(folder, planted)


def captions(fine: list[str], wide: str) -> Planted:
    p = Planted()
    for n in range(5):
        p.add({"text": f"<image>a red circle {n}", "images": [fine[n % 4]]})
    p.add({"text": ["<image>a blue square", "<image>no"], "images": [fine[1]]})
    p.add({"text": "<image>a", "images": ["no.png"]}, "IMG_FORMAT")
    p.add({"text": "<image>a", "images": ["gone.png"]}, "IMG_MISSING")
    p.add({"text": ""}, "EMPTY")
    p.add({"text": "<image>a circle", "images": ["cut.png"]}, LOAD)
    p.add({"text": "<image> and a square", "images": ["cut.png"]}, LOAD)
    p.add({"text": "<image>a", "images": [wide]}, "TOO_LONG", TRAIN)
    return p


def pages(fine: list[str], wide: str) -> Planted:
    p = Planted()
    for n in range(4):
        p.add({"texts": [f"page {n}", None, "the end"], "images": [None, fine[n], None]})
    p.add(
        {"texts": ["a red circle is in the picture. " * 9, None, "yes"], "images": [None, fine[0], None]}, TRAIN, TRAIN
    )
    p.add({"texts": [None, "a"], "images": ["no.png", None]}, "IMG_FORMAT")
    p.add({"texts": [None, "a"], "images": ["cut.png", None]}, LOAD)
    p.add({"texts": [], "images": []}, "EMPTY")
    return p


def chat(fine: list[str], wide: str) -> Planted:
    def row(question: str, answer: str, *images: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "images": list(images)}

    p = Planted()
    for n in range(6):
        p.add(row("<image>what is it?", f"a red circle {n}", fine[n % 4]))
    p.add(row("is there?", "yes"))
    p.add(row("<image>", "a", "no.png"), "IMG_FORMAT")
    p.add(row("<image>", "a", "cut.png"), LOAD)
    p.add(row("<image>", "a", wide), "TOO_LONG")
    p.add(row("a circle? " * 30, "yes"), "TOO_LONG")
    return p  # an empty turn is no drop: it stops the run (tests/test_bad_inputs.py)


def text() -> Planted:
    p = Planted()
    for n in range(3):
        p.add({"text": f"only text {n}"})
    p.add({"text": "  "}, "EMPTY")
    return p


def parquet(folder: Path, fine: list[str], wide: str) -> Planted:
    p = Planted()
    for n in range(4):
        p.add((f"<image>stored {n}", [fine[n]]))
    p.add(("<image>x", ["no.png"]), "IMG_FORMAT")
    p.add(("<image>x", ["cut.png"]), LOAD)
    p.add(("", []), "EMPTY")
    p.add(("<image>x", [wide]), "TOO_LONG", TRAIN)
    columns = {
        "text": [words for words, _ in p.rows],
        "images": [[{"bytes": (folder / n).read_bytes(), "path": None} for n in names] for _, names in p.rows],
    }
    pq.write_table(pa.table(columns), folder / "parquet.parquet", row_group_size=3)
    return p


def mixed(folder: Path, base: Path, five: Five, /, **over: Any) -> Any:
    values: dict[str, Any] = {
        "data": {"train": five.sources(), "mixture": "shares", "max_tokens": MAX_TOKENS, "max_dropped": 1.0},
        "batch": {"samples": 5, "device_tokens": 128},
        "train": {"max_steps": 15},
    }
    return runs.located(folder, base, five.folder, **runs.merge(values, over))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "step"]


def ledger(folder: Path) -> dict[str, list[str]]:
    """Of each source `ROW FATE`, in order."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(folder / "ledger.parquet").to_pylist():
        fate = row["reason"] if row["verdict"] == "drop" else row["verdict"]
        found.setdefault(row["source"], []).append(f"{row['row'] + 1} {fate}")
    return found


def draws(prepared: Prepared, steps: int) -> list[np.ndarray]:
    """Draws of each source in every step, by the plan."""
    source, number = prepared.train.column("source"), len(prepared.train.sources)
    planned = zip(prepared.plan.steps(), range(steps), strict=False)
    return [np.bincount(source[step.members], minlength=number) for step, _ in planned]


def test_five_sources_with_faults(tmp_path: Path, qwen25: Path, five: Five) -> None:
    """Ledger, reasons, counts, shares, losses and figures of one run over all that can go wrong in a row."""
    run = mixed(tmp_path / "run", qwen25, five)
    out = runs.quiet_train(run)
    prepared, steps = prepare(run, QUIET), steps_of(out.folder)
    planned = draws(prepared, 15)
    assert len(steps) == 15 and (sum(planned) >= np.array(prepared.train.source_sizes)).all()  # each row has its turn

    # every row, with its verdict and reason
    found = ledger(out.folder)
    for name in NAMES:
        assert found[name] == five.planted[name].fates, name
    fates = [f.split()[1] for p in five.planted.values() for f in p.fates]
    reasons = Counter(f for f in fates if f != TRAIN)
    samples = out.summary["samples"]
    assert samples == {
        "read": len(fates), "train": fates.count(TRAIN), "dropped": reasons.total(), "held_out": 0,
        "by_reason": reasons,
    }  # fmt: skip
    assert samples["read"] == samples["train"] + samples["dropped"]

    # every draw: within one of the shares in each prefix, and what is logged is what was drawn less what did not load
    share = np.array(SHARES) / sum(SHARES)
    lost = [lost_in(prepared, step) for step in steps]
    total = np.zeros(5)
    for step, own, gone in zip(steps, planned, lost, strict=True):
        total += own
        assert (np.abs(total - total.sum() * share) < 1).all()
        logged = [step["sources"].get(name, {}).get("samples", 0) for name in NAMES]
        assert logged == (own - gone).tolist()
        assert step["samples"] == sum(logged) == 5 - gone.sum()
        assert step["tokens"] == sum(s["tokens"] for s in step["sources"].values())
        assert step["supervised"] == sum(s["supervised"] for s in step["sources"].values())

    # every loss: the sum of weight times loss over the sum of weights, over all tokens of all sources
    weight = dict(zip(NAMES, WEIGHTS, strict=True))
    for step in steps:
        known = [(weight[n] * s["supervised"], s["loss"]) for n, s in step["sources"].items() if s["supervised"]]
        mean = sum(w * loss for w, loss in known) / sum(w for w, _ in known)
        assert step["loss"] == pytest.approx(mean, abs=1e-5)

    # the figures of the sources are the sums of the steps
    for n, row in enumerate(out.summary["sources"]):
        mine = [s["sources"][NAMES[n]] for s in steps if NAMES[n] in s["sources"]]
        assert row["source"] == NAMES[n]
        for key in ("samples", "tokens", "supervised"):
            assert row[key] == sum(s[key] for s in mine)
        assert row["samples"] == sum(int(o[n] - g[n]) for o, g in zip(planned, lost, strict=True))
        assert row["passes"] == round(row["samples"] / prepared.train.source_sizes[n], 4)
        count = max(1, len(mine) // 10)
        assert row["loss_last"] == pytest.approx(_mean(mine[-count:])) and math.isfinite(row["loss_first"])
    assert {s["loss"] is None for step in steps for s in step["sources"].values()} == {False}  # of weight 0 too


def lost_in(prepared: Prepared, step: dict[str, Any]) -> np.ndarray:
    """Of each source, members of a step whose picture does not decode."""
    members = next(prepared.plan.steps(step["step"] - 1)).members
    source = prepared.train.column("source")[members]
    cut = np.array([_shows_cut(prepared, int(m)) for m in members])
    return np.bincount(source[cut], minlength=5) if cut.any() else np.zeros(5, int)


def _shows_cut(prepared: Prepared, number: int) -> bool:
    loader, at = prepared.train.spec.build(), prepared.train.ref(number)
    sample = loader.sample(at.file, at.row)
    encoded = loader.encode(at.file, sample, at.cut)
    whole = b"IEND"
    return any(whole not in loader.bytes_of(at.file, b.image, sample.origin) for b in encoded.images)


def _mean(parts: list[dict[str, Any]]) -> float:
    return sum(s["loss"] * s["supervised"] for s in parts) / sum(s["supervised"] for s in parts)


@pytest.fixture(scope="module")
def clean(five: Five, tmp_path_factory: pytest.TempPathFactory) -> Five:
    """The rows that train, alone."""
    folder = tmp_path_factory.mktemp("clean")
    shutil.copytree(five.folder / "images", folder / "images")
    planted = {name: Planted() for name in NAMES}
    for name in NAMES:
        bad = {int(f.split()[0]) for f in five.planted[name].fates if f.split()[1] != TRAIN}
        for number, row in enumerate(five.planted[name].rows, 1):
            if number not in bad:
                planted[name].add(row)
        if name != "parquet":
            lines = [json.dumps(row) for row in planted[name].rows]
            (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    table = pq.read_table(five.folder / "parquet.parquet").slice(0, 4)
    pq.write_table(table, folder / "parquet.parquet")
    return Five(folder, planted)


def test_weighted_losses_equal_a_flat_loop(tmp_path: Path, qwen25: Path, clean: Five) -> None:
    """Sum of w * loss over sum of w * tokens, by stock transformers, one sample at a time; a source of weight 0 too."""
    run = mixed(tmp_path / "run", qwen25, clean, train={"max_steps": 5}, data={"max_dropped": 0.0})
    ours = runs.quiet_train(run).summary
    losses, _ = plain_loop(run, qwen25, {"kind": "full"}, 5)
    assert np.abs(np.array(ours["losses"]) - losses).max() <= 1e-5


def test_a_step_without_weight_moves_nothing(tmp_path: Path, qwen25: Path, clean: Five) -> None:
    text = clean.sources(share=(0, 0, 0, 1, 0))
    over: dict[str, Any] = {"data": {"train": text}, "train": {"max_steps": 2}, "optimizer": {"weight_decay": 0.5}}
    out = runs.quiet_train(mixed(tmp_path / "run", qwen25, clean, **over))
    assert out.summary["applied_steps"] == 0 and out.summary["losses"] == [None, None]


# -- shares, caps, temperature ----------------------------------------------------------------------------------------


def test_sources_that_are_left_out(tmp_path: Path, qwen25: Path, clean: Five) -> None:
    """Once through each, `text` twice, half of `chat`: the run ends when all are used up."""
    epochs = (None, None, 0.5, 2, None)
    data = {
        "train": clean.sources(epochs=epochs, weight=(1, 1, 2, 1, 1)),
        "mixture": {"kind": "shares", "exhausted": "leave_out"},
    }
    run = mixed(tmp_path / "run", qwen25, clean, data=data, train={"max_steps": None, "epochs": 99.0})
    out, prepared = runs.quiet_train(run), prepare(run, QUIET)
    sizes = prepared.train.source_sizes
    expected = [round(n * (1 if e is None else e)) for n, e in zip(sizes, epochs, strict=True)]
    assert [s["samples"] for s in out.summary["sources"]] == expected
    assert [s["passes"] for s in out.summary["sources"]] == [
        round(n / size, 4) for n, size in zip(expected, sizes, strict=True)
    ]
    turns = np.bincount(np.concatenate([s.members for s in prepared.plan.steps()]), minlength=sum(sizes))
    source = prepared.train.column("source")
    for number, epoch in enumerate(epochs):
        assert set(turns[source == number].tolist()) == ({0, 1} if epoch == 0.5 else {epoch or 1})
    assert out.summary["steps"] == -(-sum(expected) // 5)


def test_a_source_that_repeats(tmp_path: Path, qwen25: Path, clean: Five) -> None:
    """Every pass over a source shows each of its samples once, in an order of its own."""
    run = mixed(tmp_path / "run", qwen25, clean, train={"max_steps": 40})
    prepared = prepare(run, QUIET)
    members = np.concatenate([s.members for s in prepared.plan.steps()])
    source = prepared.train.column("source")
    for number, size in enumerate(prepared.train.source_sizes):
        mine = members[source[members] == number]
        passes = [mine[i : i + size].tolist() for i in range(0, len(mine) - size + 1, size)]
        assert len(passes) >= 2 and all(sorted(p) == sorted(passes[0]) for p in passes)
        assert len(set(map(tuple, passes))) > 1
        assert prepared.plan.epochs_of(200)[number] == len(mine) / size


@pytest.mark.parametrize("by", ["tokens", 1.0, 3.0])
def test_shares_by_tokens_and_temperature(tmp_path: Path, qwen25: Path, clean: Five, by: Any) -> None:
    """In every prefix within one draw of the share that is worked out here."""
    kind = {"kind": "shares", "by": "tokens"} if by == "tokens" else {"kind": "temperature", "temperature": by}
    share = SHARES if by == "tokens" else (1, 1, 1, 1, 1)
    run = mixed(tmp_path / "run", qwen25, clean, data={"train": clean.sources(share=share), "mixture": kind})
    prepared = prepare(run, QUIET)
    sizes = np.array(prepared.train.source_sizes, float)
    tokens = np.bincount(prepared.train.column("source"), prepared.train.column("tokens"))
    wanted = np.array(share) * sizes / tokens if by == "tokens" else sizes ** (1 / by)
    total = np.zeros(5)
    for own in draws(prepared, 15):
        total += own
        assert (np.abs(total - total.sum() * wanted / wanted.sum()) < 1 + 1e-3).all()


def test_caps_are_part_of_what_a_run_is(tmp_path: Path, qwen25: Path, clean: Five) -> None:
    """Other `epochs` of a source would be another stream: a resume refuses them, and says which field it is."""
    over: dict[str, Any] = {"train": {"max_steps": 1}}
    runs.quiet_train(mixed(tmp_path / "run", qwen25, clean, **over))
    over["data"] = {"train": clean.sources(epochs=(1, None, None, None, None))}
    with pytest.raises(RunError, match=r"RESUME.*differs.*\n.*mixture caps: checkpoint"):
        runs.quiet_train(mixed(tmp_path / "run", qwen25, clean, **over))


# -- workers, processes, packing --------------------------------------------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "concat": {"data": {"mixture": "concat"}},
    "mixture": {},
    "tokens": {"batch": {"samples": None, "tokens": 200}},
}
FIRST = 8


def content_of(prepared: Prepared, limits: Limits, workers: int, rank: int, ranks: int) -> dict[str, Any]:
    """step -> (what a rank trains, what it says the whole step counts to); samples by their content."""
    tokens = prepared.train.column("tokens")
    pipeline = Pipeline(prepared.train, prepared.plan, limits, workers=workers, rank=rank, ranks=ranks)
    found: dict[str, Any] = {}
    steps = pipeline.steps()
    for data in steps:
        mine: list[Any] = []
        for row in data.rows:
            at = 0
            target = np.full(len(row.ids_T), -1, np.int64)
            target[row.supervised_S] = row.target_S
            weight = np.zeros(len(row.ids_T))
            weight[row.supervised_S] = row.weight_S
            for member in row.members:
                end = at + int(tokens[member])
                mine.append([member, row.ids_T[at:end].tolist(), target[at:end].tolist(), weight[at:end].tolist()])
                at = end
            assert at == len(row.ids_T)
        dropped = [[number, reason] for number, reason, _ in data.dropped]
        found[str(data.step.number)] = [mine, dropped, data.num_samples, data.num_supervised]
        if data.step.number + 1 == FIRST:
            steps.close()
            break
    return found


def _write(path: Path, *args: Any) -> None:
    torch.set_num_threads(1)
    path.write_text(json.dumps(content_of(*args)))
    os._exit(0)  # as killed: multiprocessing's own exit may hang on a pool that is closed with work left (CPython)


def global_steps(folder: Path, prepared: Prepared, limits: Limits, workers: int, ranks: int) -> list[Any]:
    """Every step over all ranks, each a real process of its own when there are several."""
    if ranks == 1:
        parts = [json.loads(json.dumps(content_of(prepared, limits, workers, 0, 1)))]
    else:
        context = multiprocessing.get_context("fork")
        paths = [folder / f"{workers}-{rank}.json" for rank in range(ranks)]
        running = [
            context.Process(target=_write, args=(path, prepared, limits, workers, rank, ranks))
            for rank, path in enumerate(paths)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join()
            assert process.exitcode == 0
        parts = [json.loads(path.read_text()) for path in paths]
    found = []
    for number in parts[0]:
        each = [part[number] for part in parts]
        found.append([sorted(x for mine, *_ in each for x in mine), sorted(x for _, gone, *_ in each for x in gone)])
        assert all(mine or gone for mine, gone, *_ in each)  # both have something to do
    return found


CASES = [(1, 1, True), (2, 2, False), (4, 2, True), (4, 1, False)]
GRID = [(w, r, p) for w in (0, 1, 2, 4) for r in (1, 2) for p in (True, False)]


@pytest.mark.parametrize("rule", RULES)
def test_layouts_train_the_same_samples(tmp_path: Path, qwen25: Path, five: Five, rule: str) -> None:
    same_everywhere(tmp_path, qwen25, five, rule, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_all_layouts_train_the_same_samples(tmp_path: Path, qwen25: Path, five: Five, rule: str) -> None:
    same_everywhere(tmp_path, qwen25, five, rule, GRID)


def same_everywhere(folder: Path, base: Path, five: Five, rule: str, cases: Sequence[tuple[int, int, bool]]) -> None:
    """Tokens, targets, weights and drops of every global step, whatever the workers, processes and rows."""
    prepared = prepare(mixed(folder / "run", base, five, **RULES[rule]), QUIET)
    expected = global_steps(folder, prepared, Limits(128), 0, 1)
    assert len(expected) == FIRST and any(gone for _, gone in expected)
    for step, planned in zip(expected, prepared.plan.steps(), strict=False):
        assert sorted([m for m, *_ in step[0]] + [m for m, _ in step[1]]) == sorted(planned.members.tolist())
    for workers, ranks, packing in cases:
        found = global_steps(folder, prepared, Limits(128, packing=packing), workers, ranks)
        assert found == expected, (workers, ranks, packing)


def test_every_process_counts_the_whole_step(tmp_path: Path, qwen25: Path, clean: Five) -> None:
    """Without drops each rank knows the samples and weights of the global step; with drops it knows its own."""
    prepared = prepare(mixed(tmp_path / "run", qwen25, clean), QUIET)
    whole = content_of(prepared, Limits(128), 0, 0, 1)
    for rank in (0, 1):
        part = content_of(prepared, Limits(128), 0, rank, 2)
        assert {n: step[2:] for n, step in part.items()} == {n: step[2:] for n, step in whole.items()}
