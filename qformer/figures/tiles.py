"""Drawings of the slices of a resolution strategy, with their cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from qformer import resolution
from qformer.figures.cost import gflops, in_words, usual
from qformer.figures.heat import FAINT, GROUND, INK, SIDE, load_font
from qformer.resolution.measures import useful

if TYPE_CHECKING:
    from qformer.figures.cost import Cost
    from qformer.types import Plan, Tile


#: Names of the resolution strategies.
STRATEGIES = list(resolution.STRATEGIES)


TILE, OVERVIEW = (255, 196, 0), (90, 200, 250)
THINNEST = 40  # pixels: a strip has room for its number beside it


def slices(image: Image.Image, strategy: str, **options: Any) -> tuple[Image.Image, dict[str, Any]]:
    """Draw the tiles of a strategy on what the encoder sees, numbered in reading order.

    Args:
        strategy: one of `STRATEGIES`. options: its fields.

    Returns:
        The drawing, with a panel for each size to which the picture is resized, hatched where there is padding, and an
        estimate of the time to the first token (`qformer.figures.cost`). And numbers: `tiles`; `grid`, columns and rows
        of the fine view; `tokens`, visual tokens of the strategy's usual connector; `pixels` that the encoder reads;
        `cost`, GFLOPs of BLIP-2's ViT-g/14 on these tiles, one encoder for all strategies; and `exposed`, the fault
        that the strategy is there to show.

    Raises:
        UsageError: an unknown strategy or option.
    """
    rule = resolution.build(strategy, **options)
    plan = rule.plan(*image.size)
    return draw(image, plan, strategy, usual(plan)), {
        "tiles": len(plan.tiles),
        "grid": plan.grid,
        "tokens": plan.tokens,
        "pixels": _pixels(plan),
        "cost": gflops(plan),
        "exposed": rule.exposed,
    }


def draw(image: Image.Image, plan: Plan, title: str, cost: Cost) -> Image.Image:
    """Draw the tiles of a plan of this picture with their cost, see `slices`."""
    whole = None if plan.overview is None else _canvas(plan.tiles[plan.overview])
    kinds = sorted(dict.fromkeys(map(_canvas, plan.tiles)), key=lambda canvas: canvas == whole)
    panels = [_panel(image, plan, canvas, SIDE // 2 if place else SIDE) for place, canvas in enumerate(kinds)]
    gap, head, foot = 16, 56, 132
    height = head + sum(panel.height + gap for panel in panels) + foot
    card = Image.new("RGB", (SIDE + 2 * gap, height), GROUND)
    pen, y = ImageDraw.Draw(card), head
    for panel in panels:
        card.paste(panel, ((card.width - panel.width) // 2, y))
        y += panel.height + gap
    size = " and ".join(f"{w} x {h}" for w, h in dict.fromkeys(tile.size for tile in plan.tiles))
    tiles = "1 tile" if len(plan.tiles) == 1 else f"{len(plan.tiles)} tiles"
    second = f"{useful(plan):.0%} used, {_pixels(plan) / 1e6:.2f} Mpx, {cost.encoder:,.0f} GFLOP to encode"
    third = f"first token in about {in_words(cost.seconds)} (estimate, {cost.machine.partition(',')[0]})"
    right = card.width - gap
    pen.text((gap, head / 2), title, fill=INK, font=load_font(32), anchor="lm")
    pen.text((gap, y + 20), f"{tiles} of {size}", fill=INK, font=load_font(28), anchor="lm")
    pen.text((right, y + 20), f"{plan.tokens:,} tokens", fill=INK, font=load_font(28), anchor="rm")
    pen.text((gap, y + 60), second, fill=FAINT, font=load_font(24), anchor="lm")
    pen.text((gap, y + 98), third, fill=FAINT, font=load_font(24), anchor="lm")
    return card


def _pixels(plan: Plan) -> int:
    return sum(tile.size[0] * tile.size[1] for tile in plan.tiles)


def _canvas(tile: Tile) -> tuple[tuple[int, int], ...]:
    return tile.content, tile.canvas, tile.offset


def _panel(image: Image.Image, plan: Plan, canvas: tuple[tuple[int, int], ...], side: int) -> Image.Image:
    """Draw the picture as resized and padded for some tiles, and those tiles on it; its longest side is `side`."""
    content, size, offset = canvas
    zoom = side / max(size)
    across, down = (max(1, round(zoom * length)) for length in size)
    panel = Image.new("RGB", (max(across, THINNEST), max(down, THINNEST)), GROUND)
    panel.paste(_hatched(across, down))
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
        _badge(pen, (left, top), f"{number}", colour, min(40, (bottom - top) // 3, (right - left) // 3))
    return panel


def _badge(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: tuple[int, int, int], size: int
) -> None:
    size = max(size, 12)
    font = load_font(size)
    x, y = corner
    width, height = round(pen.textlength(text, font)) + size // 2, round(1.25 * size)
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
