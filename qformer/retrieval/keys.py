"""How few of an entry's rows decide: which of the Q queries stand for an image in the index of a large gallery.

The queries of a trained Q-Former say nearly the same of an image to ITC: their embeddings are close, and the best
images for a text come out nearly the same whichever of them are looked at. So the index holds a few of them, chosen on
a sample, and the shortlist is scored again with all: what the index costs falls by that factor, and the result is as
exact as the shortlist is complete.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 3  # candidates for each that is wanted, within which a choice of queries must have found it
ENOUGH = 0.99


def choose(rows: Tensor, probes: Tensor, top: int) -> list[int]:
    """The fewest queries whose shortlist of `3 * top` holds 99 % of the true `top` images, taken greedily.

    Args:
        rows: float[n, Q, P] of a sample of images (of each tile, where there are several).
        probes: float[t, P], embeddings of texts.

    Returns:
        Numbers of 1, 2, 4, ... queries, the best first; all of them where fewer do not suffice.
    """
    count = rows.shape[1]
    scores = torch.einsum("nqp,tp->qtn", rows, probes)  # (Q, t, n)
    right = _top(scores.amax(dim=0), top)  # (t, n)
    chosen: list[int] = []
    best = torch.full_like(scores[0], -torch.inf)
    wanted = 1
    while len(chosen) < count:
        left = [query for query in range(count) if query not in chosen]
        found = [_recall(torch.maximum(best, scores[query]), right, top) for query in left]
        chosen.append(left[max(range(len(left)), key=found.__getitem__)])
        best = torch.maximum(best, scores[chosen[-1]])
        if len(chosen) == wanted:
            if max(found) >= ENOUGH:
                return chosen
            wanted *= 2
    return chosen


def _recall(scores: Tensor, right: Tensor, top: int) -> float:
    """Share of the right images, bool[t, n], among the first `3 * top` by these scores."""
    return float((_top(scores, DEPTH * top) & right).sum() / right.sum())


def _top(scores: Tensor, top: int) -> Tensor:
    """bool[t, n]: the best of each row."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
