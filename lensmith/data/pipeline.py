"""Steps of packed rows, read ahead by worker processes. Order and content do not depend on the number of workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np

from lensmith.core.encoded import PackedRow
from lensmith.core.errors import Drop, RunError
from lensmith.data.collate import Member, load_compared, load_row
from lensmith.data.index import Index
from lensmith.data.load import Loader, LoaderSpec, SourceFile
from lensmith.data.placement import Limits, place
from lensmith.data.plan import Plan, Step
from lensmith.data.workers import Workers


@dataclass(slots=True)
class StepRows:
    """All micro-batches of one rank for one step, and what the whole step counts to."""

    step: Step
    rows: list[PackedRow]
    num_samples: int
    num_tokens: int
    num_supervised: float
    """Sum of loss weights over the supervised positions of all ranks."""
    wait_seconds: float = 0.0
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    cost: Cost = field(default_factory=lambda: Cost())
    index: Index | None = None
    """What the numbers of its members count in."""
    counts: dict[str, float] = field(default_factory=dict)
    """What losses are divided by: sums of loss weights over `tokens` (supervised positions), `samples`, and `chosen`
    (supervised positions of chosen answers), of the samples that were read."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step was predicted to cost, in tokens (four vision patches count as one)."""

    total: float = 0.0
    ranks: float = 1.0
    """Dearest rank over the mean."""
    rows: float = 1.0
    """Dearest micro-batch over the mean of those that hold anything, over all ranks."""


