"""Beam search over any model that tells the next token, for the captions that the Q-Former writes itself.

Language models of stage two bring their own search (`transformers`); the Q-Former is not one of its models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER = -1e9  # score of a beam that does not exist yet: all beams of a text begin alike, so only one may go on


@torch.no_grad()
def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    end: int,
    pad: int,
    *,
    beams: int = 3,
    max_length: int = 30,
    min_length: int = 10,
    length_penalty: float = 1.0,
) -> Tensor:
    """The likeliest text of each row, as the beam search of transformers 4.26 finds it, with which LAVIS runs.

    A text that ends is worth its summed log probability / length ** `length_penalty`, where what it starts with counts
    and the end does not. A row is done when `beams` texts have ended and nothing that goes on is worth more than the
    worst. One beam is greedy search.

    Args:
        step: texts so far long[n, t] and the rows long[n] of the last call that they continue (at first: rows of
            `start`) -> logits of the next token, float[n, V].
        start: long[B, t], what each text begins with.
        end, pad: ids of the token that ends a text, and of what stands behind it.
        max_length, min_length: in tokens, the start counted.

    Returns:
        long[B, new], without the start; the end is there where there was room for it.
    """
    batch, device = len(start), start.device
    first = torch.arange(batch, device=device)
    rows = first.repeat_interleave(beams)  # (B * beams)
    texts = start[rows]  # (B * beams, t)
    scores = torch.full((batch, beams), NEVER, device=device)
    scores[:, 0] = 0
    ended = _Ended(batch, beams, max_length, pad, device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for length in range(start.shape[1], max_length):
        log_probs = step(texts, rows).float().log_softmax(dim=1)
        if length < min_length:
            log_probs[:, end] = -torch.inf
        vocabulary = log_probs.shape[1]
        totals = (scores.view(-1, 1) + log_probs).view(batch, -1)  # (B, beams * V)
        # Twice as many as there are beams: even if half of them end, enough go on.
        best, index = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
        origin, token = first[:, None] * beams + index // vocabulary, index % vocabulary  # (B, 2 * beams)
        candidates = torch.cat([texts[origin], token[..., None]], dim=2)  # (B, 2 * beams, t + 1)

        ends = token == end
        closes = ends & ~done[:, None]
        closes[:, beams:] = False  # an end that is not among the best `beams` is not worth keeping
        ended.add(candidates, (best / length**length_penalty).masked_fill(~closes, -torch.inf))
        done |= ended.worst() >= best[:, 0] / length**length_penalty

        scores, place = best.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        rows = origin.gather(1, place).flatten()
        texts = candidates.take_along_dim(place[..., None], dim=1).flatten(0, 1)
        if done.all():
            break
    worth = scores / texts.shape[1] ** length_penalty
    ended.add(texts.view(batch, beams, -1), worth.masked_fill(done[:, None], -torch.inf))
    return ended.best()[:, start.shape[1] :]


class _Ended:
    """The `beams` best texts of each row that have come to an end, the best first."""

    def __init__(self, batch: int, beams: int, max_length: int, pad: int, device: torch.device) -> None:
        self.pad = pad
        self.scores = torch.full((batch, beams), -torch.inf, device=device)
        self.texts = torch.full((batch, beams, max_length), pad, device=device)

    def add(self, texts: Tensor, scores: Tensor) -> None:
        """long[B, n, t] with float[B, n]; a score of -inf is no text."""
        padded = torch.nn.functional.pad(texts, (0, self.texts.shape[2] - texts.shape[2]), value=self.pad)
        self.scores, place = torch.cat([self.scores, scores], dim=1).topk(self.scores.shape[1], dim=1)
        self.texts = torch.cat([self.texts, padded], dim=1).take_along_dim(place[..., None], dim=1)

    def worst(self) -> Tensor:
        """float[B]; -inf as long as there is room."""
        return self.scores[:, -1]

    def best(self) -> Tensor:
        """long[B, longest], padded on the right."""
        best = self.texts[:, 0]
        used = (best != self.pad).any(dim=0).nonzero()
        return best[:, : int(used.max()) + 1]
