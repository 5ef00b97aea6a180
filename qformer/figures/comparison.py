"""Figures of a comparison: accuracy by cost, curves, paired differences, skills by system; each a PIL image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    from qformer.metrics.paired import Difference, Interval

    Curve = Sequence[tuple[int, float]]  # (step, value)


def by_cost(systems: Mapping[str, tuple[float, Interval]], axis: str) -> Image.Image:
    """Accuracy against a cost: for each system (cost, accuracy with its interval); `axis` names the cost."""
    raise NotImplementedError


def curves(systems: Mapping[str, Sequence[Curve]], axis: str) -> Image.Image:
    """A line for each system, the mean of the curves of its seeds, in a band from the lowest to the highest."""
    raise NotImplementedError


def forest(differences: Mapping[str, Difference], reference: str) -> Image.Image:
    """Paired differences to the reference with their intervals; a band shows the smallest that would have been seen."""
    raise NotImplementedError


def skills(systems: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """Accuracy in 0..1 by skill and system as a heat map."""
    raise NotImplementedError
