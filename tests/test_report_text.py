"""What the run says in text: metrics.jsonl, sinks, the terminal, and the escapes all of them rest on."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from lensmith.config.build import build, json_schema
from lensmith.config.part import Part
from lensmith.config.yaml_file import parse_tree
from lensmith.core.errors import ConfigError, DataError
from lensmith.report import tables
from lensmith.report.escape import cell_safe, html_safe, terminal_safe
from lensmith.report.metrics import MetricsWriter, read_metrics
from lensmith.report.sinks import MLflow, SinkConfig, Sinks, TensorBoard, Trackio, WandB, flatten, make_sinks
from lensmith.report.terminal import Terminal

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
    assert flatten(record) == {"step": 3, "eval/exact_match/open": 0.5}


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
    monkeypatch.setitem(sys.modules, config.package, None)
    with pytest.raises(ConfigError) as error:
        config.check()
    assert error.value.code == "MISSING_PACKAGE" and error.value.remedy == f"pip install {config.package}"


def test_a_sink_is_named_or_spelled_out():
    class Options(Part):
        sinks: list[SinkConfig]

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
    *"\u2066\u2067\u2068\u2069",
    "\ud800",
]
HOSTILE = st.text(st.one_of(st.sampled_from([*UNSAFE, *"<>&;#x'\"=+-@["]), st.characters()))


@given(HOSTILE)
@example("".join(UNSAFE))
def test_terminal_safe_is_one_printable_line(text: str):
    safe = terminal_safe(text)
    assert not set(safe) & set(UNSAFE) and len(safe.splitlines()) <= 1
    safe.encode()
    if not set(text) & {*UNSAFE, *map(chr, range(0xD800, 0xE000))}:
        assert safe == text


class Parser(HTMLParser):
    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(HOSTILE)
@example("".join(UNSAFE))
def test_html_safe_is_text_only(text: str):
    found = Parser(f'<p title="{html_safe(text)}">{html_safe(text)}</p>')
    assert found.tags == [("p", {"title": found.text})]
    assert not set(found.text) & (set(UNSAFE) - {"\n", "\t"})
    found.text.encode()
    if terminal_safe(text) == text:
        assert found.text == text


@given(HOSTILE)
@example("".join(UNSAFE))
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
    assert lines[0]["loss"] is None and lines[2]["rows"][0]["Parameters"] == lines[2]["total"]["Parameters"] == "1,000"


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
