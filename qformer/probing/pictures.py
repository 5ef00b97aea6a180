"""Pictures of the probes: objects and circles to count, rectangles in the middle of a ground.

They are exact: one color a thing, no soft edges, so that whoever reads the pixels is never wrong. Lengths of things
follow the side of the picture; a model with small tiles is asked about small pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from qformer.scenes.scenes import OUTLINES, RGB
from qformer.types import UsageError

if TYPE_CHECKING:
    import random

#: Answers to B questions, each about its own picture.
Ask = Callable[[list[Image.Image], list[str]], list[str]]
Color = tuple[int, int, int]

COLORS, SHAPES = ("red", "green", "white"), ("circle", "triangle", "square")
GROUND: Color = (110, 110, 110)  # behind objects: a gray as in the drawn worlds
SLIMMEST = 6  # pixels of an object


def draw_objects(side: int, objects: int, rng: random.Random) -> Image.Image:
    """A square with objects that touch neither one another nor its edges; different ones as far as there are."""
    lanes = ceil(sqrt(objects))
    pitch = side // lanes
    if floor(0.4 * pitch) < SLIMMEST:
        raise UsageError(
            f"{objects} objects in {side} x {side} pixels would be too small; give fewer, or a larger side"
        )
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    chosen = rng.sample(kinds, objects) if objects <= len(kinds) else rng.choices(kinds, k=objects)
    picture = Image.new("RGB", (side, side), GROUND)
    pen = ImageDraw.Draw(picture)
    for place, (color, shape) in zip(rng.sample(range(lanes * lanes), objects), chosen, strict=True):
        length = rng.randint(floor(0.4 * pitch), floor(0.7 * pitch))
        corner = [lane * pitch + rng.randint(1, pitch - length - 1) for lane in (place % lanes, place // lanes)]
        _draw(pen, shape, RGB[color], corner, length)
    return picture


def _draw(pen: ImageDraw.ImageDraw, shape: str, color: Color, corner: Sequence[int], length: int) -> None:
    """Draw a shape into the square of that corner and side, with hard edges."""
    x, y = corner
    pen.polygon([(x + round((length - 1) * u), y + round((length - 1) * v)) for u, v in OUTLINES[shape]], fill=color)


def draw_circles(size: int, rng: random.Random) -> Image.Image:
    """A square with nine circles of one color and radius, three in each of three rows."""
    color, share = rng.choice(COLORS), rng.uniform(0.45, 0.75)
    picture = Image.new("RGB", (size, size), GROUND)
    pen = ImageDraw.Draw(picture)
    length = max(round(share * size / 3), SLIMMEST)
    for place in range(9):
        corner = [round((2 * lane + 1) * size / 6 - length / 2) for lane in (place % 3, place // 3)]
        _draw(pen, "circle", RGB[color], corner, length)
    return picture


def rectangle_size(side: int, aspect: tuple[int, int], long: float) -> tuple[int, int]:
    """Width and height of a rectangle whose longer side is `long`.

    Raises:
        UsageError: it is too thin to see.
    """
    width, height = (round(long * part / max(aspect)) for part in aspect)
    if min(width, height) < SLIMMEST / 2:
        raise UsageError(f"a rectangle of {width} x {height} pixels is too thin to see; give a larger side than {side}")
    return width, height


def draw_rectangle(side: int, size: tuple[int, int], color: str, ground: Color) -> Image.Image:
    """A square that is all `ground` but for a rectangle in its middle."""
    width, height = size
    picture = Image.new("RGB", (side, side), tuple(ground))
    picture.paste(RGB[color], ((side - width) // 2, (side - height) // 2, (side + width) // 2, (side + height) // 2))
    return picture


def require_numbers(**numbers: int) -> None:
    """Refuse numbers that are not whole, or below 1. Raises UsageError: one is."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise UsageError(f"{name} is {number}; give a whole number of 1 or more")


def ask_all(ask: Ask, pictures: list[Image.Image], questions: list[str]) -> list[str]:
    """Replies as texts, one for each question.

    Raises:
        UsageError: too few or too many came.
    """
    told = [str(reply) for reply in ask(pictures, questions)]
    if len(told) != len(questions):
        raise UsageError(f"{len(questions)} questions were asked and {len(told)} answers came; give one for each")
    return told
