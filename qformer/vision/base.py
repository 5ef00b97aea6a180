"""Contract of image encoders: raw pixels in, patch tokens out, and the meaning of 'frozen'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder(nn.Module, ABC):
    """Turns pixels in [0, 1] into tokens; normalisation happens inside, so that nothing outside depends on it.

    Attributes:
        width: D, the width of its tokens.
        patch_size: side of a patch in pixels; tiles must be multiples of it.
        image_size: side for which the position table was made; other sizes resize the table.
        extra: tokens in front of the patch grid that are kept (1 for CLS).
        frozen: True after `freeze()`.
        align_corners, interpolation: how its position table is resized.
        per_patch: tokens of each patch (2: interleaved mixture).
        temporal_patch: frames of a clip that a tile of several, float[frames, 3, h, w], must have; 1: none is read.
        floors: what is left of a tile to the right of and below the last whole patch is not read; else it is refused.
        layers: where tokens of several layers are concatenated, those layers; D is then their widths together.
    """

    align_corners = False
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    per_patch = 1
    temporal_patch = 1
    floors = False
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        width: int,
        patch_size: int,
        image_size: int,
        extra: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.width = width
        self.patch_size = patch_size
        self.image_size = image_size
        self.extra = extra
        self.frozen = False
        self.layers: tuple[int, ...] | None = None  # not of the class, where it would hide somebody's module
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels float[N, 3, h, w] -> float[N, extra + per_patch * rows * columns, D]."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels float[N, 3, h, w] in [0, 1] -> tokens float[N, S, D], row-major behind the `extra` tokens.

        Raises:
            UsageError: a side is not a multiple of the patch size, or with `floors` is shorter than it.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encode(self.normalized(pixels))

    def normalized(self, pixels: Tensor) -> Tensor:
        """Whole patches of pixels float[..., 3, h, w] in [0, 1], with the mean and std of the encoder taken out.

        Raises:
            UsageError: as `forward`, or tiles of another number of frames than `temporal_patch`.
        """
        if pixels.ndim == 5 and pixels.shape[1] != self.temporal_patch:
            reads = "one picture at a time" if self.temporal_patch == 1 else f"{self.temporal_patch} frames at a time"
            raise UsageError(
                f"a tile of {pixels.shape[1]} frames was given to an image encoder that reads {reads}; use a "
                "resolution strategy and an image encoder that are made for each other"
            )
        rows, columns = self.grid(pixels.shape[-1], pixels.shape[-2])
        if self.floors:
            pixels = pixels[..., : rows * self.patch_size, : columns * self.patch_size]
        return (pixels - self.mean) / self.std

    def encode_all(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Tiles of any sizes, each float[3, h, w] in [0, 1] -> the tokens of each, float[S, D], in the same order.

        Tiles of one size are encoded together; an encoder that packs unequal ones into one sequence overrides this.

        Raises:
            UsageError: as `forward`.
        """
        groups = by_size(pixels)
        return in_order([self(torch.stack([pixels[i] for i in members])) for members in groups], groups)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches of a tile of `width` x `height` pixels.

        Raises:
            UsageError: a side is not a multiple of the patch size, or with `floors` is shorter than it.
        """
        if self.floors and min(width, height) < self.patch_size:
            raise UsageError(
                f"a tile of {width}x{height} pixels is smaller than a patch of {self.patch_size}; "
                "use larger tiles in the resolution section"
            )
        if not self.floors and (width % self.patch_size or height % self.patch_size):
            raise UsageError(
                f"a tile of {width}x{height} pixels does not divide into patches of {self.patch_size}; "
                f"use multiples of {self.patch_size} in the resolution section"
            )
        return height // self.patch_size, width // self.patch_size

    def freeze(self) -> Self:
        """No gradients, and eval mode that survives every later `train()` of a parent module."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


class Absent(VisionEncoder):
    """Stands where a frozen encoder would, when all its tokens are read from a store: sizes without weights."""

    def __init__(
        self, width: int, patch_size: int, image_size: int, extra: int, per_patch: int = 1, floors: bool = False
    ) -> None:
        super().__init__(width=width, patch_size=patch_size, image_size=image_size, extra=extra)
        self.per_patch, self.floors = per_patch, floors
        self.freeze()

    def encode(self, pixels: Tensor) -> Tensor:
        raise UsageError("the image encoder is not loaded, since training reads stored tokens; leave data.features out")


def by_size(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the tensors of each shape, those of the first one's first."""
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    return list(groups.values())


def in_order(stacks: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """The rows of all stacks in the order of their numbers, which `by_size` gave."""
    numbers = [index for members in groups for index in members]
    rows = dict(zip(numbers, (row for stack in stacks for row in stack), strict=True))
    return [rows[index] for index in range(len(rows))]


def resize_positions(
    table: Tensor,
    extra: int,
    grid: tuple[int, int],
    align_corners: bool = False,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """Resize a learned position table float[1, extra + side * side, D] to a (rows, columns) grid.

    Plain interpolation, no antialiasing; the `extra` rows in front are kept. A table that already has the size is
    returned as it is.
    """
    count, width = table.shape[1] - extra, table.shape[2]
    side = int(count**0.5)
    if (side, side) == grid:
        return table
    patches = table[:, extra:].float().view(1, side, side, width).permute(0, 3, 1, 2)  # (1, D, side, side)
    patches = F.interpolate(patches, size=grid, mode=mode, align_corners=align_corners)
    patches = patches.flatten(2).transpose(1, 2)  # (1, rows * columns, D)
    return torch.cat([table[:, :extra], patches.to(table.dtype)], dim=1)
