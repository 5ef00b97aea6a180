"""Image-text retrieval: ITC for a shortlist, ITM to re-rank it (BLIP-2, section 4.4).

Every image is encoded twice, once for its embedding and once for matching, so that nothing of its size has to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from torch import Tensor

from qformer import losses
from qformer.types import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.model.image_text import ImageTextModel
    from qformer.types import Tiles

MAX_TOKENS = 35  # the original reads texts longer here than in training (32); never shorter, or their ends are unread
NO_CANDIDATE = -100.0
CUTOFFS = (1, 5, 10)


@dataclass
class Scores:
    """Scores of I images and T texts, float[I, T] on the CPU; the re-ranked ones differ by direction."""

    itc: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


@torch.no_grad()
def score(
    model: ImageTextModel, groups: Sequence[Tiles], texts: Sequence[str], k: int = 128, show: bool = False
) -> Scores:
    """ITC cosines of all pairs, and ITM logit + cosine for the k best candidates of each query in either direction.

    Args:
        groups: the images, as many at a time as fit the memory.
        k: candidates; more than there are is all of them.
        show: draw a progress bar.

    Returns:
        Scores; pairs that are no candidates hold -100.
    """
    text_embeds, tokens = _embed_texts(model, texts)
    itc = torch.cat(
        [
            losses.similarity(image, text_embeds, valid).T.float().cpu()
            for image, valid in map(model.embed_images, track(groups, "embedding images", disable=not show))
        ]
    )  # (I, T)
    wanted_by_image = _top(itc, k)
    wanted_by_text = _top(itc.T, k).T
    itm = torch.zeros_like(itc)
    start = 0
    for tiles in track(groups, "re-ranking", disable=not show):
        stop = start + len(tiles)
        pairs = (wanted_by_image | wanted_by_text)[start:stop].nonzero()
        pairs = pairs[tokens.mask.sum(dim=1).cpu()[pairs[:, 1]].argsort()]  # texts of one length side by side
        if len(pairs):
            itm[pairs[:, 0] + start, pairs[:, 1]] = (
                model.match_scores(model.encode_images(tiles), tokens, pairs).float().cpu()
            )
        start = stop
    both = itm + itc
    none = torch.tensor(NO_CANDIDATE)
    return Scores(itc, torch.where(wanted_by_image, both, none), torch.where(wanted_by_text, both, none))


def _embed_texts(model: ImageTextModel, texts: Sequence[str], chunk: int = 256) -> tuple[Tensor, Tokens]:
    tokens = model.tokenize(list(texts), max(MAX_TOKENS, model.max_tokens))
    parts = zip(tokens.ids.split(chunk), tokens.mask.split(chunk), strict=True)
    return torch.cat([model.embed_texts(Tokens(ids, mask)) for ids, mask in parts]), tokens


def _top(scores: Tensor, k: int) -> Tensor:
    """bool like `scores`: the k largest of each row."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(min(k, scores.shape[1]), dim=1).indices, True) if k else chosen


def recalls(scores: Tensor, truth: Tensor) -> dict[int, float]:
    """R@1, R@5, R@10: the share of rows with a right column among the best. Several may be right; the best counts.

    Args:
        scores: float[queries, candidates]. truth: bool of the same shape, with at least one True in every row.
    """
    best_right = scores.masked_fill(~truth, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (~(scores < best_right) & ~truth).sum(dim=1)  # ties and NaN count against the model
    return {cutoff: (ahead < cutoff).double().mean().item() for cutoff in CUTOFFS}


def measure(
    model: ImageTextModel, groups: Sequence[Tiles], captions: Sequence[Sequence[str]], k: int, show: bool = False
) -> dict[str, dict[str, float]]:
    """Recalls in both directions, `itc` and (with k > 0) `reranked`: keys `i2t_r1` ... `t2i_r10`, fractions.

    Args:
        captions: the captions of each image, any number.
    """
    scores = score(model, groups, [text for own in captions for text in own], k, show)
    table = recall_table(scores, captions)
    return table if k else {"itc": table["itc"]}


def recall_table(scores: Scores, captions: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """What `measure` returns, from scores that are there already."""
    owner = torch.tensor([image for image, own in enumerate(captions) for _ in own])
    truth = owner[None, :] == torch.arange(len(captions))[:, None]  # (I, T)
    table = {"itc": (scores.itc, scores.itc), "reranked": (scores.image_to_text, scores.text_to_image)}
    return {
        name: {f"i2t_r{n}": value for n, value in recalls(i2t, truth).items()}
        | {f"t2i_r{n}": value for n, value in recalls(t2i.T, truth.T).items()}
        for name, (i2t, t2i) in table.items()
    }
