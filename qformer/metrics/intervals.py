"""Confidence intervals by bootstrap: of a score, of a score that is the mean of several parts, of a difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

DRAWS = 10_000
CHUNK = 500  # draws at a time, so that memory stays small
ROUNDED = 12  # digits of a sum, which should not depend on the order of its parts
Part = tuple[float, "Sequence[float]", "Sequence[Hashable]"]  # weight, scores of its questions, group of each


def paired_interval(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap the mean of `first` minus that of `second`, drawing whole groups with replacement.

    Questions about one photo stand or fall together, so photos are drawn, not questions.

    Args:
        first, second: scores of the two models for the same n questions.
        groups: the photo of each question.

    Returns:
        The lower and upper end of the percentile interval.

    Raises:
        ValueError: no questions, or arguments of different lengths.
    """
    if not len(first) or not len(first) == len(second) == len(groups):
        raise ValueError(f"got {len(first)} and {len(second)} scores for {len(groups)} groups; give as many of each")
    return weighted_interval([(1.0, np.subtract(first, second).tolist(), groups)], level, seed)


def weighted_interval(parts: Sequence[Part], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap a weighted sum of the means of several parts, drawing whole groups with replacement in each part.

    A plain mean is one part of weight 1; the mean of two tasks is two parts of weight 0.5, each with its own draws.

    Returns:
        The lower and upper end of the percentile interval.

    Raises:
        ValueError: no parts, a part without scores, or with another number of groups than of scores.
    """
    if not parts:
        raise ValueError("got no parts of a score; give at least one")
    rng = np.random.default_rng(seed)
    drawn = sum((weight * draw_means(scores, groups, rng) for weight, scores, groups in parts), np.zeros(DRAWS))
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
