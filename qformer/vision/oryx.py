"""Oryx-ViT: SigLIP with patches of 16 at the picture's own size, whose large position table is resized bilinearly.

Source: Oryx (arXiv 2409.12961) and its released code. There is no CLS token and no final norm. Parameters have the
names of the released weights, which are those of timm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qformer.files.tensors import read_tensors
from qformer.vision.base import resize_positions
from qformer.vision.blocks import Block, PatchEmbed
from qformer.vision.layers import TowerOptions, assign, of_tower, store
from qformer.vision.packed import Tower

if TYPE_CHECKING:
    from collections.abc import Mapping

HALF = (0.5, 0.5, 0.5)
#: What the files may hold beyond the blocks: SigLIP's final norm and pooling, which Oryx does not use.
END = ("norm.", "fc_norm.", "attn_pool.", "head.")


def build(config: TowerOptions) -> OryxViT:
    """Build the encoder; see `OryxConfig.build`."""
    if config.weights is None:
        return OryxViT(config)
    return build_from(config, read_tensors(config.weights), config.weights)


def build_from(config: TowerOptions, state: Mapping[str, Tensor], source: str) -> OryxViT:
    """Build the encoder from tensors; see `OryxConfig.build_from`."""
    with torch.device("meta"):
        encoder = OryxViT(config)
    assign(encoder, of_tower(state, source, END), source, statistics=(HALF, HALF))
    return encoder


class OryxViT(Tower):
    """The vision transformer; tokens are the patches row by row."""

    interpolation = "bilinear"

    def __init__(self, config: TowerOptions) -> None:
        super().__init__(
            width=config.width,
            patch_size=config.patch_size,
            image_size=config.image_size,
            depth=config.depth,
            layers=config.layers,
            extra=0,
            mean=HALF,
            std=HALF,
        )
        side = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, side * side, config.width))
        blocks = (Block(config.width, config.heads, config.mlp_hidden) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        store(self, config.precision)
        self.stop_gradients()

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalized pixels float[N, 3, h, w] -> float32[N, rows * columns, D]."""
        grid = self.grid(pixels.shape[-1], pixels.shape[-2])
        return self.patch_embed(pixels) + resize_positions(
            self.pos_embed, self.extra, grid, self.align_corners, self.interpolation
        )
