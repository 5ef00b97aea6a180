"""The strategy of Oryx: the picture at its native size, and a small view of it in front."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from qformer.resolution.base import (
    Refused,
    ResolutionStrategy,
    require,
    require_frames,
    require_size,
    spread,
    whole,
)
from qformer.types import Plan, UsageError

TINY, ENLARGED = 32, 64  # pixels: a shorter side below the one is brought to the other


@dataclass(frozen=True)
class Oryx(ResolutionStrategy):
    """A low view of about `low` x `low` pixels, then the picture as it is, in whole strides (Liu et al. 2024).

    Sides are rounded down to strides; areas above `high` x `high` pixels are shrunk to it. A side that becomes 0, as
    from aspects of about 30 : 1 on, is refused (the released code crashes). Tokens include what the published connector
    puts around the views: begin, sep, end, and a newline after each row. Clips have no low view; blocks of 2 x 2 tokens
    become one (`compression` 4), or of 4 x 4 (16).

    Attributes:
        patch: side of a patch of the encoder, in pixels.
        stride: sides of views are multiples of it.
        video_low, video_high: sides of the squares with the smallest and largest area of a frame of a clip.
        video_stride: stride of frames; doubled at compression 16.
        compression: tokens of a clip that become one, 4 or 16. Pictures are not compressed, as in the released code.
        fps: frames of a clip that are taken a second, as in the paper; the released code takes `max_frames`.
        max_frames: frames of a clip; more than these are thinned out evenly.
    """

    exact: ClassVar[bool] = True
    reduced_by: ClassVar[str] = "high, video_high or max_frames"
    patch: int = 16
    low: int = 384
    stride: int = 32
    high: int = 1536
    video_low: int = 288
    video_high: int = 480
    video_stride: int = 64
    compression: int = 4
    fps: float = 1.0
    max_frames: int = 64

    def __post_init__(self) -> None:
        require(self, "patch", "low", "stride", "high", "video_low", "video_high", "video_stride", "max_frames")
        if self.compression not in (4, 16):
            raise UsageError(f"resolution.compression is {self.compression}; give 4 or 16")
        if self.fps <= 0:
            raise UsageError(f"resolution.fps is {self.fps}; give a positive number of frames a second")
        if self.stride % self.patch:
            raise UsageError(
                f"resolution.stride {self.stride} is no multiple of resolution.patch {self.patch}; change one of them"
            )

    @property
    def _block(self) -> int:
        """Patches along a side of a token of a clip."""
        return 2 if self.compression == 4 else 4

    def plan(self, width: int, height: int) -> Plan:
        require_size(width, height)
        image = (width, height)
        if min(image) < TINY:
            factor = ENLARGED / min(image)
            width, height = int(width * factor), int(height * factor)
        native = _fit(image, width, height, self.stride, 0, self.high)
        low = _fit(image, *native, self.stride, self.low, self.low)
        fine, coarse = self._tokens(native), self._tokens(low)
        tokens = 3 + coarse[0] * (coarse[1] + 1) + fine[0] * (fine[1] + 1)
        return Plan(image, (whole(*low), whole(*native)), (1, 1), 0, tokens, fine)

    def plan_video(self, width: int, height: int, frames: int) -> Plan:
        """One tile for each frame, all of one size."""
        require_size(width, height)
        require_frames(frames)
        stride = self.video_stride * (self._block // 2)
        if stride % (self._block * self.patch):
            raise UsageError(
                f"resolution.video_stride {self.video_stride} is no multiple of two of resolution.patch {self.patch}; "
                "change one of them"
            )
        size = _fit((width, height), width, height, stride, self.video_low, self.video_high)
        rows, columns = (side // self._block for side in self._tokens(size))
        tiles = tuple(whole(*size, frames=(frame,)) for frame in range(frames))
        tokens = 2 + frames * (rows * (columns + 1) + 1)
        return Plan((width, height), tiles, (1, 1), None, tokens, (rows, columns))

    def sample(self, total: int, fps: float) -> list[int]:
        return spread(total, fps, self.fps, self.max_frames)

    def _tokens(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patches of a view."""
        return size[1] // self.patch, size[0] // self.patch


def _fit(image: tuple[int, int], width: int, height: int, stride: int, low: int, high: int) -> tuple[int, int]:
    """Scale a size to an area of low^2 to high^2 pixels, then round its sides down to strides.

    Raises:
        UsageError: a side is below one stride.
    """
    scale, area = 1.0, width * height
    if area > high * high:
        scale = sqrt(high * high / area)
    elif area < low * low:
        scale = sqrt(low * low / area)
    size = (int(width * scale / stride) * stride, int(height * scale / stride) * stride)
    if min(size) < 1:
        raise Refused(
            f"a picture of {image[0]} x {image[1]} pixels is too thin for Oryx: scaled to {width * scale:.0f} x "
            f"{height * scale:.0f} it has a side below one stride of {stride} pixels; crop it, or use another strategy"
        )
    return size
