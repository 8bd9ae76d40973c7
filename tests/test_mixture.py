"""Mixtures: hand-derived draws first, then what must hold for all weights and caps."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.data.mixture import PERIOD, Mixture, caps_of, resolved, schedule, shares_of
from lensmith.data.options import Shares, Temperature
from lensmith.data.plan import Plan


def test_three_two_one() -> None:
    """Slots that a draw may take, of 6: a (1/2): 1-2, 3-4, 5-6; b (1/3): 1-3, 4-6; c (1/6): 1-6. Earliest end first,
    then the lower number: a; b (its end is 3, that of c 6); a; b (b and c end at 6); a (so does a); c."""
    assert schedule([3, 2, 1]).tolist() == [0, 1, 0, 1, 0, 2]
    mixture = Mixture([3, 2, 1], [None] * 3)
    sources, before = mixture.draws(0, 9)
    assert sources.tolist() == [0, 1, 0, 1, 0, 2, 0, 1, 0]
    assert before.tolist() == [0, 0, 1, 1, 2, 0, 3, 2, 4]
    assert [mixture.counts(n) for n in (0, 1, 4, 6, 9)] == [(0, 0, 0), (1, 0, 0), (2, 2, 0), (3, 2, 1), (5, 3, 1)]
    assert (mixture.source(605), mixture.count(2, 606), mixture.end) == (2, 101, None)


def test_a_source_that_is_used_up_is_left_out() -> None:
    """3:2:1, at most two of a: a b a, then 2:1 of b and c. b may take the slots 1-2 and 2-3 of three, c 1-3: b b c.
    c has its one after draw 6, and only b goes on, until its four are drawn: 2 + 4 + 1 = 7 draws."""
    mixture = Mixture([3, 2, 1], [2, 4, 1])
    assert mixture.end == 7
    sources, before = mixture.draws(0, 7)
    assert sources.tolist() == [0, 1, 0, 1, 1, 2, 1]
    assert before.tolist() == [0, 0, 1, 1, 2, 0, 3]
    assert mixture.counts(7) == (2, 4, 1)
    assert Mixture([3, 2, 1], [2, 4, None]).end is None


def test_shares_of_nothing_are_never_drawn() -> None:
    mixture = Mixture([0, 0.5, 0.25, 1], [None, None, 3, 0])
    assert mixture.weights == (0, 2, 1, 4)
    assert set(mixture.draws(0, 100)[0].tolist()) == {1, 2}
    assert mixture.counts(100) == (0, 97, 3, 0)
    with pytest.raises(AssertionError, match="nothing can be drawn"):
        Mixture([0, 1], [None, 0])


def test_resolved_weights() -> None:
    assert resolved([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert resolved([Fraction(1, 3), Fraction(2, 3), 0]) == (1, 2, 0)
    assert resolved([2, 4.0]) == (1, 2)
    # 65,537 do not fit into 65,536: the quotas are 0.99998 and 65,535.00002, and the small one keeps its 1
    assert resolved([1, 65_536]) == (1, 65_535)
    # a billionth keeps its 1 as well; 65,535 are left for 1 : 2, and 21,845 : 43,690 is exact
    assert resolved([1e-9, 1, 2]) == (1, 21_845, 43_690)
    # 7 for 0.61 : 0.22 : 0.17 = 4.27, 1.54, 1.19: floors 4 1 1, the last one for the largest remainder
    assert resolved([0.61, 0.22, 0.17], most=7) == (4, 2, 1)
    assert resolved([1, 1, 1, 1e-30], most=6) == (2, 2, 1, 1)  # equal remainders: by number


positive = st.integers(1, 50) | st.floats(1e-6, 1e3) | st.fractions(Fraction(1, 900), 30)


@given(st.lists(positive | st.just(0), min_size=1, max_size=12).filter(any), st.integers(12, 3000))
@settings(max_examples=200, deadline=None)
def test_resolved_weights_keep_proportions(shares: list[Fraction | float], most: int) -> None:
    found = resolved(shares, most)
    assert sum(found) <= most and [w > 0 for w in found] == [s > 0 for s in shares]
    assert resolved(found, most) == found
    exact = [Fraction(str(s)) for s in shares]
    forced = len([w for w in found if w])
    for w, s in zip(found, exact, strict=True):
        assert abs(Fraction(w, sum(found)) - s / sum(exact)) <= Fraction(1 + forced, most)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=14).filter(any))
@settings(max_examples=150, deadline=None)
def test_every_prefix_of_a_schedule_is_within_one(weights: list[int]) -> None:
    within_one(schedule(weights), weights)
    assert np.bincount(schedule(weights), minlength=len(weights)).tolist() == weights


@pytest.mark.parametrize("weights", [[65_535, 1], [21_845, 21_846, 21_845], [1] * 1000, [60_000, *[1] * 5536]])
def test_schedules_of_great_length(weights: list[int]) -> None:
    within_one(schedule(weights), weights)


def within_one(sources: np.ndarray, weights: Sequence[int]) -> None:
    """In integers: |count * A - n * w| < A."""
    period, n = sum(weights), np.arange(1, len(sources) + 1)
    for source, weight in list(enumerate(weights))[:20]:
        assert (np.abs(np.cumsum(sources == source) * period - n * weight) < period).all()


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    decimals = st.integers(0, 12) | st.sampled_from([0.1, 0.25, 0.7, 1.5, 2.125])
    shares = draw(st.lists(decimals, min_size=1, max_size=6).filter(any))
    caps = [draw(st.none() | st.integers(1, 300)) for _ in shares]
    return Mixture(shares, caps)


@given(mixtures())
@settings(max_examples=150, deadline=None)
def test_every_mixture(mixture: Mixture) -> None:
    """Each phase, from one exhausted source to the next, is a mixture of its own; nothing is drawn above its cap."""
    length = 2000 if mixture.end is None else mixture.end
    sources, before = mixture.draws(0, length)
    taken, begin = [0] * len(mixture.caps), 0
    for number, (source, times) in enumerate(zip(sources.tolist(), before.tolist(), strict=True)):
        assert times == taken[source]
        taken[source] += 1
        if taken[source] == mixture.caps[source] or number == length - 1:
            left = [w if taken[s] - (s == source) != c else 0 for s, (w, c) in weights_and_caps(mixture)]
            within_one(sources[begin : number + 1], left)
            begin = number + 1
    assert mixture.counts(length) == tuple(taken)
    if mixture.end is not None:
        assert taken == [c if w else 0 for _, (w, c) in weights_and_caps(mixture)]


def test_a_mixture_of_the_longest_period() -> None:
    """Weights that are no decimals, three of them capped: four phases of up to 65,536 draws a period."""
    mixture = Mixture([Fraction(1, 3), Fraction(1, 7), 1.2345678, 0.0023456], [10_000, None, 300, 20])
    assert sum(mixture.weights) == PERIOD
    sources, _ = mixture.draws(0, 200_000)
    borders = [0, *sorted(int(np.flatnonzero(sources == s)[c - 1]) + 1 for s, c in ((0, 10_000), (2, 300), (3, 20)))]
    for begin, end in pairwise([*borders, len(sources)]):
        left = [w if (sources[begin:] == s).any() else 0 for s, w in enumerate(mixture.weights)]
        within_one(sources[begin:end], left)
        assert mixture.counts(begin) == tuple(np.bincount(sources[:begin], minlength=4).tolist())


def weights_and_caps(mixture: Mixture) -> list[tuple[int, tuple[int, int | None]]]:
    return list(enumerate(zip(mixture.weights, mixture.caps, strict=True)))


@given(mixtures(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_piece_is_the_same(mixture: Mixture, data: st.DataObject) -> None:
    length = 20_000 if mixture.end is None else mixture.end
    begin = data.draw(st.integers(0, length))
    end = data.draw(st.integers(begin, min(length, begin + 500)))
    fresh = pickle.loads(pickle.dumps(Mixture(mixture.shares, mixture.caps)))  # noqa: S301
    sources, before = fresh.draws(begin, end)
    all_sources, all_before = mixture.draws(0, length)
    assert np.array_equal(sources, all_sources[begin:end]) and np.array_equal(before, all_before[begin:end])
    expected = np.bincount(all_sources[:begin], minlength=len(mixture.caps))
    assert Mixture(mixture.shares, mixture.caps).counts(begin) == tuple(expected.tolist())
    if begin < end:
        assert mixture.source(begin) == sources[0]


def test_far_along_the_stream() -> None:
    """10 : 1 with a cap of 10^9: (10^9 / 10) * 11 draws less those of the last period that follow; then only b."""
    mixture = Mixture([10, 1], [10**9, None])
    counts = mixture.counts(2 * 10**9)
    assert counts == (10**9, 10**9)
    sources, before = mixture.draws(2 * 10**9, 2 * 10**9 + 3)
    assert sources.tolist() == [1, 1, 1] and before.tolist() == [10**9, 10**9 + 1, 10**9 + 2]


# -- from options to shares -----------------------------------------------------------------------------------------


def test_shares_by_samples_and_by_tokens() -> None:
    sizes, tokens, share = [100, 50, 0], [10_000, 20_000, 0], [0.25, 0.75, 1]
    assert shares_of(Shares(), sizes, tokens, share) == [Fraction(1, 4), Fraction(3, 4), 0]
    # 100 and 400 tokens a sample: 0.25 / 100 : 0.75 / 400 = 4 : 3, and 4 * 100 : 3 * 400 tokens are 1 : 3
    by_tokens = shares_of(Shares(by="tokens"), sizes, tokens, share)
    assert resolved(by_tokens) == (4, 3, 0)


def test_shares_by_temperature() -> None:
    """100 and 10,000 samples: 1 : 100 at temperature 1, 10 : 100 at 2; twice the share counts twice."""
    sizes, tokens = [100, 10_000, 0], [1, 1, 0]
    for temperature, share, expected in ((1, 1, (1, 100, 0)), (2, 1, (1, 10, 0)), (2, 2, (1, 5, 0))):
        found = shares_of(Temperature(temperature=temperature), sizes, tokens, [share, 1, 1])
        assert resolved(found) == expected
    # 50 : 5000 at 5 is 1 : 100^(1/5) = 1 : 2.5118864, in 65,536ths 18,661.17 : 46,874.83
    found = shares_of(Temperature(temperature=5), [50, 5000], [1, 1], [1, 1])
    assert resolved(found) == (18_661, 46_875)
    # a millionth of a power: 1.0000011 : 1.0000154 is 32,767.77 : 32,768.23
    assert resolved(shares_of(Temperature(temperature=1e6), [3, 5_000_000], [1, 1], [1, 1])) == (1, 1)


def test_caps() -> None:
    sizes, epochs = [10, 10, 3, 0], [None, 1.5, 0.1, None]
    assert caps_of(Shares(), sizes, epochs) == (None, 15, 1, None)
    assert caps_of(Temperature(exhausted="leave_out"), sizes, epochs) == (10, 15, 1, 1)


def test_a_source_without_a_share_is_no_part_of_an_epoch() -> None:
    plan = Plan(num_samples=2012, seed=0, samples=4, sizes=(12, 2000), mixture=Mixture([1.0, 0.0], [None, None]))
    assert plan.num_steps() == 3 and plan.epochs_of(12) == (1.0, 0.0)
    steps = list(plan.steps())
    assert [s.epoch for s in steps] == [pytest.approx(n / 3) for n in (1, 2, 3)]
    assert sorted(m for s in steps for m in s.members.tolist()) == list(range(12))
