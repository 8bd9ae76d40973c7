"""The plan: hand-derived step counts, then what must hold for every rule, length and seed."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.data import plan as plan_module
from lensmith.data.mixture import Mixture
from lensmith.data.plan import Plan, Step
from lensmith.data.shuffle import FULL, Shuffle

# 1,096 samples, 16 a step, 3 epochs.
# drop: 1096 // 16 = 68 whole steps an epoch, 3 x 68 = 204.  epoch_end: ceil(1096 / 16) = 69, 3 x 69 = 207.
# carry: ceil(3288 / 16) = ceil(205.5) = 206.


@pytest.mark.parametrize(("partial", "steps"), [("drop", 204), ("epoch_end", 207), ("carry", 206)])
def test_step_counts_of_the_published_run(partial: Any, steps: int) -> None:
    plan = Plan(1096, seed=3, samples=16, partial=partial, epochs=3)
    found = list(plan.steps())
    assert plan.num_steps() == len(found) == steps
    times = Counter(np.concatenate([s.members for s in found]).tolist())
    if partial == "drop":  # 8 of 1,096 are left out in each epoch
        assert sum(times.values()) == 3 * 1088
    else:
        assert times == dict.fromkeys(range(1096), 3)
    sizes = {"drop": {16}, "epoch_end": {16, 8}, "carry": {16, 8}}[partial]  # carry: only the very last step is smaller
    assert {len(s.members) for s in found} == sizes
    assert sum(len(s.members) == 8 for s in found) == {"drop": 0, "epoch_end": 3, "carry": 1}[partial]


def test_an_epoch_border_inside_a_step() -> None:
    """5 samples, 3 a step, carry: steps 0-2, 3-5, 6-8, 9; step 1 holds the last two of epoch 0 and one of epoch 1."""
    plan = Plan(5, seed=0, samples=3, partial="carry", epochs=2)
    first, second = plan.order(0).tolist(), plan.order(1).tolist()
    found = [s.members.tolist() for s in plan.steps()]
    assert found == [first[:3], [*first[3:], second[0]], second[1:4], second[4:]]
    assert [s.cursor for s in plan.steps()] == [3, 6, 9, 10]
    assert [s.epoch for s in plan.steps()] == [0.6, 1.2, 1.8, 2.0]


def test_tokens_take_the_longest_prefix() -> None:
    """In stream order 4 4 3 | 9 | 2 8 | 10: 4+4+3 = 11 > 10, so 4+4; 3 (3+9 > 10); 9 (9+2 > 10); 2+8; then 10."""
    order = Plan(7, seed=1).order(0)
    lengths = np.zeros(7, np.int64)
    lengths[order] = [4, 4, 3, 9, 2, 8, 10]
    plan = Plan(7, seed=1, samples=None, tokens=10, epochs=1, num_tokens=lengths)
    assert [lengths[s.members].tolist() for s in plan.steps()] == [[4, 4], [3], [9], [2, 8], [10]]
    assert plan.num_steps() == 5


def test_a_sample_longer_than_a_step_is_a_step() -> None:
    plan = Plan(3, seed=1, samples=None, tokens=10, epochs=1, num_tokens=np.array([50, 60, 70]))
    assert [len(s.members) for s in plan.steps()] == [1, 1, 1]


def test_one_and_a_half_epochs() -> None:
    """10 samples, 4 a step. carry: 15 -> 4. epoch_end: 4 4 2 | 4 1 -> 5. drop: 4 4 | 4 -> 3."""
    for partial, sizes in (("carry", [4, 4, 4, 3]), ("epoch_end", [4, 4, 2, 4, 1]), ("drop", [4, 4, 4])):
        plan = Plan(10, seed=0, samples=4, partial=partial, epochs=1.5)  # type: ignore[arg-type]
        assert [len(s.members) for s in plan.steps()] == sizes
        assert plan.num_steps() == len(sizes)


def test_data_smaller_than_a_step() -> None:
    """3 samples, 8 a step, 3 epochs = 9 samples: carry repeats samples within a step, epoch_end makes 3 small steps,
    drop has nothing to train, also when it would be endless."""
    sizes = {
        p: [len(s.members) for s in Plan(3, seed=0, samples=8, partial=p, epochs=3).steps()]
        for p in ("carry", "epoch_end", "drop")
    }  # type: ignore[arg-type]
    assert sizes == {"carry": [8, 1], "epoch_end": [3, 3, 3], "drop": []}
    endless = Plan(3, seed=0, samples=8, partial="drop", epochs=None, max_steps=5)
    assert endless.num_steps() == 0 == len(list(endless.steps()))


def test_a_longer_run_goes_on_where_the_shorter_one_ended() -> None:
    """1,096 x 3 ends with a step of 8; made longer, the next step takes up there and no sample is skipped."""
    short, longer = Plan(1096, seed=0, epochs=3), Plan(1096, seed=0, epochs=5)
    done = list(short.steps())
    rest = list(longer.steps(206, done[-1].cursor))
    times = Counter(np.concatenate([s.members for s in done + rest]).tolist())
    assert times == dict.fromkeys(range(1096), 5)
    assert longer.num_steps(206, done[-1].cursor) == 206 + len(rest)


def test_samples_are_excluded_from_a_step_on() -> None:
    plain = Plan(20, seed=2, samples=4, epochs=3)
    gone = Plan(20, seed=2, samples=4, epochs=3, excluded={7: 6, 11: 0})
    for a, b in zip(plain.steps(), gone.steps(), strict=True):
        keep = [m for m in a.members.tolist() if m != 11 and not (m == 7 and a.number >= 6)]
        assert b.members.tolist() == keep
        assert (a.number, a.cursor) == (b.number, b.cursor)
    seen = Counter(m for s in gone.steps() for m in s.members.tolist())
    assert (seen[7], seen[11], seen[0]) == (1, 0, 3)  # 7: epoch 0 only (steps 0 to 4)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    n = draw(st.integers(1, 40))
    epochs = draw(st.none() | st.integers(1, 4) | st.floats(0.05, 4))
    lengths = np.array(draw(st.lists(st.integers(1, 30), min_size=n, max_size=n)))
    rule: dict[str, Any] = draw(
        st.fixed_dictionaries({"samples": st.integers(1, 50)})
        | st.fixed_dictionaries({"samples": st.none(), "tokens": st.integers(1, 80), "num_tokens": st.just(lengths)})
    )
    return Plan(
        n, draw(st.integers(0, 2**63 - 1)), epochs=epochs,
        partial=draw(st.sampled_from(["carry", "epoch_end", "drop"])),
        max_steps=draw(st.integers(1, 40) if epochs is None else st.none() | st.integers(1, 40)), **rule,
    )  # fmt: skip


@given(plans())
@settings(max_examples=400, deadline=None)
def test_every_plan(plan: Plan) -> None:
    found = list(plan.steps())
    assert plan.num_steps() == len(found)
    assert [s.number for s in found] == list(range(len(found)))
    position = 0
    by_epoch: dict[int, list[int]] = {}
    for step in found:
        assert len(step.members) > 0
        begin = step.cursor - len(step.members)
        assert begin == position or (plan.partial == "drop" and begin % plan.num_samples == 0 and begin > position)
        for k, member in enumerate(step.members.tolist()):
            by_epoch.setdefault((begin + k) // plan.num_samples, []).append(member)
        position = step.cursor
    for epoch, members in by_epoch.items():  # a beginning of that epoch's permutation: nothing twice, nothing left out
        assert members == plan.order(epoch)[: len(members)].tolist()
    for epoch, following in pairwise(sorted(by_epoch)):
        assert following == epoch + 1
        assert plan.partial == "drop" or len(by_epoch[epoch]) == plan.num_samples
    if plan.end is not None and plan.max_steps is None and plan.partial != "drop":
        assert position == plan.end


@given(plans())
@settings(max_examples=200, deadline=None)
def test_the_rule_of_a_step(plan: Plan) -> None:
    """Every step is as large as its rule allows, except where an epoch or the run ends."""
    n, end = plan.num_samples, plan.end if plan.end is not None else math.inf
    for step in plan.steps():
        border = end if plan.partial == "carry" else min(end, math.ceil(step.epoch - 1e-9) * n)
        if plan.tokens is None:
            assert len(step.members) == plan.samples or (step.cursor == border and plan.partial != "drop")
            continue
        lengths = plan.num_tokens
        assert lengths is not None
        used = int(lengths[step.members].sum())
        assert used <= plan.tokens or len(step.members) == 1
        if step.cursor < border:
            following = plan.order(step.cursor // n)[step.cursor % n]
            assert used + lengths[following] > plan.tokens


@given(plans(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_resume_yields_the_rest(plan: Plan, data: st.DataObject) -> None:
    found = list(plan.steps())
    at = data.draw(st.integers(0, len(found)))
    cursor = found[at - 1].cursor if at else 0
    for rest in (list(plan.steps(at, cursor)), list(plan.steps(at))):
        assert [(s.number, s.cursor, s.members.tolist()) for s in rest] == [
            (s.number, s.cursor, s.members.tolist()) for s in found[at:]
        ]
    assert plan.num_steps(at, cursor) == len(found)


def test_members_depend_on_nothing_else() -> None:
    """Another seed gives another order; an epoch is no repetition of the one before."""
    plan, other = Plan(50, seed=0, epochs=2), Plan(50, seed=1, epochs=2)
    assert plan.order(0).tolist() != other.order(0).tolist()
    assert plan.order(0).tolist() != plan.order(1).tolist()
    assert plan.order(0).tolist() == Plan(50, seed=0, samples=3, partial="drop", epochs=9).order(0).tolist()
    # what numpy 2.4 drew: another order would change every run, and what a resumed one trains next
    assert plan.order(0)[:8].tolist() == [0, 40, 38, 31, 20, 45, 19, 44]


# -- tokens in pieces -----------------------------------------------------------------------------------------------


class WholeEpochs:
    """The walk as it was before: orders and token sums of whole epochs."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def order(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.plan.seed, epoch])).permutation(self.plan.num_samples)

    def sums(self, epoch: int) -> np.ndarray:
        assert self.plan.num_tokens is not None
        return np.concatenate([[0], np.cumsum(self.plan.num_tokens[self.order(epoch)].astype(np.int64))])

    def fill(self, position: int, limit: int | None) -> tuple[int, bool]:
        plan = self.plan
        if plan.tokens is None:
            assert plan.samples is not None
            stop = position + plan.samples
            return (stop, True) if limit is None or stop <= limit else (limit, False)
        stop, left = position, plan.tokens
        while limit is None or stop < limit:
            epoch, offset = divmod(stop, plan.num_samples)
            sums = self.sums(epoch)
            most = int(np.searchsorted(sums, sums[offset] + left, side="right")) - 1 - offset
            if limit is not None:
                most = min(most, limit - stop)
            left -= int(sums[offset + most] - sums[offset])
            stop += most
            if offset + most < plan.num_samples:
                break
        if stop == position:
            return position + 1, True
        return stop, left == 0 or limit is None or stop < limit

    def members(self, begin: int, end: int) -> np.ndarray:
        found: list[np.ndarray] = []
        while begin < end:
            epoch, offset = divmod(begin, self.plan.num_samples)
            found.append(self.order(epoch)[offset : offset + end - begin])
            begin += len(found[-1])
        return np.concatenate(found)


