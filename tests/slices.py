"""A strategy that cuts pictures in two, with markers; named `module:Class` in a configuration, as somebody's own."""

from __future__ import annotations

from dataclasses import dataclass

from qformer.resolution.base import ResolutionStrategy
from qformer.types import Plan, Tile


@dataclass(frozen=True)
class Slices(ResolutionStrategy):
    """Two halves side by side and the whole, each `size` x `size`; small pictures are one tile without markers.

    A comma stands behind the first half, which the tiny language models have as a token, and a mark behind the second
    that none of them has.
    """

    size: int = 56
    least: int = 0

    def plan(self, width: int, height: int) -> Plan:
        square = (self.size, self.size)
        whole = Tile(content=square, canvas=square, offset=(0, 0), box=(0, 0, *square))
        if height < self.least:
            return Plan(image=(width, height), tiles=(whole,), grid=(1, 1), overview=0, tokens=0)
        wide = (2 * self.size, self.size)
        left, right = (
            Tile(content=wide, canvas=wide, offset=(0, 0), box=(x, 0, x + self.size, self.size), after=mark)
            for x, mark in ((0, ","), (self.size, "<end of row>"))
        )
        return Plan(image=(width, height), tiles=(left, right, whole), grid=(2, 1), overview=2, tokens=0)
