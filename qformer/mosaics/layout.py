"""Places of photos on a mosaic: a grid of two to four rows and columns, drawn before any photo is opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from qformer.resolution.base import Refused
from qformer.scenes.text import POSITIONS, pick

if TYPE_CHECKING:
    import numpy as np

    Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
    Grid = tuple[int, int]  # rows, columns

LEAST, MOST = 4, 16  # photos
SIDES = range(2, 5)  # rows and columns
SQUARE = 2.25  # greatest ratio of the sides of a cell
APART = 4  # least pixels between two photos
OWN = 0.5  # share of photos that keep their own size, of those that fit
SCALES = (0.6, 1.0)  # of the greatest size that fits, for the others
THIN = 16  # least pixels of a side of a photo
#: Number of row and column of three that one of two is called by, as `top left` in a grid of two rows and two columns.
OUTER = {2: (0, 2), 3: (0, 1, 2)}


@dataclass(frozen=True)
class Placement:
    """Place of one photo.

    Attributes:
        photo: number of the photo in its album.
        cell: row and column, from 0.
        scale: size as a share of the greatest that fits the cell; None is its own size, if that fits.
        shift: share of the free room of the cell that lies left of the photo and above it.
    """

    photo: int
    cell: tuple[int, int]
    scale: float | None
    shift: tuple[float, float]


@dataclass(frozen=True)
class Mosaic:
    """Photos in the cells of a grid, in reading order.

    Attributes:
        size: (width, height) of the canvas in pixels.
        grid: rows and columns; at least one of each is full.
        ground: gray of the canvas, 0..255.
        placed: the photos that are shown.
        absent: number of one that is not, and resembles none of them.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    ground: int
    placed: tuple[Placement, ...]
    absent: int

    @cached_property
    def names(self) -> dict[int, str]:
        """Names of the places by number of the photo, in reading order."""
        return {one.photo: place_name(self.grid, one.cell) for one in self.placed}

    def cell(self, one: Placement) -> Box:
        """Box of the cell that a photo lies in."""
        (width, height), (rows, columns), (row, column) = self.size, self.grid, one.cell
        left, right = (place * width // columns for place in (column, column + 1))
        top, bottom = (place * height // rows for place in (row, row + 1))
        return left, top, right, bottom

    def box(self, one: Placement, width: int, height: int) -> Box:
        """Box of a photo on the canvas.

        Args:
            width, height: of the photo, in pixels of its own.

        Raises:
            Refused: the photo is so thin that nothing of it would be seen.
        """
        left, top, right, bottom = self.cell(one)
        room = right - left - APART, bottom - top - APART
        fits = min(room[0] / width, room[1] / height)
        thin = THIN / min(width, height)
        if one.scale is None and fits >= 1 >= thin:
            scale = 1.0
        else:
            scale = min(max(fits * (SCALES[1] if one.scale is None else one.scale), thin), fits)
        wide, high = (min(round(side * scale), most) for side, most in zip((width, height), room, strict=True))
        if min(wide, high) < THIN:
            raise Refused(f"a photo of {width} x {height} pixels would be {wide} x {high} on the mosaic")
        x = left + APART // 2 + round(one.shift[0] * (room[0] - wide))
        y = top + APART // 2 + round(one.shift[1] * (room[1] - high))
        return x, y, x + wide, y + high


def place_name(grid: Grid, cell: tuple[int, int]) -> str:
    """Name of a cell: `top left` in grids of up to three rows and columns, `row 2, column 3` in others."""
    if max(grid) > max(OUTER):
        return f"row {cell[0] + 1}, column {cell[1] + 1}"
    row, column = (OUTER[number][place] for number, place in zip(grid, cell, strict=True))
    return POSITIONS[3 * row + column]


def at(name: str) -> str:
    """Phrase of a place: `at the top left`, `in row 2, column 3`."""
    return f"in {name}" if name.startswith("row ") else f"at the {name}"


def grids(number: int) -> list[Grid]:
    """List the grids for so many photos, with so few empty cells that a row and a column are full and can be seen."""
    return [(rows, columns) for rows in SIDES for columns in SIDES if 0 <= rows * columns - number < min(rows, columns)]


@lru_cache
def place_shares(numbers: tuple[int, int]) -> dict[str, float]:
    """Share of the photos at each place to ask about, so that all places are equally frequent answers.

    Args:
        numbers: least and greatest number of photos, all of which are equally frequent.
    """
    offered: dict[str, float] = {}
    for number in range(numbers[0], numbers[1] + 1):
        for rows, columns in grids(number):
            for cell in ((row, column) for row in range(rows) for column in range(columns)):
                name = place_name((rows, columns), cell)
                offered[name] = offered.get(name, 0) + 1 / (len(grids(number)) * rows * columns)
    rarest = min(offered.values())
    return {name: rarest / frequency for name, frequency in offered.items()}


def lay_out(
    rng: np.random.Generator, numbers: tuple[int, int], sides: tuple[int, int]
) -> tuple[tuple[int, int], Grid, list[tuple[int, int]]]:
    """Draw the size of a canvas, a grid with cells that are not too thin, and the cells that photos lie in."""
    number = int(rng.integers(numbers[0], numbers[1] + 1))
    rows, columns = grid = pick(rng, grids(number))
    while True:
        width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
        if 1 / SQUARE <= (width / columns) / (height / rows) <= SQUARE:
            break
    filled = sorted(rng.choice(rows * columns, number, replace=False).tolist())
    return (width, height), grid, [divmod(place, columns) for place in filled]


def place_photo(rng: np.random.Generator, photo: int, cell: tuple[int, int]) -> Placement:
    """Draw the size and the place of a photo within its cell."""
    own, scale, *shift = rng.random(4).tolist()
    least, greatest = SCALES
    return Placement(photo, cell, None if own < OWN else least + scale * (greatest - least), (shift[0], shift[1]))
