"""What a run will need at its peak: its own objects, built and stepped without values on its largest row."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException

from lensmith.core.encoded import PackedRow
from lensmith.data.index import SMALL, Index
from lensmith.data.pipeline import Pipeline
from lensmith.data.plan import Plan
from lensmith.engine.step import gradient_norms
from lensmith.model import precision
from lensmith.model.attention import NAME, register
from lensmith.model.load import base_dtype, skeleton, tensor_dtypes, widest_dtype
from lensmith.model.memory import Kind, Ledger, make_fake, without_values
from lensmith.model.options import Lora
from lensmith.model.quantize import bytes_of_value, quantised_layers
from lensmith.model.root import CHUNK_VALUES
from lensmith.model.tune import is_adapter
from lensmith.model.vision_cache import VisionCache
from lensmith.objective.options import Frozen, Objective, reference_of
from lensmith.recipe.build import KEPT_BELOW, Built, assemble, device_of, loading_of, tuned
from lensmith.recipe.folder import read_json
from lensmith.recipe.methods import needs_values
from lensmith.recipe.prepare import Prepared

pc: Any = pyarrow.compute  # its functions are made at import: no stub knows them

LOOKED_AT_STEPS, FEWEST_STEPS = 300, 10
"""Steps whose rows are looked through for the largest; over many ranks, which have more rows each, fewer."""
BESIDE = 300 << 20
"""On a CPU, what is resident beside tensors: buffers of matrix libraries, code that is first used in a step, the data
path (about 130 MiB), and what large blocks take of the heap, which grows by 256 MiB (measured, docs/memory.md)."""


@dataclass(frozen=True)
class Phase:
    """The moment of a phase at which it needs most, in bytes."""

    name: str
    kinds: Mapping[Kind, int]
    features: int = 0
    """Of the vision cache, on a CPU."""
    allocator: int = 0

    @property
    def total(self) -> int:
        return sum(self.kinds.values()) + self.features + self.allocator


@dataclass(frozen=True)
class Prediction:
    device: torch.device
    phases: tuple[Phase, ...]
    features: int
    """Of the vision cache: in the memory of the machine, whatever the device."""
    row: PackedRow
    """The row that was stepped on."""
    built: Built
    """The run's objects, without values."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def predict(prepared: Prepared, index: Index, plan: Plan, ranks: int = 1) -> Prediction | None:
    """The peaks of a run over `index` and `plan`. None: no sample of its largest row can be read.

    Of the first steps; `ranks`: over which their samples are spread, so that rows may be smaller. Not counted: held-out
    evaluation, and what a resume maps besides. Raises one of `NEEDS_VALUES` for a model that cannot run without values.
    """
    run, folder = prepared.located.run, prepared.model_folder
    if needs_values(run):
        raise UnsupportedFakeTensorException("bitsandbytes")
    device, fake = device_of(run), without_values()
    model: Any = skeleton(folder, loading_of(prepared))
    register()
    model.set_attn_implementation(NAME)
    what_trains = tuned(prepared, model)
    types = precision.plan(run.precision, device, base_dtype(folder))
    with Ledger(device, fake, KEPT_BELOW if device.type == "cpu" else 0) as ledger:
        make_fake(model, fake, widest_dtype(folder), device, _mapped_files(folder, device))
        with fake:
            built = assemble(prepared, what_trains, types, device)
        ledger.hold(model.parameters())
        ledger.vocabulary = _vocabulary(built)
        _take_stock(ledger, built)
        phases = [_phase("Loading", ledger)]
    row, several = _largest_row(prepared, built, Pipeline(index, plan, prepared.limits, ranks=ranks))
    if row is None:
        return None
    built.root.cache = VisionCache(0) if run.vision_cache.enabled and built.root.vision_mode != "trained" else None
    with ledger:
        update_peak(ledger, built)
        phases.append(_phase("Update", ledger))
        step_peak(ledger, built, row, several=several)
        phases.append(_phase("Forward, backward", ledger))
        save_peak(ledger, built, adapters_only=isinstance(run.tune, Lora))
        phases.append(_phase("Save", ledger))
    if (copy := _copy(built, run.objective)) > 0:
        phases[1:] = [replace(p, kinds={**p.kinds, "weights": p.kinds.get("weights", 0) + copy}) for p in phases[1:]]
    features = _features(prepared, built, index, plan)
    if device.type == "cpu":
        phases[1:] = [replace(phase, features=features) for phase in phases[1:]]
    return Prediction(device, tuple(phases), features, row, built)


@dataclass(frozen=True)
class Kept:
    """A parameter in the memory of a run. `type`: torch's, or how it is quantised."""

    type: torch.dtype | str
    trained: bool
    count: int
    num_bytes: int


