"""Intervals, tests and corrections against hand-made cases and slow twins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise import stats


def test_interval_covers_the_mean_and_shrinks() -> None:
    draw = np.random.default_rng(0)
    few, many = draw.normal(size=(20, 1)), draw.normal(size=(2000, 1))
    low, high = stats.interval(few)
    assert low[0] < few.mean() < high[0]
    assert np.diff([*stats.interval(many)], axis=0)[0, 0] < (high - low)[0] / 5


def test_interval_of_one_row_is_unknown() -> None:
    low, high = stats.interval(np.ones((1, 3)))
    assert np.isnan(low).all() and np.isnan(high).all()


def test_interval_has_about_its_level() -> None:
    draw = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        low, high = stats.interval(draw.normal(size=(40, 1)), draws=400, seed=seed)
        inside += low[0] <= 0 <= high[0]
    assert 0.88 <= inside / 200 <= 0.99


def test_sign_flip_finds_a_shift_and_not_noise() -> None:
    draw = np.random.default_rng(0)
    assert stats.sign_flip(draw.normal(1.0, 1.0, 40)) < 0.001
    p = [stats.sign_flip(draw.normal(0.0, 1.0, 24), draws=500, seed=s) for s in range(200)]
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.1


def test_sign_flip_equals_the_full_enumeration() -> None:
    values = np.array([0.3, -0.1, 0.5, 0.2, 0.4, 0.05])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = (signs @ values >= values.sum() - 1e-12).mean()
    assert stats.sign_flip(values, draws=20_000) == pytest.approx(exact, abs=0.01)


def test_sign_flip_of_no_difference_is_one() -> None:
    assert stats.sign_flip(np.zeros(10)) == 1.0


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


@given(st.lists(st.floats(0.0001, 1.0), min_size=1, max_size=20))
def test_holm_is_never_below_p_and_keeps_the_order(p: list[float]) -> None:
    adjusted = stats.holm(p)
    assert all(a >= min(1, q) - 1e-12 and a <= 1 for a, q in zip(adjusted, p, strict=True))
    order = np.argsort(p, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= -1e-12)


def test_spearman_with_ties() -> None:
    assert stats.spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 40])) == pytest.approx(1)
    assert stats.ranks(np.array([5.0, 1, 5])).tolist() == [2.5, 1.0, 2.5]
    assert np.isnan(stats.spearman(np.ones(3), np.arange(3.0)))


def test_binomial_interval() -> None:
    low, high = stats.binomial_interval(50, 100)
    assert low == pytest.approx(0.404, abs=0.002) and high == pytest.approx(0.596, abs=0.002)
    assert np.isnan(stats.binomial_interval(0, 0)).all()


def test_sign_test_is_that_of_fair_coins() -> None:
    assert stats.sign_test(np.array([1.0, 2.0, -1.0, 3.0])) == pytest.approx(5 / 16)
    assert stats.sign_test(np.array([0.5, 0.0, 0.5, 0.0])) == pytest.approx(1 / 4)
    assert stats.sign_test(np.zeros(3)) == 1.0
    assert stats.sign_test(np.ones(30)) == pytest.approx(2.0**-30)
