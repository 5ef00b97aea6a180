"""Drawings of the slices of a resolution strategy, with their cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from qformer import resolution
from qformer.figures.heat import FAINT, GROUND, INK, SIDE, load_font
from qformer.resolution.measures import useful
from qformer.vision.options import EvaConfig

if TYPE_CHECKING:
    from qformer.types import Plan, Tile


#: Names of the resolution strategies.
STRATEGIES = list(resolution.STRATEGIES)
#: Sizes of the encoder for which costs are computed: BLIP-2's ViT-g/14.
VIT_G = EvaConfig()


TILE, OVERVIEW = (255, 196, 0), (90, 200, 250)


def slices(image: Image.Image, strategy: str, **options: Any) -> tuple[Image.Image, dict[str, Any]]:
    """Draw the tiles of a strategy on what the encoder sees, numbered in reading order.

    Args:
        strategy: one of `STRATEGIES`. options: its fields.

    Returns:
        The drawing, with a panel for each size to which the picture is resized, hatched where there is padding. And
        numbers: `tiles`; `grid`, columns and rows of the fine view; `tokens`, visual tokens of the strategy's usual
        connector; `pixels` that the encoder reads; and `cost`, GFLOPs of BLIP-2's ViT-g/14 on these tiles, one encoder
        for all strategies.

    Raises:
        UsageError: an unknown strategy or option.
    """
    plan = resolution.build(strategy, **options).plan(*image.size)
    facts: dict[str, Any] = {
        "tiles": len(plan.tiles),
        "grid": plan.grid,
        "tokens": plan.tokens,
        "pixels": sum(tile.size[0] * tile.size[1] for tile in plan.tiles),
        "cost": gflops(plan),
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
    first = f"{plan.tokens:,} tokens"
    second = f"{useful(plan):.0%} used, {facts['pixels'] / 1e6:.2f} Mpx, {facts['cost']:,.0f} GFLOP"
    right = card.width - gap
    pen.text((gap, head / 2), strategy, fill=INK, font=load_font(32), anchor="lm")
    pen.text((gap, height - foot / 2 - 18), f"{tiles} of {size}", fill=INK, font=load_font(28), anchor="lm")
    pen.text((right, height - foot / 2 - 18), first, fill=INK, font=load_font(28), anchor="rm")
    pen.text((gap, height - foot / 2 + 20), second, fill=FAINT, font=load_font(24), anchor="lm")
    return card, facts


def _canvas(tile: Tile) -> tuple[tuple[int, int], ...]:
    return tile.content, tile.canvas, tile.offset


def _panel(image: Image.Image, plan: Plan, canvas: tuple[tuple[int, int], ...], side: int) -> Image.Image:
    """Draw the picture as resized and padded for some tiles, and those tiles on it; its longest side is `side`."""
    content, size, offset = canvas
    zoom = side / max(size)
    across, down = (max(1, round(zoom * length)) for length in size)
    panel = _hatched(across, down)
    width, height = (max(1, round(zoom * length)) for length in content)
    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    panel.paste(small, _zoomed(offset, zoom))
    pen = ImageDraw.Draw(panel)
    for number, tile in enumerate(plan.tiles, start=1):
        if _canvas(tile) != canvas:
            continue
        left, top = _zoomed(tile.box[:2], zoom)
        right, bottom = _zoomed(tile.box[2:], zoom)
        colour = OVERVIEW if plan.overview == number - 1 else TILE
        right, bottom = max(right, left + 1), max(bottom, top + 1)  # a strip may be thinner than a pixel
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=4)
        _badge(pen, (left, top), f"{number}", colour, min(40, (bottom - top) // 3))
    return panel


def _badge(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: tuple[int, int, int], size: int
) -> None:
    font = load_font(max(size, 12))
    x, y = corner
    width, height = round(pen.textlength(text, font)) + size // 2, round(1.25 * max(size, 12))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + width / 2, y + height / 2), text, fill=GROUND, font=font, anchor="mm")


def _hatched(width: int, height: int) -> Image.Image:
    """Draw diagonal stripes, which stand for padding."""
    panel = Image.new("RGB", (width, height), (52, 56, 66))
    pen = ImageDraw.Draw(panel)
    for x in range(-height, width, 18):
        pen.line((x, height, x + height, 0), fill=(96, 102, 114), width=3)
    return panel


def _zoomed(point: tuple[int, ...], zoom: float) -> tuple[int, int]:
    x, y = point
    return round(zoom * x), round(zoom * y)


def side_by_side(cards: list[Image.Image]) -> Image.Image:
    """Put drawings of `slices` next to one another, up to four in a row."""
    rows = [cards[start : start + 4] for start in range(0, len(cards), 4)]
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (max(sum(card.width for card in row) for row in rows), sum(heights)), GROUND)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for card in row:
            sheet.paste(card, (left, top))
            left += card.width
        top += height
    return sheet


def gflops(plan: Plan) -> float:
    """Count 10^9 operations of BLIP-2's ViT-g/14 on the tiles, two per multiply-add, without norms and the like."""
    return sum(len(tile.frames) * _gflops(*tile.size) for tile in plan.tiles)


def _gflops(width: int, height: int) -> float:
    size = VIT_G
    tokens = width * height / size.patch_size**2 + 1
    linear = 4 * size.width**2 + 2 * size.width * size.mlp_hidden  # multiplications per token and block
    blocks = size.depth * (tokens * linear + 2 * tokens**2 * size.width)
    return 2 * (blocks + (tokens - 1) * 3 * size.patch_size**2 * size.width) / 1e9
