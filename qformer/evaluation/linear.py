"""The baseline of any bridge: how well two linear maps of the frozen towers alone retrieve (`qformer.alignment`).

The maps are solved in seconds on the pooled image tokens of a feature store and the pooled words of the text tower that
the Q-Former started from, all its layers and its own weights. Held-out images and captions are those of the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qformer.alignment import align, pooled
from qformer.data.texts import usable_captions
from qformer.evaluation.retrieval import ROWS, count_equal, full_table, ranks, true_pairs
from qformer.files.records import ORIGINAL
from qformer.model.image_text import trim
from qformer.model.qformer import QFormer
from qformer.progress import track
from qformer.retrieval.embedders import read_texts
from qformer.schema import QFormerConfig
from qformer.types import BadSample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qformer.alignment import Alignment
    from qformer.data.base import Source
    from qformer.data.features import FeatureStore
    from qformer.model.image_text import ImageTextModel

LINEAR = "linear"  # name of its rows
PHOTOS, CAPTIONS = 10_000, 5  # at most, and of each photo; beyond that the maps hardly change
GROUP = 64  # photos that are pooled at once


@dataclass
class SentenceTower:
    """The text tower by itself, as its authors trained it: sentences as the mean of their words' last states.

    Attributes:
        model: whose tokenizer cuts the texts, as retrieval does.
        tower: a Q-Former of which nothing but the text path is used; it equals the BERT.
    """

    model: ImageTextModel
    tower: QFormer

    @classmethod
    def read(cls, model: ImageTextModel, bert: str) -> SentenceTower:
        """Read the BERT of a folder or hub id, to the device of `model`. Raises UsageError: there is none."""
        sizes = QFormerConfig(queries=1, encoder_width=1, cross_attention_every=1000, dropout=0)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the weights of what is not used are drawn
            tower = QFormer.from_bert(bert, sizes, fold_token_types=True)
        return cls(model, tower.to(model.device).eval())

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], show: bool = False) -> Tensor:
        """Features float[T, E] on the CPU; equal texts are read once, and texts of one length together."""
        places: dict[str, int] = {}
        own = torch.tensor([places.setdefault(text, len(places)) for text in texts])
        tokens = read_texts(self.model, list(places))
        features = torch.empty(len(places), self.tower.config.hidden_size)
        order = tokens.mask.sum(1).argsort(stable=True).split(ROWS)
        for some in track(order, "reading captions", len(order), disable=not show):
            part = trim(tokens.select(some)).to(self.model.device)
            words = self.tower.encode_text(part.ids, part.mask)  # (B, T, E)
            mask = part.mask[..., None]
            features[some] = ((words * mask).sum(1) / mask.sum(1)).float().cpu()
        return features[own]


@dataclass
class LinearMap:
    """Two linear maps between frozen features, and the numbers of photos and captions that they were solved on."""

    sentences: SentenceTower
    alignment: Alignment
    photos: int
    texts: int

    def measure(self, images: Tensor, captions: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
        """Measure retrieval with all numbers of `full_table`: `linear`, also `linear_original` if texts are equal.

        Args:
            images: float[I, D or 2 * D] from `pooled`.
            captions: the captions of each image.
        """
        texts = self.sentences([text for own in captions for text in own])
        scores = self.alignment.similarity(images, texts)  # (I, T)
        ways = {LINEAR: True} | ({f"{LINEAR}{ORIGINAL}": False} if count_equal(captions) else {})
        truths = {kind: true_pairs(captions, equal) for kind, equal in ways.items()}
        return full_table(
            {kind: {"i2t": ranks(scores, truth), "t2i": ranks(scores.T, truth.T)} for kind, truth in truths.items()}
        )


def solve(
    sentences: SentenceTower, store: FeatureStore, source: Source, width: int, photos: int = PHOTOS, show: bool = False
) -> LinearMap:
    """Solve the maps on a feature store and the captions of the source that it was filled from.

    Args:
        width: of the common space.
        photos: records to use at most, spread evenly over the source; the first `CAPTIONS` captions of each photo.
        show: draw progress bars.

    Raises:
        UsageError: the store is damaged or of other data, or fewer than two photos have captions.
    """
    frontend, samples = sentences.model.frontend, store.samples
    used = range(samples) if samples <= photos else [samples * place // photos for place in range(photos)]
    captions: dict[str | int, list[str]] = {}
    pools: list[Tensor] = []
    group: list[Tiles] = []
    for number in track(used, "reading stored tokens", len(used), disable=not show):
        try:
            sample = source[number]
            texts = usable_captions(sample)
            if sample.image_id not in captions:
                group.append(store.read(number, 0, sample, frontend.strategy))
        except BadSample:
            continue
        captions.setdefault(sample.image_id, []).extend(texts)
        if len(group) == GROUP:
            pools.append(_pool(sentences.model, group))
            group = []
    if group:
        pools.append(_pool(sentences.model, group))
    if len(captions) < 2:
        raise UsageError(f"{len(captions)} of {len(used)} training samples have a stored image and a caption")
    kept = [own[:CAPTIONS] for own in captions.values()]
    features = sentences([text for own in kept for text in own], show).split([len(own) for own in kept])
    solved = align(torch.cat(pools), torch.stack([own.mean(0) for own in features]), width)
    return LinearMap(sentences, solved, len(kept), sum(map(len, kept)))


@torch.no_grad()
def _pool(model: ImageTextModel, group: Sequence[Tiles]) -> Tensor:
    return pooled(model.frontend.encode_tiles(Tiles.join(group))).cpu()
