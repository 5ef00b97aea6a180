"""From tiles to image tokens: the frozen encoder, run over tiles of any sizes, and a trainable LayerNorm behind it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.files.packing import unpack
from qformer.images import read_image
from qformer.resolution.base import cut_all
from qformer.resolution.fixed import Fixed
from qformer.types import Tiles, UsageError, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.images import ImageLike
    from qformer.resolution.base import ResolutionStrategy
    from qformer.vision.base import VisionEncoder


@dataclass
class Encoded:
    """What the image encoder made of the tiles of B images, before the LayerNorm behind it.

    Attributes:
        features: float[N, S, D], padded on the right to the longest tile.
        mask: bool[N, S], True at tokens that exist; None where all do.
        counts: tiles of each of the B images.
    """

    features: Tensor
    mask: Tensor | None
    counts: list[int]

    def __len__(self) -> int:
        return len(self.counts)

    def select(self, images: Sequence[int]) -> Encoded:
        """Those images with all their tiles, in that order."""
        rows = self.tiles_of(images)
        return Encoded(
            self.features[rows], None if self.mask is None else self.mask[rows], [self.counts[i] for i in images]
        )

    def tiles_of(self, images: Sequence[int]) -> Tensor:
        """Numbers of the tiles of those images, long[n]."""
        starts = [0, *accumulate(self.counts)]
        tiles = [tile for image in images for tile in range(starts[image], starts[image + 1])]
        return torch.tensor(tiles, dtype=torch.long).to(self.features.device)

    @classmethod
    def join(cls, parts: Sequence[Encoded]) -> Encoded:
        """The images of all parts, one after the other."""
        longest = max(part.features.shape[1] for part in parts)
        with _as_they_are(parts[0].features.device):
            features = torch.cat([F.pad(p.features, (0, 0, 0, longest - p.features.shape[1])) for p in parts])
        counts = [count for part in parts for count in part.counts]
        if all(part.mask is None and part.features.shape[1] == longest for part in parts):
            return cls(features, None, counts)
        masks = [torch.ones_like(p.features[..., 0], dtype=torch.bool) if p.mask is None else p.mask for p in parts]
        return cls(features, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]), counts)


class FrontEnd(nn.Module):
    """Groups tiles of equal size, encodes each group, scatters into one padded tensor.

    `norm` is BLIP-2's `ln_vision` (eps 1e-5, computed in fp32): it is trained although the encoder is frozen. It stands
    before a Q-Former only: without `normalized` tokens come as they are.
    `strategy` is how `tiles` cuts images; at first the whole image at the encoder's own size.
    """

    def __init__(self, encoder: VisionEncoder, normalized: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.strategy: ResolutionStrategy = Fixed(encoder.image_size)
        self.norm: nn.LayerNorm | nn.Identity = nn.LayerNorm(encoder.width, eps=1e-5) if normalized else nn.Identity()

    def tiles(self, images: Sequence[ImageLike]) -> Tiles:
        """Images as anybody has them (paths, bytes, PIL, uint8[h, w, 3], tensors) -> tiles cut by `strategy`.

        Raises:
            BadSample: one of them is missing or is not an image (`qformer.images.read_image`).
        """
        return cut_all([read_image(image) for image in images], self.strategy)

    def forward(self, tiles: Tiles) -> VisualTokens:
        """The normalised tokens of all tiles of B images.

        Raises:
            UsageError: a tile does not divide into the encoder's patches.
        """
        encoded = self.encode_tiles(tiles)
        grids = [self.encoder.grid(*tile.size) for plan in tiles.plans for tile in plan.tiles]
        return VisualTokens(self.normalise(encoded.features), encoded.mask, grids, self.encoder.extra, tiles.plans)

    def encode_tiles(self, tiles: Tiles) -> Encoded:
        """The tokens of all tiles of B images before `norm`: where the encoder is frozen they carry no gradient.

        Stored tokens are unpacked, without the encoder.

        Raises:
            UsageError: a tile does not divide into the encoder's patches.
        """
        given = tiles.pixels if tiles.tokens is None else tiles.tokens
        groups: dict[torch.Size, list[int]] = {}
        for index, tile in enumerate(given):
            groups.setdefault(tile.shape, []).append(index)
        device = self.encoder.mean.device
        with _as_they_are(torch.device("cpu")):
            stacks = [torch.stack([given[i] for i in members]).to(device) for members in groups.values()]
        encoded = [unpack(rows) if tiles.tokens is not None else self.encoder(_unit(rows)) for rows in stacks]
        with _as_they_are(device):
            features, mask = _pad([rows.shape[1] for rows in encoded], encoded, list(groups.values()))
        return Encoded(features, mask, tiles.counts)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels of equal size, uint8 or float[N, 3, h, w] in [0, 1] -> float[N, S, D], after `norm`.

        Raises:
            UsageError: other pixels.
        """
        return self.normalise(self.encoder(_unit(pixels)))

    def normalise(self, tokens: Tensor) -> Tensor:
        """`norm` of float[..., D], computed in fp32."""
        if isinstance(self.norm, nn.Identity):
            return tokens
        return F.layer_norm(tokens.float(), self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)


