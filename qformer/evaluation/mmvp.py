"""Scores of MMVP and MMVP-VLM (Tong et al. 2024, arXiv:2401.06209), by the rules of tsb0601/MMVP.

A model has seen what sets two photos apart only if it is right about both (`gpt_grader.py`, `evaluate_vlm.py`). The
readers of the folders are in `qformer.mmvp.folder`, that of free answers in `qformer.metrics.choice_reply`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from qformer.metrics.choice_reply import parse_choice
from qformer.mmvp.folder import PATTERNS, Question, Statement, read_mmvp, read_mmvp_vlm
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["PATTERNS", "Question", "Statement", "parse_choice", "read_mmvp", "read_mmvp_vlm"]  # are read here, too


def graded(reply: str) -> bool:
    """Read a grader's reply as the original does: right if it is exactly yes, in any case; `yes.` is not."""
    return reply.lower() == "yes"


def pair_accuracy(right: Sequence[bool]) -> float:
    """Share of pairs, 1 and 2, 3 and 4 and so on, in which both are right.

    Raises:
        UsageError: there are none, or an odd number of answers.
    """
    return float(np.mean(pairs_right(right)))


def pairs_right(right: Sequence[bool]) -> list[bool]:
    """Tell for each pair if both of its answers are right. Raises UsageError: see `pair_accuracy`."""
    if not len(right) or len(right) % 2:
        raise UsageError(f"there are {len(right)} answers; give two for each pair")
    return [bool(first and second) for first, second in zip(right[::2], right[1::2], strict=True)]


def statements_right(logits: Tensor) -> list[bool]:
    """Tell for each statement if it fits its own photo of the pair better, as `evaluate_vlm.py` does.

    The first photo is chosen where its probability, by a softmax over both, is above 0.5; a tie is the second photo's.

    Args:
        logits: float[2n, 2], of each statement, in pairs, with the two photos of its pair.
    """
    first = logits.float().softmax(dim=1)[:, 0] > 0.5
    odd = torch.arange(len(logits), device=logits.device) % 2 == 0
    right: list[bool] = (first == odd).tolist()
    return right


def pattern_accuracy(logits: Tensor) -> dict[str, float]:
    """Per cent of pairs by pattern in which both statements are right; patterns follow each other, equally large.

    Args:
        logits: float[2n, 2], as for `statements_right`; n is 135 in MMVP-VLM, 15 for each pattern.

    Raises:
        UsageError: n is not a multiple of nine.
    """
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or logits.shape[1] != 2 or not len(logits) or len(logits) % (2 * len(PATTERNS)):
        shape = list(logits.shape)
        raise UsageError(f"the logits are {shape}; give two rows of two for each pair, and nine equal patterns")
    right = np.array(pairs_right(statements_right(logits))).reshape(len(PATTERNS), -1)
    return dict(zip(PATTERNS, (100 * right.mean(axis=1)).tolist(), strict=True))


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's coefficient of two series, as of two models' accuracies by pattern; NaN where one is constant.

    Raises:
        UsageError: they are not equally long, or shorter than two.
    """
    if len(x) != len(y) or len(x) < 2:
        raise UsageError(f"there are {len(x)} and {len(y)} numbers; give two series of one length, at least two")
    both = [np.asarray(one, float) for one in (x, y)]
    if any((one == one[0]).all() for one in both):  # the mean of equal numbers may differ from them in the last digit
        return float("nan")
    both = [one / np.abs(one).max() for one in both]  # squares of tiny or huge numbers are none
    first, second = (one - one.mean() for one in both)
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))
