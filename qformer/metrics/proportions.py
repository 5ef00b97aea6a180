"""Intervals without draws: of shares, of differences of shares and of means, and of correlations."""

from __future__ import annotations

from math import atanh, isfinite, nan, sqrt, tanh
from typing import TYPE_CHECKING

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

Z = 1.96  # for 95 %
FEWEST = 4  # series whose correlation has an interval


def share_interval(right: float, count: int, z: float = Z) -> tuple[float, float]:
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


def count_mean(numbers: Mapping[float, int]) -> float:
    """The mean of numbers that are given by how often each came."""
    return sum(number * count for number, count in numbers.items()) / sum(numbers.values())


def mean_difference(
    first: Mapping[float, int], second: Mapping[float, int], z: float = Z
) -> tuple[float, tuple[float, float]]:
    """Mean of the first numbers minus that of the second, and its interval by their variances (Welch).

    Args:
        first, second: how often each number came.

    Raises:
        UsageError: fewer than two numbers on a side.
    """
    counts = [sum(numbers.values()) for numbers in (first, second)]
    if min(counts) < 2:
        raise UsageError(f"got {counts[0]} and {counts[1]} numbers; a difference of means needs two or more of each")
    difference = count_mean(first) - count_mean(second)
    half = z * sqrt(sum(_variance(numbers) / count for numbers, count in zip((first, second), counts, strict=True)))
    return difference, (difference - half, difference + half)


def _variance(numbers: Mapping[float, int]) -> float:
    mean = count_mean(numbers)
    return sum(count * (number - mean) ** 2 for number, count in numbers.items()) / (sum(numbers.values()) - 1)


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
