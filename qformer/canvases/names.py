"""Names of what is on a canvas, for captions and questions: lower case, American spelling, a closed vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformer.canvases.canvas import DIRECTIONS, EDGES, SHAPES
from qformer.scenes.text import COLOURS, POSITIONS, SIZES, WORDS, plural, with_article, word_phrase
from qformer.scenes.text import NUMBERS as FEW

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qformer.canvases.canvas import Box, Canvas, CanvasObject, Pair

NUMBERS = (
    *FEW,
    *("five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)
ARRANGEMENTS = {"scattered": "scattered", "rows": "in rows", "grid": "in a grid"}


def box_text(box: Box) -> str:
    """Write a box in hundredths as `[12, 30, 25, 47]`: left, top, right, bottom."""
    return f"[{', '.join(map(str, box))}]"


def name(item: CanvasObject) -> str:
    """Name of an object as `red star`."""
    return f"{item.colour} {item.shape}"


def state_name(item: CanvasObject) -> str:
    """Name of an object as `red star` or `hollow red star`."""
    return f"hollow {name(item)}" if item.hollow else name(item)


def look_name(item: CanvasObject, number: int = 1) -> str:
    """Name of so many equal objects by all of their look but words, as `small hollow red arrows pointing left`."""
    shape = item.shape if number == 1 else plural(item.shape)
    pointing = f" pointing {item.direction}" if item.direction else ""
    return f"{item.size} {'hollow ' if item.hollow else ''}{item.colour} {shape}{pointing}"


def full_name(canvas: Canvas, item: CanvasObject, boxes: bool = False) -> str:
    """Name of a told object by everything, with `boxes` also its box."""
    box = f" in the box {box_text(canvas.box(item))}" if boxes else ""
    return f"{look_name(item)}{word_phrase(item.word)} at the {canvas.position(item)}{box}"


def crowds(canvas: Canvas) -> list[tuple[CanvasObject, int]]:
    """List one object of each group that is told by its number, with the number, in reading order."""
    told = canvas.told()
    rest = {item.pair: item for item in reversed(canvas.objects) if not any(item is one for one in told)}
    return [(item, canvas.alike(item)) for item in reversed(rest.values())]


def everything(canvas: Canvas, boxes: bool = False) -> list[str]:
    """Phrases that tell all objects, groups first: `nine small red stars`, `a large blue circle at the center`."""
    groups = [f"{NUMBERS[number]} {look_name(item, number)}" for item, number in crowds(canvas)]
    return groups + [with_article(full_name(canvas, item, boxes)) for item in canvas.told()]


def edge_phrases(canvas: Canvas) -> list[str]:
    return [f"the {edge} edge is {colour}" for edge, colour in zip(EDGES, canvas.edges, strict=True) if colour]


def counted(canvas: Canvas) -> list[str]:
    """Phrases that tell the number of each shape and color: `nine red stars`, `a blue circle`."""
    kinds = {item.pair: item for item in canvas.objects}.values()
    numbers = [(item, canvas.alike(item)) for item in kinds]
    return [
        with_article(name(item)) if number == 1 else f"{NUMBERS[number]} {item.colour} {plural(item.shape)}"
        for item, number in numbers
    ]


def references(canvas: Canvas, target: CanvasObject, hidden: Sequence[str]) -> list[tuple[str, int]]:
    """List names that fit `target` and only objects like it, do not reveal what is `hidden`, and are in descriptions.

    Args:
        hidden: some of `shape`, `colour`, `position`, `word`.

    Returns:
        Pairs of name and number of objects that it fits: (`the star`, 1), (`the red stars`, 9).
    """
    number = canvas.alike(target)
    shape, thing = (word if number == 1 else plural(word) for word in (target.shape, "object"))
    ways: dict[str, tuple[str | Pair, str]] = {
        "shape": (target.shape, f"the {shape}"),
        "colour": (target.colour, f"the {target.colour} {thing}"),
        "shape colour": (target.pair, f"the {target.colour} {shape}"),
    }
    found = [
        (text, number)
        for way, (key, text) in ways.items()
        if canvas.numbers[key] == number and not set(way.split()) & set(hidden)
    ]
    if "position" not in hidden and not canvas.crowded:
        found.append((f"the object at the {canvas.position(target)}", 1))
    if "word" not in hidden and target.word:
        found.append((f"the object with the word {target.word}", 1))
    return found


def singular(names: Iterable[tuple[str, int]]) -> list[str]:
    """Those of `references` that name one object."""
    return [text for text, number in names if number == 1]


def _plurals(words: Iterable[str]) -> set[str]:
    return {form for word in words for form in (word, plural(word))}


#: Words of texts that are no values of anything.
SAID = """
    a an the is are there it in on at of to or and with what where how many which does do yes no color shape word
    relative above below box point pointing hollow filled arranged scattered rows grid exactly first then second both
    more than has have happens moves move appears appear disappears disappear turns turn start end nothing
"""
VALUES = (*NUMBERS, *COLOURS, *SIZES, *POSITIONS, *DIRECTIONS, *EDGES, *WORDS)
#: Words that texts of canvases, pairs, clips and rows of two pictures are made of, besides punctuation.
VOCABULARY = tuple(
    sorted(
        {word for text in (SAID, *VALUES) for word in text.split()}
        | _plurals((*SHAPES, "object", "picture", "edge"))
        | {str(number) for number in range(101)}
    )
)
