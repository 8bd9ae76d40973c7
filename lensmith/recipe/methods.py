"""What methods of training do not go together, told before anything is loaded; and the adapters that a run names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensmith.core.errors import ConfigError
from lensmith.model.options import Lora, Model
from lensmith.model.source import resolve
from lensmith.report.terminal import Terminal

if TYPE_CHECKING:
    from lensmith.engine.optimizer import Keep
    from lensmith.model.lora import Folders
    from lensmith.model.precision import PrecisionPlan
    from lensmith.recipe.run import Located, Run

CHANGES_WEIGHTS = ("pissa", "olora")


def check_methods(run: Run) -> None:
    """Raises `ConfigError` naming the option. Nothing is imported that a run without the method does not need."""
    if isinstance(run.tune, Lora):
        _check_lora(run.tune)
        _check_saved(run, run.tune)
        if run.tune.quantize is not None:
            _check_quantize(run, run.tune)
    _check_optimizer(run)
    _check_precision(run)


def _check_lora(tune: Lora) -> None:
    changes = tune.init.startswith(CHANGES_WEIGHTS)
    if tune.dora and (tune.init not in ("default", "gaussian") or tune.merge):
        other = "tune.merge is set" if tune.merge else f"tune.init is {tune.init}"
        raise ConfigError("TUNE", f"tune.dora is true and {other}: a DoRA adapter cannot be published with what that "
                          "changes in the weights under it", remedy="take one of them out")  # fmt: skip
    if tune.init == "loftq" and tune.quantize is None:
        raise ConfigError("TUNE", "tune.init is loftq, which makes up for what quantisation loses, and tune.quantize "
                          "is not set", remedy="set tune.quantize, or use tune.init: pissa")  # fmt: skip
    if changes and tune.quantize is not None:
        raise ConfigError("TUNE", f"tune.init is {tune.init} and tune.quantize is set: the adapter could not be "
                          "published for the model as it was", remedy="use tune.init: loftq")  # fmt: skip


def _check_saved(run: Run, tune: Lora) -> None:
    own = run.precision.parts.get("adapter")
    if tune.init.startswith(CHANGES_WEIGHTS) and own is not None and own.saved not in (None, "float32"):
        problem = (
            f"precision.parts.adapter.saved is {own.saved}, and tune.init {tune.init} publishes the small difference"
        )
        raise ConfigError("PRECISION", f"{problem} of two large products, which would be lost in rounding",
                          remedy="leave it out: float32")  # fmt: skip


def _check_quantize(run: Run, tune: Lora) -> None:
    assert tune.quantize is not None
    if both := set(tune.full) & set(tune.quantize.parts):
        raise ConfigError("TUNE", f"tune.full and tune.quantize.parts both name {sorted(both)[0]!r}",
                          remedy="what trains in full cannot be kept in 4 bits")  # fmt: skip
    if tune.merge:
        problem = "tune.merge and tune.quantize: what is merged would be quantised with the model, and could not be "
        raise ConfigError("TUNE", f"{problem}published for the model as it was",
                          remedy="export the model merged first (lensmith export), and begin from it")  # fmt: skip
    if (engine := run.parallel.engine.kind) != "local":
        problem = f"parallel.engine is {engine}, and tune.quantize keeps weights in 4 bits, which it does not spread"
        raise ConfigError("ENGINE", problem, remedy="use parallel.engine: local")


def _check_optimizer(run: Run) -> None:
    o = run.optimizer
    if o.lora_b_ratio is not None and not isinstance(run.tune, Lora):
        raise ConfigError("CONFIG", f"optimizer.lora_b_ratio is for adapters, and tune is {run.tune.kind}",
                          remedy="take it out, or set tune: lora")  # fmt: skip
    if o.kind == "adamw":
        return
    if (engine := run.parallel.engine.kind) != "local":
        problem = f"parallel.engine is {engine}, which spreads what optimizer.kind {o.kind} needs whole"
        raise ConfigError("ENGINE", problem, remedy="use optimizer: adamw, or parallel.engine: local")


def _check_precision(run: Run) -> None:
    """What contradicts itself in `precision.parts`, whatever the model; of `auto` only the device decides."""
    if "adapter" in run.precision.parts and not isinstance(run.tune, Lora):
        raise ConfigError("PRECISION", f"precision.parts.adapter: nothing has an adapter, tune is {run.tune.kind}",
                          remedy="take it out, or set tune: lora")  # fmt: skip
    if run.precision.parts and run.precision.preset != "auto":
        import torch

        from lensmith.model import precision

        precision.plan(run.precision, torch.device("cpu"), torch.float32)


def check_saved_types(run: Run, plan: PrecisionPlan, config: Mapping[str, Any], tied: bool) -> None:
    """A config names one type for language, embeddings and head and one for vision and projector, or one for all.
    `config`: of the base; `tied`: the head is the embedding. Raises `ConfigError` PRECISION for types it cannot say."""
    if isinstance(run.tune, Lora):  # one type for all that is saved
        return
    language = ["language", "embeddings", *(() if tied else ("head",))]
    vision = ["vision", "projector"]
    for first, *others in (language, vision) if "vision_config" in config else ([*language, *vision],):
        for part in others:
            one, other = (str(plan.of(p).saved).removeprefix("torch.") for p in (first, part))
            if one != other:
                problem = f"precision.parts.{first}.saved is {one} and precision.parts.{part}.saved {other}"
                raise ConfigError("PRECISION", f"{problem}: config.json names one type for both",
                                  remedy="save both in one type")  # fmt: skip


def check_packages(run: Run) -> None:
    """Raises `ConfigError` for a method whose package is not installed."""
    from lensmith.model.quantize import check_installed

    if quantized(run.tune) is not None:
        check_installed("tune.quantize", "qlora")
    if run.optimizer.kind == "adamw_8bit":
        check_installed("optimizer.kind adamw_8bit", "optimizers")


def check_stages(names: Sequence[str], tunes: Sequence[Any]) -> None:
    """A stage behind the first begins from the weights of the one before, with that one's adapters in them."""
    for name, before, tune in zip(names[1:], tunes, tunes[1:], strict=False):
        if isinstance(tune, Lora) and (tune.adapter or tune.merge) and tune != before:
            key = "adapter" if tune.adapter else "merge"
            problem = f"tune.{key} holds for stage {name!r} too, which begins from the weights of the stage before"
            raise ConfigError("TUNE", f"{problem}; the adapter is in them, or of another model",
                              remedy=f"set tune.{key}: {'null' if tune.adapter else '[]'} in this stage")  # fmt: skip


