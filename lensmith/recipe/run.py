"""The whole configuration of a run: the only place that knows every part's options."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lensmith.config.build import apply_overrides, build, merged, without
from lensmith.config.part import Part
from lensmith.config.yaml_file import Tree, dump, read_tree
from lensmith.core.errors import ConfigError, UserError
from lensmith.data.options import Batch, Data, Shares, Temperature
from lensmith.engine.options import AdamW, Cosine, Guard, Optimizer, Save, Schedule, Train
from lensmith.evaluate.options import Evaluate
from lensmith.model.options import Lora, Model, Precision, Tune, VisionCache
from lensmith.objective.options import KTO, NextToken, Objective, compares, figures_of, reference_of
from lensmith.parallel.options import Parallel
from lensmith.recipe.methods import check_methods, check_stages
from lensmith.report.sinks import SinkConfig


class Log(Part):
    """Where figures go. `metrics.jsonl` in the run folder is always written."""

    sinks: tuple[SinkConfig, ...] = ()
    """More places: `tensorboard`, `wandb`, `trackio`, `mlflow`."""
    every_steps: int = Field(default=0, ge=0)
    """Print a line (in JSON mode an event) for every so many steps; 0: the progress bar alone. Every step is written
    to metrics.jsonl."""


Changes = dict[str, Any] | str
"""What a stage changes of a part of the run file: its keys, or the name of another choice."""


class Stage(Part):
    """One stage of a curriculum: what differs from the rest of the run file. `data: {max_pixels: 50176}` changes that
    one option; a list, and a choice of another kind, is replaced as a whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)
    """Name in log, report and ledger."""
    optimizer_state: Literal["keep", "fresh"] = "keep"
    """Moments of parameters that trained in the stage before: carried over by name, or begun anew. The schedule always
    begins anew."""
    data: Changes = Field(default_factory=dict[str, Any])
    """Changes of `data`."""
    batch: Changes = Field(default_factory=dict[str, Any])
    """Changes of `batch`."""
    tune: Changes = Field(default_factory=dict[str, Any])
    """Changes of `tune`."""
    precision: Changes = Field(default_factory=dict[str, Any])
    """Changes of `precision`."""
    objective: Changes = Field(default_factory=dict[str, Any])
    """Changes of `objective`."""
    optimizer: Changes = Field(default_factory=dict[str, Any])
    """Changes of `optimizer`."""
    schedule: Changes = Field(default_factory=dict[str, Any])
    """Changes of `schedule`."""
    train: Changes = Field(default_factory=dict[str, Any])
    """Changes of `train`."""
    guard: Changes = Field(default_factory=dict[str, Any])
    """Changes of `guard`."""
    save: Changes = Field(default_factory=dict[str, Any])
    """Changes of `save`."""
    evaluate: Changes = Field(default_factory=dict[str, Any])
    """Changes of `evaluate`."""
    vision_cache: Changes = Field(default_factory=dict[str, Any])
    """Changes of `vision_cache`."""


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
    parallel: Parallel = Parallel()
    """Several devices."""
    guard: Guard = Guard()
    """Steps that are not finite."""
    save: Save = Save()
    """Checkpoints."""
    evaluate: Evaluate = Evaluate()
    """Held-out figures."""
    vision_cache: VisionCache = VisionCache()
    """Kept outputs of a frozen tower."""
    log: Log = Log()
    """Where figures go."""
    stages: tuple[Stage, ...] = ()
    """A curriculum: stages that train one after the other, each from the weights of the one before."""
    output: str | None = None
    """Run folder, relative to the run file. Left out: `runs/NAME` beside the run file."""

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        b, d = self.batch, self.data
        if b.samples is not None and b.tokens is not None:
            raise ConfigError("CONFIG", "batch.samples and batch.tokens are both set", remedy="keep one of them")
        if self.device_tokens < self.longest_sample:
            twice = " twice" if self.longest_sample > d.max_tokens else ""
            raise ConfigError(
                "CONFIG",
                f"batch.device_tokens {self.device_tokens} is below{twice} data.max_tokens {d.max_tokens}",
                remedy="a row must hold the longest sample: raise the first or lower the second",
            )
        if self.train.epochs is None and self.train.max_steps is None:
            raise ConfigError(
                "CONFIG", "train.epochs is null and train.max_steps is not set", remedy="set train.max_steps"
            )
        if d.documents.overlap > d.max_tokens // 2:
            problem = f"data.documents.overlap {d.documents.overlap} is over half of data.max_tokens {d.max_tokens}"
            raise ConfigError("CONFIG", problem, remedy="lower it: each piece must bring something new")
        if d.stream is not None:
            self._streams()
        self._compares()
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
        check_methods(self)
        return self

    def _streams(self) -> None:
        """What needs the whole of the data cannot be had of a stream."""
        d = self.data
        refused = {
            "train.max_steps is not set": self.train.max_steps is None,
            "data.holdout is set (name data.eval instead)": d.holdout > 0,
            "data.mixture counts samples of whole sources": isinstance(d.mixture, Temperature)
            or (isinstance(d.mixture, Shares) and d.mixture.by == "tokens"),
            "batch.partial is not carry": self.batch.partial != "carry",
            "guard.on_nonfinite is roll_back: samples that have no numbers cannot be left out": self.guard.on_nonfinite
            == "roll_back",
        }
        for problem, found in refused.items():
            if found:
                raise ConfigError("CONFIG", f"data.stream reads without an index, but {problem}")

    def _compares(self) -> None:
        """What an objective that compares answers needs."""
        reference = reference_of(self.objective)
        if reference is not None and reference.kind == "adapter" and not isinstance(self.tune, Lora):
            raise ConfigError("CONFIG", f"objective.reference.kind is adapter, and tune is {self.tune.kind}",
                              remedy="set objective.reference: {kind: cached}")  # fmt: skip
        if reference is not None and reference.kind == "adapter" and isinstance(self.tune, Lora):
            self._base_is_reference(self.tune)
        if reference is not None and reference.kind == "frozen":
            self._copy_is_reference()
        if reference is not None and reference.kind != "cached" and self.parallel.engine.kind != "local":
            raise ConfigError("CONFIG", f"objective.reference.kind {reference.kind} needs parallel.engine local",
                              remedy="set objective.reference: {kind: cached}")  # fmt: skip
        if reference is not None and reference.kind == "cached" and self.data.stream is not None:
            problem = "objective.reference.kind cached needs all the data before the first step, and data.stream is set"
            raise ConfigError("CONFIG", problem, remedy="set objective.reference: {kind: adapter} or {kind: frozen}")
        if isinstance(self.objective, KTO) and self.samples_per_step == 1:
            problem = "kto takes its KL from answers of other samples of a step, and batch.samples is 1"
            raise ConfigError("CONFIG", problem, remedy="raise batch.samples")

    def _copy_is_reference(self) -> None:
        """A copy of the model folder must be what training begins with."""
        tune = self.tune if isinstance(self.tune, Lora) else Lora()
        changed = {
            "tune.quantize": tune.quantize is not None,
            "tune.adapter": tune.adapter is not None,
            "tune.merge": bool(tune.merge),
            "model.add_tokens": bool(self.model.add_tokens),
        }
        if name := next((name for name, found in changed.items() if found), None):
            problem = (
                f"objective.reference.kind is frozen, but with {name} the model folder is not what training begins with"
            )
            raise ConfigError("CONFIG", problem, remedy="set objective.reference: {kind: cached}")

    def _base_is_reference(self, tune: Lora) -> None:
        """A model whose adapter is switched off must be what training began with."""
        changed = {
            "tune.adapter": tune.adapter is not None,
            f"tune.init {tune.init}": tune.init not in ("default", "gaussian"),
            "tune.full": bool(tune.full),
            "model.add_tokens": bool(self.model.add_tokens),
        }
        if name := next((name for name, found in changed.items() if found), None):
            problem = f"objective.reference.kind is adapter, but with {name} the base is not what training begins with"
            raise ConfigError("CONFIG", problem, remedy="set objective.reference: {kind: cached}")

    def _measured(self, key: str, metric: str) -> None:
        """A metric that decides something must be measured while training goes on."""
        e = self.evaluate
        known = ["loss", *figures_of(self.objective)] if e.loss else []
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
        return self.batch.device_tokens or max(self.longest_sample, 4096)

    @property
    def longest_sample(self) -> int:
        """Tokens: `data.max_tokens` bounds each answer of a pair with its prompt, and a row holds both."""
        return self.data.max_tokens * (2 if compares(self.objective) == "pairs" else 1)

    @property
    def samples_per_step(self) -> int | None:
        return self.batch.samples if self.batch.samples or self.batch.tokens else 16


