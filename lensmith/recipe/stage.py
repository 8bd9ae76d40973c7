"""One stage of a run: its model, its loop with callbacks, what it saves. A run without stages has one."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lensmith.checkpoint.store import Published, write_atomically
from lensmith.core.errors import DataError, UserError
from lensmith.data.pipeline import Pipeline, StepRows, no_picture_known
from lensmith.data.windows import StreamPipeline
from lensmith.engine.loop import Callbacks, Loop
from lensmith.engine.progress import Progress
from lensmith.engine.scale import LossScale
from lensmith.engine.state import carry_state, read_state
from lensmith.engine.step import StepResult
from lensmith.model.precision import PrecisionPlan
from lensmith.model.root import Root
from lensmith.model.vision_cache import VisionCache
from lensmith.recipe import folder as run_folder
from lensmith.recipe.build import Built, build, data_workers
from lensmith.recipe.comparing import Comparing, begin_comparing
from lensmith.recipe.held_out import HeldOut, When
from lensmith.recipe.identity import check_identity, identity
from lensmith.recipe.prepare import Prepared, require_steps
from lensmith.recipe.probe import check_borders
from lensmith.recipe.rescue import Feed, StageRescue
from lensmith.recipe.saving import Saving
from lensmith.recipe.spread import Evened
from lensmith.recipe.stream import OpenStream
from lensmith.recipe.together import SharedStep, shared_steps
from lensmith.recipe.train import peak_rss_bytes
from lensmith.report.tables import what_trains

if TYPE_CHECKING:
    from lensmith.recipe.session import Session

WARM_PATCHES = 8192
"""Patches encoded at once before training."""


@dataclass(frozen=True)
class Start:
    """Where a stage begins: the steps before it, the weights it begins from, and what it goes on from.

    `base` None: the run's own model. `resume`: a checkpoint of this stage; `border`: the last one of the stage before.
    """

    first_step: int = 0
    base: str | None = None
    """A model folder inside the run folder."""
    resume: Published | None = None
    border: Published | None = None


def _mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Of sums and counts; None where nothing was counted."""
    count = sum(n for _, n in pairs)
    return sum(total for total, _ in pairs) / count if count else None


def warm_pays(prepared: Prepared, mode: str, cache: VisionCache) -> bool:
    """The plan uses every picture, and the features of all of them, held-out ones too, fit in memory.

    Asked once, at the start of a run. Pictures that are encoded together round otherwise than alone. So nothing that
    was warmed may ever be evicted and encoded anew, and with a disk tier, which may hold a part of them, each is
    encoded alone at first sight.
    """
    plan, index = prepared.plan, prepared.train
    if cache.folder is not None:
        return False
    samples = plan.num_steps() * (plan.samples or 1)
    width = prepared.family.feature_width(run_folder.read_json(prepared.model_folder / "config.json"), mode)
    tokens = sum(int(i.column("media_tokens").sum()) for i in (index, prepared.held) if i is not None)
    return samples >= len(index.trainable) and tokens * width * 4 <= cache.memory_bytes