def check_kept(run: Run, keep: Mapping[str, Keep]) -> None:
    """What only lensmith's own AdamW can do. `keep`: of the parameters that train. Raises `ConfigError` PRECISION."""
    kind = run.optimizer.kind
    lean = [name for name, own in keep.items() if own.lean]
    if kind != "adamw" and lean:
        own = keep[lean[0]]
        found = f"{own.update} parameters" if own.update in ("compensated", "stochastic") else "half-precision moments"
        problem = f"optimizer.kind is {kind}, and precision asks for {found}, which only AdamW has"
        raise ConfigError("PRECISION", f"{problem} ({lean[0]})",
                          remedy="use optimizer: adamw, or precision.preset: bf16-params")  # fmt: skip


def adapter_folders(located: Located) -> Folders:
    """The folders of `tune.adapter` and `tune.merge`: as given, relative to the run file, a checkpoint's or a run's
    newest, or from the Hub."""
    from lensmith.model.lora import Folders

    tune = located.run.tune
    if not isinstance(tune, Lora):
        return Folders()
    adapter = None if tune.adapter is None else _folder(tune.adapter, located)
    return Folders(adapter, tuple(_folder(path, located) for path in tune.merge))


def _folder(path: str, located: Located) -> Path:
    from lensmith.recipe.export import model_folder

    found = resolve(Model(path=path), located.folder)
    if (found / "checkpoints").is_dir() or (found / "MANIFEST.json").is_file():
        return model_folder(found, Terminal("quiet"))
    return found


def quantized(tune: Any) -> dict[str, Any] | None:
    """How the base under an adapter is quantised, as it is written beside it."""
    return tune.quantize.model_dump(mode="json") if isinstance(tune, Lora) and tune.quantize is not None else None


def check_predictable(run: Run) -> None:
    """Raises `ConfigError` PLAN where work and memory cannot be counted without values."""
    if needs_values(run):
        problem = "bitsandbytes has a part in the run, and computes with values only: its memory and work"
        raise ConfigError("PLAN", f"{problem} cannot be counted",
                          remedy="plan without tune.quantize and optimizer: adamw_8bit")  # fmt: skip


def needs_values(run: Run) -> bool:
    """Whether bitsandbytes has a part in the run: it computes on memory, not on tensors."""
    return quantized(run.tune) is not None or run.optimizer.kind == "adamw_8bit"
