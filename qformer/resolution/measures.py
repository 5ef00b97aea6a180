"""Numbers about plans, for comparing strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qformer.types import Plan, Tile


def fine_tiles(plan: Plan) -> list[Tile]:
    """The tiles that show the picture in detail: all but the overview, unless it is alone."""
    return [tile for i, tile in enumerate(plan.tiles) if i != plan.overview or len(plan.tiles) == 1]


def useful(plan: Plan) -> float:
    """Share, in 0..1, of the fine tiles' area that shows the picture; the rest is padding."""
    seen = area = 0
    for tile in fine_tiles(plan):
        left, top, right, bottom = tile.box
        (x, y), (width, height) = tile.offset, tile.content
        across = min(right, x + width) - max(left, x)
        down = min(bottom, y + height) - max(top, y)
        seen += max(across, 0) * max(down, 0)
        area += (right - left) * (bottom - top)
    return seen / area


def height_scale(plan: Plan) -> float:
    """Pixels of the fine view for one pixel of the picture's height; of several pictures that of the first."""
    whole = plan.parts[0] if plan.parts else plan
    scales = []
    for tile in fine_tiles(whole):
        _, top, _, bottom = tile.box
        scales.append(tile.content[1] / whole.image[1] * (tile.size[1] / (bottom - top)))
    return max(scales)
