"""Figures of a comparison: narrow enough for a phone, and drawn whatever is missing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qformer.figures import comparison
from qformer.metrics.paired import Difference, Interval

SYSTEMS = ["blip2", "llava15", "a_name_of_$one_$system/that=is,far_too_long"]


def drawn(image: Image.Image) -> float:
    """Share of the picture that is not white; its width is that of a page on a phone, twice as dense."""
    assert image.width == round(comparison.WIDTH * comparison.DPI)
    return float((np.asarray(image.convert("L")) < 250).mean())


def test_each_figure_is_drawn() -> None:
    points = {name: (36.0 * (1 + place), Interval(0.5, 0.4, 0.6)) for place, name in enumerate(SYSTEMS)}
    differences = {name: Difference(0.1, 0.05, 0.15, 0.07, 0.01) for name in SYSTEMS}
    lines = {name: [[(0, 0.1), (10, 0.5)], [(0, 0.2), (10, 0.6), (20, 0.7)]] for name in SYSTEMS}
    table = {"blip2": {"color": 0.5, "count": 1.0}, "llava15": {"color": 0.0}, "oryx": {"count": 1.0}}
    for image in (
        comparison.by_cost(points, "visual tokens"),
        comparison.curves(lines, "held-out accuracy"),
        comparison.forest(differences, "llava15"),
        comparison.skills(table),
    ):
        assert 0.02 < drawn(image) < 0.7


@pytest.mark.filterwarnings("error")
def test_what_is_missing_is_left_out() -> None:
    drawn(comparison.by_cost({"blind": (0.0, Interval(0.5, 0.4, 0.6))}, "visual tokens"))
    drawn(comparison.curves({"failed": [], "no step in common": [[(0, 0.5)], [(1, 0.5)]]}, "loss"))
    drawn(comparison.skills({"blip2": {"color": float("nan")}, "oryx": {}}))


def test_differences_that_were_seen_have_a_color() -> None:
    def colored(low: float, high: float) -> bool:
        one = Difference((low + high) / 2, low, high, 0.1, 0.5)
        pixels = np.asarray(comparison.forest({"blip2": one}, "llava15")).astype(int)
        return bool((np.ptp(pixels, axis=2) > 100).any())

    assert colored(0.05, 0.25)
    assert colored(-0.25, -0.05)
    assert not colored(-0.05, 0.25)


def test_systems_differ_by_mark_or_line_as_well_as_by_color() -> None:
    styles = [style for style, _ in zip(comparison._styles(), range(32), strict=False)]
    assert len({(style["marker"], style["linestyle"]) for style in styles}) == 32
