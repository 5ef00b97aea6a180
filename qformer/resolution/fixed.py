"""The strategy of BLIP-2: the whole image resized to one square, without keeping the aspect ratio."""

from __future__ import annotations

from dataclasses import dataclass, field

from qformer.resolution.base import ResolutionStrategy, require, require_size, whole
from qformer.types import Plan, UsageError


@dataclass(frozen=True)
class Fixed(ResolutionStrategy):
    """One tile of `size` x `size` pixels: 224 for pretraining, 364 for captions and retrieval, 490 for VQA.

    BLIP-2 passes 32 query tokens to the LLM at any size (paper, section 3.1).

    Attributes:
        size: side of the tile, in pixels.
        max_frames: frames of a clip, one a second; more than these are thinned out evenly.
    """

    size: int = 224
    max_frames: int = field(default=32, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"resolution.size is {self.size}; give a positive number of pixels, such as 224")
        require(self, "max_frames")

    def plan(self, width: int, height: int) -> Plan:
        require_size(width, height)
        return Plan(image=(width, height), tiles=(whole(self.size, self.size),), grid=(1, 1), overview=0, tokens=32)
