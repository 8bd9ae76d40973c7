"""The plan: hand-derived step counts, then what must hold for every rule, length and seed."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.data.plan import Plan

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