class Located:
    """A run and where it lives: the folder its relative paths count from, and its output folder.

    `stages` are the runs of a curriculum, each complete; a run without stages is its own only one. Model, log and
    output are the same in all of them.
    """

    def __init__(
        self,
        run: Run,
        file: Path | None,
        name: str = "run",
        stages: Sequence[tuple[Stage, Run]] = (),
        tree: Tree | None = None,
    ):
        self.run = run
        self.tree = tree or Tree({})
        self.file = file
        self.folder = file.parent.resolve() if file else Path.cwd()
        self.name = file.stem if file else name
        self.output = (self.folder / (run.output or f"runs/{self.name}")).resolve()
        self.stage: Stage | None = None
        self.stages: tuple[Located, ...] = tuple(self._of_stage(stage, own) for stage, own in stages) or (self,)

    def _of_stage(self, stage: Stage, run: Run) -> Located:
        located = Located(run, self.file, self.name, tree=self.tree)
        located.output, located.stage = self.output, stage
        return located

    def where(self, *path: str) -> str:
        """The place of a key in the run file: `run.yaml:12 precision.preset`; in its stage, if that sets it."""
        if self.stage is not None:
            names = [own["name"] for own in self.tree.values["stages"]]
            of_stage = ("stages", names.index(self.stage.name), *path)
            if any(of_stage[: len(at)] == at for at in self.tree.lines if len(at) > 2):
                return self.tree.where(of_stage)
        return self.tree.where(path)

    def of(self, stage: str | None) -> Located:
        """A stage by its name; the first where none is named. Raises ConfigError STAGE."""
        if stage is None:
            return self.stages[0]
        found = next((s for s in self.stages if s.stage_name == stage), None)
        if found is None:
            known = ", ".join(s.stage_name for s in self.stages if s.stage_name) or "none"
            raise ConfigError("STAGE", f"there is no stage {stage!r}", remedy=f"known here: {known}")
        return found

    @property
    def stage_name(self) -> str:
        """Empty for a run without stages."""
        return self.stage.name if self.stage is not None else ""

    @contextmanager
    def saying_which(self) -> Iterator[None]:
        """Errors that are raised meanwhile name the stage."""
        try:
            yield
        except UserError as error:
            if not self.stage_name:
                raise
            message = f"stage {self.stage_name!r}: {error.message}"
            raise type(error)(error.code, message, where=error.where, remedy=error.remedy) from None

    def resolved_yaml(self) -> str:
        """The run with every default written out and every path absolute, as kept in the run folder."""
        values = self._resolved(self.run)
        if self.stages[0] is not self:
            shared = {key: values[key] for key in ("model", "parallel", "log", "output")}
            stages: list[dict[str, Any]] = []
            for located in self.stages:
                assert located.stage is not None
                about = {"name": located.stage.name, "optimizer_state": located.stage.optimizer_state}
                own = located._resolved(located.run)
                stages.append(about | {key: own[key] for key in own if key not in (*shared, "stages")})
            values = {**shared, "stages": stages}
        return dump(values)

    def _resolved(self, run: Run) -> dict[str, Any]:
        values = run.model_dump(mode="json")
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
        if values["tune"]["kind"] == "lora":
            tune = values["tune"]
            tune["merge"] = [self._folder(path) for path in tune["merge"]]
            tune["adapter"] = tune["adapter"] and self._folder(tune["adapter"])
        if own := values["parallel"]["engine"].get("config"):
            values["parallel"]["engine"]["config"] = self._absolute(own)
        values["output"] = str(self.output)
        return values

    def _folder(self, path: str) -> str:
        """A Hub name stays as it is."""
        return self._absolute(path) if (self.folder / Path(path).expanduser()).is_dir() else path

    def _absolute(self, path: str) -> str:
        if "://" in path:
            return path
        return os.path.normpath(self.folder / Path(path).expanduser())


