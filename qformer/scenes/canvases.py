"""Data source `canvases`: pictures of 120 to 480 pixels a side with one to sixteen objects, their texts and questions.

Canvases mention left and right, and hold words and arrows, so do not flip them as an augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from qformer.scenes.canvas import MOST
from qformer.scenes.canvas_drawing import draw_canvas
from qformer.scenes.canvas_layout import compose, room
from qformer.scenes.scenes import SPLITS
from qformer.types import Sample, UsageError

if TYPE_CHECKING:
    from qformer.scenes.canvas import Canvas

STREAM = 3  # separates the random numbers of canvases from those of scenes with the same seed
SMALLEST = 64  # pixels, room for an object with a band on either side


@dataclass(frozen=True)
class Canvases:
    """Drawn canvases; sample `i` is a function of the fields and `i` alone, in any process and any order.

    Attributes:
        split: `val` resembles `train`; `test` has combinations that neither has; `any` is for text about canvases that
            are not shown.
        sides: least and greatest width and height, in pixels; equal ones give squares of one size.
        aspect: greatest ratio of the longer side to the shorter one.
        seed: seed of the canvases.
        count: length of the source, which may be any number, since nothing is stored.
        objects: least and greatest number of objects; no more than fit on the largest canvas.
    """

    split: Literal["train", "val", "test", "any"] = "train"
    sides: tuple[int, int] = (120, 480)
    aspect: float = 4.0
    seed: int = 0
    count: int = 1_000_000
    objects: tuple[int, int] = (1, MOST)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"split is '{self.split}'; canvases have {', '.join(SPLITS)}")
        if not SMALLEST <= self.sides[0] <= self.sides[1]:
            raise UsageError(f"sides is {self.sides}; give the least and the greatest side in pixels, from {SMALLEST}")
        if self.aspect < 1:
            raise UsageError(f"aspect is {self.aspect}; give the greatest ratio of the sides, at least 1")
        if self.seed < 0 or self.count < 0:
            raise UsageError(f"seed is {self.seed} and count is {self.count}; neither may be negative")
        least, greatest = self.objects
        fit = room(self.sides[1], self.sides[1])
        if not 1 <= least <= greatest <= MOST or least > fit:
            raise UsageError(
                f"objects is {self.objects}; give the least and the greatest number, from 1 to {MOST}, of which {fit} "
                f"fit on {self.sides[1]} pixels"
            )

    @property
    def numbers(self) -> tuple[int, int]:
        """Least and greatest number of objects that there are."""
        return self.objects[0], min(self.objects[1], room(self.sides[1], self.sides[1]))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Draw a canvas, uint8[h, w, 3] at its own size."""
        key = f"canvases/{self.split}/{self.seed}/{index}"
        return Sample(image=draw_canvas(self.canvas(index)), key=key, image_id=key)

    def canvas(self, index: int) -> Canvas:
        """Get the canvas of a sample without drawing it."""
        return self._draw(index)[0]

    def _draw(self, index: int) -> tuple[Canvas, np.random.Generator]:
        """Compose a canvas, and return it with the generator for its texts."""
        if not 0 <= index < self.count:
            raise IndexError(f"canvas {index} of {self.count}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index, STREAM))
        return compose(rng, self.split, self.numbers, self.sides, self.aspect), rng
