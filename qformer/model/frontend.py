"""From tiles to image tokens: the encoder, run over tiles of any sizes, and the adapter behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.files.packing import unpack
from qformer.ragged import pack
from qformer.resolution.fixed import Fixed
from qformer.types import Tiles, UsageError, VisualTokens
from qformer.videos.rows import cut_row, read_row
from qformer.vision.base import by_size, in_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.images import ImageLike
    from qformer.resolution.base import ResolutionStrategy
    from qformer.videos import Clip
    from qformer.vision.base import VisionEncoder

    Shown = ImageLike | Clip | Sequence[ImageLike | Clip]  # what one row of a batch shows


class TokenNorm(nn.LayerNorm):
    """BLIP-2's `ln_vision`: a LayerNorm of the image tokens float[..., D], computed in fp32 whatever their precision.

    It stands before a Q-Former and is trained although the encoder is frozen.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens.float(), self.normalized_shape, self.weight, self.bias, self.eps)


class FrontEnd(nn.Module):
    """Cuts images into tiles and runs them through the image encoder, whatever their sizes.

    `norm` is the adapter behind the encoder, under the name that BLIP-2's has in checkpoints; None: there is none.
    Behind an interleaved mixture of features `norm_second` is that of the second encoder's tokens.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        strategy: ResolutionStrategy | None = None,
        adapter: nn.Module | None = None,
        second: nn.Module | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            strategy: how `tiles` cuts images; by default the whole image at the encoder's own size.
            adapter: maps tokens float[..., D] to float[..., D]; None leaves them as they are.
            second: the same for every second token; None: `adapter` maps all.
        """
        super().__init__()
        self.encoder = encoder
        self.strategy: ResolutionStrategy = strategy or Fixed(encoder.image_size)
        self.norm = adapter
        self.norm_second = second

    @classmethod
    def for_qformer(
        cls, encoder: VisionEncoder | FrontEnd, strategy: ResolutionStrategy | None = None, eps: float = 1e-5
    ) -> FrontEnd:
        """BLIP-2's: the tokens pass a `TokenNorm`, one for each encoder of an interleaved mixture of features.

        A front end that is complete already is given back as it is.
        """
        if isinstance(encoder, FrontEnd):
            return encoder
        paired = encoder.per_patch == 2 and not encoder.extra  # else tokens do not alternate
        return cls(encoder, strategy, *(TokenNorm(encoder.width, eps) for _ in range(1 + paired)))

    @property
    def device(self) -> torch.device:
        return self.encoder.mean.device

    def tiles(self, images: Sequence[Shown]) -> Tiles:
        """Images as anybody has them (paths, bytes, PIL, uint8[h, w, 3], tensors) -> tiles cut by `strategy`.

        Args:
            images: B rows, each of them an image; or a `Clip` or a file that is a video by its name, of whose frames
                the strategy chooses some; or a list of these, which are shown together, in this order.

        Raises:
            BadSample: one of them is missing, or is not an image or a video (`read_image`, `read_video`).
            UsageError: an empty list, or a video without PyAV.
        """
        return Tiles.join([cut_row(read_row(shown, self.strategy), self.strategy) for shown in images])

    def forward(self, tiles: Tiles) -> VisualTokens:
        """The tokens of all tiles of B images, behind the adapter.

        Raises:
            UsageError: a tile does not divide into the encoder's patches.
        """
        return self.adapt(self.encode_tiles(tiles))

    def encode_tiles(self, tiles: Tiles) -> VisualTokens:
        """The encoder's own tokens of all tiles of B images: where it is frozen they carry no gradient.

        Stored tokens are unpacked, without the encoder.

        Raises:
            UsageError: a tile does not divide into the encoder's patches.
        """
        stored = tiles.tokens is not None
        given = tiles.pixels if tiles.tokens is None else tiles.tokens
        groups = by_size(given)
        with torch.autocast("cpu", enabled=False):  # which would fail, in bf16, on stacks of fp16
            stacks = [torch.stack([given[i] for i in members]).to(self.device) for members in groups]
        stacks = [unpack(stack) if stored else _unit(stack) for stack in stacks]
        if len(groups) == 1:
            tokens = stacks[0] if stored else self._encode(stacks[0])  # (N, S, D)
            packed, lengths = tokens.flatten(0, 1), [tokens.shape[1]] * len(tokens)
        else:
            rows = in_order(stacks, groups)
            rows = rows if stored else self._encode_all(rows)
            packed, lengths = pack(rows), [len(row) for row in rows]
        grids = [self.encoder.grid(*tile.size) for plan in tiles.plans for tile in plan.tiles]
        return VisualTokens.unpack(packed, lengths, grids, self.encoder.extra, tiles.plans, self.encoder.per_patch)

    def _encode(self, stack: Tensor) -> Tensor:
        """Tokens of equal tiles, float[N, 3, h, w] or of several frames [N, frames, 3, h, w]: float[N, S, D].

        An encoder of single pictures reads frames one by one, and the tokens of a tile are their mean.
        """
        whole = stack.ndim == 4 or self.encoder.temporal_patch > 1
        tokens: Tensor = self.encoder(stack if whole else stack.flatten(0, 1))
        return tokens if whole else tokens.unflatten(0, stack.shape[:2]).mean(dim=1)

    def _encode_all(self, tiles: Sequence[Tensor]) -> list[Tensor]:
        """Tokens of unequal tiles, float[S, D] each; see `_encode`."""
        counts = [1 if tile.ndim == 3 else len(tile) for tile in tiles]
        if self.encoder.temporal_patch > 1 or all(tile.ndim == 3 for tile in tiles):
            return self.encoder.encode_all(tiles)
        frames = [frame for tile in tiles for frame in (tile if tile.ndim == 4 else tile[None])]
        read = iter(self.encoder.encode_all(frames))
        return [torch.stack([next(read) for _ in range(count)]).mean(dim=0) for count in counts]

    def adapt(self, visual: VisualTokens) -> VisualTokens:
        """Pass the encoder's tokens through the adapter."""
        return visual.repack(self._adapted(visual.packed))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels of equal size, uint8 or float[N, 3, h, w] in [0, 1] -> float[N, S, D], behind the adapter.

        Raises:
            UsageError: other pixels.
        """
        return self._adapted(self.encoder(_unit(pixels)))

    def _adapted(self, tokens: Tensor) -> Tensor:
        """Tokens float[..., n, D] behind the adapter, or with two of them, each behind its own in turn."""
        if self.norm is None:
            return tokens
        if self.norm_second is None:
            return cast("Tensor", self.norm(tokens))
        pair = [self.norm(tokens[..., ::2, :]), self.norm_second(tokens[..., 1::2, :])]
        return torch.stack(pair, dim=-2).flatten(-3, -2)  # (..., n / 2, 2, D) -> (..., n, D)


def _unit(pixels: Tensor) -> Tensor:
    """uint8 becomes float in [0, 1].

    Raises:
        UsageError: pixels of another type, other than three channels, or floats that are not in [0, 1].
    """
    known = pixels.dtype == torch.uint8 or pixels.is_floating_point()
    if not known or pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        raise UsageError(
            f"the pixels are {str(pixels.dtype).removeprefix('torch.')}{list(pixels.shape)}; give uint8[N, 3, h, w] "
            "or float[N, 3, h, w] from 0 to 1, or of clips [N, frames, 3, h, w]"
        )
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):  # NaN is neither
        raise UsageError(
            "the pixels have numbers outside 0 to 1; give floats from 0 to 1, not yet normalised, or uint8"
        )
    return pixels


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
