"""Intervals without draws: of shares, of differences of shares and of means, and of correlations."""

from __future__ import annotations

from math import atanh, isfinite, nan, sqrt, tanh
from statistics import fmean, variance
from typing import TYPE_CHECKING

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

Z = 1.96  # for 95 %
FEWEST = 4  # series whose correlation has an interval


def share_interval(right: int, count: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share, 95 % by default; a bootstrap's would be empty where all or none are right."""
    middle = (right + z**2 / 2) / (count + z**2)
    half = z * sqrt(right * (count - right) / count + z**2 / 4) / (count + z**2)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_interval(first: tuple[int, int], second: tuple[int, int], z: float = Z) -> tuple[float, float]:
    """Interval of the first share minus the second, of independent counts (right, count): Newcombe 1998, method 10."""
    (p, low_p, high_p), (q, low_q, high_q) = (
        (right / count, *share_interval(right, count, z)) for right, count in (first, second)
    )
    low = p - q - sqrt((p - low_p) ** 2 + (high_q - q) ** 2)
    high = p - q + sqrt((high_p - p) ** 2 + (q - low_q) ** 2)
    return max(-1.0, low), min(1.0, high)


def mean_difference(first: Sequence[float], second: Sequence[float], z: float = Z) -> tuple[float, float, float]:
    """Mean of the first numbers minus that of the second, and the ends of its interval by their variances (Welch).

    Raises:
        UsageError: fewer than two numbers on a side.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError(f"got {len(first)} and {len(second)} numbers; a difference of means needs two or more of each")
    difference = fmean(first) - fmean(second)
    half = z * sqrt(variance(first) / len(first) + variance(second) / len(second))
    return difference, difference - half, difference + half


def correlation_interval(correlation: float, count: int, z: float = Z) -> tuple[float, float]:
    """Interval of Pearson's coefficient of so many pairs of numbers, by Fisher's transformation; NaN where it has none.

    Nine patterns give a wide one: 0.8 is 0.29 to 0.96.
    """
    if count < FEWEST or not isfinite(correlation):
        return nan, nan
    if abs(correlation) >= 1:
        return correlation, correlation
    half = z / sqrt(count - 3)
    return tanh(atanh(correlation) - half), tanh(atanh(correlation) + half)
