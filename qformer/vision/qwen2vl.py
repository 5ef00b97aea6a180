"""Qwen2-VL's vision transformer: patches of two frames, places by rotation in two dimensions, attention in each frame.

Source: Qwen2-VL (arXiv 2409.12191) and its released code. A picture is a clip of equal frames. Nothing but the rotation
knows where a patch is, so that any size works without a table. Parameters have the names of the released tower; its
merger, a connector, is not in it.

Patches stand row by row, as in every encoder. `encode_patches` is the released interface, in which those of a block of
`merge` x `merge` stand side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.files import pretrained
from qformer.files.tensors import read_tensors
from qformer.types import UsageError
from qformer.vision.blocks import Block, quick_gelu
from qformer.vision.layers import TowerOptions, assign, of_tower, one_dtype, store
from qformer.vision.packed import Segments, Tower

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

THETA = 10_000.0
FILES = (".pth", ".pt", ".bin", ".safetensors")
MERGER = ("merger.",)


class Qwen2VLOptions(TowerOptions, Protocol):
    temporal_patch: int
    merge: int


def build(config: Qwen2VLOptions) -> Qwen2VLViT:
    """Build the encoder; see `Qwen2VLConfig.build`."""
    if config.weights is None:
        return Qwen2VLViT(config)
    path = Path(pretrained.tower(config.weights))
    if not path.exists() and path.suffix not in FILES:
        path = pretrained.local_folder(str(path))
    return build_from(config, read_tensors(path), config.weights)


def build_from(config: Qwen2VLOptions, state: Mapping[str, Tensor], source: str) -> Qwen2VLViT:
    """Build the encoder from tensors; see `Qwen2VLConfig.build_from`."""
    with torch.device("meta"):
        encoder = Qwen2VLViT(config)
    assign(encoder, of_tower(state, source, MERGER), source, positions=None)
    return encoder


class Qwen2VLViT(Tower):
    """The vision transformer; tokens are the patches row by row."""

    def __init__(self, config: Qwen2VLOptions) -> None:
        super().__init__(
            width=config.width,
            patch_size=config.patch_size,
            image_size=config.image_size,
            depth=config.depth,
            layers=config.layers,
            extra=0,
        )
        self.temporal_patch, self.merge = config.temporal_patch, config.merge
        self.head_width = config.width // config.heads
        self.patch_embed = PatchEmbed(config.patch_size, config.temporal_patch, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_hidden, quick_gelu) for _ in range(config.depth)
        )
        store(self, config.precision)
        self.stop_gradients()

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalized pixels float[N, 3, h, w], or float[N, frames, 3, h, w], -> float32[N, rows * columns, D]."""
        if pixels.ndim == 4:
            pixels = pixels[:, None].expand(-1, self.temporal_patch, -1, -1, -1)
        patches = _patches(pixels, self.patch_size)  # (N, rows, columns, 3 * T * p * p)
        return self.patch_embed(patches.flatten(1, 2))

    def turns(self, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Cosines and sines float32[n, 1, D / heads] of the places of the patches, row by row."""
        return self._turned(torch.cat([_row_by_row(rows, columns) for rows, columns in grids]))

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Patches as `patchify` gives them -> float32[n, D], in their order; each frame attends to itself alone.

        Args:
            patches: float[n, 3 * T * p * p], those of several pictures or clips one after the other.
            grids: (steps, rows, columns) of each; a step is a frame, or as many as a patch has.

        Raises:
            UsageError: the grids are of another number of patches, or do not divide into blocks of `merge`.
        """
        ids = positions(grids, self.merge)
        if len(ids) != len(patches):
            raise UsageError(f"got {len(patches)} patches for grids of {len(ids)}; give the grids of these patches")
        frames = [rows * columns for steps, rows, columns in grids for _ in range(steps)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.patch_embed(patches)
            return self.run(x, Segments(frames, x.device), *self._turned(ids))

    def _turned(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32[n, 1, d] for places long[n, 2]: d / 4 angles by the row, d / 4 by the column."""
        device = self.mean.device
        half = self.head_width // 2
        speeds = THETA ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)  # (d / 4)
        angles = (ids.to(device)[..., None] * speeds).flatten(1).repeat(1, 2)[:, None]  # (n, 1, d)
        return angles.cos(), angles.sin()


class PatchEmbed(nn.Module):
    """Embedding of patches [..., 3 * T * p * p] by the weight of a convolution over frames, rows and columns."""

    def __init__(self, patch_size: int, frames: int, width: int) -> None:
        super().__init__()
        size = (frames, patch_size, patch_size)
        self.proj = nn.Conv3d(3, width, kernel_size=size, stride=size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[..., 3 * T * p * p] -> float32[..., D]."""
        patches, weight, _ = one_dtype(patches, self.proj.weight, None)
        return F.linear(patches, weight.flatten(1)).float()


def patchify(frames: Tensor, patch: int = 14, temporal: int = 2, merge: int = 2) -> Tensor:
    """Cut the frames of a clip, or a picture as one frame, into patches: blocks row by row, and rows in a block.

    Args:
        frames: normalized pixels float[F, 3, h, w]; the last one is repeated until they divide into patches.
        patch, temporal: side of a patch in pixels, and its frames.
        merge: side of a block in patches.

    Returns:
        float[n, 3 * temporal * patch * patch], all patches of the first `temporal` frames first.

    Raises:
        UsageError: no frames, or a side that does not divide into blocks.
    """
    count, _, height, width = frames.shape
    block = patch * merge
    if not count or height % block or width % block or not height * width:
        raise UsageError(
            f"{count} frames of {width}x{height} pixels do not divide into blocks of {block}; give one frame or more "
            f"with sides that are multiples of {block}"
        )
    last = frames[-1:].expand(-count % temporal, -1, -1, -1)
    steps = torch.cat([frames, last]).unflatten(0, (-1, temporal))  # (t, T, 3, h, w)
    patches = _patches(steps, patch)  # (t, rows, columns, 3 * T * p * p)
    blocks = patches.unflatten(2, (-1, merge)).unflatten(1, (-1, merge))  # (t, R, merge, C, merge, ...)
    return blocks.transpose(2, 3).flatten(0, 4)


def positions(grids: Sequence[tuple[int, int, int]], merge: int = 2) -> Tensor:
    """Row and column of each patch in the order of `patchify`, long[n, 2]; every frame has the same ones.

    Args:
        grids: (steps, rows, columns) of each picture or clip.

    Raises:
        UsageError: rows or columns that do not divide into blocks of `merge`.
    """
    found = [torch.zeros(0, 2, dtype=torch.long)]
    for steps, rows, columns in grids:
        if rows % merge or columns % merge:
            raise UsageError(
                f"a grid of {rows}x{columns} patches does not divide into blocks of {merge}; use sides that are "
                f"multiples of {merge}"
            )
        places = _row_by_row(rows, columns).view(rows // merge, merge, columns // merge, merge, 2)
        found.append(places.transpose(1, 2).reshape(-1, 2).repeat(steps, 1))
    return torch.cat(found)


def _row_by_row(rows: int, columns: int) -> Tensor:
    """Row and column of each patch of a grid, long[rows * columns, 2]."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)


def _patches(steps: Tensor, side: int) -> Tensor:
    """Pixels [N, T, 3, h, w] -> [N, rows, columns, 3 * T * side * side], numbers ordered (channel, frame, y, x)."""
    cells = steps.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # (N, T, 3, rows, side, columns, side)
    return cells.permute(0, 3, 5, 2, 1, 4, 6).flatten(3)
