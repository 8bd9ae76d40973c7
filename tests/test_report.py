"""The reporting part on a made-up run in the style of easy-VQA: what is written, what is shown, what fails safely."""

from __future__ import annotations

import csv
import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny
from PIL import Image, ImageDraw

from lensmith.config.yaml_file import Tree
from lensmith.core.errors import DataError
from lensmith.recipe.run import from_tree
from lensmith.report import plots, tables
from lensmith.report.metrics import MetricsWriter
from lensmith.report.page import write_report
from lensmith.report.run_folder import read_ledger

IMG_TAG = "<img src=x onerror=alert(1)>"
END_TAG = "</pre></script><script>alert(1)</script>"
COLORS = ("red", "green", "blue", "yellow", "teal", "brown", "gray", "black")
SHAPES = ("circle", "rectangle", "triangle")


def make_run(folder: Path, steps: int = 40, evil: str = "") -> Path:
    """A finished run; `evil` is put into every text that comes from data."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    _make_metrics(folder, steps, rng, evil)
    _make_ledger(folder, evil)
    _make_samples(folder, rng, evil)
    heldout = {
        "before": {"exact_match": 0.0123, "exact_match/open": 0.0, "exact_match/yes_no": 0.021},
        "after": {"exact_match": 0.8413, "exact_match/open": 0.802, "exact_match/yes_no": 0.868, f"extra{evil}": 1.5},
        "baseline": {"exact_match": 0.4127, "exact_match/open": 0.151, "exact_match/yes_no": 0.598},
        "swapped": {"exact_match": 0.3981, "exact_match/open": 0.142, "exact_match/yes_no": 0.571},
        "n": 9673,
    }
    summary = {
        "name": f"easy-vqa, SmolVLM-256M, LoRA r=8{evil}", "outcome": "finished", "steps": steps, "epochs": 1.0,
        "samples": 38575, "tokens": 3_912_004, "total_seconds": 5312.4, "peak_rss_bytes": 4_812_333_056,
        "tokens_per_second": 736.4, "heldout": heldout,
    }  # fmt: skip
    row = {"tensors": 98, "parameters": 256_484_928, "trainable": 0, "dtype": "bfloat16", "lr": None}
    parts = [
        {"part": "vision", **row, "weight_decay": None},
        {"part": f"projector{evil}", "tensors": 2, "parameters": 7_077_888, "trainable": 7_077_888, "dtype": "float32",
         "lr": 1e-4, "weight_decay": 0.0},
        {"part": "adapter", "tensors": 420, "parameters": 2_441_216, "trainable": 2_441_216, "dtype": "float32",
         "lr": 2e-4, "weight_decay": 0.0},
    ]  # fmt: skip
    totals = {"tensors": 520, "parameters": 266_004_032, "trainable": 9_519_104}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "trains.json").write_text(json.dumps({"rows": parts, "totals": totals}))
    (folder / "versions.json").write_text(json.dumps({"lensmith": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}))
    (folder / "run.yaml").write_text(
        f"model:\n  path: SmolVLM-256M-Instruct\ntune:\n  kind: lora\n  rank: 8\nnote: '{evil}'\n"
    )
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"\0" * 5000)
    if evil:
        (folder / f"{evil.replace('/', '')}.txt").write_text("x")
    return folder


def _make_metrics(folder: Path, steps: int, rng: random.Random, evil: str) -> None:
    writer = MetricsWriter(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        done = step / steps
        lr = 2e-4 * min(1, 10 * done) * 0.5 * (1 + math.cos(math.pi * done))
        norm = (0.4 + 2 * math.exp(-8 * done)) * rng.lognormvariate(0, 0.25)
        loss = 0.25 + 3 * math.exp(-9 * done) + 0.12 * rng.random()
        writer.write({
            "kind": "step", "step": step, "loss": math.nan if step == steps // 2 else loss,
            "lr": {"adapter": lr, "projector": lr / 2}, "grad_norm": norm,
            "grad_norm_parts": {"adapter": 0.8 * norm, f"projector{evil}": 0.5 * norm}, "tokens": 1620,
            "supervised": 48, "samples": 16, "tokens_per_second": rng.gauss(740, 25), "samples_per_second": 7.3,
            "rss_bytes": 4_600_000_000, "data_wait_seconds": 0.002, "step_seconds": 2.2, "padding": 0,
        })  # fmt: skip
        if step % (steps // 5) == 0:
            metrics = {"exact_match": 0.9 * done, f"exact_match/open{evil}": 0.8 * done}
            writer.write({"kind": "eval", "step": step, "loss": 0.4 + 2 * math.exp(-9 * done), "metrics": metrics})
            writer.write({"kind": "event", "name": f"checkpoint{evil}", "step": step})
    writer.close()


def _make_ledger(folder: Path, evil: str) -> None:
    rows = [_ledger_row("easy_vqa/train.jsonl", row, "train", "", "") for row in range(300)]
    rows += [_ledger_row("more.jsonl", row, "train", "", "") for row in range(80)]
    rows += [_ledger_row("more.jsonl", 80 + row, "drop", "TOO_LONG", "5,120 tokens > 4,096") for row in range(58)]
    rows += [_ledger_row("more.jsonl", 138, "drop", "IMAGE_MISSING", f"pictures/17.png{evil}")]
    rows += [_ledger_row("more.jsonl", 139, "drop", "IMAGE_BROKEN", '=HYPERLINK("http://x.example","click")')]
    pq.write_table(pa.Table.from_pylist(rows[::-1]), folder / "ledger.parquet")


def _ledger_row(source: str, row: int, verdict: str, reason: str, detail: str) -> dict[str, object]:
    return {
        "source": source, "row": row, "line": row + 1, "origin": f"{source}:{row + 1}", "verdict": verdict,
        "reason": reason, "detail": detail, "tokens": 101, "supervised": 3, "media_tokens": 64, "images": 1,
    }  # fmt: skip


def _make_samples(folder: Path, rng: random.Random, evil: str) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    samples: list[dict[str, object]] = []
    for number in range(11):
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        _draw(folder / f"samples/{number}.png", color, shape, rng)
        samples.append({
            "origin": f"easy_vqa/test.jsonl:{number * 31 + 7}", "question": f"what color is the {shape}?{evil}",
            "answer": color, "before": "The image shows a simple geometric shape on a plain background." + evil,
            "after": f"{color.capitalize()}." if number % 4 else rng.choice(COLORS), "group": "open",
            "image": f"samples/{number}.png",
        })  # fmt: skip
    samples[9]["image"] = "../../etc/passwd.png"
    samples[10]["image"] = None
    (folder / "samples.json").write_text(json.dumps(samples))


def _draw(path: Path, color: str, shape: str, rng: random.Random) -> None:
    image = Image.new("RGB", (64, 64), (rng.randint(228, 255),) * 3)
    x, y, half = rng.randint(18, 46), rng.randint(18, 46), rng.randint(9, 16)
    box = (x - half, y - half, x + half, y + half)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "rectangle":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=color)
    image.save(path)


# --- ledger, plots ---


def test_ledger_balances_and_keeps_the_origin_of_what_was_dropped(tmp_path: Path):
    ledger = read_ledger(make_run(tmp_path) / "ledger.parquet")
    more, vqa = ledger.counts
    assert (more.source, more.read, more.train) == ("more.jsonl", 140, 80)
    assert more.dropped == {"TOO_LONG": 58, "IMAGE_MISSING": 1, "IMAGE_BROKEN": 1}
    assert (vqa.read, vqa.train, vqa.tokens, vqa.supervised, vqa.images) == (300, 300, 30300, 900, 300)
    assert tables.ledger(ledger.counts).footer[1:5] == ("440", "380", "0", "60")
    assert next(iter(ledger.dropped_rows()))[0] == "more.jsonl:140"
    assert len(list(ledger.dropped_rows(5))) == 5 and len(list(ledger.dropped_rows())) == 60


def test_plots_change_no_global_setting_and_keep_spikes(tmp_path: Path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    records = [
        {"kind": "step", "step": n, "loss": 1.0, "lr": {"_a$\\frac$": 1e-4, "-->": 1e-5}} for n in range(1, 5001)
    ]
    records[3210]["loss"] = 9.0
    made = plots.figures(records)
    assert list(made) == ["loss", "lr"] and dict(matplotlib.rcParams) == before
    points = made["loss"].axes[0].lines[0]
    assert len(points.get_xdata()) <= plots.MAX_POINTS + 2 and 9.0 in points.get_ydata()
    svg = plots.inline_svg(made["lr"], "lr")
    assert len(svg) < 100_000 and "<!--" not in svg and "metadata" not in svg
    assert plots.figures([]) == {}


def test_parts_with_one_rate_are_one_line_and_wide_losses_are_logarithmic():
    rates = {"language": 1e-4, "embeddings": 1e-4, "vision": 1e-5}
    made = plots.figures([{"kind": "step", "step": n, "loss": 16 / n**2, "lr": rates} for n in range(1, 101)])
    assert [line.get_label() for line in made["lr"].axes[0].lines] == ["language, embeddings", "vision"]
    assert made["loss"].axes[0].get_yscale() == "log"
    assert plots.figures([{"kind": "step", "step": 1, "loss": 0.0}])["loss"].axes[0].get_yscale() == "linear"


def steps_of(stages: dict[str, int], sources: tuple[str, ...] = ("a", "b")) -> list[dict[str, object]]:
    """Step records of a curriculum; the loss of the n-th source is 2 n + 1."""
    names = [name for name, count in stages.items() for _ in range(count)]
    parts = {s: {"samples": 1, "tokens": 9, "supervised": 9 - n, "loss": 2.0 * n + 1} for n, s in enumerate(sources)}
    return [
        {"kind": "step", "step": n, "stage": stage, "loss": 1.0, "lr": {"x": 1e-4}, "sources": parts}
        for n, stage in enumerate(names, 1)
    ]


def test_stages_have_borders_and_lines_do_not_cross_them():
    records = steps_of({"text": 6, "mixed$_1$": 4, "a_very_long_name_of_a_stage": 5})
    records[7]["sources"] = {}
    made = plots.figures(records)
    assert list(made) == ["loss", "sources", "lr"]
    for name, figure in made.items():
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.texts] == ["text", "mixed$_1$", "a_very_long_name.."]
        borders = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in borders] == [6.5, 10.5], name
        curves = [line for line in axes.lines if line.get_linestyle() == "-"]
        gaps = [plots.np.flatnonzero(plots.np.isnan(line.get_ydata())).tolist() for line in curves]
        assert gaps == ([[6, 10]] * 2 if name == "sources" else [[6, 11]]), name
        assert "mixed" not in plots.inline_svg(figure, name).partition("<style")[0]
    assert plots.figures(steps_of({"": 5}))["loss"].axes[0].texts[:] == []


def test_sources_have_curves_where_there_are_several():
    assert "sources" not in plots.figures(steps_of({"": 5}, ("one",)))
    axes = plots.figures(steps_of({"": 5}))["sources"].axes[0]
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes.lines if line.get_linestyle() == "-"}
    assert curves == {"a": [1.0] * 5, "b": pytest.approx([3.0] * 5)}
    many = plots.figures(steps_of({"": 5}, tuple(f"s{n}" for n in range(9))))["sources"].axes[0]
    labels = [line.get_label() for line in many.lines if line.get_linestyle() == "-"]
    assert labels == [f"s{n}" for n in range(8)] and many.get_title(loc="left").endswith("(the 8 largest of 9)")


def test_a_run_that_only_evaluated_has_a_curve():
    records = [{"kind": "eval", "step": 0, "loss": 2.0, "metrics": {}}]
    assert plots.figures(records)["loss"].axes[0].lines[-1].get_ydata().tolist() == [2.0]


def test_key_figures_carry_their_units():
    summary = {
        "wall_seconds": {"train": 3725.0}, "peak_rss_bytes": 3 << 30, "samples": {"by_reason": {"IMG_COUNT": 5500}},
        "tokens_per_second": 1234.5, "exact_match": 0.5, "fill": 0.64321, "name": "n", "heldout": {"n": 1}, "git": None,
    }  # fmt: skip
    assert tables.key_figures(summary).rows == [
        ("wall: train", "1 h 02 min"), ("peak rss", "3.0 GiB"), ("samples: by reason: IMG_COUNT", "5,500"),
        ("tokens per second", "1,234"), ("exact match", "50.0 %"), ("fill", "0.6432"), ("name", "n"), ("git", "–"),
    ]  # fmt: skip
    frozen = tables.what_trains([{"part": "vision", "trainable": 0, "lr": 0.0, "weight_decay": 0.0}], {})
    assert frozen.rows[0][-2:] == ("–", "–")


def test_tables_of_sources_and_stages():
    one = {"source": "vqa", "samples": 1200, "tokens": 9000, "supervised": 800, "passes": 1.5, "loss_first": 2.0,
           "loss_last": None}  # fmt: skip
    assert tables.sources([one]).rows == []
    assert tables.sources([one, one]).rows[0] == ("vqa", "1,200", "1.50", "9,000", "800", "2.0000", "–")
    staged = tables.sources([{"stage": "s", **one}, {"stage": "t", **one}])
    assert staged.columns[:2] == ("Stage", "Source") and staged.rows[1][:2] == ("t", "vqa")
    samples = {"read": 9, "train": 7, "dropped": 2, "held_out": 0, "by_reason": {"TOO_LONG": 2}}
    stages = tables.stages([{"name": "s", "steps": 3, "samples": samples}])
    assert stages.rows == [("s", "3", "9", "7", "0", "2", "TOO_LONG=2")]
    assert tables.stages([{"name": "s", "steps": 3, "samples": {**samples, "dropped": 0}}]).columns[-1] == "Dropped"
    held = {"stages": {"s": {}, "t": {"before": {"loss": 2.0}, "after": {"loss": 1.0}}, "u": {"after": {"loss": 0.5}}}}
    assert tables.held_out_stages(held).rows == [
        ("t", "loss", "2.0000", "1.0000", "-1"), ("u", "loss", "–", "0.5000", "–"),
    ]  # fmt: skip
    even = {"ranks_predicted": 1.0, "rows_predicted": 1.156, "rows_measured": 1.07, "steps_predicted": 0.2,
            "steps_measured": 0.4}  # fmt: skip
    rows = [("balance of rows (measured)", "1.16 (1.07)"), ("balance of steps (measured)", "0.20 (0.40)")]
    assert tables.balance(even) == rows
    assert tables.balance({**even, "ranks_predicted": 1.25}) == [("balance of ranks", "1.25"), *rows]
    assert tables.balance({}) == []


def test_smoothing_is_a_mean_that_skips_nan():
    smoothed = plots.smooth(plots.np.array([2.0, math.nan, 4.0]), width=1e3)
    assert smoothed == pytest.approx([3.0, 3.0, 3.0])


# --- the page ---


class Elements(HTMLParser):
    """Tags, attributes and text as a browser would find them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.handlers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(attrs)
        self.links += [value or "" for name, value in attrs if name.rpartition(":")[2] in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: Path) -> Elements:
    parser = Elements()
    parser.feed(page.read_text("utf-8"))
    parser.close()
    return parser


