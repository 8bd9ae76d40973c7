"""One training session: the run folder, its lock, resume, the stages one after the other, the summary."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lensmith.checkpoint.mirror import Mirror
from lensmith.checkpoint.remote import Remote
from lensmith.checkpoint.store import Damaged, Published, Store, read_manifest, verify, write_atomically
from lensmith.core.errors import ConfigError, DataError, RunError
from lensmith.engine.loop import score
from lensmith.model.options import Lora
from lensmith.parallel.ranks import Ranks, attempt
from lensmith.parallel.watchdog import Watchdog
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
from lensmith.report.sinks import NoSinks, Sinks, make_sinks
from lensmith.report.terminal import Terminal


class Session:
    """Use as a context manager: it holds the lock of the run folder."""

    def __init__(
        self, located: Located, terminal: Terminal, clock: Clock, *, dry_run: bool, ranks: Ranks, dog: Watchdog
    ):
        self.ranks, self.dog = ranks, dog
        self.located, self.run_file, self.terminal, self.clock, self.dry_run = (
            located,
            located.run,
            terminal,
            clock,
            dry_run,
        )
        temporary = tempfile.mkdtemp(prefix="lensmith-dry-run-") if dry_run and ranks.is_main else None
        self._temporary = Path(ranks.broadcast_json(temporary, "name a folder")) if dry_run else None
        self.output = self._temporary or located.output
        self.store = Store(self.output / "checkpoints", ranks)
        self.metrics_path = self.output / "metrics.jsonl"
        self.mirror: Mirror | None = None
        """Of the checkpoints, where `save.remote` names a store."""
        self.done: list[StageRun] = []
        self.borders: list[int] = []
        """Steps of the last checkpoints of the stages before: the next stage's weights, never deleted."""
        self.settled: list[dict[str, Any]] = []
        """What the stages before were; every checkpoint keeps it."""
        self.grace = run_folder.Grace(self.run_file.save.grace_seconds, terminal.warning)
        self.log = Counter(late=0, lost=0)
        """Records of the metrics file that the disk took late, or never."""

    def __enter__(self) -> Session:
        self._lock = run_folder.Lock(self.output / "lock")
        self._logging = False
        self.on_main("take the run folder", self._take_folder)
        return self

    def _take_folder(self) -> None:
        for sink in self.run_file.log.sinks:
            sink.check()
        self.output.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()

    def on_main(self, what: str, work: Callable[[], Any]) -> Any:
        """`work` on the first rank alone; its result, which JSON can hold, on all. All fail where it fails."""
        found, error = attempt(work) if self.ranks.is_main else (None, None)
        self.ranks.all_well(error, what)
        return self.ranks.broadcast_json(found, what) if self.ranks.several else found

    def __exit__(self, *exc: object) -> None:
        try:
            if self.done and self.done[-1].is_built:
                self.done[-1].built.close()
            if self.mirror is not None:
                self.mirror.close()
        finally:
            self._close_sinks()
            self._lock.release()
            if self._temporary is not None and self.ranks.is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def num_stages(self) -> int:
        return len(self.located.stages)

    def run(self) -> dict[str, Any]:
        self.clock.lap("startup")
        with self.dog.phase("begin"):
            start = self._begin()
        for number in range(self._number, self.num_stages):
            with self.located.stages[number].saying_which():
                start = self._run_stage(number, start)
        with self.dog.phase("end"):
            self._finish()
        return self.summary

    def _begin(self) -> Start:
        """Index the data of every stage, and find where the run goes on."""
        self._open_mirror()
        self.prepared: list[Prepared] = []
        for located in self.located.stages:
            with located.saying_which():
                work = partial(prepare, located, self.terminal)
                self.prepared.append(self.ranks.first_then_rest("read the data", work))
                if self.num_stages > 1 or self.ranks.several:
                    rehearse(self.prepared[-1])
        self.clock.lap("index")
        self.on_main("tidy up", self._tidy_up)
        start = self._start()
        self._require_steps()
        self.on_main("forget later stages", self._forget_streams)
        return start

    def _open_mirror(self) -> None:
        urls = {located.run.save.remote for located in self.located.stages}
        if len(urls) > 1:
            where = self.located.stages[-1].where("save", "remote")
            raise ConfigError("CONFIG", "save.remote is not the same in all stages", where=where)
        if (url := urls.pop()) is None or self.dry_run:
            return
        mark, say = self.output / "remote.json", self.terminal.warning
        self.mirror = Mirror(Remote(url), self.store, mark, self.located.name, say, self._damaged, self.ranks)

    def _beside(self, manifests: dict[int, dict[str, Any]]) -> set[int]:
        """Of the checkpoints in a store, those that the run needs beside the newest: borders, and the best."""
        found = set(manifests[max(manifests)].get("borders", []))
        for number, located in enumerate(self.located.stages):
            if (metric := located.run.save.keep_best) is not None:
                found |= run_folder.best_of(manifests, metric, score, number)
        return found

    def _tidy_up(self) -> None:
        self.store.clean()
        if self._lock.left_by:
            self.terminal.warning(run_folder.ended_badly(self._lock.left_by, self.metrics_path))

    def _damaged(self, text: str) -> None:
        if not self.run_file.save.fall_back:
            raise RunError("DAMAGED", text, where=str(self.store.folder),
                           remedy="restore it, or set save.fall_back to go on from the one before")  # fmt: skip
        self.terminal.warning(text)

    def _forget_streams(self) -> None:
        """What later stages read in an attempt that ended before their first checkpoint."""
        for number in range(self._number + 1, self.num_stages):
            shutil.rmtree(stream_folder(self.output, number), ignore_errors=True)

    def _run_stage(self, number: int, start: Start) -> Start:
        """Where the next stage begins; of the last one of no meaning."""
        stage = StageRun(self, number, self.prepared[number], start)
        with self.dog.phase("load the model"):
            threads = set_threads(stage.run_file)
            stage.begin()
            if not self.done:
                self._open_folder(stage)
                if self.mirror is not None:
                    self.mirror.begin()
            self.done.append(stage)
            self._write_about(stage)
            stage.say_start(threads)
        stage.train()
        if number + 1 == self.num_stages:
            return start
        stage.release()
        with self.dog.phase("begin the next stage"):
            return self._cross(stage)

    # -- stages -------------------------------------------------------------------------------------------------

    def _start(self) -> Start:
        """Where the run goes on: inside the stage of the newest checkpoint that verifies, or at the beginning."""
        newest = self.newest() if self.mirror is None else self.mirror.newest(self._beside)
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
            self.on_main("verify the base of the stage", partial(self._verify_base, base))
        return Start(about.get("first_step", 0), about.get("base"), resume=newest)

    def newest(self, last: int | None = None) -> Published | None:
        """The newest checkpoint that verifies, up to step `last`. The first rank verifies it; the others believe it."""

        def step() -> int | None:
            found = self.store.newest(self._damaged, last)
            return None if found is None else found.step

        found = self.on_main("verify the newest checkpoint", step)
        if found is None:
            return None
        folder = self.store.path(found)
        return Published(folder, self.ranks.together("read a manifest", lambda: read_manifest(folder)))

    def _make_base(self, base: str) -> None:
        """A store has the checkpoints alone: where the run goes on from it, what a border merged is merged again."""
        if not base.startswith("stages/") or (self.output / base / "config.json").is_file():
            return
        number = int(Path(base).name.partition("-")[0]) - 1
        border = verify(self.store.path(self.borders[number]))
        if border.manifest["base"] is not None:
            self._make_base(border.manifest["base"])
        self._merged(border)

    def _verify_base(self, base: str) -> None:
        """The model folder that a stage began from is as it was."""
        if self.mirror is not None:
            try:
                self._make_base(base)
            except Damaged as error:
                raise RunError("DAMAGED", f"this stage began from it: {error}") from None
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
        folder = self.store.path(stage.start.first_step + stage.progress.step)
        self.on_main("verify the border", lambda: verify(folder).step)
        border = Published(folder, read_manifest(folder))
        self.borders = [*self.borders, border.step]
        self.settled = [*self.settled, identity_of_done(stage.prepared, stage.number)]
        tune, following = stage.run_file.tune, self.located.stages[stage.number + 1].run.tune
        if not isinstance(tune, Lora):
            return Start(border.step, f"checkpoints/{border.folder.name}/model", border=border)
        if following == tune:
            return Start(border.step, stage.start.base, border=border)
        merged = self.on_main("merge the adapter", lambda: self._merged(border))
        return Start(border.step, merged, border=None)

    def _merged(self, border: Published) -> str:
        """The adapter of a stage merged into its base, where the next stage trains something else. One that is there
        already is of a crossing that came to nothing, or of an earlier end of the stage."""
        number, base = int(border.manifest["stage"]), border.manifest["base"]
        located = self.located.stages[number]
        model = self.prepared[number].model_folder if base is None else self.output / base
        folder = self.output / "stages" / f"{number + 1}-{located.stage_name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        export(border.folder, folder, base=str(model), merge=True, dtype=None,
               shard_gb=located.run.save.shard_gb, terminal=self.terminal)  # fmt: skip
        return str(folder.relative_to(self.output))

    def best_steps(self) -> set[int]:
        """The checkpoints that `save.keep_best` of each stage keeps."""
        found: set[int] = set()
        for number, located in enumerate(self.located.stages):
            found |= run_folder.best_step(self.store, located.run.save.keep_best, score, number)
        return found

    # -- the run folder -----------------------------------------------------------------------------------------

    def _open_folder(self, stage: StageRun) -> None:
        fresh = stage.start.resume is None
        self.heldout: dict[str, Any] = self.on_main("open the run folder", partial(self._tidy, fresh))
        self._open_sinks(-1 if fresh else stage.start.first_step + stage.progress.step)

    def _tidy(self, fresh: bool) -> dict[str, Any]:
        """The held-out figures so far."""
        out = self.output
        if fresh:  # an attempt that ended before its first checkpoint left these
            for name in ("heldout.json", "samples.json"):
                (out / name).unlink(missing_ok=True)
            forget(out)
        write_atomically(out / "run.yaml", self.located.resolved_yaml().encode())
        return run_folder.read_json(out / "heldout.json")

    def _open_sinks(self, done: int) -> None:
        """Metrics and sinks of a run that goes on behind step `done`; -1: from its beginning. The first rank writes
        them."""
        self.on_main("truncate metrics", partial(self._open_metrics, done))
        self.losses = run_folder.losses(self.metrics_path)
        self.sinks: Sinks | NoSinks = NoSinks()
        self._logging = self.ranks.is_main
        if not self._logging:
            return
        configs = [] if self.dry_run else list(self.run_file.log.sinks)
        sinks = make_sinks(configs, self.output, max(done, 0) + 1)
        self.sinks = Sinks(self._metrics, sinks, self.terminal.warning)
        self.sinks.open(self.located.name, self.run_file.model_dump(mode="json"))

    def _open_metrics(self, done: int) -> None:
        self._metrics = MetricsWriter(self.metrics_path)
        self._metrics.truncate_after(done)

    def rewind(self, done: int) -> None:
        """After a roll-back: records of later steps go, as at a resume."""
        self._close_sinks()
        self._open_sinks(done)

    def _write_about(self, stage: StageRun) -> None:
        out, built = self.output, stage.built
        if not self.ranks.is_main:
            return
        totals = {"trainable": built.trainable_parameters, "parameters": built.total_parameters}
        write_atomically(out / "trains.json", json.dumps({"rows": built.trains, "totals": totals}, indent=1).encode())
        write_atomically(out / "versions.json", json.dumps(run_folder.versions(self.prepared[0]), indent=1).encode())
        self.write_ledger()

    def _close_sinks(self) -> None:
        if self._logging:
            self._logging = False
            self.sinks.close()
            self.log.update(self.sinks.records)

    def keep_folder(self, stage: StageRun) -> None:
        """Where the run folder was deleted or moved away under the run, it is made anew: the work must not be lost."""
        if self._lock.is_held():
            return
        self.terminal.warning(f"{self.output} was deleted while the run was going on; it is made anew. Checkpoints and "
                              "incidents so far are gone")  # fmt: skip
        self._lock.renew()
        self.sinks.restore()
        write_atomically(self.output / "run.yaml", self.located.resolved_yaml().encode())
        self._write_about(stage)
        if self.heldout:
            write_atomically(self.output / "heldout.json", json.dumps(run_folder.finite(self.heldout)).encode())

    def write_ledger(self) -> None:
        """The rows of every stage, with what was dropped at load so far."""
        if not self.ranks.is_main:
            return
        run_folder.write_ledger(self.output / "ledger.parquet", self._parts())

    def _parts(self) -> list[run_folder.Part]:
        return [self._part(number, prepared) for number, prepared in enumerate(self.prepared)]

    def _part(self, number: int, prepared: Prepared) -> run_folder.Part:
        stage = next((s for s in self.done if s.number == number), None)
        dropped = (stage and stage.dropped) or run_folder.dropped(self.metrics_path, prepared.located.stage_name)
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
        self.ranks.barrier("end the run")
        newest = self.store.steps()
        if not newest:
            raise RunError("SAVE", "the run ended without a checkpoint", where=str(self.output))
        self.summary = run_folder.summary(
            self._parts(), self.done[-1].built, self.done[-1].progress, self.losses, self.metrics_path, self.heldout,
            str(self.store.path(newest[-1])), self.clock,
        )  # fmt: skip
        self.summary["guard"] = guard_summary(self.output, self.done)
        self.summary["log"] = dict(self.log)
        if not self.ranks.is_main:
            return
        if self.dry_run:
            self.terminal.event("dry_run", "dry run: index, model, one step and one save worked; nothing is kept")
            return
        write_atomically(
            self.output / "summary.json",
            json.dumps(run_folder.finite(self.summary), indent=1, allow_nan=False).encode(),
        )
        report = self._report()
        if self.mirror is not None:
            with self.terminal.progress("Copying the last checkpoint", None, counted=False):
                self.mirror.wait()
        self.terminal.event("checkpoint", f"checkpoint {self.summary['checkpoint']}", path=self.summary["checkpoint"])
        self.terminal.event("done", f"report {report}" if report else "done",
                            checkpoint=self.summary["checkpoint"], report=report)  # fmt: skip

    def _report(self) -> str:
        """Its path. A run that is done does not fail for a file that somebody damaged."""
        try:
            return str(write_report(self.output))
        except DataError as error:
            self.terminal.warning(f"no report: {error}")
            return ""
