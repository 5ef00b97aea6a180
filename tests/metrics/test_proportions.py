"""Intervals of shares, differences and correlations, against numbers of the literature and drawn data."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest

from qformer.metrics.proportions import correlation_interval, difference_interval, mean_difference, share_interval
from qformer.types import UsageError


def test_differences_of_shares_are_newcombes() -> None:
    """Table II of Newcombe 1998: 56 of 70 and 48 of 80; 9 of 10 and 3 of 10; none of both."""
    assert difference_interval((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-3)
    assert difference_interval((9, 10), (3, 10)) == pytest.approx((0.1705, 0.8090), abs=1e-3)
    assert difference_interval((0, 10), (0, 20)) == pytest.approx((-0.1611, 0.2775), abs=1e-3)


def test_a_share_has_an_interval_even_if_all_are_right() -> None:
    assert share_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_intervals_of_means_hold_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        first, second = rng.normal(1, 1, 30), rng.normal(0.5, 2, 40)
        middle, (low, high) = mean_difference(dict.fromkeys(first.tolist(), 1), dict.fromkeys(second.tolist(), 1))
        assert middle == pytest.approx(first.mean() - second.mean())
        held += low <= 0.5 <= high
    assert 0.92 <= held / 400 <= 0.98
    with pytest.raises(UsageError, match="1 and 2 numbers"):
        mean_difference({1: 1}, {1: 1, 2: 1})


def test_numbers_may_be_given_by_how_often_they_came() -> None:
    """4, 4, 8 and 2, 2: means of 16 / 3 and 2, variances of 16 / 3 and 0."""
    middle, (low, high) = mean_difference({4: 2, 8: 1}, {2: 2})
    assert (middle, high - low) == pytest.approx((10 / 3, 2 * 1.96 * (16 / 9) ** 0.5))


def test_correlations_are_fishers() -> None:
    assert correlation_interval(0.8, 9) == pytest.approx((0.2891, 0.9558), abs=1e-3)
    assert correlation_interval(-0.8, 9) == pytest.approx((-0.9558, -0.2891), abs=1e-3)
    assert correlation_interval(1.0, 9) == (1.0, 1.0)
    assert all(isnan(end) for end in (*correlation_interval(0.5, 3), *correlation_interval(float("nan"), 9)))
