"""One training session: the run folder, its lock, resume, the stages one after the other, the summary."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lensmith.checkpoint.store import Damaged, Published, Store, verify, write_atomically
from lensmith.core.errors import RunError
from lensmith.engine.loop import score
from lensmith.model.options import Lora
from lensmith.recipe import folder as run_folder
from lensmith.recipe.build import rehearse, set_threads
from lensmith.recipe.export import export
from lensmith.recipe.identity import check_identity, identity_of_done
from lensmith.recipe.prepare import Prepared, prepare, require_steps
from lensmith.recipe.rescue import forget, guard_summary
from lensmith.recipe.run import Located
from lensmith.recipe.stage import StageRun, Start
from lensmith.recipe.stream import OpenStream, stream_folder
from lensmith.recipe.train import Clock
from lensmith.report.metrics import MetricsWriter
from lensmith.report.page import write_report
from lensmith.report.sinks import Sinks, make_sinks
from lensmith.report.terminal import Terminal


class Session:
    """Use as a context manager: it holds the lock of the run folder."""

    def __init__(self, located: Located, terminal: Terminal, clock: Clock, *, dry_run: bool):
        self.located, self.run_file, self.terminal, self.clock, self.dry_run = (
            located,
            located.run,
            terminal,
            clock,
            dry_run,
        )
        self._temporary = Path(tempfile.mkdtemp(prefix="lensmith-dry-run-")) if dry_run else None
        self.output = self._temporary or located.output
        self.store = Store(self.output / "checkpoints")
        self.done: list[StageRun] = []
        self.borders: list[int] = []
        """Steps of the last checkpoints of the stages before: the next stage's weights, never deleted."""
        self.settled: list[dict[str, Any]] = []
        """What the stages before were; every checkpoint keeps it."""

    def __enter__(self) -> Session:
        for sink in self.run_file.log.sinks:
            sink.check()
        self.output.mkdir(parents=True, exist_ok=True)
        self._lock = run_folder.Lock(self.output / "lock")
        self._lock.acquire()
        self._logging = False
        return self

    def __exit__(self, *exc: object) -> None:
        self._close_sinks()
        self._lock.release()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def num_stages(self) -> int:
        return len(self.located.stages)

    def run(self) -> dict[str, Any]:
        self.clock.lap("startup")
        self.prepared: list[Prepared] = []
        for located in self.located.stages:
            with located.saying_which():
                self.prepared.append(prepare(located, self.terminal))
                if self.num_stages > 1:
                    rehearse(self.prepared[-1])
        self.clock.lap("index")
        self.store.clean()
        start = self._start()
        self._require_steps()
        for number in range(self._number + 1, self.num_stages):  # an attempt that ended before its first checkpoint
            shutil.rmtree(stream_folder(self.output, number), ignore_errors=True)
        for number in range(self._number, self.num_stages):
            with self.located.stages[number].saying_which():
                start = self._run_stage(number, start)
        self._finish()
        return self.summary

    def _run_stage(self, number: int, start: Start) -> Start:
        """Where the next stage begins; of the last one of no meaning."""
        stage = StageRun(self, number, self.prepared[number], start)
        threads = set_threads(stage.run_file)
        stage.begin()
        if not self.done:
            self._open_folder(stage)
        self.done.append(stage)
        self._write_about(stage)
        stage.say_start(threads)
        stage.train()
        if number + 1 == self.num_stages:
            return start
        stage.release()
        return self._cross(stage)

    # -- stages -------------------------------------------------------------------------------------------------

    def _start(self) -> Start:
        """Where the run goes on: inside the stage of the newest checkpoint that verifies, or at the beginning."""
        newest = self.store.newest(self.terminal.warning)
        self._number = 0 if newest is None else int(newest.manifest.get("stage", 0))
        if newest is None:
            return Start()
        about = newest.manifest
        self.borders, self.settled = list(about.get("borders", [])), list(about.get("settled", []))
        for number, (settled, prepared) in enumerate(zip(self.settled, self.prepared, strict=False)):
            what = f"stage {settled['stage.name']!r}, which is done"
            check_identity(settled, identity_of_done(prepared, number), str(newest.folder), what)
        if self._number >= self.num_stages:
            raise RunError("RESUME", f"the checkpoint is of stage {self._number + 1}; the run file has "
                           f"{self.num_stages}", where=str(newest.folder),
                           remedy="put the stages back, or start in a new output folder")  # fmt: skip
        if (base := about.get("base")) is not None:
            self._verify_base(base)
        return Start(about.get("first_step", 0), about.get("base"), resume=newest)

    def _verify_base(self, base: str) -> None:
        """The model folder that a stage began from is as it was."""
        folder, remedy = self.output / base, "restore it, or start in a new output folder (output: ...)"
        if not (folder / "config.json").is_file():
            raise RunError("DAMAGED", "the model that this stage began from is gone", where=str(folder), remedy=remedy)
        if folder.parent.parent == self.store.folder:
            try:
                verify(folder.parent)
            except Damaged as error:
                raise RunError("DAMAGED", f"this stage began from it: {error}", remedy=remedy) from None

    def _require_steps(self) -> None:
        """A stage without a step is an error before the first one trains, not after days."""
        for prepared in self.prepared[self._number + 1 :]:
            if prepared.stream is not None:
                continue
            with prepared.located.saying_which():
                require_steps(prepared, prepared.plan.num_steps())

    def _cross(self, stage: StageRun) -> Start:
        """The border behind a stage: its last checkpoint, and the model folder that the next stage begins from."""
        border = verify(self.store.path(stage.start.first_step + stage.progress.step))
        self.borders = [*self.borders, border.step]
        self.settled = [*self.settled, identity_of_done(stage.prepared, stage.number)]
        tune, following = stage.run_file.tune, self.located.stages[stage.number + 1].run.tune
        if not isinstance(tune, Lora):
            return Start(border.step, f"checkpoints/{border.folder.name}/model", border=border)
        if following == tune:
            return Start(border.step, stage.start.base, border=border)
        return Start(border.step, self._merged(border, stage))

    def _merged(self, border: Published, stage: StageRun) -> str:
        """The adapter of a stage merged into its base, where the next stage trains something else. One that is there
        already is of a crossing that came to nothing, or of an earlier end of the stage."""
        folder = self.output / "stages" / f"{stage.number + 1}-{stage.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        export(border.folder, folder, base=str(stage.prepared.model_folder), merge=True, dtype=None,
               shard_gb=stage.run_file.save.shard_gb, terminal=self.terminal)  # fmt: skip
        return str(folder.relative_to(self.output))

    def best_steps(self) -> set[int]:
        """The checkpoints that `save.keep_best` of each stage keeps."""
        found: set[int] = set()
        for number, located in enumerate(self.located.stages):
            found |= run_folder.best_step(self.store, located.run.save.keep_best, score, number)
        return found

    # -- the run folder -----------------------------------------------------------------------------------------

    def _open_folder(self, stage: StageRun) -> None:
        out = self.output
        fresh = stage.start.resume is None
        if fresh:  # an attempt that ended before its first checkpoint left these
            for name in ("heldout.json", "samples.json"):
                (out / name).unlink(missing_ok=True)
            forget(out)
        self.heldout: dict[str, Any] = run_folder.read_json(out / "heldout.json")
        self._open_sinks(-1 if fresh else stage.start.first_step + stage.progress.step)
        write_atomically(out / "run.yaml", self.located.resolved_yaml().encode())

    def _open_sinks(self, done: int) -> None:
        """Metrics and sinks of a run that goes on behind step `done`; -1: from its beginning."""
        self.metrics = MetricsWriter(self.output / "metrics.jsonl")
        self.metrics.truncate_after(done)
        self.losses = run_folder.losses(self.metrics.path)
        self.sinks = Sinks(
            self.metrics,
            make_sinks([] if self.dry_run else list(self.run_file.log.sinks), self.output, max(done, 0) + 1),
            self.terminal.warning,
        )
        self._logging = True
        self.sinks.open(self.located.name, self.run_file.model_dump(mode="json"))

    def rewind(self, done: int) -> None:
        """After a roll-back: records of later steps go, as at a resume."""
        self._close_sinks()
        self._open_sinks(done)

    def _write_about(self, stage: StageRun) -> None:
        out, built = self.output, stage.built
        totals = {"trainable": built.trainable_parameters, "parameters": built.total_parameters}
        write_atomically(out / "trains.json", json.dumps({"rows": built.trains, "totals": totals}, indent=1).encode())
        write_atomically(out / "versions.json", json.dumps(run_folder.versions(self.prepared[0]), indent=1).encode())
        self.write_ledger()

    def _close_sinks(self) -> None:
        if self._logging:
            self._logging = False
            self.sinks.close()

    def write_ledger(self) -> None:
        """The rows of every stage, with what was dropped at load so far."""
        run_folder.write_ledger(self.output / "ledger.parquet", self._parts())

    def _parts(self) -> list[run_folder.Part]:
        return [self._part(number, prepared) for number, prepared in enumerate(self.prepared)]

    def _part(self, number: int, prepared: Prepared) -> run_folder.Part:
        stage = next((s for s in self.done if s.number == number), None)
        dropped = (stage and stage.dropped) or run_folder.dropped(self.metrics.path, prepared.located.stage_name)
        if prepared.stream is None:
            return run_folder.Part(prepared, dropped, prepared.read.counts())
        stream = (stage and stage.stream) or OpenStream(prepared.stream, self.output, number)
        return run_folder.Part(prepared, dropped, stream.counts(), stream.windows())

    def heldout_of(self, stage: str) -> dict[str, Any]:
        """The held-out figures of a stage; of a run without stages, all there are."""
        return self.heldout.setdefault("stages", {}).setdefault(stage, {}) if stage else self.heldout

    def forget_figures(self, number: int) -> None:
        """A stage goes on: what was measured at its end, and in the stages after it, is void."""
        of_stages: dict[str, Any] = self.heldout.get("stages", {})
        of_stages.get(self.located.stages[number].stage_name, self.heldout).pop("after", None)
        for later in self.located.stages[number + 1 :]:
            of_stages.pop(later.stage_name, None)

    # -- the end ------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self.located.stages[-1].stage_name:  # the figures of the last stage are those of the run
            self.heldout |= self.heldout_of(self.located.stages[-1].stage_name)
        self.write_ledger()
        self._close_sinks()
        newest = self.store.steps()
        if not newest:
            raise RunError("SAVE", "the run ended without a checkpoint", where=str(self.output))
        self.summary = run_folder.summary(
            self._parts(), self.done[-1].built, self.done[-1].progress, self.losses, self.metrics.path, self.heldout,
            str(self.store.path(newest[-1])), self.clock,
        )  # fmt: skip
        self.summary["guard"] = guard_summary(self.output, self.done)
        if self.dry_run:
            self.terminal.event("dry_run", "dry run: index, model, one step and one save worked; nothing is kept")
            return
        write_atomically(
            self.output / "summary.json",
            json.dumps(run_folder.finite(self.summary), indent=1, allow_nan=False).encode(),
        )
        report = write_report(self.output)
        self.terminal.event("checkpoint", f"checkpoint {self.summary['checkpoint']}", path=self.summary["checkpoint"])
        self.terminal.event("done", f"report {report}",
                            checkpoint=self.summary["checkpoint"], report=str(report))  # fmt: skip
