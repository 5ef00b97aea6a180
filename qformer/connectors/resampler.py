"""LLaVA-UHD's connectors: learned queries that read all patches of a tile, or each its own cell of them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from qformer.connectors.base import Connector, square_root
from qformer.types import Plan, UsageError
from qformer.vision.base import resize_positions

EPS = 1e-6  # of its LayerNorms
HEAD = 128  # width of a head by default
#: (columns, rows) of the keys that a query reads, of which the one whose aspect is closest to the tile's is taken.
BINS = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))


class Resampler(Connector):
    """The perceiver resampler of LLaVA-UHD as on arXiv (2403.11703v1): one layer of cross-attention.

    Queries and keys carry fixed sines of their place; those of the keys are interpolated to the tile's grid.
    """

    def __init__(
        self, width: int, llm_width: int, queries: int = 64, heads: int | None = None, patch: int = 14
    ) -> None:
        """Make it with weights that start at random.

        Args:
            queries: embeddings of each tile, a square number.
            heads: by default one for 128 numbers of `llm_width`.

        Raises:
            UsageError: queries that are no square, or a width that does not divide into heads or by four.
        """
        super().__init__()
        self.patch, self.queries = patch, queries
        side, heads = square_root(queries, self), heads or max(llm_width // HEAD, 1)
        if llm_width % heads or llm_width % 4:
            raise UsageError(
                f"the language model's width {llm_width} does not divide into {heads} heads and into the four parts "
                f"that sines of the place need; give connector.heads that divide it, or use another connector"
            )
        self.pos_embed = nn.Parameter(sines(side, llm_width), requires_grad=False)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, llm_width), std=0.02))
        self.proj = nn.Parameter(torch.randn(llm_width, llm_width) * llm_width**-0.5)
        self.kv_proj = nn.Identity() if width == llm_width else nn.Linear(width, llm_width, bias=False)
        self.attn = nn.MultiheadAttention(llm_width, heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(llm_width, eps=EPS) for _ in range(3))

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """float[n, S, D] -> float[n, Q, L].

        Raises:
            UsageError: the queries do not divide the grid into cells.
        """
        values = self.ln_kv(self.kv_proj(tokens))  # (n, S, L)
        keys = values + resize_positions(self.pos_embed[None], 0, grid)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(tokens), -1, -1)  # (n, Q, L)
        return self.ln_post(self.read(queries, keys, values, grid)) @ self.proj

    def read(self, queries: Tensor, keys: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """Let the queries float[n, Q, L] attend to the patches float[n, S, L] of a (rows, columns) grid."""
        return self.attn(queries, keys, values, need_weights=False)[0]

    def count_part(self, plan: Plan) -> int:
        """Q for each tile."""
        return self.queries * len(plan.tiles)


class SpatialResampler(Resampler):
    """The spatially constrained resampler of LLaVA-UHD's release (ECCV 2024): each query reads a cell of the tile.

    The queries divide the tile into as many rows as columns. Keys and values of a cell are sampled from it on a grid of
    six to twelve (`BINS`) by ROI-Align, not aligned, with a bin of at least one patch over the whole cell.
    """

    def __init__(
        self, width: int, llm_width: int, queries: int = 144, heads: int | None = None, patch: int = 14
    ) -> None:
        """Make it with weights that start at random; options and errors are those of `Resampler`."""
        super().__init__(width, llm_width, queries, heads, patch)

    def read(self, queries: Tensor, keys: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns, *shares = samples(grid, self.queries)
        across, down = (torch.from_numpy(share).to(keys) for share in shares)

        def cells(tokens: Tensor) -> Tensor:
            sampled = torch.einsum("ay,bx,nyxd->nabd", down, across, tokens.unflatten(1, grid))
            sampled = sampled.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # (n, rows, b, columns, b', L)
            return sampled.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (n * Q, b * b', L)

        one = queries.flatten(0, 1)[:, None]  # (n * Q, 1, L)
        return self.attn(one, cells(keys), cells(values), need_weights=False)[0].view_as(queries)


def sines(side: int, width: int) -> Tensor:
    """Sines and cosines of the places of a square grid: float[side * side, width], the column's half first."""
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


@lru_cache(maxsize=256)
def samples(grid: tuple[int, int], queries: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Cells of a grid of patches, and how ROI-Align samples them; rows and columns are independent of each other.

    Returns:
        Rows and columns of cells; the share of each column of patches in each column of samples, float[columns *
        bins, patches]; and the same of rows.

    Raises:
        UsageError: rounding gives other cells than queries.
    """
    height, width = grid
    ratio = width / height
    cell_height = math.sqrt(height * width / queries / ratio)
    cell_width = cell_height * ratio
    rows, columns = round(height / cell_height), round(width / cell_width)
    if rows * columns != queries:
        raise UsageError(
            f"a tile of {height}x{width} patches (rows x columns) does not divide into {queries} cells; use another "
            "number of queries or tiles that are less narrow"
        )
    across, down = min(BINS, key=lambda bins: abs(math.log(ratio) - math.log(bins[0] / bins[1])))
    return rows, columns, _shares(columns, cell_width, across, width), _shares(rows, cell_height, down, height)


def _shares(cells: int, size: float, bins: int, length: int) -> np.ndarray:
    """Share of each of `length` patches in each sample of `cells` of this size, along one side: float[cells * bins, n].

    In single precision, in which ROI-Align computes; a cell is at least one patch, and a place beyond the last patch
    is the last one.
    """
    found = np.zeros((cells, bins, length), dtype=np.float32)
    for cell in range(cells):
        start, stop = np.float32(cell * size), np.float32((cell + 1) * size)
        extent = max(stop - start, np.float32(1))
        step = extent / np.float32(bins)
        count = max(math.ceil(step), 1)
        for part, sample in np.ndindex(bins, count):
            place = start + np.float32(part) * step + np.float32(sample + 0.5) * step / np.float32(count)
            if place > length:
                continue
            low = min(int(place), length - 1)
            rest = np.float32(place - low) if low < length - 1 else np.float32(0)
            found[cell, part, low] += (1 - rest) / count
            if rest:
                found[cell, part, low + 1] += rest / count
    return found.reshape(cells * bins, length)
