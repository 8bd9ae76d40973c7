"""Shared fixtures. One thread: on shared cores more threads make small tensors many times slower."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fault_table
import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index caches of a test stay in its own folder."""
    monkeypatch.setenv("LENSMITH_CACHE", str(tmp_path / "lensmith-cache"))


@pytest.fixture(scope="session")
def qwen25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2.5-VL in float32."""
    import tiny

    return tiny.make_model(tmp_path_factory.mktemp("model") / "qwen2_5_vl")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, qwen25: Path) -> Any:
    """A small run and its undisturbed end, for faults to be planted into."""
    import fault_kit

    return fault_kit.make_bench(tmp_path_factory.mktemp("bench"), qwen25)


# -- the table of faults ----------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, metavar="PAGE", help="put the table of faults into this page")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.user_properties.extend(fault_table.properties(item))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table, where the run was one of faults (`-m faults`)."""
    if "faults" not in config.option.markexpr:
        return
    every = [r for reports in terminalreporter.stats.values() for r in reports if isinstance(r, pytest.TestReport)]
    found = fault_table.rows(every)
    terminalreporter.section("faults")
    for line in fault_table.as_text(found):
        terminalreporter.write_line(line)
    if config.option.fault_table is not None:
        fault_table.write(config.option.fault_table, found)