def kept_parts(prepared: Prepared) -> tuple[precision.PrecisionPlan, dict[str, list[Kept]]]:
    """Part -> its parameters as they will be in memory; needs no weights, also where memory cannot be predicted."""
    run, folder, family = prepared.located.run, prepared.model_folder, prepared.family
    model: Any = skeleton(folder, loading_of(prepared))
    rule = run.tune.quantize if isinstance(run.tune, Lora) else None
    layers = [] if rule is None else quantised_layers(model, family, rule)
    packed = {id(model.get_submodule(name).weight) for name in layers}
    what_trains = tuned(prepared, model)
    plan = precision.plan(run.precision, device_of(run), base_dtype(folder))
    precision.cast(what_trains.model, plan, family.part_of)
    parts: dict[str, list[Kept]] = {}
    for name, p in what_trains.model.named_parameters():
        own: tuple[torch.dtype | str, int] = p.dtype, p.numel() * p.element_size()
        if rule is not None and id(p) in packed:
            own = rule.type, round(p.numel() * bytes_of_value(rule))
        kept = Kept(own[0], p.requires_grad, p.numel(), own[1])
        parts.setdefault(precision.part_in(family.part_of, name), []).append(kept)
    return plan, parts


def _copy(built: Built, objective: Objective) -> int:
    """Bytes of a second copy of the weights, where the reference of a preference run is one."""
    if not isinstance(reference_of(objective), Frozen):
        return 0
    part_of = built.root.family.part_of
    named = [(n, p) for n, p in built.tuned.model.named_parameters() if not is_adapter(n)]
    return sum(p.numel() * built.precision.of(precision.part_in(part_of, n)).frozen.itemsize for n, p in named)


def _phase(name: str, ledger: Ledger) -> Phase:
    freed = ledger.resident - ledger.peak.total()
    return Phase(name, ledger.peak, allocator=freed + BESIDE if ledger.device.type == "cpu" else 0)


def _mapped_files(folder: Path, device: torch.device) -> list[int]:
    """On a CPU, tensors that have their type on disk are pages of the file."""
    if device.type != "cpu" or len(set(tensor_dtypes(folder).values())) > 1:
        return []
    return [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]


def _take_stock(ledger: Ledger, built: Built) -> None:
    """Say what the optimizer has; its counts of updates get values, for they decide."""
    optimizer = built.optimizer
    lean = optimizer.lean.state.values()
    ledger.name([t for n, p in optimizer.named if (t := optimizer.master[n]) is not p], "masters")
    ledger.name([s.residual for s in lean if s.residual is not None], "masters")
    ledger.name([t for s in lean for t in (s.exp_avg, s.exp_avg_sq)], "optimizer")
    for state in lean:
        state.step = torch.zeros((), device=ledger.device)


def _vocabulary(built: Built) -> int:
    return built.tuned.model.get_output_embeddings().weight.shape[0]


def _fill_gradients(ledger: Ledger, built: Built) -> None:
    with ledger.making("gradients"):
        for name, p in built.optimizer.named:
            p.grad = torch.zeros_like(p, dtype=built.optimizer.keep[name].gradients)


def update_peak(ledger: Ledger, built: Built) -> Counter[Kind]:
    """One update; from then on the optimizer has its state."""
    ledger.begin()
    _fill_gradients(ledger, built)
    with ledger.making("gradients"):
        gradient_norms(built.optimizer, built.part_of)
    with ledger.making("optimizer"):
        built.optimizer.step(1.0)
    built.optimizer.zero_grad()
    return ledger.peak


def step_peak(ledger: Ledger, built: Built, row: PackedRow, *, several: bool) -> Counter[Kind]:
    """Forward and backward of a row; of several of a step, those after the first find gradients."""
    if several:
        _fill_gradients(ledger, built)
    ledger.begin()

    def done(p: torch.Tensor) -> None:
        if p.grad is not None:
            ledger.name([p.grad], "gradients")

    if row.compared is not None and row.compared.reference_B is None:
        row.compared.reference_B = np.zeros(len(row.compared.role_B), np.float32)
    hooks = [p.register_post_accumulate_grad_hook(done) for _, p in built.optimizer.named]
    with ledger.making("activations"), torch.compiler.set_stance("force_eager"):
        loss, _ = built.root(row)["loss"]
        if loss.requires_grad:
            loss.backward()
    for hook in hooks:
        hook.remove()
    del loss
    built.optimizer.zero_grad()
    return ledger.peak


