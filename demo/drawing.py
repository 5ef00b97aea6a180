"""Pictures of where a model looks and of how a strategy slices: PIL in, PIL out, on a dark ground of their own.

They are read on a phone as on a wide screen, in light and in dark pages: few words, large, with their own background.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from qformer import resolution
from qformer.vision.options import EvaConfig

if TYPE_CHECKING:
    from torch import Tensor

    from demo.look import Box, QueryMaps
    from qformer.types import Plan, Tile

#: Names of the resolution strategies that there are.
STRATEGIES = list(resolution.STRATEGIES)
#: Of the encoder by whose work strategies are compared: BLIP-2's ViT-g/14.
VIT_G = EvaConfig()

GROUND, INK, FAINT = (24, 27, 34), (240, 242, 245), (150, 158, 170)
TILE, OVERVIEW = (255, 196, 0), (90, 200, 250)
SIDE = 640  # longest side of an overlay, of the panels of slices: pixels
CELL = 200  # of one of small multiples
FULL = 0.75  # opacity of the hottest place; the less heat, the more of the picture shines through


def overlay(image: Image.Image, heat: Tensor, box: Box = (0, 0, 1, 1)) -> Image.Image:
    """A heat map over a picture, with a scale below: what share of the whole one patch has.

    Args:
        image: of any size; the longest side of the result is `SIDE` pixels.
        heat: float[h, w], not negative; smoothed between the patches.
        box: (left, top, right, bottom), the part of the picture that the map covers; it may reach beyond.
    """
    picture = _heated(_sized(image, SIDE), heat, box)
    foot = 56
    card = Image.new("RGB", (picture.width, picture.height + foot), GROUND)
    card.paste(picture, (0, 0))
    _scale(card, picture.height, foot, float(heat.max() / heat.sum()) if heat.sum() > 0 else 0.0)
    return card


def sheet(image: Image.Image, maps: QueryMaps, columns: int = 8) -> Image.Image:
    """All queries as small multiples, numbered from 1, with the share of the attention that the strongest patch has.

    Args:
        columns: at most so many side by side.
    """
    small = _sized(image, CELL)
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
        pen.text((x + 2, middle), f"{number + 1}", fill=INK, font=_font(30), anchor="lm")
        peak = f"{100 * float(heat.max()):.0f} %"
        pen.text((x + small.width - 2, middle), peak, fill=FAINT, font=_font(24), anchor="rm")
    return card


def slices(image: Image.Image, strategy: str, **options: Any) -> tuple[Image.Image, dict[str, Any]]:
    """How a strategy cuts a picture: its tiles drawn on what the encoder sees, numbered in reading order.

    Args:
        strategy: one of `STRATEGIES`. options: its fields.

    Returns:
        The drawing: a panel for each size to which the picture is brought, hatched where there is padding. And
        `tiles`, how many; `grid`, columns and rows of the fine view; `tokens`, visual tokens of the system's own
        connector; `pixels` that the encoder reads; and `cost`, GFLOPs of BLIP-2's ViT-g/14 on these tiles, whatever
        encoder the system has: what strategies cost, compared by one encoder.

    Raises:
        UsageError: an unknown strategy or option.
    """
    plan = resolution.build(strategy, **options).plan(*image.size)
    facts: dict[str, Any] = {
        "tiles": len(plan.tiles),
        "grid": plan.grid,
        "tokens": plan.tokens,
        "pixels": sum(tile.size[0] * tile.size[1] for tile in plan.tiles),
        "cost": sum(_gflops(*tile.size) for tile in plan.tiles),
    }
    whole = None if plan.overview is None else _canvas(plan.tiles[plan.overview])
    kinds = sorted(dict.fromkeys(map(_canvas, plan.tiles)), key=lambda canvas: canvas == whole)
    panels = [_panel(image, plan, canvas, SIDE // 2 if place else SIDE) for place, canvas in enumerate(kinds)]
    gap, head, foot = 16, 56, 92
    height = head + sum(panel.height + gap for panel in panels) + foot
    card = Image.new("RGB", (SIDE + 2 * gap, height), GROUND)
    pen, y = ImageDraw.Draw(card), head
    for panel in panels:
        card.paste(panel, ((card.width - panel.width) // 2, y))
        y += panel.height + gap
    size = " and ".join(f"{w} x {h}" for w, h in dict.fromkeys(tile.size for tile in plan.tiles))
    tiles = "1 tile" if len(plan.tiles) == 1 else f"{len(plan.tiles)} tiles"
    first, second = f"{plan.tokens:,} tokens", f"{facts['pixels'] / 1e6:.2f} Mpx, {facts['cost']:,.0f} GFLOP"
    right = card.width - gap
    pen.text((gap, head / 2), strategy, fill=INK, font=_font(32), anchor="lm")
    pen.text((gap, height - foot / 2 - 18), f"{tiles} of {size}", fill=INK, font=_font(28), anchor="lm")
    pen.text((right, height - foot / 2 - 18), first, fill=INK, font=_font(28), anchor="rm")
    pen.text((gap, height - foot / 2 + 20), second, fill=FAINT, font=_font(24), anchor="lm")
    return card, facts


def _heated(picture: Image.Image, heat: Tensor, box: Box) -> Image.Image:
    """The picture under the heat: colours by share of the hottest patch, more opaque where it is hotter."""
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
    """Violet over red to orange for 0 to 1, float[..., 3] in 0..255: what of `inferno` is seen on dark and on white."""
    return 255 * matplotlib.colormaps["inferno"](0.25 + 0.55 * level)[..., :3]


def _scale(card: Image.Image, y: int, height: int, peak: float) -> None:
    """A bar from 0 % to the share of the hottest patch, in the strip of that height at y."""
    pen, margin, middle = ImageDraw.Draw(card), 14, y + height // 2
    font = _font(24)
    low, high = "0 %", f"{100 * peak:.0f} % in one patch"
    start = margin + round(pen.textlength(low, font)) + 12
    stop = card.width - margin - round(pen.textlength(high, font)) - 12
    pen.text((margin, middle), low, fill=INK, font=font, anchor="lm")
    pen.text((card.width - margin, middle), high, fill=INK, font=font, anchor="rm")
    if stop - start > 20:
        bar = _colours(np.linspace(0, 1, stop - start))[None].astype(np.uint8).repeat(18, axis=0)
        card.paste(Image.fromarray(bar), (start, middle - 9))


def _canvas(tile: Tile) -> tuple[tuple[int, int], ...]:
    return tile.content, tile.canvas, tile.offset


def _panel(image: Image.Image, plan: Plan, canvas: tuple[tuple[int, int], ...], side: int) -> Image.Image:
    """The picture as it is resized and pasted for some tiles, and those tiles on it; the longest side as given."""
    content, size, offset = canvas
    zoom = side / max(size)
    across, down = (max(1, round(zoom * length)) for length in size)
    panel = _hatched(across, down)
    width, height = (max(1, round(zoom * length)) for length in content)
    panel.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), _zoomed(offset, zoom))
    pen = ImageDraw.Draw(panel)
    for number, tile in enumerate(plan.tiles, start=1):
        if _canvas(tile) != canvas:
            continue
        left, top = _zoomed(tile.box[:2], zoom)
        right, bottom = _zoomed(tile.box[2:], zoom)
        colour = OVERVIEW if plan.overview == number - 1 else TILE
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=4)
        _badge(pen, (left, top), f"{number}", colour, min(40, (bottom - top) // 3))
    return panel


def _badge(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: tuple[int, int, int], size: int
) -> None:
    font = _font(max(size, 12))
    x, y = corner
    width, height = round(pen.textlength(text, font)) + size // 2, round(1.25 * max(size, 12))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + width / 2, y + height / 2), text, fill=GROUND, font=font, anchor="mm")


def _hatched(width: int, height: int) -> Image.Image:
    """Diagonal stripes: nothing of the picture is there."""
    panel = Image.new("RGB", (width, height), (52, 56, 66))
    pen = ImageDraw.Draw(panel)
    for x in range(-height, width, 18):
        pen.line((x, height, x + height, 0), fill=(96, 102, 114), width=3)
    return panel


def _zoomed(point: tuple[int, ...], zoom: float) -> tuple[int, int]:
    x, y = point
    return round(zoom * x), round(zoom * y)


def _gflops(width: int, height: int) -> float:
    """10^9 operations of ViT-g/14 on one tile, 2 for a multiplication and an addition; without norms and the like."""
    size = VIT_G
    tokens = width * height / size.patch_size**2 + 1
    linear = 4 * size.width**2 + 2 * size.width * size.mlp_hidden  # multiplications per token and block
    blocks = size.depth * (tokens * linear + 2 * tokens**2 * size.width)
    return 2 * (blocks + (tokens - 1) * 3 * size.patch_size**2 * size.width) / 1e9


def _sized(image: Image.Image, side: int) -> Image.Image:
    """RGB, its longest side of so many pixels."""
    zoom = side / max(image.size)
    width, height = (max(1, math.ceil(zoom * length)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
