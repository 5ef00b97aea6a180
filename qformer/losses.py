"""The three losses of stage one as functions of tensors (BLIP-2, section 3.2), and hard negative mining.

They run on any device, with a batch of one, and without a process group; the caller gathers over processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

IGNORE = -100  # label of a position that is not a target
FORBIDDEN = -10000.0  # logit of an image that must not be drawn; its exp is exactly 0 in fp32


def same_image(ids: Sequence[str | int] | Tensor | None, count: int) -> Tensor:
    """Which rows show the same image: bool[count, count], the identity where `ids` is None."""
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()  # the elements of a tensor hash by identity: all would differ
    if ids is None:
        return torch.eye(count, dtype=torch.bool)
    index: dict[str | int, int] = {}
    codes = torch.tensor([index.setdefault(i, len(index)) for i in ids])
    return codes[:, None] == codes[None, :]


def similarity(image: Tensor, text: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute the cosine of every text with its best matching row of every image, without temperature.

    Args:
        image: float[I, Q, P], normalized rows.
        text: float[B, P], normalized rows.
        valid: bool[I, Q], False at padding; None if there is none.

    Returns:
        float[B, I].
    """
    scores = torch.einsum("iqp,bp->biq", image, text)
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    return scores.amax(dim=2)


def contrastive(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    same: Tensor,
    temp: Tensor | float,
    smoothing: float = 0.1,
    valid: Tensor | None = None,
    all_valid: Tensor | None = None,
) -> Tensor:
    """Compute ITC: the mean of image-to-text and text-to-image cross-entropy over the global batch.

    Args:
        image, text: float[B, Q, P] and float[B, P] of this process, unit rows.
        all_image, all_text: float[B*W, Q, P] and float[B*W, P] of all processes; the caller decides which of them pass
            gradients.
        same: bool[B, B*W], True where a column has the same image as the row; every row has one.
        temp: learned temperature; similarities are divided by it.
        smoothing: this share of the target is spread evenly over all columns.
        valid, all_valid: bool[B, Q] and bool[B*W, Q] where images have rows that are padding.

    Returns:
        float scalar.
    """
    targets = same.float()
    targets = (1 - smoothing) * targets / targets.sum(dim=1, keepdim=True) + smoothing / same.shape[1]
    image_to_text = similarity(image, all_text, valid).T / temp  # (B, B*W)
    text_to_image = similarity(all_image, text, all_valid) / temp  # (B, B*W)
    return (_cross_entropy(image_to_text, targets) + _cross_entropy(text_to_image, targets)) / 2


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


@torch.no_grad()
def hard_negatives(similarity: Tensor, same: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw one column with another image for each row, with a probability that grows with the similarity.

    Args:
        similarity: float[B, B*W], divided by the temperature.
        same: bool[B, B*W], columns that must not be drawn.

    Returns:
        long[B] columns, and bool[B], False where a row has no negative and its column is meaningless.
    """
    weights = similarity.float().masked_fill(same, FORBIDDEN).softmax(dim=1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1), ~same.all(dim=1)


def matching(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute ITM: cross-entropy of logits float[n, 2] with labels long[n] (1 matched, 0 not, `IGNORE` left out)."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE)


def captioning(logits: Tensor, labels: Tensor, smoothing: float = 0.1, count: Tensor | None = None) -> Tensor:
    """Compute ITG: mean cross-entropy over the targets; the labels are already shifted.

    Args:
        logits: float[..., V].
        labels: long[...], `IGNORE` where there is no target.
        smoothing: label smoothing over the vocabulary, averaged over valid targets only.
        count: divisor of the sum, for a part of a larger batch; the default is the number of targets here.
    """
    loss = F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORE,
        label_smoothing=smoothing,
        reduction="mean" if count is None else "sum",
    )
    return loss if count is None else loss / count
