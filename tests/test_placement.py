"""Placement: whatever the members, each is placed once, limits hold, and the result depends on the members alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.data.placement import Limits, place

Rows = list[list[tuple[int, ...]]]


def placed(tokens: Any, patches: Any = None, clusters: Any = None, *, ranks: int = 1, **limits: Any) -> Rows:
    t = np.asarray(tokens, np.int64)
    p = np.zeros_like(t) if patches is None else np.asarray(patches, np.int64)
    c = np.full(len(t), -1) if clusters is None else np.asarray(clusters, np.int64)
    return place(t, p, t + p / 4.0, c, ranks=ranks, limits=Limits(**limits))


def test_best_fit_by_hand() -> None:
    """Room for 10. Largest first: 7 | 6 | 4 fits only with 6 (7+4 = 11) | 3 fills 7 | 2 opens a third row."""
    assert sorted(placed([2, 3, 4, 6, 7], device_tokens=10)[0]) == [(0,), (1, 4), (2, 3)]


def test_the_fullest_row_is_taken() -> None:
    """Room for 10: rows 8 and 6 are open when the 2 comes; it fits both and goes to the 8."""
    assert sorted(placed([8, 6, 2], device_tokens=10)[0]) == [(0, 2), (1,)]


def test_without_packing_one_sample_is_a_row() -> None:
    rows = placed([5, 1, 9, 3, 3], ranks=2, packing=False, device_tokens=100)
    assert [len(r) for r in rows] == [3, 3]
    assert sorted(row for mine in rows for row in mine) == [(), (0,), (1,), (2,), (3,), (4,)]


def test_same_pictures_stay_together_while_they_fit() -> None:
    """Members 0, 2, 4 show one picture (9 tokens of 10); 1 and 3 another, but 6 + 6 do not fit one row."""
    rows = placed([3, 6, 3, 6, 3], [8, 4, 8, 4, 8], [0, 1, 0, 1, 0], device_tokens=10)
    assert sorted(rows[0]) == [(0, 2, 4), (1,), (3,)]


def test_a_shared_picture_counts_once() -> None:
    """Two members with the same 8 patches fit a row of 10 patches; with different ones they do not."""
    assert placed([1, 1], [8, 8], [5, 5], device_tokens=10, device_patches=10) == [[(0, 1)]]
    assert sorted(placed([1, 1], [8, 8], [5, 6], device_tokens=10, device_patches=10)[0]) == [(0,), (1,)]


def test_dealing_to_more_ranks_keeps_the_limits() -> None:
    """Two full rows for three ranks; the two dear members must not drive all the cheap ones into one row."""
    tokens, patches = [1, 1, 49, 49, 49, 49], [20_000, 20_000, 0, 0, 0, 0]
    rows = placed(tokens, patches, device_tokens=100, ranks=3)
    assert all(sum(tokens[i] for i in row) <= 100 for mine in rows for row in mine)
    assert [len(mine) for mine in rows] == [1, 1, 1]
    assert all(row for mine in rows for row in mine)


cases = st.integers(0, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 130), min_size=n, max_size=n),
        st.lists(st.integers(0, 300), min_size=n, max_size=n),
        st.lists(st.integers(-1, 5), min_size=n, max_size=n),
        st.integers(1, 5),
        st.sampled_from([None, 64, 200]),
        st.booleans(),
    )
)


@given(cases)
@settings(max_examples=400, deadline=None)
def test_every_placement(case: Any) -> None:
    tokens, patches, clusters, ranks, most, packing = case
    pixels = [0 if c == -1 else p for p, c in zip(patches, clusters, strict=True)]
    pixels = [
        max([q for q, d in zip(pixels, clusters, strict=True) if d == c]) for c in clusters
    ]  # same pictures, same patches
    rows = placed(tokens, pixels, clusters, ranks=ranks, device_tokens=100, device_patches=most, packing=packing)
    flat = [row for mine in rows for row in mine]
    assert sorted(i for row in flat for i in row) == list(range(len(tokens)))
    assert len(rows) == ranks and len({len(mine) for mine in rows}) == 1
    assert sum(not row for row in flat) < ranks
    for row in filter(None, flat):
        assert list(row) == sorted(row)
        assert sum(tokens[i] for i in row) <= 100 or len(row) == 1
        pictures = {clusters[i]: pixels[i] for i in row if clusters[i] != -1}
        assert most is None or sum(pictures.values()) <= most or len(pictures) == 1
        assert packing or len(row) == 1
    if len(tokens) >= ranks:  # no rank idles while another has two members
        assert sum(bool(row) for row in flat) >= ranks
    assert rows == placed(
        tokens, pixels, clusters, ranks=ranks, device_tokens=100, device_patches=most, packing=packing
    )
    one = placed(tokens, pixels, clusters, ranks=1, device_tokens=100, device_patches=most, packing=packing)
    if len(one[0]) >= ranks:  # the same rows, only dealt out
        assert sorted(row for row in flat if row) == sorted(one[0])


def lognormal(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(6.0, 0.9, n).clip(16, 8192).astype(np.int64)


def test_rows_are_full(capsys: pytest.CaptureFixture[str]) -> None:
    """512 members a step, lengths lognormal (median 403, up to 8,192), rows of 8,192 tokens: at least 97 % filled."""
    rates = []
    for seed in range(10):
        tokens = lognormal(512, seed)
        rows = placed(tokens, device_tokens=8192)[0]
        rates.append(tokens.sum() / (len(rows) * 8192))
    naive = []
    for seed in range(10):  # what the order of the stream alone gives
        used, count = 0, 1
        for t in lognormal(512, seed).tolist():
            used, count = (used + t, count) if used + t <= 8192 else (t, count + 1)
        naive.append(lognormal(512, seed).sum() / (count * 8192))
    with capsys.disabled():
        print(f"\nfill of 8,192-token rows, 512 lognormal samples a step: best fit {np.mean(rates):.2%} "
              f"(least {min(rates):.2%}), in order {np.mean(naive):.2%}")  # fmt: skip
    assert np.mean(rates) >= 0.97 and min(rates) > np.mean(naive)


def test_placing_4096_members(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = lognormal(4096, 1)
    rng = np.random.default_rng(0)
    patches = rng.integers(64, 4096, 4096)
    clusters = rng.integers(-1, 2000, 4096)
    begin = time.process_time()
    alone = placed(tokens, device_tokens=8192)
    plain = time.process_time() - begin
    begin = time.process_time()
    spread = placed(tokens, patches, clusters, device_tokens=8192, device_patches=16384, ranks=8)
    full = time.process_time() - begin
    with capsys.disabled():
        print(f"\n4,096 members placed in {plain:.3f} s, with patches, clusters and 8 ranks {full:.3f} s")
    for rows in (alone, spread):
        assert sorted(m for rank in rows for row in rank for m in row) == list(range(4096))
