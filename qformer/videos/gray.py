"""Pictures and clips painted gray, of their own sizes: what a model that answers about them knows without seeing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qformer.images import read_image
from qformer.videos import Clip, is_video, read_video

GRAY = 127  # the middle of what a byte can be


def painted_gray(part: Any) -> Any:
    """Gray in place of a picture, `uint8[H, W, 3]`, a clip or a video, as large and as long.

    Raises:
        BadSample: it cannot be read.
    """
    if is_video(part):
        part = _gray_video(part)
    if isinstance(part, Clip):
        one = torch.full_like(part.frames[:1], GRAY)
        return Clip(one.expand(len(part.frames), -1, -1, -1), part.fps, part.sampled)
    height, width = read_image(part).shape[-2:]
    return np.full((height, width, 3), GRAY, np.uint8)


def _gray_video(path: Any) -> Clip:
    """A clip as long and as large as a video, of which one frame is decoded and shown all the time."""
    length: list[tuple[int, float]] = []

    def take_first(total: int, fps: float) -> list[int]:
        length.append((total, fps))
        return [0]

    first = read_video(path, take_first)
    total, fps = length[0]
    return Clip(first.frames.expand(total, -1, -1, -1), fps)
