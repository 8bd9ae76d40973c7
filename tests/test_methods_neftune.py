"""Noise on the embeddings of text: how much, where, when, and the same in a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from method_kit import live, located, lora, resumed, states
from torch import nn

from lensmith.core.encoded import IMAGE, PackedRow, Segment
from lensmith.model.neftune import add_noise, lengths

H = 64


class Toy(nn.Module):
    """Embeddings that are returned as they leave the table."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.table = nn.Embedding(8, H)
        self.model.get_input_embeddings = lambda: self.model.table
        nn.init.zeros_(self.model.table.weight)

    def forward(self, row: PackedRow) -> torch.Tensor:
        return self.model.table(torch.from_numpy(row.ids_T)[None].long())


def row_of(*lengths: int, pictures: slice = slice(0, 0), shared: int = 0) -> PackedRow:
    """Segments side by side; `shared`: the first is the prefix of all others."""
    total, at, segments = sum(lengths), 0, []
    for n in lengths:
        segments.append(Segment(at, n, 0, shared if at else 0))
        at += n
    kind, none = np.zeros(total, np.int8), np.zeros(0, np.int32)
    kind[pictures] = IMAGE
    return PackedRow(np.ones(total, np.int32), kind, np.zeros((3, total), np.int32), tuple(segments), none, none,
                     np.zeros(0, np.float32), np.zeros(0, np.int64))  # fmt: skip


def noise(row: PackedRow, alpha: float = 5.0, seed: int = 0) -> torch.Tensor:
    toy = Toy()
    add_noise(toy, alpha)
    torch.manual_seed(seed)
    return toy(row)[0].detach()


def test_one_sample_has_the_noise_of_the_reference() -> None:
    """TRL and transformers: torch.zeros_like(e).uniform_(-m, m), m = alpha / sqrt(L * H)."""
    m, found = 5.0 / (37 * H) ** 0.5, noise(row_of(37))
    torch.manual_seed(0)
    assert torch.allclose(found, torch.zeros(37, H).uniform_(-m, m), atol=1e-7)


def test_each_sample_of_a_row_has_the_noise_of_its_own_length() -> None:
    """As if alone: uniform, of variance m^2 / 3, whatever stands beside it."""
    found = noise(row_of(16, 400))
    for part, n in ((found[:16], 16), (found[16:], 400)):
        m = 5.0 / (n * H) ** 0.5
        assert part.abs().max() <= m and part.abs().max() > 0.98 * m
        assert float(part.var()) == pytest.approx(m * m / 3, rel=0.1)
        assert float(part.mean()) == pytest.approx(0, abs=4 * m / (3 * n * H) ** 0.5)


def test_a_branch_is_as_long_as_with_its_prefix() -> None:
    assert lengths(row_of(10, 5, 7, shared=10)).tolist() == [10.0] * 10 + [15.0] * 5 + [17.0] * 7


def test_pictures_have_none() -> None:
    found = noise(row_of(40, pictures=slice(10, 30)))
    assert not found[10:30].any() and found[:10].all() and found[30:].all()


def test_only_while_training() -> None:
    toy = Toy()
    add_noise(toy, 5.0)
    row = row_of(9)
    with torch.no_grad():
        assert not toy(row).any()
    toy.eval()
    assert not toy(row).any()
    toy.train()
    assert toy(row).any()
    assert not toy.model.table(torch.ones(1, 9).long()).any()  # outside a row: generation


def test_decided_by_the_generator() -> None:
    assert torch.equal(noise(row_of(30), seed=4), noise(row_of(30), seed=4))
    assert not torch.equal(noise(row_of(30), seed=4), noise(row_of(30), seed=5))


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", [lora(), {"kind": "full"}], ids=["lora", "full"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, qwen25: Path, tune: dict[str, Any]) -> None:
    data = tiny.make_chat(tmp_path / "data", 12, pictures=3)
    assert resumed(tmp_path, qwen25, data, 4, 2, tune=tune, train={"neftune_alpha": 5.0})
    runs.quiet_train(located(tmp_path / "plain", qwen25, data, tune=tune))
    end = "step-00000004"
    one, other = states(tmp_path / "whole")[end], states(tmp_path / "plain")[end]
    assert any(not torch.equal(t, other[n]) for n, t in one.items())


def test_evaluation_is_without_noise(tmp_path: Path, qwen25: Path) -> None:
    data = tiny.make_chat(tmp_path / "data", 12, pictures=3)
    held: dict[str, Any] = {"data": {"holdout": 0.3}, "evaluate": {"before": True}, "tune": lora()}
    losses: list[Any] = []
    for alpha in (None, 50.0):
        run = located(tmp_path / str(alpha), qwen25, data, train={"neftune_alpha": alpha, "max_steps": 1}, **held)
        losses.append(runs.quiet_train(run).summary["heldout"]["before"]["loss"])
    assert losses[0] == losses[1]


def test_gradients_pass_through(tmp_path: Path, qwen25: Path) -> None:
    built = live(
        located(tmp_path, qwen25, tiny.make_chat(tmp_path / "data", 6), tune="full", train={"neftune_alpha": 5.0})
    )
    embeds = built.root.model.get_input_embeddings()
    assert embeds.weight.requires_grad