def save_peak(ledger: Ledger, built: Built, *, adapters_only: bool) -> Counter[Kind]:
    """The training state as it is gathered and looked through, then the weights in the types they are saved in."""
    ledger.begin()
    with ledger.making("copies"), torch.no_grad():
        state = {name: value.cpu().contiguous() for name, value in built.optimizer.tensors().items()}
        for value in state.values():
            torch.isfinite(value).all()
        del state
        named = built.tuned.model.named_parameters()
        saved = [p.to(_saved(built, name)) for name, p in named if is_adapter(name) or not adapters_only]
        del saved
    return ledger.peak


def _saved(built: Built, name: str) -> torch.dtype:
    return built.precision.of(precision.part_in(built.root.family.part_of, name)).saved


# -- the row ----------------------------------------------------------------------------------------------------


def _largest_row(prepared: Prepared, built: Built, pipeline: Pipeline) -> tuple[PackedRow | None, bool]:
    """The row of the first steps that keeps most values, and whether a step has several rows."""
    values = _values_kept(built)
    columns = [pipeline.index.column(name) for name in ("tokens", "patches", "supervised")]
    several, rows = False, {}
    for step in islice(pipeline.plan.steps(), max(FEWEST_STEPS, LOOKED_AT_STEPS // pipeline.ranks)):
        found = [tuple(member.number for member in row) for row in pipeline.rows_of(step)]
        several = several or len(found) > 1
        rows |= {row: values(*(int(column[list(row)].sum()) for column in columns)) for row in found if row}
    if not rows:
        return None, several
    row = pipeline.reread(max(rows, key=lambda row: rows[row]))
    return (row if row.num_tokens else None), several


def _values_kept(built: Built) -> Callable[[int, int, int], float]:
    """(tokens, patches, supervised) -> about as many values as a row keeps for its backward pass: every matrix has an
    input and an output for each of its tokens or patches."""
    widths: Counter[str] = Counter()
    for name, p in built.tuned.model.named_parameters():
        if p.ndim == 2:
            widths[built.root.family.part_of(name)] += sum(p.shape)
    vocabulary = _vocabulary(built)
    of_patch = widths["vision"] if built.root.vision_mode == "trained" else 0

    def values(tokens: int, patches: int, supervised: int) -> float:
        return tokens * widths["language"] + patches * of_patch + 3 * min(supervised * vocabulary, CHUNK_VALUES)

    return values


def _features(prepared: Prepared, built: Built, index: Index, plan: Plan) -> int:
    """Bytes of the features that the vision cache will hold, if the run shows as large a share of the pictures as of
    the samples."""
    options, mode = prepared.located.run.vision_cache, built.root.vision_mode
    if built.root.cache is None or mode == "trained" or not index.column("media_tokens").any():
        return 0
    limit = options.memory_mb << 20
    if index.num_rows > SMALL:
        return limit
    width = prepared.family.feature_width(read_json(prepared.model_folder / "config.json"), mode)
    size = built.precision.of("vision").compute.itemsize * width * _tokens_of_pictures(index)
    shown = plan.num_steps() * (plan.samples or plan.num_samples) / plan.num_samples
    return min(limit, round(size * min(1.0, shown)))


def _tokens_of_pictures(index: Index) -> float:
    """About the tokens of all pictures, each counted once: as if those of a sample had equally many."""
    found: list[pa.Table] = []
    for _, _, batch in index.batches(["verdict", "handles", "media_tokens", "images", "videos"]):
        rows = pa.Table.from_batches([batch]).filter(pc.equal(batch["verdict"], "train"))
        shown = pc.max_element_wise(pc.add(rows["images"], rows["videos"]), 1)
        share = pc.divide(pc.cast(rows["media_tokens"], pa.float64()), shown)
        at = pc.list_parent_indices(rows["handles"])
        found.append(pa.table({"handle": pc.list_flatten(rows["handles"]), "tokens": share.take(at)}))
    pictures = pa.concat_tables(found).group_by("handle").aggregate([("tokens", "mean")])
    return pc.sum(pictures["tokens_mean"]).as_py() or 0.0


# -- the device -------------------------------------------------------------------------------------------------


def room(device: torch.device) -> int:
    """Bytes of the device; of a CPU, of the machine or of what its control group allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:"))
    return min([total, *_group_limits()])


def _group_limits() -> list[int]:
    """Of this process's control groups, version 1 and 2, and of those above them."""
    limits: list[int] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        version_1 = "memory" in controllers.split(",")
        if controllers and not version_1:
            continue
        root = Path("/sys/fs/cgroup/memory" if version_1 else "/sys/fs/cgroup")
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            file = folder / ("memory.limit_in_bytes" if version_1 else "memory.max")
            text = file.read_text().strip() if folder.is_relative_to(root) and file.is_file() else "max"
            limits += [int(text)] if text.isdigit() else []
    return limits
