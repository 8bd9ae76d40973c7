"""ZeRO against one rank without it. Two gloo ranks, begun once for this file, run all cells and write what they saw;
the tests judge it.

The rows have a rank without pictures in some steps, where the tower runs on zeros.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import family_kit as fk
import pytest
import torch
import torch.distributed as dist

from lensmith.core.errors import RunError
from lensmith.engine.optimizer import Keep, MasterAdamW, groups_of
from lensmith.engine.options import AdamW
from lensmith.family.registry import load_family
from lensmith.model import precision, tune
from lensmith.model.load import load_model
from lensmith.model.options import Freeze, Full, Lora, Precision
from lensmith.model.root import Autocast, Root
from lensmith.objective.next_token import NextTokenLoss
from lensmith.parallel.ranks import Ranks

pytest.importorskip("deepspeed")

CPU = torch.device("cpu")
STEPS, BAD, TEXT = 10, 4, 6
OPTIMIZER = AdamW(lr=1e-3, weight_decay=0.1)
TUNES: dict[str, Any] = {"full": Full(), "lora": Lora(rank=4), "frozen": Freeze(train=["language", "embeddings"])}
STAGES, MODES = (1, 2, 3), ("full", "lora")
OFFLOADED = ((1, "full"), (2, "lora"), (3, "full"))
MOVES = ((2, 3), (3, 1), (1, 2))
PRESETS = (("bf16", "lora", 2), ("bf16", "lora", 3), *(("bf16-params", "full", stage) for stage in STAGES))


# -- what a rank runs -------------------------------------------------------------------------------------------------


class WithZeros(Root):
    """Runs the tower on zeros for a row without pictures, so that every rank has the same graph."""

    pixels: Any = None
    step_has_pictures = False

    def features(self, row: Any) -> Any:
        self.extra = None
        if len(row.image_keys) or not self.step_has_pictures:
            return super().features(row)
        pixels, grid, views = self.pixels
        self.extra = sum(f.float().sum() for f in self.family.encode_images(self.model, pixels, [grid], [views])) * 0.0
        return None

    def forward(self, row: Any) -> Any:
        terms = super().forward(row)
        loss, count = terms["loss"]
        return terms if self.extra is None else {**terms, "loss": (loss + self.extra, count)}


def make_rows(folder: Path) -> list[list[Any]]:
    """Of each step four micro-batches: two of each rank. One step has no picture at all."""
    kit = fk.make_kit(folder, lambda *_: None)

    def row(*turns: tuple[Any, str]) -> Any:
        return fk.row_of(kit, [kit.encode(fk.chat(("user", user), ("assistant", say))) for user, say in turns])

    def picture(n: int) -> Any:
        return fk.picture(60 + 9 * n, 56 + 7 * (n % 3), n)

    rows = [
        [
            row(([picture(n), f"what is {n}"], "red circle"), ("hello", f"green {n}")),
            row(("no picture", "yes " * (n + 1))) if n % 3 else row(([picture(n + 1), "a"], "blue square")),
            row(([picture(n + 2), picture(n), "two"], "there")),
            row(("what is it", "a square " * (n % 4 + 1))),
        ]
        for n in range(STEPS)
    ]
    rows[TEXT] = [row((f"no picture {n}", "yes " * n)) for n in range(1, 5)]
    return rows


class Cell:
    """A model, what trains of it and its root; the same on every rank."""

    def __init__(self, folder: Path, mode: str, rows: list[list[Any]], preset: str = "fp32"):
        torch.manual_seed(0)
        self.family = load_family(folder)
        model = load_model(folder, torch.float32, CPU, self.family.loading)
        tuned = tune.apply(model, TUNES[mode], self.family)
        random = torch.Generator().manual_seed(1)
        for name, p in tuned.trainable():
            if "lora_B" in name:
                p.data.normal_(0, 0.05, generator=random)
        self.model = model.train()
        self.named = tuned.trainable()
        self.before = {n: p.detach().clone() for n, p in self.named}
        self.values = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.plan = precision.plan(Precision(preset=preset), CPU, torch.float32)
        compute = self.plan.compute
        autocast = Autocast("cpu", None if compute == torch.float32 else compute)
        self.root = WithZeros(model, self.family, NextTokenLoss(), autocast=autocast)
        first = rows[0][0]
        size = int(first.image_grids_I3[0].prod())
        self.root.pixels = (
            torch.zeros_like(torch.from_numpy(first.pixels_PD)[:size]),
            tuple(first.image_grids_I3[0].tolist()),
            first.image_views[0],
        )

    def keeps(self) -> dict[str, Keep]:
        own = {n: self.plan.of(precision.part_in(self.family.part_of, n)) for n, _ in self.named}
        return {n: Keep(o.update, o.trained, o.gradients, o.optimizer) for n, o in own.items()}

    def parts(self) -> list[str]:
        return [self.family.part_of(n) for n, _ in self.named]

    def alone(self) -> MasterAdamW:
        optimizer = MasterAdamW(self.named, self.parts(), OPTIMIZER, self.keeps())
        precision.cast(self.model, self.plan, self.family.part_of)
        optimizer.settle()
        return optimizer

    def zero(self, stage: int, ranks: Ranks, *, offload: bool = False) -> Any:
        from lensmith.parallel.zero import ZeroAdamW
        from lensmith.parallel.zero_config import Facts, kept_types, settings

        keeps = self.keeps()
        precision.cast(self.model, self.plan, self.family.part_of)
        frozen = [(n, p.dtype) for n, p in self.model.named_parameters() if not p.requires_grad]
        types = kept_types(keeps, frozen)
        count = sum(p.numel() for _, p in self.named)
        config = settings(Facts(stage, offload, *types, 1.0, {}, count, 32)).config
        config["zero_optimization"] |= {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
        masters = self.before if types[0] == "bfloat16" else None
        groups = groups_of(self.named, self.parts(), OPTIMIZER)
        return ZeroAdamW(self.root, self.named, groups, config, ranks, CPU, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps,
                         masters=masters)  # fmt: skip


def count_of(step: list[Any]) -> float:
    return sum(float(row.weight_S.sum()) for row in step)


def run_alone(cell: Cell, rows: list[list[Any]]) -> tuple[list[float], list[dict[str, torch.Tensor]], MasterAdamW]:
    """(loss of each step, its gradients, the optimizer behind the last)."""
    optimizer, losses, gradients = cell.alone(), [], []
    for step in rows:
        total = torch.zeros((), dtype=torch.float64)
        for row in step:
            loss = cell.root(row)["loss"][0] / count_of(step)
            loss.backward()
            total += loss.detach().double()
        losses.append(total.item())
        gradients.append({n: g.float().clone() for n, g in optimizer.gradients()})
        optimizer.step(1.0)
        optimizer.zero_grad()
    return losses, gradients, optimizer


def put_together(pieces: list[tuple[str, int, torch.Tensor]], shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors out of all ranks' pieces. NaN where there was no piece; an element that came twice is an error."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [(k, s, v.detach().clone()) for k, s, v in pieces])
    found: dict[str, torch.Tensor] = {}
    for key, start, values in (piece for part in every for piece in part):
        shape = shapes[key]
        whole = found.setdefault(key, torch.full((max(1, torch.Size(shape).numel()),), float("nan")))
        target = whole[start : start + values.numel()]
        assert torch.isnan(target).all(), f"{key} twice"
        target.copy_(values.flatten())
    return {k: v.view(shapes[k]) for k, v in found.items()}


def zero_step(optimizer: Any, step: list[Any], ranks: Ranks, spoil: float = 1.0) -> float:
    """Forward and backward over this rank's half of the rows; the loss over all ranks."""
    optimizer.zero_grad()
    optimizer.engine.module.step_has_pictures = any(len(row.image_keys) for row in step)
    mine, total = step[ranks.rank * 2 : ranks.rank * 2 + 2], torch.zeros(1, dtype=torch.float64)
    for n, row in enumerate(mine):
        loss = optimizer.engine(row)["loss"][0] / count_of(step)
        optimizer.backward(loss * spoil, last=n == len(mine) - 1)
        total += loss.detach().double()
    optimizer.reduce()
    dist.all_reduce(total)
    return total.item()


