"""EVA-CLIP ViT-g/14, the image encoder of BLIP-2: a plain pre-norm ViT without a final norm that keeps every token.

Sources: EVA (arXiv 2211.07636) and BLIP-2 (arXiv 2301.12597, section 3.4). Parameters have the names under
`visual_encoder` in LAVIS's checkpoints, which therefore load once the prefix is stripped.

BLIP-2 stores Linear and Conv weights in fp16 and the rest in fp32; `store` is that rule. The residual stream and
the output are always fp32, inside and outside autocast.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.files import releases
from qformer.files.tensors import read_tensors
from qformer.vision.base import resize_positions
from qformer.vision.blocks import Mlp, PatchEmbed
from qformer.vision.layers import Linear, ViTOptions, assign, one_dtype, store
from qformer.vision.packed import Segments, Tower, attend, split_heads

if TYPE_CHECKING:
    from collections.abc import Mapping


class EvaOptions(ViTOptions, Protocol):
    norm_eps: float


def build(config: EvaOptions) -> EvaViT:
    """Build the encoder; see `EvaConfig.build`."""
    if config.weights is None:
        return EvaViT(config)
    return build_from(config, read_tensors(releases.local(config.weights)), config.weights)


def build_from(config: EvaOptions, state: Mapping[str, Tensor], source: str) -> EvaViT:
    """Build the encoder from tensors; see `EvaConfig.build_from`."""
    with torch.device("meta"):  # ViT-g is a billion numbers: do not draw them only to overwrite them
        encoder = EvaViT(config)
    unused = eva_unused(config.depth)
    assign(encoder, {name: tensor for name, tensor in state.items() if name not in unused}, source)
    return encoder


class EvaViT(Tower):
    """The vision transformer; tokens are CLS, then the patches row by row."""

    def __init__(self, config: EvaOptions) -> None:
        super().__init__(
            width=config.width,
            patch_size=config.patch_size,
            image_size=config.image_size,
            depth=config.depth,
            layers=config.layers,
            extra=1,
        )
        side = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extra + side * side, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.reset_parameters()
        if config.precision == "fp16":
            store(self, "fp16")
        self.stop_gradients()

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalized pixels float[N, 3, h, w] -> float32[N, 1 + rows * columns, D]."""
        grid = self.grid(pixels.shape[-1], pixels.shape[-2])
        positions = resize_positions(self.pos_embed, self.extra, grid, self.align_corners, self.interpolation)
        patches = self.patch_embed(pixels)
        cls = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([cls, patches], dim=1) + positions  # (N, S, D); CLS and positions are fp32, so this is

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from a truncated normal of 0.02; as in BEiT, outputs of block n are divided by sqrt(2n)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight /= math.sqrt(2 * number)
            block.mlp.fc2.weight /= math.sqrt(2 * number)


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream float32[N, S, D], or float32[n, D] of packed tiles."""

    def __init__(self, config: EvaOptions) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_hidden)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), segments)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention, [N, S, D] -> [N, S, D], or [n, D] -> [n, D] within each of `segments`.

    Queries and values have a bias, keys have none: softmax cancels it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(*one_dtype(x, self.qkv.weight, bias))
        query, key, value = split_heads(qkv, self.heads)
        return self.proj(attend(query, key, value, segments))


EVA = (  # here and in LAVIS, in transformers
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    ("patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
)
EVA_BLOCK = (
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.proj", "self_attn.projection"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
#: What the released EVA may hold beyond what BLIP-2 uses: its final norm and classification head.
EVA_HEAD = ("norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
EVA_RELEASED_DEPTH = 40  # BLIP-2 reads the output of the block before the last


def eva_rows(depth: int) -> list[tuple[str, str | None]]:
    """List every tensor of EVA with its name here and in LAVIS, and in transformers; None for biases merged there."""
    return [*EVA, *(row for block in range(depth) for row in _eva_block_rows(block))]


def eva_unused(depth: int) -> set[str]:
    """List the tensors in the released file that an encoder of this depth does not use, such as the 40th block."""
    last = range(depth, EVA_RELEASED_DEPTH if depth == EVA_RELEASED_DEPTH - 1 else depth)
    return {*EVA_HEAD, *(ours for block in last for ours, _ in _eva_block_rows(block))}


def _eva_block_rows(block: int) -> list[tuple[str, str | None]]:
    ours, theirs = f"blocks.{block}.", f"encoder.layers.{block}."
    rows: list[tuple[str, str | None]] = [(f"{ours}attn.q_bias", None), (f"{ours}attn.v_bias", None)]
    rows.append((f"{ours}attn.qkv.weight", f"{theirs}self_attn.qkv.weight"))
    for mine, name in EVA_BLOCK:
        rows += [(f"{ours}{mine}.{kind}", f"{theirs}{name}.{kind}") for kind in ("weight", "bias")]
    return rows
