"""Pixels of canvases: antialiased masks of objects, drawn once for each look and then pasted."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from qformer.canvases.canvas import DIRECTIONS, EDGES
from qformer.scenes.scenes import MIDDLE, OUTLINES, PALE, RGB, SUPERSAMPLING, word_font

if TYPE_CHECKING:
    from qformer.canvases.canvas import Canvas, CanvasObject
    from qformer.scenes.scenes import Outline

ARROW: Outline = [(0.5, 0), (1, 0.5), (0.7, 0.5), (0.7, 1), (0.3, 1), (0.3, 0.5), (0, 0.5)]  # up
STROKE = 0.09  # width of the outline of a hollow object, as a fraction of its side
LOOKS = 8192  # masks that are kept, at most 1.6 kB each
Look = tuple[str, int, str | None, str | None, bool]  # shape, side, word, direction, hollow


def draw_canvas(canvas: Canvas) -> np.ndarray:
    """Draw a canvas at its own size, uint8[height, width, 3], antialiased."""
    image = Image.new("RGB", (canvas.width, canvas.height), (canvas.ground,) * 3)
    _draw_edges(image, canvas)
    for item in canvas.objects:
        draw_object(image, item)
    return np.array(image)


def draw_object(image: Image.Image, item: CanvasObject) -> None:
    """Draw an object onto an RGB image."""
    corner = item.box[:2]
    body, ink = _masks(item.shape, item.side, item.word, item.direction, item.hollow)
    image.paste(RGB[item.colour], corner, body)
    if ink is not None:
        image.paste(RGB["black" if item.colour in PALE else "white"], corner, ink)


def _draw_edges(image: Image.Image, canvas: Canvas) -> None:
    """Draw the bands, those at the left and right over the whole height, the others between them."""
    width, height, band = canvas.width, canvas.height, canvas.band
    left, right = (band if canvas.edges[side] else 0 for side in (0, 1))
    boxes = {
        "left": (0, 0, band, height),
        "right": (width - band, 0, width, height),
        "top": (left, 0, width - right, band),
        "bottom": (left, height - band, width - right, height),
    }
    for edge, colour in zip(EDGES, canvas.edges, strict=True):
        if colour is not None:
            image.paste(RGB[colour], boxes[edge])


def outline(shape: str, direction: str | None) -> Outline:
    """Corners of a shape in the square from (0, 0) to (1, 1), turned to where it points."""
    points = ARROW if shape == "arrow" else OUTLINES[shape]
    for _ in range(DIRECTIONS.index(direction) if direction else 0):
        points = [(1 - v, u) for u, v in points]  # a quarter turn, clockwise
    return points


@lru_cache(maxsize=LOOKS)
def _masks(
    shape: str, side: int, word: str | None, direction: str | None, hollow: bool
) -> tuple[Image.Image, Image.Image | None]:
    """Draw the masks of an object and of the word on it, as gray images of `side` x `side` pixels."""
    scale = SUPERSAMPLING
    large = scale * side
    points = [((large - 1) * u, (large - 1) * v) for u, v in outline(shape, direction)]
    body = Image.new("L", (large, large))
    pen = ImageDraw.Draw(body)
    pen.polygon(points, fill=255)
    if hollow:
        line = Image.new("L", (large, large))
        ImageDraw.Draw(line).line([*points, *points[:2]], fill=255, width=round(2 * STROKE * large), joint="curve")
        body = ImageChops.multiply(body, line)
    if word is None:
        return _reduce(body), None
    # As in scenes, the letters have a rim in the color of the object, and may be wider than it.
    text = word.upper()
    font, rim = word_font(text, large)
    height = MIDDLE.get(shape, 0.5)
    middle = (large / 2, large * (1 - height if direction == "down" else height if direction in (None, "up") else 0.5))
    pen.text(middle, text, fill=255, font=font, anchor="mm", stroke_width=rim)
    ink = Image.new("L", (large, large))
    ImageDraw.Draw(ink).text(middle, text, fill=255, font=font, anchor="mm")
    return _reduce(body), _reduce(ink)


def _reduce(mask: Image.Image) -> Image.Image:
    """Average a mask down to its own size; a corner thinner than a pixel still shows."""
    return mask.reduce(SUPERSAMPLING)
