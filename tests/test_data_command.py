"""`lensmith data`: exact figures of a small data set with planted drops and duplicates, its files, and its escapes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
from PIL import Image, ImageFile
from test_report import parse

from lensmith.config.yaml_file import Tree
from lensmith.core.errors import ConfigError
from lensmith.data.describe import bin_width
from lensmith.data.duplicates import Contents, crossings, findings, hash_index, mixed
from lensmith.recipe.data import data, planned
from lensmith.recipe.prepare import prepare
from lensmith.recipe.run import Located, from_tree
from lensmith.report import data_tables
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
EVIL = "[red]\x1b[2J<img src=x onerror=alert(1)>\u202e$x_1$"


def picture(path: Path, size: tuple[int, int], seed: int | None) -> Path:
    """Noise, or one colour."""
    rng = np.random.default_rng(seed)
    flat = np.full((size[1], size[0], 3), 7, np.uint8)
    pixels = flat if seed is None else rng.integers(0, 256, flat.shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def chat(image: str, asked: str = "Z", answer: str = "ZZ") -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"<image>{asked}"}, {"role": "assistant", "content": answer}],
        "images": [image],
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(folder: Path, model: Path, /, **over: Any) -> Located:
    """Two sources in shares, and held-out data. A document of n Z has n + 1 tokens, all but the first supervised; no
    merge of the tiny tokenizer has a Z."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "docs.jsonl", [{"text": "Z" * n} for n in (9, 9, 19, 139)])
    a = picture(folder / "a.png", (56, 56), 1)
    (folder / "b.png").write_bytes(a.read_bytes())
    (folder / "c.png").write_bytes(a.read_bytes())
    picture(folder / "own.png", (56, 84), 2)
    picture(folder / "flat.png", (30, 28), None)
    whole = picture(folder / "cut.png", (300, 200), 3).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "none.png").write_text("no picture")
    rows = [
        chat("a.png"),
        chat("b.png", "other"),
        chat("a.png"),
        chat("b.png"),
        chat("gone.png"),
        chat("none.png"),
        chat("a.png", "Z" * 200),
        chat("flat.png"),
        chat("cut.png"),
    ]
    write(folder / "chat.jsonl", rows)
    write(folder / "eval.jsonl", [chat("a.png"), chat("c.png", "new"), chat("own.png")])
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {
            "train": [
                {"path": str(folder / "docs.jsonl"), "share": 1, "weight": 0.5},
                {"path": str(folder / "chat.jsonl"), "share": 3},
            ],
            "eval": str(folder / "eval.jsonl"), "mixture": "shares", "max_tokens": 120, "workers": 0,
        },
        "batch": {"samples": 4, "device_tokens": 256},
        "train": {"epochs": 2, "device": "cpu", "threads": 1},
        "output": str(folder / "out"),
    }  # fmt: skip
    return from_tree(Tree(runs.merge(values, over)), None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, qwen25: Path) -> tuple[dict[str, Any], Path]:
    """(what the command returned with --hash, folder)."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENSMITH_CACHE", str(folder / "cache"))
        return data(make(folder, qwen25), QUIET, hashes=True), folder / "out"


def sources(found: dict[str, Any]) -> list[dict[str, Any]]:
    return found["stages"][0]["sources"]


# --- from the index ---------------------------------------------------------------------------------------------------


def test_rows_samples_and_lengths(found: tuple[dict[str, Any], Path]) -> None:
    docs, _ = sources(found[0])
    assert (docs["name"], docs["rows"], docs["read"], docs["samples"], docs["dropped"]) == ("docs", 4, 5, 5, 0)
    assert (docs["documents_cut"], docs["pieces"]) == (1, 2)
    # 10, 10, 20 tokens; 140 tokens are cut into 120 and 20
    assert docs["tokens"] == {"sum": 180, "mean": 36.0, "median": 20, "p95": 120, "max": 120}
    assert docs["supervised"] == 180 - 5 and docs["trained_share"] == 175 / 180
    assert found[0]["stages"][0]["bin_tokens"] == 5
    assert {n: c for n, c in enumerate(docs["lengths"]) if c} == {1: 2, 3: 2, 23: 1}  # bin 1 holds 6 to 10 tokens
    assert (docs["images"], docs["media_tokens"], docs["pictures"]) == (0, 0, None)


def test_drops_by_reason_with_their_first_origin(found: tuple[dict[str, Any], Path]) -> None:
    _, of_chat = sources(found[0])
    assert (of_chat["rows"], of_chat["read"], of_chat["samples"], of_chat["dropped"]) == (9, 9, 6, 3)
    reasons = {reason: (r["samples"], r["first"].rpartition(":")[2]) for reason, r in of_chat["by_reason"].items()}
    assert reasons == {"IMG_MISSING": (1, "5"), "IMG_FORMAT": (1, "6"), "TOO_LONG": (1, "7")}
    assert of_chat["by_reason"]["TOO_LONG"]["detail"].endswith("> 120")
    stage = found[0]["stages"][0]
    assert stage["warnings"][-1] == (
        "21.4% of the rows are dropped, more than data.max_dropped = 0.05: the run would stop"
    )


def test_pictures(found: tuple[dict[str, Any], Path]) -> None:
    of_chat = sources(found[0])[1]
    assert of_chat["images"] == 6 and of_chat["videos"] == 0
    shown = of_chat["pictures"]
    assert shown["count"] == 6 and shown["distinct_sizes"] == 3
    assert shown["sizes"] == [[56, 56, 4], [30, 28, 1], [300, 200, 1]]
    assert shown["width"] == {"min": 30, "median": 56, "max": 300}
    assert shown["height"] == {"min": 28, "median": 56, "max": 200}
    assert shown["mean_pixels"] == (4 * 56 * 56 + 30 * 28 + 300 * 200) / 6
    # the tiny model's limits are 56 x 56 and 224 x 224
    assert (shown["enlarged_share"], shown["reduced_share"]) == (1 / 6, 1 / 6)


def test_what_the_run_draws(found: tuple[dict[str, Any], Path], qwen25: Path, tmp_path: Path) -> None:
    stage = found[0]["stages"][0]
    docs, of_chat = (s["planned"] for s in sources(found[0]))
    assert (stage["mixture"], stage["steps"], stage["samples_drawn"]) == ("shares", 6, 22)  # two epochs of 11 samples
    assert (docs["share"], of_chat["share"], docs["loss_weight"], of_chat["loss_weight"]) == (0.25, 0.75, 0.5, 1.0)
    assert docs["samples"] + of_chat["samples"] == 22 and docs["samples"] in (5, 6)
    assert docs["passes"] == docs["samples"] / 5 and of_chat["passes"] == of_chat["samples"] / 6
    assert docs["tokens"] == docs["samples"] * 36
    assert docs["token_share"] + of_chat["token_share"] == pytest.approx(1)
    prepared = prepare(make(tmp_path, qwen25, data={"max_dropped": 1.0}), QUIET)
    assert drawn_by_walking(prepared) == [docs["samples"], of_chat["samples"]]


def drawn_by_walking(prepared: Any) -> list[int]:
    members = np.concatenate([step.members for step in prepared.plan.steps()])
    return np.bincount(prepared.train.column("source")[members], minlength=len(prepared.train.sources)).tolist()


@pytest.mark.parametrize(
    "over",
    [
        {"batch": {"partial": "drop"}},
        {"batch": {"partial": "epoch_end"}},
        {"batch": {"partial": "drop"}, "train": {"epochs": 2.6}},
        {"train": {"epochs": 1.3}},
        {"train": {"epochs": None, "max_steps": 4}},
        {"batch": {"samples": None, "tokens": 100}},
        {"batch": {"samples": None, "tokens": 100, "partial": "epoch_end"}, "train": {"epochs": 1.7}},
    ],
)
@pytest.mark.parametrize("mixture", ["concat", "shares"])
def test_draws_are_counted_as_the_plan_draws(tmp_path: Path, qwen25: Path, over: dict[str, Any], mixture: str) -> None:
    own = runs.merge({"data": {"max_dropped": 1.0, "mixture": mixture}}, over)
    prepared = prepare(make(tmp_path, qwen25, **own), QUIET)
    steps, drawn = planned(prepared)
    assert steps == len(list(prepared.plan.steps())) and drawn == drawn_by_walking(prepared)


def test_held_out_data_has_its_own_figures(found: tuple[dict[str, Any], Path]) -> None:
    stage = found[0]["stages"][0]
    (held,) = stage["held_out"]
    assert (held["name"], held["rows"], held["samples"], held["images"]) == ("eval", 3, 3, 3)
    assert stage["eval_in_train"] == 1 and "planned" not in held


def test_a_split_by_picture_is_counted_once(tmp_path: Path, qwen25: Path) -> None:
    located = make(tmp_path, qwen25, data={"eval": [], "holdout": 0.5, "mixture": "concat"}, train={"seed": 3})
    stage = data(located, QUIET)["stages"][0]
    for source in stage["sources"]:
        assert source["read"] == source["samples"] + source["held_out"] + source["dropped"]
    assert sum(s["held_out"] for s in stage["sources"]) == sum(s["samples"] for s in stage["held_out"]) > 0
    assert all(not s["dropped"] and s["rows"] <= s["samples"] for s in stage["held_out"])


def test_bins_are_of_round_widths() -> None:
    assert [bin_width(n) for n in (0, 40, 41, 80, 81, 200, 201, 400, 4096, 32_768)] == [
        1, 1, 2, 2, 5, 5, 10, 10, 200, 1000,
    ]  # fmt: skip


# --- with --hash ------------------------------------------------------------------------------------------------------


def rows_of(group: dict[str, Any]) -> list[str]:
    return [origin.rpartition("/")[2] for origin in group["origins"]]


def test_pictures_by_their_bytes(found: tuple[dict[str, Any], Path]) -> None:
    train = found[0]["stages"][0]["duplicates"]["train"]
    pictures = train["pictures"]
    assert (pictures["files"], pictures["distinct"], pictures["copies"], pictures["across_sources"]) == (4, 3, 1, 0)
    (group,) = pictures["first"]
    assert (group["count"], rows_of(group), group["files"]) == (2, ["chat.jsonl:1", "chat.jsonl:2"], ["a.png", "b.png"])
    assert (train["one_colour"]["pictures"], train["one_colour"]["samples"]) == (1, 1)
    assert train["one_colour"]["first"][0].endswith("chat.jsonl:8")
    (reason,) = train["undecodable"]
    assert reason == "IMG_TRUNCATED" and train["undecodable"][reason]["first"][0].endswith("chat.jsonl:9")


def test_texts_and_samples(found: tuple[dict[str, Any], Path]) -> None:
    train = found[0]["stages"][0]["duplicates"]["train"]
    # 4 documents and 6 conversations; Z -> ZZ stands under a, a, b, flat and cut
    assert (train["texts"]["rows"], train["texts"]["distinct"], train["texts"]["repeats"]) == (10, 5, 5)
    assert [g["count"] for g in train["texts"]["first"]] == [5, 2]
    assert rows_of(train["texts"]["first"][1]) == ["docs.jsonl:1", "docs.jsonl:2"]
    # a = b, so rows 1, 3 and 4 are one sample
    assert (train["samples"]["distinct"], train["samples"]["repeats"]) == (7, 3)
    assert rows_of(train["samples"]["first"][0]) == ["chat.jsonl:1", "chat.jsonl:3", "chat.jsonl:4"]
    assert train["samples"]["across_sources"] == 0


def test_both_sides_of_the_split(found: tuple[dict[str, Any], Path]) -> None:
    both = found[0]["stages"][0]["duplicates"]["both"]
    assert (both["pictures"], both["samples_with_pictures"], both["samples"]) == (1, 2, 1)
    (pair,) = both["first_samples"]
    assert pair["held_out"].endswith("eval.jsonl:1") and pair["train"].endswith("chat.jsonl:1")
    assert found[0]["stages"][0]["duplicates"]["held_out"]["pictures"]["copies"] == 1  # a.png and c.png


def test_sources_that_share_pictures(tmp_path: Path, qwen25: Path) -> None:
    located = make(tmp_path, qwen25)
    write(tmp_path / "more.jsonl", [chat("c.png"), chat("own.png", "Z", "other")])
    paths = [str(tmp_path / "chat.jsonl"), str(tmp_path / "more.jsonl")]
    located = make(tmp_path, qwen25, data={"train": [{"path": path} for path in paths]})
    train = data(located, QUIET, hashes=True)["stages"][0]["duplicates"]["train"]
    assert (train["pictures"]["across_sources"], train["samples"]["across_sources"]) == (1, 1)


def test_the_order_of_pictures_tells_samples_apart() -> None:
    texts, contents = np.array([5, 5, 5, 5, 6], np.uint64), np.array([1, 2, 2, 1, 1, 2, 1], np.uint64)
    one, two, three, none, other = mixed(texts, np.array([2, 2, 2, 0, 1]), contents)
    assert one == three and len({one, two, none, other}) == 4


def test_several_processes_find_the_same(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lensmith.data.duplicates.PARALLEL_FROM", 1)
    monkeypatch.setattr("lensmith.data.duplicates.CHUNK", 2)
    prepared = prepare(make(tmp_path, qwen25, data={"max_dropped": 1.0}), QUIET)
    seen: list[Any] = []
    for workers in (1, 2):
        contents, done = Contents(), []
        train = hash_index(prepared.train, contents, workers=workers, progress=done.append)
        assert prepared.held is not None and sum(done) == 11
        held = hash_index(prepared.held, contents, workers=workers)
        seen.append((findings(train, contents), findings(held, contents), crossings(train, held, contents)))
        assert len(contents.handles) == 6  # a, b, c, own, flat, cut: each was read once
    assert seen[0] == seen[1]


def test_pictures_in_the_rows(tmp_path: Path, qwen25: Path) -> None:
    """`data:` URLs are compared by the bytes they hold."""
    import base64

    located = make(tmp_path, qwen25)
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    write(tmp_path / "chat.jsonl", [chat(url), chat("a.png", "other")])
    train = data(located, QUIET, hashes=True)["stages"][0]["duplicates"]["train"]
    assert train["pictures"]["copies"] == 1 and train["pictures"]["first"][0]["files"] == ["", "a.png"]


def test_videos_by_their_files_and_by_their_frames(tmp_path: Path, qwen25: Path) -> None:
    located = make(tmp_path, qwen25)
    film = tiny.make_video(8)
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(film)
    turn = [{"role": "user", "content": "<video>Z"}, {"role": "assistant", "content": "Z"}]
    shown: list[Any] = ["a.mp4", "b.mp4", ["a.png", "own.png"], ["b.png", "own.png"], ["own.png", "a.png"]]
    picture(tmp_path / "own.png", (56, 56), 2)
    write(tmp_path / "chat.jsonl", [{"messages": turn, "videos": [video]} for video in shown])
    located = make_again(located, data={"eval": []})
    stage = data(located, QUIET, hashes=True)["stages"][0]
    of_chat, train = stage["sources"][1], stage["duplicates"]["train"]
    assert (of_chat["videos"], of_chat["images"], of_chat["pictures"]) == (5, 0, None)
    assert (train["pictures"]["files"], train["pictures"]["copies"]) == (5, 2)  # two videos, three pictures
    assert [g["count"] for g in train["samples"]["first"]] == [2, 2, 2]  # two documents, videos, and rows of frames


def make_again(located: Located, **over: Any) -> Located:
    """The same run with changes; files stay as they are."""
    return from_tree(
        Tree(runs.merge({**located.run.model_dump(mode="json"), "output": str(located.output)}, over)), None
    )


def test_no_pixel_is_decoded_without_hash(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise AssertionError("a picture is decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    located = make(tmp_path, qwen25)
    assert data(located, QUIET)["stages"][0]["duplicates"] is None
    with pytest.raises(AssertionError, match="decoded"):
        data(located, QUIET, hashes=True)


# --- what is written and said -----------------------------------------------------------------------------------------


def test_the_files(found: tuple[dict[str, Any], Path]) -> None:
    told, folder = found
    assert sorted(p.name for p in folder.iterdir()) == ["data.html", "data.json"]
    assert json.loads((folder / "data.json").read_text("ascii")) == told
    assert (told["schema"], told["hashed"], len(told["stages"])) == (1, True, 1)
    page = parse(folder / "data.html")
    assert page.tags.count("svg") == 4 and "script" not in page.tags and page.handlers == []
    assert not [link for link in page.links if ":" in link or link.startswith("//")]
    for text in ("180", "IMG_MISSING", "21.4% of the rows", "chat.jsonl:2 (b.png)", "56 x 56", "75.0 %"):
        assert text in page.text, text
    raw = (folder / "data.html").read_text("utf-8")
    ids = [part.split('"')[0] for part in raw.split(' id="')[1:]]
    assert len(ids) == len(set(ids)) and "default-src 'none'" in raw


def test_tables_fit_a_terminal_of_80_columns(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    out.isatty = lambda: True
    data(make(tmp_path, qwen25), Terminal(out=out), hashes=True)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    tables = shown[shown.index("Data that trains") :]
    assert [line for line in tables.splitlines() if len(line) > 80 and "data.html" not in line] == []
    for text in ("Tokens per sample", "What the run draws", "Dropped", "Held-out data", "On both sides", "IMG_FORMAT"):
        assert text in tables, text


def test_tables_of_large_data_fit_too(found: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million samples of ten billion tokens."""
    monkeypatch.setenv("COLUMNS", "80")

    def large(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: large(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [large(v) for v in value]
        known = {"sum": 12_345_678_901, "tokens": 12_345_678_901, "median": 4096, "min": 1024, "max": 8192,
                 "mean_pixels": 12_345_678.9, "media_tokens": 12_345_678_901}  # fmt: skip
        counts = ("samples", "rows", "read", "dropped", "images", "documents_cut", "pieces", "repeats", "held_out")
        return known.get(key, 12_345_678 if key in counts else value)

    out = io.StringIO()
    out.isatty = lambda: True
    terminal = Terminal(out=out)
    for name, table in data_tables.of_stage(large(found[0]["stages"][0])):
        terminal.show(name, table)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert [line for line in shown.splitlines() if len(line) > 80] == [] and "…" not in shown
    assert shown.count("12,345,678,901") > 5


def test_json_mode_is_one_object_a_line(tmp_path: Path, qwen25: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = data(make(tmp_path, qwen25), Terminal("json"), hashes=True)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [event["event"] for event in events]
    assert {"index", "plan", "data", "lengths", "mixture", "dropped", "held_out", "duplicates"} <= set(names)
    assert Path(events[-1]["json"]).read_text() and events[-1]["page"].endswith("data.html")
    rows = next(e for e in events if e["event"] == "data" and "rows" in e)["rows"]
    assert [row["Tokens"] for row in rows] == [f"{s['tokens']['sum']:,}" for s in sources(told)]


def test_hostile_names_are_escaped(tmp_path: Path, qwen25: Path) -> None:
    located = make(tmp_path, qwen25)
    evil = EVIL.replace("/", "")
    (tmp_path / f"{evil}.jsonl").write_bytes((tmp_path / "chat.jsonl").read_bytes())
    train = [{"path": str(tmp_path / "docs.jsonl")}, {"path": str(tmp_path / "chat.jsonl"), "name": EVIL}]
    more = [{"path": f"{tmp_path}/[[]red[]]*.jsonl"}]
    located = make(tmp_path, qwen25, data={"train": [*train, *more], "eval": more})
    out = io.StringIO()
    data(located, Terminal(out=out), hashes=True)
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue() and r"\x1b[2J" in out.getvalue()
    page = parse(located.output / "data.html")
    assert "img" not in page.tags and page.handlers == [] and r"\x1b[2J<img src=x onerror=alert(1)>" in page.text
    assert json.loads((located.output / "data.json").read_text("ascii"))["stages"][0]["sources"][1]["name"] == EVIL


def test_a_curriculum(tmp_path: Path, qwen25: Path) -> None:
    located = make(tmp_path, qwen25, stages=[
        {"name": "text", "data": {"train": str(tmp_path / "docs.jsonl"), "eval": [], "mixture": "concat"}},
        {"name": "both", "train": {"max_steps": 2}},
    ])  # fmt: skip
    told = data(located, QUIET, hashes=True, output=tmp_path / "other")
    first, second = told["stages"]
    assert (first["name"], first["steps"], [s["name"] for s in first["sources"]]) == ("text", 3, ["docs"])
    assert (second["name"], second["steps"], [s["name"] for s in second["sources"]]) == ("both", 2, ["docs", "chat"])
    assert first["held_out"] == [] and first["duplicates"]["both"] is None and second["duplicates"]["both"]["pictures"]
    page = parse(tmp_path / "other" / "data.html")
    assert "Stage text" in page.text and "#stage-1" in page.links and not located.output.exists()


def test_a_stream_is_not_counted(tmp_path: Path, qwen25: Path) -> None:
    over = {"data": {"stream": {}, "mixture": "concat"}, "train": {"max_steps": 5}}
    stage = data(make(tmp_path, qwen25, **over), QUIET)["stages"][0]
    assert (stage["streamed"], stage["steps"]) == (True, 5) and "sources" not in stage


def test_the_command_loads_no_weights(tmp_path: Path, qwen25: Path) -> None:
    located = make(tmp_path, qwen25)
    run = tmp_path / "run.yaml"
    run.write_text(located.resolved_yaml(), encoding="utf-8")
    call = f"main(['data', {str(run)!r}, 'batch.samples=2', '--json', '--output', {str(tmp_path / 'page')!r}])"
    code = (
        f"import sys\nfrom lensmith.cli import main\ntry:\n    {call}\nexcept SystemExit as done:\n    code = done.code"
    )
    loaded = "print(code, *({'torch', 'transformers', 'peft'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{loaded}"], capture_output=True, text=True, check=True)
    assert done.stderr.split() in (["0"], ["None"]), done.stderr
    assert json.loads((tmp_path / "page" / "data.json").read_text())["stages"][0]["steps"] == 11
    assert all(json.loads(line) for line in done.stdout.splitlines())


def test_wrong_rows_are_refused_as_everywhere(tmp_path: Path, qwen25: Path) -> None:
    with pytest.raises(ConfigError):
        make(tmp_path, qwen25, data={"mixture": "share"})


def test_tiny_tokens() -> None:
    """What the expected numbers above rest on."""
    assert not [token for token in json.loads(tiny.tokenizer_json())["model"]["vocab"] if "Z" in token and token != "Z"]
