"""Confidence intervals by bootstrap: of a score, of a score that is the mean of several parts, of a difference.

Where all that is drawn is alike a bootstrap's would have no width, so there it is another one.
"""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from qformer.metrics.proportions import share_interval

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

DRAWS = 10_000
CHUNK = 500  # draws at a time, so that memory stays small
ROUNDED = 12  # digits of a sum, which should not depend on the order of its parts
LEAST = 1e-9  # spread of draws; below it all groups are alike, and only rounding differs
#: Differences of images that none showed, so that agreement in all of them is not taken for certainty: half an image
#: each, as Agresti and Min (2005, Statistics in Medicine 24:729) add to the cells of a table of matched pairs.
UNSEEN = (1.0, -1.0)
Part = tuple[float, "Sequence[float]", "Sequence[Hashable]"]  # weight, scores of its questions, group of each


def paired_interval(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap the mean of `first` minus that of `second`, drawing whole groups with replacement.

    Questions about one photo stand or fall together, so photos are drawn, not questions. Where the models differ, and
    equally on all photos, `UNSEEN` differences are drawn, too; models of equal scores differ by nothing.

    Args:
        first, second: scores of the two models for the same n questions, in [0, 1].
        groups: the photo of each question.

    Returns:
        The lower and upper end of the percentile interval.

    Raises:
        ValueError: no questions, or arguments of different lengths.
    """
    if not len(first) or not len(first) == len(second) == len(groups):
        raise ValueError(f"got {len(first)} and {len(second)} scores for {len(groups)} groups; give as many of each")
    differences = np.subtract(first, second)
    drawn = draw_means(differences.tolist(), groups, np.random.default_rng(seed))
    if np.ptp(drawn) < LEAST and differences.any():
        drawn = draw_means(differences.tolist(), groups, np.random.default_rng(seed), unseen=UNSEEN)
    return _ends(drawn, level)


def weighted_interval(parts: Sequence[Part], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap a weighted sum of the means of several parts, drawing whole groups with replacement in each part.

    A plain mean is one part of weight 1; the mean of two tasks is two parts of weight 0.5, each with its own draws. A
    part whose groups are all alike has no spread to draw; it has Wilson's interval of as many trials as groups, and
    distances from the mean to the ends are added as roots of sums of squares (Zou and Donner 2008, Statistics in
    Medicine 27:1693).

    Args:
        parts: scores are in [0, 1].

    Returns:
        The lower and upper end of the interval, that of percentiles where there are draws alone.

    Raises:
        ValueError: no parts, a part without scores, or with another number of groups than of scores.
    """
    if not parts:
        raise ValueError("got no parts of a score; give at least one")
    rng = np.random.default_rng(seed)
    drawn, middle, mean = np.zeros(DRAWS), 0.0, 0.0
    alike: list[tuple[float, float]] = []  # distances of the ends from the mean of a part
    for weight, scores, groups in parts:
        means = draw_means(scores, groups, rng)
        own = sum(scores) / len(scores)
        mean += weight * own
        if np.ptp(means) < LEAST:
            count = len(set(groups))
            low, high = share_interval(own * count, count, NormalDist().inv_cdf((1 + level) / 2))
            alike.append((weight * (own - low), weight * (high - own)))
        else:
            drawn += weight * means
            middle += weight * own
    low, high = _ends(drawn, level)
    if not alike:
        return low, high
    below, above = zip((middle - low, high - middle), *alike, strict=True)
    return mean - sqrt(sum(one**2 for one in below)), mean + sqrt(sum(one**2 for one in above))


def _ends(drawn: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draw_means(
    scores: Sequence[float],
    groups: Sequence[Hashable],
    rng: np.random.Generator,
    draws: int = DRAWS,
    unseen: Sequence[float] = (),
) -> np.ndarray:
    """Draw as many groups as there are with replacement, again and again: float[draws], the means of their scores.

    Groups of equal sum and size are drawn together, which is as likely and costs as much as drawing one of them.

    Args:
        unseen: scores of groups of mean size that might be there though none was seen, each half as likely as a group.

    Raises:
        ValueError: no scores, or another number of groups.
    """
    if not len(scores) or len(scores) != len(groups):
        raise ValueError(f"got {len(scores)} scores for {len(groups)} groups; give as many of each, and at least one")
    places: dict[Hashable, int] = {}
    own = np.array([places.setdefault(group, len(places)) for group in groups])
    totals = np.stack([np.bincount(own, np.asarray(scores, float)), np.bincount(own)], axis=1)
    kinds, alike = np.unique(totals.round(ROUNDED), axis=0, return_counts=True)
    size = len(scores) / len(totals)
    kinds = np.concatenate([kinds, [[size * score, size] for score in unseen]]) if unseen else kinds
    chances = np.concatenate([alike, [0.5] * len(unseen)])
    means = []
    for start in range(0, draws, CHUNK):
        counts = rng.multinomial(len(totals), chances / chances.sum(), min(CHUNK, draws - start))
        means.append((counts @ kinds[:, 0]) / (counts @ kinds[:, 1]))
    return np.concatenate(means)
