"""DeepSpeed's configuration: made from the run, or from a user's own JSON file that is held against the run.

The run decides batch, clipping, optimizer, schedule and precision; a file that says otherwise would train something
else than the run file says, so every such key is an error. What only tunes communication and memory is taken over.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from lensmith.core.errors import ConfigError

BUCKET = 200_000_000
"""Elements that are reduced or gathered at once (docs/deepspeed.md)."""
AUTO = "auto"
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

OF_THE_RUN = {
    "train_batch_size": "batch.samples says how many samples a step has",
    "train_micro_batch_size_per_gpu": "batch.device_tokens says how much a rank computes at once",
    "gradient_accumulation_steps": "batch.samples and batch.device_tokens say how many micro-batches a step has",
}
"""Keys that may only be `auto`, and what decides instead."""

MUST_BE: dict[str, Any] = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "sparse_gradients": False,
    "disable_allgather": False,
    "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1,
}
"""Keys that change how gradients are added up or what is held where; only DeepSpeed's default fits."""

OFF = (
    "amp", "torch_autocast", "curriculum_learning", "data_efficiency", "progressive_layer_drop", "eigenvalue",
    "quantize_training", "compression_training", "sparse_attention", "pipeline", "tensor_parallel", "hybrid_engine",
    "elasticity", "autotuning", "compile", "expert_parallel",
)  # fmt: skip
"""Groups that would change what is trained or how it is spread; they may be there with `enabled: false`."""

WITHOUT_EFFECT = (
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "dataloader_drop_last", "checkpoint", "tensorboard", "wandb", "csv_monitor",
    "comet", "flops_profiler", "comms_logger", "activation_checkpointing", "aio", "nebula", "log_level",
    "vocabulary_size", "use_node_local_storage", "disable_python_gc",
)  # fmt: skip

ZERO_KEPT = (
    "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "stage3_module_granularity_threshold", "log_trace_cache_warnings", "enable_sanity_checks",
)  # fmt: skip
"""What tunes communication and memory."""

ZERO_MUST_BE: dict[str, Any] = {
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "legacy_stage1": False,
    "parameter_alignment": False,
}

ZERO_WITHOUT_EFFECT = (
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save", "load_from_fp32_weights",
    "elastic_checkpoint", "ignore_unused_parameters", "override_module_apply", "pipeline_loading_checkpoint",
    "memory_efficient_linear", "compute_grad_norm", "round_robin_gradients",
)  # fmt: skip

ROUND_ROBIN = "by-name access to the training state takes parameters for being in order"
OVERLAP = "gradients raced with their reduction in several releases (docs/deepspeed.md)"


class Keep(Protocol):
    """How a parameter is kept while it trains (lensmith/engine/optimizer.py)."""

    @property
    def update(self) -> str: ...
    @property
    def parameters(self) -> Any: ...
    @property
    def gradients(self) -> Any: ...
    @property
    def moments(self) -> Any: ...


@dataclass(frozen=True)
class Facts:
    """What the run says. `parameters`, `gradients`: names of types, as `kept_types` gives them."""

    zero: int
    offload: bool
    parameters: str
    gradients: str
    clip_norm: float | None
    optimizer: Mapping[str, Any]
    """`lr`, `betas`, `eps`, `weight_decay`."""
    trainable: int
    """Numbers that train."""
    hidden: int
    """Width of the language model."""
    pin_memory: bool = False
    """Whether host memory is pinned: where there is a GPU."""


@dataclass
class Settings:
    """DeepSpeed's configuration, and what a user has to know of it."""

    config: dict[str, Any]
    warnings: list[str] = field(default_factory=list[str])


