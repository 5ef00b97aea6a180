"""CLIP ViT-L/14 as BLIP-2 uses it: the residual stream after the second-to-last block, without a norm, with CLS.

Sources: CLIP (arXiv 2103.00020) and BLIP-2 (arXiv 2301.12597, section 3.4). Parameters have the names of the released
`clip_vit_L.pth` and of `visual_encoder` in LAVIS's checkpoints. `store` leaves the joint projection of queries,
keys and values in fp32, as in the original. CLIP models of transformers are loaded by `qformer.vision.hf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.files import releases
from qformer.files.tensors import read_tensors
from qformer.vision.base import resize_positions
from qformer.vision.blocks import quick_gelu
from qformer.vision.layers import Linear, ViTOptions, assign, one_dtype, store
from qformer.vision.packed import Segments, Tower, attend, split_heads

if TYPE_CHECKING:
    from collections.abc import Mapping


def build(config: ViTOptions) -> ClipViT:
    """Build the encoder; see `ClipConfig.build`."""
    if config.weights is None:
        return ClipViT(config)
    return build_from(config, read_tensors(releases.local(config.weights)), config.weights)


def build_from(config: ViTOptions, state: Mapping[str, Tensor], source: str) -> ClipViT:
    """Build the encoder from tensors; see `ClipConfig.build_from`."""
    with torch.device("meta"):
        encoder = ClipViT(config)
    unused = clip_unused(config.depth)
    kept = {name: tensor for name, tensor in state.items() if name not in unused}
    assign(encoder, kept, source, positions="positional_embedding")
    return encoder


class ClipViT(Tower):
    """The vision transformer; tokens are CLS, then the patches row by row."""

    align_corners = True

    def __init__(self, config: ViTOptions) -> None:
        super().__init__(
            width=config.width,
            patch_size=config.patch_size,
            image_size=config.image_size,
            depth=config.depth,
            layers=config.layers,
            extra=1,
        )
        side, width = config.image_size // config.patch_size, config.width
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(1 + side * side, width))
        self.conv1 = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(config) for _ in range(config.depth))})
        if config.precision == "fp16":
            store(self, "fp16")
        self.stop_gradients()

    def stack(self) -> nn.ModuleList:
        return cast("nn.ModuleList", self.transformer["resblocks"])

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalized pixels float[N, 3, h, w] -> float32[N, 1 + rows * columns, D]."""
        grid = self.grid(pixels.shape[-1], pixels.shape[-2])
        positions = resize_positions(
            self.positional_embedding[None], self.extra, grid, self.align_corners, self.interpolation
        )
        pixels, weight, _ = one_dtype(pixels, self.conv1.weight, None)
        patches = (
            F.conv2d(pixels, weight, stride=self.conv1.stride).flatten(2).transpose(1, 2)
        )  # (N, rows * columns, D)
        cls = self.class_embedding.expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([cls, patches], dim=1) + positions)  # (N, S, D), fp32 as CLS and positions are


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream float32[N, S, D], or float32[n, D] of packed tiles."""

    def __init__(self, config: ViTOptions) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width)
        inner, outer = Linear(config.width, config.mlp_hidden), Linear(config.mlp_hidden, config.width)
        self.mlp = nn.ModuleDict({"c_fc": inner, "c_proj": outer})

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), segments)
        return x + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(x))))


class Attention(nn.Module):
    """Self-attention, [N, S, D] -> [N, S, D], or [n, D] -> [n, D] within each of `segments`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(width**-0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        qkv = F.linear(*one_dtype(x, self.in_proj_weight, self.in_proj_bias))
        query, key, value = split_heads(qkv, self.heads)
        return self.out_proj(attend(query, key, value, segments))


CLIP = ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
CLIP_BLOCK = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
#: What the released CLIP holds beyond what BLIP-2 uses: its final norm and projection.
CLIP_END = ("ln_post.weight", "ln_post.bias", "proj")
CLIP_RELEASED_DEPTH = 24


def clip_names(depth: int) -> list[str]:
    """List every tensor of CLIP's image encoder by its name here and in LAVIS; transformers' BLIP-2 has none for it."""
    return [*CLIP, *(name for block in range(depth) for name in _clip_block_names(block))]


def clip_unused(depth: int) -> set[str]:
    """List the tensors in the released file that an encoder of this depth does not use."""
    return {*CLIP_END, *(name for block in range(depth, CLIP_RELEASED_DEPTH) for name in _clip_block_names(block))}


def _clip_block_names(block: int) -> list[str]:
    start = f"transformer.resblocks.{block}."
    joined = [f"{start}attn.in_proj_{kind}" for kind in ("weight", "bias")]
    return joined + [f"{start}{name}.{kind}" for name in CLIP_BLOCK for kind in ("weight", "bias")]
