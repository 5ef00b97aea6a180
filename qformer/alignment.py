"""Two linear maps between frozen features: regularized canonical correlation analysis (CCA), in closed form.

It is the floor under any bridge between frozen towers: a second of arithmetic, no gradient, no step. A bridge that
retrieves worse than this wastes what its towers know, and one that starts from these maps starts where the towers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.types import VisualTokens

RIDGE = 0.3  # of the mean variance of a feature; between 0.1 and 1 little changes with some thousands of pairs
CONSTANT = 1e-6  # a feature that spreads by no more than this share of its mean is noise of its rounding


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine map of raw features, laid out as in `torch.nn.Linear`, into which both tensors can be copied.

    weight: float[P, D]; bias: float[P].
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Map features float[..., D] to float[..., P], not normalized."""
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Two affine maps into a common space, in which the cosine says how well an image and a text match.

    Row i of each map is canonical direction i times its correlation, best first. Directions that do not exist (`width`
    above the rank of either side) are rows of zeros in both maps, and add nothing to any cosine.
    correlations: float[P], from 1 (features that determine each other) to 0.
    """

    image: Affine
    text: Affine
    correlations: Tensor

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines float[I, T] of the mapped features float[I, D] and float[T, E]."""
        return F.normalize(self.image(images), dim=-1) @ F.normalize(self.text(texts), dim=-1).T


def pooled(tokens: VisualTokens) -> Tensor:
    """One row of features per image: its class token, if the encoder has one, beside the mean of its patches.

    Several tiles are averaged, each by its number of patches. Further tokens in front of the patches (registers, a
    distillation token) are left out.

    Returns:
        float[B, 2 * D], or float[B, D] without a class token.
    """
    rows, features = iter(tokens.rows), []
    for count in tokens.counts:
        tiles = [next(rows).float() for _ in range(count)]
        patches = torch.cat([tile[tokens.extra :] for tile in tiles]).mean(0)
        first = [torch.stack([tile[0] for tile in tiles]).mean(0)] if tokens.extra else []
        features.append(torch.cat([*first, patches]))
    return torch.stack(features)


@torch.no_grad()
def align(images: Tensor, texts: Tensor, width: int, ridge: float = RIDGE) -> Alignment:
    """Solve the two linear maps under which the features of matching pairs agree best.

    Image features are standardized one by one (towers of images have a few that are huge), text features are centred;
    both covariances get `ridge` times their mean variance on the diagonal, without which few pairs in many dimensions
    would be learned by heart. All of it is folded into the maps, which take raw features.

    Args:
        images: float[N, D], row i matches row i of `texts`. Shifting or scaling a feature changes no cosine.
        texts: float[N, E]; where an image has several texts, the mean of their features serves best.
        width: P, the width of the common space. What exceeds the rank of the features is filled with zeros.
        ridge: at least 0. At 0, directions in which the features do not vary are left out.

    Returns:
        An `Alignment` in float32, on the device of `images`; it is solved in float64.

    Raises:
        UsageError: fewer than two pairs, different numbers of rows, numbers that are not finite, features without any
            spread, or a width or ridge out of range.
    """
    _check(images, texts, width, ridge)
    x, scale, center = _standardized(images.double())
    y, middle = _centred(texts.double().to(x.device))
    white_x, white_y = _whitening(x, ridge), _whitening(y, ridge)  # (D, D), (E, E)
    left, correlations, right = torch.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y, full_matrices=False)
    found = min(width, len(correlations))
    kept = correlations[:found, None]
    image = left.T[:found] @ white_x * kept * scale  # (P, D), of raw features
    text = right[:found] @ white_y * kept  # (P, E)
    missing = width - found
    return Alignment(
        _affine(F.pad(image, (0, 0, 0, missing)), center),
        _affine(F.pad(text, (0, 0, 0, missing)), middle),
        F.pad(correlations[:found].clamp(0, 1), (0, missing)).float(),
    )


def _check(images: Tensor, texts: Tensor, width: int, ridge: float) -> None:
    """Raise `UsageError` for features from which nothing can be solved."""
    if images.ndim != 2 or texts.ndim != 2 or len(images) != len(texts):
        shapes = f"{list(images.shape)} and {list(texts.shape)}"
        raise UsageError(f"features have shapes {shapes}, expected one row per pair in both: [N, D] and [N, E]")
    if len(images) < 2:
        raise UsageError(f"{len(images)} pairs of an image and a text; a linear map needs at least 2")
    if width < 1 or not 0 <= ridge < float("inf"):
        raise UsageError(f"width {width} and ridge {ridge}; expected a width of at least 1 and a finite ridge >= 0")
    for name, features in (("image", images), ("text", texts)):
        if not features.isfinite().all():
            raise UsageError(f"{name} features hold numbers that are not finite; check the tower that made them")
        if (features == features[0]).all():
            raise UsageError(f"{name} features are the same in all {len(features)} rows; nothing can be aligned")


def _standardized(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of mean 0 and variance 1, what they were multiplied by, and their mean; constant ones become 0."""
    centred, mean = _centred(features)
    spread = centred.square().mean(0).sqrt()
    scale = torch.where(spread > CONSTANT * mean.abs(), 1 / spread, 0)
    return centred * scale, scale, mean


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    return features - mean, mean


def _whitening(features: Tensor, ridge: float) -> Tensor:
    """Inverse square root of the regularized covariance, float[D, D]; 0 in directions that are not there."""
    covariance = features.T @ features / len(features)
    values, vectors = torch.linalg.eigh(covariance)
    values = values + ridge * covariance.diagonal().mean()
    there = values > values.amax() * len(values) * torch.finfo(values.dtype).eps
    return vectors @ torch.where(there, values.abs().rsqrt(), 0).diag() @ vectors.T


def _affine(weight: Tensor, center: Tensor) -> Affine:
    """The map of raw features that takes `center` to zero."""
    return Affine(weight.float(), -(weight @ center).float())