def gradients_of(optimizer: Any) -> dict[str, torch.Tensor]:
    starts = {n: optimizer._shares.stretch(p)[0] for n, p in optimizer.named}
    return put_together([(n, starts[n], g) for n, g in optimizer.gradients()], optimizer.shapes())


def state_of(optimizer: Any) -> dict[str, torch.Tensor]:
    shapes = {f"{k}/{n}": s for n, s in optimizer.shapes().items() for k in ("param", "exp_avg", "exp_avg_sq")}
    shapes |= {f"step/{n}": () for n in optimizer.shapes()}
    return put_together([(p.key, p.start, p.values) for p in optimizer.pieces()], shapes)


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return fk.relative_gap(ours, theirs)


def compare(folder: Path, rows: Any, ranks: Ranks, mode: str, stage: int, reference: Any, offload: bool) -> Any:
    """Ten steps, and one that is not finite and left out between two of them."""
    cell = Cell(folder, mode, rows)
    optimizer = cell.zero(stage, ranks, offload=offload)
    losses, gradients, _ = reference
    seen: dict[str, Any] = {"loss": [], "gradient": [], "frozen": mode == "frozen"}
    for number, step in enumerate(rows):
        if number == BAD:
            zero_step(optimizer, rows[0], ranks, spoil=float("nan"))
            seen["bad"] = not all(bool(torch.isfinite(g).all()) for g in gradients_of(optimizer).values())
            optimizer.zero_grad()
        seen["loss"].append(abs(zero_step(optimizer, step, ranks) / losses[number] - 1))
        seen["gradient"].append(gap(gradients_of(optimizer), gradients[number]))
        optimizer.scale_gradients(0.5)
        half = gap({n: g * 2 for n, g in gradients_of(optimizer).items()}, gradients[number])
        seen["scaled"] = max(seen.get("scaled", 0.0), half)
        optimizer.scale_gradients(2.0)
        optimizer.step(1.0)
    optimizer.zero_grad()
    seen["skipped"], seen["rates"] = optimizer.engine.skipped_steps, optimizer.rates()
    return seen, cell, optimizer