def kept_types(keeps: Mapping[str, Keep], frozen: Iterable[tuple[str, Any]] = ()) -> tuple[str, str]:
    """(type of the parameters that train, type of their gradients). `frozen`: (name, type) of the others.

    Raises `ConfigError` PRECISION for what DeepSpeed cannot do: it has one type for all that trains, and when that is
    half precision, for everything; it keeps moments in float32, and half-precision parameters through masters only.
    """
    for name, keep in keeps.items():
        if keep.update not in ("plain", "masters") or _text(keep.moments) != "float32":
            raise ConfigError("PRECISION", f"DeepSpeed keeps float32 moments and masters, and {name} is to be kept "
                              f"{keep.update} with {_text(keep.moments)} moments",
                              remedy="use a preset without -compensated or -stochastic")  # fmt: skip
    first, keep = next(iter(keeps.items()))
    parameters, gradients = _text(keep.parameters), _text(keep.gradients)
    for name, other in keeps.items():
        if (_text(other.parameters), _text(other.gradients)) != (parameters, gradients):
            raise ConfigError("PRECISION", f"DeepSpeed keeps all that trains in one type; {first} is {parameters} with "
                              f"{gradients} gradients, {name} {_text(other.parameters)} with {_text(other.gradients)}",
                              remedy="take precision.parts out, or use parallel.engine local or fsdp2")  # fmt: skip
    if parameters != "float32":
        for name, dtype in frozen:
            if _text(dtype) not in (parameters, "int8", "uint8", "int64", "bool"):
                raise ConfigError("PRECISION", f"DeepSpeed would put the whole model into {parameters}, and {name} is "
                                  f"to be {_text(dtype)}", remedy="take precision.parts out, or use parallel.engine "
                                  "local or fsdp2")  # fmt: skip
    return parameters, gradients


def settings(facts: Facts, own: Path | None = None) -> Settings:
    """The configuration of a run, with what its own file adds. Raises `ConfigError` ENGINE: file, key, value."""
    made = Settings(_base(facts))
    if own is not None:
        _Check(str(own), facts, made).apply(_read(own))
    return made


def _base(facts: Facts) -> dict[str, Any]:
    """DeepSpeed's own clipping, loss scale and schedule are off; its batch sizes divide nothing."""
    bucket = min(BUCKET, facts.trainable + facts.trainable % 2)  # larger ones would only take memory; DeepSpeed: even
    zero: dict[str, Any] = {
        "stage": facts.zero,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    half = facts.parameters != "float32"
    if facts.zero < 3 and not facts.offload and not (half and facts.zero == 1):
        zero["compute_grad_norm"] = False  # the step has its own; DeepSpeed cannot do without it in the other cases
    if facts.zero == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _prefetch(facts),
            "stage3_param_persistence_threshold": _small(facts),
            "memory_efficient_linear": False,  # it replaces torch's linear in the whole process, and rounds differently
        }
    if facts.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": facts.pin_memory}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": half},
        "communication_data_type": NAMES[facts.gradients],
        "data_types": {"grad_accum_dtype": NAMES[facts.gradients]},
        "zero_allow_untested_optimizer": True,  # torch's AdamW with a word of ours
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the host, so nothing has to be compiled
        "zero_optimization": zero,
    }


def _prefetch(facts: Facts) -> int:
    return facts.hidden * facts.hidden * 9 // 10


