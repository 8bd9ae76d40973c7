"""The reporting part on a made-up run in the style of easy-VQA: what is written, what is shown, what fails safely."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pydantic import TypeAdapter

from lensmith.config.build import build, json_schema
from lensmith.config.part import Part
from lensmith.config.yaml_file import parse_tree
from lensmith.core.errors import ConfigError, DataError
from lensmith.report import plots, tables
from lensmith.report.escape import cell_safe, html_safe, terminal_safe
from lensmith.report.metrics import MetricsWriter, read_metrics
from lensmith.report.page import write_report
from lensmith.report.run_folder import read_ledger
from lensmith.report.sinks import MLflow, SinkConfig, Sinks, TensorBoard, Trackio, WandB, flatten, make_sinks
from lensmith.report.terminal import Terminal

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
        f"model:\n  path: SmolVLM-256M-Instruct\ntune:\n  kind: lora\n  rank: 8\nnote: '{evil}'\nbatch:\n  samples: 16\n"
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
            "grad_norm_parts": {"adapter": 0.8 * norm, f"projector{evil}": 0.5 * norm}, "tokens": 1620, "supervised": 48,
            "samples": 16, "tokens_per_second": rng.gauss(740, 25), "samples_per_second": 7.3, "rss_bytes": 4_600_000_000,
            "data_wait_seconds": 0.002, "step_seconds": 2.2, "padding": 0,
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
        "source": source, "row": row, "line": row + 1, "origin": f"{source}:{row + 1}", "verdict": verdict, "reason": reason,
        "detail": detail, "tokens": 101, "supervised": 3, "media_tokens": 64, "images": 1,
    }  # fmt: skip


def _make_samples(folder: Path, rng: random.Random, evil: str) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    samples: list[dict[str, object]] = []
    for number in range(11):
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        _draw(folder / f"samples/{number}.png", color, shape, rng)
        samples.append({
            "origin": f"easy_vqa/test.jsonl:{number * 31 + 7}", "question": f"what color is the {shape}?{evil}", "answer": color,
            "before": "The image shows a simple geometric shape on a plain background." + evil,
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


# --- metrics.jsonl ---


def test_metrics_round_trip_with_non_finite_numbers(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"kind": "step", "step": 1, "loss": math.nan, "lr": {"a": 1e-5, "b": -math.inf}, "ids": [1, math.inf]})
    writer.write({"kind": "step", "step": 2, "loss": 0.5})
    writer.close()
    first, second = read_metrics(path)
    assert first == {
        "kind": "step", "step": 1, "loss": None, "lr": {"a": 1e-5, "b": None}, "ids": [1, None],
        "nonfinite": ["loss", "lr.b", "ids.1"],
    }  # fmt: skip
    assert second == {"kind": "step", "step": 2, "loss": 0.5}


def test_metrics_lines_are_on_disk_at_once_and_ascii(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"kind": "event", "name": "\r\n[ERROR] fake \u202e\x1b[2J\ud800"})
    raw = (tmp_path / "metrics.jsonl").read_bytes()
    writer.close()
    assert raw.count(b"\n") == 1 and raw.isascii() and all(byte >= 0x20 for byte in raw[:-1])


def test_truncate_after_leaves_each_step_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 8):
        writer.write({"kind": "step", "step": step, "loss": 1.0})
    writer.write({"kind": "event", "name": "interrupted"})
    writer.truncate_after(4)
    for step in range(5, 10):
        writer.write({"kind": "step", "step": step, "loss": 2.0})
    writer.close()
    records = read_metrics(path)
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [r["loss"] for r in records if r["kind"] == "step"] == [1.0] * 4 + [2.0] * 5
    assert [r["name"] for r in records if r["kind"] == "event"] == ["interrupted"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_a_half_last_line_is_forgiven(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"kind": "step", "step": 1}\n'
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert read_metrics(path) == [{"kind": "step", "step": 1}]
    writer = MetricsWriter(path)
    writer.write({"kind": "step", "step": 2})
    writer.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    path.write_bytes(whole + whole[:9] + b"\n" + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []


# --- sinks ---

STEP = {"kind": "step", "step": 3, "loss": 0.5, "lr": {"language": 1e-5}, "grad_norm": None, "nonfinite": ["grad_norm"]}


class Broken:
    """A sink whose library fails from its third record on."""

    def __init__(self):
        self.calls: list[str] = []

    def open(self, run_name: str, config: dict) -> None:
        print("Welcome to Broken!")
        self.calls.append("open")

    def step(self, record: dict) -> None:
        self.calls.append("step")
        if self.calls.count("step") == 3:
            raise ConnectionError("server gone")

    def close(self) -> None:
        self.calls.append("close")


def test_flatten_names_and_finite_numbers_only():
    assert flatten(STEP) == {"step": 3, "train/loss": 0.5, "train/lr/language": 1e-5}
    record = {"kind": "eval", "step": 3, "loss": math.inf, "metrics": {"exact_match/open": 0.5}}
    assert flatten(record) == {"step": 3, "eval/metrics/exact_match/open": 0.5}


def test_tensorboard_holds_the_numbers_and_a_resume_hides_what_came_after(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 6), (5, 8)):  # the second run resumes from the checkpoint of step 4
        writer = MetricsWriter(tmp_path / "metrics.jsonl")
        writer.truncate_after(first - 1)
        sinks = Sinks(writer, make_sinks([TensorBoard()], tmp_path, first), pytest.fail)
        sinks.open("run", {"seed": 1})
        for step in range(first, last + 1):
            sinks.write({**STEP, "step": step, "loss": step * first})
        sinks.write({"kind": "event", "name": "checkpoint", "step": last})
        sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/lr/language"]
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 25.0), (6, 30.0), (7, 35.0), (8, 40.0)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == expected
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "step"] == list(range(1, 9))


def test_a_failing_sink_is_switched_off_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    warnings: list[str] = []
    broken = Broken()
    sinks = Sinks(MetricsWriter(tmp_path / "metrics.jsonl"), {"broken": broken}, warnings.append)
    sinks.open("run", {})
    for step in range(1, 6):
        sinks.write({**STEP, "step": step})
    sinks.close()
    assert broken.calls == ["open", "step", "step", "step"]
    assert sinks.lost == {"broken": 3}
    assert len(warnings) == 1 and "ConnectionError: server gone" in warnings[0]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5]
    off = {"kind": "event", "name": "sink_off", "sink": "broken", "reason": "ConnectionError: server gone", "step": 3}
    assert [r for r in records if r["kind"] == "event"] == [off]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("config", [TensorBoard(), WandB(), Trackio(), MLflow()], ids=lambda config: config.kind)
def test_a_missing_package_is_one_clear_error(config: TensorBoard, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, config.package, None)
    with pytest.raises(ConfigError) as error:
        config.check()
    assert error.value.code == "MISSING_PACKAGE" and error.value.remedy == f"pip install {config.package}"


def test_a_sink_is_named_or_spelled_out():
    class Options(Part):
        sinks: list[SinkConfig] = []

    given = build(Options, parse_tree("sinks:\n  - tensorboard\n  - kind: wandb\n    project: p\n"))
    assert given.sinks == [TensorBoard(), WandB(project="p")]
    assert TypeAdapter(SinkConfig).validate_python("mlflow") == MLflow()
    assert "trackio" in json.dumps(json_schema(Options))
    for text, found in (("sinks: [tensorbord]", "tensorbord"), ("sinks: [{kind: wandb, projct: p}]", "project")):
        with pytest.raises(ConfigError, match=found):
            build(Options, parse_tree(text))
    with pytest.raises(ConfigError, match="SINK_TWICE"):
        make_sinks([TensorBoard(), TensorBoard()], Path())
    TensorBoard().check()


# --- escapes ---

UNSAFE = [
    *map(chr, range(32)),
    *map(chr, range(127, 160)),
    *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e",
    "\u2066",
    "\ud800",
]
HOSTILE = st.text(st.one_of(st.sampled_from([*UNSAFE, "\x1b[2J", *"<>&'\"=+-@"]), st.characters()))


@given(HOSTILE)
def test_terminal_safe_is_one_printable_line(text: str):
    safe = terminal_safe(text)
    assert not set(safe) & set(UNSAFE) and len(safe.splitlines()) <= 1
    safe.encode()
    if not set(text) & {*UNSAFE, *map(chr, range(0x2066, 0x206A)), *map(chr, range(0xD800, 0xE000))}:
        assert safe == text


@given(HOSTILE)
def test_html_safe_is_text_only(text: str):
    parser = Elements()
    parser.feed(f'<p title="{html_safe(text)}">{html_safe(text)}</p>')
    parser.close()
    assert parser.tags == ["p"] and parser.attributes.keys() == {"title"}
    assert parser.text == parser.attributes["title"] == (html_safe(text).unescape() if text else parser.text)
    html_safe(text).encode()


@given(HOSTILE)
def test_cell_safe_is_no_formula_and_one_row(text: str):
    safe = cell_safe(text)
    assert not safe.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) and not set(safe) & set(UNSAFE)
    file = io.StringIO()
    csv.writer(file).writerow([safe, "next"])
    assert file.getvalue().count("\n") == 1
    assert next(csv.reader([file.getvalue()])) == [safe, "next"]


def test_escapes_by_example():
    assert terminal_safe("\x1b[2Ja\r\n[ERROR] b\u202e\x9b") == r"\x1b[2Ja\r\n[ERROR] b\u202e\x9b"
    assert (
        cell_safe('=HYPERLINK("x")') == '\'=HYPERLINK("x")'
        and cell_safe("\t1") == "'\\t1"
        and cell_safe("a=1") == "a=1"
    )
    assert html_safe("a\r\nb\t<\x00\u202e") == r"a" "\n" "b\t&lt;" r"\x00\u202e"


# --- terminal ---


def test_json_mode_is_json_lines_only(capsys: pytest.CaptureFixture[str]):
    terminal = Terminal("json")
    terminal.event("start", "Hello \x1b[2J", run=Path("x").name, loss=math.nan)
    terminal.warning("careful")
    terminal.show("what_trains", tables.what_trains([{"part": "vision", "parameters": 1000}], {"parameters": 1000}))
    with terminal.progress("index", 3) as progress:
        progress.advance(3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["start", "warning", "what_trains"]
    assert lines[0]["loss"] is None and lines[2]["rows"][0]["Parameters"] == "1,000"


def test_quiet_mode_prints_warnings_only(capsys: pytest.CaptureFixture[str]):
    terminal = Terminal("quiet")
    terminal.event("start", "Hello")
    terminal.show("ledger", tables.ledger([]))
    with terminal.progress("index", 3) as progress:
        progress.advance(3)
    terminal.warning("disk\nfull")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "warning: disk\\nfull\n"


def test_normal_mode_escapes_and_reads_no_markup():
    out = io.StringIO()
    terminal = Terminal(out=out)
    terminal.event("start", "[bold]a[/bold] \x1b[2J\n[ERROR] :smile:")
    terminal.warning("[/] w")
    terminal.show("t", tables.Table("T", ("[red]A",), [("x\r\ny",), ("[/b]",)], footer=("\x1b]0;",)))
    assert "[bold]a[/bold] \\x1b[2J\\n[ERROR] :smile:\nwarning: [/] w\n" in out.getvalue()
    assert "\x1b" not in out.getvalue() and all(
        part in out.getvalue() for part in ("[red]A", r"x\r\ny", "[/b]", r"\x1b]0;")
    )


def test_progress_lines_are_throttled_and_say_what_is_left(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("lensmith.report.terminal.time.monotonic", lambda: now[0])
    for mode, every, emitted in (("json", 5.0, 4), ("normal", 30.0, 1)):
        now[0], out = 0.0, io.StringIO()
        with Terminal(mode, out=out).progress("index", 40) as progress:
            for _ in range(20):
                now[0] += 1.0
                progress.advance(2, "x.jsonl")
        assert out.getvalue().count("\n") == emitted + (mode == "json"), every
    assert "index: 40/40 in 20.0 s, x.jsonl" in out.getvalue()
    assert progress.eta_seconds == 0


def test_a_brief_bar_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    out.isatty = lambda: True
    with Terminal(out=out).progress("index\n", None) as progress:
        progress.advance(2, "note\x1b[2J")
    assert "\x1b[2J" not in out.getvalue() and out.getvalue().endswith("\x1b[2K")


# --- ledger, plots ---


def test_ledger_balances_and_keeps_the_origin_of_what_was_dropped(tmp_path: Path):
    ledger = read_ledger(make_run(tmp_path) / "ledger.parquet")
    more, vqa = ledger.counts
    assert (more.source, more.read, more.train) == ("more.jsonl", 140, 80)
    assert more.dropped == {"TOO_LONG": 58, "IMAGE_MISSING": 1, "IMAGE_BROKEN": 1}
    assert (vqa.read, vqa.train, vqa.tokens, vqa.supervised, vqa.images) == (300, 300, 30300, 900, 300)
    assert tables.ledger(ledger.counts).footer[1:4] == ("440", "380", "60")
    assert next(iter(ledger.dropped_rows()))[0] == "more.jsonl:140"
    assert len(list(ledger.dropped_rows(5))) == 5 and len(list(ledger.dropped_rows())) == 60


def test_plots_change_no_global_setting_and_keep_spikes(tmp_path: Path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    records = [{"kind": "step", "step": n, "loss": 1.0, "lr": {"_a$\\frac": 1e-4}} for n in range(1, 5001)]
    records[3210]["loss"] = 9.0
    made = plots.figures(records)
    assert list(made) == ["loss", "lr"] and dict(matplotlib.rcParams) == before
    points = made["loss"].axes[0].lines[0]
    assert len(points.get_xdata()) <= plots.MAX_POINTS + 2 and 9.0 in points.get_ydata()
    assert len(plots.inline_svg(made["lr"], "lr")) < 100_000
    assert plots.figures([]) == {}


def test_smoothing_is_a_mean_that_skips_nan():
    smoothed = plots.smooth(plots.np.array([2.0, math.nan, 4.0]), width=1e6)
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
    for text in ("84.1 %", "1.2 % →", "41.3 %", "39.8 %", "83.4 to 84.8 %", "266,004,032", "SmolVLM-256M-Instruct",
                 "First 50 of 60 dropped", "picture outside the run folder", "1 h 28 min", "more.jsonl:140"):  # fmt: skip
        assert text in found.text, text
    raw = page.read_text("utf-8")
    assert raw.startswith("<!doctype html>") and "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in raw
    assert raw.count('class="good" title="right"') == 7 and found.handlers == []
    assert "script" not in found.tags and not [link for link in found.links if link.startswith(("http", "//"))]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob("*.tmp"))
    ids = [part.split('"')[0] for part in raw.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


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
    rows = list(csv.reader((tmp_path / "dropped.csv").open()))
    assert len(rows) == 61 and rows[0] == ["origin", "source", "reason", "detail"]
    assert rows[1] == ["more.jsonl:140", "more.jsonl", "IMAGE_BROKEN", '\'=HYPERLINK("http://x.example","click")']


def test_every_file_is_optional_and_a_broken_one_is_named(tmp_path: Path):
    assert "report.html" == write_report(tmp_path).name
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
