"""The interval of a paired difference: wide where photos decide, narrow where questions do, the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from qformer.metrics.intervals import paired_interval


def test_the_interval_of_independent_questions_is_that_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.random((2, 2000)) < [[0.6], [0.4]]).astype(float)
    low, high = paired_interval(list(first), list(second), range(2000))
    middle, half = np.mean(first - second), 1.96 * np.std(first - second) / np.sqrt(2000)
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.003)


def test_questions_about_one_photo_count_once() -> None:
    rng = np.random.default_rng(1)
    right = (rng.random(100) < 0.5).astype(float)
    alone = paired_interval(list(right), [0.0] * 100, range(100))
    copied = paired_interval(list(np.repeat(right, 5)), [0.0] * 500, [n // 5 for n in range(500)])
    assert copied == pytest.approx(alone, abs=0.02)


def test_equal_models_differ_by_nothing() -> None:
    assert paired_interval([1, 0, 1], [1, 0, 1], "abc") == (0, 0)


def test_photos_that_all_differ_alike_are_no_certainty() -> None:
    assert paired_interval([1.0], [0.0], "x") == (-1.0, 1.0)
    low, high = paired_interval([1.0] * 50, [0.0] * 50, range(50))
    assert 0.85 < low < high == 1.0


@pytest.mark.parametrize("given", [([], [], []), ([1.0], [1.0, 0.0], "ab"), ([1.0], [1.0], "ab")])
def test_what_does_not_pair_up(given: tuple[list[float], list[float], str]) -> None:
    with pytest.raises(ValueError, match="as many of each"):
        paired_interval(*given)
