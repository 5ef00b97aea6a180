"""Key rows: the few of the Q queries that represent an image in the index of a large gallery.

For ITC, the queries of a trained Q-Former are nearly redundant: their embeddings are close, and almost the same images
rank first for a text whichever queries are compared. So the index holds a few queries, chosen on a sample, and the
shortlist is scored again with all of them: the index shrinks by that factor, and the result is as exact as the
shortlist is complete.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 3  # candidates per wanted image, among which the chosen queries must find it
ENOUGH = 0.99


def choose(rows: Tensor, probes: Tensor, top: int) -> list[int]:
    """Choose greedily the fewest queries whose shortlist of `3 * top` holds 99 % of the true `top` images.

    Args:
        rows: float[n, Q, P], rows of a sample of images (of every tile, if an image has several).
        probes: float[t, P], embeddings of texts.

    Returns:
        Indices of 1, 2, 4, ... queries, the best first; all of them if fewer do not suffice.
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
    """Mask of the best of each row, bool[t, n]."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
