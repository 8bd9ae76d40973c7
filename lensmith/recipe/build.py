"""The objects of a training run: model, what trains, root module, optimizer, cache; and what they amount to."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from lensmith.checkpoint.together import Full, gathered
from lensmith.core.errors import ConfigError
from lensmith.data.tokenizer import TextTokenizer, tokenizer_text
from lensmith.engine.determinism import seed_all
from lensmith.engine.optimizer import MasterAdamW
from lensmith.family.registry import read_json
from lensmith.model import precision, tune, value_head
from lensmith.model.load import base_dtype, is_tied, load_model, skeleton, widest_dtype
from lensmith.model.loading import Loading
from lensmith.model.neftune import add_noise
from lensmith.model.options import Lora, Quantize
from lensmith.model.quantize import Residuals, quantise, quantised_layers
from lensmith.model.root import Autocast, Root, vision_mode
from lensmith.model.vision_cache import VisionCache, fingerprint
from lensmith.objective.base import Objective
from lensmith.objective.next_token import NextTokenLoss
from lensmith.objective.options import DPO, KTO, ORPO, NextToken, Reward, SimPO
from lensmith.objective.preference import preference_objective
from lensmith.parallel.options import Local
from lensmith.parallel.ranks import Ranks
from lensmith.recipe.methods import adapter_folders, check_kept, check_packages, check_saved_types
from lensmith.recipe.prepare import Prepared, cache_folder
from lensmith.recipe.run import Run
from lensmith.recipe.spread import Spread, adding_up, check_engine, exact_values, keep_of, over_ranks

KEPT_BELOW = 1 << 22
"""On a CPU, blocks of fewer bytes stay with the process when they are freed."""


@dataclass
class Built:
    root: Root
    tuned: tune.Tuned
    optimizer: MasterAdamW
    precision: precision.PrecisionPlan
    trains: list[dict[str, Any]]
    trainable_parameters: int
    total_parameters: int
    part_of: Callable[[str], str]
    """Parameter name -> part, adapters apart."""
    spread: Spread | None = None
    """Where an engine spreads the model over ranks."""

    @property
    def full(self) -> Full:
        """The whole of a named tensor; all ranks ask for it together."""
        return gathered if self.spread is None else self.spread.full

    def whole_rest(self) -> AbstractContextManager[Any]:
        """Within, parts of the model can be called apart from the root."""
        return nullcontext() if self.spread is None else self.spread.whole_rest()

    def close(self) -> None:
        """Take away what an engine put around the model."""
        if self.spread is not None:
            self.spread.close()

    @property
    def forward(self) -> Callable[..., Any]:
        """What a row is given to."""
        return self.root if self.spread is None else self.spread.root


def device_of(run: Run) -> torch.device:
    name = run.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("CONFIG", f"train.device {name!r} is not a device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("CONFIG", "train.device names a GPU, but torch sees none", remedy="set train.device: cpu")
    return device


def loading_of(prepared: Prepared) -> Loading:
    """How the model is built, with the code that the run file pins."""
    return replace(prepared.family.loading, code=prepared.code)


def data_workers(run: Run) -> int:
    """Worker processes: as asked, else one less than the processors at hand, at most 4."""
    if run.data.workers is not None:
        return run.data.workers
    return max(0, min(4, len(os.sched_getaffinity(0)) - 1))


def set_threads(run: Run) -> int:
    """On a CPU, torch gets the processors that data workers leave; contended cores make more threads slower."""
    threads = run.train.threads or max(1, len(os.sched_getaffinity(0)) - data_workers(run))
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> None:
    """On a CPU with glibc: blocks below 4 MiB stay in the process when freed, instead of being mapped and zeroed again.

    Without it every activation costs page faults: measured 92,000 of them and 12 % of the CPU time in 150 small
    layers, 1,500 with it. The price is that the resident size stays near its peak. Larger blocks are mapped one by one:
    the C library puts fragments between aligned blocks, and freed large ones are seldom used again. In the heap they
    took up to 80 % more memory than was in use (docs/log.md).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: nothing to set
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    for option, value in ((mmap_threshold, KEPT_BELOW), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 28)):
        mallopt(option, value)


def build(
    prepared: Prepared,
    carried: Callable[[MasterAdamW], None] | None = None,
    ranks: Ranks | None = None,
    check: Callable[[Root, precision.PrecisionPlan], None] | None = None,
) -> Built:
    """Load the model, set what trains and in which type, and wrap it. Deterministic in `train.seed`.

    `carried` puts float32 parameters of the stage before into the optimizer, before anything is rounded. `check` looks
    at the root before an engine spreads it over `ranks`.
    """
    run = prepared.located.run
    device = device_of(run)
    plan = precision.plan(run.precision, device, base_dtype(prepared.model_folder))
    if device.type == "cpu":
        keep_freed_memory()
    seed_all(run.train.seed)
    first = torch.device("cpu") if _quantize(run) else device  # whole, it may not fit the device
    model = load_model(prepared.model_folder, widest_dtype(prepared.model_folder), first, loading_of(prepared))
    built = assemble(prepared, tuned(prepared, model), plan, device, carried, ranks, check)
    if built.spread is None or built.spread.whole_tower:
        built.root.cache = _cache(prepared, model, plan)
    return built


