"""Likelihoods of given answers, for an image and a prompt, by the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.llm.base import IGNORE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.model.vision_language import VisionLanguageModel

ROOM = 2048  # tokens; more than any prompt and answer have, so they are not cut
ROWS = 32  # answers that the language model reads at a time


@torch.no_grad()
def choice_losses(
    model: VisionLanguageModel, prefix: Tensor, mask: Tensor, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[tuple[list[float], list[int]]]:
    """Compute the sum of the token losses of each choice after its prompt, and the number of its tokens.

    The sum is the negative log likelihood of the whole answer, including the token that ends it, by which InstructBLIP
    (arXiv:2305.06500) ranks candidates; nothing is generated.

    Args:
        prefix: float[n, M, L], the visual prefix of each of n questions. mask: bool[n, M].
        prompts: n strings. choices: n lists of answers.
    """
    flat = [(row, prompts[row], text) for row, texts in enumerate(choices) for text in texts]
    sums: list[float] = []
    counts: list[int] = []
    for start in range(0, len(flat), ROWS):
        part = flat[start : start + ROWS]
        rows = torch.tensor([row for row, _, _ in part], device=prefix.device)
        answers, before = [text for _, _, text in part], [prompt for _, prompt, _ in part]
        logits, targets = model.llm.predict(prefix[rows], mask[rows], answers, before, ROOM)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORE, reduction="none")
        sums += losses.sum(dim=1).tolist()
        counts += targets.ne(IGNORE).sum(dim=1).tolist()
    values = iter(zip(sums, counts, strict=True))
    found = []
    for texts in choices:
        own = [next(values) for _ in texts]
        found.append(([loss for loss, _ in own], [count for _, count in own]))
    return found
