"""The strategy of Qwen2-VL: the picture near its native size, in whole tokens, neither too many nor too few."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, isfinite, sqrt
from typing import ClassVar, Literal

from qformer.resolution.base import Refused, ResolutionStrategy, require, require_frames, require_size, whole
from qformer.types import Plan, UsageError

BEFORE, AFTER = "<|vision_start|>", "<|vision_end|>"
MOST_ASPECT = 200
PAIR = 2  # frames that the encoder reads at once
MOST_FRAMES = 768
FLOOR = 1.05  # of the smallest number of tokens of a frame, which wins over the budget of a clip


@dataclass(frozen=True)
class Qwen2VL(ResolutionStrategy):
    """One tile whose sides are multiples of a token's, `patch` x `merge` pixels (Wang et al. 2024).

    Sides are rounded to the nearest multiple (half to even), at least one, then scaled where that makes too many or too
    few tokens. Pictures beyond 200 : 1 are refused. The rules are those of qwen-vl-utils.

    Attributes:
        patch: side of a patch of the encoder, in pixels.
        merge: patches along a side of a token.
        min_tokens, max_tokens: tokens of a picture. The paper has 100 to 16,384.
        fps: frames of a clip that are taken a second.
        frames: number of frames of a clip to take in place of `fps`; rounded to an even number.
        min_frames, max_frames: frames of a clip; None: 768. Rounded to even numbers inside.
        video_tokens: tokens of a clip; the paper has 16,384, qwen-vl-utils 0.0.8 24,576. They are exceeded where the
            frames would have less than 1.05 times the smallest number of `frame_tokens`.
        frame_tokens: smallest and largest number of tokens of a pair of frames.
        utils: version of qwen-vl-utils by which the number of frames is rounded: 0.0.8 to the nearest even number,
            0.0.14 down.
    """

    exact: ClassVar[bool] = True
    reduced_by: ClassVar[str] = "max_tokens, or for clips video_tokens, max_frames or frames"
    patch: int = 14
    merge: int = 2
    min_tokens: int = 4
    max_tokens: int = 16384
    fps: float = 2.0
    frames: int | None = None
    min_frames: int = 4
    max_frames: int | None = None
    video_tokens: int = 16384
    frame_tokens: tuple[int, int] = (128, 768)
    utils: Literal["0.0.14", "0.0.8"] = "0.0.14"

    def __post_init__(self) -> None:
        require(self, "patch", "merge", "min_tokens", "max_tokens", "min_frames", "video_tokens")
        require(self, "max_frames", "frames", least=PAIR)
        if self.min_tokens > self.max_tokens:
            raise UsageError(
                f"resolution.min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower it"
            )
        if not 1 <= self.frame_tokens[0] <= self.frame_tokens[1]:
            raise UsageError(
                f"resolution.frame_tokens is {list(self.frame_tokens)}; give the smallest and the largest number, such "
                "as [128, 768]"
            )
        if self.fps <= 0:
            raise UsageError(f"resolution.fps is {self.fps}; give a positive number of frames a second")

    @property
    def _side(self) -> int:
        """Side of a token, in pixels."""
        return self.patch * self.merge

    def plan(self, width: int, height: int) -> Plan:
        area = self._side**2
        across, down = self._fit(width, height, self.min_tokens * area, self.max_tokens * area)
        rows, columns = down // self._side, across // self._side
        tile = whole(across, down, before=BEFORE, after=AFTER)
        return Plan((width, height), (tile,), (1, 1), 0, rows * columns, (rows, columns))

    def plan_video(self, width: int, height: int, frames: int) -> Plan:
        """One tile for each pair of frames; the last of an odd number is paired with itself."""
        require_frames(frames)
        area = self._side**2
        least, most = (tokens * area for tokens in self.frame_tokens)
        budget = max(min(most, self.video_tokens * area / frames * PAIR), int(least * FLOOR))
        across, down = self._fit(width, height, least, budget)
        rows, columns = down // self._side, across // self._side
        pairs = [(frame, min(frame + 1, frames - 1)) for frame in range(0, frames, PAIR)]
        tiles = tuple(
            whole(across, down, frames=pair, before="" if pair[0] else BEFORE, after=AFTER if pair is pairs[-1] else "")
            for pair in pairs
        )
        return Plan((width, height), tiles, (1, 1), None, len(pairs) * rows * columns, (rows, columns))

    def markers(self) -> tuple[str, ...]:
        return BEFORE, AFTER

    def sample(self, total: int, fps: float) -> list[int]:
        require_frames(total)
        import torch  # whose float32 decides at ties, as in qwen-vl-utils

        return torch.linspace(0, total - 1, self._count(total, fps)).round().long().tolist()

    def _count(self, total: int, fps: float) -> int:
        """Number of frames to take.

        Raises:
            UsageError: it is below 2 or more than there are.
        """
        if self.frames is not None:
            count = round(self.frames / PAIR) * PAIR
        else:
            if not (isfinite(fps) and fps > 0):
                raise Refused(f"the clip has {fps} frames a second; give a positive number")
            least = ceil(self.min_frames / PAIR) * PAIR
            most = floor((self.max_frames or min(MOST_FRAMES, total)) / PAIR) * PAIR
            wanted = min(max(total / fps * self.fps, least), most)
            count = round(wanted / PAIR) * PAIR if self.utils == "0.0.8" else floor(min(wanted, total) / PAIR) * PAIR
        if not PAIR <= count <= total:
            raise Refused(
                f"{count} frames of a clip of {total} cannot be taken; "
                + ("give a clip of at least 2 frames" if total < PAIR else "lower resolution.frames or max_frames")
            )
        return count

    def _fit(self, width: int, height: int, least: float, most: float) -> tuple[int, int]:
        """Size of the tile, of `least` to `most` pixels.

        Raises:
            UsageError: the picture is too thin, or a side would have no pixel.
        """
        require_size(width, height)
        if max(width, height) / min(width, height) > MOST_ASPECT:
            raise Refused(
                f"a picture of {width} x {height} pixels is beyond {MOST_ASPECT} : 1, which Qwen2-VL does not take; "
                "crop it, or use another strategy"
            )
        side = self._side
        across, down = (max(side, round(length / side) * side) for length in (width, height))
        if across * down > most:
            factor = sqrt((height * width) / most)
            across, down = (floor(length / factor / side) * side for length in (width, height))
        elif across * down < least:
            factor = sqrt(least / (height * width))
            across, down = (ceil(length * factor / side) * side for length in (width, height))
        if min(across, down) < 1:
            raise Refused(
                f"a picture of {width} x {height} pixels has no token left in one direction within "
                f"{most / side**2:.0f} tokens; raise resolution.max_tokens (of a clip video_tokens), or crop it"
            )
        return across, down
