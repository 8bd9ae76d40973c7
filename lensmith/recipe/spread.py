"""A built model given to an engine that spreads it over ranks, and rows that keep the ranks in step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lensmith.checkpoint.together import Full, gathered
from lensmith.core.encoded import PackedRow
from lensmith.core.errors import ConfigError
from lensmith.engine.optimizer import Keep, MasterAdamW, Named, groups_of
from lensmith.engine.options import AdamW
from lensmith.model import precision
from lensmith.model.root import MOST_POSITIONS, vision_mode
from lensmith.model.value_head import PREFIX
from lensmith.parallel import fsdp
from lensmith.parallel.options import FSDP2, DeepSpeed, Local
from lensmith.parallel.ranks import Ranks
from lensmith.parallel.zero import ZeroAdamW, check_installed
from lensmith.parallel.zero_config import Facts, Settings, kept_types, settings
from lensmith.recipe.prepare import Prepared
from lensmith.recipe.probe import probe_row
from lensmith.recipe.together import SharedStep

if TYPE_CHECKING:
    from lensmith.model.root import Root
    from lensmith.model.tune import Tuned

Read = Callable[[str, int, int], "torch.Tensor | None"]


@dataclass(frozen=True)
class Spread:
    """What stands in for the parts of a model that one rank holds whole. `root`: what is called with a row."""

    root: Callable[[Any], Any]
    optimizer: Any
    full: Full
    whole_rest: Callable[[], Any]
    """A context in which parts of the model can be called apart from the root."""
    close: Callable[[], None]
    whole_tower: bool = True
    """Whether a frozen tower is whole on every rank, so that it may run for one picture or another, or not at all."""
    warnings: tuple[str, ...] = ()


def keep_of(prepared: Prepared, named: Named, plan: precision.PrecisionPlan) -> dict[str, Keep]:
    """Parameter name -> how it is kept."""
    keep: dict[str, Keep] = {}
    for name, _ in named:
        if name.startswith(PREFIX):  # a few numbers, which keep their type
            keep[name] = Keep("plain", torch.float32, torch.float32, torch.float32)
            continue
        own = plan.of(precision.part_in(prepared.family.part_of, name))
        keep[name] = Keep(own.update, own.trained, own.gradients, own.optimizer)
    return keep


@contextmanager
def adding_up(named: Named, keep: dict[str, Keep]) -> Generator[None]:
    """Gradients are added up in the type that was promised, also before an engine does it in its own way."""
    before = [p.grad_dtype for _, p in named]
    for name, p in named:
        p.grad_dtype = keep[name].gradients
    yield
    for (_, p), dtype in zip(named, before, strict=True):
        p.grad_dtype = dtype


def exact_values(named: Named, keep: dict[str, Keep]) -> dict[str, torch.Tensor]:
    """The values of parameters that will be rounded while what is kept beside them is not."""
    return {
        n: p.detach().clone()
        for n, p in named
        if keep[n].update in ("masters", "compensated") and p.dtype.itemsize > keep[n].parameters.itemsize
    }


def over_ranks(
    prepared: Prepared, root: Root, tuned: Tuned, plan: precision.PrecisionPlan, ranks: Ranks,
    part_of: Callable[[str], str], exact: dict[str, torch.Tensor],
) -> Spread:  # fmt: skip
    """Spread `root`, whose parameters have their types, over the ranks. All ranks together."""
    engine = prepared.located.run.parallel.engine
    if isinstance(engine, FSDP2):
        return _fsdp2(prepared, root, tuned, plan, ranks, part_of, exact, engine)
    assert isinstance(engine, DeepSpeed)
    return _deepspeed(prepared, root, tuned, plan, ranks, part_of, exact, engine)


def check_engine(prepared: Prepared, model: nn.Module, named: Named, plan: precision.PrecisionPlan) -> None:
    """What an engine cannot do with a model of which `named` trains; no weights are needed. Raises `ConfigError`.

    A rank without pictures runs a small one beside its samples, so rows of one sample cannot do it; ZeRO-3 also spreads
    what is frozen.
    """
    engine = prepared.located.run.parallel.engine
    if isinstance(engine, Local):
        return
    if isinstance(engine, DeepSpeed):
        check_installed()
        _zero_settings(prepared, model, named, plan, engine, pinned=False)
    everything = isinstance(engine, DeepSpeed) and engine.zero == 3
    trained = vision_mode(model, prepared.family) != "frozen"
    if (everything or trained) and prepared.family.packing == "one_sample_per_row":
        raise ConfigError(
            "PARALLEL", f"{prepared.family.name}: rows hold one sample each, so a rank without pictures cannot keep up "
            "with the others", remedy="use parallel.engine: local, or fsdp2 with vision and projector frozen",
        )  # fmt: skip


def _fsdp2(
    prepared: Prepared, root: Root, tuned: Tuned, plan: precision.PrecisionPlan, ranks: Ranks,
    part_of: Callable[[str], str], exact: dict[str, torch.Tensor], engine: FSDP2,
) -> Spread:  # fmt: skip
    family, run = prepared.family, prepared.located.run
    stays = {"frozen": ("vision", "projector"), "projector": ("vision",), "trained": ()}[root.vision_mode]
    whole = [p for n, p in tuned.model.named_parameters() if family.part_of(n) in stays]

    def compute(part: str) -> torch.dtype | None:
        dtype = plan.of(part).compute
        return None if dtype == torch.float32 else dtype

    parts = [part for part in ("vision", "language") if part not in stays]
    blocks = [(block, compute(part)) for part in parts for block in family.blocks(tuned.model, part)]
    reduce = {plan.of(precision.part_in(family.part_of, n)).gradients for n, _ in tuned.trainable()}
    fsdp.shard(
        root, blocks, whole, engine, ranks, root.device, compute=compute("language"),
        reduce=torch.float32 if torch.float32 in reduce else reduce.pop(),
    )  # fmt: skip
    named = tuned.trainable()
    keep = keep_of(prepared, named, plan)
    optimizer = MasterAdamW(named, [part_of(n) for n, _ in named], run.optimizer, keep, run.train.seed, ranks, root)
    optimizer.settle()
    optimizer.load_pieces(_reading(exact))
    return Spread(root, optimizer, gathered, lambda: fsdp.gathered_rest(root), lambda: None)


def _deepspeed(
    prepared: Prepared, root: Root, tuned: Tuned, plan: precision.PrecisionPlan, ranks: Ranks,
    part_of: Callable[[str], str], exact: dict[str, torch.Tensor], engine: DeepSpeed,
) -> Spread:  # fmt: skip
    rates, named, model = prepared.located.run.optimizer, tuned.trainable(), tuned.model
    made = _zero_settings(prepared, model, named, plan, engine, pinned=root.device.type == "cuda")
    assert isinstance(rates, AdamW)
    groups = groups_of(named, [part_of(n) for n, _ in named], rates)
    optimizer = ZeroAdamW(
        root, named, groups, made.config, ranks, root.device, betas=rates.betas, eps=rates.eps, masters=exact
    )
    every = dict(model.named_parameters(remove_duplicate=False)) | dict(named)

    def full(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return optimizer.whole(every[name]) if name in every else tensor

    return Spread(
        optimizer.engine, optimizer, full, nullcontext, optimizer.close, engine.zero < 3, tuple(made.warnings)
    )


def _zero_settings(
    prepared: Prepared, model: Any, named: Named, plan: precision.PrecisionPlan, engine: DeepSpeed, *, pinned: bool
) -> Settings:
    """DeepSpeed's configuration for the run, with what its own file adds."""
    run, part_of, trains = prepared.located.run, prepared.family.part_of, {n for n, _ in named}
    frozen = [
        (n, plan.of(precision.part_in(part_of, n)).frozen) for n, _ in model.named_parameters() if n not in trains
    ]
    parameters, gradients = kept_types(keep_of(prepared, named, plan), frozen)
    rates = run.optimizer
    assert isinstance(rates, AdamW)  # the others need parameters whole (lensmith/recipe/methods.py)
    facts = Facts(
        engine.zero, engine.offload, parameters, gradients, run.train.clip_norm,
        {"lr": rates.lr, "betas": list(rates.betas), "eps": rates.eps, "weight_decay": rates.weight_decay},
        sum(p.numel() for _, p in named), model.config.get_text_config().hidden_size, pin_memory=pinned,
    )  # fmt: skip
    return settings(facts, None if engine.config is None else prepared.located.folder / engine.config)


