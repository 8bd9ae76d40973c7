"""Shared fixtures. One thread: on shared cores more threads make small tensors many times slower."""

from __future__ import annotations

import os
from pathlib import Path

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
