"""Probes of how a model sees: of GPT-4V and LLaVA-1.5 in LLaVA-UHD (Xu et al. 2024, section 3 and appendix).

`coverage`, `useful` and `cut_boxes` look at a plan alone. `counting_by_position`, `counting_by_size` and
`padding_attack` draw pictures and put questions to whatever answers them (`Ask`): of a model of ours
`lambda images, questions: model.answer(model.frontend.tiles(images), questions)`, of others see `qformer.answering`.

The pictures are exact: one color a thing, no soft edges, so that whoever reads the pixels is never wrong. Lengths of
things follow the side of the picture; a model with small tiles is asked about small pictures.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from qformer.metrics.counts import parse_color, parse_count
from qformer.resolution.measures import fine_tiles, useful
from qformer.scenes.scenes import OUTLINES, RGB
from qformer.types import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from qformer.types import Plan, Tile

__all__ = [
    "Ask",
    "Heat",
    "counting_by_position",
    "counting_by_size",
    "coverage",
    "cut_boxes",
    "padding_attack",
    "useful",
]

#: Answers to B questions, each about its own picture.
Ask = Callable[[list[Image.Image], list[str]], list[str]]
Color = tuple[int, int, int]

COLORS, SHAPES = ("red", "green", "white"), ("circle", "triangle", "square")
GROUND: Color = (110, 110, 110)  # behind objects: a gray as in the drawn worlds
HOW_MANY, HOW_MANY_CIRCLES = "how many objects are there?", "how many circles are there?"
#: Sides of the picture of nine circles: around the sizes where GPT-4V's answers change, 512 and 768.
SIZES = (256, 384, 512, 576, 640, 704, 768, 832, 896, 1024)
TILE = 512  # side of the tiles that these sizes are made for
SLIMMEST = 6  # pixels of an object
FILL: Color = (122, 116, 104)
ASPECTS = ((1, 9), (1, 2), (2, 3), (3, 2), (2, 1), (9, 1))  # width, height
SIDES = ("left", "right", "top", "bottom")
RECTANGLES = ("red", "green", "blue")
EDGE = "what color is the {} edge?"


def scaled(length: int, tile: int) -> int:
    """A length that is made for tiles of 512 pixels, for tiles of another size: 768 is 180 for tiles of 120."""
    return round(length * tile / TILE)


def coverage(plan: Plan, columns: int, rows: int) -> Tensor:
    """Count in how many tiles of the fine view the middle of each cell of the picture is seen, long[rows, columns].

    An overview does not count, unless it is all there is. A middle on the seam of two tiles is seen in the second.

    Args:
        columns, rows: cells into which the picture is divided evenly.

    Raises:
        UsageError: no cells, or a plan of several pictures.
    """
    if columns < 1 or rows < 1:
        raise UsageError(f"got {columns} x {rows} cells; give 1 or more each way")
    seen = torch.zeros(rows, columns, dtype=torch.long)
    for tile in _fine(plan):
        across = [_sees(tile, 0, (2 * column + 1, 2 * columns)) for column in range(columns)]
        down = [_sees(tile, 1, (2 * row + 1, 2 * rows)) for row in range(rows)]
        seen += torch.tensor(down)[:, None] & torch.tensor(across)[None]
    return seen


def cut_boxes(plan: Plan, boxes: Sequence[tuple[float, float, float, float]]) -> list[bool]:
    """Tell for each box if no tile of the fine view shows it whole.

    Args:
        boxes: (left, top, right, bottom) in pixels of the picture, right and bottom exclusive.

    Raises:
        UsageError: a box that is empty or not inside the picture, or a plan of several pictures.
    """
    width, height = plan.image
    for box in boxes:
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UsageError(f"the box {tuple(box)} is empty, or not inside the picture of {width} x {height} pixels")
    tiles = _fine(plan)
    return [not any(_holds(tile, plan.image, box) for tile in tiles) for box in boxes]


def _fine(plan: Plan) -> list[Tile]:
    if plan.parts:
        raise UsageError(f"the plan shows {len(plan.parts)} pictures; give the plan of one")
    return fine_tiles(plan)


def _sees(tile: Tile, axis: int, share: tuple[int, int]) -> bool:
    """Tell if a tile sees the place at a share of the picture's side, a fraction, in whole numbers."""
    part, whole = share
    place = tile.offset[axis] * whole + tile.content[axis] * part
    return tile.box[axis] * whole <= place < tile.box[axis + 2] * whole