def flat(steps: Any) -> list[tuple[int, list[int], float, int]]:
    return [(s.number, s.members.tolist(), s.epoch, s.cursor) for s in steps]


@given(plans())
@settings(max_examples=120, deadline=None)
def test_pieces_make_the_steps_that_whole_epochs_made(plan: Plan) -> None:
    with patch.object(plan_module, "_Walk", WholeEpochs):
        expected = flat(plan.steps())
    assert flat(plan.steps()) == expected


@pytest.mark.parametrize("partial", ["carry", "epoch_end", "drop"])
@pytest.mark.parametrize(("n", "tokens"), [(700, 90), (2500, 9_000), (2500, 70_000), (20_000, 500_000)])
def test_token_steps_over_several_pieces(partial: Any, n: int, tokens: int) -> None:
    """Steps of more samples than the first pieces have, epochs of fewer and of more."""
    lengths = np.random.default_rng(n).integers(1, 60, n)
    plan = Plan(n, 5, samples=None, tokens=tokens, partial=partial, epochs=2.5, num_tokens=lengths)
    with patch.object(plan_module, "_Walk", WholeEpochs):
        expected = flat(plan.steps())
    assert flat(plan.steps()) == expected
    assert plan.num_steps() == len(expected)


def test_token_counts_may_be_a_memory_map_and_stay_on_disk(tmp_path: Path) -> None:
    n = 2 * FULL
    column = np.memmap(tmp_path / "tokens", np.int32, "w+", shape=(n,))
    column[:] = np.arange(n) % 97 + 1
    plan = Plan(n, 0, samples=None, tokens=20_000, epochs=None, max_steps=10**6, num_tokens=column)
    tracemalloc.start()
    found = [s for s, _ in zip(plan.steps(9, n // 2), range(50), strict=False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20 < n * 8  # two windows of 1 MiB, one being made, two pieces of the sums
    for step, following in pairwise(found):
        used = int(column[step.members].sum())
        assert used <= 20_000 < used + int(column[following.members[0]])


# -- mixtures and size ----------------------------------------------------------------------------------------------


def test_a_mixture_of_two() -> None:
    """2:1 of sources of 2 and 3 samples: slots 1-2 and 2-3 for a, 1-3 for b, so a; a (it comes first of two that end at
    3); b; again and again, 4 a step. Draws of a are its epochs of 2, those of b its epochs of 3; b's samples follow
    those of a, so they count from 2."""
    plan = Plan(5, seed=4, samples=4, epochs=2.4, sizes=(2, 3), mixture=Mixture([2, 1], [None, None]))
    a = [m for epoch in range(4) for m in plan.order(epoch, 0).tolist()]
    b = [2 + m for epoch in range(2) for m in plan.order(epoch, 1).tolist()]
    assert plan.end == 12 and plan.num_steps() == 3
    expected = [[a[0], a[1], b[0], a[2]], [a[3], b[1], a[4], a[5]], [b[2], a[6], a[7], b[3]]]
    assert [s.members.tolist() for s in plan.steps()] == expected
    assert [s.epoch for s in plan.steps()] == [0.8, 1.6, 2.4]
    assert [plan.drawn(s.cursor) for s in plan.steps()] == [(3, 1), (6, 2), (8, 4)]
    assert plan.epochs_of(8) == (3.0, 2 / 3)
    assert Plan(5, seed=4).drawn(8) == (8,) and Plan(5, seed=4).epochs_of(8) == (1.6,)


def test_a_mixture_that_leaves_out_trains_every_sample_once() -> None:
    plan = Plan(60, seed=0, samples=8, epochs=3, sizes=(10, 0, 50), mixture=Mixture([1, 0, 1], [10, None, 50]))
    found = list(plan.steps())
    assert plan.num_steps() == len(found) == 8  # 60 draws, though 3 epochs would be 180
    assert sorted(np.concatenate([s.members for s in found]).tolist()) == list(range(60))
    assert sorted(m for s in found for m in s.members.tolist()[: 20 - 8 * s.number] if m < 10) == list(range(10))
    assert plan.epochs_of(60) == (1.0, 0.0, 1.0)
    endless = Plan(60, seed=0, samples=8, epochs=None, max_steps=99, sizes=plan.sizes, mixture=plan.mixture)
    assert endless.num_steps() == len(list(endless.steps())) == 8


@st.composite
def mixed_plans(draw: st.DrawFn) -> Plan:
    sizes = tuple(draw(st.lists(st.integers(0, 25), min_size=1, max_size=4).filter(any)))
    shares = [draw(st.integers(1, 5)) if n else 0 for n in sizes]
    caps = [draw(st.none() | st.integers(1, 60)) for _ in sizes]
    lengths = np.array(draw(st.lists(st.integers(1, 30), min_size=sum(sizes), max_size=sum(sizes))))
    rule: dict[str, Any] = draw(
        st.fixed_dictionaries({"samples": st.integers(1, 50)})
        | st.fixed_dictionaries({"samples": st.none(), "tokens": st.integers(1, 80), "num_tokens": st.just(lengths)})
    )
    epochs = draw(st.none() | st.floats(0.1, 4))
    return Plan(
        sum(sizes), draw(st.integers(0, 2**63 - 1)), epochs=epochs, sizes=sizes, mixture=Mixture(shares, caps),
        partial=draw(st.sampled_from(["carry", "epoch_end", "drop"])),
        max_steps=30 if epochs is None else None, **rule,
    )  # fmt: skip


def stream(plan: Plan, length: int) -> list[int]:
    """Draw by draw."""
    assert plan.mixture is not None
    taken, found = [0] * len(plan.sizes), []
    for source in plan.mixture.draws(0, length)[0].tolist():
        epoch, offset = divmod(taken[source], plan.sizes[source])
        found.append(sum(plan.sizes[:source]) + int(plan.order(epoch, source)[offset]))
        taken[source] += 1
    return found


def resumed(plan: Plan, found: list[Step], at: int) -> None:
    cursor = found[at - 1].cursor if at else 0
    for rest in (plan.steps(at, cursor), plan.steps(at)):
        assert flat(rest) == flat(found[at:])
    assert plan.num_steps(at, cursor) == len(found)


@given(mixed_plans(), st.data())
@settings(max_examples=100, deadline=None)
def test_every_mixed_plan(plan: Plan, data: st.DataObject) -> None:
    found = list(pickle.loads(pickle.dumps(plan)).steps())  # noqa: S301
    assert plan.num_steps() == len(found)
    expected = stream(plan, found[-1].cursor if found else 0)
    for step in found:
        begin = step.cursor - len(step.members)
        assert step.members.tolist() == expected[begin : step.cursor]
        assert step.epoch == step.cursor / plan.num_samples
        if plan.num_tokens is not None and plan.tokens is not None:
            assert plan.num_tokens[step.members].sum() <= plan.tokens or len(step.members) == 1
    if plan.partial != "drop":
        assert [m for s in found for m in s.members.tolist()] == expected
    resumed(plan, found, data.draw(st.integers(0, len(found))))


def test_a_thousand_million_samples() -> None:
    """Steps far apart, alone and as one source among others, in the memory of two windows a source."""
    n = 10**9
    mixed = {"sizes": (n - 5000, 5000), "mixture": Mixture([3, 1], [None, 10_000])}
    for extra in ({}, mixed):
        plan = Plan(n, seed=1, samples=512, epochs=2, **extra)  # type: ignore[arg-type]
        assert plan.num_steps() == 3_906_250
        tracemalloc.start()
        for at in (0, 1_234_567, 3_906_249):
            step = next(plan.steps(at))
            assert (step.number, step.cursor, len(set(step.members.tolist()))) == (at, 512 * (at + 1), 512)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
        tracemalloc.stop()
    drawn = plan.drawn(plan.num_steps() * 512)
    assert drawn == (2 * n - 10_000, 10_000)
    assert plan.epochs_of(40_000) == (30_000 / (n - 5000), 2.0)


def test_a_source_above_full_in_a_mixture_has_its_own_order() -> None:
    n = FULL + 5
    plan = Plan(2 * n, seed=6, samples=100, sizes=(n, n), mixture=Mixture([1, 1], [None, None]))
    members = next(plan.steps(7)).members
    assert members[::2].tolist() == Shuffle(n, 6, 0, 0).take(350, 400).tolist()
    assert (members[1::2] - n).tolist() == Shuffle(n, 6, 0, 1).take(350, 400).tolist()
