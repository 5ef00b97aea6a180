"""Connectors that join 2x2 patches: InternVL's pixel shuffle with an MLP, and the merger of Qwen2-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from qformer.connectors.base import Connector, perceptron, require_blocks

if TYPE_CHECKING:
    from qformer.types import Plan


def pixel_shuffle(tokens: Tensor, transpose: bool = False) -> Tensor:
    """Join the features of 2x2 patches, the upper two first, each from left to right.

    Args:
        tokens: float[N, rows, columns, D] with even rows and columns.
        transpose: swap rows and columns of the result, as version 1 of InternVL's shuffle does.

    Returns:
        float[N, rows / 2, columns / 2, 4 * D]; transposed float[N, columns / 2, rows / 2, 4 * D].
    """
    blocks = tokens.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (N, rows / 2, 2, columns / 2, 2, D)
    joined = blocks.transpose(2, 3).flatten(3)
    return joined.transpose(1, 2) if transpose else joined


class Pairs(Connector):
    """A connector that makes one embedding of 2x2 patches."""

    def count_part(self, plan: Plan) -> int:
        """A quarter of the patches.

        Raises:
            UsageError: a tile has an odd number of rows or columns of patches.
        """
        grids = [self.grid_of(tile) for tile in plan.tiles]
        for grid in grids:
            require_blocks(grid, 2, self)
        return sum(rows * columns // 4 for rows, columns in grids)

    def gather(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens float[n, S, D] row by row -> float[n, rows / 2, columns / 2, 4 * D].

        Raises:
            UsageError: an odd number of rows or columns.
        """
        require_blocks(grid, 2, self)
        return pixel_shuffle(tokens.unflatten(1, grid))


class PixelShuffleMLP(Pairs):
    """InternVL 1.5's connector (arXiv:2404.16821, section 3.1): pixel shuffle, LayerNorm, Linear, GELU, Linear.

    Version 1 of its shuffle swaps rows and columns. It is the default of InternVL's configuration class; the released
    checkpoints have version 2.
    """

    def __init__(self, width: int, llm_width: int, version: Literal["v1", "v2"] = "v2", patch: int = 14) -> None:
        super().__init__()
        self.version, self.patch = version, patch
        self.mlp = nn.Sequential(nn.LayerNorm(4 * width), *perceptron(4 * width, llm_width, llm_width))

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """float[n, S, D] -> float[n, rows / 2, columns / 2, L]; of version 1 rows and columns are swapped."""
        joined = self.gather(tokens, grid)
        return self.mlp(joined.transpose(1, 2) if self.version == "v1" else joined)


class PatchMerger(Pairs):
    """Qwen2-VL's connector (arXiv:2409.12191, section 2.1): LayerNorm on patches, 2x2 joined, Linear, GELU, Linear."""

    keeps_grid = True

    def __init__(self, width: int, llm_width: int, patch: int = 14) -> None:
        super().__init__()
        self.patch = patch
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.mlp = perceptron(4 * width, 4 * width, llm_width)

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """float[n, S, D] row by row -> float[n, rows / 2, columns / 2, L]."""
        return self.mlp(self.gather(self.ln_q(tokens), grid))