def _holds(tile: Tile, image: tuple[int, int], box: tuple[float, float, float, float]) -> bool:
    """Tell if a tile shows all of a box; both sides are multiplied by the picture's, so whole numbers stay exact."""
    for axis in (0, 1):
        shift, zoom, side = tile.offset[axis] * image[axis], tile.content[axis], image[axis]
        if shift + box[axis] * zoom < tile.box[axis] * side:
            return False
        if shift + box[axis + 2] * zoom > tile.box[axis + 2] * side:
            return False
    return True


@dataclass(frozen=True)
class Heat:
    """Answers by where the objects were.

    Attributes:
        mean: float[rows, columns], mean answer for objects in each cell; nan where no answer held a number.
        answers: how often each number was answered in all cells together; None: no number.
    """

    mean: Tensor
    answers: Counter[int | None]


def counting_by_position(
    ask: Ask, side: int = 768, cells: int = 3, objects: int = 4, repeats: int = 15, seed: int = 0
) -> Heat:
    """Let a few objects be counted that stand in one cell of a picture, for each cell.

    A model that counts what is there answers alike everywhere. One that counts tile by tile counts an object as often
    as it has tiles that see it. The drawings of a repeat are the same in all cells, so nothing but the place differs.

    Args:
        ask: is called once for each cell, row by row.
        side: of the square picture, in pixels. cells: along each side.
        repeats: drawings of so many objects, of 3 colors and 3 shapes.

    Raises:
        UsageError: a number below 1, objects that would be too small, or `ask` does not answer each question.
    """
    _require(side=side, cells=cells, objects=objects, repeats=repeats)
    cell = side // cells
    drawings = [_draw_objects(cell, objects, random.Random(f"{seed} {repeat}")) for repeat in range(repeats)]
    mean, answers = torch.full((cells, cells), torch.nan), Counter[int | None]()
    for row in range(cells):
        for column in range(cells):
            pictures = []
            for drawing in drawings:
                picture = Image.new("RGB", (side, side), GROUND)
                picture.paste(drawing, (column * cell, row * cell))
                pictures.append(picture)
            counts = _counts(ask, pictures, HOW_MANY)
            answers.update(counts)
            told = [float(count) for count in counts if count is not None]
            if told:
                mean[row, column] = sum(told) / len(told)
    return Heat(mean, answers)


def _draw_objects(side: int, objects: int, rng: random.Random) -> Image.Image:
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


def counting_by_size(
    ask: Ask, sizes: Sequence[int] = SIZES, repeats: int = 30, seed: int = 0
) -> dict[int, Counter[int | None]]:
    """Let nine circles be counted, three in each of three rows, in a square picture of several sizes.

    Where the answers change, a strategy changes: GPT-4V's did at about 512 and 768 pixels.

    Args:
        ask: is called once for each size.
        sizes: sides of the picture, in pixels.
        repeats: pictures of each size; the circles' color and radius vary, and are the same at all sizes.

    Returns:
        How often each number was answered, by size; None: no number.

    Raises:
        UsageError: no sizes, a number below 1, circles that would be too small, or too few answers of `ask`.
    """
    _require(repeats=repeats)
    if not sizes:
        raise UsageError("got no sizes; give at least one side of a picture, in pixels")
    found = {}
    for size in sizes:
        _require(size=size)
        if size < 6 * SLIMMEST:
            raise UsageError(f"nine circles in {size} x {size} pixels are too small; give {6 * SLIMMEST} or more")
    for size in sizes:
        pictures = [_draw_circles(size, random.Random(f"{seed} {repeat}")) for repeat in range(repeats)]
        found[size] = Counter(_counts(ask, pictures, HOW_MANY_CIRCLES))
    return found


