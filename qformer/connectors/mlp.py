"""LLaVA's connector: an MLP on each patch, and the ways of AnyRes to put the patches of tiles in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.connectors.base import Connector, is_clip, new_vector, perceptron
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.types import Plan


class MLP(Connector):
    """Linear, GELU, Linear on each patch (LLaVA-1.5, arXiv:2310.03744).

    The rows that LLaVA-NeXT and LLaVA-OneVision (arXiv:2408.03326) make of tiles are its own: crops are
    put together to one view, its padding is cut off, it is interpolated to the `fine` grid of the plan, and a learned
    newline stands where the plan says. Frames of a clip are interpolated to the `fine` grid one by one.
    """

    def __init__(
        self, width: int, llm_width: int, hidden: int | None = None, adapters: int = 1, patch: int = 14
    ) -> None:
        """Make the MLP.

        Args:
            hidden: width between its two layers, by default that of the language model.
            adapters: 2 for an interleaved mixture of features, whose second tokens have an MLP of their own.

        Raises:
            UsageError: another number of adapters.
        """
        super().__init__()
        if adapters not in (1, 2):
            raise UsageError(f"connector.adapters is {adapters}; give 1, or 2 for an interleaved mixture of features")
        self.patch, self.per_patch = patch, adapters
        self.mlp = perceptron(width, hidden or llm_width, llm_width)
        if adapters == 2:
            self.second = perceptron(width, hidden or llm_width, llm_width)
        self.image_newline = new_vector(llm_width)
        self.adapters = adapters

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """float[n, adapters * S, D] -> float[n, rows, adapters * columns, L]."""
        rows, columns = grid
        if self.adapters == 1:
            return self.mlp(tokens).unflatten(1, grid)
        both = torch.stack([self.mlp(tokens[:, ::2]), self.second(tokens[:, 1::2])], dim=2)  # (n, S, 2, L)
        return both.flatten(1, 2).unflatten(1, (rows, 2 * columns))

    def pieces(self, tiles: Sequence[Tensor], plan: Plan) -> list[Tensor]:
        if is_clip(plan):
            made = [self._lines(_resize(self._by_patch(tile), plan.fine), plan.newline == "row") for tile in tiles]
        elif plan.newline == "row":
            made = self._views(tiles, plan)
        else:
            made = super().pieces(tiles, plan)
        newline = self.image_newline.expand(len(tiles[0]), 1, -1)
        if plan.newline == "frame":
            return [torch.cat([piece, newline], dim=1) for piece in made]
        if plan.newline == "end":
            made[-1] = torch.cat([made[-1], newline], dim=1)
        return made

    def _views(self, tiles: Sequence[Tensor], plan: Plan) -> list[Tensor]:
        """The overview as it is, and the crops as one view with a newline after each of its rows."""
        crops = [number for number in range(len(tiles)) if number != plan.overview]
        columns, rows = plan.grid
        if len(crops) != columns * rows:
            raise UsageError(
                f"a plan has newlines after rows of {columns}x{rows} crops (columns x rows), but {len(crops)} crops; "
                "plan one crop for each"
            )
        grids = [self._by_patch(tiles[number]) for number in crops]
        whole = torch.cat([torch.cat(grids[row * columns :][:columns], dim=2) for row in range(rows)], dim=1)
        made = [tile.flatten(1, 2)[:, : None if number == plan.overview else 0] for number, tile in enumerate(tiles)]
        made[crops[0]] = self._lines(_resize(unpad(whole, plan.image), plan.fine), True)
        return made

    def _by_patch(self, tile: Tensor) -> Tensor:
        """[n, rows, adapters * columns, L] -> [n, rows, columns, adapters * L]."""
        return tile.unflatten(2, (-1, self.adapters)).flatten(3)

    def _lines(self, view: Tensor, newlines: bool) -> Tensor:
        """[n, rows, columns, adapters * L] -> the tokens row by row, with a newline after each row or without."""
        view = view.unflatten(3, (self.adapters, -1)).flatten(2, 3)  # (n, rows, adapters * columns, L)
        if newlines:
            view = torch.cat([view, self.image_newline.expand(*view.shape[:2], 1, -1)], dim=2)
        return view.flatten(1, 2)

    def count_part(self, plan: Plan) -> int:
        """Length of the prefix of one picture or clip, newlines included."""
        count = len(plan.tiles)
        newlines = {"frame": count, "end": 1}.get(plan.newline, 0)
        if plan.fine is not None and (is_clip(plan) or plan.newline == "row"):
            rows, columns = plan.fine
            fine = rows * (columns * self.adapters + (plan.newline == "row"))
            if is_clip(plan):
                return count * fine + newlines
            overview = () if plan.overview is None else self.grid_of(plan.tiles[plan.overview])
            return fine + (overview[0] * overview[1] * self.adapters if overview else 0)
        return super().count_part(plan) * self.adapters + newlines


def unpad(view: Tensor, image: tuple[int, int]) -> Tensor:
    """Cut off the rows or columns of a view that show no picture, but padding: as many on either side.

    Args:
        view: [n, rows, columns, ...] of a canvas on which a picture was scaled to fit and centered.
        image: (width, height) of the picture.
    """
    width, height = image
    rows, columns = view.shape[1:3]
    if width / height > columns / rows:  # in this order of operations, which rounds as LLaVA's code does
        pad = (rows - int(height * (columns / width))) // 2
        return view[:, pad : rows - pad]
    pad = (columns - int(width * (rows / height))) // 2
    return view[:, :, pad : columns - pad]


def _resize(view: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Interpolate [n, rows, columns, C] bilinearly to another grid; the same one is given back as it is."""
    if grid is None or view.shape[1:3] == grid:
        return view
    resized = F.interpolate(view.float().permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(view.dtype)
