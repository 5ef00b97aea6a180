"""Probes of how a model sees: of GPT-4V and LLaVA-1.5 in LLaVA-UHD (Xu et al. 2024, section 3 and appendix).

`coverage`, `useful` and `cut_boxes` look at a plan alone. `counting_by_position`, `counting_by_size` and
`padding_attack` draw pictures and put questions to whatever answers them (`Ask`): of a model of ours
`lambda images, questions: model.answer(model.frontend.tiles(images), questions)`, of others see `qformer.answering`.

The pictures are in `qformer.probing`.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from qformer.metrics.counts import parse_count
from qformer.probing.padding import padding_attack, padding_effect
from qformer.probing.pictures import GROUND, SLIMMEST, Ask, ask_all, draw_circles, draw_objects, require_numbers
from qformer.resolution.measures import fine_tiles, useful
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    "padding_effect",
    "useful",
]

HOW_MANY, HOW_MANY_CIRCLES = "how many objects are there?", "how many circles are there?"
#: Sides of the picture of nine circles: around the sizes where GPT-4V's answers change, 512 and 768.
SIZES = (256, 384, 512, 576, 640, 704, 768, 832, 896, 1024)
TILE = 512  # side of the tiles that these sizes are made for


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
        cells: the same for each cell, row by row.
    """

    mean: Tensor
    answers: Counter[int | None]
    cells: tuple[Counter[int | None], ...] = ()


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
    require_numbers(side=side, cells=cells, objects=objects, repeats=repeats)
    cell = side // cells
    drawings = [draw_objects(cell, objects, random.Random(f"{seed} {repeat}")) for repeat in range(repeats)]
    mean, found = torch.full((cells, cells), torch.nan), []
    for row in range(cells):
        for column in range(cells):
            pictures = []
            for drawing in drawings:
                picture = Image.new("RGB", (side, side), GROUND)
                picture.paste(drawing, (column * cell, row * cell))
                pictures.append(picture)
            counts = _counts(ask, pictures, HOW_MANY)
            found.append(Counter(counts))
            told = [float(count) for count in counts if count is not None]
            if told:
                mean[row, column] = sum(told) / len(told)
    return Heat(mean, sum(found, Counter[int | None]()), tuple(found))


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
    require_numbers(repeats=repeats)
    if not sizes:
        raise UsageError("got no sizes; give at least one side of a picture, in pixels")
    found = {}
    for size in sizes:
        require_numbers(size=size)
        if size < 6 * SLIMMEST:
            raise UsageError(f"nine circles in {size} x {size} pixels are too small; give {6 * SLIMMEST} or more")
    for size in sizes:
        pictures = [draw_circles(size, random.Random(f"{seed} {repeat}")) for repeat in range(repeats)]
        found[size] = Counter(_counts(ask, pictures, HOW_MANY_CIRCLES))
    return found


def _counts(ask: Ask, pictures: list[Image.Image], question: str) -> list[int | None]:
    return [parse_count(reply) for reply in ask_all(ask, pictures, [question] * len(pictures))]
