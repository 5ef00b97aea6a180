"""Short videos that tests write by PyAV: frame number n is gray, n times `STEP` up to 255, and a corner is red."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STEP = 10
SIZE = (64, 48)
CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}


def write_clip(
    path: Path,
    frames: int = 24,
    fps: int = 8,
    times: Sequence[int] | None = None,
    turned: tuple[int, bool, bool] | None = None,
) -> Path:
    """A video with a key frame every eighth frame, in the container and codec of its suffix.

    Args:
        times: when each frame is shown, in units of 1 / fps; by default one after the other.
        turned: how a player turns it: degrees counterclockwise, then mirrored left to right, upside down.
    """
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=fps)
        (stream.width, stream.height), stream.pix_fmt, stream.options = SIZE, "yuv420p", {"g": "8"}
        if turned is not None:
            stream.set_display_rotation(turned[0], hflip=turned[1], vflip=turned[2])
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def picture(number: int) -> np.ndarray:
    """Pixels uint8[h, w, 3] of a frame."""
    pixels = np.full((SIZE[1], SIZE[0], 3), min(number * STEP, 255), np.uint8)
    pixels[: SIZE[1] // 2, : SIZE[0] // 2] = 255, 0, 0
    return pixels


def level(frame: Any) -> float:
    """Number of a frame by its gray, from its pixels uint8[3, h, w] whichever way they are turned."""
    red = (frame[0].float() > 180) & (frame[1] < 90)
    return float(frame.float()[:, ~red].median()) / STEP
