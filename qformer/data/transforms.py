"""Augmentation of what a row shows in training, before it is cut into tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from qformer.videos import Clip
from qformer.videos.rows import sizes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

RATIOS = (3 / 4, 4 / 3)
TRIES = 10


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box (left, top, right, bottom) of random area and aspect ratio, as in BLIP-2's training transform.

    Args:
        scale: smallest and largest share of the area; (1, 1) is the whole image and uses no random number.
    """
    if scale == (1.0, 1.0):
        return 0, 0, width, height
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    # No ratio fitted: use the largest centered box with an allowed ratio.
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(w, 1), top + max(h, 1)


def augment(
    row: Sequence[Tensor | Clip], scale: tuple[float, float], flip: float, rng: np.random.Generator
) -> list[Tensor | Clip]:
    """Crop and flip the pictures and clips of a row at random, without resizing.

    Those of one size are cropped alike, and all are mirrored or none, so that what can be compared stays comparable.
    """
    sizes = [(width, height) for width, height, _ in sizes_of(row)]
    boxes = {size: random_crop_box(*size, scale, rng) for size in dict.fromkeys(sizes)}
    mirrored = bool(flip) and rng.random() < flip
    done: list[Tensor | Clip] = []
    for one, size in zip(row, sizes, strict=True):
        left, top, right, bottom = boxes[size]
        pixels = (one.frames if isinstance(one, Clip) else one)[..., top:bottom, left:right]
        pixels = pixels.flip(-1) if mirrored else pixels
        done.append(replace(one, frames=pixels) if isinstance(one, Clip) else pixels)
    return done
