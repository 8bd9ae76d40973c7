"""Orders of samples: exact permutations, read in pieces, and statistically what a shuffle should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.data.shuffle import BLOCK, FULL, ROUNDS, WINDOW, Bijection, Shuffle


def small(n: int, seed: int = 0, epoch: int = 0, source: int = 0, block: int = 8, window: int = 4) -> Shuffle:
    """In blocks although it has few samples."""
    return Shuffle(n, seed, epoch, source, full=0, block=block, window=window)


def whole(shuffle: Shuffle) -> np.ndarray:
    return shuffle.take(0, shuffle.num_items)


# -- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 50, 1009, FULL])
def test_up_to_full_it_is_philox_with_seed_and_epoch(n: int) -> None:
    """The orders of every run so far."""
    for seed, epoch in ((0, 0), (3, 2), (2**63 - 1, 1)):
        expected = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
        assert np.array_equal(whole(Shuffle(n, seed, epoch)), expected)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 32, 33, 39, 40, 41, 97, 255, 256, 257, 263, 264, 265, 1009])
def test_a_permutation_around_borders_of_blocks_and_windows(n: int) -> None:
    for seed in range(20):  # the short block comes to stand everywhere
        assert np.array_equal(np.sort(whole(small(n, seed))), np.arange(n))


def test_a_permutation_just_above_full() -> None:
    for n in (FULL + 1, FULL + BLOCK - 1, FULL + BLOCK, FULL + BLOCK + 1, 1_299_709):
        assert np.array_equal(np.sort(whole(Shuffle(n, 5, 1))), np.arange(n))


@given(
    st.integers(1, 600), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**63 - 1), st.integers(0, 99), st.data()
)
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_whole(n: int, block: int, window: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = whole(small(n, seed, epoch, 2, block, window))
    assert np.array_equal(np.sort(order), np.arange(n))
    walked = small(n, seed, epoch, 2, block, window)
    for _ in range(4):
        begin = data.draw(st.integers(0, n))
        end = data.draw(st.integers(begin, n))
        assert np.array_equal(walked.take(begin, end), order[begin:end])
    assert len(walked._windows) <= 2


@given(st.integers(1, 70), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_window_is_whole_blocks_and_windows_are_even(num_blocks: int, window: int) -> None:
    n = num_blocks * 8 - 3
    order, num_windows = whole(small(n, 1, window=window)), -(-num_blocks // window)
    begin, seen = 0, []
    for w in range(num_windows):
        blocks = (w + 1) * num_blocks // num_windows - w * num_blocks // num_windows
        assert window / 2 <= blocks <= window or num_blocks < window
        size = blocks * 8
        if len(set((order[begin : begin + size] // 8).tolist())) > blocks:  # the short block is here
            size -= 3
        taken = order[begin : begin + size]
        assert len(set((taken // 8).tolist())) == blocks
        seen.append(taken)
        begin += size
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(n))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 97, 1024, 1025, 1031, 65_537])
def test_the_order_of_blocks_is_a_bijection_with_its_inverse(size: int) -> None:
    for seed in range(3):
        order = Bijection(size, np.random.Philox(key=[seed, 0]).random_raw(ROUNDS))
        members = np.arange(size)
        assert np.array_equal(np.sort(order(members)), members)
        assert np.array_equal(order.inverse(order(members)), members)
        assert order(members[size // 2 :]).tolist() == order(members)[size // 2 :].tolist()


def test_another_seed_epoch_or_source_is_another_order() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)]
    for made in (lambda *k: whole(Shuffle(100, *k)), lambda *k: whole(small(100, *k))):
        orders = [made(*k).tolist() for k in keys]
        assert len({tuple(o) for o in orders}) == len(keys)
        for other in orders[1:]:  # two shuffles of 100 agree in one place on average (Poisson): P(> 8) = 1e-6
            assert sum(a == b for a, b in zip(orders[0], other, strict=True)) <= 8


def test_a_thousand_million_samples() -> None:
    """The orders of large sources are kept as they are: what a resumed run trains next depends on them."""
    shuffle = Shuffle(10**9, 0, 0)
    assert shuffle.take(0, 4).tolist() == BILLION_FIRST
    assert shuffle.take(10**9 - 4, 10**9).tolist() == BILLION_LAST
    kept = sum(order.nbytes + blocks.nbytes for _, blocks, order in shuffle._windows.values())
    assert len(shuffle._windows) == 2 and kept <= 2 * (WINDOW * BLOCK * 4 + WINDOW * 8)


BILLION_FIRST = [230745290, 968389838, 942236335, 12609379]
BILLION_LAST = [605067298, 922071361, 357312359, 605067709]


# -- statistical ----------------------------------------------------------------------------------------------------
# Fixed seeds: these do not vary. Thresholds are the quantiles that a sound shuffle passes in all but 1 of 100,000.

SEEDS = 1000
BINS = 12


def chi_square_limit(degrees: int, z: float = 4.27) -> float:
    """The 1 - 1e-5 quantile (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(found: np.ndarray, size: int) -> float:
    """Of independent values in [0, size) against equal chances."""
    edges = np.arange(BINS + 1) * size // BINS
    expected = len(found) * np.diff(edges) / size
    counts = np.histogram(found, bins=[*edges[:-1], size - 0.5])[0]
    return float(((counts - expected) ** 2 / expected).sum())


N = 8 * 97 + 3  # 98 blocks in 7 windows of 14, the last block short
PLACES = (0, 1, 7, 8, 100, 400, 775, 776, 778)


def orders(make: Callable[[int], np.ndarray]) -> np.ndarray:
    return np.stack([make(seed) for seed in range(SEEDS)])


def test_every_item_comes_anywhere_and_anything_comes_to_every_place() -> None:
    """Over seeds, for single items and single places: those of one seed depend on each other."""
    blocked = orders(lambda seed: whole(small(N, seed, window=16)))
    full = orders(lambda seed: whole(Shuffle(N, seed, 0)))
    limit = chi_square_limit(BINS - 1)
    for found in (blocked, full):
        where = np.argsort(found, axis=1)
        for place in PLACES:
            assert chi_square(where[:, place], N) < limit, f"the places of item {place}"
            assert chi_square(found[:, place], N) < limit, f"the items at place {place}"
    stuck = np.where(np.arange(SEEDS) % 5 == 0, 0, blocked[:, 0])  # the test sees one in five that stays at home
    assert chi_square(stuck, N) > limit


def test_the_order_of_blocks_is_uniform() -> None:
    """As many blocks as the smallest source in blocks has; two blocks together as well: their difference."""
    size = FULL // BLOCK + 1
    asked = np.array([0, 1, 2, 500, 1023, 1024])
    found = orders(lambda seed: Bijection(size, np.random.Philox(key=[seed, 9]).random_raw(ROUNDS))(asked))
    limit = chi_square_limit(BINS - 1)
    for column in range(len(asked)):
        assert chi_square(found[:, column], size) < limit
        apart = (found[:, column] - found[:, column - 1]) % size - 1  # 1 to size - 1
        assert chi_square(apart, size - 1) < limit


def test_neighbours_of_one_block() -> None:
    """B samples a block, c blocks a window: a window has cB - 1 pairs of neighbours, each of one block with probability
    (B - 1) / (cB - 1), so B - 1 of them. 400 blocks of 32 in 25 windows of 16: 25 * 31 = 775 of 12,799 pairs, 6.06 %;
    a full shuffle has 31."""
    seeds, expected = 20, 775
    same = sum(
        int((np.diff(whole(small(400 * 32, seed, block=32, window=16)) // 32) == 0).sum()) for seed in range(seeds)
    )
    assert abs(same - seeds * expected) < 4 * math.sqrt(seeds * expected)  # about Poisson


def test_distances_between_neighbours_of_two_blocks_are_those_of_a_full_shuffle() -> None:
    """n - d pairs have the distance d; m * (B - d) of them (d < B) are of one block. One pair per window: a window's
    pairs share its few blocks and so are not independent."""
    block, num_blocks = 32, 400
    n = block * num_blocks
    distance = np.arange(1, n)
    pairs = n - distance - num_blocks * np.maximum(0, block - distance)
    firsts = np.arange(25) * 16 * block
    found = []
    for seed in range(300):
        order = whole(small(n, seed, block=block, window=16))
        a, b = order[firsts], order[firsts + 1]
        found.append(np.abs(a - b)[a // block != b // block])
    together = np.concatenate(found)
    edges = np.searchsorted(np.cumsum(pairs) / pairs.sum(), np.arange(1, 20) / 20) + 1  # 20 bins, about as likely
    bins = np.concatenate([[0], edges, [n]])
    expected = np.array([pairs[(distance > a) & (distance <= b)].sum() for a, b in pairwise(bins)])
    expected = expected / pairs.sum() * len(together)
    counts = np.bincount(np.searchsorted(bins, together) - 1, minlength=20)
    assert len(counts) == 20 and counts.sum() == len(together)
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(19)


def test_total_variation_of_neighbour_distances_at_full_size() -> None:
    """2^21 samples: 2,048 blocks, 8 windows of 256. Distances below a block against the others differ by
    8 * 1023 / (2^21 - 1) of one block less that of a full shuffle, 1023 / (2^21 - 1): 0.39 - 0.05 = 0.34 %."""
    n = 1 << 21
    order = whole(Shuffle(n, 11, 0))
    near = float((np.abs(np.diff(order)) < BLOCK).mean())
    full = sum(n - d for d in range(1, BLOCK)) / (n * (n - 1) / 2)  # all pairs this near, of one block or of two
    of_one_block = (BLOCK - 1) / (n - 1)
    expected = full + (8 - 1) * of_one_block * (1 - full)
    assert abs(near - expected) < 4 * math.sqrt(expected / n)
    assert 0.0030 < near - full < 0.0038
