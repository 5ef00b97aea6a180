"""Paired differences of two systems over seeds and questions, and shares, with intervals that draw images and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean in 0..1 with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference in -1..1, with an interval corrected for the number of comparisons.

    Attributes:
        smallest: true difference that would have been seen with 80 % power.
        p: two-sided, of this comparison alone; `holm` corrects those of a family.
    """

    mean: float
    low: float
    high: float
    smallest: float
    p: float


def paired_difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    clusters: np.ndarray,
    comparisons: int = 1,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """The mean of `ours` minus that of `theirs`, float[S, Q] each; `clusters`, long[Q], is the image of a question."""
    raise NotImplementedError


def share_interval(scores: np.ndarray, clusters: np.ndarray, draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean of scores, float[S, Q], with its 95 % interval."""
    raise NotImplementedError


def holm(values: Sequence[float]) -> list[float]:
    """Correct the p values of a family of comparisons (Holm 1979)."""
    raise NotImplementedError
