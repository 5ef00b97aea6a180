"""An image encoder that learns from labels: the properties of the objects in pictures, and their number."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.canvases.canvas import MOST
from qformer.stages.towers.canvas_views import VALUES
from qformer.stages.towers.encoders import build_encoder, save_rope, save_vit, start_encoder
from qformer.vision.hf import HFVisionEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qformer.config import BackboneConfig
    from qformer.scenes.phrases import Properties
    from qformer.vision.qwen2vl import Qwen2VLViT


class LabeledTower(nn.Module):
    """An image encoder for pictures of any size, with linear classifiers that are discarded afterward.

    One for each property reads the mean token of an object, so that tokens learn what is at their own place; one for
    the number of objects reads the mean of all tokens.

    Attributes:
        encoder: a ViT whose table is interpolated, or, for the kind `rope`, a tower of Qwen2-VL's form.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config)
        if config.start is not None:
            start_encoder(self.encoder, config.start)
        self.classifiers = nn.ModuleDict({key: nn.Linear(config.width, len(values)) for key, values in VALUES.items()})
        self.counter = nn.Linear(config.width, MOST + 1)

    def forward(
        self, pictures: Sequence[Tensor], boxes: Sequence[Tensor], objects: Sequence[Sequence[Properties]]
    ) -> dict[str, Tensor]:
        """Compute the mean cross-entropy of each property over the objects that have it, 0 if none has, and of `count`.

        Args:
            pictures: uint8[3, h, w] each.
            boxes: float[objects, 4] of each picture, left, top, right and bottom in pixels.
            objects: properties of the objects of each picture, in the same order.
        """
        tokens = self.patches(pictures)
        rows = torch.cat([self._regions(*one) for one in zip(pictures, boxes, tokens, strict=True)])
        known = [item for own in objects for item in own]
        losses = {}
        for key, values in VALUES.items():
            chosen = [number for number, item in enumerate(known) if key in item]
            labels = torch.tensor([values.index(known[number][key]) for number in chosen], device=rows.device)
            found = self.classifiers[key](rows[chosen])
            losses[key] = F.cross_entropy(found, labels) if chosen else found.sum()
        numbers = torch.tensor([len(own) for own in objects], device=rows.device)
        means = torch.stack([own.mean(dim=0) for own in tokens])
        losses["count"] = F.cross_entropy(self.counter(means), numbers.clamp(max=MOST))
        return losses

    def patches(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Encode pictures uint8[3, h, w]; the tokens of each, float[rows * columns, width], without CLS."""
        pixels = [picture.to(self.counter.weight.device).float() / 255 for picture in pictures]
        return [tokens[self.encoder.extra :] for tokens in self.encoder.encode_all(pixels)]

    def save(self, folder: Path) -> None:
        """Write the encoder as a folder of transformers, or of Qwen2-VL's tower."""
        if isinstance(self.encoder, HFVisionEncoder):
            save_vit(self.encoder.tower, self.encoder.image_size, folder)
        else:
            save_rope(cast("Qwen2VLViT", self.encoder), folder)

    def _regions(self, picture: Tensor, boxes: Tensor, tokens: Tensor) -> Tensor:
        """Mean token of each box, weighted by the pixels that they share: float[objects, width]."""
        side = self.encoder.patch_size
        shared = overlaps(boxes.to(tokens.device), (picture.shape[1] // side, picture.shape[2] // side), side)
        return (shared / shared.sum(dim=1, keepdim=True)).to(tokens.dtype) @ tokens


def overlaps(boxes: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Pixels that each patch shares with each box: float[R, rows * columns].

    Args:
        boxes: float[R, 4], left, top, right and bottom.
        grid: (rows, columns) of patches of `side` pixels.
    """
    down, across = (
        (torch.minimum(high, edges + side) - torch.maximum(low, edges)).clamp(min=0)
        for low, high, edges in (
            (boxes[:, first, None], boxes[:, first + 2, None], side * torch.arange(count, device=boxes.device))
            for first, count in ((1, grid[0]), (0, grid[1]))
        )
    )
    return (down[:, :, None] * across[:, None]).flatten(1)
