"""The strategy of InternVL 1.5: square tiles in the grid whose aspect ratio is nearest, and a thumbnail behind them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from qformer.resolution.base import ResolutionStrategy, require, require_frames, require_size, some, whole
from qformer.types import Plan, Tile, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST = 1000  # tiles of a picture, since all grids of as many are tried
BEFORE, AFTER = "<img>", "</img>"


@dataclass(frozen=True)
class InternVL(ResolutionStrategy):
    """Tiles of `size` x `size` pixels, row by row, then the whole picture as one more tile (Chen et al. 2024).

    The grid has the aspect ratio nearest to the picture's, of all with `min_tiles` to `max_tiles` tiles. Its area
    counts only between grids of the same ratio: 640 x 480 becomes 4 x 3 tiles, 7.8 times its pixels, and 567 x 233
    becomes 5 x 2, 15 times. Ratios are compared by difference, so a picture and its transpose may be cut differently.

    Attributes:
        size: side of a tile, in pixels.
        patch: side of a patch of the encoder; the published connector makes one token of 2 x 2 patches.
        thumbnail: add the whole picture behind two tiles or more, as all shipped configurations do.
        shared: let the pictures of one row share `max_tiles`, as in training; otherwise each may have as many.
        between: text of the language model between the pictures and clips of a row, such as a line break.
        frame: text in front of each frame of a clip, in a line of its own; `{}` is its number, from 1 on.
        max_frames: frames of a clip, one a second; more than these are thinned out evenly.
    """

    exact: ClassVar[bool] = True
    reduced_by: ClassVar[str] = "max_tiles, or for clips max_frames,"
    size: int = 448
    patch: int = 14
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    shared: bool = field(default=True, repr=False)
    between: str = field(default="", repr=False)
    frame: str = field(default="", repr=False)
    max_frames: int = field(default=32, repr=False)

    def __post_init__(self) -> None:
        require(self, "patch", "min_tiles", "max_tiles", "max_frames")
        require(self, "size", least=2 * self.patch)
        if self.max_tiles > MOST:
            raise UsageError(
                f"resolution.max_tiles is {self.max_tiles}; give at most {MOST:,}, since all grids are tried"
            )
        if self.min_tiles > self.max_tiles:
            raise UsageError(
                f"resolution.min_tiles {self.min_tiles} is more than resolution.max_tiles {self.max_tiles}; lower it"
            )

    @property
    def _tokens(self) -> int:
        """Tokens of a tile."""
        return (self.size // self.patch // 2) ** 2

    def plan(self, width: int, height: int) -> Plan:
        return self._plan(width, height, self.max_tiles)

    def plan_many(self, sizes: Sequence[tuple[int, int]]) -> Plan:
        """The pictures share `max_tiles`, if they are to; each has at least one tile."""
        most = max(1, self.max_tiles // len(some(sizes))) if self.shared else self.max_tiles
        return Plan.join([self._plan(*size, most) for size in sizes], self.between)

    def plan_video(self, width: int, height: int, frames: int) -> Plan:
        """One tile for each frame, between markers of its own."""
        require_size(width, height)
        require_frames(frames)
        tile = whole(self.size, self.size, before=BEFORE, after=AFTER)
        leads = (self._lead(number) for number in range(frames))
        tiles = tuple(replace(tile, frames=(number,), lead=lead) for number, lead in enumerate(leads))
        return Plan((width, height), tiles, (1, 1), None, frames * self._tokens)

    def _lead(self, number: int) -> str:
        """Text in front of a frame, counted from 0."""
        return "\n" * bool(self.frame and number) + self.frame.replace("{}", str(number + 1))

    def markers(self) -> tuple[str, ...]:
        return BEFORE, AFTER

    def _plan(self, width: int, height: int, most: int) -> Plan:
        require_size(width, height)
        grid = _grid(width, height, self.size, self.min_tiles, most)
        tiles = _tiles(*grid, self.size, self.thumbnail)
        overview = len(tiles) - 1 if self.thumbnail or len(tiles) == 1 else None
        return Plan((width, height), tiles, grid, overview, len(tiles) * self._tokens)


def _grid(width: int, height: int, size: int, least: int, most: int) -> tuple[int, int]:
    """Columns and rows. Of equally near ratios the last wins whose tiles the picture fills to more than a half."""
    ratio, area = width / height, width * height
    best, nearest = (1, 1), float("inf")
    for columns, rows, own in _grids(least, most):
        difference = abs(ratio - own)
        if difference < nearest or (difference == nearest and area > 0.5 * size * size * columns * rows):
            best, nearest = (columns, rows), difference
    return best


@lru_cache(maxsize=256)
def _grids(least: int, most: int) -> tuple[tuple[int, int, float], ...]:
    """Columns, rows and their quotient, of all grids of so many tiles, the smallest first."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if least <= i * j <= most]
    return tuple((i, j, i / j) for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=4096)
def _tiles(columns: int, rows: int, size: int, thumbnail: bool) -> tuple[Tile, ...]:
    content = (columns * size, rows * size)
    tiles = [
        Tile(content, content, (0, 0), (x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(rows)
        for x in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(whole(size, size))
    tiles[0] = replace(tiles[0], before=BEFORE)
    tiles[-1] = replace(tiles[-1], after=AFTER)
    return tuple(tiles)
