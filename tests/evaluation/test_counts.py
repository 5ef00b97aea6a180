"""Numbers and colors in free replies."""

from __future__ import annotations

import pytest

from qformer.metrics.counts import parse_color, parse_count


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        ("4", 4),
        ("Four.", 4),
        ("There are 4 objects.", 4),
        ("There are sixteen objects in the picture", 16),
        ("six", 6),
        ("**12** circles", 12),
        ("a dozen circles", 12),
        ("twenty-one", 21),
        ("forty two", 42),
        ("zero", 0),
        ("1,024 dots", 1024),
        ("4.0", 4),
        ("one", 1),
        ("In this one there are three shapes.", 3),
        ("I see 3 red and 1 white shape, for a total of 4.", 4),
        ("two circles + two squares = 4", 4),
        ("3 circles and 1 square, so four objects in total", 4),
        ("The answer is: nine", 9),
        ("a 3x3 grid, that is nine circles", 9),
        ("a 3 \u00d7 3 grid: 9", 9),
        ("Three rows of three circles, nine altogether.", 9),
        ("3 rows and 4 columns: 12 circles", 12),
        ("1. a red circle\n2. a green square\n3. a white triangle\n", 3),
        ("1) red\n2) green\nThere are two.", 2),
        ("NINE CIRCLES", 9),
        ("I count 1, 2, 3, 4.", 4),
        ("1,2,3 and 4: that makes five, no, four", 5),
        ("There are no circles.", 0),
        ("There aren't any red objects", 0),
        ("I see no squares, but 3 circles", 3),
        ("a single white object", 1),
        ("none", None),
        ("I cannot tell.", None),
        ("", None),
        ("nineteenth phone weighs often", None),
        ("3D shapes", None),
        ("9" * 5000, None),
        ("1" + ",000" * 120, None),
        ("1,234,567", 1234567),
        ("?" * 100_000 + "4", None),
    ],
)
def test_counts(reply: str, count: int | None) -> None:
    assert parse_count(reply) == count


@pytest.mark.parametrize(
    ("reply", "color"),
    [
        ("Red.", "red"),
        ("It is GREY", "gray"),
        ("a grayish tone with a red box", "gray"),
        ("The area to the left of the red rectangle is a light gray.", "gray"),
        ("It is not red; it is gray.", "gray"),
        ("The rectangle is red", "red"),
        ("bored", None),
        ("", None),
    ],
)
def test_colors(reply: str, color: str | None) -> None:
    assert parse_color(reply) == color
