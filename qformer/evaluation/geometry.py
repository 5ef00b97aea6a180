"""Geometry of a strategy on pictures of several shapes: what is seen how often, what is cut, what is padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer.evaluation.probes import coverage, cut_boxes, scaled, useful
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.resolution.base import ResolutionStrategy

#: (width, height) of pictures, made for tiles of 512 pixels.
PICTURES = ((384, 384), (768, 768), (1024, 768), (768, 1024), (1920, 1080), (1536, 512), (512, 1536))
CELLS, FINE = 3, 24  # along a side: of the map that is shown, and of the one whose extremes are
OBJECT = 6  # so many of them fit beside one another along the shorter side
STEPS = 48  # places of an object along each side


def geometry(
    strategy: ResolutionStrategy, tile: int = 512, pictures: Sequence[tuple[int, int]] = PICTURES
) -> list[dict[str, Any]]:
    """Measure a strategy on each picture, without a model.

    An object is a square of a sixth of the picture's shorter side; it stands at 48 x 48 places, evenly from corner to
    corner, and is cut where no tile of the fine view shows it whole.

    Args:
        tile: side of the tiles; `pictures` are made for 512, and scaled to it.

    Returns:
        A record for each: `image`, `grid` (columns, rows), `tiles`; `coverage`, 3 rows of 3 numbers of tiles that see
        the middle of the cell; `least` and `most` of 24 x 24 cells; `cut` and `padding`, shares in 0..1. Where the
        strategy refuses the picture, `image` and `refused`, why.
    """
    found: list[dict[str, Any]] = []
    for size in pictures:
        width, height = (scaled(length, tile) for length in size)
        try:
            plan = strategy.plan(width, height)
        except (UsageError, BadSample) as bad:
            found.append({"image": [width, height], "refused": str(bad)})
            continue
        fine = coverage(plan, FINE, FINE)
        cut = cut_boxes(plan, _objects(width, height))
        found.append(
            {
                "image": [width, height],
                "grid": list(plan.grid),
                "tiles": len(plan.tiles),
                "coverage": coverage(plan, CELLS, CELLS).tolist(),
                "least": int(fine.min()),
                "most": int(fine.max()),
                "cut": round(sum(cut) / len(cut), 4),
                "padding": round(1 - useful(plan), 4),
            }
        )
    return found


def _objects(width: int, height: int) -> list[tuple[float, float, float, float]]:
    side = min(width, height) // OBJECT
    across, down = ([step * (length - side) / (STEPS - 1) for step in range(STEPS)] for length in (width, height))
    return [(x, y, x + side, y + side) for y in down for x in across]
