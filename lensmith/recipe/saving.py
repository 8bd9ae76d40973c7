"""The checkpoints of one stage: what goes into them, and whether the training waits for the disk."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensmith.checkpoint.export import SavedTypes, adapter_state, write_adapter, write_model
from lensmith.checkpoint.together import Files, agreed_files, taken_model, write_model_together
from lensmith.engine.progress import Progress
from lensmith.engine.state import taken_state, write_state
from lensmith.model import value_head
from lensmith.model.options import Lora
from lensmith.parallel.ranks import attempt
from lensmith.recipe import folder as run_folder
from lensmith.recipe.methods import quantized

if TYPE_CHECKING:
    from lensmith.recipe.stage import StageRun


class Saving:
    """`save.background`: the state is copied to the host, and a thread writes and publishes it while training goes on.
    One save is under way at most; the next one, a roll-back and the end of the stage wait for it. What it fails with is
    raised by the next step."""

    def __init__(self, stage: StageRun):
        self.stage = stage
        rule = stage.run_file.save.background
        self.background = stage.built.root.device.type == "cuda" if rule is None else rule
        self._beside = stage.ranks.twin() if self.background else stage.ranks
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step, self._begun = 0, 0.0

    def save(self, p: Progress, metrics: dict[str, float] | None) -> None:
        """Publish a checkpoint, or begin to."""
        stage = self.stage
        stage.clock.lap("train")
        about = self._about(metrics)
        stage.session.on_main("look at the run folder", lambda: stage.session.keep_folder(stage))
        self.wait()
        self._step, self._begun = stage.at(p), time.monotonic()
        if not self.background:
            stage.store.publish(self._step, lambda folder: self._write(folder, p), about)
            self._published()
        else:
            write = self._taken(p)
            stalled = time.monotonic() - self._begun
            work = lambda: stage.store.publish(self._step, write, about, self._beside)  # noqa: E731
            self._thread = threading.Thread(target=self._run, args=(work,), name="save", daemon=True)
            self._thread.start()
            stage.session.sinks.write(stage.event("save_begun", step=self._step, stalled_seconds=round(stalled, 4)))
        stage.clock.lap("save")

    def _run(self, work: Callable[[], Any]) -> None:
        _, self._error = attempt(work)

    def poll(self) -> None:
        """Between steps: take note of a save that has ended on every rank."""
        if self._thread is not None and not self.stage.ranks.any(self._thread.is_alive(), "look at the save"):
            self.wait()

    def wait(self) -> None:
        """Until no save is under way. Raises what it failed with."""
        if self._thread is None:
            return
        begin = time.monotonic()
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        self._published(time.monotonic() - begin)

    def _published(self, waited: float = 0.0) -> None:
        stage, session, p = self.stage, self.stage.session, self.stage.progress
        if session.mirror is not None:
            session.mirror.wait()  # it may be reading a folder that is deleted now
        if not p.bad_in_a_row:  # behind a step that was not applied, the way back stays
            keep = session.best_steps() | set(session.borders)
            session.on_main("purge", lambda: stage.store.purge(stage.run_file.save.keep_last, keep))
        if session.mirror is not None:
            session.mirror.start()
        seconds = time.monotonic() - self._begun
        session.grace.saved(seconds)
        session.sinks.write(
            stage.event("checkpoint", step=self._step, path=stage.store.path(self._step).name,
                        seconds=round(seconds, 3), waited_seconds=round(waited, 3))
        )  # fmt: skip

    def _about(self, metrics: dict[str, float] | None) -> dict[str, Any]:
        stage = self.stage
        return {
            "identity": stage.identity,
            "metrics": {name: value for name, value in (metrics or {}).items() if math.isfinite(value)},
            "tune": stage.run_file.tune.kind,
            "total_steps": stage.total,
            "warmed": stage.warmed,
            "stage": stage.number,
            "first_step": stage.start.first_step,
            "base": stage.start.base,
            "borders": stage.session.borders,
            "settled": stage.session.settled,
        }

    # -- what is in it ------------------------------------------------------------------------------------------

    def _write(self, folder: Path, p: Progress) -> None:
        stage = self.stage
        write_state(folder / "state", stage.built.optimizer, p)
        if isinstance(stage.run_file.tune, Lora):
            self._adapter(copy=False)(folder)
        elif stage.ranks.several:
            write_model_together(folder / "model", self._files, *self._model)
        else:
            model, base, types, _, _, pixels = self._model
            shard_gb = self.stage.run_file.save.shard_gb
            write_model(folder / "model", model, base, types, shard_gb=shard_gb, pixels=pixels)
        self._value_head(copy=False)(folder)
        self._added_tokens(folder)

    def _taken(self, p: Progress) -> Callable[[Path], None]:
        """Everything that a checkpoint holds, as it is now."""
        state = taken_state(self.stage.built.optimizer, p, copy=True)
        lora = isinstance(self.stage.run_file.tune, Lora)
        model = self._adapter(copy=True) if lora else taken_model(self._files, *self._model)

        head = self._value_head(copy=True)

        def write(folder: Path) -> None:
            state(folder / "state")
            model(folder if lora else folder / "model")
            head(folder)
            self._added_tokens(folder)

        return write

    @property
    def _model(self) -> tuple[Any, Path, SavedTypes, Any, Any, Any]:
        """(model, base, types, what gathers, ranks, limits of pixels)."""
        stage, family = self.stage, self.stage.prepared.family
        types = SavedTypes.planned(stage.built.precision, family.part_of)
        built, base = stage.built, stage.prepared.model_folder
        return built.tuned.model, base, types, built.full, stage.ranks, family.pixels.limits

    @cached_property
    def _files(self) -> Files:
        """They are the same for every save."""
        model, _, types, _, ranks, _ = self._model
        return agreed_files(model, types, self.stage.run_file.save.shard_gb, ranks)

    def _adapter(self, *, copy: bool) -> Callable[[Path], None]:
        """The adapter, gathered on every rank and written by the first one."""
        stage, built = self.stage, self.stage.built
        dtype = built.precision.of("adapter").saved
        trained = None
        if built.spread is not None:
            trained = {n: built.full(n, p) for n, p in built.tuned.trainable()}
        found = adapter_state(built.tuned.peft, trained, built.tuned.adapted)
        state = {n: t.to("cpu", dtype, copy=copy) for n, t in found.items()}

        def write(folder: Path) -> None:
            if stage.ranks.is_main:
                name, revision = run_folder.base_name(stage.prepared)
                write_adapter(
                    folder / "model", built.tuned.peft, stage.prepared.model_folder, name, dtype, revision=revision,
                    pixels=stage.prepared.family.pixels.limits, state=state, adapted=built.tuned.adapted,
                    quantize=quantized(stage.run_file.tune),
                )  # fmt: skip

        return write

    def _value_head(self, *, copy: bool) -> Callable[[Path], None]:
        """A reward model's head, gathered on every rank and written by the first one."""
        head, stage = self.stage.built.tuned.value_head, self.stage
        if head is None:
            return lambda folder: None
        named = dict(head.named_parameters())
        found = {n: stage.built.full(value_head.PREFIX + n, p).detach().to("cpu", copy=copy) for n, p in named.items()}

        def write(folder: Path) -> None:
            if stage.ranks.is_main:
                value_head.write(folder / "model", found)

        return write

    def _added_tokens(self, folder: Path) -> None:
        if self.stage.run_file.model.add_tokens and self.stage.ranks.is_main:
            text = self.stage.prepared.train.spec.tokenizer_json
            (folder / "model" / "tokenizer.json").write_text(text, encoding="utf-8")
