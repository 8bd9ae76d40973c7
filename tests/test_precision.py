"""The precision contract: every preset does what it says in memory, in the run and on disk, and no update is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import all_families
import pytest
import runs
import tiny
import torch
from ranks_kit import on_ranks
from safetensors.torch import load_file
from torch import nn

from lensmith.checkpoint.inspect import inspect
from lensmith.core.errors import ConfigError, ModelError, UserError
from lensmith.engine import lean
from lensmith.engine.optimizer import Keep, MasterAdamW
from lensmith.engine.options import AdamW
from lensmith.model import borders, precision
from lensmith.model.options import Precision
from lensmith.parallel.fsdp import shard
from lensmith.parallel.options import FSDP2
from lensmith.parallel.ranks import Ranks
from lensmith.recipe.build import build, rehearse
from lensmith.recipe.prepare import prepare
from lensmith.recipe.probe import check_borders, probe_row
from lensmith.report.terminal import Terminal

CPU, HALF, FULL = torch.device("cpu"), torch.bfloat16, torch.float32
PRESETS = ["fp32", "bf16", "bf16-params", "bf16-params-compensated", "bf16-params-stochastic", "fp16"]
LEAN = ["compensated", "stochastic"]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("chat"), 24, pictures=6)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL kept in bfloat16."""
    return tiny.make_model(tmp_path_factory.mktemp("half") / "model", dtype=HALF)


def adam(p: nn.Parameter, keep: Keep, **options: Any) -> MasterAdamW:
    optimizer = MasterAdamW([("w", p)], ["language"], AdamW(**options), {"w": keep}, seed=3)
    p.data = p.data.to(keep.parameters)
    optimizer.settle()
    return optimizer


def gradient(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) + 0.5


def stepped(optimizer: MasterAdamW, p: nn.Parameter, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        (p.float() * gradient(step, tuple(p.shape))).sum().backward()
        optimizer.gradients()
        optimizer.step(1.0)


# --- updates without masters ------------------------------------------------------------------------------------------


def test_the_first_update_by_hand() -> None:
    """AdamW from zero moments moves every weight by lr * sign(gradient) (eps aside), after decay by lr * wd."""
    p = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = adam(p, Keep("compensated", HALF), lr=2**-10, weight_decay=0.5, eps=1e-30)
    p.grad = torch.tensor([[3.0, -0.25]])
    optimizer.step(1.0)
    want = torch.tensor([[1 - 2**-11 - 2**-10, -2 + 2**-10 + 2**-10]])
    assert torch.allclose(optimizer.tensors()["param/w"], want, rtol=0, atol=2**-17)
    assert optimizer.tensors()["exp_avg/w"][0].tolist() == pytest.approx([0.3, -0.025])


@pytest.mark.parametrize("update", [*LEAN, "masters"])
def test_small_updates_are_not_lost(update: Any) -> None:
    """At a rate of 1e-5 rounding to nearest never moves a bfloat16 weight; these go the way of float32."""
    start = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).to(HALF).float()
    reference, p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    stepped(adam(reference, Keep(), lr=1e-5), reference, range(40))
    optimizer = adam(p, Keep(update, HALF), lr=1e-5)
    stepped(optimizer, p, range(40))
    way = reference.detach() - start
    found = optimizer.tensors()["param/w"] - start
    nearest = (reference.detach().to(HALF).float() - start).abs().gt(0).float().mean()
    assert nearest < 0.2  # what rounding at the end alone would show of it
    if update == "masters":  # the gradient of a bfloat16 weight has been bfloat16 once
        assert float((found - way).norm() / way.norm()) < 5e-3
    elif update == "compensated":  # and 16 bits: up to a unit of 2^-17 of the weight in every step
        assert float((found - way).norm() / way.norm()) < 0.05
    else:  # right in the mean: the way of 10,000 weights together, its error by the central limit theorem
        error = (found - way).flatten()
        assert abs(float(error.mean())) < 4 * float(error.std()) / len(error) ** 0.5
        assert float((found.mean() - way.mean()).abs() / way.mean().abs()) < 0.2


