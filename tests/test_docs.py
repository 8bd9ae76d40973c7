"""The documentation says what the code does: links, commands, options, run files, rows, codes and modules exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import runs
import tiny
import typer

from lensmith.cli import app
from lensmith.config.build import apply_overrides, build
from lensmith.config.yaml_file import Tree, parse_tree
from lensmith.data.formats import detect, parse_compared
from lensmith.recipe.options import options_page
from lensmith.recipe.run import Run, from_tree, load_run

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lensmith"
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
MINIMAL = {"model": {"path": "m"}, "data": {"train": [{"path": "train.jsonl"}]}}
FILES = ("py", "json", "jsonl", "yaml")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def all_blocks(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page.name}-{n}") for page in PAGES for n, text in enumerate(blocks(page, language))
    ]


# --- links ------------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {"".join(c for c in head.lower().replace(" ", "-") if c.isalnum() or c in "-_") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    names = [p.name for p in [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*")] if p.is_file()]
    assert [name for name in names if name != "index.md" and name not in index] == []


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[Any]:
    """Every `lensmith ...` in code, inline or in a block, and in the comments of the examples."""
    places = [(page.name, page.read_text(encoding="utf-8")) for page in PAGES]
    for name, text in places:
        inline = re.findall(r"`(lensmith [^`\n]+)`", text)
        lines = [line.strip() for _, block in FENCE.findall(text) for line in block.splitlines()]
        for command in [*inline, *(line for line in lines if line.startswith("lensmith "))]:
            yield pytest.param(command.partition("  ")[0], id=f"{name}: {command[:50]}")
    for path in sorted(ROOT.glob("examples/*.yaml")):
        for command in re.findall(r"^# +(lensmith .*?)(?:  .*)?$", path.read_text(encoding="utf-8"), re.MULTILINE):
            yield pytest.param(command, id=f"{path.name}: {command[:50]}")


@pytest.mark.parametrize("command", list(commands()))
def test_commands(command: str) -> None:
    """The command and its options exist, its arguments fit, and its overrides name options of a run."""
    group: Any = typer.main.get_command(app)
    words = shlex.split(command.partition(" > ")[0], comments=True)[1:]
    if words[0].startswith("-") or words[0] == "...":
        return
    assert words[0] in group.commands, command
    own = {flag for p in group.commands[words[0]].params for flag in (*p.opts, *p.secondary_opts)}
    assert [w for w in words[1:] if w.startswith("-") and w not in {*own, "--help", "-h"}] == []
    overrides = [w for w in words[1:] if "=" in w]
    build(Run, apply_overrides(Tree({**MINIMAL, "tune": "lora"}), overrides))


def test_options_named_in_prose_exist() -> None:
    """`batch.samples`, `data.image.max_bytes`: dotted names of options in code spans."""
    known = {f"{heading}.{key}" for heading, keys in option_tables().items() for key in keys}
    groups = {name.partition(".")[0] for name in known}
    wrong = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", prose(page))
        if name.partition(".")[0] in groups and name not in known and name.split(".")[-1] not in FILES
    ]
    assert wrong == []


def option_tables() -> dict[str, list[str]]:
    """Heading (without kinds and list marks) -> keys, read off the options page."""
    tables: dict[str, list[str]] = {}
    heading = ""
    for line in options_page().splitlines():
        if found := re.match(r"#+ `([^`:]+)", line):
            heading = found[1].replace("[]", "")
        elif found := re.match(r"\| `(\w+)` \|", line):
            tables.setdefault(heading, []).append(found[1])
    return tables


# --- run files and rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", all_blocks("yaml"))
def test_run_files_in_the_pages(text: str) -> None:
    """Each block is a run file, or a part of one."""
    tree = parse_tree(text, "page")
    from_tree(Tree({**MINIMAL, **tree.values}, "page", tree.lines), None)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_example_run_files(path: Path) -> None:
    located = load_run(path)
    assert located.output == ROOT / "examples" / "runs" / path.stem


def test_the_examples_show_every_way_of_tuning() -> None:
    runs = [load_run(path).run for path in ROOT.glob("examples/*.yaml")]
    assert {run.tune.kind for run in runs} == {"full", "freeze", "lora"}
    assert len({run.model.path.split("-VL")[0] for run in runs}) == 3


@pytest.mark.parametrize("text", all_blocks("json"))
def test_rows_in_the_pages(text: str) -> None:
    for line in text.splitlines():
        row = json.loads(line)
        compare = "labels" if "label" in row else "pairs" if "chosen" in row else None
        layout = detect(row, "page", compare)
        found = layout.parse(row, "page") if compare is None else parse_compared(layout, row, "page", compare)
        assert found.content


def test_the_options_page_is_that_of_the_fields() -> None:
    page = (ROOT / "docs" / "run_file.md").read_text(encoding="utf-8")
    assert page == options_page(), "python -m lensmith.recipe.options > docs/run_file.md"


def test_every_option_is_described() -> None:
    rows = [line for line in options_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


# --- the run folder ---------------------------------------------------------------------------------------------------


def table(page: str, heading: str) -> set[str]:
    """Code spans in the first column of the tables below a heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w./]+)`", row)}


def test_the_run_folder_is_as_described(tmp_path: Path, qwen25: Path) -> None:
    chat = tiny.make_chat(tmp_path / "data", 24, pictures=8)
    run = runs.located(
        tmp_path / "run", qwen25, chat, tune={"kind": "lora"}, data={"holdout": 0.3},
        evaluate={"generate": {"max_new_tokens": 2, "swapped": True}}, train={"max_steps": 2},
    )  # fmt: skip
    out = runs.quiet_train(run)
    found = {p.name + "/" * p.is_dir() for p in out.folder.iterdir()}
    assert found <= table("run_folder.md", "# The run folder") and "summary.json" in found
    summary = json.loads((out.folder / "summary.json").read_text(encoding="utf-8"))
    nested = ("samples", "tokens", "heldout")
    keys = {key for key in summary if key not in nested} | {f"{n}.{key}" for n in nested for key in summary[n]}
    assert keys == table("run_folder.md", "## summary.json") - {"heldout"}
    records = [json.loads(line) for line in (out.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    events = {record["name"] for record in records if record["kind"] == "event"}
    assert {*steps[0], *events} - {"kind"} <= table("run_folder.md", "## metrics.jsonl")
    assert table("run_folder.md", "## metrics.jsonl") - {*steps[0]} <= {
        "objective",
        "checkpoint",
        "dropped",
        "early_stop",
        "excluded",
        "incident",
        "incident_lost",
        "roll_back",
        "save_begun",
        "sink_off",
        "spike",
        "straggler",
    }
    assert set(pq.read_schema(out.folder / "ledger.parquet").names) == table("run_folder.md", "## ledger.parquet")


# --- codes and modules ------------------------------------------------------------------------------------------------


def raised(*kinds: str) -> set[str]:
    """Codes that the data path raises: first argument of `Drop(...)`, `DataError(...)`, `place.error(...)`."""
    found: set[str] = set()
    files = [*PACKAGE.glob("data/**/*.py"), *PACKAGE.glob("family/*.py"), *PACKAGE.glob("recipe/*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            codes = [a.value for a in ast.walk(node.args[0]) if isinstance(a, ast.Constant)]
            found |= {c for c in codes if name in kinds and isinstance(c, str) and re.fullmatch(r"[A-Z][A-Z0-9_]+", c)}
    return found


def listed(heading: str) -> set[str]:
    """First column of the table under a heading of docs/data.md."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.split(f"### {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))


def test_codes_of_bad_data_are_those_the_code_raises() -> None:
    assert listed("SKIP") == raised("Drop")
    assert listed("FAIL") == raised("DataError", "error")


def modules() -> set[str]:
    return {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}


def tree_of_the_page() -> dict[str, str]:
    """Path -> what the tree of docs/architecture.md says about it."""
    tree = next(t for t in FENCE.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))[1]
    found: dict[str, str] = {}
    above: list[str] = []
    for line in tree.splitlines()[1:]:
        indent, name, about = re.fullmatch(r"( +)(\S+) *(.*)", line).groups()  # type: ignore[union-attr]
        above = above[: len(indent) // 2 - 1]
        found["".join([*above, name])] = about
        above.append(name)
    return found


def test_the_tree_of_modules() -> None:
    tree = tree_of_the_page()
    assert {path for path in tree if path.endswith(".py")} == modules()
    assert [path for path in tree if not (PACKAGE / path).exists()] == []
    assert [path for path, about in tree.items() if not about and path != "assets/"] == []
    folders = {
        p.relative_to(PACKAGE).as_posix() + "/" for p in PACKAGE.rglob("*") if p.is_dir() and any(p.glob("*.py"))
    }
    assert folders <= set(tree)


def test_the_layers_are_those_of_the_contract() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    said = page.split("## Who may import whom", 1)[1].split("```")[1].split("\n")[1:-1]
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in config["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    assert said == [layer.replace("lensmith.", "") for layer in contract["layers"]]


def test_modules_named_in_prose_exist() -> None:
    """`lensmith/data/encode.py`, `data/encode.py`, `tests/tiny.py`, `qwen3_vl_lora_sft.yaml`."""
    for page in PAGES:
        for name in re.findall(r"`([\w./]+\.(?:py|yaml|jinja))`", prose(page)):
            places = [
                folder / name for folder in (ROOT, PACKAGE, PACKAGE / "quickstart", ROOT / "examples", page.parent)
            ]
            known = name in ("run.yaml", "messages.py") or "NAME" in name
            assert known or any(place.exists() for place in places), f"{page.name}: {name}"
