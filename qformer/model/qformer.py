"""The Q-Former (BLIP-2, section 3.1): learned queries that read image tokens, in one transformer with text.

Every layer has self-attention over [queries; text], cross-attention to the image for query rows only (in layers 0, n,
2n, ...), then one feed-forward for query rows and another for text rows. It is used in three ways:

    encode_image / encode_text   each alone                                    ITC
    match                        queries and text attend to each other         ITM
    decode                       text is causal and attends to the queries     ITG

The image enters as `KeyValues`, computed once per image and shared by all passes, or as plain tokens: of equal length,
or `VisualTokens`, of which it is here alone that the shorter rows are padded.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor, nn

from qformer.connectors.places import PlaceEmbedding
from qformer.model.bert import Attention, Embeddings, FeedForward, LMHead, Mode, attention_mask, bert_weights
from qformer.model.key_values import KeyValues, TextCache
from qformer.ragged import Padding
from qformer.schema import QFormerConfig
from qformer.types import UsageError, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BERT_WIDTH = 768  # of BERT-base, for which the initial scale of 0.02 was chosen


Image = Tensor | VisualTokens | KeyValues


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.cross_attention = Attention(config, config.encoder_width) if has_cross_attention else None
        self.text_ffn = FeedForward(config)
        self.query_ffn = FeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        queries: int,
        mask: Tensor | None,
        image: tuple[Tensor, Tensor] | None,
        image_mask: Tensor | None,
        rows: int | None = None,
    ) -> Tensor:
        """float[B, Q + T, H] -> the same shape; the first `queries` rows are queries.

        With `rows` only the first `rows` rows are computed, float[B, rows, H]; they still attend to all the others.
        """
        hidden = self.attend(hidden, mask, rows)
        query_rows, text_rows = hidden[:, :queries], hidden[:, queries:]  # (B, Q, H), (B, T, H)
        done = []
        if queries:
            done.append(self.read_image(query_rows, image, image_mask))
        if text_rows.shape[1]:
            done.append(self.text_ffn(text_rows))
        return torch.cat(done, dim=1)

    def attend(self, hidden: Tensor, mask: Tensor | None, rows: int | None = None) -> Tensor:
        """Run the first part of the layer, self-attention; for `rows` see `forward`."""
        keys_values = self.attention.keys_values(hidden)
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, :rows]
        return self.attention(hidden[:, :rows], *keys_values, mask)

    def read_image(self, query_rows: Tensor, image: tuple[Tensor, Tensor] | None, image_mask: Tensor | None) -> Tensor:
        """Run the rest of the layer for query rows, float[B, Q, H]: cross-attention, if any, and feed-forward."""
        if self.cross_attention is not None and image is not None:
            query_rows = self.cross_attention(query_rows, *image, image_mask)
        return self.query_ffn(query_rows)


class QFormer(nn.Module):
    """The Q-Former; see the top of this module.

    An `image` is float[B, S, D], `VisualTokens`, or the `KeyValues` made from either. Each tile of `VisualTokens` is an
    image by itself here; `join_keys_values` joins those of one image.

    Raises:
        UsageError: a text is longer than `max_positions`.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(1, config.queries, config.hidden_size))
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            QFormerLayer(config, layer % config.cross_attention_every == 0) for layer in range(config.layers)
        )
        self.lm_head: LMHead | None = LMHead(config)
        self.place_tokens: PlaceEmbedding | None = None
        self.place_queries: PlaceEmbedding | None = None
        std = 0.02 * math.sqrt(BERT_WIDTH / config.hidden_size)
        self.apply(partial(_init, std=std))
        nn.init.normal_(self.queries, std=std)

    @classmethod
    def from_bert(
        cls,
        bert: Mapping[str, Tensor] | str | Path,
        config: QFormerConfig | None = None,
        fold_token_types: bool = False,
    ) -> Self:
        """Build a Q-Former from BERT; queries, cross-attention and new words are random (BLIP-2, section 3.1).

        Args:
            bert: a state dict, or a folder or hub id of any BERT.
            config: the sizes; None reads them from the folder (one word is added to the vocabulary).
            fold_token_types: see `bert_weights`.

        Raises:
            UsageError: there is no BERT, or its sizes are not those of `config`.
        """
        tensors: Mapping[str, Tensor]
        if isinstance(bert, str | Path):
            from qformer.model.bert import read_bert

            config, tensors = read_bert(str(bert), config)
        elif config is None:
            raise UsageError("from_bert got tensors without sizes; give config=QFormerConfig(...) too")
        else:
            tensors = bert
        model = cls(config)
        model.load_bert(tensors, fold_token_types)
        return model

    @torch.no_grad()
    def load_bert(self, bert: Mapping[str, Tensor], fold_token_types: bool = False) -> None:
        """Copy BERT's tensors into this model; rows for new words and positions keep their initial values.

        Raises:
            UsageError: a tensor is missing or does not fit.
        """
        mine = self.state_dict()
        for name, tensor in bert_weights(dict(bert), self.config, fold_token_types).items():
            target = mine[name]
            grows = name in ("embeddings.words.weight", "embeddings.positions.weight", "lm_head.bias")
            rows = min(len(target), len(tensor)) if grows else len(target)
            if tensor[:rows].shape != target[:rows].shape:
                raise UsageError(
                    f"'{name}' is {list(target.shape)} here but {list(tensor.shape)} in BERT; "
                    "match the qformer sizes to it"
                )
            target[:rows].copy_(tensor[:rows])

    def drop_text(self) -> Self:
        """Remove the text path, as stage two does: word and position embeddings, text feed-forwards and LM head."""
        del self.embeddings.words, self.embeddings.positions, self.lm_head
        for layer in self.layers:
            del layer.text_ffn
        return self

    def drop_captioning(self) -> Self:
        """Keep only the parts that `match` needs, as stage two does for a Q-Former that reads questions.

        The LM head is removed, and the text feed-forward of the last layer, whose text rows are not used.
        """
        last = cast("QFormerLayer", self.layers[-1])
        del self.lm_head, last.text_ffn
        return self

    def link(self, each: bool) -> Self:
        """Give image tokens an embedding of their tile's place, and with `each` the queries that read for one tile.

        They start at zero, where nothing changes. Images of plans have them, `VisualTokens`.
        """
        self.place_tokens = PlaceEmbedding(self.config.encoder_width)
        self.place_queries = PlaceEmbedding(self.config.hidden_size) if each else None
        return self

    def keys_values(self, image: Image, image_mask: Tensor | None = None) -> KeyValues:
        """float[B, S, D] and bool[B, S] (None: all exist) -> keys and values for all passes over these images."""
        if isinstance(image, KeyValues):
            return image
        if isinstance(image, VisualTokens):
            return self._regroup(self._project(self._placed(image)[None]), image.lengths)
        return KeyValues(self._project(image), None if image_mask is None else image_mask[:, None, None, :])

    def join_keys_values(self, visual: VisualTokens) -> tuple[KeyValues, KeyValues]:
        """Compute keys and values of each of N tiles, and of the tiles of each of B images; equal objects if N = B."""
        layers = self._project(self._placed(visual)[None])
        per_tile = self._regroup(layers, visual.lengths)
        if max(visual.counts, default=1) == 1:
            return per_tile, per_tile
        lengths = iter(visual.lengths)
        return per_tile, self._regroup(layers, [sum(islice(lengths, count)) for count in visual.counts])

    def _placed(self, visual: VisualTokens) -> Tensor:
        """All tokens of tiles, float[sum of S, D], with the embedding of their tile's place where there is one."""
        if self.place_tokens is None:
            return visual.packed
        lengths = torch.tensor(visual.lengths, dtype=torch.long)  # perhaps of no tiles at all
        return visual.packed + self.place_tokens(visual)[torch.arange(len(lengths)).repeat_interleave(lengths)]

    def _project(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """float[B, S, D] -> keys and values of each layer that has cross-attention, float[B, heads, S, H / heads]."""
        attentions = [layer.cross_attention for layer in cast("Iterable[QFormerLayer]", self.layers)]
        return [attention.keys_values(tokens) for attention in attentions if attention is not None]

    def _regroup(self, layers: list[tuple[Tensor, Tensor]], lengths: list[int]) -> KeyValues:
        """Keys and values of all tokens, float[1, heads, sum of lengths, H / heads], as rows of these lengths."""
        padding = Padding(lengths, layers[0][0].device)

        def rows(packed: Tensor) -> Tensor:
            return padding.pad(packed[0].transpose(0, 1)).transpose(1, 2)  # (B, heads, S, H / heads)

        mask = padding.mask
        return KeyValues(
            [(rows(keys), rows(values)) for keys, values in layers], None if mask is None else mask[:, None, None, :]
        )

    def encode_image(self, image: Image, image_mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Compute the queries after reading the image without text: float[B, Q, H].

        Args:
            places: float[B, H], added to the queries of each image.
        """
        return self._run(self.keys_values(image, image_mask), None, None, places=places)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode text without an image, as BERT does: long[B, T], bool[B, T] -> float[B, T, H]."""
        return self._run(None, ids, attention_mask(0, mask, "bidirectional"))

    def encode_cls(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the first row of `encode_text`, the only one that ITC needs: float[B, H]."""
        return self._run(None, ids, attention_mask(0, mask, "bidirectional"), rows=1)[:, 0]

    def joint(
        self, image: Image, image_mask: Tensor | None, ids: Tensor, mask: Tensor, mode: Mode
    ) -> tuple[Tensor, Tensor]:
        """Run queries and text in one pass -> float[B, Q, H] and float[B, T, H].

        In mode `causal` the queries equal those of `encode_image`, since they do not attend to the text.
        """
        self_mask = attention_mask(self.config.queries, mask, mode)
        hidden = self._run(self.keys_values(image, image_mask), ids, self_mask)
        return hidden[:, : self.config.queries], hidden[:, self.config.queries :]

    def match(
        self, image: Image, image_mask: Tensor | None, ids: Tensor, mask: Tensor, places: Tensor | None = None
    ) -> Tensor:
        """Compute the queries after reading image and text: float[B, Q, H]. `places`: as of `encode_image`."""
        count = self.config.queries
        self_mask = attention_mask(count, mask, "bidirectional")
        return self._run(self.keys_values(image, image_mask), ids, self_mask, count, places)

    def match_pairs(self, image: KeyValues, ids: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
        """Compute `match` for the pairs (image, text) long[n, 2]: float[n, Q, H].

        The self-attention of the first layer depends on the text only, so it is computed once per text.
        """
        count = self.config.queries
        self._check_length(ids.shape[1])
        images, texts = pairs.unbind(dim=1)
        image, self_mask = image.select(images), attention_mask(count, mask, "bidirectional")
        first = cast("QFormerLayer", self.layers[0])
        hidden = first.attend(self.embeddings(self.queries.expand(len(ids), -1, -1), ids), self_mask)  # (B, Q + T, H)
        query_rows = first.read_image(hidden[texts, :count], image.layers[0], image.mask)  # (n, Q, H)
        if len(self.layers) == 1:
            return query_rows
        hidden = torch.cat([query_rows, first.text_ffn(hidden[:, count:])[texts]], dim=1)  # (n, Q + T, H)
        return self._through(hidden, 1, image, count, self_mask[texts], count)[:, :count]

    def decode(self, image: Image, image_mask: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute logits of the next token at every position: float[B, T, V]."""
        return self.logits(self.joint(image, image_mask, ids, mask, "causal")[1])

    def start_text(self, image: KeyValues) -> TextCache:
        """Let the queries read the images; returns the cache for `next_token`."""
        queries = self.queries.expand(len(image), -1, -1)  # (B, Q, H)
        hidden, cache, image_layers = self.embeddings(queries, None), TextCache([]), iter(image.layers)
        for layer in cast("Iterable[QFormerLayer]", self.layers):
            cache.layers.append(layer.attention.keys_values(hidden))
            keys_values = next(image_layers) if layer.cross_attention is not None else None
            hidden = layer(hidden, queries.shape[1], None, keys_values, image.mask)
        return cache

    def next_token(self, ids: Tensor, cache: TextCache) -> tuple[Tensor, TextCache]:
        """Read one more token of each text, with the result of `decode` for the whole text at the cost of one token.

        Args:
            ids: long[B], the newest tokens.

        Returns:
            Logits of the next tokens, float[B, V], and the cache extended by the newest ones.

        Raises:
            UsageError: the text is longer than `max_positions`.
        """
        self._check_length(cache.length + 1)
        hidden = self.embeddings(None, ids[:, None], start=cache.length)  # (B, 1, H)
        grown = []
        layers = cast("Iterable[QFormerLayer]", self.layers)
        for layer, (keys, values) in zip(layers, cache.layers, strict=True):
            key, value = layer.attention.keys_values(hidden)
            grown.append((torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)))
            hidden = layer.text_ffn(layer.attention(hidden, *grown[-1], None))
        return self.logits(hidden[:, 0]), TextCache(grown, cache.length + 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., H] -> float[..., V]; the decoder is tied to the word embeddings.

        Raises:
            UsageError: the checkpoint has no captioning head.
        """
        if self.lm_head is None:
            raise UsageError(
                "this Q-Former has no captioning head: it was trained with loss.itg 0, or comes from a file of "
                "transformers, which cannot store one; train it, or use the file of LAVIS"
            )
        return self.lm_head(hidden, self.embeddings.words.weight)

    def _run(
        self,
        image: KeyValues | None,
        ids: Tensor | None,
        mask: Tensor | None,
        rows: int | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Run all layers; in the last one only the first `rows` rows are computed, if given."""
        if ids is not None:
            self._check_length(ids.shape[1])
        queries = None if image is None else self.queries.expand(len(image), -1, -1)  # (B, Q, H)
        queries = queries if queries is None or places is None else queries + places[:, None]
        count = 0 if queries is None else queries.shape[1]
        return self._through(self.embeddings(queries, ids), 0, image, count, mask, rows)

    def _through(
        self, hidden: Tensor, start: int, image: KeyValues | None, queries: int, mask: Tensor | None, rows: int | None
    ) -> Tensor:
        """Run the layers from number `start`; the first `queries` rows of `hidden` are queries."""
        image_layers = iter(image.layers[-(-start // self.config.cross_attention_every) :] if image is not None else ())
        for number, layer in enumerate(self.layers[start:], start=start + 1):
            keys_values = next(image_layers, None) if layer.cross_attention is not None else None
            image_mask = None if image is None else image.mask
            last_rows = rows if number == len(self.layers) else None
            hidden = layer(hidden, queries, mask, keys_values, image_mask, last_rows)
        return hidden

    def _check_length(self, length: int) -> None:
        if length > self.config.max_positions:
            raise UsageError(
                f"a text of {length} tokens exceeds the {self.config.max_positions} positions of the Q-Former; cut it"
            )


def _init(module: nn.Module, std: float) -> None:
    """Initialize a module as BERT does: normal weights, N(0, 0.02) at BERT's width, and zero biases.

    The scale grows for a narrower model: with 0.02 at width 128, every query would attend to all patches equally.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
