"""Errors that a user can act on.

Every `UserError` names the place, the value and the remedy; the command line prints it without a traceback and exits
with `exit_code`. Anything else that escapes is a defect in lensmith and is shown with its traceback (exit code 70).
"""

from __future__ import annotations

from typing import Any

EXIT_CRASH = 70  # EX_SOFTWARE of sysexits.h: a defect of ours


class UserError(Exception):
    """Something the user has to change: a run file, a data row, a model folder, the machine.

    `code` is a short stable name (`UNKNOWN_KEY`, `PATH_ESCAPE`, ...) that scripts can match.
    """

    exit_code = 65  # EX_DATAERR

    def __init__(self, code: str, message: str, *, where: str = "", remedy: str = ""):
        self.code = code
        self.message = message
        self.where = where
        self.remedy = remedy
        super().__init__(self.render())

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come back from worker processes: their text alone would not build them again."""
        return _rebuilt, (type(self), self.code, self.message, self.where, self.remedy)

    def render(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f"\n  -> {self.remedy}" if self.remedy else ""
        return f"[{self.code}] {place}{self.message}{remedy}"


def _rebuilt(kind: type[UserError], code: str, message: str, where: str, remedy: str) -> UserError:
    return kind(code, message, where=where, remedy=remedy)


class ConfigError(UserError):
    """A run file, an override or a command-line value is wrong."""

    exit_code = 64  # EX_USAGE


class DataError(UserError):
    """A row of a source file is wrong in a way that is never skipped (`FAIL` in docs/data.md)."""


class ModelError(UserError):
    """A model folder, tokenizer or checkpoint cannot be used as asked."""

    exit_code = 66  # EX_NOINPUT


class RunError(UserError):
    """The run cannot go on: disk full, non-finite steps, a lock held by another run."""

    exit_code = 74  # EX_IOERR


class Drop(Exception):
    """One sample cannot be trained and is left out, with a row in the ledger (`SKIP` in docs/data.md)."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)
