"""Confidence intervals of differences between two models on the same questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

DRAWS = 10_000


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
    places: dict[Hashable, int] = {}
    own = np.array([places.setdefault(group, len(places)) for group in groups])
    sums = np.bincount(own, np.asarray(first, float) - np.asarray(second, float))
    sizes = np.bincount(own)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), DRAWS)
    low, high = np.quantile(counts @ sums / (counts @ sizes), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
