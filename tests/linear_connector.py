"""A connector and a strategy as somebody outside would write them, named `module:Class` in a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qformer.model.connectors import Connector
from qformer.resolution.base import ResolutionStrategy
from qformer.types import Plan, Tile

PATCH = 14


class LinearConnector(Connector):
    """One Linear, an embedding at the end of each row of patches, and a trained scale."""

    def __init__(self, width: int, llm_width: int, patch: int = PATCH, start: float = 1.0) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(width, llm_width)
        self.newline = nn.Parameter(torch.zeros(llm_width))
        self.scale = nn.Parameter(torch.tensor(start))

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.scale * self.linear(tokens).unflatten(1, grid)

    def sequence(self, tiles: Sequence[Tensor], plan: Plan) -> Tensor:
        ended = [torch.cat([tile, self.newline.expand(len(tile), 1, -1)], dim=1) for tile in tiles]
        return super().sequence(ended, plan)

    def count_tokens(self, plan: Plan) -> int:
        assert self.patch is not None
        return super().count_tokens(plan) + sum(tile.size[1] // self.patch for tile in plan.tiles)


@dataclass(frozen=True)
class TallInTwo(ResolutionStrategy):
    """The whole image, then for tall images also their upper half at another size; for `LinearConnector`."""

    size: int = 2 * PATCH

    def plan(self, width: int, height: int) -> Plan:
        square, wide = (self.size, self.size), (self.size + PATCH, self.size)
        whole = Tile(content=square, canvas=square, offset=(0, 0), box=(0, 0, *square))
        half = Tile(content=wide, canvas=wide, offset=(0, 0), box=(0, 0, wide[0], self.size // 2))
        tiles, tokens = ((whole, half), 10) if height > 34 else ((whole,), 6)
        return Plan(image=(width, height), tiles=tiles, grid=(1, len(tiles)), overview=0, tokens=tokens)
