"""Oryx' connector: blocks of patches compressed by region attention, then an MLP, with begin, separators and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qformer.connectors.base import Connector, is_clip, new_vector, perceptron, require_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.types import Plan


class Compressor(Connector):
    """Oryx' dynamic compressor (arXiv:2409.12961), then Linear, GELU, Linear.

    Frames of a clip are compressed in blocks, whose side is the rows of their patches over those of the plan's `fine`
    grid: 2 for 4x, 4 for 16x. Pictures stay as they are in the released code, which adds each token to itself (one
    key has all the attention).

    A newline is learned for the end of each row. Around the rows stand begin and end; between the tiles of a picture a
    separator, and after each frame of a clip.
    """

    def __init__(self, width: int, llm_width: int, inner: int = 256, patch: int = 16) -> None:
        """Make it with weights that start at random; `inner` is the width of its queries and keys."""
        super().__init__()
        self.patch = patch
        self.scale = inner**-0.5
        self.vlm_query_projector = nn.Linear(width, inner)
        self.vlm_key_projector = nn.Linear(width, inner)
        self.proj = perceptron(width, llm_width, llm_width)
        self.image_newline, self.image_begin = new_vector(llm_width), new_vector(llm_width)
        self.image_sep, self.image_end = new_vector(llm_width), new_vector(llm_width)

    def compress(self, tokens: Tensor, grid: tuple[int, int], side: int = 1) -> Tensor:
        """Let the mean of each block read the block: float[n, S, D] -> float[n, S / side**2, D], row by row.

        Raises:
            UsageError: the grid does not divide into blocks of `side` x `side`.
        """
        require_blocks(grid, side, self)
        rows, columns = grid
        blocks = tokens.unflatten(1, (rows // side, side, columns // side, side)).transpose(2, 3)
        blocks = blocks.flatten(3, 4).flatten(1, 2)  # (n, S / side**2, side**2, D)
        mean = blocks.mean(dim=2, keepdim=True)  # (n, S / side**2, 1, D)
        scores = self.vlm_query_projector(mean) @ self.vlm_key_projector(blocks).mT
        return (mean + (scores * self.scale).softmax(dim=-1) @ blocks).squeeze(2)

    def project(self, tokens: Tensor, grid: tuple[int, int], side: int = 1) -> Tensor:
        """float[n, S, D] -> float[n, rows / side, columns / side, L].

        Raises:
            UsageError: as of `compress`.
        """
        made = self.proj(self.compress(tokens, grid, side))
        return made.unflatten(1, (grid[0] // side, grid[1] // side))

    def options_of(self, plan: Plan, grid: tuple[int, int]) -> dict[str, Any]:
        return {"side": self._side(plan, grid)}

    def _side(self, plan: Plan, grid: tuple[int, int]) -> int:
        """Patches along a side of what becomes one token."""
        return max(grid[0] // plan.fine[0], 1) if plan.fine is not None and is_clip(plan) else 1

    def pieces(self, tiles: Sequence[Tensor], plan: Plan) -> list[Tensor]:
        around = (self.image_begin, self.image_sep, self.image_end)
        begin, separator, end = (vector.expand(len(tiles[0]), 1, -1) for vector in around)
        made = []
        for number, tile in enumerate(tiles, start=1):
            lines = torch.cat([tile, self.image_newline.expand(*tile.shape[:2], 1, -1)], dim=2).flatten(1, 2)
            parts = [begin, lines] if number == 1 else [lines]
            if number < len(tiles) or plan.overview is None:
                parts.append(separator)
            made.append(torch.cat([*parts, end] if number == len(tiles) else parts, dim=1))
        return made

    def count_part(self, plan: Plan) -> int:
        """Length of the prefix of one picture or clip: begin, rows with their newlines, separators, end.

        Raises:
            UsageError: the tiles do not divide into blocks.
        """
        total = 2 + len(plan.tiles) - (plan.overview is not None)
        for grid in map(self.grid_of, plan.tiles):
            side = self._side(plan, grid)
            require_blocks(grid, side, self)
            total += grid[0] // side * (grid[1] // side + 1)
        return total
