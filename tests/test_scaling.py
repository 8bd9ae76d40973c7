"""The scaling plan: formulas against numbers derived by hand, counted operations and real collectives."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lensmith.cli import main
from lensmith.core.errors import ConfigError
from lensmith.family.registry import load_family
from lensmith.model.flops import Amounts, Formula, Meter, layers_of
from lensmith.model.memory import Ledger
from lensmith.model.roofline import Rates, measure
from lensmith.parallel import fsdp
from lensmith.parallel.cost import Exchange, Layout, Tensor, exchanges, handed, layouts
from lensmith.parallel.devices import DEVICES, device
from lensmith.parallel.options import FSDP2
from lensmith.parallel.ranks import Ranks
from lensmith.parallel.reduce import Reducer
from lensmith.recipe import workload
from lensmith.recipe.memory import Phase, predict, step_peak
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.recipe.rank_memory import EXCHANGING_BYTES, peak_of
from lensmith.recipe.scaling import Ask, numbers_of, plan
from lensmith.report.terminal import Terminal

GIGA, TERA = 1e9, 1e12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("data"), 24, pictures=60)


# -- arithmetic by shapes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Qwen2.5-VL-7B without weights, and its family."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = tiny.make_model(tmp_path_factory.mktemp("7b") / "base")
    text = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064,
            "num_attention_heads": 28, "num_key_value_heads": 4, "layer_types": ["full_attention"] * 28}  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
              "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
    change(folder, text, vision, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    return model, load_family(folder)


def change(folder: Path, text: dict[str, Any], vision: dict[str, Any], **rest: Any) -> None:
    """Of a model's config; the weights stay as they are, for nobody loads them."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text | rest
    config["vision_config"] |= vision
    (folder / "config.json").write_text(json.dumps(config | rest))


def one(tokens: int, supervised: int, patches: int) -> Amounts:
    return Amounts(tokens, supervised, patches // 4, patches, 1)


def test_matrices_of_a_seven_billion_model(seven_billion: tuple[Any, Any]) -> None:
    """28 blocks of 2 H^2 + 2 H kv + 3 H I, without biases and norms; the tower's 32 blocks of 4 D^2 + 3 D I."""
    layers = layers_of(*seven_billion)
    language = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18_944)
    assert sum(layer.values for layer in layers if layer.per == "tokens") == language == 6_525_288_448
    assert [layer.values for layer in layers if layer.per == "supervised"] == [3584 * 152_064]
    tower = 32 * (4 * 1280**2 + 3 * 1280 * 3420)
    assert sum(layer.values for layer in layers if layer.per == "patches") == tower + 1176 * 1280
    assert {layer.attention for layer in layers if layer.block} == {3584, 1280}
    assert Counter(layer.window for layer in layers if layer.per == "patches" and layer.block) == {64: 28, None: 4}


def test_flops_of_a_picture_and_a_question(seven_billion: tuple[Any, Any]) -> None:
    """A picture of 5,120 patches, 100 tokens of prompt and 120 of answer: 7.2 TF of tower, 40.4 of language model and
    0.13 of head forward."""
    model, family = seven_billion
    sample = one(1500, 120, 5120)
    model.requires_grad_(False)
    forward = Formula(model, family).useful(sample)
    assert float(forward.vision) / TERA == pytest.approx(7.16, rel=0.01)
    linear, pairs, head = 2 * 6.525e9 * 1500, 2 * 28 * 1500**2 * 3584, 2 * 3584 * 152_064 * 120
    assert float(forward.rest) == pytest.approx(linear + pairs + head, rel=1e-3)
    model.model.language_model.requires_grad_(True)
    model.model.language_model.embed_tokens.requires_grad_(False)
    full = Formula(model, family).useful(sample)
    # no product gives the gradient of the embeddings: the first block's input needs none, but for its own weights
    assert float(full.rest) == pytest.approx(3 * linear + 3 * pairs + 2 * head, rel=1e-3)
    again = Formula(model, family, recompute=True)
    down = 2 * 28 * 3584 * 18_944 * 1500  # the last product of each block is not computed again
    assert float(again.executed(sample).rest) == pytest.approx(4 * linear - down + 4 * pairs + 2 * head, rel=1e-3)
    assert float(again.useful(sample).rest) == float(full.rest)
    assert (full.vision, again.vision_trains) == (forward.vision, False)
    model.requires_grad_(False)
    model.model.language_model.layers[-1].requires_grad_(True)
    last = Formula(model, family)
    assert float(last.useful(sample).rest) == pytest.approx(
        linear + pairs + 2 * (linear + pairs) / 28 + 2 * head, rel=1e-3
    )
    assert [last.reached("language", n) for n in (0, 26, 27)] == [False, False, True]


