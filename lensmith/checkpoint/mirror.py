"""The checkpoints of a run folder, kept in an object store too: copied by a thread behind the training."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lensmith.checkpoint.remote import Owner, Remote, Unreachable
from lensmith.checkpoint.store import MANIFEST, Damaged, Published, Store, read_manifest, write_atomically
from lensmith.core.errors import RunError
from lensmith.parallel.ranks import OtherRank, Ranks, attempt

BEAT_SECONDS, POLL_SECONDS = 5.0, 0.2

Needed = Callable[[dict[int, dict[str, Any]]], set[int]]
"""From the manifests of a store to the steps that a run needs beside the newest."""


class Mirror:
    """The store holds what the folder holds: what is published here is copied, what is deleted here is deleted there.

    All ranks call every method, and share the folder. The first one looks, commits and deletes; the files of a
    checkpoint are spread over all. Errors of the thread are raised by the next call.
    """

    def __init__(
        self,
        remote: Remote,
        store: Store,
        mark: Path,
        name: str,
        warn: Callable[[str], None],
        damaged: Callable[[str], None],
        ranks: Ranks | None = None,
    ):
        """`mark`: a file in the run folder that says which run this is. `damaged` is told of each checkpoint that an
        older one stands in for; it may raise."""
        self.remote, self.store, self.name, self.warn, self.damaged = remote, store, name, warn, damaged
        self.ranks = ranks or Ranks()
        self._beside = self.ranks.twin()
        self._mark, self._from = mark, -1
        self._same: set[int] = set()
        """Steps that are in the store as they are here."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    # -- the start of a run -------------------------------------------------------------------------------------

    def newest(self, needed: Needed) -> Published | None:
        """The newest checkpoint that verifies, here or in the store; one of the store is in the folder then, and those
        that `needed` names beside it. Changes nothing there.

        Raises `RunError` DAMAGED when there are checkpoints and none verifies; OWNER when the prefix is another run's;
        REMOTE when the store refuses, or does not answer and there is no checkpoint here.
        """
        self._from = self._first("look into the store", lambda: self._newest(needed))
        if self._from < 0:
            return None
        folder = self.store.path(self._from)
        return Published(folder, read_manifest(folder))

    def _newest(self, needed: Needed) -> int:
        """-1: none."""
        steps, local, trouble = self.store.steps(), -1, None
        said: list[str] = []
        try:
            found = self.store.newest(said.append)
            local = found.step if found is not None else -1
        except RunError as error:
            if error.code != "DAMAGED":
                raise
            trouble, said = error, [error.message]
        step = self._newer_than(local, trouble, needed)
        for text in said:
            (self.damaged if step < steps[-1] else self.warn)(text)
        return step

    def _newer_than(self, local: int, trouble: RunError | None, needed: Needed) -> int:
        try:
            newer, held = self._newer(local, needed)
        except Unreachable as error:
            if local < 0:
                raise
            self.warn(f"{error.where}: {error.message}; going on from checkpoint {local}, which is here")
            return local
        if newer is None and trouble is not None:
            raise trouble
        if newer is None and local < 0 and held:
            raise RunError("DAMAGED", "no checkpoint of this run verifies", where=self.remote.shown,
                           remedy="start over with another output folder and save.remote")  # fmt: skip
        return local if newer is None else newer.step

    def _newer(self, local: int, needed: Needed) -> tuple[Published | None, bool]:
        """A checkpoint of the store behind step `local`; whether there is any."""
        run = self._run()
        held = self.remote.steps()
        self._keep(run)  # before the folder has checkpoints, which are of that run
        found = self.remote.newest(self.store, local, self.damaged)
        if found is None:
            return None, bool(held)
        manifests = {step: m for step in held if step <= found.step and (m := self._there(step))}
        for step in sorted(needed(manifests) - set(self.store.steps())):
            try:
                self.remote.receive(self.store, step)
            except Damaged as error:
                self.warn(f"checkpoint is damaged: {error}")
        return found, True

    def _there(self, step: int) -> dict[str, Any] | None:
        """The manifest in the store, as it stands there."""
        try:
            manifest = json.loads(self.remote.manifest(step) or b"null")
        except (ValueError, RecursionError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def begin(self) -> None:
        """Claim the prefix, once it is certain that the run goes on; then copy the checkpoint that it goes on from, if
        the store lacks it. A store that does not answer is asked again at the first save, if there is a checkpoint
        here."""
        if self._first("claim the store", self._claimed) and self._from >= 0:
            self._spawn([self._from], lambda: None)

    def _claimed(self) -> bool:
        try:
            self._claim()
        except Unreachable as error:
            if self._from < 0:
                raise
            self.warn(f"{error.where}: {error.message}; asking again at the next save")
            return False
        return True

    def _claim(self) -> None:
        run = self._run()
        self._keep(run)
        self.remote.claim(Owner.new(run, self.name))

    def _keep(self, run: str) -> None:
        if not self._mark.is_file():
            write_atomically(self._mark, json.dumps({"run": run}).encode())

    def _run(self) -> str:
        """Which run this is. Raises `RunError` OWNER when the prefix belongs to another."""
        mine = json.loads(self._mark.read_text(encoding="utf-8"))["run"] if self._mark.is_file() else None
        owner = self.remote.held_by()
        if owner is None:
            return mine or secrets.token_hex(8)
        # a folder without checkpoints takes up the run that the store has: it may be on another machine now
        if owner.run == mine or (mine is None and owner.name == self.name and not self.store.steps()):
            return owner.run
        raise RunError("OWNER", f"these are the checkpoints of {owner}, another run", where=self.remote.shown,
                       remedy="name another save.remote, or delete what is there")  # fmt: skip

    # -- while it trains ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the store hold what the folder holds now, behind the training. One copy is in flight at a time."""
        steps = self.store.steps()
        self._spawn(steps, lambda: self._remove(s for s in self.remote.steps() if s not in steps))

    def wait(self) -> None:
        """Until the copy in flight is done: before a folder that it may be reading is deleted. Raises what went wrong,
        `RunError` SAVE; the checkpoint in the folder stands."""
        while self._thread is not None and self._thread.is_alive():
            self.ranks.beat("wait for the copy of a checkpoint")
            self._thread.join(BEAT_SECONDS)
        error, self._error, self._thread = self._error, None, None
        if error is not None:
            raise error

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps from the store: the run goes back. Before they are deleted here."""
        self.wait()
        self._same = {s for s in self._same if s <= step}
        self._first("delete checkpoints from the store", lambda: self._forget_after(step))

    def _forget_after(self, step: int) -> None:
        if self.remote.owner is not None:
            self.remote.require_owner()
            self._remove(s for s in self.remote.steps() if s > step)

    def close(self) -> None:
        """At the end of a run that raises something else already: what went wrong with the copy is a warning."""
        try:
            self.wait()
        except RunError as error:
            self.warn(str(error))

    # -- the thread ---------------------------------------------------------------------------------------------

    def _spawn(self, steps: Sequence[int], then: Callable[[], None]) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(steps, then), name="lensmith-copy", daemon=True)
        self._thread.start()

    def _work(self, steps: Sequence[int], then: Callable[[], None]) -> None:
        """Keeps what it raises, for `wait`."""
        try:
            self._bring(steps, then)
        except OtherRank as error:
            self._error = error
        except (RunError, Damaged, OSError) as error:
            where, said, remedy = self.remote.shown, str(error), "make it whole"
            if isinstance(error, RunError):
                where, said, remedy = error.where, error.message, error.remedy
            text = f"a checkpoint is in {self.store.folder}, but not in the store: {said}"
            self._error = RunError("SAVE", text, where=where, remedy=f"{remedy}; then run the same command again")
        except Exception as error:  # noqa: BLE001 a defect, raised in the training
            self._error = error

    def _bring(self, steps: Sequence[int], then: Callable[[], None]) -> None:
        ranks = self._beside
        for step in _on_first(ranks, "look what to copy", lambda: self._lacking(steps)):
            folder = self.store.path(step)
            files = read_manifest(folder)["files"]
            largest_first = sorted(files, key=lambda name: -files[name]["size"])
            mine = largest_first[ranks.rank :: ranks.size]
            ranks.together("copy a checkpoint", lambda step=step, at=folder, own=mine: self.remote.put(step, at, own))
            _on_first(ranks, "commit a checkpoint", lambda step=step, at=folder: self.remote.commit(step, at))
            self._same.add(step)
        _on_first(ranks, "delete checkpoints", then)

    def _lacking(self, steps: Sequence[int]) -> list[int]:
        """Which of them are to be copied, the newest first. What else stands in the place of these is removed."""
        if self.remote.owner is None:
            self._claim_late()
        self.remote.require_owner()
        if self.remote.owner is not None:
            self._keep(self.remote.owner.run)  # the run folder may have been deleted under the run
        lacking = [
            step for step in sorted(set(steps) - self._same, reverse=True)
            if step in self.remote.damaged
            or self.remote.manifest(step) != (self.store.path(step) / MANIFEST).read_bytes()
        ]  # fmt: skip
        self._same |= set(steps) - set(lacking)
        self._remove(lacking)
        return lacking

    def _claim_late(self) -> None:
        """The store did not answer at the start."""
        self._run()
        if later := [s for s in self.remote.steps() if s > self._from]:
            text = f"it did not answer when this run went on from {self._from}, and has a later checkpoint, {later[-1]}"
            raise RunError("OWNER", text, where=self.remote.shown, remedy="see that it answers")
        self._claim()

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.remote.remove(step)

    # -- ranks --------------------------------------------------------------------------------------------------

    def _first(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` gives on the first rank. However long it takes, no rank is silent for long."""
        if not self.ranks.several:
            return work()
        done: list[tuple[Any, Exception | None]] = []
        if self.ranks.is_main:
            threading.Thread(target=lambda: done.append(attempt(work)), daemon=True).start()
        while not self.ranks.broadcast_json(bool(done), what):
            time.sleep(POLL_SECONDS)
        found, error = done[0] if done else (None, None)
        self.ranks.all_well(error, what)
        return self.ranks.broadcast_json(found, what)


def _on_first(ranks: Ranks, what: str, work: Callable[[], Any]) -> Any:
    """What `work` gives on the first rank."""
    found, error = attempt(work) if ranks.is_main else (None, None)
    ranks.all_well(error, what)
    return ranks.broadcast_json(found, what)