def tuned(prepared: Prepared, model: Any) -> tune.Tuned:
    """The model with rows for added tokens, and what trains of it."""
    run, new_ids, residuals = prepared.located.run, _grow(model, prepared), None
    if (rule := _quantize(run)) is not None and not next(model.parameters()).is_meta:
        residuals = _quantised(prepared, model, rule)
    return tune.apply(model, run.tune, prepared.family, new_ids, adapter_folders(prepared.located), residuals)


def _quantize(run: Run) -> Quantize | None:
    return run.tune.quantize if isinstance(run.tune, Lora) else None


def _quantised(prepared: Prepared, model: Any, rule: Quantize) -> Residuals:
    """Put the model on its device, with what `tune.quantize` names in 4 bits."""
    run, device = prepared.located.run, device_of(prepared.located.run)
    assert isinstance(run.tune, Lora)
    plan = precision.plan(run.precision, device, base_dtype(prepared.model_folder))
    rank = max([run.tune.rank, *run.tune.ranks.values()]) if run.tune.init == "loftq" else 0
    names = quantised_layers(model, prepared.family, rule)
    found = quantise(model, names, rule, plan.of(rule.parts[0]).compute, device, rank)
    model.to(device)
    return found


def assemble(
    prepared: Prepared,
    tuned: tune.Tuned,
    plan: precision.PrecisionPlan,
    device: torch.device,
    carried: Callable[[MasterAdamW], None] | None = None,
    ranks: Ranks | None = None,
    check: Callable[[Root, precision.PrecisionPlan], None] | None = None,
) -> Built:
    """The run's objects around a model as it is loaded, without a vision cache."""
    run, model, ranks = prepared.located.run, tuned.model, ranks or Ranks()
    part_of = _parts(run, prepared.family)
    if isinstance(run.objective, Reward):
        width = model.config.get_text_config().hidden_size
        beside = adapter_folders(prepared.located).adapter
        tuned.value_head = value_head.make(width, device, run.train.seed, [beside, prepared.model_folder])
    _check_rates(run, [part_of(name) for name, _ in tuned.trainable()])
    _check_head(run, model)
    engine = run.parallel.engine if ranks.several else Local()
    optimizer, exact = None, {}
    if isinstance(engine, Local):
        optimizer = _optimizer(prepared, tuned, part_of, plan, ranks)
        if carried is not None:
            carried(optimizer)
    else:
        exact = exact_values(tuned.trainable(), keep_of(prepared, tuned.trainable(), plan))
        precision.cast(model, plan, prepared.family.part_of)
    precision.verify(model, plan, prepared.family.part_of)
    _prepare_blocks(model, prepared)
    precision.PartCompute(plan, device).attach(model, prepared.family.part_of)
    compute = None if plan.compute == torch.float32 else plan.compute
    autocast = Autocast(device.type, compute, reuse=not run.train.recompute)
    root = Root(model, prepared.family, objective_of(run.objective), autocast=autocast, value_head=tuned.value_head)
    if run.train.neftune_alpha is not None:
        add_noise(root, run.train.neftune_alpha)
    trains, counts = tune.what_trains(tuned, part_of, run.optimizer.rate), tune.count(tuned)
    if check is not None:
        with adding_up(tuned.trainable(), keep_of(prepared, tuned.trainable(), plan)):
            check(root, plan)
    built = Built(root, tuned, optimizer, plan, trains, *counts, part_of)  # type: ignore[arg-type]
    if optimizer is None:
        built.spread = over_ranks(prepared, root, tuned, plan, ranks, part_of, exact)
        built.optimizer = built.spread.optimizer
        if carried is not None:
            carried(built.optimizer)
    return built


def objective_of(options: NextToken | DPO | ORPO | SimPO | KTO | Reward) -> Objective:
    if isinstance(options, NextToken):
        return NextTokenLoss(options.label_smoothing, options.z_loss)
    return preference_objective(options)


