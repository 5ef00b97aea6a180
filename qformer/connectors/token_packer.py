"""TokenPacker: a coarse token for each block of patches, which reads finer features of several levels in its block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from qformer.connectors.base import Connector, perceptron, require_blocks
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.types import Plan, Tile

CLIP = 14  # side of a patch of the published encoder
EPS = 1e-6
HEAD = 128  # width of a head


class TokenPacker(Connector):
    """TokenPacker's connector (arXiv:2407.02392, "Region-to-Point Injection").

    The last level is interpolated to one point for `scale` x `scale` patches. Each point attends to its patches, whose
    keys and values come from all levels together by an MLP, and an MLP follows; the point itself is not added again.

    Encoders put the last level first, and the released code last (hidden states 12, 16, 22, 23 of CLIP). The levels are
    turned around here, so that the released weights fit as they are.
    """

    def __init__(self, width: int, llm_width: int, scale: int = 2, levels: int = 1, patch: int | None = None) -> None:
        """Make it with weights that start at random.

        Args:
            width: of all levels together.
            scale: patches along a side of what becomes one embedding: 2, 3 or 4 as published.
            levels: layers of the encoder whose tokens stand side by side, the last one first; published are 4.
            patch: by default that of the encoder.

        Raises:
            UsageError: a width that does not divide into levels, or levels into heads.
        """
        super().__init__()
        self.scale, self.patch = scale, patch
        if scale < 1 or levels < 1 or width % levels:
            raise UsageError(
                f"connector.levels is {levels} and connector.scale {scale}, for image tokens {width} wide; give as "
                "many levels as the encoder has layers side by side, and a scale of at least 1"
            )
        inner = width // levels
        heads = max(inner // HEAD, 1)
        if inner % heads:
            raise UsageError(
                f"a level of {inner} numbers does not divide into {heads} heads; use another image encoder"
            )
        self.inner = inner
        self.q_proj_1 = nn.Linear(inner, inner, bias=False)
        self.k_proj_1, self.v_proj_1 = (perceptron(width, inner, inner) for _ in range(2))
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(inner, eps=EPS) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(inner, heads, batch_first=True)
        self.mlp = perceptron(inner, llm_width, llm_width)

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """float[n, S, levels * inner] -> float[n, S / scale**2, L], row by row.

        Raises:
            UsageError: the grid does not divide into blocks.
        """
        require_blocks(grid, self.scale, self)
        rows, columns = grid[0] // self.scale, grid[1] // self.scale
        last = tokens[..., : self.inner].unflatten(1, grid).permute(0, 3, 1, 2)
        points = F.interpolate(last.float(), (rows, columns), mode="bilinear", align_corners=False)
        queries = self.ln_q_1(self.q_proj_1(points.permute(0, 2, 3, 1)))  # (n, rows, columns, inner)

        def blocks(features: Tensor) -> Tensor:
            cut = features.unflatten(1, (rows, self.scale, columns, self.scale)).transpose(2, 3)
            return cut.flatten(3, 4).flatten(0, 2)  # (n * rows * columns, scale**2, inner)

        levels = tokens.unflatten(2, (-1, self.inner)).flip(2).flatten(2)
        keys, values = blocks(self.ln_k_1(self.k_proj_1(levels))), blocks(self.ln_v_1(self.v_proj_1(levels)))
        read = self.clip_attn(queries.flatten(0, 2)[:, None], keys, values, need_weights=False)[0]
        return self.mlp(read.view(len(tokens), rows * columns, self.inner))

    def grid_of(self, tile: Tile) -> tuple[int, int]:
        """(rows, columns) of the patches of a tile, of 14 pixels as long as no encoder is known."""
        width, height = tile.size
        patch = self.patch or CLIP
        return height // patch, width // patch

    def count_part(self, plan: Plan) -> int:
        """One for each block of each tile.

        Raises:
            UsageError: a tile does not divide into blocks.
        """
        total = 0
        for grid in map(self.grid_of, plan.tiles):
            require_blocks(grid, self.scale, self)
            total += grid[0] * grid[1] // self.scale**2
        return total
