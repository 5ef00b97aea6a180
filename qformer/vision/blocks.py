"""Parts of the vision transformers in this folder, under the names that timm and many released files use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.vision.layers import Linear, one_dtype
from qformer.vision.packed import Segments, attend, split_heads

if TYPE_CHECKING:
    from collections.abc import Callable


class PatchEmbed(nn.Module):
    """Patch embedding by one convolution: float[N, 3, h, w] -> [N, rows * columns, D]."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels, weight, bias = one_dtype(pixels, self.proj.weight, self.proj.bias)
        patches = F.conv2d(pixels, weight, bias, stride=self.proj.stride)  # (N, D, rows, columns)
        return patches.flatten(2).transpose(1, 2)  # (N, rows * columns, D)


class Mlp(nn.Module):
    """Feed-forward of two layers, [..., D] -> [..., D]; the activation is an exact (erf) GELU by default."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream float32[N, S, D], or float32[n, D] of packed tiles."""

    def __init__(
        self, width: int, heads: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, x: Tensor, segments: Segments | None = None, *turn: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), segments, *turn)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention within each tile, [N, S, D] -> [N, S, D] or packed [n, D] -> [n, D].

    With `turn`, the cosines and sines [S or n, 1, D / heads] of places, queries and keys are rotated first.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, segments: Segments | None = None, *turn: Tensor) -> Tensor:
        query, key, value = split_heads(self.qkv(x), self.heads)
        if turn:
            query, key = rotated(query, *turn), rotated(key, *turn)
        return self.proj(attend(query, key, value, segments))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d / 2) of [..., d] by angles, given as cosines and sines; computed in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU's approximation of CLIP: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)