def test_page_shows_the_run(tmp_path: Path):
    page = write_report(make_run(tmp_path / "run"))
    found = parse(page)
    assert found.tags.count("svg") == 4 and found.tags.count("article") == 11 and found.tags.count("img") == 9
    for text in (
        "84.1 %", "1.2 % →", "41.3 %", "39.8 %", "83.4 to 84.8 %", "266,004,032", "SmolVLM-256M-Instruct", "1 h 28 min",
        "First 50 of 60 dropped", "picture outside the run folder", "more.jsonl:140",
    ):  # fmt: skip
        assert text in found.text, text
    raw = page.read_text("utf-8")
    assert raw.startswith("<!doctype html>") and "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in raw
    assert raw.count('class="good" title="right"') == 8 and found.handlers == []
    assert "script" not in found.tags and not [link for link in found.links if link.startswith(("http", "//"))]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob("*.tmp"))
    ids = [part.split('"')[0] for part in raw.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_page_of_a_curriculum_tells_what_the_summary_tells(tmp_path: Path, qwen25: Path):
    chat = tiny.make_chat(tmp_path / "data", 8)
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": "red circle " * (9 + n)}) + "\n" for n in range(8)))
    train = [{"path": str(docs)}, {"path": str(chat), "share": 2}]
    values = {
        "model": {"path": str(qwen25)}, "data": {"train": str(docs), "max_tokens": 256, "workers": 0},
        "batch": {"samples": 4}, "train": {"epochs": 1, "device": "cpu", "threads": 1}, "output": str(tmp_path / "out"),
        "stages": [
            {"name": "text", "tune": {"kind": "freeze", "train": ["language"]}},
            {"name": "mixed", "tune": "full", "data": {"train": train, "mixture": "shares", "eval": str(docs)}},
            {"name": "lora", "tune": {"kind": "lora", "rank": 2}, "data": {"train": str(chat)}},
        ],
    }  # fmt: skip
    out = runs.quiet_train(from_tree(Tree(values), None))
    raw, summary = (out.folder / "report.html").read_text("utf-8"), out.summary
    assert [(s["name"], s["steps"]) for s in summary["stages"]] == [("text", 2), ("mixed", 4), ("lora", 2)]
    assert cells(raw, "sources") == [
        *tables.stages(summary["stages"]).rows, *tables.sources(summary["sources"]).rows,
    ]  # fmt: skip
    assert sum(s["samples"] for s in summary["sources"] if s["stage"] == "mixed") == 16
    after = summary["heldout"]["stages"]["mixed"]["after"]["loss"]
    first = cells(raw, "quality")[0]
    assert first[0] == "mixed" and f"{after:.4f}" in first
    text = parse(out.folder / "report.html").text
    assert "Stages and sources" in text and "In the last stage." in text and "balance of rows (measured)" in text
    assert "{'" not in text and raw.count("<svg") == 5
    assert [c[0] for c in cells(raw, "ledger")][:4] == ["text/docs", "mixed/docs", "mixed/train", "lora/train"]


def cells(page: str, section: str) -> list[tuple[str, ...]]:
    """The rows of the tables of a section."""
    part = page.split(f'<section id="{section}">')[1].split("</section>")[0]
    bodies = "".join(re.findall(r"<tbody>(.*?)</tbody>", part, re.DOTALL))
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", bodies, re.DOTALL)
    ]
    return [tuple(html.unescape(cell) for cell in row) for row in rows]


