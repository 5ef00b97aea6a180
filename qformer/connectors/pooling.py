"""Connectors that pool the patches of a tile to a square grid: DeCo's, and the C-Abstractor of Honeybee."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.connectors.base import Connector, perceptron, square_root
from qformer.vision.base import resize_positions

if TYPE_CHECKING:
    from qformer.types import Plan


class AvgPool(Connector):
    """DeCo's connector (arXiv:2405.20985, "2D Adaptive Pooling"): adaptive average pooling, Linear, GELU, Linear."""

    def __init__(self, width: int, llm_width: int, queries: int = 144, hidden: int | None = None) -> None:
        """Make the MLP behind the pooling.

        Args:
            queries: embeddings of each tile, a square number.
            hidden: width between the two layers, by default that of the language model.

        Raises:
            UsageError: queries that are no square.
        """
        super().__init__()
        self.queries, self.side = queries, square_root(queries, self)
        self.mlp = perceptron(width, hidden or llm_width, llm_width)

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """float[n, S, D] -> float[n, Q, L]."""
        pooled = F.adaptive_avg_pool2d(tokens.unflatten(1, grid).permute(0, 3, 1, 2), self.side)  # (n, D, side, side)
        return self.mlp(pooled.flatten(2).mT)

    def count_part(self, plan: Plan) -> int:
        """Q for each tile."""
        return self.queries * len(plan.tiles)


class CAbstractor(Connector):
    """Honeybee's C-Abstractor (arXiv:2312.06742): convolutions, adaptive average pooling, convolutions.

    Each of the two stages has `depth` blocks of RegNet with squeeze and excitation (`Block`); a Linear, SiLU and Linear
    read out. The learned places of the patches are interpolated to grids that are not `side` x `side`.
    """

    def __init__(
        self, width: int, llm_width: int, queries: int = 144, hidden: int = 1024, depth: int = 3, side: int = 24
    ) -> None:
        """Make it with weights that start at random.

        Args:
            queries: embeddings of each tile, a square number.
            hidden: width of the convolutions.
            depth: blocks before the pooling, and behind it.
            side: of the grid of patches for which places are learned.

        Raises:
            UsageError: queries that are no square.
        """
        super().__init__()
        self.queries, pooled = queries, square_root(queries, self)
        self.pos_emb = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, side * side, width), std=0.02))
        self.net = nn.Sequential(
            stage(depth, width, hidden), nn.AdaptiveAvgPool2d(pooled), stage(depth, hidden, hidden)
        )
        self.readout = perceptron(hidden, llm_width, llm_width, nn.SiLU)

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """float[n, S, D] -> float[n, Q, L]."""
        placed = tokens + resize_positions(self.pos_emb, 0, grid)
        return self.readout(self.net(placed.unflatten(1, grid).permute(0, 3, 1, 2)).flatten(2).mT)

    def count_part(self, plan: Plan) -> int:
        """Q for each tile."""
        return self.queries * len(plan.tiles)


def stage(depth: int, width: int, hidden: int) -> nn.Sequential:
    """Blocks of RegNet, named b1, b2, ...; the first one maps float[n, width, h, w] to `hidden` channels."""
    blocks = nn.Sequential()
    for number in range(depth):
        blocks.add_module(f"b{number + 1}", Block(hidden if number else width, hidden))
    return blocks


class Block(nn.Module):
    """RegNet's block Y (arXiv:2003.13678) with SiLU and LayerNorm, as Honeybee has it.

    A 1x1 convolution, a 3x3 one of each channel by itself, squeeze and excitation, and a 1x1 one; around them the
    input, which a convolution brings to another width.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = Convolution(width, hidden, 1)
        self.conv2 = Convolution(hidden, hidden, 3, groups=hidden)
        self.se = Excitation(hidden, max(round(width / 4), 1))
        self.conv3 = Convolution(hidden, hidden, 1, activate=False)
        self.downsample = nn.Identity() if width == hidden else Convolution(width, hidden, 1, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[n, width, h, w] -> float[n, hidden, h, w]."""
        return F.silu(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


class Convolution(nn.Module):
    """A convolution without bias that keeps the size, a LayerNorm over channels and, unless left out, a SiLU."""

    def __init__(self, width: int, out: int, size: int, groups: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, size, padding=size // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(out, eps=1e-6)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """float[n, width, h, w] -> float[n, out, h, w]."""
        x = self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(x) if self.activate else x


class Excitation(nn.Module):
    """Squeeze and excitation: channels are scaled by what a small MLP makes of their means."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """float[n, width, h, w] -> the same shape."""
        return x * self.fc2(F.silu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))).sigmoid()
