"""Composition of canvases: how many objects in which groups, where they lie, then their shapes and colors.

Numbers, groups, sizes and places are drawn first, then shapes and colors until the split allows them. So the split does
not bias the former, and its rule does not bias the latter.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, permutations
from typing import TYPE_CHECKING

import numpy as np

from qformer.canvases.canvas import (
    BANDS,
    DIRECTIONS,
    EDGES,
    GROUND,
    POINTING,
    SHAPES,
    SIDES,
    TOLD,
    Box,
    Canvas,
    CanvasObject,
    cell_relations,
    inside,
    pair_held_out,
    relation_held_out,
)
from qformer.scenes.text import COLOURS, GROUPINGS, SIZES, WORDS, pick

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS = 4  # most groups of a crowd
ARRANGED = 6  # least objects in rows or a grid; fewer could lie so by chance
APART = 4  # least pixels between two objects
PITCH = SIDES["large"][1] + APART + 2  # room for an object
FILL = 0.7  # share of that room that a crowd may take, since it is scattered
CLEAR = 1 / 8  # least distance of a told object's center from the border of its cell, as a fraction of the cell
SIZES_COUNTED = 128  # along each side, to tell how many sizes have room
TRIES = 12  # places tried for an object, before all are scattered again
BANDED = 0.4  # share of canvases with bands along edges
HOLLOW = 0.35  # share of hollow groups
WRITTEN = 0.6  # share of objects with a word, of those that are told, large and filled
#: By split the weight of arrows, of which two of eight combinations are held out, not one: they stay about as frequent.
ARROWS = {"train": 7 / 6, "val": 7 / 6, "test": 4 / 5, "any": 1.0}
#: Remainder modulo 3 of the shade of the ground, so that no two splits ever share a picture.
SHADES = {"train": 0, "val": 1, "test": 2}

Corner = tuple[int, int]  # left, top
Cell = tuple[int, int]  # row, column


@dataclass(frozen=True)
class Shell:
    """All of a canvas but its objects: what they must fit into."""

    width: int
    height: int
    edges: tuple[str | None, str | None, str | None, str | None]
    band: int

    @classmethod
    def of(cls, canvas: Canvas) -> Shell:
        """Shell of a canvas that there is."""
        return cls(canvas.width, canvas.height, canvas.edges, canvas.band)

    @property
    def box(self) -> Box:
        """Part of the canvas in which objects may lie."""
        return inside(self.width, self.height, self.edges, self.band)

    def span(self, cell: Cell, side: int) -> Box:
        """Least and greatest left and top of an object whose center is plainly in a cell, the last two included.

        Empty, with the greatest below the least, where it would leave `box`.
        """
        left, top, right, bottom = self.box
        row, column = cell
        x, y = self.width / 3, self.height / 3
        return (
            max(left, math.ceil((column + CLEAR) * x - side / 2)),
            max(top, math.ceil((row + CLEAR) * y - side / 2)),
            min(right - side, math.floor((column + 1 - CLEAR) * x - side / 2)),
            min(bottom - side, math.floor((row + 1 - CLEAR) * y - side / 2)),
        )


def room(width: int, height: int) -> int:
    """Greatest number of objects on a canvas of this size."""
    cells = max((width - 20) // PITCH, 1) * max((height - 20) // PITCH, 1)
    return cells if cells <= TOLD else max(int(FILL * cells), TOLD)


def draw_size(rng: np.random.Generator, sides: tuple[int, int], aspect: float) -> tuple[int, int]:
    """Draw (width, height) in a range of sides, small ones as often as large ones by their logarithm."""
    low, high = math.log(sides[0]), math.log(sides[1] + 1)
    while True:
        width, height = (min(int(math.exp(one)), sides[1]) for one in rng.uniform(low, high, 2))
        if max(width, height) <= aspect * min(width, height):
            return max(width, sides[0]), max(height, sides[0])


@lru_cache
def share_with_room(sides: tuple[int, int], aspect: float, count: int) -> float:
    """Share of the sizes that `draw_size` draws which have room for so many objects, counted on a grid of sizes."""
    if room(sides[0], sides[0]) >= count:
        return 1.0
    low, high = math.log(sides[0]), math.log(sides[1] + 1)
    steps = [int(math.exp(low + (high - low) * (step + 0.5) / SIZES_COUNTED)) for step in range(SIZES_COUNTED)]
    sizes = Counter((w, h) for w in steps for h in steps if max(w, h) <= aspect * min(w, h))
    return sum(number for size, number in sizes.items() if room(*size) >= count) / sizes.total()


def draw_groups(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """Draw the sizes of the groups of so many objects."""
    if count <= TOLD:
        return pick(rng, GROUPINGS[count])
    groups = int(rng.integers(1, GROUPS + 1))
    cuts = sorted((1 + rng.permutation(count - 1)[: groups - 1]).tolist())
    return tuple(b - a for a, b in zip((0, *cuts), (*cuts, count), strict=True))


def draw_layout(rng: np.random.Generator, groups: Sequence[int]) -> str:
    """Draw a layout that so many objects can have: a grid is for equal objects in complete rows."""
    count = sum(groups)
    if count < ARRANGED:
        return "scattered"
    return pick(rng, ("scattered", "rows", "grid") if len(groups) == 1 and grids(count) else ("scattered", "rows"))


def grids(count: int) -> list[tuple[int, int]]:
    """List (rows, columns) of grids of so many objects, at least two of each."""
    return [(rows, count // rows) for rows in range(2, count // 2 + 1) if count % rows == 0]


def compose(
    rng: np.random.Generator, split: str, objects: tuple[int, int], sides: tuple[int, int], aspect: float
) -> Canvas:
    """Compose a canvas of a split, with a number of objects and a size in the given ranges."""
    count = int(rng.integers(objects[0], objects[1] + 1))
    groups = draw_groups(rng, count)
    members = rng.permutation([group for group, size in enumerate(groups) for _ in range(size)]).tolist()
    told = [count <= TOLD or groups[group] == 1 for group in members]
    free = iter(rng.permutation(9).tolist())
    cells = [divmod(next(free), 3) if one else None for one in told]  # different, so that a position names one
    layout = draw_layout(rng, groups)
    tries = 0
    while True:
        tries += 1
        if tries == 100 and layout != "scattered":  # it may fit no canvas of these sizes
            layout = "scattered"
        size = draw_size(rng, sides, aspect)
        if room(*size) < count:
            continue
        shell = _draw_shell(rng, size)
        own = [int(rng.integers(SIDES[name][0], SIDES[name][1] + 1)) for name in (pick(rng, SIZES) for _ in groups)]
        corners = _PLACE[layout](rng, shell, [own[group] for group in members], cells)
        if corners is not None:
            break
    looks = [(own[group], bool(rng.random() < HOLLOW), pick(rng, DIRECTIONS)) for group in range(len(groups))]
    words = _draw_words(rng, [looks[group] for group in members], told)
    ground = draw_ground(rng, split)
    items = []
    for (left, top), group, word in zip(corners, members, words, strict=True):
        side, hollow, direction = looks[group]
        middle = left + side / 2, top + side / 2
        items.append((group, CanvasObject("", "", *middle, side, word, direction, hollow)))
    bare = Canvas(*size, (), ground, shell.edges, layout, shell.band)
    items.sort(key=lambda one: bare.order(one[1]))
    kinds = _draw_kinds(rng, split, bare, items, [direction for _, _, direction in looks])
    return replace(bare, objects=tuple(_finish(item, *kinds[group]) for group, item in items))


def _finish(item: CanvasObject, shape: str, colour: str) -> CanvasObject:
    direction = item.direction if shape in POINTING else None
    return replace(item, shape=shape, colour=colour, direction=direction, word=None if shape == "arrow" else item.word)


def _draw_shell(rng: np.random.Generator, size: tuple[int, int]) -> Shell:
    """Draw the bands along the edges: on some canvases one to four, of any colors."""
    edges: list[str | None] = [None] * len(EDGES)
    if rng.random() < BANDED:
        while not any(edges):
            edges = [pick(rng, COLOURS) if rng.random() < 0.5 else None for _ in EDGES]
    left, right, top, bottom = edges
    return Shell(*size, (left, right, top, bottom), int(rng.integers(BANDS[0], BANDS[1] + 1)))


def _draw_words(
    rng: np.random.Generator, looks: Sequence[tuple[int, bool, str]], told: Sequence[bool]
) -> list[str | None]:
    """Draw different words for some of the objects on which they can be read and are told."""
    words = [WORDS[i] for i in rng.permutation(len(WORDS))]
    fit = [one and side >= SIDES["large"][0] and not hollow for (side, hollow, _), one in zip(looks, told, strict=True)]
    return [word if one and rng.random() < WRITTEN else None for one, word in zip(fit, words, strict=False)]


def draw_ground(rng: np.random.Generator, split: str) -> int:
    """Draw a shade of gray that no other split has; `any`, for texts alone, takes all."""
    if split not in SHADES:
        return int(rng.integers(GROUND[0], GROUND[1] + 1))
    return pick(rng, [shade for shade in range(GROUND[0], GROUND[1] + 1) if shade % 3 == SHADES[split]])


def _draw_kinds(
    rng: np.random.Generator,
    split: str,
    bare: Canvas,
    items: Sequence[tuple[int, CanvasObject]],
    directions: Sequence[str],
) -> list[tuple[str, str]]:
    """Draw a different shape and color for each group, until the split allows them."""
    cells = [{bare.cell(item) for group, item in items if group == one} for one in range(len(directions))]
    stands = {
        (a, b): {relation for one in cells[a] for other in cells[b] for relation in cell_relations(one, other)}
        for a, b in permutations(range(len(cells)), 2)
    }
    shares = np.array([ARROWS[split] if shape == "arrow" else 1.0 for shape in SHAPES])
    edges = np.cumsum(shares / shares.sum())
    while True:
        shapes = [SHAPES[min(int(np.searchsorted(edges, one)), len(SHAPES) - 1)] for one in rng.random(len(cells))]
        kinds = [(shape, pick(rng, COLOURS)) for shape in shapes]
        if len(set(kinds)) < len(kinds):
            continue
        new = any(pair_held_out(*kind, direction) for kind, direction in zip(kinds, directions, strict=True)) or any(
            relation_held_out(shapes[a], relation, shapes[b]) for (a, b), found in stands.items() for relation in found
        )
        if split == "any" or new == (split == "test"):
            return kinds


def scatter(
    rng: np.random.Generator, shell: Shell, sides: Sequence[int], cells: Sequence[Cell | None]
) -> list[Corner] | None:
    """Find places apart from each other, first of those with a cell; None if there is no room for one."""
    first, top, last, bottom = shell.box
    placed: dict[int, Corner] = {}
    draws = rng.random((len(sides), TRIES, 2)).tolist()
    for number in sorted(range(len(sides)), key=lambda one: cells[one] is None):
        side, cell = sides[number], cells[number]
        span = (first, top, last - side, bottom - side) if cell is None else shell.span(cell, side)
        if span[2] < span[0] or span[3] < span[1]:
            return None
        for u, v in draws[number]:
            x, y = span[0] + int(u * (span[2] - span[0] + 1)), span[1] + int(v * (span[3] - span[1] + 1))
            if all(are_apart((x, y), side, corner, sides[other]) for other, corner in placed.items()):
                placed[number] = (x, y)
                break
        else:
            return None
    return [placed[number] for number in range(len(sides))]


def find_place(
    rng: np.random.Generator, canvas: Canvas, side: int, cell: Cell, others: Sequence[CanvasObject]
) -> Corner | None:
    """Find a place for an object in a cell of a canvas, apart from others; None if there is no room."""
    left, top, right, bottom = Shell.of(canvas).span(cell, side)
    if right < left or bottom < top:
        return None
    for u, v in rng.random((TRIES, 2)).tolist():
        corner = left + int(u * (right - left + 1)), top + int(v * (bottom - top + 1))
        if all(are_apart(corner, side, other.box[:2], other.side) for other in others):
            return corner
    return None


def are_apart(a: Corner, side: int, b: Corner, other: int) -> bool:
    (x, y), (u, v) = a, b
    return x >= u + other + APART or u >= x + side + APART or y >= v + other + APART or v >= y + side + APART


def _line_up(
    rng: np.random.Generator, shell: Shell, sides: Sequence[int], cells: Sequence[Cell | None]
) -> list[Corner] | None:
    """Find places in two to four rows of any lengths, each as far below the last, with any gaps within a row."""
    left, top, right, bottom = shell.box
    rows = int(rng.integers(2, min(4, len(sides) // 2) + 1))
    largest = max(sides)
    pitch = _draw_pitch(rng, largest, rows, bottom - top)
    if pitch is None:
        return None
    start = top + int(rng.integers(bottom - top - (rows - 1) * pitch - largest + 1))
    cuts = sorted((1 + rng.permutation(len(sides) - 1)[: rows - 1]).tolist())
    corners: list[Corner] = []
    lefts: list[list[int]] = []
    for row, (first, last) in enumerate(zip((0, *cuts), (*cuts, len(sides)), strict=True)):
        own = sides[first:last]
        free = right - left - sum(own) - (len(own) - 1) * (APART + 2)
        if len(own) < 2 or free < 0:
            return None
        gaps = sorted(rng.integers(free + 1, size=len(own)).tolist())
        x = left
        for side, gap in zip(own, gaps, strict=True):
            corners.append((x + gap, start + row * pitch + (largest - side) // 2))
            x += side + APART + 2
        lefts.append([x for x, _ in corners[first:]])
    if len(set(sides)) == 1 and _looks_like_a_grid(lefts):
        return None  # where there is little room, gaps are alike
    return _if_clear(shell, corners, sides, cells)


def _looks_like_a_grid(rows: Sequence[Sequence[int]]) -> bool:
    """Check if rows of as many equal objects have the steps and places of a grid, but for a few pixels."""
    if len({len(row) for row in rows}) > 1:
        return False
    lines = [*zip(*rows, strict=True), *([b - a for a, b in pairwise(row)] for row in rows)]
    return all(max(line) - min(line) <= APART for line in lines)


def _grid(
    rng: np.random.Generator, shell: Shell, sides: Sequence[int], cells: Sequence[Cell | None]
) -> list[Corner] | None:
    """Find places in a grid of equal steps."""
    left, top, right, bottom = shell.box
    rows, columns = pick(rng, grids(len(sides)))
    side = sides[0]
    across, down = _draw_pitch(rng, side, columns, right - left), _draw_pitch(rng, side, rows, bottom - top)
    if across is None or down is None:
        return None
    x = left + int(rng.integers(right - left - (columns - 1) * across - side + 1))
    y = top + int(rng.integers(bottom - top - (rows - 1) * down - side + 1))
    corners = [(x + column * across, y + row * down) for row in range(rows) for column in range(columns)]
    return _if_clear(shell, corners, sides, cells)


def _draw_pitch(rng: np.random.Generator, side: int, number: int, length: int) -> int | None:
    """Draw the distance from one of `number` objects in a line of this length to the next, at most twice their side."""
    least = side + APART + 2
    most = min((length - side) // (number - 1), 2 * side)
    return int(rng.integers(least, most + 1)) if most >= least else None


def _if_clear(
    shell: Shell, corners: list[Corner], sides: Sequence[int], cells: Sequence[Cell | None]
) -> list[Corner] | None:
    """Return places in rows if each told object is plainly in a cell, whichever, where no other one is told."""
    taken: set[Cell] = set()
    for (x, y), side, told in zip(corners, sides, cells, strict=True):
        if told is None:
            continue
        cell = int(3 * (y + side / 2) // shell.height), int(3 * (x + side / 2) // shell.width)
        left, top, right, bottom = shell.span(cell, side)
        if cell in taken or not (left <= x <= right and top <= y <= bottom):
            return None
        taken.add(cell)
    return corners


_PLACE = {"scattered": scatter, "rows": _line_up, "grid": _grid}
