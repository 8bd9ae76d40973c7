"""One training session: the run folder, its lock, resume, the loop with its callbacks, what is written at the end."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from lensmith.checkpoint.export import write_adapter, write_model
from lensmith.checkpoint.store import Published, Store, write_atomically
from lensmith.core.errors import DataError, RunError
from lensmith.data.pipeline import Pipeline, no_picture_known
from lensmith.engine.loop import Callbacks, Loop, Progress, score
from lensmith.engine.state import read_state, write_state
from lensmith.engine.step import StepResult
from lensmith.model.options import Lora
from lensmith.model.vision_cache import VisionCache
from lensmith.recipe import folder as run_folder
from lensmith.recipe.build import build, data_workers, set_threads
from lensmith.recipe.held_out import HeldOut
from lensmith.recipe.identity import check_identity, identity
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.recipe.run import Located
from lensmith.recipe.train import Clock, peak_rss_bytes
from lensmith.report.metrics import MetricsWriter
from lensmith.report.page import write_report
from lensmith.report.sinks import Sinks, make_sinks
from lensmith.report.tables import what_trains
from lensmith.report.terminal import Terminal

WARM_PATCHES = 8192
"""Patches encoded at once before training."""


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
    config = run_folder.read_json(prepared.model_folder / "config.json")
    text, vision = {**config, **config.get("text_config", {})}, config["vision_config"]
    levels = 1 + len(vision.get("deepstack_visual_indexes", ()))
    width = text["hidden_size"] * levels
    if mode == "projector":
        width += prepared.family.pixels.merge**2 * vision.get("embed_dim", vision["hidden_size"])
    tokens = sum(int(i.column("media_tokens").sum()) for i in (index, prepared.held) if i is not None)
    return samples >= len(index.trainable) and tokens * width * 4 <= cache.memory_bytes


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

    def run(self) -> dict[str, Any]:
        threads = set_threads(self.run_file)
        self.clock.lap("startup")
        self.prepared = prepare(self.located, self.terminal)
        self.clock.lap("index")
        self.store.clean()
        resume = self.store.newest(self.terminal.warning)
        self.identity = identity(self.prepared)
        if resume is not None:
            check_identity(resume.manifest.get("identity", {}), self.identity, str(resume.folder))
        with self.terminal.progress(f"Loading {self.prepared.model_folder.name}", None, counted=False):
            self.built = build(self.prepared)
        progress = read_state(resume.folder / "state", self.built.optimizer) if resume else Progress()
        self.total = self.prepared.plan.num_steps(progress.step, progress.cursor)
        if not self.total:
            count = len(self.prepared.train.trainable)
            raise DataError("NO_STEPS", f"{count} samples are fewer than a step, and batch.partial is drop",
                            remedy="make the step smaller, or set batch.partial: carry")  # fmt: skip
        cache, mode = self.built.root.cache, self.built.root.vision_mode
        self.warmed = cache is not None and warm_pays(self.prepared, mode, cache)
        if resume is not None:  # what paid at the start decides: a longer run must go on with the same bits
            self.warmed = self.warmed and bool(resume.manifest.get("warmed", True))
        self._open_folder(progress, fresh=resume is None)
        self._say_start(resume, threads)
        self.held = HeldOut(self.prepared, self.built, self.output, self.terminal) if self.prepared.held else None
        self.clock.lap("startup")
        self._train(progress)
        self._finish(progress)
        return self.summary

    # -- the run folder -----------------------------------------------------------------------------------------

    def _open_folder(self, progress: Progress, *, fresh: bool) -> None:
        out = self.output
        self.metrics = MetricsWriter(out / "metrics.jsonl")
        self.metrics.truncate_after(-1 if fresh else progress.step)
        if fresh:  # an attempt that ended before its first checkpoint left these
            for name in ("heldout.json", "samples.json"):
                (out / name).unlink(missing_ok=True)
        self.losses = run_folder.losses(self.metrics.path)
        self.dropped = run_folder.dropped(self.metrics.path, self.prepared.train.column("origin").tolist())
        self.sinks = Sinks(
            self.metrics,
            make_sinks([] if self.dry_run else list(self.run_file.log.sinks), out, progress.step + 1),
            self.terminal.warning,
        )
        self._logging = True
        self.sinks.open(self.located.name, self.run_file.model_dump(mode="json"))
        write_atomically(out / "run.yaml", self.located.resolved_yaml().encode())
        totals = {"trainable": self.built.trainable_parameters, "parameters": self.built.total_parameters}
        rows = self.built.trains
        write_atomically(out / "trains.json", json.dumps({"rows": rows, "totals": totals}, indent=1).encode())
        write_atomically(out / "versions.json", json.dumps(run_folder.versions(self.prepared), indent=1).encode())
        self._write_ledger()

    def _close_sinks(self) -> None:
        if self._logging:
            self._logging = False
            self.sinks.close()

    def _write_ledger(self) -> None:
        table = run_folder.ledger(self.prepared, [(n, r, d) for n, (r, d) in self.dropped.items()])
        temporary = self.output / ".ledger.tmp"
        pq.write_table(table, temporary)
        temporary.replace(self.output / "ledger.parquet")

    def _say_start(self, resume: Published | None, threads: int) -> None:
        totals = {"trainable": self.built.trainable_parameters, "parameters": self.built.total_parameters}
        self.terminal.show("what_trains", what_trains(self.built.trains, totals))
        steps = self.total
        planned = resume.manifest.get("total_steps", steps) if resume else steps
        if planned != steps:
            self.terminal.warning(
                f"the run now has {steps} steps, not {planned}: from here on rates follow the new length's schedule"
            )
        self.terminal.event(
            "start",
            f"{steps} steps, {self.built.trainable_parameters:,} of {self.built.total_parameters:,} parameters train "
            f"({self.built.precision.preset}, {self.built.root.device}, {threads} threads, "
            f"{data_workers(self.run_file)} data workers)"
            + (f", resumed after step {resume.step}" if resume else ""),
            steps=steps, trainable=self.built.trainable_parameters, resumed=resume.step if resume else 0,
        )  # fmt: skip

    # -- the loop -----------------------------------------------------------------------------------------------

    def _train(self, progress: Progress) -> None:
        self.heldout: dict[str, Any] = run_folder.read_json(self.output / "heldout.json")
        run, root = self.run_file, self.built.root
        self.fill: list[float] = []
        cache = root.cache
        self.pipeline = Pipeline(
            self.prepared.train, self.prepared.plan, self.prepared.limits, workers=data_workers(run),
            known=no_picture_known if cache is None else cache.known,
        )  # fmt: skip
        if self.total > progress.step or (self.held is not None and "after" not in self.heldout):
            self._warm()
        if self.held is not None and progress.step == 0 and run.evaluate.before and not self.dry_run:
            self._record_eval(progress, self.held.measure("before"))
        self.clock.lap("evaluate")
        loop = Loop(
            root=root, optimizer=self.built.optimizer, schedule=run.schedule, part_of=self.built.part_of,
            train=run.train, saving=run.save, total_steps=self.total,
            evaluate_every=run.evaluate.every_steps if self.held else None,
            callbacks=Callbacks(self._log, self._evaluate, self._save, self._refresh, self._event), progress=progress,
        )  # fmt: skip
        remaining = self.total - progress.step
        with self.terminal.progress("Training", remaining) as self.bar:
            steps = self.pipeline.steps(progress.step, progress.cursor)
            if self.dry_run:
                steps = (s for s in [next(steps)])
            if remaining > 0:  # figures of an earlier end are void: the run was made longer, or fell back
                self.heldout.pop("after", None)
            loop.run(steps)
        self.clock.lap("train")

    def _warm(self) -> None:
        """Encode every picture once ahead, when the tower is frozen, all features fit the cache and all are used."""
        root, train = self.built.root, self.prepared.train
        if self.dry_run or not self.warmed or root.cache is None:
            return
        with self.terminal.progress("Encoding pictures once", len(train.trainable)) as bar:
            for done, row in self.pipeline.pictures(WARM_PATCHES):
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
        return row

    def _log(self, p: Progress, data: Any, result: StepResult, seconds: float) -> None:
        if not result.applied and not result.empty:
            origins = [str(self.prepared.train.column("origin")[m]) for m in data.step.members[:8].tolist()]
            self.terminal.warning(
                f"step {p.step}: loss {result.loss}, gradient norm {result.grad_norm}; not applied. "
                f"Samples: {', '.join(origins)} ..."
            )
        for number, reason, detail in data.dropped:
            origin = self.prepared.train.column("origin")[number]
            if number not in self.dropped:
                self.terminal.warning(f"{origin} is dropped at load: {reason} {detail}")
                self.sinks.write(
                    {
                        "kind": "event",
                        "name": "dropped",
                        "step": p.step,
                        "origin": origin,
                        "reason": reason,
                        "detail": detail,
                    }
                )
            self.dropped[number] = (reason, detail)
        rows = max(1, len(data.rows))
        self.fill.append(data.num_tokens / (rows * self.prepared.limits.device_tokens))
        self.losses.append(result.loss if math.isfinite(result.loss) else None)
        record = {
            "kind": "step", "step": p.step, "epoch": round(p.epoch, 6), "loss": result.loss, "lr": result.rates,
            "grad_norm": result.grad_norm, "grad_norm_parts": result.grad_norm_parts, "applied": result.applied,
            "tokens": data.num_tokens, "supervised": sum(len(r.supervised_S) for r in data.rows),
            "samples": data.num_samples,
            "image_tokens": int(sum((r.kind_T != 0).sum() for r in data.rows)), "padding": 0,
            "rows": len(data.rows), "fill": round(self.fill[-1], 4),
            "tokens_per_second": data.num_tokens / seconds, "samples_per_second": data.num_samples / seconds,
            "step_seconds": seconds, "data_wait_seconds": data.wait_seconds, "rss_bytes": peak_rss_bytes(),
        }  # fmt: skip
        if torch.cuda.is_available():
            record["gpu_bytes"] = torch.cuda.max_memory_allocated()
        self.sinks.write(record)
        self.bar.advance(1, f"loss {result.loss:.4f}")
        every = self.run_file.log.every_steps
        if every and p.step % every == 0:
            shown = {k: record[k] for k in ("step", "epoch", "loss", "grad_norm", "tokens_per_second")}
            self.terminal.event("step", **shown)
        self._check_dropped()

    def _check_dropped(self) -> None:
        """`data.max_dropped` holds for what is dropped at load too."""
        counts, data = self.prepared.read.counts(), self.run_file.data
        gone = counts["dropped"] + len(self.dropped)
        if self.dropped and gone > data.max_dropped * counts["read"]:
            self._write_ledger()
            reasons = Counter(f"LOAD_{reason}" for reason, _ in self.dropped.values())
            said = ", ".join(f"{n} {r}" for r, n in reasons.most_common())
            text = f"{gone} of {counts['read']} rows are dropped, {said} while training; more than data.max_dropped = "
            raise DataError("TOO_MANY_DROPPED", f"{text}{data.max_dropped}", where=str(self.output / "ledger.parquet"),
                            remedy="restore these pictures and run again, or raise data.max_dropped")  # fmt: skip

    def _event(self, name: str, fields: dict[str, Any]) -> None:
        self.sinks.write({"kind": "event", "name": name, **fields})
        self.terminal.event(name, **fields)

    def _evaluate(self, p: Progress) -> dict[str, float]:
        assert self.held is not None
        self.clock.lap("train")
        found = self.held.measure("after" if p.step >= self.total and self.held.always_all else "during")
        self._record_eval(p, found)
        self.clock.lap("evaluate")
        return found["scores"]

    def _record_eval(self, p: Progress, found: dict[str, Any]) -> None:
        scores = found["scores"]
        if found["when"] != "during":
            self.heldout[found["when"]] = scores
            self.heldout.update(found.get("extra", {}))
            write_atomically(self.output / "heldout.json", json.dumps(run_folder.finite(self.heldout)).encode())
        self.sinks.write(
            {
                "kind": "eval",
                "step": p.step,
                "loss": scores.get("loss"),
                "metrics": {k: v for k, v in scores.items() if k != "loss"},
            }
        )
        text = ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
        self.terminal.event("eval", f"held out, step {p.step}: {text}", step=p.step, **scores)

    # -- saving -------------------------------------------------------------------------------------------------

    def _save(self, p: Progress, metrics: dict[str, float] | None) -> None:
        self.clock.lap("train")
        finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
        about = {
            "identity": self.identity,
            "metrics": finite,
            "tune": self.run_file.tune.kind,
            "total_steps": self.total,
            "warmed": self.warmed,
        }
        published = self.store.publish(p.step, lambda folder: self._write(folder, p), about)
        keep = run_folder.best_step(self.store, self.run_file.save.keep_best, score)
        self.store.purge(self.run_file.save.keep_last, keep)
        self.clock.lap("save")
        self.sinks.write({"kind": "event", "name": "checkpoint", "step": p.step, "path": published.folder.name})

    def _write(self, folder: Path, p: Progress) -> None:
        write_state(folder / "state", self.built.optimizer, p)
        base, family = self.prepared.model_folder, self.prepared.family
        pixels = {"min_pixels": family.pixels.min_pixels, "max_pixels": family.pixels.max_pixels}
        tune = self.run_file.tune
        if isinstance(tune, Lora):
            dtype = getattr(torch, tune.saved)
            name, revision = run_folder.base_name(self.prepared)
            write_adapter(folder / "model", self.built.tuned.peft, base, name, dtype, revision=revision, pixels=pixels)
        else:
            write_model(folder / "model", self.built.tuned.model, base, self.built.precision.saved,
                        shard_gb=self.run_file.save.shard_gb, pixels=pixels)  # fmt: skip
        if self.run_file.model.add_tokens:
            (folder / "model" / "tokenizer.json").write_text(self.prepared.train.spec.tokenizer_json, encoding="utf-8")

    # -- the end ------------------------------------------------------------------------------------------------

    def _finish(self, p: Progress) -> None:
        if self.held is not None and not self.dry_run and "after" not in self.heldout:
            self._record_eval(p, self.held.measure("after"))
        self.clock.lap("evaluate")
        self._write_ledger()
        self._close_sinks()
        newest = self.store.steps()
        if not newest:
            raise RunError("SAVE", "the run ended without a checkpoint", where=str(self.output))
        self.summary = run_folder.summary(
            self.prepared, self.built, p, self.losses, self.output / "metrics.jsonl", self.heldout, self.dropped,
            str(self.store.path(newest[-1])), self.clock,
        )  # fmt: skip
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
