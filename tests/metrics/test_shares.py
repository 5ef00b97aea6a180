"""Scores as means of units: parts of a composite, units that need all of their answers, intervals by cluster."""

from __future__ import annotations

import numpy as np
import pytest

from qformer.metrics.intervals import weighted_interval
from qformer.metrics.proportions import share_interval
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


@pytest.mark.parametrize(("right", "groups"), [(1, 1), (50, 50), (0, 50), (50, 10)])
def test_answers_that_are_all_alike_have_wilsons_interval_of_as_many_groups(right: int, groups: int) -> None:
    questions = max(right, groups)
    scores = [float(right > 0)] * questions
    found = weighted_interval([(1.0, scores, [number % groups for number in range(questions)])])
    assert found == pytest.approx(share_interval(groups if right else 0, groups), abs=1e-5)


def test_parts_that_are_alike_widen_the_interval_of_the_others() -> None:
    """One question of each part, one right: half of Wilson's width to one side of each; then beside a part of draws."""
    low, high = share_interval(1, 1)
    found = weighted_interval([(0.5, [1.0], "a"), (0.5, [0.0], "b")])
    assert found == pytest.approx((0.5 - 0.5 * (high - low), 0.5 + 0.5 * (high - low)), abs=1e-5)
    mixed = [1.0, 0.0] * 50
    alone = weighted_interval([(0.5, mixed, range(100)), (0.5, [0.0, 1.0], "ab")])
    assert alone[0] < weighted_interval([(0.5, mixed, range(100)), (0.5, [0.5] * 100, range(100))])[0] < 0.5
    whole = weighted_interval([(0.5, mixed, range(100)), (0.5, [1.0] * 100, range(100))])
    drawn, least = weighted_interval([(1.0, mixed, range(100))]), share_interval(100, 100)[0]
    assert whole[0] == pytest.approx(0.75 - 0.5 * np.hypot(0.5 - drawn[0], 1 - least), abs=0.003)
    assert whole[1] == pytest.approx(0.75 + 0.5 * (drawn[1] - 0.5), abs=0.003)


@pytest.mark.parametrize("parts", [[], [(1.0, [], [])], [(1.0, [1.0], [1, 2])]])
def test_what_has_no_interval(parts: list[tuple[float, list[float], list[int]]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_interval(parts)