def _as_they_are(device: torch.device) -> torch.autocast:
    """Put tensors together in their own precision: autocast in bf16 fails on stacks of fp16."""
    return torch.autocast(device.type, enabled=False)


def _unit(pixels: Tensor) -> Tensor:
    """uint8 becomes float in [0, 1].

    Raises:
        UsageError: pixels of another type, other than three channels, or floats that are not in [0, 1].
    """
    known = pixels.dtype == torch.uint8 or pixels.is_floating_point()
    if not known or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise UsageError(
            f"the pixels are {str(pixels.dtype).removeprefix('torch.')}{list(pixels.shape)}; give uint8[N, 3, h, w] "
            "or float[N, 3, h, w] from 0 to 1"
        )
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):  # NaN is neither
        raise UsageError(
            "the pixels have numbers outside 0 to 1; give floats from 0 to 1, not yet normalised, or uint8"
        )
    return pixels


def _pad(lengths: list[int], groups: list[Tensor], members: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Groups float[n, S', D] -> float[N, S, D] in tile order, and bool[N, S], or None when nothing is padding."""
    order = torch.tensor([index for group in members for index in group])
    longest = max(lengths)
    rows = torch.cat([F.pad(group, (0, 0, 0, longest - group.shape[1])) for group in groups])  # (N, S, D)
    back = order.argsort().to(rows.device)
    features = rows if len(groups) == 1 else rows[back]
    if len(set(lengths)) == 1:
        return features, None
    length = torch.tensor([size for size, group in zip(lengths, members, strict=True) for _ in group])[order.argsort()]
    return features, (torch.arange(longest) < length[:, None]).to(rows.device)


def join_tiles(rows: Tensor, mask: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Put the rows of the tiles of each image behind one another.

    Args:
        rows: [N, R, ...], R rows of each of N tiles.
        mask: bool[N, R], or None where every row exists.
        counts: tiles of each of the B images.

    Returns:
        [B, most tiles * R, ...], zeros where an image has fewer tiles; and bool[B, most tiles * R], or None where
        every row exists. One tile per image gives `rows` and `mask` back unchanged.
    """
    most = max(counts)
    if most == 1:
        return rows, mask
    per_tile = rows.shape[1]
    index = torch.full((len(counts), most), len(rows))  # one past the end: a row of padding
    start = 0
    for image, count in enumerate(counts):
        index[image, :count] = torch.arange(start, start + count)
        start += count
    index = index.to(rows.device)
    joined = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[index].flatten(1, 2)  # (B, most * R, ...)
    if mask is None:
        if min(counts) == most:
            return joined, None
        mask = rows.new_ones(len(rows), per_tile, dtype=torch.bool)
    return joined, torch.cat([mask, mask.new_zeros(1, per_tile)])[index].flatten(1, 2)
