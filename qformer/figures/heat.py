"""Heat maps over pictures, as PIL images with a dark background of their own.

They have to be legible on a phone and on a wide screen, in light and in dark pages, so their text is short and large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the picture


@dataclass(frozen=True)
class QueryMaps:
    """Attention of the queries in one tile of a picture.

    Attributes:
        maps: float[Q, h, w], attention of each query over the h x w patches of the tile; each sums to 1.
        box: (left, top, right, bottom) of the tile in fractions of the picture, (0, 0, 1, 1) if it shows all of it.
            The box of a padded tile extends beyond the picture.
    """

    maps: Tensor
    box: Box


GROUND, INK, FAINT = (24, 27, 34), (240, 242, 245), (150, 158, 170)
SIDE = 640  # longest side in pixels of an overlay or a panel of slices
CELL = 200  # longest side in pixels of one cell of a sheet
FULL = 0.75  # opacity of the hottest patch; the picture shows through where there is less heat


def overlay(image: Image.Image, heat: Tensor, box: Box = (0, 0, 1, 1)) -> Image.Image:
    """Draw a heat map over a picture, with a scale below that shows the share of the hottest patch.

    Args:
        image: picture of any size; the longest side of the result is `SIDE` pixels.
        heat: float[h, w], not negative; smoothed between the patches.
        box: (left, top, right, bottom), the part of the picture that the map covers; it can extend beyond it.
    """
    picture = _heated(resized(image, SIDE), heat, box)
    foot = 56
    card = Image.new("RGB", (picture.width, picture.height + foot), GROUND)
    card.paste(picture, (0, 0))
    _scale(card, picture.height, foot, float(heat.max() / heat.sum()) if heat.sum() > 0 else 0.0)
    return card


def sheet(image: Image.Image, maps: QueryMaps, columns: int = 8) -> Image.Image:
    """Draw all queries as small multiples, numbered from 1, with the share of attention of the strongest patch.

    Args:
        columns: largest number of cells in a row.
    """
    small = resized(image, CELL)
    foot, gap = 44, 8
    count = len(maps.maps)
    columns = min(columns, count)
    rows = -(-count // columns)
    wide, high = small.width + gap, small.height + foot
    card = Image.new("RGB", (columns * wide + gap, rows * high + gap), GROUND)
    pen = ImageDraw.Draw(card)
    for number, heat in enumerate(maps.maps):
        row, column = divmod(number, columns)
        x, y = gap + column * wide, gap + row * high
        card.paste(_heated(small, heat, maps.box), (x, y))
        middle = y + small.height + foot / 2
        pen.text((x + 2, middle), f"{number + 1}", fill=INK, font=load_font(30), anchor="lm")
        peak = f"{100 * float(heat.max()):.0f} %"
        pen.text((x + small.width - 2, middle), peak, fill=FAINT, font=load_font(24), anchor="rm")
    return card


def _heated(picture: Image.Image, heat: Tensor, box: Box) -> Image.Image:
    """Blend a heat map over a picture: colored relative to the hottest patch, and more opaque where it is hotter."""
    left, top, right, bottom = box
    width, height = (max(1, round(span)) for span in ((right - left) * picture.width, (bottom - top) * picture.height))
    smooth = F.interpolate(heat.float()[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    level = np.zeros((picture.height, picture.width), np.float32)
    x, y = round(left * picture.width), round(top * picture.height)
    shown = smooth[max(-y, 0) :, max(-x, 0) :][: picture.height - max(y, 0), : picture.width - max(x, 0)]
    level[max(y, 0) : max(y, 0) + shown.shape[0], max(x, 0) : max(x, 0) + shown.shape[1]] = shown.numpy()
    level /= max(float(heat.max()), 1e-12)
    below = np.asarray(picture, np.float32)
    opacity = FULL * level[..., None]
    return Image.fromarray((below * (1 - opacity) + _colours(level) * opacity).astype(np.uint8))


def _colours(level: np.ndarray) -> np.ndarray:
    """Colors from violet to orange for 0 to 1, float[..., 3] in 0..255: the part of `inferno` visible on any ground."""
    return 255 * matplotlib.colormaps["inferno"](0.25 + 0.55 * level)[..., :3]


def _scale(card: Image.Image, y: int, height: int, peak: float) -> None:
    """Draw a bar from 0 % to the share of the hottest patch, into the strip of that height at y."""
    pen, margin, middle = ImageDraw.Draw(card), 14, y + height // 2
    font = load_font(24)
    low, high = "0 %", f"{100 * peak:.0f} % in one patch"
    start = margin + round(pen.textlength(low, font)) + 12
    stop = card.width - margin - round(pen.textlength(high, font)) - 12
    pen.text((margin, middle), low, fill=INK, font=font, anchor="lm")
    pen.text((card.width - margin, middle), high, fill=INK, font=font, anchor="rm")
    if stop - start > 20:
        bar = _colours(np.linspace(0, 1, stop - start))[None].astype(np.uint8).repeat(18, axis=0)
        card.paste(Image.fromarray(bar), (start, middle - 9))


def resized(image: Image.Image, side: int) -> Image.Image:
    """Convert a picture to RGB and resize its longest side to `side` pixels."""
    zoom = side / max(image.size)
    width, height = (max(1, math.ceil(zoom * length)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
