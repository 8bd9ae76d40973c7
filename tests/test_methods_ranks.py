"""Parts in full, initialisations, merged adapters and Muon on two ranks: as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from method_kit import gap, last, located, lora, stock_state
from ranks_kit import train_all

ADAPTERS: dict[str, Any] = {
    "tune": lora(full=["embeddings", "projector"], init="pissa", parts=["language", "vision"], ranks={"vision": 2}),
    "optimizer": {"kind": "adamw", "lr": 1e-3, "lora_b_ratio": 4.0},
}
OVER: dict[str, dict[str, Any]] = {
    "local": ADAPTERS, "fsdp2": ADAPTERS, "zero3": ADAPTERS,
    "muon": {"tune": {"kind": "full"}, "optimizer": {"kind": "muon", "lr": 1e-3}},
}  # fmt: skip
ENGINES = {"fsdp2": "fsdp2", "zero3": {"kind": "deepspeed", "zero": 3}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    base = tiny.make_model(folder / "base", "qwen2_5_vl")
    data = tiny.make_chat(folder / "data", 12, pictures=3)
    two: list[Any] = []
    for name, over in OVER.items():
        engine = {"parallel": {"engine": ENGINES.get(name, "local")}}
        two.append(located(folder / f"{name}-2", base, data, **over, **engine))
        if name in ("local", "muon"):
            runs.quiet_train(located(folder / f"{name}-1", base, data, **over))
    train_all(2, folder / "meet", two)
    return folder


@pytest.mark.parametrize("name", ["local", "fsdp2", "zero3"])
def test_what_two_ranks_publish_is_what_one_does(trained: Path, name: str) -> None:
    one = stock_state(trained / "base", last(trained / "local-1") / "model")
    two = stock_state(trained / "base", last(trained / f"{name}-2") / "model")
    moved = gap(one, stock_state(trained / "base"))
    assert moved > 1e-3 and gap(one, two) < 1e-2 * moved


def test_muon_on_two_ranks(trained: Path) -> None:
    one, two = (stock_state(last(trained / f"muon-{n}") / "model") for n in (1, 2))
    moved = gap(one, stock_state(trained / "base"))
    assert moved > 1e-3 and gap(one, two) < 1e-2 * moved
