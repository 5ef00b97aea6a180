"""Data source `two_pictures`: rows of two canvases, with questions about one of them or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from qformer.canvases.canvas import Canvas
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.drawn import Asking
from qformer.canvases.names import name
from qformer.canvases.questions import KINDS as CANVAS_KINDS
from qformer.canvases.text import canvas_captions, canvas_description, canvas_questions
from qformer.scenes.text import Question, pick, with_article

if TYPE_CHECKING:
    import numpy as np

WHICH = ("first", "second")
#: Kinds of questions about one picture, and those that both are needed for.
KINDS = (*(kind for kind in CANVAS_KINDS if kind not in ("box", "content", "layout")), "which", "more")
Row = tuple[Canvas, Canvas]


@dataclass(frozen=True)
class TwoPictures(Asking[Row]):
    """Rows of two canvases, each a list of two pictures `uint8[h, w, 3]`; options as of `Drawn` and `Asking`."""

    NAME: ClassVar[str] = "two_pictures"
    STREAM: ClassVar[int] = 6
    KINDS: ClassVar[tuple[str, ...]] = KINDS

    split: Literal["train", "val", "test", "any"] = "train"
    sides: tuple[int, int] = (120, 240)
    objects: tuple[int, int] = (1, 8)

    def row(self, index: int) -> Row:
        """Get the two canvases of a sample without drawing them."""
        return self.composed(index)[0]

    def possible(self) -> tuple[str, ...]:
        impossible = {"relation": self.numbers[1] < 2, "more": self.numbers[0] == self.numbers[1]}
        return tuple(kind for kind in KINDS if not impossible.get(kind))

    def draw(self, rng: np.random.Generator) -> Row:
        return self.compose(rng), self.compose(rng)

    def ask(self, shown: Row, rng: np.random.Generator) -> list[Question]:
        return row_questions(shown, rng, self.numbers)

    def tell(self, shown: Row, rng: np.random.Generator) -> list[str]:
        """Write a caption of the numbers in both, and one of an object or a group in each."""
        captions = [canvas_captions(canvas, rng) for canvas in shown]
        return [_of_both(*(texts[kind] for texts in captions)) for kind in (2, 3)]

    def picture(self, shown: Row) -> list[np.ndarray]:
        return [draw_canvas(canvas) for canvas in shown]


def _of_both(first: str, second: str) -> str:
    return f"first picture: {first}; second picture: {second}"


def row_description(row: Row) -> str:
    """Describe two pictures in full: every question about them can be answered from this text."""
    return _of_both(*map(canvas_description, row))


def row_questions(row: Row, rng: np.random.Generator, numbers: tuple[int, int]) -> list[Question]:
    """Write one question of each kind of `KINDS` that a row allows.

    Args:
        numbers: least and greatest number of objects of the canvases, for the balance of counts.
    """
    place = int(rng.integers(2))
    found = [
        Question(one.kind, f"{one.question.removesuffix('?')} in the {WHICH[place]} picture?", one.answer)
        for one in canvas_questions(row[place], rng, numbers)
        if one.kind in KINDS and not one.question.endswith(" in the picture?")
    ]
    pairs = [{item.pair: item for item in canvas.objects} for canvas in row]
    alone = [item for pair, item in pairs[place].items() if pair not in pairs[1 - place]]
    if alone:
        found.append(Question("which", f"which picture has {with_article(name(pick(rng, alone)))}?", WHICH[place]))
    first, second = (len(canvas.objects) for canvas in row)
    if first != second:
        found.append(Question("more", "which picture has more objects?", WHICH[second > first]))
    return found
