"""Scores as means of units: parts of a composite, units that need all of their answers, intervals by cluster."""

from __future__ import annotations

import numpy as np
import pytest

from qformer.metrics.intervals import weighted_interval
from qformer.metrics.shares import Score, Unit, all_right


def units(values: str, part: object = None) -> list[Unit]:
    return [Unit((row,), float(value), row, part) for row, value in enumerate(values)]


def test_a_composite_weighs_its_parts_and_not_their_questions() -> None:
    """3 of 4 and 0 of 2: half of each is 0.375, where all together would be 0.5."""
    both = [*units("1110", "a"), *units("00", "b")]
    assert Score(both).mean == pytest.approx(0.375)
    assert Score(both, {"a": 0.8, "b": 0.2}).mean == pytest.approx(0.6)
    lacking = Score(both, {"a": 0.5, "c": 0.5})
    assert (lacking.mean, lacking.interval(), lacking.lacking) == (None, None, ["c"])
    assert Score([]).mean is None


def test_a_unit_is_right_if_all_of_its_answers_are() -> None:
    """Of three pairs one is right, one wrong, and one has half of its answers, which is none where two are wanted."""
    right, keys = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0], ["x", "x", "y", "y", "z", None]
    whole = all_right(right, keys, str, size=2)
    assert [(unit.rows, unit.value) for unit in whole] == [((0, 1), 1.0), ((2, 3), 0.0)]
    assert [unit.value for unit in all_right(right, keys, str)] == [1.0, 0.0, 1.0]


def test_a_group_has_the_units_that_are_wholly_in_it() -> None:
    score = Score(all_right([1.0, 1.0, 0.0], ["x", "x", "y"], str))
    assert score.within({0, 1}).mean == 1.0
    assert score.within({0, 2}).mean == 0.0


def test_the_interval_of_a_composite_is_that_of_the_normal_distribution() -> None:
    """The variance of half of each mean is a quarter of the sum of both."""
    rng = np.random.default_rng(0)
    first, second = (rng.random(600) < 0.7).astype(float), (rng.random(300) < 0.2).astype(float)
    low, high = weighted_interval([(0.5, first.tolist(), range(600)), (0.5, second.tolist(), range(300))])
    middle = (first.mean() + second.mean()) / 2
    half = 1.96 * np.sqrt(first.var() / 600 + second.var() / 300) / 2
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.004)


def test_questions_of_one_cluster_are_drawn_together() -> None:
    """Ten answers that stand or fall together tell no more than one of them."""
    rng = np.random.default_rng(1)
    right = (rng.random(80) < 0.5).astype(float)
    alone = weighted_interval([(1.0, right.tolist(), range(80))])
    together = weighted_interval([(1.0, np.repeat(right, 10).tolist(), [n // 10 for n in range(800)])])
    assert together == pytest.approx(alone, abs=0.02)
    apart = weighted_interval([(1.0, np.repeat(right, 10).tolist(), range(800))])
    assert apart[1] - apart[0] < 0.5 * (together[1] - together[0])


@pytest.mark.parametrize("parts", [[], [(1.0, [], [])], [(1.0, [1.0], [1, 2])]])
def test_what_has_no_interval(parts: list[tuple[float, list[float], list[int]]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_interval(parts)