def load_run(file: str | Path, overrides: Sequence[str] = ()) -> Located:
    """Read a run file with dotted overrides. Raises `ConfigError` with file, line, value and remedy."""
    path = Path(file)
    if path.is_dir() and (path / "run.yaml").is_file():
        path = path / "run.yaml"
    return from_tree(apply_overrides(read_tree(path), overrides), path)


def from_tree(tree: Tree, file: Path | None, name: str = "run") -> Located:
    """A run from its tree. Of a curriculum every stage is built with its changes, so that each mistake is located."""
    if not tree.values.get("stages"):
        return Located(build(Run, tree), file, name, tree=tree)
    listed = build(Listed, without(tree, [key for key in tree.values if key != "stages"])).stages
    names = [stage.name for stage in listed]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ConfigError("CONFIG", f"two stages have the name {twice[0]!r}", where=tree.where(("stages",)))
    base = without(tree, ["stages"])
    runs = [
        build(Run, merged(Run, base, tree, ("stages", number), skip=("name", "optimizer_state")))
        for number in range(len(listed))
    ]
    check_stages(names, [run.tune for run in runs])
    for before, run, stage in zip(runs, runs[1:], listed[1:], strict=False):
        asked = reference_of(run.objective)
        if asked is not None and asked.kind != "cached" and isinstance(run.tune, Lora) and before.tune == run.tune:
            problem = (
                f"objective.reference.kind is {asked.kind}, and the adapter of the stage before goes on in this one"
            )
            raise ConfigError("CONFIG", f"stage {stage.name!r}: {problem}", where=tree.where(("stages",)),
                              remedy="set objective.reference: {kind: cached}")  # fmt: skip
    return Located(runs[0], file, name, list(zip(listed, runs, strict=True)), tree)


class Listed(Part):
    """The stages alone."""

    stages: tuple[Stage, ...]