TUNES: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora"},
    "last block": {"kind": "freeze", "train": ["language"], "last_layers": 1},
}


def prepared_run(folder: Path, data: Path, base: Path, **over: Any) -> Prepared:
    same = {"data": {"cache": str(folder / "cache")}, "vision_cache": {"enabled": False}}
    return prepare(runs.located(folder / "run", base, data, **runs.merge(same, over)), Terminal("quiet"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tune", TUNES)
def test_the_formula_counts_what_is_computed(tune: str, recompute: bool, data: Path, tmp_path: Path) -> None:
    """Within 3 % of a model that is mostly matrices, as all are that are worth it."""
    base = tiny.make_model(tmp_path / "base")
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    text = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
            "num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}  # fmt: skip
    vision = {"hidden_size": 128, "intermediate_size": 512, "out_hidden_size": 512}
    change(base, text | {"rope_parameters": rope, "rope_scaling": rope}, vision)
    prepared = prepared_run(tmp_path, data, base, tune=TUNES[tune], train={"recompute": recompute})
    found = predict(prepared, prepared.train, prepared.plan)
    assert found is not None
    work = workload.Workload(prepared, prepared.train, prepared.plan, 4, found)
    assert work.formula_over_counted == pytest.approx(1, abs=0.03)


def test_a_meter_counts_operations(tmp_path: Path) -> None:
    x, w = torch.zeros(8, 16), torch.zeros(16, 4, requires_grad=True)
    with Meter() as meter:
        (x @ w).relu().view(4, 8).sum().backward()
    found = {op.name: op for op in meter.operations}
    assert meter.flops == 2 * (2 * 8 * 16 * 4)  # forward, gradient of w
    assert (found["relu"].flops, found["relu"].bytes) == (0, 2 * 4 * 8 * 4)
    assert "view" not in found
    q = torch.zeros(1, 2, 32, 8)
    with Meter() as meter:
        nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert meter.flops == 2 * (2 * 2 * 32 * 32 * 8) // 2


def test_rates_are_measured_on_the_operations_themselves() -> None:
    a, b = torch.ones(256, 256), torch.ones(256, 256)
    with Meter() as meter:
        a @ b
        torch.nn.functional.silu(a)
    rates = measure(meter.operations)
    assert set(rates.known) == set(meter.operations)
    assert rates.flops[torch.float32] > 1e9
    product = next(op for op in meter.operations if op.name == "mm")
    assert rates.seconds({product: 3}) == pytest.approx(3 * rates.known[product])
    sheet = Rates({torch.float32: 1e9}, 1e9, launch=1e-6)
    assert sheet.of(product) == 2 * 256**3 / 1e9
    assert sheet.of(next(op for op in meter.operations if op.name == "silu")) == 2 * 4 * 256**2 / 1e9
    assert measure(meter.operations, limit_seconds=0).known == {}


# -- what ranks exchange ----------------------------------------------------------------------------------------


def test_rings() -> None:
    """Of R ranks each sends R - 1 parts of 1/R, twice for a sum."""
    assert Exchange("all_reduce", 800, 8).wire == 2 * 7 * 100
    assert Exchange("reduce_scatter", 800, 8).wire == 7 * 100
    assert Exchange("all_gather", 100, 8).wire == 7 * 100  # its own share, to everyone
    h100 = device("h100")
    memory = 3350e9 * 0.8
    within = Exchange("all_gather", 10**9, 8, 0).seconds(h100)  # 1 GB copied in, 8 GB out, each read and written
    assert within == pytest.approx(7e9 / (450e9 * 0.8) + 18e9 / memory)
    between = Exchange("all_reduce", 10**9, 16, 3).seconds(h100)
    assert between == pytest.approx(2 * 15 / 16 * 1e9 / (50e9 * 0.8) + 4e9 / memory + 3 * 30 * 5e-6)
    with pytest.raises(ConfigError, match="no figures are known of a device 'h1000'"):
        device("h1000")


def test_volumes_of_a_full_and_a_lora_run() -> None:
    """7.6 billion parameters in bfloat16: 2 and 3 times as much leaves a rank as there are parameters (ZeRO, arXiv
    1910.02054, section 7); LoRA of rank 8 sums 20 million values."""
    whole = [Tensor((7_600_000, 1000), True, 2, 2, 2, "all")]
    n = 64

    def wire(layout: Layout, tensors: list[Tensor]) -> float:
        return sum(e.wire for e in exchanges(layout, tensors, 1, (0, 0))) / GIGA

    assert wire(Layout("local", n), whole) == pytest.approx(30.4 * 63 / 64, rel=1e-3)
    assert wire(Layout("zero-1", n, n), whole) == pytest.approx(30.4 * 63 / 64, rel=1e-3)
    assert wire(Layout("fsdp2", n, n), whole) == pytest.approx(45.6 * 63 / 64, rel=1e-3)
    assert wire(Layout("zero-3", n, n), whole) == pytest.approx(45.6 * 63 / 64, rel=1e-3)
    # HSDP: 3 times within the node, and sums of an eighth between nodes
    assert wire(Layout("hsdp", n, 8), whole) == pytest.approx(45.6 * 7 / 8 + 2 * 7 / 8 * 15.2 / 8, rel=1e-3)
    lora = [Tensor((7_600_000, 1000), False, 2, 4, 2, None), Tensor((20_185, 1000), True, 4, 4, 2, "all")]
    assert wire(Layout("local", 8), lora) == pytest.approx(2 * 7 / 8 * 20_185_001 * 4 / GIGA)
    assert exchanges(Layout("local", 1), whole, 1, (48, 1)) == []
    assert [layout.engine for layout in layouts(16, 8)] == ["local", "fsdp2", "hsdp", "zero-1", "zero-2", "zero-3"]
    assert [layout.engine for layout in layouts(8, 8)] == ["local", "fsdp2", "zero-1", "zero-2", "zero-3"]


class Counting(TorchDispatchMode):
    """Bytes that are handed to gloo."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {"_allgather_base_": ("all_gather", 1), "_reduce_scatter_base_": ("reduce_scatter", 1)}
        if (found := given.get(func.overloadpacket.__name__)) is not None:
            tensor = args[found[1]]
            self.bytes[found[0]] += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def model_of_blocks() -> nn.Module:
    """Two blocks whose rows do not divide by two, a head behind them, and a part that stays whole."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6, bias=False)) for _ in range(2)]
    return nn.ModuleDict({"tower": nn.Linear(6, 6), "blocks": nn.ModuleList(blocks), "head": nn.Linear(6, 5)})


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = model_of_blocks()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.model["tower"](x)
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.model["blocks"]:
                x = block(x)
            return self.model["head"](x).sum()


def tensors_of(model: nn.Module) -> list[Tensor]:
    def unit(name: str) -> str | None:
        return None if name.startswith("tower") else name[:8] if name.startswith("blocks") else "rest"

    found = [(n, p, unit(n)) for n, p in model.named_parameters()]
    return [Tensor(tuple(p.shape), p.requires_grad, 4, 4, 2, u, 1 if u == "rest" else 2) for _, p, u in found]


def both_engines(rank: int, port: int, results: Any) -> None:
    """One of two ranks: a sum of gradients, then two micro-batches under FSDP2."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank, 2)
    whole = Whole()
    whole.model["tower"].requires_grad_(False)
    trained = [p for p in whole.parameters() if p.requires_grad]
    reducer = Reducer(trained, [torch.float32] * len(trained), ranks)
    reducer.arm()
    whole(torch.ones(3, 6)).backward()
    reducer.finish()
    spread, counting = Whole(), Counting()
    spread.model["tower"].requires_grad_(False)
    fsdp.shard(
        spread, [(block, torch.bfloat16) for block in spread.model["blocks"]], spread.model["tower"].parameters(),
        FSDP2(), ranks, torch.device("cpu"), compute=torch.bfloat16, reduce=torch.float32,
    )  # fmt: skip
    with counting:
        for _ in range(2):
            spread(torch.ones(3, 6)).backward()
    if rank == 0:
        results.put((dict(ranks.sent), dict(counting.bytes)))
    dist.destroy_process_group()


def test_bytes_of_two_ranks_are_as_predicted() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    results: Any = context.Queue()
    pair = [context.Process(target=both_engines, args=(rank, port, results)) for rank in range(2)]
    for process in pair:
        process.start()
    summed, spread = results.get(timeout=120)
    for process in pair:
        process.join(60)
    model = model_of_blocks()
    model["tower"].requires_grad_(False)  # type: ignore[index]
    tensors = tensors_of(model)
    assert summed == handed(exchanges(Layout("local", 2), tensors, 1, (0, 0)))
    assert summed == {"all_reduce": 4 * (2 * (7 * 6 + 7 + 6 * 7) + 5 * 6 + 5 + 2 * 3 + 2)}
    assert spread == handed(exchanges(Layout("fsdp2", 2, 2), tensors, 2, (0, 0)))
    block, head = 4 * 6 + 4 + 3 * 7, 3 * 6 + 3  # rows of a share: half of them, rounded up
    assert spread == {
        "all_gather": 2 * 2 * (2 * 2 * block + head),
        "reduce_scatter": 2 * 4 * 2 * (2 * block + head),
    }


# -- memory of a rank -------------------------------------------------------------------------------------------


def test_zeros_of_the_paper() -> None:
    """7.5 billion parameters in half precision with 12 bytes of state, 64 ranks: 120, 31.4, 16.6 and 1.9 GB (arXiv
    1910.02054, figure 1)."""
    n = 7_500_000_000
    kinds: Any = {"weights": 2 * n, "gradients": 2 * n, "optimizer": 8 * n, "masters": 4 * n}
    found: Any = SimpleNamespace(phases=(Phase("Update", kinds),))
    tensors = [Tensor((7_500_000, 1000), True, 2, 2, 2, "all")]
    for engine, gigabytes in (("zero-1", 31.4), ("zero-2", 16.6), ("zero-3", 1.9), ("fsdp2", 1.9)):
        layout = Layout(engine, 64, 64)  # type: ignore[arg-type]
        assert peak_of(found, layout, tensors, host=False).total / GIGA == pytest.approx(gigabytes, abs=0.06)
    alone = peak_of(found, Layout("local", 1), tensors, host=False)
    assert (alone.total, alone.phase) == (120 * GIGA, "Update")


def test_units_are_whole_while_they_compute() -> None:
    kinds: Any = {"weights": 300, "casts": 150, "activations": 1000, "gradients": 0, "optimizer": 600}
    found: Any = SimpleNamespace(phases=(Phase("Forward, backward", kinds, features=5, allocator=7),))
    tensors = [Tensor((25, 1), True, 4, 4, 2, name) for name in ("a", "b", "c")]
    peak = peak_of(found, Layout("fsdp2", 5, 5), tensors, host=True)
    # a fifth of weights and state; two units of 25 values in half precision; the gradient of one in float32
    assert peak.kinds == {"weights": 60, "activations": 1000, "optimizer": 120, "exchange": 2 * 50 + 100,
                          "vision cache": 5, "allocator": 7 + EXCHANGING_BYTES}  # fmt: skip
    frozen = [replace(t, unit=None) for t in tensors]
    assert peak_of(found, Layout("fsdp2", 5, 5), frozen, host=False).kinds["weights"] == 300
    local = peak_of(found, Layout("local", 5), tensors, host=False)
    assert local.kinds["weights"] == 300 and local.phase == "Forward, backward"


# -- the command ------------------------------------------------------------------------------------------------


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [event for event in events if event["event"] == "row"]


def test_the_command(qwen25: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({
        "model": {"path": str(qwen25)}, "data": {"train": str(data), "max_tokens": 512},
        "batch": {"samples": 8, "device_tokens": 512}, "tune": "full", "train": {"epochs": 2},
    }))  # fmt: skip
    ask = Ask((1, 8, 16), "h100", price=2.0)
    (found,) = plan(file, (), Terminal("json"), ask)
    told = rows_of(capsys)
    assert [(row["ranks"], row["engine"]) for row in told][:3] == [(1, "local"), (8, "local"), (8, "fsdp2")]
    assert sum(row["recommended"] for row in told) == 1
    assert {row["steps"] for row in told} == {6}
    for row in found:
        assert row.step_seconds >= row.compute_seconds + row.update_seconds + row.network_seconds
        assert row.days == pytest.approx(6 * row.step_seconds / 86_400)
        assert row.dollars == pytest.approx(row.days * 24 * row.ranks * 2.0)
        assert 0 < row.mfu < 1 and row.balance >= 1 and row.room_bytes == 80 << 30
    fsdp2 = next(row for row in found if (row.ranks, row.engine) == (16, "fsdp2"))
    local = next(row for row in found if (row.ranks, row.engine) == (16, "local"))
    assert fsdp2.memory["weights"] < local.memory["weights"] / 8
    assert local.sent["all_reduce"] == 4 * sum(p.numel() + 1 for p in tiny_parameters(qwen25))
    slow, fast = (
        plan(file, (), Terminal("quiet"), replace(ask, ranks=(16,), network=n))[0][0] for n in (1e6, 50 * GIGA)
    )
    assert slow.network_seconds > fast.network_seconds and (slow.limit, fast.limit) == ("network", "compute")
    (weak,) = plan(file, (), Terminal("quiet"), replace(ask, ranks=(1, 2), samples_per_rank=6, mfu=0.4))
    assert [(row.ranks, row.steps) for row in weak][:2] == [(1, 8), (2, 4)]


def tiny_parameters(folder: Path) -> list[torch.Tensor]:
    from transformers import AutoModelForImageTextToText

    return list(AutoModelForImageTextToText.from_pretrained(folder).parameters())


def test_this_machine(qwen25: Path, data: Path, tmp_path: Path) -> None:
    run = {"model": {"path": str(qwen25)}, "data": {"train": str(data), "max_tokens": 512, "workers": 0}}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**run, "batch": {"samples": 8, "device_tokens": 512}, "tune": "full"}))
    (found,) = plan(file, (), Terminal("quiet"), Ask((1, 2), "cpu"))
    alone, pair = found[0], found[1]
    assert alone.step_seconds == pytest.approx(alone.compute_seconds + alone.update_seconds + alone.data_seconds)
    assert pair.room_bytes == alone.room_bytes // 2
    assert pair.memory["allocator"] > 0 and pair.memory_bytes < alone.room_bytes


def test_numbers_of_ranks() -> None:
    assert numbers_of("64, 8,8") == (8, 64)
    for wrong in ("", "0", "8;64", "-1", "eight"):
        with pytest.raises(ConfigError, match="names no numbers of ranks"):
            numbers_of(wrong)


def test_wrong_devices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "run.yaml", "--device", "h1"])
    assert ended.value.code == ConfigError.exit_code
    assert "known: h100" in capsys.readouterr().err
    assert all(d.peak["bfloat16"] >= d.peak["float32"] for d in DEVICES.values())


def test_features_that_a_rank_has_already() -> None:
    """Against a simulation: pictures are shown E times, each time to one of R ranks."""
    rng = np.random.default_rng(0)
    for ranks, times in ((1, 3), (4, 3), (8, 10)):
        work: Any = SimpleNamespace(
            found=SimpleNamespace(built=SimpleNamespace(root=SimpleNamespace(cache=object()))),
            looks=np.arange(1, 2001), steps=times * 20,
        )  # fmt: skip
        plan_of: Any = SimpleNamespace(samples=100, num_samples=2000)
        shown = rng.integers(0, ranks, (2000, times))
        seen = sum(shown[i, e] in shown[i, :e] for i in range(2000) for e in range(times)) / shown.size
        assert workload.Workload.hits(work, plan_of, ranks) == pytest.approx(seen, abs=0.02)


def test_a_picture_of_several_samples_of_a_row_is_computed_once(data: Path, qwen25: Path, tmp_path: Path) -> None:
    prepared = prepared_run(tmp_path, data, qwen25)
    found = predict(prepared, prepared.train, prepared.plan)
    assert found is not None
    work = workload.Workload(prepared, prepared.train, prepared.plan, 4, found)
    shows = int(np.flatnonzero(work.looks != 0)[0])
    twice = work.of_row(np.array([shows, shows]))
    assert twice.patches.tolist() == [work.amounts.patches[shows], 0]
    assert twice.tokens.tolist() == [work.amounts.tokens[shows]] * 2


def test_the_ledger_and_the_meter_do_not_disturb_each_other(data: Path, qwen25: Path, tmp_path: Path) -> None:
    prepared = prepared_run(tmp_path, data, qwen25)
    found = predict(prepared, prepared.train, prepared.plan)
    assert found is not None
    want = next(phase for phase in found.phases if phase.name == "Forward, backward")
    model: Any = found.built.tuned.model
    with Ledger(found.device, next(model.parameters()).fake_mode) as ledger, Meter():
        peak = step_peak(ledger, found.built, found.row, several=False)
    assert abs(peak["activations"] - want.kinds["activations"]) <= 0.05 * want.kinds["activations"]
