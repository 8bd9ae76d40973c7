"""The run file that a LLaMA-Factory file becomes, and the decisions as a table."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lensmith.config.yaml_file import dump
from lensmith.core.errors import ConfigError
from lensmith.migrate.convert import Migrated
from lensmith.migrate.draft import Decision
from lensmith.report.tables import Table

SUFFIX = ".lensmith.yaml"
WIDTH = 110


def table(decisions: Sequence[Decision], title: str) -> Table:
    rows = [(d.key, d.value if d.given else f"{d.value} (default)", d.verdict, d.to, d.about) for d in decisions]
    return Table(title, ("key", "value", "decision", "in lensmith", "about"), rows)


def text(migrated: Migrated, file: Path) -> str:
    """The run file: decisions and warnings as comments above the run."""
    lines = [f"# Made of {file.name} by `lensmith migrate`. Every key of it, and what became of it:", "#"]
    for d in migrated.decisions:
        value = d.value if d.given else f"{d.value} (default)"
        said = f"{d.key}: {value}  -- {d.verdict}" + (f"; {d.to}" if d.to else "") + (f": {d.about}" if d.about else "")
        lines += textwrap.wrap(said, WIDTH, initial_indent="# ", subsequent_indent="#     ")
    if migrated.warnings:
        lines += ["#", "# Know that:"]
        for warning in migrated.warnings:
            lines += textwrap.wrap(warning, WIDTH, initial_indent="# - ", subsequent_indent="#   ")
    return "\n".join([*lines, "", dump(migrated.tree.values)])


def write(migrated: Migrated, file: Path, output: Path | None) -> Path:
    """The run file, beside the other one unless told otherwise. Raises `ConfigError` where it is there and differs."""
    path = output or file.with_name(file.stem + SUFFIX)
    made = text(migrated, file)
    if path.exists() and path.read_text(encoding="utf-8") != made:
        raise ConfigError("MIGRATE", "is there already, with something else in it", where=str(path),
                          remedy="name another file with -o, or delete it")  # fmt: skip
    migrated.located(path)  # a run that is not valid is never written
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(made, encoding="utf-8")
    os.replace(temporary, path)
    return path


def say(migrated: Migrated, terminal: Any, title: str) -> None:
    """Decisions and warnings, once. What is taken as it is stands in one line, for a person."""
    plain = [d for d in migrated.decisions if d.verdict == "taken" and d.given]
    shown = migrated.decisions if terminal.mode == "json" else [d for d in migrated.decisions if d not in plain]
    terminal.show("llamafactory", table(shown, title))
    if terminal.mode != "json":
        terminal.event("taken", "taken as they are: " + ", ".join(f"{d.key} {d.value}" for d in plain))
    for warning in migrated.warnings:
        terminal.warning(warning)
