"""Numbers and colors in free replies."""

from __future__ import annotations

import pytest

from qformer.evaluation.probes import padding_attack
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
        ("It isn't red, it's gray", "gray"),
        ("not red but gray", "gray"),
        ("The red rectangle has a gray left edge", "gray"),
        ("Not red.", None),
        ("The edge isn't red, green or blue; it's gray.", "gray"),
        ("It isn\u2019t red, it\u2019s gray", "gray"),
        ("not red, gray", "gray"),
        ("It is neither red nor blue.", None),
        ("Neither red, green, nor blue but gray", "gray"),
        ("It's not red, green, blue; it's gray", "gray"),
        ("gray instead of red", "gray"),
        ("Instead of red, gray", "gray"),
        ("There is no red at the edge, which has gray", "gray"),
        ("It is no longer red", None),
        ("Red? No, gray.", "gray"),
        ("Is it red? No. It's gray", "gray"),
        ("Red isn't the color. Gray.", "gray"),
        ("It's red, isn't it?", "red"),
        ("It is red isn't it", "red"),
        ("I'm not sure it is red", "red"),
        ("I am not sure, red", "red"),
        ("I'm not sure but it looks red", "red"),
        ("There is no doubt it is red", "red"),
        ("I don't think the edge is red; gray", "gray"),
        ("It doesn't appear to be red.", None),
        ("It is not dark red or light blue", None),
        ("not a red edge, a gray one", "gray"),
        ("red", "red"),
        ("It's red", "red"),
        ("It is a red rectangle.", "red"),
        ("there is a red rectangle", "red"),
        ("The rectangle is red and the edge is gray", "gray"),
        ("Gray; the rectangle in the middle is red.", "gray"),
        ("That's gray, the rectangle is red", "gray"),
        ("The left edge? It's gray. The rectangle is red.", "gray"),
        ("The edge of the image is gray; red is only in the middle.", "gray"),
        ("The area left of the rectangle is gray", "gray"),
        ("The red rectangle's left edge is gray", "gray"),
        ("The rectangle's red side is gray", "gray"),
        ("The edge of the red rectangle is red", "red"),
        ("It is nothing but red", "red"),
        ("It can't be anything but red", "red"),
        ("The red rectangle is surrounded by gray; the left edge is gray.", "gray"),
        ("There is a red rectangle in the middle and the edge has gray", "gray"),
        ("The edge that does not touch the red rectangle is gray", "gray"),
        ("It's gray, not red.", "gray"),
        ("a small red box on gray", "gray"),
        ("It is red, no doubt", "red"),
        ("It is red, not gray or green", "red"),
        ("not only red", "red"),
        ("The left edge isn't gray, it is red", "red"),
        ("bored", None),
        ("", None),
    ],
)
def test_colors(reply: str, color: str | None) -> None:
    assert parse_color(reply) == color


def test_a_denial_names_no_rectangle() -> None:
    """Who sees the gray and denies each color is not taken in by padding."""
    reply = "The edge isn't red, green or blue; it's gray."
    shares = padding_attack(lambda images, questions: [reply] * len(questions), repeats=1, side=64)
    assert {share for sides in shares.values() for share in sides.values()} == {0.0}
