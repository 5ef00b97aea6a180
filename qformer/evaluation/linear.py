"""The baseline of any bridge: how well two linear maps of the frozen towers alone retrieve (`qformer.alignment`).

The maps are solved in seconds on the pooled image tokens of a feature store and the pooled words of the text tower that
the Q-Former started from, all its layers and its own weights. Held-out images and captions are those of the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
from qformer.types import BadSample, Tiles, Tokens, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from qformer.alignment import Alignment
    from qformer.data.base import Source
    from qformer.data.features import FeatureStore
    from qformer.model.frontend import FrontEnd
    from qformer.model.image_text import ImageTextModel
    from qformer.types import VisualTokens

LINEAR = "linear"  # name of its rows
PHOTOS, CAPTIONS = 10_000, 5  # at most, and of each photo: reading captions takes nearly all of the time
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
        return read_sentences(self.model, self._pool, self.tower.config.hidden_size, texts, show)

    def _pool(self, tokens: Tokens) -> Tensor:
        words, mask = self.tower.encode_text(tokens.ids, tokens.mask), tokens.mask[..., None]  # (B, T, E), (B, T, 1)
        return (words * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def read_sentences(
    model: ImageTextModel, read: Callable[[Tokens], Tensor], width: int, texts: Sequence[str], show: bool = False
) -> Tensor:
    """Features float[T, width] on the CPU; equal texts are read once, and texts of one length together.

    Args:
        model: whose tokenizer cuts the texts, as retrieval does.
        read: gives float[B, width] of B texts.
    """
    places: dict[str, int] = {}
    own = torch.tensor([places.setdefault(text, len(places)) for text in texts])
    tokens = read_texts(model, list(places))
    features = torch.empty(len(places), width)
    order = tokens.mask.sum(1).argsort(stable=True).split(ROWS)
    for some in track(order, "reading captions", len(order), disable=not show):
        features[some] = read(trim(tokens.select(some)).to(model.device)).float().cpu()
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


@dataclass
class Pairs:
    """Training photos of a feature store with their captions, as the maps are solved on them.

    Attributes:
        pools: float[N, D or 2 * D] from `pooled`, or what another `pool` gave.
        captions: at most `CAPTIONS` of each photo.
        first: the tokens of the first photos, with the same adapter.
    """

    pools: Tensor
    captions: list[list[str]]
    first: VisualTokens

    def mean(self, read: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """The mean features of each photo's captions, float[N, E], where `read` gives float[T, E]."""
        features = read([text for own in self.captions for text in own]).split([len(own) for own in self.captions])
        return torch.stack([own.mean(0) for own in features])


def collect(
    frontend: FrontEnd,
    store: FeatureStore,
    source: Source,
    photos: int = PHOTOS,
    adapted: bool = False,
    pool: Callable[[VisualTokens], Tensor] = pooled,
    show: bool = False,
) -> Pairs:
    """Read the photos of a feature store and the captions of the source that it was filled from.

    Args:
        photos: records to use at most, spread evenly over the source; the first `CAPTIONS` captions of each photo.
        adapted: pool the tokens behind the front end's adapter, as the Q-Former reads them.
        pool: makes the tokens of B photos one row of features each, float[B, D].
        show: draw a progress bar.

    Raises:
        UsageError: the store is damaged or of other data, or fewer than two photos have captions.
    """
    samples = store.samples
    used = range(samples) if samples <= photos else [samples * place // photos for place in range(photos)]
    captions: dict[str | int, list[str]] = {}
    pools: list[Tensor] = []
    first: list[VisualTokens] = []
    group: list[Tiles] = []

    def read_group() -> None:
        with torch.no_grad():
            tokens = (frontend if adapted else frontend.encode_tiles)(Tiles.join(group))
            pools.append(pool(tokens).cpu())
        first.extend([] if first else [tokens])
        group.clear()

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
            read_group()
    if group:
        read_group()
    if len(captions) < 2:
        raise UsageError(f"{len(captions)} of {len(used)} training samples have a stored image and a caption")
    return Pairs(torch.cat(pools), [own[:CAPTIONS] for own in captions.values()], first[0])


def solve(
    sentences: SentenceTower, store: FeatureStore, source: Source, width: int, photos: int = PHOTOS, show: bool = False
) -> LinearMap:
    """Solve the maps, into a space `width` wide, on a feature store and the captions of its source; see `collect`."""
    pairs = collect(sentences.model.frontend, store, source, photos, show=show)
    texts = pairs.mean(partial(sentences, show=show))
    solved = align(pairs.pools, texts, width)
    return LinearMap(sentences, solved, len(pairs.captions), sum(map(len, pairs.captions)))
