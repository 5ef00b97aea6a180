"""Canvases: pictures of any size, on which objects are as many pixels large as they are on every other canvas.

A `Scene` is drawn at any size, and its objects grow with it. A `Canvas` has a size of its own, 120 to 480 pixels a
side, and one to sixteen objects of 24 to 40 pixels, so that what is seen of it depends on how it is cut or shrunk.

Some combinations are held out of training, as in `qformer.scenes.text`, with `arrow` after the eight shapes there:

*   one color per shape (a green circle, a blue square, ...); of arrows, one direction per color;
*   one order per pair of adjacent shapes: a shape to the left of, or above, the next one. The arrow is the last, and
    the circle comes after it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from qformer.scenes.text import COLOURS, POSITIONS
from qformer.scenes.text import SHAPES as PLAIN_SHAPES
from qformer.scenes.text import pair_held_out as plain_pair_held_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHAPES = (*PLAIN_SHAPES, "arrow")
DIRECTIONS = ("up", "right", "down", "left")  # clockwise
POINTING = ("triangle", "arrow")  # shapes that have a direction
EDGES = ("left", "right", "top", "bottom")
LAYOUTS = ("scattered", "rows", "grid")
SIDES = {"small": (24, 29), "large": (34, 40)}  # pixels, both included
MOST = 16  # objects
TOLD = 4  # greatest number of objects that a description tells one by one
GROUND = (125, 165)  # shades of gray on which black, white and every color stand out, both included
BANDS = (6, 10)  # pixels, both included

Box = tuple[int, int, int, int]  # left, top, right, bottom
Pair = tuple[str, str]  # shape and color


@dataclass(frozen=True)
class CanvasObject:
    """Object on a canvas.

    Attributes:
        shape, colour: one of `SHAPES`, and of `qformer.scenes.text.COLOURS`.
        x, y: center, in pixels from the left and from the top.
        side: side of the square that it fills, in whole pixels; 24 to 29 is small, 34 to 40 large.
        word: word on it, one of `WORDS`; only on large objects that are not hollow, and never on an arrow.
        direction: where it points, one of `DIRECTIONS`, for the shapes `POINTING`; None for others.
        hollow: only its outline is drawn.
    """

    shape: str
    colour: str
    x: float
    y: float
    side: int
    word: str | None = None
    direction: str | None = None
    hollow: bool = False

    @property
    def size(self) -> str:
        """`small` or `large`."""
        return "large" if self.side >= SIDES["large"][0] else "small"

    @property
    def state(self) -> str:
        """`hollow` or `filled`."""
        return "hollow" if self.hollow else "filled"

    @property
    def pair(self) -> Pair:
        return self.shape, self.colour

    @property
    def box(self) -> Box:
        """Extent of what is drawn, in whole pixels: left, top, right, bottom, the last two exclusive."""
        left, top = round(self.x - self.side / 2), round(self.y - self.side / 2)
        return left, top, left + self.side, top + self.side


@dataclass(frozen=True)
class Canvas:
    """Objects on a gray ground, in reading order of their positions, with different words.

    Attributes:
        width, height: in pixels.
        objects: at most four, or few groups: the objects of one shape and color of a crowd (`crowded`) are alike.
        ground: shade of gray, 0..255.
        edges: colors of the bands along the edges `EDGES`, None where there is none.
        layout: one of `LAYOUTS`.
        band: width of the bands, in pixels.
    """

    width: int
    height: int
    objects: tuple[CanvasObject, ...]
    ground: int
    edges: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)
    layout: str = "scattered"
    band: int = 8

    @property
    def crowded(self) -> bool:
        """True if texts tell groups of several objects by their number, without positions."""
        return len(self.objects) > TOLD

    def cell(self, item: CanvasObject) -> tuple[int, int]:
        """(row, column) of the center of an object, by thirds of the canvas."""
        return int(3 * item.y // self.height), int(3 * item.x // self.width)

    def position(self, item: CanvasObject) -> str:
        """One of the nine `POSITIONS`."""
        row, column = self.cell(item)
        return POSITIONS[3 * row + column]

    def order(self, item: CanvasObject) -> tuple[int, int, float, float]:
        """Key that sorts objects in reading order."""
        return (*self.cell(item), item.y, item.x)

    def with_objects(self, objects: Iterable[CanvasObject]) -> Canvas:
        """The same canvas with other objects, which are sorted."""
        return replace(self, objects=tuple(sorted(objects, key=self.order)))

    def box(self, item: CanvasObject) -> Box:
        """Box of an object in hundredths of the width and the height, rounded to whole numbers."""
        left, top, right, bottom = item.box
        across, down = 100 / self.width, 100 / self.height
        return round(left * across), round(top * down), round(right * across), round(bottom * down)

    @cached_property
    def numbers(self) -> Counter[str | Pair]:
        """Numbers of objects by shape, by color, and by both."""
        return Counter(key for item in self.objects for key in (item.shape, item.colour, item.pair))

    def alike(self, item: CanvasObject) -> int:
        """Number of objects of its shape and color, itself included."""
        return self.numbers[item.pair]

    def told(self) -> tuple[CanvasObject, ...]:
        """Objects that a description tells one by one: all, or those of a crowd that are the only one of their kind."""
        return self._told

    @cached_property
    def _told(self) -> tuple[CanvasObject, ...]:
        return tuple(item for item in self.objects if not self.crowded or self.alike(item) == 1)


def inside(width: int, height: int, edges: tuple[str | None, ...], band: int) -> Box:
    """Part of a canvas where objects may lie, which keeps clear of its border and of the bands."""
    left, right, top, bottom = (band + 4 if colour else 3 for colour in edges)
    return left, top, width - right, height - bottom


def relations(canvas: Canvas, a: CanvasObject, b: CanvasObject) -> tuple[str, ...]:
    """List the relations of `a` to `b` by their cells: one in the same row or column of cells, two on a diagonal."""
    return cell_relations(canvas.cell(a), canvas.cell(b))


def cell_relations(a: tuple[int, int], b: tuple[int, int]) -> tuple[str, ...]:
    """List the relations of one cell (row, column) to another."""
    (row, column), (other_row, other_column) = a, b
    horizontal = ("left",) if column < other_column else ("right",) if column > other_column else ()
    vertical = ("above",) if row < other_row else ("below",) if row > other_row else ()
    return horizontal + vertical


def plain_relation(canvas: Canvas, a: CanvasObject, b: CanvasObject) -> str | None:
    """Relation of `a` to `b`, if their cells have one and one distance is at least twice the other; else None."""
    found = relations(canvas, a, b)
    along, across = abs(a.x - b.x), abs(a.y - b.y)
    if found and found[0] in ("above", "below"):
        along, across = across, along
    return found[0] if len(found) == 1 and along >= 2 * across else None


def pair_held_out(shape: str, colour: str, direction: str | None = None) -> bool:
    """Check if a shape and color, of an arrow also the direction, are held out: no training canvas has them.

    An arrow without a direction is never held out, since every color of it is shown.
    """
    if shape != "arrow":
        return plain_pair_held_out((shape, colour))
    return direction is not None and COLOURS.index(colour) % len(DIRECTIONS) == DIRECTIONS.index(direction)


def relation_held_out(shape: str, relation: str, other: str) -> bool:
    """Check if a relation of a shape to another one is held out: no training canvas has it."""
    step = (SHAPES.index(other) - SHAPES.index(shape)) % len(SHAPES)
    return step == (1 if relation in ("left", "above") else len(SHAPES) - 1)


def held_out(canvas: Canvas) -> bool:
    """Check if a canvas has a combination that is held out; training has none, a test canvas at least one."""
    return any(pair_held_out(item.shape, item.colour, item.direction) for item in canvas.objects) or any(
        relation_held_out(a.shape, relation, b.shape)
        for a, b in _ordered(canvas)
        for relation in relations(canvas, a, b)
    )


def _ordered(canvas: Canvas) -> Iterator[tuple[CanvasObject, CanvasObject]]:
    return ((a, b) for a in canvas.objects for b in canvas.objects if a is not b)
