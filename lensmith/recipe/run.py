"""The whole configuration of a run: the only place that knows every part's options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from lensmith.config.build import apply_overrides, build
from lensmith.config.part import Part
from lensmith.config.yaml_file import Tree, dump, read_tree
from lensmith.core.errors import ConfigError
from lensmith.data.options import Batch, Data
from lensmith.engine.options import AdamW, Cosine, Optimizer, Save, Schedule, Train
from lensmith.evaluate.options import Evaluate
from lensmith.model.options import Lora, Model, Precision, Tune, VisionCache
from lensmith.objective.options import NextToken, Objective
from lensmith.report.sinks import SinkConfig


class Log(Part):
    """Where figures go. `metrics.jsonl` in the run folder is always written."""

    sinks: tuple[SinkConfig, ...] = ()
    """More places: `tensorboard`, `wandb`, `trackio`, `mlflow`."""
    every_steps: int = Field(default=0, ge=0)
    """Print a line (in JSON mode an event) for every so many steps; 0: the progress bar alone. Every step is written
    to metrics.jsonl."""


class Run(Part):
    """One run file."""

    model: Model
    """The base model."""
    data: Data
    """What is trained on."""
    batch: Batch = Batch()
    """Samples per step and tokens per device."""
    tune: Tune = Lora()
    """`full`, `freeze` or `lora`, each with its own options."""
    precision: Precision = Precision()
    """Types of parameters and compute."""
    objective: Objective = NextToken()
    """The loss."""
    optimizer: Optimizer = AdamW()
    """The optimizer and its rates."""
    schedule: Schedule = Cosine()
    """How the rate moves."""
    train: Train = Train()
    """Length and conduct."""
    save: Save = Save()
    """Checkpoints."""
    evaluate: Evaluate = Evaluate()
    """Held-out figures."""
    vision_cache: VisionCache = VisionCache()
    """Kept outputs of a frozen tower."""
    log: Log = Log()
    """Where figures go."""
    output: str | None = None
    """Run folder, relative to the run file. Left out: `runs/NAME` beside the run file."""

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        b, d = self.batch, self.data
        if b.samples is not None and b.tokens is not None:
            raise ConfigError("CONFIG", "batch.samples and batch.tokens are both set", remedy="keep one of them")
        if self.device_tokens < d.max_tokens:
            raise ConfigError(
                "CONFIG",
                f"batch.device_tokens {self.device_tokens} is below data.max_tokens {d.max_tokens}",
                remedy="a row must hold the longest sample: raise the first or lower the second",
            )
        if self.train.epochs is None and self.train.max_steps is None:
            raise ConfigError(
                "CONFIG", "train.epochs is null and train.max_steps is not set", remedy="set train.max_steps"
            )
        held = bool(d.eval) or d.holdout > 0
        if not held and (
            self.evaluate.every_steps or self.evaluate.generate or self.train.early_stop or self.save.keep_best
        ):
            raise ConfigError(
                "CONFIG",
                "evaluation is asked for, but there is no held-out data",
                remedy="set data.eval or data.holdout",
            )
        for key, metric in (("train.early_stop", self.train.early_stop), ("save.keep_best", self.save.keep_best)):
            if metric is not None:
                self._measured(key, metric if isinstance(metric, str) else metric.metric)
        return self

    def _measured(self, key: str, metric: str) -> None:
        """A metric that decides something must be measured while training goes on."""
        e = self.evaluate
        known = ["loss"] if e.loss else []
        if e.generate is not None:
            known += ["exact_match", *(f"exact_match/{name}" for name in e.generate.groups)]
        if metric not in known:
            raise ConfigError(
                "CONFIG", f"{key} goes by {metric!r}, which is not measured", remedy=f"measured: {', '.join(known)}"
            )
        if e.every_steps is None:
            raise ConfigError("CONFIG", f"{key} needs figures while training", remedy="set evaluate.every_steps")

    @property
    def device_tokens(self) -> int:
        return self.batch.device_tokens or max(self.data.max_tokens, 4096)

    @property
    def samples_per_step(self) -> int | None:
        return self.batch.samples if self.batch.samples or self.batch.tokens else 16


class Located:
    """A run and where it lives: the folder its relative paths count from, and its output folder."""

    def __init__(self, run: Run, file: Path | None, name: str = "run"):
        self.run = run
        self.folder = file.parent.resolve() if file else Path.cwd()
        self.name = file.stem if file else name
        self.output = (self.folder / (run.output or f"runs/{self.name}")).resolve()

    def resolved_yaml(self) -> str:
        """The run with every default written out and every path absolute, as kept in the run folder."""
        values = self.run.model_dump(mode="json")
        for source in (*values["data"]["train"], *values["data"]["eval"]):
            source["path"] = self._absolute(source["path"])
            source["media_dir"] = source["media_dir"] and self._absolute(source["media_dir"])
        values["data"]["media_roots"] = [self._absolute(root) for root in values["data"]["media_roots"]]
        values["data"]["cache"] = values["data"]["cache"] and self._absolute(values["data"]["cache"])
        values["vision_cache"]["folder"] = values["vision_cache"]["folder"] and self._absolute(
            values["vision_cache"]["folder"]
        )
        if (self.folder / Path(values["model"]["path"]).expanduser()).is_dir():
            values["model"]["path"] = self._absolute(values["model"]["path"])
        values["output"] = str(self.output)
        return dump(values)

    def _absolute(self, path: str) -> str:
        return os.path.normpath(self.folder / Path(path).expanduser())


def load_run(file: str | Path, overrides: Sequence[str] = ()) -> Located:
    """Read a run file with dotted overrides. Raises `ConfigError` with file, line, value and remedy."""
    path = Path(file)
    if path.is_dir() and (path / "run.yaml").is_file():
        path = path / "run.yaml"
    return from_tree(apply_overrides(read_tree(path), overrides), path)


def from_tree(tree: Tree, file: Path | None, name: str = "run") -> Located:
    return Located(build(Run, tree), file, name)
