"""The table of faults: how it is made, and that the page holds what the tests plant."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fault_table
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def report(name: str, when: str, *, failed: bool = False, figure: str = "", seconds: float = 1.0) -> Any:
    said = [("fault", [name, f"what {name} does"]), *([("figure", figure)] if figure else [])]
    return SimpleNamespace(user_properties=said, when=when, passed=not failed, failed=failed, duration=seconds)


def test_rows_by_hand() -> None:
    """Two tests of one fault are one row; a test that fails in its set-up has not passed; seconds are summed."""
    found = fault_table.rows([
        report("F02", "setup", seconds=3.0), report("F02", "call", figure="10 of 10"), report("F02", "teardown"),
        report("F02", "call", failed=True), report("F01", "setup", failed=True),
    ])  # fmt: skip
    assert list(found) == ["F01", "F02"]
    assert (found["F01"].passed, found["F01"].ran) == (0, 1)
    assert (found["F02"].passed, found["F02"].ran, found["F02"].seconds) == (1, 2, 6.0)
    assert fault_table.as_markdown(found).splitlines()[3].endswith("| 1 of 2 | 6.0 | 10 of 10 |")
    assert fault_table.as_text(found)[-1] == "0 of 2 faults end as they must (3 tests)"


def test_rows_that_did_not_run_stay_in_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fault_table.BEGIN}\n{fault_table.END}\nafter\n")
    fault_table.write(page, fault_table.rows([report("F02", "call"), report("F03", "call", figure="a | b")]))
    fault_table.write(page, fault_table.rows([report("F01", "call"), report("F03", "call", figure="c")]))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert fault_table.ids_in(page) == ["F01", "F02", "F03"]
    assert "| c |" in text and "a \\| b" not in text


def test_a_name_that_is_not_in_the_list_is_refused() -> None:
    mark = pytest.mark.faults("F99", "what").mark
    with pytest.raises(AssertionError, match="F99"):
        fault_table.properties(SimpleNamespace(iter_markers=lambda name: [mark], nodeid="test"))


def test_the_page_has_every_fault_that_is_planted_and_each_passed() -> None:
    """`pytest -m faults --fault-table=docs/reliability.md` makes it anew."""
    planted = {
        name for path in Path(__file__).parent.glob("*.py") if path != Path(__file__)
        for name in re.findall(r'faults\("(F\d\d)"', path.read_text(encoding="utf-8"))
    }  # fmt: skip
    assert planted <= set(fault_table.ids_in(PAGE))
    for line in re.findall(r"^\| F\d\d \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        passed = re.search(r"\| (\d+) of (\d+) \| [\d.]+ \|", line)
        assert passed is not None and passed[1] == passed[2] != "0", line
