"""Pairs of canvases that differ in exactly one thing, with a question whose answers differ, as in MMVP.

MMVP (Tong et al. 2024) asks the same about two similar photos; a model has seen the difference only if it answers both.
Its questions are of nine patterns. Canvases can stand for all of them, one loosely: an object that is drawn small or
large looks as if seen from farther or nearer, which is all of `viewpoint` that a flat picture can show.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from PIL import Image

from qformer.canvases.canvas import DIRECTIONS, POINTING, SIDES, TOLD, Canvas, held_out
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.drawn import Drawn
from qformer.canvases.layout import Shell, are_apart, find_place, scatter
from qformer.canvases.names import ARRANGEMENTS, NUMBERS, references, singular
from qformer.canvases.names import name as kind_name
from qformer.canvases.text import canvas_captions
from qformer.scenes.text import COLOURS, POSITIONS, WORDS, pick, plural, with_article
from qformer.types import Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from qformer.canvases.canvas import CanvasObject

    Varied = tuple[Canvas, str, str, str]  # the other canvas, question, answers for the first and the other

#: Patterns of pairs, and those of MMVP for which they stand.
PATTERNS = {
    "direction": "Orientation and Direction",
    "presence": "Presence of Specific Features",
    "state": "State and Condition",
    "count": "Quantity and Count",
    "position": "Positional and Relational Context",
    "colour": "Color and Appearance",
    "structure": "Structural Characteristics",
    "text": "Texts",
    "viewpoint": "Viewpoint and Perspective",
}
#: Least number of objects that a pattern needs.
LEAST = {"presence": 2, "count": 2, "structure": 6}
LOSING = ("presence", "count")  # patterns that take an object away
QUALITY = 95  # of JPEG files, without subsampled colors


@dataclass(frozen=True)
class CanvasPair:
    """Two canvases that differ in one thing.

    Attributes:
        pattern: one of `PATTERNS`.
        canvases: the two; which of them was changed to make the other is random.
        question: asked about both.
        options: the two answers, in random order.
        right: for each canvas the number of its option; one is 0, the other 1.
    """

    pattern: str
    canvases: tuple[Canvas, Canvas]
    question: str
    options: tuple[str, str]
    right: tuple[int, int]


@dataclass(frozen=True)
class Twins(Drawn):
    """Source of pairs: samples 2n and 2n + 1 are those of pair n, a function of the fields and n alone.

    Attributes:
        patterns: some of `PATTERNS`, taken in turn; all by default.
    """

    NAME: ClassVar[str] = "twins"
    STREAM: ClassVar[int] = 4

    split: Literal["train", "val", "test", "any"] = "test"
    patterns: tuple[str, ...] = tuple(PATTERNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.patterns or not set(self.patterns) <= set(PATTERNS):
            raise UsageError(f"patterns is {self.patterns}; give some of {', '.join(PATTERNS)}")
        least = max(LEAST.get(pattern, 1) for pattern in self.patterns)
        if self.numbers[1] < least:
            raise UsageError(f"there are up to {self.numbers[1]} objects, and patterns that need {least}; allow more")
        if self.numbers == (TOLD + 1, TOLD + 1) and (fewer := [one for one in self.patterns if one in LOSING]):
            raise UsageError(
                f"objects is {self.objects}, and of {TOLD + 1} none is taken away, which {' and '.join(fewer)} need; "
                "allow another number"
            )

    def __getitem__(self, index: int) -> Sample:
        """Draw one of a pair, uint8[h, w, 3], with its question, answer, captions, and the `choices` as a fact."""
        rng = self.rng(index, 1)
        number, place = divmod(index, 2)
        pair = self.pair(number)
        key = self.key(index, pair.pattern)
        return Sample(
            image=draw_canvas(pair.canvases[place]),
            key=key,
            image_id=key,
            captions=canvas_captions(pair.canvases[place], rng),
            question=pair.question,
            answers=[pair.options[pair.right[place]]],
            facts={"question_type": pair.pattern, "choices": list(pair.options), "pair": number},
        )

    def pair(self, number: int) -> CanvasPair:
        """Get a pair without drawing it."""
        rng = self.rng(number)
        pattern = self.patterns[number % len(self.patterns)]
        while True:
            canvas = self.compose(rng)
            varied = _VARY[pattern](canvas, rng)
            if varied is None or not _is_of_split(varied[0], self.split):
                continue
            other, question, answer, other_answer = varied
            both, answers = (canvas, other), (answer, other_answer)
            if rng.random() < 0.5:
                both, answers = (other, canvas), (other_answer, answer)
            options = answers if rng.random() < 0.5 else (answers[1], answers[0])
            return CanvasPair(pattern, both, question, options, (options.index(answers[0]), options.index(answers[1])))


def _is_of_split(canvas: Canvas, split: str) -> bool:
    return split == "any" or held_out(canvas) == (split == "test")


def write_pairs(folder: str | Path, source: Twins, pairs: int = 150) -> list[CanvasPair]:
    """Write the first pairs of a source in the layout of MMVP: `Questions.csv`, and `MMVP Images/N.jpg` for row N.

    Rows are counted from 1; 2n - 1 and 2n are a pair. A fifth column, which MMVP does not have, names MMVP's pattern.

    Raises:
        UsageError: the folder already holds questions.
    """
    folder = Path(folder)
    table = folder / "Questions.csv"
    if table.exists():
        raise UsageError(f"'{table}' exists; give a new folder")
    images = folder / "MMVP Images"
    images.mkdir(parents=True, exist_ok=True)
    written = [source.pair(number) for number in range(pairs)]
    with table.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Index", "Question", "Options", "Correct Answer", "Pattern"])
        for number, pair in enumerate(written):
            for place, canvas in enumerate(pair.canvases):
                row = 2 * number + place + 1
                Image.fromarray(draw_canvas(canvas)).save(images / f"{row}.jpg", quality=QUALITY, subsampling=0)
                options = f"(a) {pair.options[0]} (b) {pair.options[1]}"
                answer = f"({'ab'[pair.right[place]]})"
                rows.writerow([row, pair.question, options, answer, PATTERNS[pair.pattern]])
    return written


def _pick_told(canvas: Canvas, rng: np.random.Generator) -> CanvasObject | None:
    """Pick an object that is told by itself and the only one of its shape and color."""
    told = [item for item in canvas.told() if canvas.alike(item) == 1]
    return pick(rng, told) if told else None


def _changed(canvas: Canvas, old: CanvasObject, new: CanvasObject) -> Canvas:
    return canvas.with_objects(new if item is old else item for item in canvas.objects)


def _named(
    rng: np.random.Generator, both: tuple[Canvas, Canvas], items: tuple[CanvasObject, CanvasObject], *hidden: str
) -> str | None:
    """Pick a name that fits one object alone, on both canvases."""
    first, second = (singular(references(canvas, item, hidden)) for canvas, item in zip(both, items, strict=True))
    shared = [text for text in first if text in second]
    return pick(rng, shared) if shared else None


def _direction(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    old = _pick_told(canvas, rng)
    if old is None or old.shape not in POINTING:
        return None
    new = replace(old, direction=pick(rng, [one for one in DIRECTIONS if one != old.direction]))
    other = _changed(canvas, old, new)
    text = _named(rng, (canvas, other), (old, new))
    return None if text is None else (other, f"where does {text} point?", old.direction or "", new.direction or "")


def _presence(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    old = _pick_told(canvas, rng)
    if old is None or not _can_lose_one(canvas):
        return None
    other = canvas.with_objects(item for item in canvas.objects if item is not old)
    return other, f"is there {with_article(kind_name(old))}?", "yes", "no"


def _can_lose_one(canvas: Canvas) -> bool:
    """True where one object less leaves neither gaps in rows, nor a crowd that is none any more."""
    return canvas.layout == "scattered" and len(canvas.objects) not in (1, TOLD + 1)


def _state(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    old = _pick_told(canvas, rng)
    if old is None or old.word:
        return None
    new = replace(old, hollow=not old.hollow)
    other = _changed(canvas, old, new)
    text = _named(rng, (canvas, other), (old, new))
    return None if text is None else (other, f"is {text} hollow or filled?", old.state, new.state)


def _count(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    target = pick(rng, canvas.objects)
    number = canvas.alike(target)
    if number < (3 if canvas.crowded else 2) or not _can_lose_one(canvas):
        return None  # the last one of a crowd's group would be told by its position
    other = canvas.with_objects(item for item in canvas.objects if item is not target)
    asked = f"how many {target.colour} {plural(target.shape)} are there?"
    return other, asked, NUMBERS[number], NUMBERS[number - 1]


def _position(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    old = _pick_told(canvas, rng)
    if old is None or canvas.layout != "scattered":
        return None
    taken = [canvas.cell(item) for item in canvas.told()]
    cell = pick(rng, [one for one in (divmod(i, 3) for i in range(len(POSITIONS))) if one not in taken])
    corner = find_place(rng, canvas, old.side, cell, [item for item in canvas.objects if item is not old])
    if corner is None:
        return None
    new = replace(old, x=corner[0] + old.side / 2, y=corner[1] + old.side / 2)
    other = _changed(canvas, old, new)
    text = _named(rng, (canvas, other), (old, new), "position")
    return None if text is None else (other, f"where is {text}?", canvas.position(old), other.position(new))


def _colour(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    old = _pick_told(canvas, rng)
    if old is None:
        return None
    pairs = {item.pair for item in canvas.objects}
    new = replace(old, colour=pick(rng, [one for one in COLOURS if (old.shape, one) not in pairs]))
    other = _changed(canvas, old, new)
    text = _named(rng, (canvas, other), (old, new), "colour")
    return None if text is None else (other, f"what color is {text}?", old.colour, new.colour)


def _structure(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    if canvas.layout == "scattered":
        return None
    told = canvas.told()
    free = iter(rng.permutation(len(POSITIONS)).tolist())
    cells = [divmod(next(free), 3) if any(item is one for one in told) else None for item in canvas.objects]
    corners = scatter(rng, Shell.of(canvas), [item.side for item in canvas.objects], cells)
    if corners is None:
        return None
    moved = [
        replace(item, x=left + item.side / 2, y=top + item.side / 2)
        for item, (left, top) in zip(canvas.objects, corners, strict=True)
    ]
    other = replace(canvas, layout="scattered").with_objects(moved)
    return other, "how are the objects arranged?", ARRANGEMENTS[canvas.layout], ARRANGEMENTS["scattered"]


def _text(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    written = [item for item in canvas.told() if item.word]
    if not written:
        return None
    old = pick(rng, written)
    new = replace(old, word=pick(rng, [one for one in WORDS if one not in {item.word for item in canvas.objects}]))
    other = _changed(canvas, old, new)
    text = _named(rng, (canvas, other), (old, new), "word")
    return None if text is None else (other, f"what word is on {text}?", old.word or "", new.word or "")


def _viewpoint(canvas: Canvas, rng: np.random.Generator) -> Varied | None:
    old = _pick_told(canvas, rng)
    if old is None or old.word or canvas.layout != "scattered":
        return None
    size = "small" if old.size == "large" else "large"
    side = int(rng.integers(SIDES[size][0], SIDES[size][1] + 1))
    corner = round(old.x - side / 2), round(old.y - side / 2)  # around the same center, to half a pixel
    left, top, right, bottom = Shell.of(canvas).span(canvas.cell(old), side)
    free = all(are_apart(corner, side, item.box[:2], item.side) for item in canvas.objects if item is not old)
    if not free or not (left <= corner[0] <= right and top <= corner[1] <= bottom):
        return None
    new = replace(old, x=corner[0] + side / 2, y=corner[1] + side / 2, side=side)
    other = _changed(canvas, old, new)
    text = _named(rng, (canvas, other), (old, new))
    return None if text is None else (other, f"is {text} small or large?", old.size, new.size)


_VARY: dict[str, Callable[[Canvas, np.random.Generator], Varied | None]] = {
    "direction": _direction,
    "presence": _presence,
    "state": _state,
    "count": _count,
    "position": _position,
    "colour": _colour,
    "structure": _structure,
    "text": _text,
    "viewpoint": _viewpoint,
}
