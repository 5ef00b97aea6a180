"""Losses of given answers after an image and a prompt, and which of several a language model finds likeliest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.losses import IGNORE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.connectors.base import Prefix
    from qformer.llm.base import LanguageModel
    from qformer.model.vision_language import VisionLanguageModel

ROOM = 2048  # tokens; more than any prompt and answer have, so they are not cut
ROWS = 32  # answers that the language model reads at a time


@dataclass(frozen=True)
class AnswerLosses:
    """Losses of each token of B given answers.

    Attributes:
        targets: long[B, T], the ids of the tokens, `IGNORE` where there is none. The last of each row ends the text.
        losses: float[B, T], the negative log-likelihoods of the targets, 0 where there is none.
        greedy: bool[B, T], whether the target is the likeliest of all tokens; True where there is none.
        ending: number of tokens that end a text.
    """

    targets: Tensor
    losses: Tensor
    greedy: Tensor
    ending: int = 1

    def without_end(self) -> AnswerLosses:
        """The same answers without the tokens that end each."""
        found = self
        for _ in range(self.ending):
            last = found.targets.ne(IGNORE).long().cumsum(dim=1).argmax(dim=1, keepdim=True)
            targets = found.targets.scatter(1, last, IGNORE)
            found = AnswerLosses(targets, found.losses.scatter(1, last, 0), found.greedy.scatter(1, last, True))
        return found


def answer_losses(
    llm: LanguageModel, visual: Prefix, answers: list[str], prompts: list[str], max_tokens: int
) -> AnswerLosses:
    """The token losses of given answers, each after its visual prefix and its prompt; arguments as of `llm.predict`."""
    logits, targets = llm.predict(*visual, answers, prompts, max_tokens, visual.places)
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORE, reduction="none")
    greedy = (logits.argmax(dim=2) == targets) | targets.eq(IGNORE)
    return AnswerLosses(targets, losses, greedy, len(llm.chat.ending) or 1)


@torch.no_grad()
def choice_losses(
    model: VisionLanguageModel, visual: Prefix, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[tuple[list[float], list[int]]]:
    """Compute the sum of the token losses of each choice after its prompt, and the number of its tokens.

    The sum is the negative log likelihood of the whole answer, including the token that ends it, by which InstructBLIP
    (arXiv:2305.06500) ranks candidates; nothing is generated.

    Args:
        visual: the prefix of each of n questions.
        prompts: n strings. choices: n lists of answers.
    """
    flat = [(row, prompts[row], text) for row, texts in enumerate(choices) for text in texts]
    sums: list[float] = []
    counts: list[int] = []
    for start in range(0, len(flat), ROWS):
        part = flat[start : start + ROWS]
        rows = torch.tensor([row for row, _, _ in part], device=visual.mask.device)
        answers, asked = [text for _, _, text in part], [prompt for _, prompt, _ in part]
        found = answer_losses(model.llm, visual.select(rows), answers, asked, ROOM)
        sums += found.losses.sum(dim=1).tolist()
        counts += found.targets.ne(IGNORE).sum(dim=1).tolist()
    values = iter(zip(sums, counts, strict=True))
    by_row = []
    for texts in choices:
        own = [next(values) for _ in texts]
        by_row.append(([loss for loss, _ in own], [count for _, count in own]))
    return by_row
