"""Data source `areas`: pictures of one to three areas of plain color, with a question about the color of an edge.

Pictures whose color or gray goes up to the edges, as it does in photos: who learns from them that edges may be gray can
only be fooled by gray that it takes for padding. Left and right are asked for, so do not flip them as an augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qformer.canvases.canvas import EDGES
from qformer.canvases.drawn import Sized
from qformer.canvases.layout import SHADES, draw_ground, draw_size
from qformer.scenes.scenes import RGB
from qformer.scenes.text import COLOURS, pick
from qformer.types import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Answer for gray. The mini language models have never read that word, and cannot write what they have never read.
NO_COLOR = "no color"
GRAY = 1 / 3  # share of questions about a gray edge
LAYOUTS = ("plain", "across", "down", "framed")
LEAST = 0.15  # of the picture's side that an area takes
SHIFT = 24  # most that a color differs from the usual one, in each channel


@dataclass(frozen=True)
class Areas(Sized):
    """Areas of plain color or gray: the whole picture, two or three stripes, or a rectangle on a ground.

    Each picture is `uint8[h, w, 3]` with one question; options as of `Sized`, where splits differ in their tones alone.
    A third of the answers are `no color`, the others are equally frequent.
    """

    NAME: ClassVar[str] = "areas"
    STREAM: ClassVar[int] = 7
    apart: ClassVar[bool] = False

    def __getitem__(self, index: int) -> Sample:
        """Draw a sample."""
        rng = self.rng(index)
        width, height = draw_size(rng, self.sides, self.aspect)
        layout, edge = _draw_layout(rng)
        answer = None if rng.random() < GRAY else pick(rng, COLOURS)
        others = [one for one in (*COLOURS, None) if one != answer]
        colors = [answer, *(others[i] for i in rng.permutation(len(others))[:2])]
        if layout in ("across", "down") and edge in ("right", "bottom"):
            colors.reverse()
        picture = _draw(rng, (height, width), layout, [_paint(rng, one, self.split) for one in colors])
        key = self.key(index, "edge")
        return Sample(
            image=picture,
            key=key,
            image_id=key,
            question=f"what color is the {edge} edge?",
            answers=[answer or NO_COLOR],
            facts={"question_type": "edge"},
        )


def _draw_layout(rng: np.random.Generator) -> tuple[str, str]:
    """Draw a layout, and an edge along which it has one color."""
    layout = pick(rng, LAYOUTS)
    edges = {"across": EDGES[:2], "down": EDGES[2:]}.get(layout, EDGES)
    return layout, pick(rng, edges)


def _paint(rng: np.random.Generator, color: str | None, split: str) -> np.ndarray:
    """Draw a tone of a color or of gray, of which no other split has the same: uint8[3]."""
    if color is None:
        return np.full(3, draw_ground(rng, split), np.uint8)
    shifts = [shift for shift in range(SHIFT + 1) if split not in SHADES or shift % 3 == SHADES[split]]
    shift = pick(rng, shifts)
    return np.array([channel + shift if channel < 128 else channel - shift for channel in RGB[color]], np.uint8)


def _draw(rng: np.random.Generator, size: tuple[int, int], layout: str, paints: Sequence[np.ndarray]) -> np.ndarray:
    """Draw the areas, the first one at the left or top, or as the ground: uint8[h, w, 3]."""
    height, width = size
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = paints[0]
    if layout in ("across", "down"):
        along = picture if layout == "down" else picture.transpose(1, 0, 2)
        first, second = sorted(rng.uniform(LEAST, 1 - LEAST, 2) * len(along))
        if second - first < LEAST * len(along):  # two stripes
            second = first
        along[round(first) : round(second)] = paints[1]
        along[round(second) :] = paints[2]
    elif layout == "framed":
        left, top = (
            round(share * side) for share, side in zip(rng.uniform(0.05, 0.35, 2), (width, height), strict=True)
        )
        picture[top : height - top, left : width - left] = paints[1]
    return picture
