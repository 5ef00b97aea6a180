"""Embeddings of where a tile stands in its picture or clip, by which a Q-Former tells slices apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from qformer.types import Tile, VisualTokens

RATES = (1.0, 2.0, 4.0, 8.0)
FRAME = 1 / 8  # radians a frame at the lowest rate
WAVES = 5 * 2 * len(RATES)  # of center x and y, width, height, and frame


class PlaceEmbedding(nn.Module):
    """A linear map of sines and cosines of a tile's place; it starts at zero, so that nothing changes at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, WAVES))

    def forward(self, visual: VisualTokens) -> Tensor:
        """Embed the places of the N tiles of plans: float[N, width]."""
        waves = [waves_of(tile) for plan in visual.plans for tile in plan.tiles]
        return F.linear(torch.tensor(waves, device=self.weight.device).view(-1, WAVES), self.weight)


def waves_of(tile: Tile) -> list[float]:
    """Sines and cosines of a tile's center and size, as shares of the picture, and of its first frame."""
    (left, top, right, bottom), (x, y), (width, height) = tile.box, tile.offset, tile.content
    shares = (
        ((left + right) / 2 - x) / width,
        ((top + bottom) / 2 - y) / height,
        (right - left) / width,
        (bottom - top) / height,
    )
    angles = [
        rate * angle for angle in (*(math.pi * share for share in shares), FRAME * tile.frames[0]) for rate in RATES
    ]
    return [wave for angle in angles for wave in (math.sin(angle), math.cos(angle))]
