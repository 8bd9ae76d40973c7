"""Random faults planted into runs: does lensmith name module, part and sample, and what does a plain Trainer say?

    python benchmarks/planted_faults.py FOLDER [SEED ...]

One run for each seed; without seeds, 20 drawn by the operating system. A seed decides family, kind of fault, step,
module and sample. The same fault then goes into transformers' Trainer, with its defaults, around the same model, data
and loss. Prints a table; the exit status is 1 if anything was named otherwise than it was planted.
"""

from __future__ import annotations

import json
import math
import random
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import faults
import pytest
import runs

from lensmith.core.errors import RunError
from lensmith.data.pipeline import Pipeline
from lensmith.recipe import session
from lensmith.recipe.build import build
from lensmith.recipe.prepare import prepare
from lensmith.report.terminal import Terminal

STEPS = 8
KINDS = {
    "NaN weight": "bad_weights",
    "overflow weight": "forward_overflow",
    "NaN pixel": "bad_input",
    "Inf gradient": "backward_only",
    "backward-only NaN": "backward_only",
    "NaN moment": "bad_state",
    "transient": "transient",
}
"""What is planted -> the cause that must be found."""


@dataclass
class Fault:
    """`module`: full name; of a NaN pixel that of the first module of the tower."""

    family: str
    kind: str
    step: int
    module: str
    sample: int

    @property
    def weight(self) -> str:
        return f"{self.module}.weight"

    def now(self, live: faults.Live) -> bool:
        return live.step in (self.step, 0)

    def plants(self) -> dict[str, Any]:
        """For `faults.plant`."""
        return {
            "NaN weight": {"before_step": self.into_weight},
            "overflow weight": {"before_step": self.into_weight},
            "NaN pixel": {"at_build": faults.nan_pixel},
            "Inf gradient": {"at_build": self.into_gradient},
            "backward-only NaN": {"at_build": self.into_backward},
            "NaN moment": {"after_step": self.into_moment},
            "transient": {"at_build": self.into_gradient},
        }[self.kind]

    def into_weight(self, live: faults.Live) -> None:
        if live.step != self.step or not live.once("weight"):
            return
        weight = live.parameter(self.module).data
        if self.kind == "NaN weight":
            weight.view(-1)[self.sample % weight.numel()] = math.nan
        else:
            weight.copy_(weight.sign() * 3e38)

    def into_gradient(self, live: faults.Live) -> None:
        value = math.inf if self.kind == "Inf gradient" else math.nan

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            there = self.now(live) and (self.kind == "Inf gradient" or live.first)
            return torch.full_like(gradient, value) if there else gradient

        live.parameter(self.module).register_hook(spoil)

    def into_backward(self, live: faults.Live) -> None:
        module: Any = live.model.get_submodule(self.module)
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = plain(*args, **kwargs)
            return out + torch.sqrt(out - out) if self.now(live) else out

        module.forward = forward

    def into_moment(self, live: faults.Live) -> None:
        if live.step == self.step and live.once("moment"):
            live.built.optimizer.tensors()[f"exp_avg_sq/{self.weight}"].view(-1)[0] = math.nan


def draw(seed: int, base: Path, data: Path, family: str, rng: random.Random) -> Fault:
    """A kind, and a module of those that it can be in."""
    model: Any = build(prepare(faults.run_of(base.parent / f"draw-{seed}", base, data), Terminal("quiet"))).tuned.model
    kind = rng.choice(list(KINDS))
    only_linear = kind in ("overflow weight", "backward-only NaN")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (not only_linear and "Norm" in type(module).__name__)
        if getattr(module, "weight", None) is not None and module.weight.requires_grad
    ]
    module = faults.FAMILIES[family].patches if kind == "NaN pixel" else rng.choice(names)
    return Fault(family, kind, rng.randrange(2, 7), module, rng.randrange(24))


