"""What a command says while it works: for a person (`normal`), for nobody (`quiet`) or for a program (`json`).

Rich costs 60 ms to import, so it is imported where something is drawn.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TextIO

from lensmith.report import tables
from lensmith.report.escape import terminal_safe
from lensmith.report.metrics import json_line
from lensmith.report.tables import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Mode = Literal["normal", "quiet", "json"]
JSON_EVERY_SECONDS = 5.0
LOG_EVERY_SECONDS = 30.0  # a file or a pipe, where a bar cannot be redrawn
FILE_COLUMNS = 120
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
BRIEF_SECONDS = 2.0  # a bar that was up for less leaves no trace


def make_console(mode: Mode, file: TextIO | None = None) -> Console:
    """A console that draws text as it is (no markup, emoji or guessed highlighting), and nothing unless `normal`."""
    from rich.console import Console

    width = None if (file or sys.stdout).isatty() else FILE_COLUMNS
    return Console(file=file, width=width, quiet=mode != "normal", markup=False, emoji=False, highlight=False)


class Progress:
    """Counts what is done and tells `emit` about it at most once in `every_seconds`."""

    def __init__(self, total: int | None, every_seconds: float, emit: Callable[[Progress], None]):
        self.total, self.done, self.note = total, 0, ""
        self._every, self._emit = every_seconds, emit
        self._start = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def eta_seconds(self) -> float | None:
        """Time left at the mean rate so far; None while nothing is done or the total is unknown."""
        if not self.total or not self.done:
            return None
        return max(0, self.total - self.done) * self.seconds / self.done

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is shown behind the bar (`loss 0.41`)."""
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._emit(self)


class Terminal:
    """The one way a command writes. In `json` mode stdout holds one JSON object a line and nothing else.

    Args:
        out, err: streams to use in place of the standard ones.
    """

    def __init__(self, mode: Mode = "normal", *, out: TextIO | None = None, err: TextIO | None = None):
        self.mode: Mode = mode
        self._out, self._err = out, err
        self._made: Console | None = None

    @classmethod
    def silent(cls) -> Terminal:
        """One that says nothing at all: of a rank that another speaks for."""
        return cls("quiet", err=io.StringIO())

    @property
    def console(self) -> Console:
        if self._made is None:
            self._made = make_console(self.mode, self._out)
        return self._made

    def event(self, name: str, message: str = "", **fields: Any) -> None:
        """Something happened. A person reads `message`, or the fields where it is empty; a program reads all."""
        if self.mode == "json":
            self._json({"event": name, **({"message": message} if message else {}), **fields})
        elif self.mode == "normal":
            text = message or " ".join([name, *(f"{k}={tables.figure(k, v)}" for k, v in fields.items())])
            with _full_disk_says_nothing():
                self.console.print(terminal_safe(text))

    def warning(self, message: str) -> None:
        """Shown in every mode: `quiet` has it on stderr."""
        if self.mode == "quiet":
            with _full_disk_says_nothing():
                print(f"warning: {terminal_safe(message)}", file=self._err or sys.stderr)
        elif self.mode == "json":
            self._json({"event": "warning", "message": message})
        else:
            with _full_disk_says_nothing():
                self.console.print(f"warning: {terminal_safe(message)}", style="yellow")

    def show(self, name: str, table: tables.Table) -> None:
        """Draw a table; in `json` mode its cells are one event called `name`."""
        if self.mode == "json":
            rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            footer = dict(zip(table.columns, table.footer, strict=True)) if table.footer else {}
            self._json({"event": name, "rows": rows, **({"total": footer} if footer else {})})
        elif self.mode == "normal":
            with _full_disk_says_nothing():
                self.console.print(rich_table(table))

    @contextmanager
    def progress(self, description: str, total: int | None, *, counted: bool = True) -> Iterator[Progress]:
        """For work that may take over 2 s: a bar with the time left, or lines where a bar cannot be drawn.

        `total` None means that it is not known (yet). `counted` False: one piece of work without steps, of which only
        the time is shown. Yields the object whose `advance` the work calls.
        """
        if self.mode == "normal" and self.console.is_terminal:
            with self._bar(description, total, counted) as progress:
                yield progress
            return
        every = JSON_EVERY_SECONDS if self.mode == "json" else LOG_EVERY_SECONDS
        progress = Progress(total, every, lambda progress: self._progress_line(description, progress))
        yield progress
        if progress.seconds >= BRIEF_SECONDS:
            self._progress_line(description, progress)

    @contextmanager
    def _bar(self, description: str, total: int | None, counted: bool) -> Iterator[Progress]:
        from rich import progress as rich_progress

        columns: list[rich_progress.ProgressColumn] = [
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.TimeElapsedColumn(),
        ]
        if counted:
            columns.insert(2, rich_progress.MofNCompleteColumn())
            columns += [
                rich_progress.TextColumn("left", style="dim"),
                rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("{task.fields[note]}", style="dim", markup=False),
            ]
        with rich_progress.Progress(*columns, console=self.console) as bar:
            task = bar.add_task(terminal_safe(description), total=total, note="")

            def draw(p: Progress) -> None:
                bar.update(task, completed=p.done, total=p.total, note=terminal_safe(p.note))

            progress = Progress(total, 0, draw)
            yield progress
            bar.live.transient = progress.seconds < BRIEF_SECONDS

    def _progress_line(self, description: str, progress: Progress) -> None:
        eta = progress.eta_seconds
        if self.mode == "json":
            fields = {"done": progress.done, "total": progress.total, "seconds": round(progress.seconds, 1)}
            fields["eta_seconds"] = None if eta is None else round(eta, 1)
            self.event("progress", task=description, **fields, **({"note": progress.note} if progress.note else {}))
            return
        of_total = f"/{progress.total:,}" if progress.total is not None else ""
        left = f", {duration(eta)} left" if eta else ""
        note = f", {progress.note}" if progress.note else ""
        took = duration(progress.seconds)
        self.event("progress", f"{description}: {progress.done:,}{of_total} in {took}{left}{note}")

    def _json(self, record: dict[str, Any]) -> None:
        with _full_disk_says_nothing():
            print(json_line(record), file=self._out or sys.stdout, flush=True)


@contextmanager
def _full_disk_says_nothing() -> Iterator[None]:
    """A log on a full disk misses lines; training does not end for them."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        atexit.register(_let_go)


def _let_go() -> None:
    """What still cannot be written at the end is given up: Python would exit with 120 for it."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def rich_table(table: tables.Table) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=table.title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_footer=bool(table.footer),
        collapse_padding=True,
    )
    for position, name in enumerate(table.columns):
        footer = Text(terminal_safe(table.footer[position])) if table.footer else ""
        right = name in table.right
        justify = "right" if right else "left"
        drawn.add_column(Text(terminal_safe(name)), footer, justify=justify, no_wrap=right, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(terminal_safe(cell)) for cell in row))
    return drawn
