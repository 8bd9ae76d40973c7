"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard, W&B, Trackio, MLflow.

The metrics file is the truth: its records wait when the disk is full. A sink is a convenience, so one that fails is
switched off and the run goes on. Each package is imported only when its sink is opened.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field

from lensmith.config.part import Part
from lensmith.core.errors import ConfigError
from lensmith.report.metrics import MetricsWriter, Record


class Sink(Protocol):
    """What a tracking library is wrapped as. `record` is flat: `step` and numbers named as by `flatten`."""

    def open(self, run_name: str, config: Record) -> None: ...
    def step(self, record: Record) -> None: ...
    def close(self) -> None: ...


class _SinkPart(Part):
    package: ClassVar[str]

    def check(self) -> None:
        """Raise `ConfigError` when the package is absent; nothing is imported."""
        if importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                "MISSING_PACKAGE",
                f"the sink {self.package!r} needs the package {self.package!r}, which is not installed",
                remedy=f"pip install {self.package}",
            )


class TensorBoard(_SinkPart):
    """Event files under `tensorboard/` in the run folder."""

    package: ClassVar[str] = "tensorboard"
    kind: Literal["tensorboard"] = "tensorboard"
    flush_seconds: float = Field(default=30, gt=0)
    """Longest time a number waits before it is on disk."""

    def sink(self, run_folder: Path, first_step: int) -> Sink:
        return _TensorBoardSink(self, run_folder, first_step)


class WandB(_SinkPart):
    """Weights & Biases. A resumed run goes on as the same W&B run."""

    package: ClassVar[str] = "wandb"
    kind: Literal["wandb"] = "wandb"
    project: str = "lensmith"
    """Project the run appears in."""
    entity: str | None = None
    """User or team; none means the account's default."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes under the run folder, for `wandb sync` later."""

    def sink(self, run_folder: Path, first_step: int) -> Sink:
        return _WandBSink(self, run_folder)


class Trackio(_SinkPart):
    """Trackio: a local SQLite database, or a Hugging Face Space. Needs a run name of its own within the project."""

    package: ClassVar[str] = "trackio"
    kind: Literal["trackio"] = "trackio"
    project: str = "lensmith"
    """Project the run appears in."""
    space_id: str | None = None
    """Space to send to (`user/space`); none keeps everything on this machine."""
    private: bool = True
    """Make a new Space private. Trackio's own default is public."""

    def sink(self, run_folder: Path, first_step: int) -> Sink:
        return _TrackioSink(self, first_step)


class MLflow(_SinkPart):
    """MLflow tracking. A resumed run goes on as the same MLflow run."""

    package: ClassVar[str] = "mlflow"
    kind: Literal["mlflow"] = "mlflow"
    experiment: str = "lensmith"
    """Experiment the run appears in; made when absent."""
    tracking_uri: str | None = None
    """Tracking server or store; none means what MLflow itself is set to."""

    def sink(self, run_folder: Path, first_step: int) -> Sink:
        return _MLflowSink(self, run_folder)


_Any = TensorBoard | WandB | Trackio | MLflow
_Name = Literal["tensorboard", "wandb", "trackio", "mlflow"]


def _from_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


SinkConfig = Annotated[
    Annotated[_Any, Field(discriminator="kind")],
    BeforeValidator(_from_name, json_schema_input_type=_Name | _Any),
]
"""One sink: its options with `kind`, or only its name (`wandb`)."""