def moved(state: dict[str, torch.Tensor], reference: MasterAdamW, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far the state is from the reference's, as a share of what the parameters moved, or of the moments."""
    theirs = reference.tensors()
    found = {"param": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    for kind in found:
        for name, old in before.items():
            if name.endswith("k_proj.bias"):  # no gradient in exact arithmetic
                continue
            key = f"{kind}/{name}"
            size = (theirs[key] - old).norm() if kind == "param" else theirs[key].norm()
            found[kind] = max(found[kind], ((state[key] - theirs[key]).norm() / size).item())
    steps = {n: float(state[f"step/{n}"]) for n in before}
    same = steps == {n: float(theirs[f"step/{n}"]) for n in before}
    return {**found, "steps": same, "fewest": min(steps.values()), "most": max(steps.values())}


def whole_equal(cell: Cell, optimizer: Any, state: dict[str, torch.Tensor]) -> bool:
    """`full_tensors` gives every parameter, and of those that train what the state has, in the model's type."""
    every, trained = list(cell.model.named_parameters()), dict(cell.named)
    frozen = {n: v for n, v in cell.values.items() if n not in trained}
    found = dict(optimizer.full_tensors(every))
    return found.keys() == {n for n, _ in every} and all(
        torch.equal(v, (state[f"param/{n}"] if n in trained else frozen[n]).to(v.dtype)) for n, v in found.items()
    )


def move(folder: Path, rows: Any, ranks: Ranks, of: int, to: int, state: dict[str, torch.Tensor], last: float) -> Any:
    """A state goes into another stage's engine, comes out as it was, and trains on."""
    cell = Cell(folder, "full", rows)
    optimizer = cell.zero(to, ranks)
    zero_step(optimizer, rows[1], ranks)  # something to forget
    optimizer.step(1.0)

    def read(key: str, start: int, stop: int) -> torch.Tensor | None:
        return state[key].flatten()[start:stop] if key in state else None

    optimizer.load_pieces(read)
    out = state_of(optimizer)
    same = out.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in out.items())
    loss = zero_step(optimizer, rows[0], ranks)
    optimizer.zero_grad()
    uneven = next(n for n, _ in cell.named)
    try:
        optimizer.load_pieces(lambda k, a, b: torch.ones(1) if k == f"step/{uneven}" else read(k, a, b))
        refused = ""
    except RunError as error:
        refused = error.message
    optimizer.close()
    return {"same": same, "loss": abs(loss / last - 1), "refused": refused}


def half(folder: Path, rows: Any, ranks: Ranks, preset: str, mode: str, stage: int) -> Any:
    """A run in half precision with a step left out, and the same one without it."""
    runs, last, types = [], {}, set()
    for spoiled in (True, False):
        cell = Cell(folder, mode, rows, preset)
        optimizer = cell.zero(stage, ranks)
        begun = {n: v for k, v in state_of(optimizer).items() if (n := k.removeprefix("param/")) in cell.before}
        first = all(torch.equal(begun[n], v) for n, v in cell.before.items())
        losses = []
        for number, step in enumerate(rows[:4]):
            if spoiled and number == 2:
                zero_step(optimizer, rows[0], ranks, spoil=float("nan"))
                optimizer.zero_grad()
            losses.append(zero_step(optimizer, step, ranks))
            if number == 3:
                last = gradients_of(optimizer)
            optimizer.step(1.0)
        state = state_of(optimizer)
        runs.append((losses, last, state, first, whole_equal(cell, optimizer, state)))
        types = {str(v.dtype) for _, v in optimizer.items()}
        optimizer.close()
    (a, grads_a, state_a, first, whole), (b, grads_b, state_b, _, _) = runs
    reference, gradients, _ = run_alone(Cell(folder, mode, rows[:1], preset), rows[:4])
    return {
        "first": first, "whole": whole, "types": sorted(types), "trace": a == b,
        "gradients": all(torch.equal(g, grads_b[n]) for n, g in grads_a.items()),
        "state": state_a.keys() == state_b.keys() and all(torch.equal(v, state_b[k]) for k, v in state_a.items()),
        "loss": max(abs(x / y - 1) for x, y in zip(a, reference, strict=True)),
        "gradient": (
            torch.cat([(grads_a[n] - g).flatten() for n, g in gradients[3].items()]).norm()
            / torch.cat([g.flatten() for g in gradients[3].values()]).norm()
        ).item(),
    }  # fmt: skip


def run_cells(rank: int, folder: Path, out: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ranks, rows = Ranks(rank, 2, rank, 2), make_rows(folder)
    found: dict[str, Any] = {}
    states: dict[int, Any] = {}
    for mode in (*MODES, "frozen"):
        reference = run_alone(Cell(folder, mode, rows), rows)
        for stage in STAGES:
            for offload in (False, True):
                if (offload and (stage, mode) not in OFFLOADED) or (mode == "frozen" and stage == 1):
                    continue
                seen, cell, optimizer = compare(folder, rows, ranks, mode, stage, reference, offload)
                state = state_of(optimizer)
                seen["moved"] = moved(state, reference[2], cell.before)
                seen["whole"] = whole_equal(cell, optimizer, state)
                found[f"{mode} {stage} {offload}"] = seen
                if mode == "full" and not offload:
                    states[stage] = state, zero_step(optimizer, rows[0], ranks)
                optimizer.close()
    for of, to in MOVES:
        found[f"{of} to {to}"] = move(folder, rows, ranks, of, to, *states[of])
    for preset, mode, stage in PRESETS:
        found[f"{preset} {mode} {stage}"] = half(folder, rows, ranks, preset, mode, stage)
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


# -- what the tests say -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(qwen25: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from torch.multiprocessing import start_processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path_factory.mktemp("zero") / "seen.json"
    start_processes(run_cells, args=(qwen25, out, port), nprocs=2, start_method="spawn")
    return json.loads(out.read_text())


CELLS = [(m, s, False) for m in MODES for s in STAGES] + [(m, s, True) for s, m in OFFLOADED]
CELLS += [("frozen", 2, False), ("frozen", 3, False)]


@pytest.mark.parametrize(("mode", "stage", "offload"), CELLS)
def test_losses_gradients_and_state_are_those_of_one_rank(
    seen: dict[str, Any], mode: str, stage: int, offload: bool
) -> None:
    """The update is AdamW's too: parameters and moments by name, each element on one rank."""
    cell = seen[f"{mode} {stage} {offload}"]
    assert max(cell["loss"]) < 1e-5 and len(cell["loss"]) == STEPS
    assert max(cell["gradient"]) < 1e-5 and cell["scaled"] < 1e-5
    counts = cell["moved"]["fewest"], cell["moved"]["most"]
    assert cell["moved"]["steps"] and counts == (STEPS - (mode == "full"), STEPS)  # a step had no picture
    assert cell["rates"]["language"] == OPTIMIZER.lr
    assert cell["moved"]["param"] < 1e-4 and cell["moved"]["exp_avg"] < 1e-5 and cell["moved"]["exp_avg_sq"] < 1e-5


@pytest.mark.parametrize(("mode", "stage", "offload"), CELLS)
def test_a_step_that_is_left_out_leaves_nothing(seen: dict[str, Any], mode: str, stage: int, offload: bool) -> None:
    """Its gradient showed the NaN; the steps behind it are in the test above; DeepSpeed left out none by itself."""
    cell = seen[f"{mode} {stage} {offload}"]
    assert cell["bad"] and cell["skipped"] == 0


@pytest.mark.parametrize(("mode", "stage", "offload"), CELLS)
def test_whole_tensors(seen: dict[str, Any], mode: str, stage: int, offload: bool) -> None:
    assert seen[f"{mode} {stage} {offload}"]["whole"]


@pytest.mark.parametrize(("of", "to"), MOVES)
def test_a_state_moves_to_another_stage_bit_for_bit(seen: dict[str, Any], of: int, to: int) -> None:
    found = seen[f"{of} to {to}"]
    assert found["same"] and found["loss"] < 1e-5


@pytest.mark.parametrize(("of", "to"), MOVES)
def test_parameters_of_one_group_have_one_count_of_updates(seen: dict[str, Any], of: int, to: int) -> None:
    assert "has had 1 updates" in seen[f"{of} to {to}"]["refused"]


@pytest.mark.parametrize(("preset", "mode", "stage"), PRESETS)
def test_half_precision(seen: dict[str, Any], preset: str, mode: str, stage: int) -> None:
    """State and gradients are float32; masters have the values from before rounding; a step that is left out changes
    no bit of what follows. bfloat16 has 8 bits, and the order in which gradients meet is the engine's."""
    found = seen[f"{preset} {mode} {stage}"]
    assert found["types"] == ["torch.float32"] and found["first"] and found["whole"]
    assert found["trace"] and found["gradients"] and found["state"]
    assert found["loss"] < 1e-3 and found["gradient"] < 2**-6