def named(fault: Fault, run: Path, part_of: Any) -> tuple[bool, str]:
    """Whether every incident names what was planted; what they say."""
    found = faults.incidents(run)
    weight_only = fault.kind == "NaN moment"
    module = None if weight_only or fault.kind == "transient" else fault.module
    part = None if module is None else part_of(fault.weight)
    samples = [f"train.jsonl:{fault.sample + 1}"] if fault.kind == "NaN pixel" else []
    right = bool(found)
    for i in found:
        right &= (i["cause"], i["module"], i["part"]) == (KINDS[fault.kind], module, part)
        right &= [Path(s["origin"]).name for s in i["samples"]] == samples
        if weight_only:
            right &= i["bad_parameters"] == [f"exp_avg_sq/{fault.weight}"]
        elif fault.kind != "NaN pixel":
            right &= i["step"] >= fault.step
    said = {(i["cause"], i["module"] or (i["bad_parameters"] or [""])[0]) for i in found}
    return right, "; ".join(f"{cause} {where}".strip() for cause, where in sorted(said))


class Whole(nn.Module):
    """Model and loss in the form that Trainer wants: the number of a step in, {"loss"} out."""

    def __init__(self, root: Any, steps: list[Any]):
        super().__init__()
        self.root, self.steps = root, steps

    def forward(self, number: torch.Tensor) -> dict[str, torch.Tensor]:
        step = self.steps[int(number)]
        return {"loss": sum(self.root(row)["loss"][0] for row in step.rows) / step.counts["tokens"]}


class InOrder(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter({"number": torch.tensor(n)} for n in range(STEPS))


def by_trainer(fault: Fault, folder: Path, base: Path, data: Path) -> str:
    """What a plain Trainer logs from the fault on, and what the weights are at the end."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    run = faults.run_of(folder / "prepared", base, data, vision_cache={"enabled": False})
    prepared = prepare(run, Terminal("quiet"))
    built = build(prepared)
    steps = list(Pipeline(prepared.train, prepared.plan, prepared.limits).steps())[:STEPS]
    live = faults.Live(faults.FAMILIES[fault.family], data.parent, built=built, first=True)
    plants = fault.plants()
    if "at_build" in plants:
        plants["at_build"](live)

    class Planting(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            live.step = state.global_step + 1
            if "before_step" in plants:
                plants["before_step"](live)

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if fault.kind == "NaN moment" and live.step == fault.step:
                optimizer.state[live.parameter(fault.module)]["exp_avg_sq"].view(-1)[0] = math.nan

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=1, max_steps=STEPS, logging_steps=1,
        learning_rate=1e-4, save_strategy="no", report_to=[], use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        Whole(built.root, steps), arguments, train_dataset=InOrder(), callbacks=[Planting()]
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    losses = [f"{r['loss']:.3g}" for r in rows if r["step"] >= fault.step][:4]
    bad = sum(not bool(p.isfinite().all()) for p in built.tuned.model.parameters())
    return f"loss {', '.join(losses)}; {bad} of {len(list(built.tuned.model.parameters()))} tensors not finite"


def one(seed: int, folder: Path) -> tuple[bool, list[str]]:
    rng = random.Random(seed)
    family = rng.choice(sorted(faults.FAMILIES))
    base, data = faults.make_base(folder / "base", family), faults.make_data(folder / "data")
    fault = draw(seed, base, data, family, rng)
    lines = data.read_text(encoding="utf-8").splitlines()
    white, other = faults.WHITE, fault.sample  # the white picture moves to the sample that was drawn
    lines[white], lines[other] = lines[other], lines[white]
    data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENSMITH_CACHE", str(folder / "cache"))
        patch.setattr(session, "write_report", lambda folder: folder)
        live = faults.plant(patch, family, data, **fault.plants())
        with suppress(RunError):  # without a checkpoint from before the fault there is no way back: what it says counts
            runs.quiet_train(faults.run_of(run, base, data, vision_cache={"enabled": False}))
        right, said = named(fault, run, live.built.root.family.part_of)
    where = f"{fault.module}, step {fault.step}"
    if fault.kind == "NaN pixel":
        where = f"train.jsonl:{fault.sample + 1}"
    trainer = by_trainer(fault, folder, base, data)
    return right, [str(seed), family, fault.kind, where, said, "yes" if right else "NO", trainer]


def main(folder: Path, seeds: list[int]) -> int:
    torch.set_num_threads(1)
    print("| seed | family | planted | where | lensmith says | equal | plain Trainer, from that step on |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    wrong = 0
    for seed in seeds:
        right, cells = one(seed, folder / str(seed))
        wrong += not right
        print(f"| {' | '.join(cells)} |", flush=True)
    print(json.dumps({"runs": len(seeds), "named as planted": len(seeds) - wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(s) for s in sys.argv[2:]] or [secrets.randbelow(10**6) for _ in range(20)]))