def _draw_circles(size: int, rng: random.Random) -> Image.Image:
    color, share = rng.choice(COLORS), rng.uniform(0.45, 0.75)
    picture = Image.new("RGB", (size, size), GROUND)
    pen = ImageDraw.Draw(picture)
    length = max(round(share * size / 3), SLIMMEST)
    for place in range(9):
        corner = [round((2 * lane + 1) * size / 6 - length / 2) for lane in (place % 3, place // 3)]
        _draw(pen, "circle", RGB[color], corner, length)
    return picture


def padding_attack(
    ask: Ask, fill: Color = FILL, side: int = 512, repeats: int = 5, seed: int = 0, question: str = EDGE
) -> dict[str, dict[str, float]]:
    """Ask for the color at the edges of a square that is all `fill` but for a rectangle in its middle.

    Who has learned that `fill` is padding, and padding is nothing, names the color of the rectangle.

    Args:
        ask: is called once for each aspect ratio of the rectangle.
        fill: RGB of the square; by default LLaVA-1.5's padding, the mean of CLIP's pictures.
        side: of the square, in pixels.
        repeats: sizes of each rectangle; it is red, green and blue, and of six aspect ratios.
        question: with {} for `left`, `right`, `top` or `bottom`.

    Returns:
        Shares in 0..1 of answers that name the rectangle's color, for rectangles narrower than high (`<1:1`) and wider
        (`>1:1`), by the side asked for.

    Raises:
        UsageError: a number below 1, a rectangle too thin to see, a fill that is no color or that of a rectangle, a
            question without its {}, or too few answers of `ask`.
    """
    _require(side=side, repeats=repeats)
    if len(fill) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in fill):
        raise UsageError(f"the fill is {fill}; give red, green and blue, each 0 to 255")
    if tuple(fill) in {RGB[color] for color in RECTANGLES}:
        raise UsageError(f"the fill {fill} is the color of a rectangle, which nobody would see; give another")
    if "{}" not in question:
        raise UsageError(f"the question '{question}' does not say which edge; put {{}} where left or right goes")
    fooled = {kind: dict.fromkeys(SIDES, 0) for kind in ("<1:1", ">1:1")}
    for aspect in ASPECTS:
        rows = []
        for repeat in range(repeats):
            long = random.Random(f"{seed} {repeat}").uniform(0.6, 0.85) * side
            rows += [
                (_draw_rectangle(side, aspect, long, color, fill), color, edge)
                for color in RECTANGLES
                for edge in SIDES
            ]
        told = _answers(ask, [picture for picture, _, _ in rows], [question.format(edge) for _, _, edge in rows])
        for (_, color, edge), reply in zip(rows, told, strict=True):
            fooled["<1:1" if aspect[0] < aspect[1] else ">1:1"][edge] += parse_color(reply) == color
    asked = len(RECTANGLES) * repeats * len(ASPECTS) / 2
    return {kind: {edge: count / asked for edge, count in counts.items()} for kind, counts in fooled.items()}


def _draw_rectangle(side: int, aspect: tuple[int, int], long: float, color: str, fill: Color) -> Image.Image:
    width, height = (round(long * part / max(aspect)) for part in aspect)
    if min(width, height) < SLIMMEST / 2:
        raise UsageError(f"a rectangle of {width} x {height} pixels is too thin to see; give a larger side than {side}")
    picture = Image.new("RGB", (side, side), tuple(fill))
    picture.paste(RGB[color], ((side - width) // 2, (side - height) // 2, (side + width) // 2, (side + height) // 2))
    return picture


def _require(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise UsageError(f"{name} is {number}; give a whole number of 1 or more")


def _counts(ask: Ask, pictures: list[Image.Image], question: str) -> list[int | None]:
    return [parse_count(reply) for reply in _answers(ask, pictures, [question] * len(pictures))]


def _answers(ask: Ask, pictures: list[Image.Image], questions: list[str]) -> list[str]:
    """Replies as texts, one for each question.

    Raises:
        UsageError: too few or too many came.
    """
    told = [str(reply) for reply in ask(pictures, questions)]
    if len(told) != len(questions):
        raise UsageError(f"{len(questions)} questions were asked and {len(told)} answers came; give one for each")
    return told
