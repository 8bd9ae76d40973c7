"""What a stage gives the loop for looking into a step that is not finite, and for going back to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lensmith.checkpoint.store import write_atomically
from lensmith.core.errors import RunError, UserError
from lensmith.data.tokenizer import TextTokenizer
from lensmith.engine.forensics import InStep
from lensmith.engine.guard import History
from lensmith.engine.progress import Progress
from lensmith.engine.rescue import Incident, Rescue
from lensmith.engine.state import read_state
from lensmith.model.vision_cache import feature_key
from lensmith.parallel.ranks import attempt
from lensmith.parallel.shares import is_here
from lensmith.recipe import folder as run_folder
from lensmith.recipe.incident import About, parameters_of, write_incident
from lensmith.report.incidents import PAGE, write_incidents_page

if TYPE_CHECKING:
    from lensmith.recipe.stage import StageRun


class Feed:
    """The steps of a stage from its progress on, up to step `last`; begun anew from wherever the progress is put."""

    def __init__(self, begin: Callable[[], Any], progress: Progress, last: int):
        self._begin, self._progress, self.last = begin, progress, last
        self._steps = begin()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._progress.step >= self.last:
            raise StopIteration
        return next(self._steps)

    def restart(self) -> None:
        self.close()
        self._steps = self._begin()

    def close(self) -> None:
        self._steps.close()


class StageRescue:
    """Of one stage."""

    def __init__(self, stage: StageRun):
        self.stage = stage

    def callbacks(self, feed: Feed) -> Rescue:
        stage = self.stage
        return Rescue(
            stage.built.root.named, lambda sample: stage.complete(stage.pipeline.reread((sample,))), self.record,
            self.keep, self.roll_back, None if stage.stream is not None else lambda progress: feed.restart(),
            None if stage.evened is None else InStep(stage.ranks, stage.evened.one),
            lambda: stage.session.dog.phase("examine a step"),
        )  # fmt: skip

    def record(self, incident: Incident) -> None:
        """Write the folder and the page, on the rank that found it, and say what was found."""
        stage, f = self.stage, incident.finding
        shown = self._written(incident)
        folder = stage.output / shown
        if trouble := stage.session.on_main("write the incidents page", lambda: _page(stage.output)):
            stage.terminal.warning(trouble)
        self._clean_cache(incident)
        origins = [self._origin(incident, n) for n in f.samples]
        step = stage.start.first_step + incident.step
        stage.session.sinks.write({
            "kind": "event", "name": "incident", "step": step, **stage.about_stage, "cause": f.cause,
            "module": f.module, "part": f.part, "samples": origins, "action": incident.action, "why": incident.why,
            "folder": shown,
        })  # fmt: skip
        largest = "" if f.largest_input is None else f", largest finite input {f.largest_input:.3g} {f.input_dtype}"
        fault = "samples: " + ", ".join(origins[:8]) if origins else "every sample" if f.every_sample else "no sample"
        said = {"skip": "left out", "roll_back": "going back to the last checkpoint", "stop": "the run stops"}
        stage.terminal.warning(
            f"step {step}: {incident.text}{largest}; at fault: {fault}; {said[incident.action]} ({incident.why}). "
            f"Look into it: lensmith replay {folder}"
        )

    def _clean_cache(self, incident: Incident) -> None:
        """Features that are not finite would spoil each step that has their picture, and on disk other runs too."""
        cache, scene, row = self.stage.built.root.cache, incident.scene, incident.finding.row
        if cache is None or scene is None or row is None or not incident.owner:
            return
        packed = scene.rows[row]
        grids = packed.image_grids_I3.tolist()
        cache.drop_bad([feature_key(k, tuple(g)) for k, g in zip(packed.image_keys, grids, strict=True)])

    def _written(self, incident: Incident) -> str:
        """The incident's folder in the run folder. Raises `OSError` on all ranks where it cannot be written."""
        found, error, wholes = None, None, self._wholes(incident)
        if incident.owner:
            found, error = attempt(lambda: write_incident(incident, self._about(incident, wholes)))
        if error is not None and not isinstance(error, OSError):
            raise error
        why = error and (error.strerror or str(error))
        mine = [None if found is None else str(found.relative_to(self.stage.output)), why]
        each = self.stage.session.ranks.gather_json(mine, "keep the incident")
        shown = next((folder for folder, _ in each if folder is not None), None)
        if shown is None:
            raise OSError(next(text for _, text in each if text is not None))
        return shown

    def _wholes(self, incident: Incident) -> dict[str, torch.Tensor]:
        """Parameters of which each rank has a share, put together on the rank that keeps the incident: those at fault,
        and what trains, as far as `guard.dump_mb` allows. All ranks together."""
        stage, found = self.stage, incident.finding
        if stage.built.spread is None or incident.kind == "state":
            return {}
        model = stage.built.root.named
        named: dict[str, Any] = dict(model.named_parameters())
        at_fault = [n for n in found.bad_parameters if n in named] + parameters_of(model, found.module)
        wholes: dict[str, torch.Tensor] = {}
        room = stage.run_file.guard.dump_mb << 20
        for name in dict.fromkeys([*at_fault, *(n for n, p in named.items() if p.requires_grad)]):
            p = named[name]
            size = getattr(p, "ds_numel", p.numel()) * p.element_size()
            if is_here(p) or size > room:
                continue
            room -= size
            whole = stage.built.full(name, p)
            if incident.owner:
                wholes[name] = whole.detach().cpu()
        return wholes

    def _about(self, incident: Incident, wholes: dict[str, torch.Tensor]) -> About:
        stage = self.stage
        newest = stage.store.steps()
        known = {
            "run": stage.prepared.located.name, "stage": stage.name, "stage_number": stage.number,
            "model_folder": str(stage.prepared.model_folder), "has_added_tokens": stage.prepared.has_added_tokens,
            "checkpoint": str(stage.store.path(newest[-1])) if newest else None,
            "steps_since_checkpoint": stage.start.first_step + incident.step - newest[-1] if newest else None,
            "versions": run_folder.versions(stage.prepared), "device": str(stage.built.root.device),
            "precision": stage.built.precision.preset,
        }  # fmt: skip
        return About(
            stage.output, stage.prepared.located.resolved_yaml(), stage.run_file.guard, stage.built.root,
            stage.start.first_step, known, wholes, lambda number: self._origin(incident, number), self._text,
        )  # fmt: skip

    def _origin(self, incident: Incident, number: int) -> str:
        index = incident.data.index if incident.data is not None else self.stage.prepared.train
        return index.origin(number)

    def _text(self, ids: Any) -> str:
        return TextTokenizer(self.stage.prepared.train.spec.tokenizer_json).decode(list(ids))

    def keep(self, p: Progress) -> None:
        """`incidents/history.json`, by stage."""
        if not self.stage.session.ranks.is_main:
            return
        path = self.stage.output / "incidents" / "history.json"
        path.parent.mkdir(exist_ok=True)
        everything = _histories(self.stage.output) or {}
        values = p.to_json()
        everything[str(self.stage.number)] = {key: values[key] for key in ("history", "excluded")}
        write_atomically(path, json.dumps(everything, indent=1).encode())

    def remember(self, p: Progress) -> None:
        """Of a run that is resumed: what was found out behind the checkpoint that it goes on from."""
        path = self.stage.output / "incidents" / "history.json"
        everything = _histories(self.stage.output)
        if everything is None:
            raise RunError("RESUME", "what went wrong so far cannot be read", where=str(path),
                           remedy="delete this file to go on; samples that were left out are tried again")  # fmt: skip
        kept = everything.get(str(self.stage.number))
        if kept is not None:
            p.history = p.history.with_all_of(History(**kept["history"]))
            p.excluded |= {int(k): int(v) for k, v in kept["excluded"]}

    def roll_back(self, last: int) -> Progress:
        """Parameters, moments and random state of the newest checkpoint that verifies, up to step `last`. Later ones
        are deleted; metrics, and samples dropped since then, are forgotten. Raises `RunError` NONFINITE where this
        stage has none, and as `Store.newest`."""
        stage = self.stage
        stage.saving.wait()
        newest = stage.session.newest(stage.start.first_step + last)
        if newest is None or int(newest.manifest.get("stage", 0)) != stage.number:
            which = "of this stage " if newest is not None else ""
            raise RunError("NONFINITE", f"there is no checkpoint {which}up to step {last} to go back to")
        if stage.session.mirror is not None:
            stage.session.mirror.forget_after(newest.step)
        stage.session.on_main("forget later checkpoints", lambda: stage.store.forget_after(newest.step))
        back = read_state(newest.folder / "state", stage.built.optimizer)
        reached = stage.progress.step
        stage.session.rewind(stage.start.first_step + back.step)
        stage.forget_dropped()
        stage.bar.advance(back.step - reached)
        return back