class Sinks:
    """The metrics file and the run's sinks behind one `write`.

    Args:
        warn: is told once about each sink that is switched off, and once when the metrics file cannot be written.
    Attributes:
        lost: records per sink that it did not take.
    """

    def __init__(self, writer: MetricsWriter, sinks: Mapping[str, Sink], warn: Callable[[str], None]):
        self._writer = writer
        self._sinks = dict(sinks)
        self._off: set[str] = set()
        self._warn = warn
        self.lost: Counter[str] = Counter()
        self._said = False

    @property
    def records(self) -> dict[str, int]:
        """Of the metrics file: records that had to wait for the disk, and that were never written."""
        return {"late": self._writer.late, "lost": self._writer.lost}

    def restore(self) -> None:
        """Make the metrics file anew, where it was deleted."""
        self._writer.restore()

    def open(self, run_name: str, config: Record) -> None:
        for name, sink in self._sinks.items():
            self._guarded(name, None, lambda sink=sink: _quiet(lambda: sink.open(run_name, config)))

    def write(self, record: Record) -> None:
        """Append to the metrics file, then hand the numbers to each working sink. Events go to the file only."""
        self._put(record)
        if record["kind"] == "event":
            return
        flat = flatten(record)
        for name, sink in self._sinks.items():
            if name not in self._off:
                self._guarded(name, record["step"], lambda sink=sink: sink.step(flat))
            if name in self._off:
                self.lost[name] += 1

    def close(self) -> None:
        for name, sink in self._sinks.items():
            if name not in self._off:
                self._guarded(name, None, lambda sink=sink: _quiet(sink.close))
        self._writer.close()

    def _put(self, record: Record) -> None:
        self._writer.write(record)
        if self._writer.refused is not None and not self._said:
            self._said = True
            text = f"{self._writer.path} cannot be written ({self._writer.refused}); training goes on, and what belongs"
            self._warn(f"{text} there is written when that is possible again")

    def _guarded(self, name: str, step: int | None, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a tracking library may raise anything; training must not end for it
            self._off.add(name)
            reason = f"{type(error).__name__}: {error}"[:500]
            event: Record = {"kind": "event", "name": "sink_off", "sink": name, "reason": reason}
            self._put(event if step is None else {**event, "step": step})
            self._warn(f"the sink {name!r} failed and is off for the rest of this run ({reason})")


class NoSinks:
    """Of a rank that another writes for."""

    records: ClassVar[dict[str, int]] = {"late": 0, "lost": 0}

    def restore(self) -> None:
        pass

    def open(self, run_name: str, config: Record) -> None:
        pass

    def write(self, record: Record) -> None:
        pass

    def close(self) -> None:
        pass


def make_sinks(configs: list[_Any], run_folder: Path, first_step: int = 1) -> dict[str, Sink]:
    """The sinks of a run whose next step is `first_step`. Raises `ConfigError` when a kind is named twice."""
    sinks: dict[str, Sink] = {}
    for config in configs:
        if config.kind in sinks:
            raise ConfigError("SINK_TWICE", f"the sink {config.kind!r} is named twice", remedy="remove one of the two")
        sinks[config.kind] = config.sink(run_folder, first_step)
    return sinks


def flatten(record: Record) -> Record:
    """`{"kind": "step", "step": 3, "lr": {"language": 1e-5}}` -> `{"step": 3, "train/lr/language": 1e-5}`.

    An evaluation's `metrics` are named `eval/exact_match`. Only finite numbers remain: several libraries draw nothing,
    or fail, when one is NaN.
    """
    prefix = "train" if record["kind"] == "step" else record["kind"]
    flat: Record = {"step": record["step"]}
    for key, value in record.items():
        if key in ("kind", "step"):
            continue
        above = prefix if key == "metrics" else f"{prefix}/{key}"
        inner = {f"{above}/{name}": n for name, n in value.items()} if isinstance(value, dict) else {above: value}
        for name, n in inner.items():
            if isinstance(n, int | float) and math.isfinite(n):
                flat[name] = n
    return flat


def _quiet(call: Callable[[], Any]) -> None:
    """Libraries greet on stdout, which in JSON mode holds JSON only."""
    with contextlib.redirect_stdout(sys.stderr):
        call()


def _numbers(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "step"}


class _TensorBoardSink:
    def __init__(self, config: TensorBoard, run_folder: Path, first_step: int):
        self._config, self._folder, self._first_step = config, run_folder / "tensorboard", first_step

    def open(self, run_name: str, config: Record) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what was logged after the checkpoint this run resumes from
        self._writer = SummaryWriter(
            str(self._folder), purge_step=self._first_step, flush_secs=math.ceil(self._config.flush_seconds)
        )

    def step(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _WandBSink:
    def __init__(self, config: WandB, run_folder: Path):
        self._config, self._folder = config, run_folder

    def open(self, run_name: str, config: Record) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        id_file = self._folder / "wandb.id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:16])
        self._run = wandb.init(
            project=self._config.project, entity=self._config.entity, mode=self._config.mode, name=run_name,
            config=config, dir=str(self._folder), id=id_file.read_text(), resume="allow",
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        # W&B drops a step lower than the last one it saw; with an own axis, resumed steps are kept
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, record: Record) -> None:
        self._run.log(record)

    def close(self) -> None:
        self._run.finish()


class _TrackioSink:
    def __init__(self, config: Trackio, first_step: int):
        self._config, self._first_step = config, first_step

    def open(self, run_name: str, config: Record) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._module = trackio
        self._run = trackio.init(
            project=self._config.project, name=run_name, space_id=self._config.space_id,
            private=self._config.private, config=config, resume="allow" if self._first_step > 1 else "never",
            embed=False, auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip

    def step(self, record: Record) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._module.finish()  # Run.finish() leaves it open for atexit, which then prints on stdout


class _MLflowSink:
    def __init__(self, config: MLflow, run_folder: Path):
        self._config, self._id_file = config, run_folder / "mlflow.id"

    def open(self, run_name: str, config: Record) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        if self._config.tracking_uri is not None:
            mlflow.set_tracking_uri(self._config.tracking_uri)
        mlflow.set_experiment(self._config.experiment)
        if self._id_file.exists():
            mlflow.start_run(run_id=self._id_file.read_text())
        else:
            self._id_file.write_text(mlflow.start_run(run_name=run_name).info.run_id)
        mlflow.log_dict(config, "config.json")
        self._module = mlflow

    def step(self, record: Record) -> None:
        # MLflow refuses other characters in a name
        numbers = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in _numbers(record).items()}
        self._module.log_metrics(numbers, step=record["step"])

    def close(self) -> None:
        self._module.end_run()