def _optimizer(
    prepared: Prepared, tuned: tune.Tuned, part_of: Callable[[str], str], plan: precision.PrecisionPlan, ranks: Ranks
) -> MasterAdamW:
    """The optimizer, and every parameter in its type. Masters, and what compensated parameters keep beside them, are
    made from what is on disk, before anything is rounded."""
    run = prepared.located.run
    named = tuned.trainable()
    keep = keep_of(prepared, named, plan)
    check_kept(run, keep)
    for name, p in named:
        if keep[name].update == "plain":
            p.data = p.data.to(keep[name].parameters)
    optimizer = MasterAdamW(named, [part_of(n) for n, _ in named], run.optimizer, keep, run.train.seed, ranks)
    precision.cast(tuned.model, plan, prepared.family.part_of)
    optimizer.settle()
    return optimizer


def rehearse(prepared: Prepared) -> None:
    """What would stop a stage only when its turn comes: device, precision, what trains, rates, engine. No weights are
    read."""
    run = prepared.located.run
    check_packages(run)
    plan = precision.plan(run.precision, device_of(run), base_dtype(prepared.model_folder))
    model = skeleton(prepared.model_folder, loading_of(prepared))
    _check_head(run, model)
    check_saved_types(run, plan, read_json(prepared.model_folder / "config.json"), is_tied(model))
    named = tune.apply(model, run.tune, prepared.family, [], adapter_folders(prepared.located)).trainable()
    _check_rates(run, [_parts(run, prepared.family)(name) for name, _ in named])
    check_kept(run, keep_of(prepared, named, plan))
    check_engine(prepared, model, named, plan)


def _check_rates(run: Run, parts: Sequence[str]) -> None:
    if not parts:
        raise ConfigError("TUNE", "nothing trains", remedy="look at tune")
    if unused := set(run.optimizer.parts) - set(parts):
        raise ConfigError("CONFIG", f"optimizer.parts sets rates for {sorted(unused)[0]!r}, of which nothing trains",
                          remedy=f"what trains: {', '.join(sorted(set(parts)))}")  # fmt: skip


def _check_head(run: Run, model: Any) -> None:
    if is_tied(model) and "head" in run.precision.parts:
        raise ConfigError("PRECISION", "precision.parts.head: the head of this model is its embedding",
                          remedy="set precision.parts.embeddings instead")  # fmt: skip


def _parts(run: Run, family: Any) -> Callable[[str], str]:
    """Parameter name -> the part whose rates it has. Adapters are one part, `adapter`, except those in a part that
    `optimizer.parts` names. Asked for each tensor in each step."""

    @cache
    def part_of(name: str) -> str:
        part = "head" if name.startswith(value_head.PREFIX) else family.part_of(name)
        return "adapter" if tune.is_adapter(name) and part not in run.optimizer.parts else part

    return part_of


def _prepare_blocks(model: Any, prepared: Prepared) -> None:
    run = prepared.located.run
    model.train()
    if run.train.recompute:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if run.train.compile:
        for block in prepared.family.blocks(model, "language"):
            block.compile()


def _grow(model: Any, prepared: Prepared) -> list[int]:
    """Give `model.add_tokens` rows in the embedding (and an untied head), each begun as the mean row; their ids.

    A token that the model has already keeps its row.
    """
    tokens = prepared.located.run.model.add_tokens
    if not tokens:
        return []
    tokenizer = TextTokenizer(prepared.train.spec.tokenizer_json)
    every = [tokenizer.control(token) for token in tokens]
    there = TextTokenizer(tokenizer_text(prepared.model_folder)).added
    ids = [n for n, token in zip(every, tokens, strict=True) if token not in there]
    if prepared.has_added_tokens or not ids:  # a stage before made their rows
        return every
    known = min(ids)
    if tokenizer.num_ids > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokenizer.num_ids, mean_resizing=False)
    with torch.no_grad():
        for table in {id(m.weight): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            table.weight[ids] = table.weight[:known].float().mean(0).to(table.weight.dtype)
    return every


def _cache(prepared: Prepared, model: torch.nn.Module, plan: precision.PrecisionPlan) -> VisionCache | None:
    """A cache for a frozen tower. Only the disk tier outlives the run, so only it needs the weights' fingerprint."""
    options = prepared.located.run.vision_cache
    mode = vision_mode(model, prepared.family)
    if not options.enabled or mode == "trained":
        return None
    if not options.disk_mb:
        return VisionCache(options.memory_mb << 20)
    parts = ("vision", "projector") if mode == "frozen" else ("vision",)
    frozen = [(n, p) for n, p in model.named_parameters() if prepared.family.part_of(n) in parts]
    computed = [precision.text(plan.of(part).compute) for part in parts]
    mark = fingerprint(frozen, f"{prepared.family}{mode}{computed}")
    base = (
        prepared.located.folder / options.folder
        if options.folder
        else cache_folder(prepared.located.run.data, prepared.located.folder)
    )
    return VisionCache(options.memory_mb << 20, options.disk_mb << 20, base / f"vision-{mark}")
