"""Data source `canvases`: pictures of 120 to 480 pixels a side with one to sixteen objects, their texts and questions.

Canvases mention left and right, and hold words and arrows, so do not flip them as an augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from qformer.scenes.canvas import MOST
from qformer.scenes.canvas_drawing import draw_canvas
from qformer.scenes.canvas_layout import ARRANGED, compose, grids, room
from qformer.scenes.canvas_text import KINDS, canvas_captions, canvas_questions
from qformer.scenes.scenes import SPLITS
from qformer.types import Sample, UsageError

if TYPE_CHECKING:
    from qformer.scenes.canvas import Canvas
    from qformer.scenes.text import Question

STREAM = 3  # separates the random numbers of canvases from those of scenes with the same seed
SMALLEST = 120  # pixels, room for a large object in each of the nine positions, with bands


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
        questions: add a question to each sample, of each kind in turn, or of those that are listed (`KINDS`). Canvases
            are drawn until that kind can be asked, so they differ from those of the same index without questions.
        captions: number of captions to keep; the first two tell everything but boxes, the others a part.
    """

    split: Literal["train", "val", "test", "any"] = "train"
    sides: tuple[int, int] = (120, 480)
    aspect: float = 4.0
    seed: int = 0
    count: int = 1_000_000
    objects: tuple[int, int] = (1, MOST)
    questions: bool | tuple[str, ...] = False
    captions: int | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"split is '{self.split}'; canvases have {', '.join(SPLITS)}")
        if not SMALLEST <= self.sides[0] <= self.sides[1]:
            raise UsageError(f"sides is {self.sides}; give the least and the greatest side in pixels, from {SMALLEST}")
        if self.aspect < 1:
            raise UsageError(f"aspect is {self.aspect}; give the greatest ratio of the sides, at least 1")
        if self.seed < 0 or self.count < 0:
            raise UsageError(f"seed is {self.seed} and count is {self.count}; neither may be negative")
        if self.captions is not None and self.captions < 1:
            raise UsageError(f"captions is {self.captions}; give how many to keep, at least 1, or leave it out")
        least, greatest = self.objects
        fit = room(self.sides[1], self.sides[1])
        if not 1 <= least <= greatest <= MOST or least > fit:
            raise UsageError(
                f"objects is {self.objects}; give the least and the greatest number, from 1 to {MOST}, of which {fit} "
                f"fit on {self.sides[1]} pixels"
            )
        for kind in () if isinstance(self.questions, bool) else self.questions:
            if kind not in KINDS:
                raise UsageError(f"questions has '{kind}'; give true for every kind, or some of {', '.join(KINDS)}")
            if kind not in self._possible:
                raise UsageError(f"questions has '{kind}', for which {self.numbers[1]} objects are too few; give more")

    @property
    def numbers(self) -> tuple[int, int]:
        """Least and greatest number of objects that there are."""
        return self.objects[0], min(self.objects[1], room(self.sides[1], self.sides[1]))

    @property
    def _possible(self) -> list[str]:
        """Kinds of questions that so many objects allow."""
        least, greatest = self.numbers
        arranged = any(grids(number) for number in range(max(least, ARRANGED), greatest + 1))
        impossible = {"relation": greatest < 2, "layout": not arranged}
        return [kind for kind in KINDS if not impossible.get(kind)]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions, which are asked in turn; none without questions."""
        if isinstance(self.questions, bool):
            return tuple(self._possible) if self.questions else ()
        return tuple(self.questions)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Draw a canvas, uint8[h, w, 3], with captions and, with `questions`, a question whose kind ends the key."""
        canvas, question, rng = self._draw(index)
        key = f"canvases/{self.split}/{self.seed}/{index}"
        if question is not None:
            key = f"{key}:{question.kind}"
        return Sample(
            image=draw_canvas(canvas),
            key=key,
            image_id=key,
            captions=canvas_captions(canvas, rng)[: self.captions],
            question=question.question if question else None,
            answers=[question.answer] if question else [],
            facts={"question_type": question.kind} if question else {},
        )

    def canvas(self, index: int) -> Canvas:
        """Get the canvas of a sample without drawing it."""
        return self._draw(index)[0]

    def _draw(self, index: int) -> tuple[Canvas, Question | None, np.random.Generator]:
        """Compose a canvas and its question, and return them with the generator for its captions."""
        if not 0 <= index < self.count:
            raise IndexError(f"canvas {index} of {self.count}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index, STREAM))
        while True:
            canvas = compose(rng, self.split, self.numbers, self.sides, self.aspect)
            if not self.kinds:
                return canvas, None, rng
            for question in canvas_questions(canvas, rng, self.numbers):
                if question.kind == self.kinds[index % len(self.kinds)]:
                    return canvas, question, rng
