"""What every page is made with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jinja2

from lensmith.report.escape import html_safe

_TEMPLATES = Path(__file__).parent


def environment() -> jinja2.Environment:
    """For every page of lensmith."""
    # html_safe sees every value first, also where a template forgets the escape filter
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, finalize=html_safe,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears when it is whole."""
    new = path.with_name(path.name + ".tmp")
    write(new)
    os.replace(new, path)