def _histories(output: Path) -> dict[str, Any] | None:
    """By stage; None where the file is damaged."""
    try:
        found = run_folder.read_json(output / "incidents" / "history.json")
        for kept in found.values():
            History(**kept["history"])
            dict(kept["excluded"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return found


def _page(output: Path) -> str:
    """Why the page could not be written; empty where it was."""
    try:
        write_incidents_page(output)
    except OSError as error:
        return f"{output / PAGE} could not be written: {error.strerror or error}"
    except UserError as error:
        return error.render()
    return ""


def forget(output: Path) -> None:
    """Of an attempt that ended before its first checkpoint: its incidents stay to be looked at, their count goes."""
    (output / "incidents" / "history.json").unlink(missing_ok=True)


def guard_summary(output: Path, stages: Sequence[StageRun]) -> dict[str, int]:
    """What went wrong, for summary.json; of the stages before this session, what was kept of them."""
    now = {str(stage.number): stage.progress.to_json() for stage in stages}
    each = [*((_histories(output) or {}) | now).values()]
    found = {key: sum(values["history"][key] for values in each) for key in ("incidents", "skipped", "transient")}
    return found | {
        "roll_backs": sum(len(values["history"]["roll_backs"]) for values in each),
        "spikes": sum(values["history"]["spikes"] for values in each),
        "excluded": sum(len(values["excluded"]) for values in each),
    }
