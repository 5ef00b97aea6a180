"""Paired differences of two systems over seeds and questions, and shares, with 95 % intervals over images and seeds.

Images are drawn with replacement, each with all its questions (a cluster bootstrap). Seeds are too few for that: what
drawing three of three gives is too narrow where seeds differ much, and too wide where they do not. So the spread
between seeds is estimated, less what chance in the answers gives by itself, and its uncertainty is that of Student's t.
docs/compare_statistics.md has the share of simulated comparisons that the intervals cover.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from qformer.metrics.intervals import DRAWS, UNSEEN, draw_means

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVEL, POWER = 0.95, 0.8
ENOUGH = 1000  # draws for each comparison of a family: 25 of them lie beyond each end of an interval


@dataclass(frozen=True)
class Interval:
    """A mean in 0..1 with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference in -1..1, with an interval that holds for all comparisons of a family together.

    Attributes:
        low, high: 95 % interval, each of m comparisons at 1 - 0.05 / m (Bonferroni), so that all of them hold their
            true differences at once with 95 %.
        smallest: true difference at which an interval of as many images and seeds excludes 0 in 80 % of cases.
        p: two-sided, of this comparison alone; `holm` corrects those of a family.
    """

    mean: float
    low: float
    high: float
    smallest: float
    p: float

    @property
    def seen(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    clusters: np.ndarray,
    comparisons: int = 1,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Compare two systems on the same questions: the mean of `ours` minus that of `theirs`.

    The interval covers what other images and other seeds would have given. With one seed it covers other images alone:
    training the same two systems again may give a difference outside of it. It never covers other data sets, towers,
    budgets or learning rates.

    Args:
        ours, theirs: scores in 0..1 of S seeds for Q questions, float[S, Q]. Rows of one seed need not belong together.
        clusters: long[Q], image of each question; questions about one image stand or fall together.
        comparisons: number of differences in the same table, for which intervals are corrected.
        draws: of the bootstrap, at least; 1,000 for each comparison.
        seed: of the draws, so that the same scores give the same interval. The order of the questions does not matter.

    Raises:
        ValueError: shapes that differ, no questions, or scores outside 0..1.
    """
    ours, theirs, clusters = _checked([ours, theirs], clusters)
    if comparisons < 1:
        raise ValueError(f"comparisons is {comparisons}; give at least 1")
    rng = np.random.default_rng(seed)
    count = max(draws, ENOUGH * comparisons)
    mean = float(ours.mean() - theirs.mean())
    images = draw_means((ours - theirs).mean(axis=0).tolist(), clusters.tolist(), rng, count, UNSEEN)
    seen = len(np.unique(clusters))
    middle = mean * seen / (seen + sum(map(abs, UNSEEN)) / 2)  # where they are by way of those that none showed
    drawn = mean + images - middle + _draw_seeds([ours, theirs], clusters, rng, count)
    low, high = np.quantile(drawn, _ends(comparisons))
    beyond = min((drawn <= 0).mean(), (drawn >= 0).mean())
    return Difference(
        mean=mean,
        low=float(max(low, -1)),
        high=float(min(high, 1)),
        smallest=float((high - low) / 2 + np.quantile(drawn - mean, POWER)),
        p=float(np.clip(2 * beyond, 1 / count, 1)),
    )


def share_interval(scores: np.ndarray, clusters: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Bring the mean of scores, float[S, Q] in 0..1, into Wilson's 95 % interval, which stays within 0..1.

    Its number of trials is the effective one: that of which a share would have as wide an interval as the scores have
    when images are drawn, with the spread of seeds, as in `paired_difference` (a design effect; Franco et al. 2019,
    Journal of Survey Statistics and Methodology 7:334). Where all scores are equal, it is the number of images.

    Args:
        clusters: long[Q], image of each question.

    Raises:
        ValueError: as of `paired_difference`.
    """
    scores, clusters = _checked([scores], clusters)
    rng = np.random.default_rng(seed)
    mean = float(scores.mean())
    images = draw_means(scores.mean(axis=0).tolist(), clusters.tolist(), rng, draws)
    low, high = np.quantile(images + _draw_seeds([scores], clusters, rng, draws), _ends(1))
    z, half = NormalDist().inv_cdf(0.5 + LEVEL / 2), (high - low) / 2
    product = mean * (1 - mean)
    trials = product * (z / half) ** 2 if min(product, half) > 1e-9 else len(np.unique(clusters))
    middle = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z / (1 + z * z / trials) * np.sqrt(product / trials + z * z / (4 * trials * trials))
    return Interval(mean, float(max(middle - reach, 0)), float(min(middle + reach, 1)))


def holm(values: Sequence[float]) -> list[float]:
    """Correct the p values of a family of comparisons (Holm 1979, Scandinavian Journal of Statistics 6:65).

    Those below 0.05 afterwards are all true with 95 %, however the comparisons depend on each other.
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min((len(values) - rank) * values[place], 1.0))
        corrected[place] = largest
    return corrected


def _ends(comparisons: int) -> list[float]:
    """Quantiles of both ends of an interval."""
    beyond = (1 - LEVEL) / 2 / comparisons
    return [beyond, 1 - beyond]


def _checked(scores: Sequence[np.ndarray], clusters: np.ndarray) -> list[np.ndarray]:
    """The scores as float[S, Q] and the clusters as numbers from 0 on, long[Q].

    Raises:
        ValueError: see `paired_difference`.
    """
    found = [np.asarray(one, dtype=float) for one in scores]
    shapes = {one.shape for one in found}
    shape = found[0].shape
    if len(shapes) > 1 or len(shape) != 2 or not found[0].size or shape[1] != len(clusters):
        raise ValueError(
            f"got scores of shapes {sorted(shapes)} for {len(clusters)} questions; give [seeds, questions]"
        )
    if not all(((one >= 0) & (one <= 1)).all() for one in found):  # NaN is neither
        raise ValueError("there are scores that are not in 0..1; give shares")
    return [*found, np.unique(np.asarray(clusters), return_inverse=True)[1]]


def _draw_seeds(
    systems: Sequence[np.ndarray], clusters: np.ndarray, rng: np.random.Generator, draws: int
) -> np.ndarray:
    """Draw how far the mean over the seeds lies from that over all seeds, float[draws]; 0 with one seed.

    The variance between seeds is pooled over the systems. What chance in single answers adds to it is taken off, as it
    is in the draws of images already: an analysis of variance with seeds and images crossed.
    """
    seeds, variance = len(systems[0]), 0.0
    for scores in systems:
        means = scores.mean(axis=1)
        if seeds > 1:
            variance += means.var(ddof=1) / seeds - _chance(scores - means[:, None], clusters)
    if variance <= 0:
        return np.zeros(draws)
    return np.sqrt(variance) * rng.standard_t(len(systems) * (seeds - 1), draws)


def _chance(rest: np.ndarray, clusters: np.ndarray) -> float:
    """Variance of a mean over S seeds by what is neither of a seed nor of an image; `rest` is float[S, Q]."""
    seeds, questions = rest.shape
    images = int(clusters.max()) + 1
    if images == 1:
        return 0.0
    sums = np.stack([np.bincount(clusters, row, images) for row in rest]) / questions  # (S, images)
    left = sums - sums.mean(axis=0)
    return float((left**2).sum() * images / (images - 1) / (seeds - 1) / seeds)
