"""The strategy of LLaVA-UHD: variable-sized slices near the encoder's own area, and the whole picture behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, floor, log, sqrt
from typing import ClassVar, Literal

from qformer.resolution.base import Refused, ResolutionStrategy, require, require_size, whole
from qformer.types import Plan, Tile

SLICES = {"released": 7, "arxiv": 6}
QUERIES = {"released": 144, "arxiv": 64}
SEPARATOR, ROW_END = ",", "\n"  # behind a slice


@dataclass(frozen=True)
class Uhd(ResolutionStrategy):
    """Slices row by row, each about as large as the encoder's own picture, then an overview (Xu et al. 2024).

    The number of slices is the picture's area in units of `size` x `size`, give or take one, and the grid is that whose
    aspect ratio is nearest to the picture's. A picture that fits into one such area is enlarged to it, not sliced.

    Two versions are published: arXiv 2403.11703v1 (`arxiv`: 6 slices, 64 queries) and the one of ECCV 2024 with
    weights (`released`: 7, 144). They differ in these defaults alone. Grids are chosen as the released code does
    in both: it never takes the grid of one slice, so slices of up to 1 : 2.06 arise where the paper promises 1 : 2.

    Attributes:
        size: side of the encoder's own picture, in pixels. Tiles have about this area and any aspect ratio.
        patch: side of a patch of the encoder.
        max_slices: None: as in the variant.
        queries: tokens of a slice, and of the overview; None: as in the variant.
        schema: let a "," follow each slice and a newline each row of slices, as text.
        rescale: longer side, in pixels, to which the picture is thought to be brought first, as the released evaluation
            does with 1024; pixels still come from the original.
        multiple: sides of tiles are multiples of so many patches; connectors that merge 2 x 2 patches need 2.
        max_frames: frames of a clip, one a second; more than these are thinned out evenly.
    """

    exact: ClassVar[bool] = True
    reduced_by: ClassVar[str] = "max_slices or queries, or for clips max_frames,"
    variant: Literal["released", "arxiv"] = "released"
    size: int = 336
    patch: int = 14
    max_slices: int | None = None
    queries: int | None = None
    schema: bool = True
    rescale: int | None = None
    multiple: int = 1
    max_frames: int = field(default=32, repr=False)

    def __post_init__(self) -> None:
        require(self, "patch", "max_slices", "queries", "rescale", "multiple", "max_frames")
        require(self, "size", least=self.patch * self.multiple)

    @property
    def _most(self) -> int:
        """Slices at most, without the overview."""
        return self.max_slices or SLICES[self.variant]

    def plan(self, width: int, height: int) -> Plan:
        require_size(width, height)
        image = (width, height)
        if self.rescale is not None:
            width, height = _rescaled(width, height, self.rescale)
        most = self._most
        queries = self.queries or QUERIES[self.variant]
        slices = min(ceil(width * height / (self.size * self.size)), most)
        if slices <= 1:
            return Plan(image, (whole(*self._fit(width, height, True)),), (1, 1), 0, queries)
        columns, rows = _grid(width / height, slices, most)
        across, down = self._fit(_snap(width, columns) / columns, _snap(height, rows) / rows, True)
        overview = whole(*self._fit(width, height, False))
        tiles = (*_slices(columns, rows, across, down, self.schema), overview)
        return Plan(image, tiles, (columns, rows), len(tiles) - 1, len(tiles) * queries)

    def markers(self) -> tuple[str, ...]:
        return (SEPARATOR, ROW_END) if self.schema and self._most > 1 else ()

    def _fit(self, width: float, height: float, enlarge: bool) -> tuple[int, int]:
        """Bring a rectangle to the encoder's area, keeping its aspect ratio, and to whole patches."""
        if width * height > self.size * self.size or enlarge:
            ratio = width / height
            height = int(self.size / sqrt(ratio))  # and the width by it: two roundings, as published
            width = int(height * ratio)
        side = self.patch * self.multiple
        return _snap(width, side), _snap(height, side)


def _snap(length: float, unit: int) -> int:
    """The multiple of `unit` at or below a length, at least one."""
    return max(floor(length / unit) * unit, unit)


def _rescaled(width: int, height: int, side: int) -> tuple[int, int]:
    """Size of the picture with this longer side.

    Raises:
        UsageError: the other side would have no pixel.
    """
    new = (side, int((side / width) * height)) if width > height else (int((side / height) * width), side)
    if min(new) < 1:
        raise Refused(
            f"a picture of {width} x {height} pixels has no pixel left in one direction when its longer side is "
            f"{side}; leave resolution.rescale out, or crop the picture"
        )
    return new


def _grid(ratio: float, slices: int, most: int) -> tuple[int, int]:
    """Columns and rows whose ratio is nearest to the picture's.

    Many grids are equally near in real numbers, and the last bit of the logarithms decides; hence one logarithm of
    each quotient, as in the released code. The first of equals is taken.
    """
    wanted = log(ratio)
    best, nearest = (1, 1), float("inf")
    for columns, rows, own in _grids(slices, most):
        error = abs(wanted - own)
        if error < nearest:
            best, nearest = (columns, rows), error
    return best


@lru_cache(maxsize=256)
def _grids(slices: int, most: int) -> tuple[tuple[int, int, float], ...]:
    """Columns, rows and the logarithm of their quotient, of all grids with a slice fewer, as many, or one more."""
    counts = [count for count in (slices - 1, slices, slices + 1) if 1 < count <= most]
    return tuple(
        (columns, count // columns, log(columns / (count // columns)))
        for count in counts
        for columns in range(1, count + 1)
        if count % columns == 0
    )


@lru_cache(maxsize=4096)
def _slices(columns: int, rows: int, width: int, height: int, schema: bool) -> tuple[Tile, ...]:
    size = (columns * width, rows * height)
    ends = [SEPARATOR] * (columns - 1) + [ROW_END] if schema else [""] * columns
    return tuple(
        Tile(size, size, (0, 0), (x * width, y * height, (x + 1) * width, (y + 1) * height), after=ends[x])
        for y in range(rows)
        for x in range(columns)
    )
