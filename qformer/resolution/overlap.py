"""Overlapping tiles, as GPT-4V's are thought to be: there to be exposed by probes, not to be trained with."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from qformer.resolution.base import ResolutionStrategy, require, require_size
from qformer.types import Plan, Tile

TOKENS = 170  # of a tile, by OpenAI's price list of 2023


@dataclass(frozen=True)
class Overlap512(ResolutionStrategy):
    """Tiles of one size at the picture's own scale, spread evenly, so that neighbors overlap (Xu et al. 2024, sec. 3).

    A square of 1.5 tiles, 768 x 768, gets 2 x 2 tiles at 0 and 256 along each side: its corners are seen once, its
    edges twice, its middle four times. Whoever counts objects tile by tile counts them as often. That a side gets
    ceil(side / size) tiles, and that a side of less than a tile is filled up with black at its end, is our reading.

    Attributes:
        size: side of a tile, in pixels.
        overlap: false puts as many tiles beside each other, the last ones filled up with black: what overlap alone
            changes can be measured.
        max_frames: frames of a clip, one a second; more than these are thinned out evenly.
    """

    exact: ClassVar[bool] = True
    reduced_by: ClassVar[str] = "the size of the picture, or for clips max_frames,"
    exposed: ClassVar[str] = "its tiles overlap, so objects are counted several times"
    size: int = 512
    overlap: bool = True
    max_frames: int = 32

    def __post_init__(self) -> None:
        require(self, "size", "max_frames")

    def plan(self, width: int, height: int) -> Plan:
        require_size(width, height)
        image, size = (width, height), self.size
        across, down = (_origins(side, size, self.overlap) for side in image)
        canvas = (max(width, across[-1] + size), max(height, down[-1] + size))
        boxes = [(x, y, x + size, y + size) for y in down for x in across]
        tiles = tuple(Tile(image, canvas, (0, 0), box) for box in boxes)
        return Plan(image, tiles, (len(across), len(down)), 0 if len(tiles) == 1 else None, TOKENS * len(tiles))


def _origins(side: int, size: int, overlap: bool) -> list[int]:
    """Beginnings of the tiles along a side: as few as cover it, from one end to the other or one behind the other."""
    last = ceil(side / size) - 1
    if not overlap:
        return [number * size for number in range(last + 1)]
    return [number * (side - size) // last for number in range(last + 1)] if last else [0]