def test_a_compensated_parameter_holds_16_bits() -> None:
    p = nn.Parameter(torch.randn(4096, generator=torch.Generator().manual_seed(1)))
    before = p.detach().clone()
    optimizer = adam(p, Keep("compensated", HALF))
    found = optimizer.tensors()["param/w"]
    assert p.dtype == HALF and float(((found - before) / before).abs().max()) <= 2**-16


@pytest.mark.parametrize("moments", [FULL, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("update", ["plain", "masters", *LEAN])
def test_a_saved_state_goes_on_to_the_same_bits(update: Any, moments: torch.dtype) -> None:
    keep = Keep(update, FULL if update == "plain" else HALF, moments=moments)
    start = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    whole, first = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = adam(whole, keep, lr=1e-3), adam(first, keep, lr=1e-3)
    stepped(a, whole, range(12))
    stepped(b, first, range(5))
    saved = {k: v.clone() for k, v in b.tensors().items()}
    assert saved["exp_avg/w"].dtype == moments and saved["param/w"].dtype == FULL
    other = nn.Parameter(torch.zeros_like(start))
    c = adam(other, keep, lr=1e-3)
    c.load_tensors(saved)
    assert torch.equal(other, first)
    stepped(c, other, range(5, 12))
    c.load_tensors({k: v.clone() for k, v in c.tensors().items()})
    assert torch.equal(whole, other)  # the parameters themselves, not only what they are made of
    for key, value in a.tensors().items():
        assert torch.equal(value, c.tensors()[key]), key


@pytest.mark.parametrize("moments", [FULL, HALF], ids=["float32", "bfloat16"])
def test_updates_in_slices_are_those_of_the_whole(moments: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for size in (1 << 24, 100):
        monkeypatch.setattr(lean, "SLICE", size)
        p = nn.Parameter(start.clone())
        optimizer = adam(p, Keep("compensated", HALF, moments=moments), lr=1e-3)
        stepped(optimizer, p, range(6))
        found.append((p.detach(), optimizer.tensors()["param/w"]))
    whole, sliced = found
    if moments == FULL:
        assert torch.equal(whole[0], sliced[0]) and torch.equal(whole[1], sliced[1])
    else:  # moments are rounded with other random numbers
        assert float((whole[1] - sliced[1]).abs().max()) < 1e-4 < float((whole[1] - start).abs().max())


def test_half_precision_moments_do_not_stall() -> None:
    """With beta2 = 0.999 the second moment gains a thousandth a step, a quarter of bfloat16's unit: rounded to nearest
    it would stand still below its limit."""
    p = nn.Parameter(torch.zeros(20_000))
    optimizer = adam(p, Keep(moments=HALF), lr=0.0)
    for _ in range(1500):
        p.grad = torch.ones_like(p)
        optimizer.step(1.0)
    v = optimizer.tensors()["exp_avg_sq/w"].float()
    assert float(v.mean()) == pytest.approx(1 - 0.999**1500, rel=0.01)


@pytest.mark.parametrize("gradients", [FULL, HALF], ids=["float32", "bfloat16"])
def test_gradients_are_added_up_in_their_type(gradients: torch.dtype) -> None:
    """256 + 1 + ... + 1: in bfloat16 every 1 is lost, in float32 none."""
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = adam(p, Keep("masters", HALF, gradients=gradients))
    (p.float() * 256.0).sum().backward()
    for _ in range(64):
        p.float().sum().backward()
    assert optimizer.gradients()[0][1][0, 0] == (320.0 if gradients == FULL else 256.0)


def test_fsdp2_adds_up_gradients_in_their_type(tmp_path: Path) -> None:
    """As above, of shares: every micro-batch's sum over two ranks is exact in bfloat16, their sum is not."""

    def work(rank: int) -> None:
        ranks = Ranks(rank, 2, rank, 2)
        for update in ("masters", *LEAN):
            root: Any = nn.Linear(4, 4, bias=False, dtype=HALF)
            shard(root, [], [], FSDP2(), ranks, CPU, compute=None, reduce=FULL)
            keep = {"weight": Keep(update, HALF)}  # type: ignore[arg-type]
            named = list(root.named_parameters())
            optimizer = MasterAdamW(named, ["language"], AdamW(), keep, ranks=ranks, sharded_root=root)
            optimizer.settle()
            for number in range(65):
                optimizer.backward(root(torch.full((1, 4), 0.5 if number else 128.0, dtype=HALF)).sum(), last=True)
            assert (optimizer.gradients()[0][1] == 320.0).all(), update

    on_ranks(2, tmp_path, work)


# --- presets in a run -------------------------------------------------------------------------------------------------


def built(folder: Path, base: Path, chat: Path, **over: Any) -> Any:
    return build(prepare(runs.located(folder, base, chat, **over), Terminal("quiet")))


def test_bfloat16_in_bfloat16_out(tmp_path: Path, half: Path, chat: Path) -> None:
    """Full fine-tuning in every preset: load, train, save, reload in stock transformers."""
    from transformers import AutoModelForImageTextToText

    for preset in PRESETS:
        run = runs.located(tmp_path / preset, half, chat, precision={"preset": preset}, train={"max_steps": 2})
        out = runs.quiet_train(run)
        model = Path(out.summary["checkpoint"]) / "model"
        tensors = load_file(model / "model.safetensors")
        config = json.loads((model / "config.json").read_text())
        said = {config["dtype"], *(c["dtype"] for c in config.values() if isinstance(c, dict) and "dtype" in c)}
        assert {t.dtype for t in tensors.values()} == {HALF} and said == {"bfloat16"}, preset
        stock: Any = AutoModelForImageTextToText.from_pretrained(model)
        found = {p.dtype for p in stock.parameters()}, stock.config.vision_config.dtype, stock.config.text_config.dtype
        assert found == ({HALF}, HALF, HALF), preset
        state = load_file(model.parent / "state" / "training.safetensors")
        assert {v.dtype for k, v in state.items()} == {FULL}, preset
        before = load_file(half / "model.safetensors")
        assert any(not torch.equal(before[k], v) for k, v in tensors.items()), preset


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, half: Path, chat: Path, preset: str) -> None:
    def state(folder: str, *lengths: int) -> dict[str, torch.Tensor]:
        for length in lengths:
            over = {"precision": {"preset": preset}, "train": {"max_steps": length}}
            out = runs.quiet_train(runs.located(tmp_path / folder, half, chat, **over))
        return load_file(Path(out.summary["checkpoint"]) / "state" / "training.safetensors")

    whole, resumed = state("whole", 4), state("resumed", 2, 4)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_presets_go_nearly_the_same_way(tmp_path: Path, half: Path, chat: Path) -> None:
    """Eight steps at 1e-3 from the same weights: the losses of float32, give or take what bfloat16 rounds away."""
    losses = {}
    for preset in PRESETS:
        over = {"precision": {"preset": preset}, "train": {"max_steps": 8}}
        losses[preset] = torch.tensor(
            runs.quiet_train(runs.located(tmp_path / preset, half, chat, **over)).summary["losses"]
        )
    assert losses["fp32"][0] - losses["fp32"][-1] > 0.1
    for preset, found in losses.items():
        assert float((found - losses["fp32"]).abs().max()) < 0.02, preset


def test_a_part_has_its_own_types(tmp_path: Path, half: Path, chat: Path) -> None:
    parts = {
        "vision": {"parameters": "float32", "compute": "float32", "saved": "float32"},
        "projector": {"saved": "float32"},
        "language": {"optimizer": "bfloat16"},
        "head": {"parameters": "float32", "compute": "float32"},
    }
    over = {"precision": {"preset": "bf16-params-compensated", "parts": parts}, "train": {"max_steps": 2}}
    base = tiny.make_model(tmp_path / "untied", tie=False, dtype=HALF)
    b = built(tmp_path / "b", base, chat, **over)
    by_part: dict[str, set[torch.dtype]] = {}
    for name, p in b.tuned.model.named_parameters():
        by_part.setdefault(b.root.family.part_of(name), set()).add(p.dtype)
    assert by_part == {"vision": {FULL}, "projector": {HALF}, "language": {HALF}, "embeddings": {HALF}, "head": {FULL}}
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(b.root.family.part_of(f"{name}.weight"), set()).add(out.dtype)

    for name, module in b.tuned.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note(name))
    prepared = prepare(runs.located(tmp_path / "b", base, chat, **over), Terminal("quiet"))
    loss, _ = b.root(probe_row(prepared))["loss"]
    loss.backward()
    assert seen == {"vision": {FULL}, "projector": {HALF}, "language": {HALF}, "head": {FULL}}
    out = runs.quiet_train(runs.located(tmp_path / "run", base, chat, **over))
    model = Path(out.summary["checkpoint"]) / "model"
    config = json.loads((model / "config.json").read_text())
    assert (config["dtype"], config["vision_config"]["dtype"]) == ("bfloat16", "float32")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert tensor.dtype == (FULL if b.root.family.part_of(name) in ("vision", "projector") else HALF), name
    assert not inspect(model, b.root.family.part_of).errors
    state = load_file(model.parent / "state" / "training.safetensors")
    moments = {b.root.family.part_of(k[8:]): v.dtype for k, v in state.items() if k.startswith("exp_avg/")}
    assert moments == {"vision": FULL, "projector": FULL, "language": HALF, "embeddings": FULL, "head": FULL}


def test_adapters_are_float32_unless_told_otherwise(tmp_path: Path, half: Path, chat: Path) -> None:
    for preset in PRESETS:
        b = built(tmp_path / preset, half, chat, tune={"kind": "lora", "rank": 2}, precision={"preset": preset})
        assert {p.dtype for _, p in b.optimizer.named} == {FULL}, preset
    over = {"preset": "bf16", "parts": {"adapter": {"parameters": "bfloat16", "saved": "bfloat16"}}}
    run = runs.located(tmp_path / "run", half, chat, tune={"kind": "lora", "rank": 2}, precision=over)
    out = runs.quiet_train(run)
    saved = load_file(Path(out.summary["checkpoint"]) / "model" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {HALF}


def test_a_base_of_mixed_types_loses_nothing(tmp_path: Path, half: Path, chat: Path) -> None:
    """LLaMA-Factory saves trained tensors in float32 beside bfloat16 ones: what is float32 trains from there."""
    from safetensors.torch import save_file

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in half.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(half / "model.safetensors")
    name = next(k for k in tensors if k.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name] = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(5))
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    b = built(tmp_path / "run", mixed, chat, precision={"preset": "bf16-params"})
    state = b.optimizer.tensors()
    key = next(k for k in state if k.startswith("param/") and k.endswith("layers.0.mlp.up_proj.weight"))
    assert torch.equal(state[key], tensors[name])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "float32 compute over half weights": ({"vision": {"compute": "float32"}}, "vision.parameters: float32"),
    "two halves": ({"vision": {"compute": "float16"}}, "bfloat16 and float16"),
    "half gradients of float32": ({"language": {"gradients": "bfloat16"}}, "leave precision.parts.language.gradients"),
    "float16 moments": ({"language": {"optimizer": "float16"}}, "float32 or bfloat16"),
    "compute of an adapter": ({"adapter": {"compute": "float32"}}, "compute of that part"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions_are_refused(case: str) -> None:
    parts, said = WRONG[case]
    with pytest.raises(ConfigError, match="PRECISION") as caught:
        precision.plan(Precision(preset="bf16", parts=parts), CPU, HALF)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_contradictions_are_told_before_data_is_read(tmp_path: Path) -> None:
    parts = {"vision": {"compute": "float32"}}
    with pytest.raises(ConfigError, match=r"PRECISION.*precision\.parts\.vision: float32 compute"):
        runs.located(tmp_path, tmp_path / "none", tmp_path / "none", precision={"preset": "bf16", "parts": parts})


@pytest.mark.parametrize(
    ("kind", "parts", "said"),
    [
        ("qwen3_vl", {"embeddings": "float32"}, r"language\.saved is bfloat16 and .*embeddings\.saved float32"),
        ("qwen3_vl", {"head": "float32"}, r"language\.saved is bfloat16 and .*head\.saved float32"),
        ("qwen3_vl", {"vision": "float32"}, r"vision\.saved is float32 and .*projector\.saved bfloat16"),
        ("minicpmv", {"vision": "float32", "projector": "float32"}, r"language\.saved is bfloat16 and .*vision\.saved"),
    ],
)
def test_saved_types_that_no_config_can_say(
    tmp_path: Path, chat: Path, kind: str, parts: dict[str, str], said: str
) -> None:
    base = all_families.make(tmp_path / "base", kind, HALF)
    saved = {part: {"saved": dtype} for part, dtype in parts.items()}

    def rehearsed(**over: Any) -> None:
        limits = {"data": {"max_tokens": 4096}, "batch": {"device_tokens": 4096}}
        rehearse(prepare(runs.located(tmp_path / "run", base, chat, **limits, **over), Terminal("quiet")))

    with pytest.raises(ConfigError, match=rf"PRECISION.*{said}"):
        rehearsed(precision={"preset": "bf16", "parts": saved})
    rehearsed(precision={"preset": "bf16", "parts": saved}, tune={"kind": "lora", "rank": 2})
    every = {part: {"saved": "float32"} for part in ("vision", "projector", "language", "embeddings", "head")}
    rehearsed(precision={"preset": "bf16", "parts": every})


def test_types_of_an_adapter_need_an_adapter(tmp_path: Path) -> None:
    over = {"preset": "auto", "parts": {"adapter": {"saved": "bfloat16"}}}
    with pytest.raises(ConfigError, match=r"PRECISION.*precision\.parts\.adapter.*tune is full"):
        runs.located(tmp_path, tmp_path / "none", tmp_path / "none", precision=over)
    runs.located(tmp_path, tmp_path / "none", tmp_path / "none", precision=over, tune={"kind": "lora", "rank": 2})


def test_float16_in_any_part_has_a_loss_scale() -> None:
    half = {"parameters": "float16", "compute": "float16"}
    for options in (Precision(preset="fp16"), Precision(preset="fp32", parts={"vision": half})):  # type: ignore[dict-item]
        assert precision.plan(options, CPU, HALF).loss_scale
    assert not precision.plan(Precision(preset="bf16"), CPU, HALF).loss_scale


def test_the_head_of_a_tied_model_has_no_types_of_its_own(tmp_path: Path, half: Path, chat: Path) -> None:
    over = {"preset": "bf16", "parts": {"head": {"saved": "float32"}}}
    with pytest.raises(ConfigError, match="the head of this model is its embedding"):
        built(tmp_path / "run", half, chat, precision=over)
    with pytest.raises(ConfigError, match="the head of this model is its embedding"):
        rehearse(prepare(runs.located(tmp_path / "run", half, chat, precision=over), Terminal("quiet")))


WIDE = {"parameters": "float32", "compute": "float32"}


@pytest.mark.parametrize("name", all_families.MAKERS)
@pytest.mark.parametrize("part", ["vision", "projector"])
def test_a_float32_part_in_a_bfloat16_model(tmp_path: Path, chat: Path, name: str, part: str) -> None:
    """In every family, whatever modules it calls: what comes in is widened, what goes out fits the next part."""
    base = all_families.make(tmp_path / "model", name, HALF)
    over = {"data": {"max_tokens": 4096}, "batch": {"device_tokens": 4096}, "tune": {"kind": "lora", "rank": 2}}
    run = runs.located(tmp_path / "run", base, chat, precision={"preset": "bf16", "parts": {part: WIDE}}, **over)
    prepared = prepare(run, Terminal("quiet"))
    b = build(prepared)
    check_borders(prepared, b.root, b.precision)
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(b.root.family.part_of(f"{name}.weight"), set()).add(out.dtype)

    for module_name, module in b.tuned.model.named_modules():
        if isinstance(module, nn.Linear) and "lora" not in module_name:
            module.register_forward_hook(note(module_name))
    loss, _ = b.root(probe_row(prepared))["loss"]
    assert loss.isfinite()
    assert all(types == ({FULL} if p == part else {HALF}) for p, types in seen.items()), seen


# --- borders ----------------------------------------------------------------------------------------------------------


class Plus(nn.Module):
    """A part whose table was made in float32 and is a plain attribute, so that no cast ever reaches it."""

    def __init__(self, inner: nn.Module, width: int, kind: str):
        super().__init__()
        self.inner = inner
        table = torch.zeros(width)
        if kind == "buffer":
            self.register_buffer("pos_embed", table, persistent=False)
        else:
            self.pos_embed = table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + self.pos_embed)


@pytest.mark.parametrize("kind", ["buffer", "tensor"])
def test_a_float32_table_in_a_bfloat16_part_is_named(tmp_path: Path, half: Path, chat: Path, kind: str) -> None:
    """The error that users of MiniCPM-V know, out of a projector; without autocast, as that code runs."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {half}}}\ndata: {{train: {chat}, workers: 0}}\ntune: full\n"
        f"precision:\n  preset: bf16-params\n  parts:\n    projector: {{saved: bfloat16}}\ntrain: {{device: cpu}}\n"
    )
    from lensmith.recipe.run import load_run

    located = load_run(file)
    prepared = prepare(located, Terminal("quiet"))
    b = build(prepared)
    check_borders(prepared, b.root, b.precision)  # as it is, all fits
    b.root.autocast = type(b.root.autocast)("cpu", None)
    merger = b.tuned.model.model.visual.merger
    merger.mlp = Plus(merger.mlp, merger.mlp[0].in_features, kind)
    with pytest.raises(RuntimeError, match="same dtype"):
        b.root(probe_row(prepared))
    with pytest.raises(ModelError, match="DTYPE") as caught:
        check_borders(prepared, b.root, b.precision)
    message = str(caught.value)
    assert f"{kind} model.visual.merger.mlp.pos_embed is float32" in message
    assert "model.visual.merger.mlp.inner.0 (Linear) has bfloat16 parameters and is given float32" in message
    assert f"{file}:7 precision.parts.projector.parameters" in message
    assert all(p.grad is None for p in b.tuned.model.parameters())


def test_another_type_than_promised_is_named(tmp_path: Path, half: Path, chat: Path) -> None:
    run = runs.located(tmp_path / "run", half, chat, precision={"preset": "bf16"})
    prepared = prepare(run, Terminal("quiet"))
    b = build(prepared)
    other = precision.plan(Precision(preset="fp16"), CPU, HALF)
    with pytest.raises(ModelError, match="computes in bfloat16; part vision was promised float16"):
        borders.check(b.root, probe_row(prepared), other, lambda part, role: f"{part}.{role}")


def test_the_check_leaves_no_trace(tmp_path: Path, half: Path, chat: Path) -> None:
    run = runs.located(tmp_path / "run", half, chat, tune={"kind": "lora", "dropout": 0.5})
    prepared = prepare(run, Terminal("quiet"))
    b = build(prepared)
    random, weights = torch.get_rng_state(), {n: p.clone() for n, p in b.tuned.model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in b.root.modules())
    check_borders(prepared, b.root, b.precision)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(weights[n], p) and p.grad is None for n, p in b.tuned.model.named_parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in b.root.modules())
    assert b.root.cache is not None and not b.root.cache.known()


def test_errors_of_the_contract_are_told_before_the_first_step(tmp_path: Path, half: Path, chat: Path) -> None:
    over = {"preset": "bf16", "parts": {"vision": {"compute": "float32"}}}
    with pytest.raises(UserError, match="PRECISION"):
        runs.quiet_train(runs.located(tmp_path / "run", half, chat, precision=over))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