class StageRun:
    """Built by `begin`; then `train` runs it to its end."""

    def __init__(self, session: Session, number: int, prepared: Prepared, start: Start):
        self.session, self.number, self.start = session, number, start
        self.terminal, self.clock, self.output, self.store = (
            session.terminal, session.clock, session.output, session.store,
        )  # fmt: skip
        base = None if start.base is None else self.output / start.base
        self.prepared = prepared if base is None else replace(prepared, model_folder=base, has_added_tokens=True)
        self.run_file = prepared.located.run
        self.ranks = session.ranks
        self.name = prepared.located.stage_name
        self.dropped: dict[Any, tuple[str, str]] = {}
        """Origin (of a stream: window and number in it) -> reason and detail of samples dropped at load."""
        self.stream = (
            None if prepared.stream is None else OpenStream(prepared.stream, self.output, number, self.ranks.rank)
        )
        self.trouble: UserError | None = None
        """What ended the stream."""
        self.fill: list[float] = []
        self.held: HeldOut | None = None
        self.comparing: Comparing | None = None
        self.is_built = self.is_warm = False
        self.rescue = StageRescue(self)

    # -- the beginning ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Load the model and take up the state. Raises `RunError` RESUME when the checkpoint is of another run."""
        resume = self.start.resume
        self.identity = identity(self.prepared)
        if resume is not None:
            check_identity(resume.manifest.get("identity", {}), self.identity, str(resume.folder))
        with self.terminal.progress(f"Loading {self.prepared.model_folder.name}", None, counted=False):
            self.built = self.ranks.together("load the model", self._build)
        self.is_built = True
        cache, mode = self.built.root.cache, self.built.root.vision_mode
        alone = self.stream is None and not self.ranks.several
        self.warmed = alone and cache is not None and warm_pays(self.prepared, mode, cache)
        if resume is not None:  # what paid at the start decides: a longer run must go on with the same bits
            self.warmed = self.warmed and bool(resume.manifest.get("warmed", True))
        self.comparing = begin_comparing(self)
        self.saving = Saving(self)
        self.progress = read_state(resume.folder / "state", self.built.optimizer) if resume else Progress()
        if resume is not None:
            self.rescue.remember(self.progress)
        for text in () if self.built.spread is None else self.built.spread.warnings:
            self.terminal.warning(text)
        if self.built.precision.loss_scale and self.progress.scale is None:
            self.progress.scale = LossScale()
        self.total = self._num_steps()

    def _build(self) -> Built:
        def check(root: Root, plan: PrecisionPlan) -> None:
            check_borders(self.prepared, root, plan)

        return build(self.prepared, carried=self._carried, ranks=self.ranks, check=check)

    def _num_steps(self) -> int:
        if self.stream is not None:
            self.stream.go_on(self.progress.stream)
            return max(self.progress.step, self.run_file.train.max_steps or 0)
        total = self.prepared.plan.num_steps(self.progress.step, self.progress.cursor)
        require_steps(self.prepared, total)
        return total

    @property
    def _carried(self) -> Callable[[Any], None] | None:
        """What puts the border's float32 parameters (and moments, if kept) into this stage's optimizer."""
        border, stage = self.start.border, self.prepared.located.stage
        if border is None or stage is None:
            return None
        return lambda optimizer: carry_state(
            border.folder / "state", optimizer, moments=stage.optimizer_state == "keep"
        )

    def say_start(self, threads: int) -> None:
        totals = {"trainable": self.built.trainable_parameters, "parameters": self.built.total_parameters}
        self.terminal.show("what_trains", what_trains(self.built.trains, totals))
        steps, resume = self.total, self.start.resume
        planned = resume.manifest.get("total_steps", steps) if resume else steps
        if planned != steps:
            self.terminal.warning(
                f"the run now has {steps} steps, not {planned}: from here on rates follow the new length's schedule"
            )
        which = f"stage {self.number + 1} of {self.session.num_stages} ({self.name}): " if self.name else ""
        self.terminal.event(
            "start",
            f"{which}{steps} steps, {self.built.trainable_parameters:,} of {self.built.total_parameters:,} parameters "
            f"train ({self.built.precision.preset}, {self.built.root.device}, {threads} threads, "
            f"{data_workers(self.run_file)} data workers)"
            + (f", resumed after step {resume.step}" if resume else ""),
            steps=steps, trainable=self.built.trainable_parameters, resumed=resume.step if resume else 0,
            **self.about_stage,
        )  # fmt: skip

    @property
    def about_stage(self) -> dict[str, str]:
        return {"stage": self.name} if self.name else {}

    # -- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        run, progress = self.run_file, self.progress
        self.dropped = run_folder.dropped(self.session.metrics_path, self.name)
        self.held = None
        if self.prepared.held:
            main = self.ranks.is_main
            self.held = HeldOut(
                self.prepared, self.built, self.output, self.terminal, is_main=main,
                complete=None if self.comparing is None else self.comparing.complete_held,
            )  # fmt: skip
        self.clock.lap("startup")
        dry_run = self.session.dry_run
        feed = Feed(self._steps, progress, progress.step + 1 if dry_run else self.total)
        if self.total > progress.step or (self.held is not None and "after" not in self.heldout):
            with self.session.dog.phase("encode pictures"):
                self.warm(self.pipeline)
        # figures that are known already are of an attempt that ended before this stage's first checkpoint
        before = self.held is not None and run.evaluate.before and "before" not in self.heldout
        if self.held is not None and progress.step == 0 and before and not dry_run:
            self._record_eval(progress, self._measure("before"))
        self.clock.lap("evaluate")
        loop = Loop(
            root=self.built.forward, optimizer=self.built.optimizer, schedule=run.schedule, part_of=self.built.part_of,
            train=run.train, saving=run.save, total_steps=self.total, first_step=self.start.first_step,
            evaluate_every=run.evaluate.every_steps if self.held else None,
            callbacks=Callbacks(
                self._log, self._evaluate, self._save, self._refresh, self._event,
                None if self.comparing is None else self.comparing.ask,
            ),
            figures=self.built.root.objective.figures,
            progress=progress, guard=run.guard, rescue=self.rescue.callbacks(feed), ranks=self.ranks,
        )  # fmt: skip
        remaining = self.total - progress.step
        with self.terminal.progress(f"Training {self.name}".strip(), remaining) as self.bar, closing(feed):
            if remaining > 0 and not loop.is_over:  # the run was made longer, or fell back
                self.session.forget_figures(self.number)
            try:
                loop.run(feed)
            finally:
                with self.session.dog.phase("save"):
                    self.saving.wait()
        if self.stream is not None and not dry_run:
            self._end_stream(self.stream, loop.is_over)
        self.clock.lap("train")
        if self.held is not None and not dry_run and "after" not in self.heldout:
            self._record_eval(progress, self._measure("after"))
        self.clock.lap("evaluate")

    def _end_stream(self, stream: OpenStream, stopped_early: bool) -> None:
        stream.is_over()
        if self.trouble is not None:
            self.session.write_ledger()
            raise self.trouble
        done = self.progress.step
        if not done:
            raise DataError("NO_SAMPLES", "the stream ended without a sample that can be trained",
                            remedy="look at the sources, and at data.stream.wrong")  # fmt: skip
        if done < self.total and not stopped_early:
            self.terminal.warning(f"the stream ended after step {done} of {self.total}")

    def _steps(self) -> Iterator[SharedStep]:
        steps = shared_steps(self._read_steps(), self.ranks, self.built.root.objective.units)
        return steps if self.evened is None else self.evened(steps)

    @cached_property
    def evened(self) -> Evened | None:
        """What keeps ranks in step, where an engine spreads the model over them."""
        spread = self.built.spread
        if spread is None:
            return None
        whole = spread.whole_tower and self.built.root.vision_mode == "frozen"
        return Evened(self.prepared, pictures=not whole)

    def _read_steps(self) -> Iterator[StepRows]:
        """The steps from the progress on. Of a stream, up to what ends it: they are saved before that is said."""
        cache, workers = self.built.root.cache, data_workers(self.run_file)
        known, p = no_picture_known if cache is None else cache.known, self.progress
        if self.stream is None:
            plan = replace(self.prepared.plan, excluded=dict(p.excluded))
            self.pipeline = Pipeline(
                self.prepared.train, plan, self.prepared.limits, workers=workers, known=known, rank=self.ranks.rank,
                ranks=self.ranks.size,
            )  # fmt: skip
            return self.pipeline.steps(p.step, p.cursor)
        self.pipeline = StreamPipeline(
            self.stream.spec, self.prepared.limits, workers=workers, known=known, rank=self.ranks.rank,
            ranks=self.ranks.size,
        )  # fmt: skip
        return self._readable(self.pipeline.steps(p.step, p.stream))

    def _readable(self, steps: Iterator[StepRows]) -> Iterator[StepRows]:
        try:
            with closing(steps):  # type: ignore[type-var]
                yield from steps
        except UserError as error:
            self.trouble = error

    def release(self) -> None:
        """Let go of model and optimizer: the next stage makes its own, and both would not fit a GPU."""
        self.built.close()
        self.is_built = False
        del self.built, self.held, self.pipeline, self.saving
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def heldout(self) -> dict[str, Any]:
        return self.session.heldout_of(self.name)

    def at(self, p: Progress) -> int:
        """The step over all stages."""
        return self.start.first_step + p.step

    def warm(self, pipeline: Any) -> None:
        """Encode every picture once ahead, when the tower is frozen, all features fit the cache and all are used."""
        root, train = self.built.root, self.prepared.train
        if self.session.dry_run or not self.warmed or root.cache is None or not isinstance(pipeline, Pipeline):
            return
        if self.is_warm:
            return
        self.is_warm = True
        with self.terminal.progress("Encoding pictures once", len(train.trainable)) as bar:
            for done, row in pipeline.pictures(WARM_PATCHES):
                root.warm(row)
                root.cache.learn(row.meta["handles"])
                bar.advance(done - bar.done)

    def _refresh(self, row: Any) -> Any:
        """A row all of whose pictures have pixels or features."""
        root = self.built.root
        if not root.ready(row):
            row = self.pipeline.reread(row.members)
            root.ready(row)
        cache = root.cache
        if cache is not None and cache.trouble is not None:
            self.terminal.warning(cache.trouble)
            cache.trouble = None
        return self.complete(row)

    def complete(self, row: Any) -> Any:
        """A row that knows what the objective asks beside it."""
        return row if self.comparing is None else self.comparing.complete(row)

    def _log(self, p: Progress, data: Any, result: StepResult, seconds: float) -> None:
        self.session.dog.beat(self.at(p), "train")
        for late in self.session.dog.stragglers():
            self._event("straggler", late)
        self.saving.poll()
        self._warn(p, data, result)
        self._note_dropped(p, data)
        self.session.grace.step_seconds = seconds
        rows = max(1, data.num_rows)
        self.fill.append(data.num_tokens / (rows * self.prepared.limits.device_tokens))
        self.session.losses.append(result.loss if math.isfinite(result.loss) else None)
        record = {
            "kind": "step", "step": self.at(p), **self.about_stage, "epoch": round(p.epoch, 6), "loss": result.loss,
            "lr": result.rates, "grad_norm": result.grad_norm, "grad_norm_parts": result.grad_norm_parts,
            "applied": result.applied, "clipped_to": result.clipped_to, "tokens": data.num_tokens,
            "supervised": data.positions, "samples": data.num_samples, "image_tokens": data.image_tokens, "padding": 0,
            "rows": data.num_rows, "fill": round(self.fill[-1], 4), "sources": self._by_source(data, result),
            "cost": data.cost.total, "cost_spread": {"ranks": data.cost.ranks, "rows": data.cost.rows},
            "row_seconds_spread": result.row_seconds_spread, "rank_seconds_spread": result.rank_seconds_spread,
            "tokens_per_second": data.num_tokens / seconds, "samples_per_second": data.num_samples / seconds,
            "step_seconds": seconds, "data_wait_seconds": data.wait_seconds, "rss_bytes": peak_rss_bytes(),
        }  # fmt: skip
        record |= result.watched
        if others := {name: _mean(pairs) for name, pairs in result.by_source.items() if name != "loss"}:
            record["objective"] = others
        if p.scale is not None:
            record["loss_scale"] = p.scale.value
        if torch.cuda.is_available():
            record["gpu_bytes"] = torch.cuda.max_memory_allocated()
        self.session.sinks.write(record)
        self.bar.advance(1, f"loss {result.loss:.4f}")
        every = self.run_file.log.every_steps
        if every and p.step % every == 0:
            shown = {k: record[k] for k in ("step", "epoch", "loss", "grad_norm", "tokens_per_second")}
            self.terminal.event("step", **shown)
        self._check_dropped(data)

    def _warn(self, p: Progress, data: Any, result: StepResult) -> None:
        step, spike = self.at(p), result.spike
        figures = f"step {step}: loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}"
        if spike is not None and spike.is_spike:
            found = {"loss_z": spike.loss_z, "grad_norm_z": spike.norm_z, "clipped_to": result.clipped_to}
            values = {"loss": result.loss, "grad_norm": result.grad_norm}
            self._event("spike", {"step": step, **values, **found})
        elif result.overflow and p.scale is not None:
            self.terminal.warning(f"{figures} at that loss scale; not applied, the scale is {p.scale.value:g} now")
        elif not result.applied and not result.empty:
            origins = data.index.origins(data.step.members[:8].tolist())
            self.terminal.warning(f"{figures}; not applied. Samples: {', '.join(origins)} ...")

    def forget_dropped(self) -> None:
        """After a roll-back: what was dropped behind the checkpoint will be met again."""
        self.dropped = run_folder.dropped(self.session.metrics_path, self.name)

    def _by_source(self, data: Any, result: StepResult) -> dict[str, dict[str, Any]]:
        """Of each source in the step: samples, tokens, supervised tokens and their mean loss (unweighted)."""
        train = data.index
        gone = {number for number, _, _ in data.dropped}
        members = np.array([m for m in data.step.members.tolist() if m not in gone], np.int64)
        sources, tokens, supervised = (train.column(name)[members] for name in ("source", "tokens", "supervised"))
        found: dict[str, dict[str, Any]] = {}
        for number in np.unique(sources).tolist():
            mine = sources == number
            found[train.sources[number]] = {
                "samples": int(mine.sum()), "tokens": int(tokens[mine].sum()),
                "supervised": int(supervised[mine].sum()),
                **{name: _mean(pairs[number : number + 1]) for name, pairs in result.by_source.items()},
            }  # fmt: skip
        return found

    def _note_dropped(self, p: Progress, data: Any) -> None:
        for number, reason, detail in data.dropped:
            key = origin = data.index.origin(number)
            about = {"step": self.at(p), **self.about_stage, "origin": origin, "reason": reason, "detail": detail}
            if self.stream is not None:  # each pass over a row is a row of the ledger
                key = data.step.stream["window"], number
                about |= {"window": key[0], "sample": number}
            if key not in self.dropped:
                self.terminal.warning(f"{origin} is dropped at load: {reason} {detail}")
                self.session.sinks.write({"kind": "event", "name": "dropped", **about})
            self.dropped[key] = (reason, detail)

    def counts(self) -> dict[str, Any]:
        """Of the rows read so far: all of an index, the windows of a stream."""
        return self.prepared.read.counts() if self.stream is None else self.stream.counts()

    def _check_dropped(self, data: Any) -> None:
        """`data.max_dropped` holds for what is dropped at load too, and for every window of a stream."""
        another = self.stream is not None and self.stream.now_in(data.step.stream["window"])
        if not self.dropped and not another:
            return
        counts, most = self.counts(), self.run_file.data.max_dropped
        gone = counts["dropped"] + len(self.dropped)
        if gone <= most * counts["read"]:
            return
        self.session.write_ledger()
        reasons = Counter(f"LOAD_{reason}" for reason, _ in self.dropped.values())
        if self.stream is not None:
            reasons.update(counts["by_reason"])
        said = ", ".join(f"{n} {r}" for r, n in reasons.most_common())
        text = f"{gone} of {counts['read']} rows are dropped, {said} while training; more than data.max_dropped = "
        raise DataError("TOO_MANY_DROPPED", f"{text}{most}", where=str(self.output / "ledger.parquet"),
                        remedy="restore these pictures and run again, or raise data.max_dropped")  # fmt: skip

    def event(self, name: str, **fields: Any) -> dict[str, Any]:
        """A record for the metrics file."""
        return {"kind": "event", "name": name, **self.about_stage, **fields}

    def _event(self, name: str, fields: dict[str, Any]) -> None:
        self.session.sinks.write(self.event(name, **fields))
        self.terminal.event(name, **fields)

    def _evaluate(self, p: Progress) -> dict[str, float]:
        self.clock.lap("train")
        assert self.held is not None
        found = self._measure("after" if p.step >= self.total and self.held.always_all else "during")
        self._record_eval(p, found)
        self.clock.lap("evaluate")
        return found["scores"]

    def _save(self, p: Progress, metrics: dict[str, float] | None) -> None:
        with self.session.dog.phase("save"):
            self.saving.save(p, metrics)

    def _measure(self, when: When) -> dict[str, Any]:
        assert self.held is not None
        with self.session.dog.phase("evaluate"):
            return self.held.measure(when)

    def _record_eval(self, p: Progress, found: dict[str, Any]) -> None:
        scores, step = found["scores"], self.at(p)
        if found["when"] != "during":
            self.heldout[found["when"]] = scores
            self.heldout.update(found.get("extra", {}))
            if self.ranks.is_main:
                self.session.keep_folder(self)
                everything = json.dumps(run_folder.finite(self.session.heldout))
                write_atomically(self.output / "heldout.json", everything.encode())
        metrics = {k: v for k, v in scores.items() if k != "loss"}
        about = {"kind": "eval", "step": step, **self.about_stage, "loss": scores.get("loss"), "metrics": metrics}
        self.session.sinks.write(about)
        text = ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
        self.terminal.event("eval", f"held out, step {step}: {text}", step=step, **scores)
