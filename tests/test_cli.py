"""The command line: exit codes, one clear error, JSON lines, what is imported when, and text that cannot draw."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from lensmith import __version__
from lensmith.cli import main

ENV = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out
        return int(caught.value.code or 0), out, err

    return call


def write_run(folder: Path, model: Path, data: Path, **over: Any) -> Path:
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(data), "max_tokens": 512, "workers": 0, "max_dropped": 1.0},
        "batch": {"samples": 8},
        "tune": {"kind": "lora", "rank": 2},
        "train": {"max_steps": 2, "device": "cpu", "threads": 1},
        "output": "out",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**values, **over}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, qwen25: Path) -> tuple[Path, str]:
    """(run file, stdout) of one finished run, trained with --json."""
    folder = tmp_path_factory.mktemp("trained")
    env = {**ENV, "LENSMITH_CACHE": str(folder / "cache")}
    path = write_run(folder, qwen25, tiny.make_chat(folder, 12))
    done = subprocess.run(
        [sys.executable, "-m", "lensmith", "train", str(path), "--json"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def said_once(err: str, code: str) -> str:
    """The text of the one error on stderr; no traceback."""
    assert "Traceback" not in err and "defect" not in err
    errors = re.findall(r"^\[[A-Z_]+\]", err, re.MULTILINE)
    assert errors[0] == f"[{code}]"
    return err


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["check"], ["check", "--nope", "x"], ["show", "run.yaml", "abc"], ["export", "a"], []]
)
def test_a_wrong_command_line_is_64(arguments: list[str], cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli(*arguments)
    assert code == 64
    assert "Traceback" not in err and ("Usage" in err or "Usage" in out)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["train", "--help"], ["show", "-h"], ["--version"]])
def test_help_and_version_are_0(arguments: list[str], cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli(*arguments)
    assert code == 0 and not err
    assert out.strip() == __version__ if arguments == ["--version"] else "Usage" in out


@pytest.mark.parametrize("command", ["train", "check", "show"])
def test_a_wrong_run_file_is_64(command: str, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    more = ["0"] if command == "show" else []
    code, out, err = cli(command, tmp_path / "none.yaml", *more)
    assert code == 64 and not out
    assert "No such file" in said_once(err, "RUN_FILE")
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {train: x.jsonl}\noptimizer: {lrr: 1}\n")
    code, out, err = cli(command, tmp_path / "run.yaml", *more)
    assert code == 64 and not out
    assert said_once(err, "UNKNOWN_KEY").splitlines() == [
        f"[UNKNOWN_KEY] {tmp_path}/run.yaml:3 optimizer.lrr: unknown key 'lrr'",
        "  -> did you mean 'lr'?",
    ]
    code, out, err = cli(command, tmp_path / "run.yaml", *more, "lr")
    assert code == 64 and "'lr': not of the form" in said_once(err, "OVERRIDE")


def test_wrong_data_is_65(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    data = tiny.make_chat(tmp_path, 3)
    data.write_text(data.read_text(encoding="utf-8") + '{"messages": 3}\n', encoding="utf-8")
    run = write_run(tmp_path, qwen25, data)
    for command in (["train", run], ["check", run], ["show", run, 0], ["train", run, "--json"], ["check", run, "-q"]):
        code, _, err = cli(*command)
        assert code == 65 and "[SCHEMA] train.jsonl:4: messages: is int" in said_once(err, "SCHEMA")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_no_data_is_64(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = cli("check", write_run(tmp_path, qwen25, tmp_path / "none.jsonl"))
    assert code == 64 and "none.jsonl" in said_once(err, "NO_FILES")


def test_a_wrong_model_is_66(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    data = tiny.make_chat(tmp_path, 2)
    code, _, err = cli("check", write_run(tmp_path, tmp_path / "model", data))
    assert code == 66 and "'gpt2'" in said_once(err, "MODEL_TYPE")
    code, _, err = cli("train", write_run(tmp_path, tmp_path / "no model", data))
    assert code == 66
    said_once(err, "MODEL_PATH")
    code, _, err = cli("export", tmp_path, tmp_path / "new")
    assert code == 66
    said_once(err, "CHECKPOINT")


def test_a_defect_is_70_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("lensmith.migrate.convert.load_any", broken)
    code, _, err = cli("check", tmp_path / "run.yaml")
    assert code == 70
    assert "Traceback" in err and "of ours" in err and "defect of lensmith" in err


def test_a_run_that_cannot_go_on_is_74(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    run = write_run(tmp_path, qwen25, tiny.make_chat(tmp_path, 3))
    (tmp_path / "out").mkdir()
    hold = (
        "import sys; from pathlib import Path; from lensmith.recipe.folder import Lock\n"
        f"Lock(Path({str(tmp_path / 'out' / 'lock')!r})).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        code, _, err = cli("train", run)
    assert code == 74 and f"process {other.pid} is running" in said_once(err, "LOCKED")
    (tmp_path / "file").write_text("")
    code, _, err = cli("train", run, "output=file/out")
    assert code == 74 and str(tmp_path / "file") in said_once(err, "MACHINE")


def test_a_full_disk_is_74(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("lensmith.migrate.convert.load_any", full)
    code, _, err = cli("check", tmp_path / "run.yaml")
    assert code == 74 and "No space left on device" in said_once(err, "MACHINE")


def test_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]) -> None:
    from lensmith.engine.loop import Interrupted

    for error, wanted in ((KeyboardInterrupt(), 130), (Interrupted(15, 3), 143), (Interrupted(2, 3), 130)):

        def stopped(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("lensmith.migrate.convert.load_any", stopped)
        code, _, err = cli("check", tmp_path / "run.yaml")
        assert code == wanted and "Traceback" not in err


def test_a_closed_pipe_is_no_defect(tmp_path: Path) -> None:
    read, wrote = os.pipe()
    os.close(read)
    with os.fdopen(wrote, "w") as closed:
        command = [sys.executable, "-m", "lensmith", "schema"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, env=ENV)
    assert done.returncode != 70 and "defect" not in done.stderr


# --- what a command says ----------------------------------------------------------------------------------------------


def records(out: str) -> list[dict[str, Any]]:
    lines = out.splitlines()
    found = [json.loads(line) for line in lines]
    assert lines and all(isinstance(r, dict) and r["event"] for r in found)
    return found


def test_json_lines_of_a_training(trained: tuple[Path, str]) -> None:
    run, out = trained
    found = {r["event"]: r for r in records(out)}
    assert {"index", "what_trains", "start", "checkpoint", "done"} <= set(found)
    assert found["index"]["read"] == found["index"]["train"] + found["index"]["dropped"] == 12
    assert found["start"]["steps"] == 2
    assert Path(found["done"]["report"]).is_file() and Path(found["checkpoint"]["path"]).is_dir()
    assert (run.parent / "out" / "summary.json").is_file()


def test_check(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    data = tiny.make_chat(tmp_path, 10)
    gone = {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a <|im_end|>"}]}
    with data.open("a") as file:
        file.write(
            json.dumps({**gone, "images": ["gone.png"]})
            + "\n"
            + json.dumps({**gone, "images": ["images/0.png"]})
            + "\n"
        )
    run = write_run(tmp_path, qwen25, data)
    code, out, err = cli("check", run)
    assert code == 0 and not err
    assert "read 12 = train 11 + dropped 1" in out and "IMG_MISSING" in out and "train.jsonl:11" in out
    assert re.search(r"special_in_text\s+1\s", out) and "2 steps of 8 samples" in out
    code, out, err = cli("check", run, "--json")
    assert code == 0 and not err
    found = {r["event"]: r for r in records(out)}
    assert list(found["dropped"]["rows"][0].values()) == ["train.jsonl:11", "IMG_MISSING", "no such file"]
    assert list(found["notes"]["rows"][0].values()) == ["special_in_text", "1", "train.jsonl:12"]
    assert list(found["data"]["rows"][0].values())[:2] == ["train", "11"] and found["plan"]["steps"] == 2
    code, out, err = cli("check", run, "--quiet")
    assert code == 0 and not out and err == "warning: 1 of 12 rows are dropped: 1 IMG_MISSING\n"
    assert not (tmp_path / "out").exists()
    code, _, err = cli("check", run, "batch.samples=50", "batch.partial=drop")
    assert code == 65 and "11 samples do not fill one step" in said_once(err, "NO_STEPS")


def test_show(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"<image>{ask}"}, {"role": "assistant", "content": answer}],
            "images": [image],
        }
        for ask, answer, image in (("Red?\nBlue \\n?", "yes", "images/0.png"), ("", "no", "x.png"))
    ]
    tiny.make_pictures(tmp_path, 1)
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = write_run(tmp_path, qwen25, data)
    code, out, _ = cli("show", run, 0)
    assert code == 0 and "image tokens" in out and "t.jsonl:1: " in out
    assert "Red?⏎\nBlue \\n?<|im_end|>" in out
    code, out, _ = cli("show", run, 0, "--json")
    (record,) = records(out)
    trained = "".join(t for t, on in zip(record["tokens"], record["trained"], strict=True) if on)
    assert trained == "yes<|im_end|>" and record["images"][0]["path"] == "images/0.png"
    assert record["ids"].count(tiny.token_id("<|image_pad|>")) == record["images"][0]["tokens"]
    code, out, _ = cli("show", run, 1)
    assert code == 0 and "is dropped: IMG_MISSING" in out
    code, _, err = cli("show", run, 2)
    assert code == 64 and "rows 0 to 1" in said_once(err, "SAMPLE")


def test_dry_run_keeps_nothing(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    run = write_run(tmp_path, qwen25, tiny.make_chat(tmp_path, 10))
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = cli("train", run, "--dry-run", "data.cache=cache")
    assert code == 0 and "nothing is kept" in out
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "cache" not in str(p)] == []


def test_quiet_training_says_nothing(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    run = write_run(tmp_path, qwen25, tiny.make_chat(tmp_path, 8))
    code, out, err = cli("train", run, "--quiet", "train.max_steps=1")
    assert code == 0 and not out and "Traceback" not in err
    assert (tmp_path / "out" / "report.html").is_file()


def test_schema_is_json(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli("schema")
    assert code == 0 and not err and {"model", "data", "tune"} <= set(json.loads(out)["properties"])


def test_report(trained: tuple[Path, str], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    page = trained[0].parent / "out" / "report.html"
    before = page.read_bytes()
    page.unlink()
    code, out, _ = cli("report", page.parent, "--json")
    assert code == 0 and records(out)[-1]["path"] == str(page)
    assert len(page.read_bytes()) > len(before) // 2
    code, _, err = cli("report", tmp_path / "none")
    assert code == 65
    said_once(err, "RUN_FOLDER")


def test_export(trained: tuple[Path, str], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    folder = trained[0].parent / "out"
    code, out, _ = cli("export", folder, tmp_path / "merged", "--json")
    assert code == 0 and records(out)[-1]["path"] == str(tmp_path / "merged")
    assert {"config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "merged").iterdir()}
    assert list((tmp_path / "merged").glob("*.safetensors"))
    code, _, err = cli("export", folder, tmp_path / "merged")
    assert code == 64
    said_once(err, "OUTPUT")
    code, _, err = cli("export", folder, tmp_path / "other", "--dtype", "int8")
    assert code == 64
    said_once(err, "DTYPE")
    code, _, _ = cli("export", folder, tmp_path / "adapter", "--no-merge", "-q")
    assert code == 0 and (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not list(tmp_path.glob(".*")), "a staging folder was left"


def test_a_run_folder_stands_for_its_run_file(
    trained: tuple[Path, str], cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = cli("check", trained[0].parent / "out", "--json")
    assert code == 0 and records(out), err


# --- text that must not draw ------------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07\r\n[ERROR] fake\u202e"
DRAWS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_names_and_texts_cannot_draw(tmp_path: Path, qwen25: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    folder = tmp_path / f"data {EVIL}".replace("/", "")
    tiny.make_pictures(folder, 1)
    (folder / "images" / f"p{EVIL}.png").write_bytes(b"\x1b[2Jno picture")
    ask = {"role": "user", "content": f"<image>{EVIL}"}
    rows = [
        {"messages": [ask, {"role": "assistant", "content": EVIL}], "images": ["images/0.png"]},
        {"messages": [ask, {"role": "assistant", "content": EVIL}], "images": [f"images/p{EVIL}.png"]},
    ]
    data = folder / f"t{EVIL}.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = write_run(tmp_path, qwen25, data)
    spoken = []
    for command in (["check", run], ["show", run, 0], ["show", run, 1], ["train", run, "train.max_steps=1"]):
        code, out, err = cli(*command)
        assert code == 0, err
        spoken.append(out + err)
    code, out, _ = cli("check", run, "--json")
    spoken.append(out)
    records(out)
    wrong = [
        {"messages": 3}, {f"k{EVIL}": 1}, {"messages": [{"role": EVIL, "content": "x"}]}, {"a": {f"k{EVIL}": "\ud800"}},
        {"messages": [ask, {"role": "assistant", "content": "x"}], "images": [f"../{EVIL}"]},
        {"messages": [ask, {"role": "assistant", "content": "x"}], "images": [f"http://{EVIL}"]},
    ]  # fmt: skip
    for row in wrong:
        data.write_text(json.dumps(rows[0]) + "\n" + json.dumps(row) + "\n")
        code, out, err = cli("check", run)
        assert code == 65
        spoken.append(out + err)
    code, out, err = cli("check", run, f"tune={EVIL}")
    assert code == 64
    spoken.append(out + err)
    for position, text in enumerate(spoken):
        assert not DRAWS.search(text), ascii(DRAWS.search(text))
        lines = text.splitlines() if position != 1 else []  # `show` breaks the lines of a sample where its text does
        assert not any(line.startswith("[ERROR]") for line in lines), text


# --- what is imported, and how long it takes --------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "pydantic", "numpy", "pyarrow", "PIL", "peft", "yaml", "matplotlib", "tokenizers")


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENV, check=True)
    return {name.split(".")[0] for name in done.stderr.splitlines()}


def best_seconds(*command: str) -> float:
    """Of five runs, wall time of the whole process."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, env=ENV, check=True)
        times.append(time.perf_counter() - begin)
    return min(times)