def _small(facts: Facts) -> int:
    return 10 * facts.hidden


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("ENGINE", f"the DeepSpeed file cannot be read: {error.strerror}", where=str(path),
                          remedy="correct parallel.engine.config") from None  # fmt: skip
    except ValueError as error:
        raise ConfigError("ENGINE", f"this is no JSON: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        raise ConfigError("ENGINE", "a DeepSpeed file is a JSON object", where=str(path))
    return cast("dict[str, Any]", found)


@dataclass
class _Check:
    """Takes the keys of a file over into the settings, or refuses them."""

    where: str
    facts: Facts
    made: Settings

    def apply(self, found: dict[str, Any]) -> None:
        special: dict[str, Callable[[Any], None]] = {
            "gradient_clipping": self._clipping, "optimizer": self._optimizer, "scheduler": self._scheduler,
            "fp16": self._fp16, "bf16": self._bf16, "bfloat16": self._bf16, "data_types": self._data_types,
            "communication_data_type": lambda v: self._type("communication_data_type", v),
            "zero_optimization": self._zero,
        }  # fmt: skip
        known = [*special, *OF_THE_RUN, *MUST_BE, *OFF, *WITHOUT_EFFECT]
        unused: list[str] = []
        for key, value in found.items():
            if key in special:
                special[key](value)
            elif key in OF_THE_RUN:
                if value != AUTO:
                    self._refuse(key, value, OF_THE_RUN[key], f'set it to "{AUTO}" or take it out')
            elif key in MUST_BE:
                self._equal(key, value, MUST_BE[key])
            elif key in OFF:
                self._off(key, value)
            elif key in WITHOUT_EFFECT:
                unused.append(key)
            else:
                self._unknown(key, known)
        self._without_effect(unused)

    def _refuse(self, key: str, value: Any, why: str, remedy: str) -> None:
        raise ConfigError("ENGINE", f"{key} is {json.dumps(value)}: {why}", where=self.where, remedy=remedy)

    def _unknown(self, key: str, known: Iterable[str], prefix: str = "") -> None:
        near = difflib.get_close_matches(key, [*known], n=1, cutoff=0.6)
        raise ConfigError(
            "ENGINE", f"{prefix}{key} is no key of DeepSpeed that lensmith knows; DeepSpeed would pass over it",
            where=self.where, remedy=f"did you mean {near[0]!r}?" if near else "take it out",
        )  # fmt: skip

    def _without_effect(self, keys: list[str]) -> None:
        if keys:
            self.made.warnings.append(f"{self.where}: without effect here: {', '.join(keys)}")

    def _equal(self, key: str, value: Any, wanted: Any) -> None:
        if value not in (AUTO, wanted):
            self._refuse(key, value, f"only {json.dumps(wanted)} gives the gradients of the run", "take it out")

    def _off(self, key: str, value: Any) -> None:
        group = cast("dict[str, Any]", value) if isinstance(value, dict) else {"enabled": bool(value)}
        if group.get("enabled", bool(group)) is not False:
            self._refuse(key, value, "lensmith does not train with it", "take it out")

    def _clipping(self, value: Any) -> None:
        if value != AUTO and float(value) != (self.facts.clip_norm or 0.0):
            self._refuse("gradient_clipping", value, f"train.clip_norm is {self.facts.clip_norm}",
                         f'set it to "{AUTO}", or change train.clip_norm')  # fmt: skip

    def _optimizer(self, value: dict[str, Any]) -> None:
        if value.get("type") != "AdamW":
            self._refuse("optimizer.type", value.get("type"), "the run trains with AdamW", "take `optimizer` out")
        unused: list[str] = []
        for key, given in value.get("params", {}).items():
            if key in self.facts.optimizer:
                ours = self.facts.optimizer[key]
                same = list(given) == list(ours) if isinstance(given, list) else given == ours
                if given != AUTO and not same:
                    self._refuse(f"optimizer.params.{key}", given, f"optimizer.{key} of the run is {ours}",
                                 f'set it to "{AUTO}", or change the run file')  # fmt: skip
            elif key in ("torch_adam", "adam_w_mode", "fused", "bias_correction"):
                unused.append(f"optimizer.params.{key}")
            else:
                self._unknown(key, self.facts.optimizer, "optimizer.params.")
        self._without_effect(unused)

    def _scheduler(self, value: dict[str, Any]) -> None:
        self._refuse("scheduler.type", value.get("type"), "the run's `schedule` sets the learning rate",
                     "take `scheduler` out")  # fmt: skip

    def _fp16(self, value: dict[str, Any]) -> None:
        if value.get("enabled", False) not in (AUTO, False):
            self._refuse("fp16.enabled", value["enabled"], "`precision` of the run decides",
                         f'set it to "{AUTO}"; precision.preset: fp16 computes in float16')  # fmt: skip

    def _bf16(self, value: dict[str, Any]) -> None:
        half = self.facts.parameters == "bfloat16"
        preset = "bf16" if half else "bf16-params"
        if value.get("enabled", False) not in (AUTO, half):
            self._refuse("bf16.enabled", value.get("enabled", False),
                         f"the parameters that train are {self.facts.parameters} by the run's precision",
                         f'set it to "{AUTO}", or set precision.preset: {preset}')  # fmt: skip
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            if value.get(key):
                self._refuse(f"bf16.{key}", True, "masters and moments are float32", "take it out")

    def _data_types(self, value: dict[str, Any]) -> None:
        for key, given in value.items():
            if key == "grad_accum_dtype":
                self._type(f"data_types.{key}", given)
            elif given not in (None, AUTO):
                self._refuse(f"data_types.{key}", given, "`precision` of the run decides", "take it out")

    def _type(self, key: str, value: Any) -> None:
        ours = NAMES[self.facts.gradients]
        if value not in (None, AUTO, ours):
            self._refuse(key, value, f"gradients are added up in {ours} by the run's precision",
                         f'set it to "{AUTO}", or change precision.parts.*.gradients')  # fmt: skip

    def _zero(self, found: dict[str, Any]) -> None:
        zero = self.made.config["zero_optimization"]
        automatic = {"stage3_prefetch_bucket_size": _prefetch(self.facts),
                     "stage3_param_persistence_threshold": _small(self.facts)}  # fmt: skip
        known = [*ZERO_KEPT, *ZERO_MUST_BE, *ZERO_WITHOUT_EFFECT, "stage", "offload_optimizer", "offload_param"]
        unused: list[str] = []
        for key, value in found.items():
            name = f"zero_optimization.{key}"
            if key == "stage":
                if value != self.facts.zero:
                    self._refuse(name, value, f"parallel.engine.zero is {self.facts.zero}", "make them equal")
            elif key in ("offload_optimizer", "offload_param"):
                self._offload(key, value, zero)
            elif key in ("cpu_offload", "cpu_offload_param"):
                self._refuse(name, value, "an old key", "use parallel.engine.offload")
            elif key in ZERO_MUST_BE:
                self._equal(name, value, ZERO_MUST_BE[key])
            elif key in ZERO_KEPT:
                value = zero.get(key, automatic.get(key)) if value == AUTO else value
                zero[key] = int(value) if isinstance(value, float) else value
            elif key == "round_robin_gradients" and value:
                self.made.warnings.append(f"{self.where}: {name} is left out: {ROUND_ROBIN}")
            elif key in ZERO_WITHOUT_EFFECT:
                unused.append(name)
            else:
                self._unknown(key, known, "zero_optimization.")
        if zero["overlap_comm"]:
            self.made.warnings.append(f"{self.where}: zero_optimization.overlap_comm is on; {OVERLAP}")
        self._without_effect(unused)

    def _offload(self, key: str, value: Any, zero: dict[str, Any]) -> None:
        name = f"zero_optimization.{key}"
        given = cast("dict[str, Any]", value or {})
        device = given.get("device", "none")
        if device == "nvme":
            self._refuse(f"{name}.device", device, "lensmith keeps no state on disk", "use cpu")
        if key == "offload_optimizer" and (device == "cpu") != self.facts.offload:
            self._refuse(f"{name}.device", device, f"parallel.engine.offload is {json.dumps(self.facts.offload)}",
                         "make them agree")  # fmt: skip
        if device == "cpu" and key == "offload_param" and not (self.facts.offload and self.facts.zero == 3):
            self._refuse(f"{name}.device", device, "only ZeRO-3 with parallel.engine.offload keeps parameters there",
                         "take it out, or set parallel.engine: {kind: deepspeed, zero: 3, offload: true}")  # fmt: skip
        for option in ("ratio", "super_offload"):
            if given.get(option) not in (None, False, 1, 1.0):
                self._refuse(f"{name}.{option}", given[option], "needs DeepSpeed's own CPU Adam", "take it out")
        if device == "cpu":
            zero[key] = {"pin_memory": self.facts.pin_memory, **given}


def _text(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