def test_a_run_with_one_source_has_no_table_of_sources(tmp_path: Path):
    run = make_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    one = {
        "source": "a",
        "samples": 9,
        "tokens": 9,
        "supervised": 3,
        "passes": 1.0,
        "loss_first": 1.0,
        "loss_last": 0.5,
    }
    before = parse(write_report(run)).tags
    (run / "summary.json").write_text(json.dumps({**summary, "stages": [], "sources": [one], "balance": {}}))
    assert parse(write_report(run)).tags == before


def test_hostile_names_of_stages_and_sources_stay_text(tmp_path: Path):
    evil = IMG_TAG + END_TAG
    samples = {"read": 9, "train": 7, "dropped": 2, "held_out": 0, "by_reason": {evil: 2}}
    source = {"stage": evil, "source": evil, "samples": 9, "tokens": 9, "supervised": 3, "passes": None,
              "loss_first": None, "loss_last": 0.5}  # fmt: skip
    summary = {"stages": [{"name": evil, "steps": 1, "samples": samples}], "sources": [source, source],
               "heldout": {"stages": {evil: {"after": {evil: 1.0}}}}}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for record in steps_of({evil: 2, "b": 2}, (evil, "c")):
        writer.write(record)
    writer.close()
    found = parse(write_report(tmp_path))
    assert "script" not in found.tags and "img" not in found.tags and found.handlers == []
    assert found.text.count(evil) == 8 and found.tags.count("svg") == 3


