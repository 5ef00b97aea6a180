"""Paired differences and shares: other software, hand-computed cases, clusters, seeds, order, 0 % and 100 %."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qformer.metrics.paired import holm, paired_difference, share_interval

Answers = tuple[np.ndarray, np.ndarray, np.ndarray]


def answers() -> Answers:
    """Answers of one seed of two systems to three questions about each of 200 images, without random numbers."""
    number = np.arange(600)
    images = number // 3
    ours, theirs = (images * 7919 + number % 3 * 5) % 101 < 62, (number * 104729) % 103 < 55
    return ours[None].astype(float), theirs[None].astype(float), images


def made(seeds: int, spread: float, images: int = 200, seed: int = 0) -> Answers:
    """Answers to two questions about each image by systems whose seeds differ by `spread`."""
    rng = np.random.default_rng(seed)
    chances = [0.5 + spread * rng.standard_normal((seeds, 1)) for _ in range(2)]
    ours, theirs = ((rng.random((seeds, 2 * images)) < chance).astype(float) for chance in chances)
    return ours, theirs, np.arange(2 * images) // 2


def test_one_seed_is_what_scipy_and_statsmodels_compute() -> None:
    """On `answers()`.

    scipy 1.17.1: `bootstrap` of the means of images, percentile, 20,000 draws; statsmodels 0.15.0: `OLS` of the
    differences on a constant with `cov_type="cluster"`.
    """
    found = paired_difference(*answers())
    assert found.mean == pytest.approx(0.0783333)
    assert (found.low, found.high) == pytest.approx((0.0066667, 0.15), abs=0.004)
    assert (found.low, found.high) == pytest.approx((0.0064400, 0.1502267), abs=0.004)
    assert found.p == pytest.approx(0.0327176, abs=0.01)
    assert found.smallest == pytest.approx((1.96 + 0.8416) * 0.0366809, rel=0.04)
    corrected = paired_difference(*answers(), comparisons=10)
    assert (corrected.low, corrected.high) == pytest.approx((-0.0246313, 0.1812980), abs=0.006)
    assert (corrected.mean, corrected.p) == (found.mean, pytest.approx(found.p, abs=0.01))


def test_shares_and_corrected_p_values_are_those_of_statsmodels() -> None:
    """Of 0.15.0: `proportion_confint` with `method="wilson"` and `multipletests` with `method="holm"`."""
    right = (np.arange(200) < 60).astype(float)[None]
    found = share_interval(right, np.arange(200))
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.2407474, 0.3667907), abs=0.004)
    none = share_interval(0 * right, np.arange(200))
    assert (none.low, none.high) == pytest.approx((0, 0.0188453), abs=1e-6)
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])


def test_spread_of_seeds_by_hand() -> None:
    """Two seeds 0 and 1 of one system on a single question, another without seeds that differ.

    With one image there is no chance to be taken off: a variance of 0.5 / 2 by the seeds, and half an image of 1 and of
    -1 beside the one that was seen, a variance of 0.5 * 1. Student's t with two degrees of freedom has no variance, so
    quantiles are compared: 90 % of it lie within 2.92.
    """
    ours, theirs = np.array([[0.0], [1.0]]), np.array([[0.0], [0.0]])
    found = paired_difference(ours, theirs, np.zeros(1, int), draws=40_000)
    assert found.mean == 0.5
    assert (found.low, found.high) == (-1, 1)  # nothing lies beyond
    assert 0.3 < found.p < 0.8


def test_the_order_of_questions_and_seeds_changes_nothing() -> None:
    ours, theirs, images = made(3, 0.1)
    shuffled = np.random.default_rng(1).permutation(len(images))
    turned = [1, 2, 0]
    again = paired_difference(ours[turned][:, shuffled], theirs[turned][:, shuffled], 7 - images[shuffled])
    first = paired_difference(ours, theirs, images)
    assert vars(again) == pytest.approx(vars(first), abs=1e-12)
    assert vars(share_interval(ours[:, shuffled], images[shuffled])) == pytest.approx(
        vars(share_interval(ours, images)), abs=1e-12
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_question_asked_five_times_is_worth_one(seeds: int) -> None:
    ours, theirs, images = made(seeds, 0.05)
    once = paired_difference(ours, theirs, images)
    five = paired_difference(np.repeat(ours, 5, 1), np.repeat(theirs, 5, 1), np.repeat(images, 5))
    assert (five.low, five.high) == pytest.approx((once.low, once.high), abs=0.01)
    if seeds == 1:
        apart = paired_difference(np.repeat(ours, 5, 1), np.repeat(theirs, 5, 1), np.arange(5 * len(images)))
        assert apart.high - apart.low < 0.5 * (five.high - five.low), "as five images each, they say more"
    alone, copied = (share_interval(np.repeat(ours, count, 1), np.repeat(images, count)) for count in (1, 5))
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_seeds_that_differ_widen_the_interval_and_more_of_them_narrow_it() -> None:
    def width(seeds: int, spread: float) -> float:
        found = [paired_difference(*made(seeds, spread, seed=seed), draws=1000) for seed in range(6)]
        return float(np.mean([one.high - one.low for one in found]))

    assert width(3, 0.15) > 1.5 * width(12, 0.15)
    assert width(3, 0.15) > 2 * width(3, 0.0)
    assert width(1, 0.15) < 0.5 * width(3, 0.15), "one seed cannot show how seeds differ"


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_no_and_all_answers_right(seeds: int, right: float) -> None:
    """Agreement in all images is no certainty, and nothing is NaN."""
    ours, theirs, images = np.full((seeds, 50), right), np.zeros((seeds, 50)), np.arange(50)
    found: Any
    for found in (paired_difference(ours, theirs, images), share_interval(ours, images)):
        assert np.isfinite(list(vars(found).values())).all()
        assert found.low <= found.mean == right <= found.high
        assert 0.02 < found.high - found.low < 0.15
    equal = paired_difference(ours, ours, images, comparisons=50)
    assert equal.p == 1
    assert equal.low < 0 < equal.high
    assert equal.smallest > 0.02
    assert not equal.seen


def test_comparisons_correct_the_interval_and_what_can_be_seen() -> None:
    alone, many = (paired_difference(*answers(), comparisons=count) for count in (1, 100))
    assert alone.seen
    assert not many.seen
    assert many.low < alone.low < alone.high < many.high
    assert many.smallest > alone.smallest
    assert paired_difference(*answers(), comparisons=100) == many, "the same each time"


@pytest.mark.parametrize(
    ("ours", "theirs", "clusters", "reason"),
    [
        (np.zeros((1, 2)), np.zeros((1, 3)), np.zeros(2, int), "give .seeds, questions."),
        (np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(3, int), "for 3 questions"),
        (np.zeros(2), np.zeros(2), np.zeros(2, int), "give .seeds, questions."),
        (np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(0, int), "for 0 questions"),
        (np.full((1, 2), np.nan), np.zeros((1, 2)), np.zeros(2, int), "not in 0..1"),
        (np.full((1, 2), 50.0), np.zeros((1, 2)), np.zeros(2, int), "not in 0..1"),
    ],
)
def test_scores_that_cannot_be_compared(ours: Any, theirs: Any, clusters: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        paired_difference(ours, theirs, clusters)


def test_a_family_has_at_least_one_member() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        paired_difference(*answers(), comparisons=0)
