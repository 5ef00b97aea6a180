"""Canvases full of objects that have nothing in common, from which an image encoder learns most in the least time.

On other canvases many objects are alike, as counting needs them, so that a picture tells an encoder little about
shapes. Here each object has a shape, a color, a size and a place of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformer.canvases.canvas import (
    DIRECTIONS,
    MOST,
    POINTING,
    SHAPES,
    SIDES,
    Canvas,
    CanvasObject,
    held_out,
    pair_held_out,
    relation_held_out,
    relations,
)
from qformer.canvases.layout import HOLLOW, are_apart, draw_ground
from qformer.scenes.text import COLOURS, SIZES, pick

if TYPE_CHECKING:
    import numpy as np

PLACES = 60  # places tried for objects
TRIES = 20  # combinations of shape and color tried for an object


def draw_crowd(rng: np.random.Generator, split: str, width: int, height: int) -> Canvas:
    """Draw a canvas with as many objects as random places leave room for, at most 16; no two share shape and color.

    Captions tell objects of one shape and color as a group that looks alike, which would be false of these.
    """
    while True:
        canvas = Canvas(width, height, (), draw_ground(rng, split))
        for _ in range(PLACES):
            if len(canvas.objects) == MOST:
                break
            item = _draw_object(rng, canvas, only_shown=split in ("train", "val"))
            if item is not None:
                canvas = canvas.with_objects([*canvas.objects, item])
        if canvas.objects and (split != "test" or held_out(canvas)):
            return canvas


def _draw_object(rng: np.random.Generator, canvas: Canvas, only_shown: bool) -> CanvasObject | None:
    """Draw an object beside those of a canvas; None if it lies on one, or all that was tried is there or held out."""
    low, high = SIDES[pick(rng, SIZES)]
    side = int(rng.integers(low, high + 1))
    left, top = (int(rng.integers(extent - side + 1)) for extent in (canvas.width, canvas.height))
    if not all(are_apart((left, top), side, other.box[:2], other.side) for other in canvas.objects):
        return None
    x, y, hollow = left + side / 2, top + side / 2, bool(rng.random() < HOLLOW)
    for _ in range(TRIES):
        shape, colour = pick(rng, SHAPES), pick(rng, COLOURS)
        direction = pick(rng, DIRECTIONS) if shape in POINTING else None
        item = CanvasObject(shape, colour, x, y, side, direction=direction, hollow=hollow)
        if item.pair not in canvas.numbers and (not only_shown or _is_shown(canvas, item)):
            return item
    return None


def _is_shown(canvas: Canvas, item: CanvasObject) -> bool:
    """True if training may show an object beside those of a canvas."""
    return not pair_held_out(item.shape, item.colour, item.direction) and not any(
        relation_held_out(item.shape, relation, other.shape)
        for other in canvas.objects
        for relation in relations(canvas, item, other)
    )
