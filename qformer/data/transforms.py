"""Augmentation of a decoded image in training, before it is cut into tiles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def augment(image: Tensor, scale: tuple[float, float], flip: float, rng: np.random.Generator) -> Tensor:
    """Crop and flip an image at random, without resizing: uint8[3, h, w] -> uint8[3, h', w']."""
    left, top, right, bottom = random_crop_box(image.shape[2], image.shape[1], scale, rng)
    image = image[:, top:bottom, left:right]
    return image.flip(2) if flip and rng.random() < flip else image
