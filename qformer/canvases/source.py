"""Data source `canvases`: pictures of 120 to 480 pixels a side with one to sixteen objects, their texts and questions.

Canvases mention left and right, and hold words and arrows, so do not flip them as an augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qformer.canvases.canvas import Canvas
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.drawn import Asking
from qformer.canvases.layout import ARRANGED, grids
from qformer.canvases.text import KINDS, canvas_captions, canvas_questions

if TYPE_CHECKING:
    import numpy as np

    from qformer.scenes.text import Question


@dataclass(frozen=True)
class Canvases(Asking[Canvas]):
    """Drawn canvases, each a picture `uint8[h, w, 3]` at its own size; options as of `Drawn` and `Asking`."""

    NAME: ClassVar[str] = "canvases"
    STREAM: ClassVar[int] = 3
    KINDS: ClassVar[tuple[str, ...]] = KINDS

    def canvas(self, index: int) -> Canvas:
        """Get the canvas of a sample without drawing it."""
        return self.composed(index)[0]

    def possible(self) -> tuple[str, ...]:
        """Kinds of questions that so many objects allow."""
        least, greatest = self.numbers
        arranged = any(grids(number) for number in range(max(least, ARRANGED), greatest + 1))
        impossible = {"relation": greatest < 2, "layout": not arranged}
        return tuple(kind for kind in KINDS if not impossible.get(kind))

    def draw(self, rng: np.random.Generator) -> Canvas:
        return self.compose(rng)

    def ask(self, shown: Canvas, rng: np.random.Generator) -> list[Question]:
        return canvas_questions(shown, rng, self.numbers)

    def tell(self, shown: Canvas, rng: np.random.Generator) -> list[str]:
        return canvas_captions(shown, rng)

    def picture(self, shown: Canvas) -> np.ndarray:
        return draw_canvas(shown)
