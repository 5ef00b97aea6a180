"""A warm start of stage two: the projection begins at a linear map from photos to the words of their captions.

BLIP-2 starts the projection at random, and a frozen language model first has to be shown what the queries mean. But
its input embeddings are known, and so are captions. So the map from the queries of a photo to the mean embedding of its
captions' words is solved in closed form (ridge regression) and written into the projection: every visual token then
begins as a blend of the words that the photo is likely to be described with, as loud as a word.

Words count by how few photos they tell apart (inverse document frequency), without which the blend would be of
articles. Ours; there is no published counterpart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qformer import distributed
from qformer.evaluation.linear import collect
from qformer.llm.rows import word_spread
from qformer.model.connectors import QFormerConnector
from qformer.progress import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.data.features import FeatureStore
    from qformer.llm.base import LanguageModel
    from qformer.model.qformer import QFormer
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import VisualTokens

RIDGE = 0.1  # of the mean variance of a number of the queries; 0.03 to 1 were the same on 3,000 photos


@torch.no_grad()
def start_at_words(model: VisionLanguageModel, source: Source, store: FeatureStore) -> None:
    """Solve the projection on the stored photos and the captions of their source, and write it.

    Raises:
        UsageError: the store is damaged, or fewer than two photos have captions.
    """
    connector = model.connector
    assert isinstance(connector, QFormerConnector)
    training = model.training
    model.eval()
    show = distributed.rank() == 0
    pairs = collect(
        model.frontend, store, source, adapted=True, pool=lambda seen: mean_queries(connector.qformer, seen), show=show
    )
    words = word_blends(model.llm, pairs.captions)  # (N, L)
    loud = word_spread(model.llm.model, len(model.llm.tokenizer))
    weight, bias = solve_projection(pairs.pools.to(words.device), words, loud)
    connector.projection.weight.copy_(weight)
    connector.projection.bias.copy_(bias)
    model.train(training)
    console.print(f"the projection starts at the words of the captions, solved on {len(pairs.captions):,} photos")


def mean_queries(qformer: QFormer, seen: VisualTokens) -> Tensor:
    """Average the query outputs of all tiles of each image: float[B, H]."""
    tiles = qformer.encode_image(seen).float().mean(dim=1)  # (N, H)
    return torch.stack([own.mean(dim=0) for own in tiles.split(list(seen.counts))])


def word_blends(llm: LanguageModel, captions: Sequence[Sequence[str]]) -> Tensor:
    """Average the input embeddings of the tokens of N images' captions, weighted by rarity: float[N, L]."""
    tokenized = [[llm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in own] for own in captions]
    rows = [[token for text in own for token in text] for own in tokenized]
    embed = llm.model.get_input_embeddings()
    seen_in = torch.zeros(embed.weight.shape[0])
    for row in rows:
        seen_in[sorted(set(row))] += 1
    rarity = (len(rows) / seen_in.clamp(min=1)).log() + 1e-6  # where all captions are the same, tokens count alike
    device = embed.weight.device
    ids = [torch.tensor(row or [llm.end]) for row in rows]
    blends = [rarity[own].to(device) @ embed(own.to(device)).float() / rarity[own].sum() for own in ids]
    return torch.stack(blends)


def solve_projection(queries: Tensor, words: Tensor, loud: float) -> tuple[Tensor, Tensor]:
    """Solve the weight float[L, H] and bias float[L] of a Linear from queries float[N, H] to words float[N, L].

    What differs between images is made `loud`, its root mean square, since the mean of many words is a faint one.
    """
    center, middle = queries.double().mean(dim=0), words.double().mean(dim=0)
    x, y = queries.double() - center, words.double() - middle
    covariance = x.T @ x / len(x)
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    weight = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance), device=x.device), x.T @ y / len(x)).T
    weight = weight * (loud / (x @ weight.T).square().mean().sqrt().clamp(min=1e-12))
    return weight.float(), (middle - weight @ center).float()
