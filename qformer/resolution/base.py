"""Resolution strategies: pure geometry that divides an image of a given size into tiles, without pixels or weights.

`ResolutionStrategy.plan` plans the tiles; `cut` cuts them from an image. A new strategy is a dataclass with a `plan`
method and an entry in the table of `qformer.resolution`; nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from qformer.types import Plan, Tile, Tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ResolutionStrategy(ABC):
    """A rule that divides images of any size into tiles. Subclasses are frozen dataclasses; fields are YAML options."""

    @abstractmethod
    def plan(self, width: int, height: int) -> Plan:
        """Plan the tiles for an image of `width` x `height` pixels, in the order in which the LLM reads them."""


def resize(image: Tensor, width: int, height: int) -> Tensor:
    """Resize bicubically with antialiasing, as PIL does: uint8[3, h, w] -> uint8[3, height, width].

    Bytes in channels-last order take torch's vectorized path, which rounds to bytes between the two passes like PIL.
    Floats from 0 to 1 are clamped to this range, as bytes are, since bicubic interpolation overshoots.
    """
    import torch  # imported here, so that the options of a strategy are checked without torch
    import torch.nn.functional as F

    if image.shape[-2:] == (height, width):
        return image
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    made = F.interpolate(batch, (height, width), mode="bicubic", antialias=True, align_corners=False).squeeze(0)
    return made.clamp(0, 1) if made.is_floating_point() else made


def cut(image: Tensor, plan: Plan) -> list[Tensor]:
    """Cut the tiles of one image: uint8[3, h, w] -> a list of uint8[3, tile height, tile width].

    Tiles that share content, canvas and offset are cropped from one resized image; where a canvas is larger than
    its content it has the colour `fill`, black by default. A crop that is `scaled` is resized once more.
    """
    canvases: dict[tuple[tuple[int, ...], ...], Tensor] = {}
    tiles = []
    for tile in plan.tiles:
        key = (tile.content, tile.canvas, tile.offset, tile.fill)
        if key not in canvases:
            canvases[key] = _paste(resize(image, *tile.content), tile)
        left, top, right, bottom = tile.box
        pixels = canvases[key][:, top:bottom, left:right]
        tiles.append((pixels if tile.scaled is None else resize(pixels, *tile.scaled)).contiguous())
    return tiles


def _paste(content: Tensor, tile: Tile) -> Tensor:
    import torch

    if tile.canvas == tile.content:
        return content
    width, height = tile.canvas
    x, y = tile.offset
    fill = torch.tensor(tile.fill, device=content.device)[:, None, None]
    canvas = (fill / 255 if content.is_floating_point() else fill).to(content.dtype).repeat(1, height, width)
    canvas[:, y : y + content.shape[1], x : x + content.shape[2]] = content
    return canvas


def cut_all(images: Sequence[Tensor], strategy: ResolutionStrategy) -> Tiles:
    """Plan and cut several images, each uint8[3, h, w]."""
    plans = [strategy.plan(image.shape[2], image.shape[1]) for image in images]
    return Tiles([tile for image, plan in zip(images, plans, strict=True) for tile in cut(image, plan)], plans)
