"""Muon, Adafactor, AdamW in 8 bits and LoRA+: their reference's numbers, their state, and what they cannot do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from method_kit import live, located, lora, resumed, states
from torch import nn

from lensmith.core.errors import ConfigError
from lensmith.engine.inner import SMALLEST_8BIT, is_matrix_inside
from lensmith.engine.optimizer import Keep, MasterAdamW
from lensmith.engine.options import Adafactor, AdamW, AdamW8bit, Muon
from lensmith.engine.progress import Progress
from lensmith.engine.state import carry_state, read_state, write_state
from lensmith.recipe.check import check
from lensmith.report.terminal import Terminal

SHAPES = {"language.mlp.weight": (96, 64), "language.norm.weight": (64,), "language.embed_tokens.weight": (50, 64)}
PARTS = {"language.mlp.weight": "language", "language.norm.weight": "language",
         "language.embed_tokens.weight": "embeddings"}  # fmt: skip
RATES: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def needs_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(1)
    return [(n, nn.Parameter(torch.randn(shape).to(dtype))) for n, shape in SHAPES.items()]


def gradients(step: int, name: str) -> torch.Tensor:
    torch.manual_seed(100 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name])


def steps(optimizer: MasterAdamW, first: int, count: int) -> None:
    for step in range(first, first + count):
        for name, p in optimizer.named:
            p.grad = gradients(step, name).to(p.dtype)
        optimizer.gradients()
        optimizer.step(1.0 / (1 + step))
        optimizer.zero_grad()


def made(options: Any, keep: dict[str, Keep] | None = None, dtype: torch.dtype = torch.float32) -> MasterAdamW:
    named = parameters(dtype)
    return MasterAdamW(named, [PARTS[n] for n, _ in named], options, keep)


Reference = Callable[[dict[str, nn.Parameter]], list[torch.optim.Optimizer]]


def decayed(p: dict[str, nn.Parameter], *names: str) -> list[dict[str, Any]]:
    return [{"params": [p[n]], "weight_decay": 0.1 if p[n].ndim > 1 else 0.0} for n in names]


def muon(p: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    inside, norm, table = p
    return [
        torch.optim.Muon([p[inside]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decayed(p, norm, table), lr=0.02, fused=True),
    ]


def adafactor(p: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adafactor(decayed(p, *p), lr=0.02)]


def adamw_8bit(p: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    needs_bitsandbytes()
    import bitsandbytes

    return [bitsandbytes.optim.AdamW8bit(decayed(p, *p), lr=0.02)]


KINDS: dict[str, tuple[Any, Reference]] = {
    "muon": (Muon(**RATES), muon), "adafactor": (Adafactor(**RATES), adafactor),
    "adamw_8bit": (AdamW8bit(**RATES), adamw_8bit),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_move_as_with_the_reference(kind: str) -> None:
    options, reference = KINDS[kind]
    theirs = dict(parameters())
    optimizers = reference(theirs)
    ours = made(options)
    steps(ours, 0, 5)
    for step in range(5):
        for name, p in theirs.items():
            p.grad = gradients(step, name)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + step)
            optimizer.step()
    for name, p in ours.named:
        assert torch.equal(p, theirs[name]), name


def test_the_first_update_of_muon_by_hand() -> None:
    """The momentum is 0.05 g, Nesterov's look ahead is along g too, and an orthogonal matrix has singular values 1: the
    update is lr * 0.2 * sqrt(96) times about that (Newton-Schulz in five steps comes to 0.7 ... 1.2)."""
    optimizer = made(Muon(lr=0.02))
    before = optimizer.named[0][1].detach().clone()
    steps(optimizer, 0, 1)
    moved = (before - optimizer.named[0][1].detach()) / (0.02 * 0.2 * 96**0.5)
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.6 and values.max() < 1.3
    g = gradients(0, "language.mlp.weight")
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert torch.linalg.matrix_norm(moved - u @ v) / torch.linalg.matrix_norm(u @ v) < 0.35
    assert torch.allclose(optimizer.tensors()["momentum/language.mlp.weight"], 0.05 * g)


def test_what_muon_updates() -> None:
    kinds = {n: {k.split("/")[0] for k in made_keys if k.endswith(n)} for n, made_keys in _keys(Muon(**RATES)).items()}
    assert kinds["language.mlp.weight"] == {"param", "momentum"}
    for other in ("language.norm.weight", "language.embed_tokens.weight"):
        assert kinds[other] == {"param", "step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("name", "part", "shape", "inside"), [
    ("model.visual.blocks.0.attn.qkv.weight", "vision", (96, 32), True),
    ("model.visual.pos_embed.weight", "vision", (64, 32), False),
    ("model.visual.patch_embed.proj.weight", "vision", (32, 3, 2, 14, 14), False),
    ("lm_head.weight", "head", (500, 32), False),
    ("x.q_proj.lora_A.default.weight", "adapter", (4, 32), True),
    ("x.embed_tokens.token_adapter.trainable_tokens_delta.default", "adapter", (2, 32), False),
])  # fmt: skip
def test_matrices_that_are_tables(name: str, part: str, shape: tuple[int, ...], inside: bool) -> None:
    assert is_matrix_inside(name, part, shape) == inside


def _keys(options: Any) -> dict[str, list[str]]:
    optimizer = made(options)
    steps(optimizer, 0, 1)
    return {n: list(optimizer.tensors()) for n, _ in optimizer.named}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masters", [False, True], ids=["float32", "masters"])
def test_a_saved_state_goes_on_to_the_same_bits(tmp_path: Path, kind: str, masters: bool) -> None:
    if kind == "adamw_8bit":
        needs_bitsandbytes()
    dtype = torch.bfloat16 if masters else torch.float32
    keep = {n: Keep("masters", torch.bfloat16) for n in SHAPES} if masters else None
    whole, cut = (made(KINDS[kind][0], keep, dtype) for _ in range(2))
    steps(whole, 0, 6)
    steps(cut, 0, 3)
    write_state(tmp_path / "state", cut, Progress())
    again = made(KINDS[kind][0], keep, dtype)
    steps(again, 7, 1)  # whatever there was is replaced
    read_state(tmp_path / "state", again)
    steps(again, 3, 3)
    one, other = whole.tensors(), again.tensors()
    assert one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(whole.named, again.named, strict=True))
    assert all(p.dtype == dtype for _, p in again.named)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_before_the_first_update_is_no_moments(tmp_path: Path, kind: str) -> None:
    """A roll-back to the start."""
    if kind == "adamw_8bit":
        needs_bitsandbytes()
    fresh, back = made(KINDS[kind][0]), made(KINDS[kind][0])
    write_state(tmp_path / "state", fresh, Progress())
    steps(back, 5, 2)
    read_state(tmp_path / "state", back)
    steps(back, 0, 2)
    steps(fresh, 0, 2)
    one, other = fresh.tensors(), back.tensors()
    assert one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def test_moments_of_another_optimizer_are_not_carried_over(tmp_path: Path) -> None:
    before, after = made(Muon(**RATES)), made(AdamW(**RATES))
    steps(before, 0, 2)
    write_state(tmp_path / "state", before, Progress())
    carry_state(tmp_path / "state", after, moments=True)
    found = after.tensors()
    assert "exp_avg/language.norm.weight" in found and "exp_avg/language.mlp.weight" not in found
    assert torch.equal(found["param/language.mlp.weight"], before.tensors()["param/language.mlp.weight"])


def test_moments_in_8_bits() -> None:
    needs_bitsandbytes()
    optimizer = made(AdamW8bit(**RATES))
    steps(optimizer, 0, 1)
    types = {n: t.dtype for n, t in optimizer.tensors().items() if n.startswith("exp_avg/")}
    sizes = {n: torch.Size(shape).numel() for n, shape in SHAPES.items()}
    assert {n.split("/")[1]: t == torch.uint8 for n, t in types.items()} == {
        n: size >= SMALLEST_8BIT for n, size in sizes.items()
    }


# -- LoRA+ --------------------------------------------------------------------------------------------------------


def test_lora_plus_has_the_groups_of_peft(tmp_path: Path, qwen25: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    data = tiny.make_chat(tmp_path / "data", 6)
    rates = {"kind": "adamw", "lr": 1e-3, "weight_decay": 0.01, "lora_b_ratio": 16.0}
    built = live(located(tmp_path / "run", qwen25, data, tune=lora(), optimizer=rates))
    theirs = create_loraplus_optimizer(
        built.tuned.peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.01
    )
    rate_of = {id(p): g["lr"] for g in theirs.param_groups for p in g["params"]}
    named = dict(built.optimizer.named)
    found = {n: g.lr for g in built.optimizer.groups for n in g.names}
    assert found == {n: rate_of[id(p)] for n, p in named.items()}
    assert {g.part: g.lr for g in built.optimizer.groups} == {"adapter": 1e-3, "adapter_b": 16e-3}


def test_lora_plus_is_twice_the_rate_of_b_alone(tmp_path: Path, qwen25: Path) -> None:
    """The first update of AdamW is the rate times the sign: B has moved twice as far, A as far."""
    data = tiny.make_chat(tmp_path / "data", 6)
    moved: list[dict[str, torch.Tensor]] = []
    for ratio in (None, 2.0):
        rates = {"kind": "adamw", "lr": 1e-3, "lora_b_ratio": ratio}
        run = located(tmp_path / str(ratio), qwen25, data, tune=lora(), optimizer=rates, train={"max_steps": 1})
        begin = {n: p.detach().clone() for n, p in live(run).optimizer.named}
        out = runs.quiet_train(run)
        end = states(out.folder)["step-00000001"]
        moved.append({n: end[f"param/{n}"] - t for n, t in begin.items()})
    for name, one in moved[0].items():
        factor = 2.0 if ".lora_B." in name else 1.0
        assert torch.allclose(moved[1][name], factor * one, atol=1e-9), name


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["fp32", "bf16-params"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, qwen25: Path, kind: str, preset: str) -> None:
    if kind == "adamw_8bit":
        needs_bitsandbytes()
    data = tiny.make_chat(tmp_path / "data", 12, pictures=3)
    rates = {"kind": kind, "lr": 1e-3}
    over: dict[str, Any] = {"tune": "full", "optimizer": rates, "precision": {"preset": preset}}
    assert resumed(tmp_path, qwen25, data, 4, 2, **over)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_with_it(tmp_path: Path, qwen25: Path, kind: str) -> None:
    if kind == "adamw_8bit":
        needs_bitsandbytes()
    data = tiny.make_chat(tmp_path / "data", 8, pictures=2)
    rates = {"kind": kind, "lr": 0.01, "lora_b_ratio": 4.0}
    run = located(tmp_path / "run", qwen25, data, tune=lora(), optimizer=rates, train={"max_steps": 12})
    losses = runs.quiet_train(run).summary["losses"]
    assert losses[-1] < losses[0] - (0.005 if kind == "adafactor" else 0.1)  # its rates are relative, and B begins at 0


@pytest.mark.parametrize(("over", "message"), [
    ({"optimizer": {"kind": "muon"}, "parallel": {"engine": "fsdp2"}}, r"engine is fsdp2.*optimizer\.kind muon"),
    ({"optimizer": {"kind": "adafactor"}, "parallel": {"engine": "deepspeed"}}, r"parallel\.engine is deepspeed"),
    ({"optimizer": {"kind": "adamw", "lora_b_ratio": 4.0}, "tune": "full"}, r"optimizer\.lora_b_ratio is for adapters"),
])  # fmt: skip
def test_what_does_not_go_together(tmp_path: Path, qwen25: Path, over: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        located(tmp_path, qwen25, tiny.make_chat(tmp_path / "data", 6), **({"tune": lora()} | over))


@pytest.mark.parametrize("precision", [
    {"preset": "bf16-params-compensated"}, {"preset": "fp32", "parts": {"language": {"optimizer": "bfloat16"}}},
])  # fmt: skip
def test_what_only_adamw_can(tmp_path: Path, qwen25: Path, precision: dict[str, Any]) -> None:
    run = located(tmp_path, qwen25, tiny.make_chat(tmp_path / "data", 6), tune="full", optimizer="muon",
                  precision=precision)  # fmt: skip
    with pytest.raises(ConfigError, match=r"optimizer\.kind is muon, and precision asks for"):
        check(run, Terminal("quiet"))


@pytest.mark.parametrize(("over", "message"), [
    ({"optimizer": {"kind": "adamw_8bit"}}, r"optimizer\.kind adamw_8bit needs bitsandbytes"),
    ({"tune": lora(quantize={})}, r"tune\.quantize needs bitsandbytes"),
])  # fmt: skip
def test_bitsandbytes_is_asked_for(
    tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch, over: dict[str, Any], message: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    run = located(tmp_path, qwen25, tiny.make_chat(tmp_path / "data", 6), **({"tune": lora()} | over))
    with pytest.raises(ConfigError, match=message):
        check(run, Terminal("quiet"))
