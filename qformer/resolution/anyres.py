"""The strategy of LLaVA-NeXT and LLaVA-OneVision: a squashed overview, then square crops of the padded picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, sqrt
from typing import TYPE_CHECKING, ClassVar, Literal

from qformer.resolution.base import (
    Refused,
    ResolutionStrategy,
    require,
    require_frames,
    require_size,
    some,
    spread,
    whole,
)
from qformer.resolution.pad_square import padded
from qformer.types import Plan, Tile, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

NEWLINES: dict[str, Literal["", "row", "frame", "end"]] = {
    "one_token": "end",
    "frame": "frame",
    "grid": "row",
    "no_token": "",
}
SLACK = 1.1  # by which each side may exceed the budget before the map of tokens is shrunk


@dataclass(frozen=True)
class AnyRes(ResolutionStrategy):
    """The base, which is the whole picture squashed to one crop, then crops row by row (Li et al. 2024).

    The picture is fitted into the size of `pins` in which most of it is seen, then that with the least padding, and
    pasted there on black. The tokens of its crops are one map, without those of the padding, shrunk where it is more
    than `max_patches` crops' worth (by more than a tenth a side, as the released code has it; the paper's budget counts
    the base too). A learned newline follows each row of the map.

    Attributes:
        size: side of a crop, in pixels.
        patch: side of a patch of the encoder. What no patch covers at the end of a crop is not read: 384 = 27 * 14 + 6.
        pins: sizes (width, height) in pixels, multiples of `size`; None: all grids of up to `max_side` x `max_side`.
        max_patches: crops whose tokens the map may have; None: it is never shrunk.
        newline: newlines of a clip: one at its end, one after each frame, or after each row of each frame; or none.
        fps: frames of a clip that are taken a second.
        max_frames: frames of a clip; more than these are thinned out evenly.
        fill: RGB of the padding where a row shows several pictures, which are padded to squares of one tile each.
        between: text of the language model between the pictures and clips of a row, such as a line break.
    """

    exact: ClassVar[bool] = True
    reduced_by: ClassVar[str] = "max_side, max_patches or max_frames"
    size: int = 384
    patch: int = 14
    pins: tuple[tuple[int, int], ...] | None = None
    max_side: int = 6
    max_patches: int | None = 9
    newline: Literal["one_token", "frame", "grid", "no_token"] = "one_token"
    fps: float = 1.0
    max_frames: int = 32
    fill: tuple[int, int, int] = (127, 127, 127)
    between: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        require(self, "patch", "max_side", "max_patches", "max_frames")
        require(self, "size", least=self.patch)
        if self.fps <= 0:
            raise UsageError(f"resolution.fps is {self.fps}; give a positive number of frames a second")
        if self.pins is not None and (not self.pins or any(s < 1 or s % self.size for pin in self.pins for s in pin)):
            raise UsageError(
                f"resolution.pins is {[list(pin) for pin in self.pins]}; give pairs of multiples of resolution.size "
                f"{self.size}, such as [[{self.size}, {2 * self.size}]]"
            )

    @property
    def _unit(self) -> int:
        """Tokens along a side of a crop."""
        return self.size // self.patch

    def plan(self, width: int, height: int) -> Plan:
        require_size(width, height)
        across, down = _pin(width, height, grids(self.size, self.max_side) if self.pins is None else self.pins)
        to_width, to_height = across / width, down / height
        if to_width < to_height:
            content = (across, min(ceil(height * to_width), down))
        else:
            content = (min(ceil(width * to_height), across), down)
        canvas, side = (across, down), self.size
        offset = ((across - content[0]) // 2, (down - content[1]) // 2)
        grid = (across // side, down // side)
        crops = (
            Tile(content, canvas, offset, (x, y, x + side, y + side))
            for y in range(0, down, side)
            for x in range(0, across, side)
        )
        rows, columns = self._fine(width, height, grid)
        tokens = self._unit**2 + rows * (columns + 1)
        return Plan((width, height), (whole(side, side), *crops), grid, 0, tokens, (rows, columns), "row")

    def plan_many(self, sizes: Sequence[tuple[int, int]]) -> Plan:
        """Each of several pictures is one tile, padded to a square, and one newline."""
        if len(some(sizes)) == 1:
            return self.plan(*sizes[0])
        for size in sizes:
            require_size(*size)
        tokens = self._unit**2 + 1
        return Plan.join(
            [Plan(size, (padded(*size, self.size, self.fill),), (1, 1), 0, tokens, newline="end") for size in sizes],
            self.between,
        )

    def plan_video(self, width: int, height: int, frames: int) -> Plan:
        """One tile for each frame, whose map of tokens is shrunk to half its sides."""
        require_size(width, height)
        require_frames(frames)
        side = ceil(self._unit / 2)
        newline = NEWLINES[self.newline]
        newlines = {"": 0, "end": 1, "frame": frames, "row": frames * side}[newline]
        tiles = tuple(whole(self.size, self.size, frames=(frame,)) for frame in range(frames))
        return Plan((width, height), tiles, (1, 1), None, frames * side**2 + newlines, (side, side), newline)

    def sample(self, total: int, fps: float) -> list[int]:
        return spread(total, fps, self.fps, self.max_frames)

    def _fine(self, width: int, height: int, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the map of the crops' tokens, without padding and shrunk to its budget."""
        unit = self._unit
        columns, rows = (unit * count for count in grid)
        if width / height > columns / rows:
            rows -= (rows - int(height * (columns / width))) // 2 * 2  # as much on either side
        else:
            columns -= (columns - int(width * (rows / height))) // 2 * 2
        if self.max_patches is None:
            return rows, columns
        times = sqrt(rows * columns / (self.max_patches * unit**2))
        if times <= SLACK:
            return rows, columns
        shrunk = (int(rows // times), int(columns // times))
        if min(shrunk) < 1:
            raise Refused(
                f"a picture of {width} x {height} pixels has no row of tokens left in resolution.max_patches "
                f"{self.max_patches}; raise it, or crop the picture"
            )
        return shrunk


def _pin(width: int, height: int, pins: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size of the table in which most pixels of the picture are seen, then that with the least padding."""
    best, most, least, own = pins[0], 0, float("inf"), width * height
    for across, down in pins:
        scale = min(across / width, down / height)
        seen = min(int(width * scale) * int(height * scale), own)
        padding = across * down - seen
        if seen > most or (seen == most and padding < least):
            best, most, least = (across, down), seen, padding
    return best


@lru_cache(maxsize=64)
def grids(size: int, sides: int) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) of all grids of up to `sides` x `sides` crops, the narrow ones first."""
    counts = range(1, sides + 1)
    return tuple((columns * size, rows * size) for columns in counts for rows in counts)