def test_import_lensmith_loads_nothing_heavy() -> None:
    assert not modules_after("import lensmith; lensmith.__version__; lensmith.__all__") & {*HEAVY, "typer", "rich"}


def test_help_loads_nothing_heavy() -> None:
    ask = "from lensmith.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not modules_after(ask) & set(HEAVY)


def test_a_wrong_run_file_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    arguments = ["check", str(tmp_path / "none.yaml")]
    ask = f"from lensmith.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    assert not modules_after(ask) & {"torch", "transformers", "peft", "matplotlib"}


def test_start_times_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, never judged: a busy machine must not fail a test. Aims: import below 0.3 s, --help below 0.5 s."""
    figures = {
        "python -c pass": best_seconds("-c", "pass"),
        "import lensmith": best_seconds("-c", "import lensmith"),
        "lensmith --help": best_seconds("-m", "lensmith", "--help"),
    }
    with capsys.disabled():
        print("\n" + ", ".join(f"{name}: {seconds:.3f} s" for name, seconds in figures.items()))
    assert all(figures.values())


def test_every_command_has_help(cli: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = cli("--help")
    commands = re.findall(r"^│ ([a-z]+) {2,}\S", out.partition("Commands")[2], re.MULTILINE)
    assert {"train", "check", "show", "export", "report", "schema"} <= set(commands)
    for command in commands:
        code, out, _ = cli(command, "--help")
        assert code == 0 and command in out