@dataclass(slots=True)
class _Row:
    """A row that workers read: its members with the pictures that were known, and `late`, those that took too long."""

    members: list[Member]
    known: dict[str, str]
    found: Future[PackedRow]
    late: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A step that workers read: its micro-batches, and the rows handed out so far."""

    step: Step
    members: list[list[Member]]
    rows: list[_Row]
    cost: Cost


SHOWN_ORIGINS = 8

Known = Callable[[Iterable[str]], dict[str, str]]
"""Of these handles, those whose features are kept, with their content keys."""


def no_picture_known(handles: Iterable[str]) -> dict[str, str]:
    return {}


_worker: dict[str, Loader] = {}


def _start_worker(spec: LoaderSpec) -> None:
    _worker["loader"] = spec.build()


def _work(members: list[Member], known: dict[str, str], files: tuple[SourceFile, ...] | None = None) -> PackedRow:
    """`files`: the window of a stream that the members belong to."""
    loader = _worker["loader"]
    if files is not None:
        loader.use(files)
    return _load(loader, members, known)


def _load(loader: Loader, members: list[Member], known: dict[str, str]) -> PackedRow:
    read = load_compared if loader.spec.mismatched else load_row
    return read(loader, members, known)


def _idle() -> None:
    pass


def start_pool(workers: int, spec: LoaderSpec) -> Workers:
    """Processes that read rows for `Pipeline`. Raises `RunError` WORKERS."""
    return Workers(workers, _start_worker, (spec,))


@dataclass
class Pipeline:
    """Iterates over steps. `known` tells which pictures need no pixels any more."""

    index: Index
    plan: Plan
    limits: Limits
    workers: int = 0
    ahead: int = 2
    known: Known = no_picture_known
    rank: int = 0
    ranks: int = 1
    pool: Workers | None = None
    """Processes of somebody else's, who ends them; None: own ones."""
    loader: Loader | None = None

    def __post_init__(self) -> None:
        self._tokens = self.index.column("tokens")
        self._patches = self.index.column("patches")
        self._sources = self.index.column("source")
        self._weights = self.index.source_weights
        self._looks = self.index.column("look")

    def rows_of(self, step: Step) -> list[list[Member]]:
        """This rank's micro-batches of a step, before they are read."""
        return self.placed(step)[0]

    def placed(self, step: Step) -> tuple[list[list[Member]], Cost]:
        m = step.members
        if not len(m):
            return [], Cost()
        tokens, patches = self._tokens[m], self._patches[m]
        if self.index.spec.mismatched:  # the row of the other answers must fit too
            answers = self.index.column("supervised")[m]
            tokens = np.maximum(tokens, tokens - answers + np.roll(answers, 1))
        costs = tokens + patches / 4.0
        # clusters show the same pictures, all of them: others' patches would count against device_patches only once
        clusters = np.where(self._looks[m] == 0, -1, self._looks[m])
        ranks = place(tokens, patches, costs, clusters, ranks=self.ranks, limits=self.limits)
        each = [[float(costs[list(row)].sum()) for row in rows if row] for rows in ranks]
        cost = Cost(float(costs.sum()), _spread([sum(c) for c in each]), _spread([c for rank in each for c in rank]))
        others: list[int | None] = [None] * len(m)
        if self.index.spec.mismatched:  # a sample's own answer is none
            others = [o if o != n else None for n, o in zip(m.tolist(), np.roll(m, 1).tolist(), strict=True)]
        return [[self.member(int(m[i]), others[i]) for i in row] for row in ranks[self.rank]], cost

    def member(self, number: int, other: int | None = None) -> Member:
        """`other`: the sample whose answer is read behind this one's prompt too; the one before it in the step."""
        source = int(self._sources[number])
        tokens = int(self._tokens[number])
        at = None if other is None else (other, self.index.ref(other))
        return Member(number, self.index.ref(number), float(self._weights[source]), tokens, source, at)

    def steps(self, start: int = 0, cursor: int | None = None) -> Iterator[StepRows]:
        """Raises `RunError` DATA_WORKER when a worker process dies, naming the samples it had."""
        return self.steps_of(self.plan.steps(start, cursor))

    def steps_of(self, plan: Iterator[Step]) -> Iterator[StepRows]:
        """The rows of any steps."""
        if self.workers == 0:
            for step in plan:
                begin = time.perf_counter()
                members, cost = self.placed(step)
                rows = [self._read(row, self._known_of(row)) for row in members]
                yield self._finish(step, rows, time.perf_counter() - begin, cost)
            return
        pool = self.pool or start_pool(self.workers, self.index.spec)
        try:
            yield from self._ahead(pool, plan)
        finally:
            if self.pool is None:
                pool.shutdown()

    def pictures(self, patches: int) -> Iterator[tuple[int, PackedRow]]:
        """(samples done, row) over all samples with pictures in index order, about `patches` patches a row: for
        encoding every picture once before training. The grouping depends on the index alone."""
        chunk: list[Member] = []
        used = done = 0
        seen: set[str] = set()
        for number in range(len(self._tokens)):
            done = number + 1
            handles = self.index.handles(number)
            if seen.issuperset(handles):
                continue
            seen.update(handles)
            chunk.append(self.member(number))
            used += int(self._patches[number])
            if used >= patches:
                yield done, self._read(chunk, self._known_of(chunk))
                chunk, used = [], 0
        if chunk:
            yield done, self._read(chunk, self._known_of(chunk))

    def _ahead(self, pool: Workers, plan: Iterator[Step]) -> Iterator[StepRows]:
        waiting: deque[_Waiting] = deque()
        try:
            for step in plan:
                members, cost = self.placed(step)
                waiting.append(_Waiting(step, members, [], cost))
                for row in members:
                    known = self._known_of(row)
                    waiting[-1].rows.append(_Row(row, known, self._hand_out(pool, row, known)))
                if len(waiting) > self.ahead:
                    yield self._collect(pool, waiting)
            while waiting:
                yield self._collect(pool, waiting)
        except BrokenProcessPool:
            raise self._worker_died(waiting) from None

    def _hand_out(self, pool: Workers, members: list[Member], known: dict[str, str]) -> Future[PackedRow]:
        return pool.submit(_work, members, known, self.index.spec.files if self.pool is not None else None)

    def _known_of(self, members: list[Member]) -> dict[str, str]:
        """The known pictures that these members show."""
        if self.known is no_picture_known:
            return {}
        return self.known([h for m in members for h in self.index.handles(m.number)])

    def _collect(self, pool: Workers, waiting: deque[_Waiting]) -> StepRows:
        begin = time.perf_counter()
        for row in waiting[0].rows:
            try:
                self._wait(row)
            except TimeoutError:
                self._without_late(pool, row, waiting)
        rows = [_with_late(row) for row in waiting[0].rows]
        done = waiting.popleft()
        return self._finish(done.step, rows, time.perf_counter() - begin, done.cost)

    def _without_late(self, pool: Workers, row: _Row, waiting: deque[_Waiting]) -> None:
        """A row took longer than one sample may: a sample hangs, or there are many. Each of them is read alone by a
        process of its own; those that take too long are dropped, and everything that was not read begins again."""
        pool.restart()
        late = [member for member in row.members if not self._in_time(member)]
        detail = Drop("DECODE_TIMEOUT", f"not read within {self.index.spec.decode_timeout:g} s")
        row.late = tuple((m.number, detail.reason, detail.detail) for m in late)
        row.members = [m for m in row.members if m not in late]
        for other in (r for w in waiting for r in w.rows):
            if other is row or not _is_read(other.found):
                other.found = self._hand_out(pool, other.members, other.known)
        try:
            self._wait(row, 1 + len(row.members))
        except TimeoutError:
            origins = ", ".join(self.index.origins([m.number for m in row.members][:SHOWN_ORIGINS]))
            remedy = "look at their disk, then run again; or raise data.decode_timeout"
            raise RunError("DATA_WORKER", f"reading these samples together never ends: {origins}",
                           remedy=remedy) from None  # fmt: skip

    def _wait(self, row: _Row, samples: int = 1) -> None:
        """Until a row is read; raises `TimeoutError` after the time that so many samples may take."""
        most = self.index.spec.decode_timeout
        row.found.result(None if most is None else samples * most)

    def _in_time(self, member: Member) -> bool:
        alone = start_pool(1, self.index.spec)
        try:
            alone.submit(_idle).result()  # until it has begun, which does not count
            alone.submit(_work, [member], {}).result(self.index.spec.decode_timeout)
        except TimeoutError:
            return False
        finally:
            alone.kill()
        return True

    def _worker_died(self, waiting: deque[_Waiting]) -> RunError:
        """Rows are handed out in order: the first unfinished ones were being read."""
        unread: list[tuple[Step, list[Member]]] = []
        for w in waiting:
            done = [_is_read(row.found) for row in w.rows]
            unread += [(w.step, row) for n, row in enumerate(w.members) if n >= len(done) or not done[n]]
        numbers = [m.number for _, row in unread[: self.workers] for m in row]
        origins = self.index.origins(numbers)
        more = f" and {len(origins) - SHOWN_ORIGINS} more" if len(origins) > SHOWN_ORIGINS else ""
        return RunError(
            "DATA_WORKER",
            f"a data worker died while it read for step {unread[0][0].number + 1 if unread else '?'}; "
            f"in flight: {', '.join(origins[:SHOWN_ORIGINS])}{more}",
            remedy="look for an out-of-memory kill; lower data.image.max_pixels or data.workers, then run again",
        )

    def _read(self, members: list[Member], known: dict[str, str]) -> PackedRow:
        if self.loader is None:
            self.loader = self.index.spec.build()
        self.loader.use(self.index.spec.files)
        return _load(self.loader, members, known)

    def reread(self, members: tuple[int, ...], others: Sequence[int] = ()) -> PackedRow:
        """A row again with all its pixels (its cached features were evicted meanwhile, or an incident is traced);
        with `others`, of each member the sample whose answer stands behind its prompt."""
        return self._read([self.member(n, o) for n, o in zip_longest(members, others)], {})

    def _finish(self, step: Step, rows: list[PackedRow], wait: float, cost: Cost) -> StepRows:
        dropped = [d for row in rows for d in row.dropped]
        members = step.members
        counts, kept = counts_of(self.index, members, {d[0] for d in dropped})
        return StepRows(
            step=step,
            rows=[r for r in rows if r.num_tokens],
            num_samples=kept,
            num_tokens=int(sum(r.num_tokens for r in rows)),
            num_supervised=counts["tokens"],
            wait_seconds=wait,
            dropped=dropped,
            cost=cost,
            index=self.index,
            counts=counts,
        )


def counts_of(index: Index, members: np.ndarray, gone: set[int]) -> tuple[dict[str, float], int]:
    """What losses over these samples, without those that are `gone`, are divided by; and how many samples are left."""
    kept = members[[n not in gone for n in members.tolist()]] if gone else members
    weights = index.source_weights[index.column("source")[kept]]
    each = {"tokens": index.column("supervised")[kept], "samples": 1.0, "chosen": index.column("chosen")[kept]}
    return {unit: float((weights * of).sum(dtype=np.float64)) for unit, of in each.items()}, len(kept)


def _is_read(found: Future[PackedRow]) -> bool:
    return found.done() and not found.cancelled() and found.exception() is None


def _with_late(row: _Row) -> PackedRow:
    found = row.found.result()
    return replace(found, dropped=found.dropped + row.late) if row.late else found


def _spread(values: list[float]) -> float:
    """Largest over mean."""
    return max(values) * len(values) / sum(values) if values and sum(values) else 1.0