@pytest.mark.parametrize("evil", [IMG_TAG, END_TAG, "\"' autofocus onfocus=alert(1) {{ 7*7 }}", "\u202e\x1b\x00\ud800"])
def test_hostile_text_adds_no_element(tmp_path: Path, evil: str):
    harmless = parse(write_report(make_run(tmp_path / "a", evil="plain")))
    name = evil.replace("\x00", "").replace("\ud800", "")
    run = make_run(tmp_path / "b", evil=name)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "name": evil, f"figure{evil}": evil, "outcome": evil}))
    hostile = parse(write_report(run))
    assert hostile.tags.count("script") == hostile.tags.count("x") == 0 and hostile.handlers == []
    page_tags = [tag for tag in hostile.tags if tag not in ("path", "use", "g", "defs", "clippath", "rect")]
    extra = ["div", "dt", "dd"]  # the one key figure that was added
    plain_tags = [tag for tag in harmless.tags if tag not in ("path", "use", "g", "defs", "clippath", "rect")]
    assert sorted(page_tags) == sorted([*plain_tags, *extra])
    assert not [link for link in hostile.links if ":" in link and not link.startswith("data:image/")]
    assert "{{ 7*7 }}" in hostile.text or "7*7" not in evil


def test_dropped_rows_are_no_formulas_in_a_spreadsheet(tmp_path: Path):
    write_report(make_run(tmp_path))
    rows = list(csv.reader((tmp_path / "dropped.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 61 and rows[0] == ["origin", "source", "reason", "detail"]
    assert rows[1] == ["more.jsonl:140", "more.jsonl", "IMAGE_BROKEN", '\'=HYPERLINK("http://x.example","click")']


def test_every_file_is_optional_and_a_broken_one_is_named(tmp_path: Path):
    assert write_report(tmp_path).name == "report.html"
    for name in ("metrics.jsonl", "summary.json", "trains.json", "samples.json", "versions.json", "ledger.parquet"):
        (tmp_path / name).write_text('["half\n')
        with pytest.raises(DataError, match=name):
            write_report(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="absent"):
        write_report(tmp_path / "absent")


def test_a_picture_that_is_none_is_said_so(tmp_path: Path):
    run = make_run(tmp_path)
    (run / "samples/0.png").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    (run / "samples/1.png").unlink()
    found = parse(write_report(run))
    assert "picture cannot be decoded" in found.text and "picture file not found" in found.text
