"""The strategy of LLaVA-1.5: the image padded to a square, then resized, so that the aspect ratio is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from qformer.resolution.base import ResolutionStrategy, require, require_size
from qformer.types import Plan, Tile


@dataclass(frozen=True)
class PadSquare(ResolutionStrategy):
    """One tile of `size` x `size` pixels: the picture in the middle of a square of its longer side, resized at last.

    Of a picture of 4:1 a quarter of the tile shows something.

    Attributes:
        patch: side of a patch of the encoder, in pixels; the published connector makes a token of each patch.
        fill: RGB of the padding, by default the mean of CLIP's training pictures.
        max_frames: frames of a clip, one a second; more than these are thinned out evenly.
    """

    exact: ClassVar[bool] = True
    reduced_by: ClassVar[str] = "size, or for clips max_frames,"
    exposed: ClassVar[str] = "its padding has a color that models mistake for no color at all"
    size: int = 336
    patch: int = 14
    fill: tuple[int, int, int] = (122, 116, 104)
    max_frames: int = field(default=32, repr=False)

    def __post_init__(self) -> None:
        require(self, "patch", "max_frames")
        require(self, "size", least=self.patch)

    def plan(self, width: int, height: int) -> Plan:
        require_size(width, height)
        tile = padded(width, height, self.size, self.fill)
        return Plan((width, height), (tile,), (1, 1), 0, (self.size // self.patch) ** 2)


def padded(width: int, height: int, size: int, fill: tuple[int, int, int]) -> Tile:
    """The picture as it is in the middle of a square of its longer side, which is resized to `size` x `size`."""
    side = max(width, height)
    offset = ((side - width) // 2, (side - height) // 2)
    return Tile((width, height), (side, side), offset, (0, 0, side, side), scaled=(size, size), fill=fill)