def _reading(values: dict[str, torch.Tensor]) -> Read:
    def read(key: str, start: int, stop: int) -> torch.Tensor | None:
        kind, _, name = key.partition("/")
        return values[name].flatten()[start:stop].float() if kind == "param" and name in values else None

    return read


class Evened:
    """Steps whose micro-batches run the same modules on every rank: engines that spread the model gather and exchange
    as modules are reached, and a rank that leaves one out makes the others wait for ever.

    A rank with fewer micro-batches gets rows of which nothing is trained. Where the vision path trains, and a picture
    is in the step at all, a row without one gets a small sample beside its own, that is a segment of its own, has no
    target, and so no part in the loss; its gradient is zero.
    """

    def __init__(self, prepared: Prepared, *, pictures: bool):
        row = probe_row(prepared)
        nothing = np.zeros(0, np.int32)
        self.picture = replace(
            row, supervised_S=nothing, target_S=nothing, weight_S=np.zeros(0, np.float32),
            sample_S=np.zeros(0, np.int64), source_S=nothing, members=(),
        )  # fmt: skip
        self.text = without_pictures(self.picture)
        self.pictures = pictures

    def __call__(self, steps: Iterator[SharedStep]) -> Iterator[SharedStep]:
        for data in steps:
            data.rows = self._evened(data)
            yield data

    def one(self, row: PackedRow | None) -> PackedRow:
        """A row that runs the same modules as those of the other ranks; of None, one of which nothing is trained."""
        filler = self.picture if self.pictures else self.text
        if row is None:
            return replace(filler, meta={})
        return side_by_side(row, filler) if self.pictures and not len(row.image_keys) else row

    def _evened(self, data: SharedStep) -> list[PackedRow]:
        filler = self.picture if self.pictures and data.has_pictures else self.text
        rows = data.rows + [replace(filler, meta={})] * (data.most_rows - len(data.rows))
        if filler is not self.text:
            rows = [row if len(row.image_keys) else side_by_side(row, filler) for row in rows]
        for row in rows:
            row.meta[MOST_POSITIONS] = data.most_positions
        return rows


def without_pictures(row: PackedRow) -> PackedRow:
    """One token of a row, as a row."""
    first = replace(row.segments[0], start=0, length=1, prefix_length=0)
    return PackedRow(
        row.ids_T[:1], np.zeros(1, np.int8), row.position_ids_3T[:, :1], (first,), row.supervised_S, row.target_S,
        row.weight_S, row.sample_S, row.source_S,
    )  # fmt: skip


def side_by_side(row: PackedRow, filler: PackedRow) -> PackedRow:
    """A row without pictures and, behind it, one of which nothing is trained."""
    return replace(
        filler,
        ids_T=np.concatenate([row.ids_T, filler.ids_T]),
        kind_T=np.concatenate([row.kind_T, filler.kind_T]),
        position_ids_3T=np.concatenate([row.position_ids_3T, filler.position_ids_3T], axis=1),
        segments=(*row.segments, *(s.moved(row.num_tokens) for s in filler.segments)),
        supervised_S=row.supervised_S,
        target_S=row.target_S,
        weight_S=row.weight_S,
        sample_S=row.sample_S,
        source_S=row.source_S,
        members=row.members,
        dropped=row.dropped,
        compared=row.compared,
        meta=dict(row.meta),
    )
