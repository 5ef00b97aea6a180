"""Mixture of features (MoF) of two frozen encoders: Tong et al. 2024, "Eyes Wide Shut?", arXiv:2401.06209, section 4.

CLIP sees what captions say, a self-supervised encoder such as DINOv2 sees what they leave out. The additive mixture is
a weighted sum in front of one adapter (section 4.1); the interleaved one keeps both, token by token, c0 d0 c1 d1 ...,
each with an adapter of its own (section 4.2). There is no trained weight in here: adapters stand behind the encoder.

The release feeds both encoders CLIP's pixels. Here each normalizes pixels by itself, as it was trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer import lookup, vision
from qformer.fields import Fraction
from qformer.types import UsageError
from qformer.vision.base import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class MofConfig:
    """Options of `qformer.vision.mof`: two image encoders that see the same tiles.

    Attributes:
        first, second: the section `vision` of each, such as `{name: hf, path: openai/clip-vit-large-patch14}`.
        mode: "interleaved" gives the tokens of both, one by one; "additive" their weighted sum.
        alpha: weight of the first in an additive mixture, from 0 to 1.
    """

    first: dict[str, Any] = field(default_factory=dict)  # neither may be left out; `_options` says so
    second: dict[str, Any] = field(default_factory=dict)
    mode: Literal["interleaved", "additive"] = "interleaved"
    alpha: Fraction = 0.5
    parts: tuple[Any, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.parts = (_options("first", self.first), _options("second", self.second))

    def build(self) -> MofEncoder:
        """Build both encoders and their mixture.

        Raises:
            UsageError: one of them cannot be built, or the two cannot be mixed.
        """
        first, second = (part.build() for part in self.parts)
        return MofEncoder(first, second, self.mode, self.alpha)


def _options(place: str, given: dict[str, Any]) -> Any:
    """Check the options of one of the encoders and return them as its dataclass."""
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str) or name == "mof":
        raise UsageError(
            f"vision.{place} is {given}; give the name of an image encoder and its options, such as "
            "{name: hf, path: FOLDER}"
        )
    options = {key: value for key, value in given.items() if key != "name"}
    return lookup.build(vision.ENCODERS, name, options, f"vision.{place}")


def mix(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Weigh two tensors of one shape, float[..., S, D]: `alpha` of the first, the rest of the second.

    Raises:
        UsageError: different shapes, or an alpha outside 0 to 1.
    """
    _check_alpha(alpha)
    if first.shape != second.shape:
        raise UsageError(
            f"features of shapes {list(first.shape)} and {list(second.shape)} were given to an additive mixture, which "
            "needs equal ones; use mode interleaved"
        )
    return alpha * first + (1 - alpha) * second


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Put tokens float[..., S, D] and float[..., S, E] next to each other, the first one's first.

    Returns:
        float[..., 2 * S, max(D, E)], zeros on the right of the narrower ones.

    Raises:
        UsageError: different numbers of tokens.
    """
    if first.shape[:-1] != second.shape[:-1]:
        raise UsageError(
            f"features of shapes {list(first.shape)} and {list(second.shape)} cannot be interleaved; give as many "
            "tokens of either, see `align`"
        )
    width = max(first.shape[-1], second.shape[-1])
    both = [F.pad(part, (0, width - part.shape[-1])) for part in (first, second)]
    return torch.stack(both, dim=-2).flatten(-3, -2)  # (..., S, 2, D) -> (..., 2 * S, D)


def align(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Interpolate the tokens of a grid to another grid, bilinearly; an equal grid leaves them as they are.

    Args:
        tokens: float[n, S, D], S = rows * columns, row by row.
        grid: (rows, columns) of the tokens.
        to: (rows, columns) wanted.

    Returns:
        float[n, S', D], S' = rows * columns of `to`.

    Raises:
        UsageError: another number of tokens than the grid has, or no rows or columns wanted.
    """
    if tokens.shape[1] != grid[0] * grid[1]:
        raise UsageError(f"{tokens.shape[1]} tokens are no grid of {grid[0]} x {grid[1]}; give one for each place")
    if min(to) < 1:
        raise UsageError(f"a grid of {to[0]} x {to[1]} tokens is wanted; give 1 or more each way")
    if tuple(grid) == tuple(to):
        return tokens
    view = tokens.transpose(1, 2).unflatten(2, grid)  # (n, D, rows, columns)
    resized = F.interpolate(view.float(), size=to, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(tokens.dtype)


class MofEncoder(VisionEncoder):
    """Two encoders as one: their patch tokens on the grid of the first, without those in front of the patches."""

    def __init__(
        self,
        first: VisionEncoder,
        second: VisionEncoder,
        mode: Literal["interleaved", "additive"] = "interleaved",
        alpha: float = 0.5,
    ) -> None:
        """Put two encoders together.

        Args:
            first: the one whose sizes count: those of tiles and patches.
            second: the other; its tokens are brought to the grid of the first.
            mode: see `MofConfig`.
            alpha: weight of the first in an additive mixture.

        Raises:
            UsageError: an additive mixture of unequal widths, an unknown mode, an alpha outside 0 to 1, one encoder
                alone, or an encoder with several tokens a patch.
        """
        if mode not in ("interleaved", "additive"):
            raise UsageError(f"mode is '{mode}'; a mixture of features is interleaved or additive")
        _check_alpha(alpha)
        for part in (first, second):
            _check_part(part)
        if mode == "additive" and first.width != second.width:
            raise UsageError(
                f"an additive mixture adds tokens of one width, but these encoders have {first.width} and "
                f"{second.width}; use mode interleaved, or other encoders"
            )
        super().__init__(
            width=max(first.width, second.width),
            patch_size=first.patch_size,
            image_size=first.image_size,
            extra=0,
            mean=(0.0,) * 3,  # pixels stay as they are: each encoder normalizes them by itself
            std=(1.0,) * 3,
        )
        self.first, self.second = first, second
        self.mode, self.alpha = mode, alpha
        self.per_patch = 2 if mode == "interleaved" else 1
        self.floors = first.floors

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels float[N, 3, h, w] in [0, 1] -> float[N, per_patch * rows * columns, D].

        Raises:
            UsageError: a side that is not a multiple of the second encoder's patches.
        """
        return self._mix(self.first(pixels), self.second(pixels), pixels.shape)

    def encode_all(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Tiles of any sizes, each float[3, h, w] in [0, 1] -> the tokens of each; see `VisionEncoder.encode_all`.

        Each encoder gets all tiles at once, so that one that packs tiles of unequal size does.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            both = zip(pixels, self.first.encode_all(pixels), self.second.encode_all(pixels), strict=True)
            return [self._mix(one[None], other[None], tile.shape)[0] for tile, one, other in both]

    def _mix(self, first: Tensor, second: Tensor, shape: torch.Size) -> Tensor:
        """Mix the tokens of both, float[N, S, D] and float[N, S', E], of tiles of this shape [..., h, w]."""
        height, width = shape[-2:]
        to, grid = self.first.grid(width, height), self.second.grid(width, height)
        one = first[:, self.first.extra :]
        other = align(second[:, self.second.extra :], grid, to)
        if self.mode == "additive":
            return mix(one, other, self.alpha)
        return interleave(one, other)

    def freeze(self) -> Self:
        """Freeze both encoders, too, which then keep no activations for a backward pass."""
        self.first.freeze()
        self.second.freeze()
        return super().freeze()


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:  # NaN is neither
        raise UsageError(f"alpha is {alpha}; the weight of the first encoder is from 0 to 1")


def _check_part(part: VisionEncoder) -> None:
    """Refuse what is no encoder, and one with several tokens a patch, which is a mixture itself."""
    if not isinstance(part, VisionEncoder):
        raise UsageError(f"a mixture of features needs two image encoders, and one of these is {part!r:.80}; give both")
    if part.per_patch != 1:
        raise UsageError(
            f"a mixture of features reads encoders with one token a patch, and {type(part).__name__} has "
            f"{part.per_patch}; give two encoders that are no mixtures"
        )
