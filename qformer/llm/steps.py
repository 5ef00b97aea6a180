"""Steps of writing with a language model of transformers: what it has read, and the scores of the next token.

A step calls the model's own public `forward` and nothing of its `generate`, with explicit positions and a cache that
is made here and kept: what an output calls its cache changes from release to release. Image and prompt are read once
for all beams or samples of a row. A model without a usable cache reads the whole row again for every token, which is
slower and gives the same text.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

if TYPE_CHECKING:
    from collections.abc import Mapping

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # the argument of `forward`: from 5.24, up to 5.23, Mamba's


def cache_name(model: Any) -> str | None:
    """What the `forward` of a model calls its cache; None where it takes none that we know."""
    return next((name for name in CACHE_NAMES if name in arguments(model)), None)


def arguments(model: Any) -> Mapping[str, Any]:
    """Names of the arguments of a model's `forward`."""
    return inspect.signature(model.forward).parameters


class ModelStep(ABC):
    """A step of `qformer.llm.decoding` over a model of transformers.

    Args:
        cached: keep keys and values between the tokens.
    """

    def __init__(self, model: Any, cached: bool) -> None:
        self.model = model
        self.arguments = arguments(model)
        self.cache_name = cache_name(model) if cached else None
        self.cache: Any = None
        self.begun = False

    def __call__(self, texts: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits of the next token, float[n, V], for texts so far long[n, t], each of which continues a row.

        At first these are the B rows that are read, each once, however many texts begin with it (those of a row stand
        together). Then they are rows of the last call: texts of the same B rows in the same order.
        """
        if not self.begun:
            self.begun = True
            return self._begin(texts, rows)
        if self.cache_name is None:
            return self._read_whole(texts)
        if rows is not None:
            self._text_cache().reorder_cache(rows)
        return self._read_next(texts[:, -1:])

    def _begin(self, texts: Tensor, rows: Tensor | None) -> Tensor:
        count = self._count()
        if rows is None or len(rows) == count:
            self.cache = self._new_cache() if self.cache_name else None
            return self._read_whole(texts)
        if self.cache_name is None:
            self._repeat(rows)
            return self._read_whole(texts)
        self.cache = self._new_cache()
        logits = self._read_whole(texts[:: len(texts) // count])
        self.cache.reorder_cache(rows)
        self._repeat(rows)
        return logits[rows]

    def _forward(self, **inputs: Any) -> Tensor:
        """Logits of the last position, float32[n, V]; what this model's `forward` does not take is left out."""
        if self.cache_name is not None:
            inputs[self.cache_name] = self.cache
        usual = {"use_cache": self.cache_name is not None, "logits_to_keep": 1}
        inputs |= {name: value for name, value in usual.items() if name in self.arguments}
        return self.model(**inputs).logits[:, -1].float()

    @abstractmethod
    def _count(self) -> int:
        """B, the number of rows that are read."""

    @abstractmethod
    def _new_cache(self) -> Any: ...

    @abstractmethod
    def _text_cache(self) -> Any:
        """The part of the cache in which the texts of a row differ."""

    @abstractmethod
    def _repeat(self, rows: Tensor) -> None:
        """Repeats what was read: one of the B rows for each text, long[n]."""

    @abstractmethod
    def _read_whole(self, texts: Tensor) -> Tensor:
        """Logits after the rows and all of their texts long[n, t]."""

    @abstractmethod
    def _read_next(self, token: Tensor) -> Tensor:
        """Logits after one more token of each text, long[n, 1]."""


class CausalStep(ModelStep):
    """Steps of a decoder-only model after rows of embeddings.

    Args:
        embeds: float[B, X, L], padded on the left. mask: long[B, X], 1 where there is a token.
    """

    def __init__(self, model: Any, embeds: Tensor, mask: Tensor, cached: bool = True) -> None:
        super().__init__(model, cached)
        self.embeds, self.mask = embeds, mask

    def _count(self) -> int:
        return len(self.embeds)

    def _new_cache(self) -> Any:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def _text_cache(self) -> Any:
        return self.cache

    def _repeat(self, rows: Tensor) -> None:
        if self.cache_name is None:
            self.embeds = self.embeds[rows]
        self.mask = self.mask[rows]

    def _read_whole(self, texts: Tensor) -> Tensor:
        embeds, mask = self.embeds, self.mask
        if texts.shape[1]:
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(texts).to(embeds.dtype)], dim=1)
            mask = torch.cat([mask, torch.ones_like(texts)], dim=1)
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._forward(inputs_embeds=embeds, attention_mask=mask, **self._positions(places))

    def _read_next(self, token: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(token)], dim=1)
        places = self.mask.sum(dim=1, keepdim=True) - 1
        return self._forward(input_ids=token, attention_mask=self.mask, **self._positions(places))

    def _positions(self, places: Tensor) -> dict[str, Tensor]:
        """Places of tokens in their own row, padding not counted, where `forward` takes them."""
        return {"position_ids": places} if "position_ids" in self.arguments else {}


class Seq2SeqStep(ModelStep):
    """Steps of a decoder whose encoder has read rows of embeddings.

    Args:
        embeds: float[B, X, L], padded on the right. mask: long[B, X], 1 where there is a token.
    """

    def __init__(self, model: Any, embeds: Tensor, mask: Tensor, cached: bool = True) -> None:
        super().__init__(model, cached)
        self.encoded = model.get_encoder()(inputs_embeds=embeds, attention_mask=mask)
        self.mask = mask

    def _count(self) -> int:
        return len(self.mask)

    def _new_cache(self) -> Any:
        config = self.model.config.get_text_config(decoder=True)
        # T5's configuration counts the encoder's layers, too; a cache that is told nothing grows as it is used.
        own = DynamicCache(config=config) if getattr(config, "layer_types", None) else DynamicCache()
        return EncoderDecoderCache(own, DynamicCache())

    def _text_cache(self) -> Any:
        return self.cache.self_attention_cache  # what the encoder read is the same for all texts of a row

    def _repeat(self, rows: Tensor) -> None:
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows]  # (n, X, L)
        self.mask = self.mask[rows]

    def _read_whole(self, texts: Tensor) -> Tensor:
        return self._forward(encoder_outputs=self.encoded, attention_mask=self.mask, decoder_input_ids=texts)

    def _read_next(self, token: Tensor) -> Tensor:
        return self._read_whole(token)
