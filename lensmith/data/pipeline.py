"""Steps of packed rows, read ahead by worker processes. Order and content do not depend on the number of workers."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from lensmith.core.encoded import PackedRow
from lensmith.core.errors import RunError
from lensmith.data.collate import Member, load_row
from lensmith.data.index import Index
from lensmith.data.load import Loader, LoaderSpec
from lensmith.data.placement import Limits, place
from lensmith.data.plan import Plan, Step


@dataclass(slots=True)
class StepRows:
    """All micro-batches of one rank for one step, and what the whole step counts to."""

    step: Step
    rows: list[PackedRow]
    num_samples: int
    num_tokens: int
    num_supervised: float
    """Sum of loss weights over the supervised positions of all ranks: what the loss is divided by."""
    wait_seconds: float = 0.0
    dropped: list[tuple[int, str, str]] = field(default_factory=list)


Known = Callable[[], dict[str, str]]


def _no_picture_known() -> dict[str, str]:
    return {}


_worker: dict[str, Loader] = {}


def _start_worker(spec: LoaderSpec) -> None:
    _worker["loader"] = spec.build()


def _work(members: list[Member], known: dict[str, str]) -> PackedRow:
    return load_row(_worker["loader"], members, known)


@dataclass
class Pipeline:
    """Iterates over steps. `known` tells which pictures (by handle) need no pixels any more."""

    index: Index
    plan: Plan
    limits: Limits
    workers: int = 0
    ahead: int = 2
    known: Known = _no_picture_known
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        self._loader: Loader | None = None
        self._tokens = self.index.column("tokens")
        self._patches = self.index.column("patches")
        self._weights = self.index.weights
        self._handles = self.index.column("handles")

    def rows_of(self, step: Step) -> list[list[Member]]:
        """This rank's micro-batches of a step, before they are read."""
        m = step.members
        if not len(m):
            return []
        tokens, patches = self._tokens[m], self._patches[m]
        placed = place(
            tokens, patches, tokens + patches / 4.0, self.index.clusters[m], ranks=self.ranks, limits=self.limits
        )
        return [[self.member(int(m[i])) for i in row] for row in placed[self.rank]]

    def member(self, number: int) -> Member:
        file, ref = self.index.refs[number]
        return Member(number, file, ref, float(self._weights[number]), int(self._tokens[number]))

    def steps(self, start: int = 0, cursor: int | None = None) -> Iterator[StepRows]:
        """Raises `RunError` DATA_WORKER when a worker process dies, naming the samples it had."""
        plan = self.plan.steps(start, cursor)
        if self.workers == 0:
            for step in plan:
                begin = time.perf_counter()
                rows = [self._read(members, self.known()) for members in self.rows_of(step)]
                yield self._finish(step, rows, time.perf_counter() - begin)
            return
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_worker, initargs=(self.index.spec,))
        try:
            yield from self._ahead(pool, plan)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def pictures(self, patches: int) -> Iterator[tuple[int, PackedRow]]:
        """(samples done, row) over all samples with pictures in index order, about `patches` patches a row: for
        encoding every picture once before training. The grouping depends on the index alone."""
        chunk: list[Member] = []
        used = done = 0
        seen: set[str] = set()
        for number in range(len(self._tokens)):
            done = number + 1
            handles = self._handles[number]
            if handles is None or seen.issuperset(handles):
                continue
            seen.update(handles)
            chunk.append(self.member(number))
            used += int(self._patches[number])
            if used >= patches:
                yield done, self._read(chunk, self.known())
                chunk, used = [], 0
        if chunk:
            yield done, self._read(chunk, self.known())

    def _ahead(self, pool: ProcessPoolExecutor, plan: Iterator[Step]) -> Iterator[StepRows]:
        waiting: deque[tuple[Step, list[list[Member]], list[Future[PackedRow]]]] = deque()
        for step in plan:
            members = self.rows_of(step)
            waiting.append((step, members, [pool.submit(_work, m, self._known_of(m)) for m in members]))
            if len(waiting) > self.ahead:
                yield self._collect(*waiting.popleft())
        while waiting:
            yield self._collect(*waiting.popleft())

    def _known_of(self, members: list[Member]) -> dict[str, str]:
        """The part of the known pictures these members show (what travels to the worker)."""
        known = self.known()
        handles = [h for m in members for h in (self._handles[m.number] if self._handles[m.number] is not None else ())]
        return {h: known[h] for h in handles if h in known}

    def _collect(self, step: Step, members: list[list[Member]], futures: list[Future[PackedRow]]) -> StepRows:
        begin = time.perf_counter()
        try:
            rows = [f.result() for f in futures]
        except BrokenProcessPool:
            origins = [self.index.column("origin")[m.number] for row in members for m in row][:8]
            raise RunError(
                "DATA_WORKER",
                f"a data worker died while step {step.number} was read; in flight: {', '.join(origins)}",
                remedy="look for an out-of-memory kill; lower data.image.max_pixels or data.workers",
            ) from None
        return self._finish(step, rows, time.perf_counter() - begin)

    def _read(self, members: list[Member], known: dict[str, str]) -> PackedRow:
        if self._loader is None:
            self._loader = self.index.spec.build()
        return load_row(self._loader, members, known)

    def reread(self, members: tuple[int, ...]) -> PackedRow:
        """A row again with all its pixels (its cached features were evicted meanwhile, or an incident is traced)."""
        return self._read([self.member(n) for n in members], {})

    def _finish(self, step: Step, rows: list[PackedRow], wait: float) -> StepRows:
        dropped = [d for row in rows for d in row.dropped]
        members = step.members
        supervised = self.index.column("supervised")[members] if len(members) else np.zeros(0)
        total = float((supervised * self._weights[members]).sum()) if len(members) else 0.0
        gone = {d[0] for d in dropped}
        if gone:
            lost = [i for i, n in enumerate(members.tolist()) if n in gone]
            total -= float((supervised[lost] * self._weights[members[lost]]).sum())
        return StepRows(
            step=step,
            rows=[r for r in rows if r.num_tokens],
            num_samples=len(members) - len(gone),
            num_tokens=int(sum(r.num_tokens for r in rows)),
            num_supervised=total,
            wait_seconds=wait,
            dropped=dropped,
        )
