"""Steps of generation with a transformers model: each reads the newest tokens and returns scores of the next one.

A step calls only the public `forward` of the model, never its `generate`, with explicit positions and a cache that is
created here, since the name of the cache in outputs changes between releases. Image and prompt are read once for all
beams or samples of a row. A model without a usable cache reads the whole row again for every token, which is slower and
gives the same text.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from qformer.llm import mrope

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Abilities:
    """Abilities of a model that generation can rely on.

    Attributes:
        caches: its cache can be repeated and reordered; otherwise every token reads the whole row again.
        batches: a padded row gets the same scores as the row alone; otherwise rows are read one by one.
    """

    caches: bool = True
    batches: bool = True


CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # argument of `forward`: since 5.24, up to 5.23, in Mamba


def cache_name(model: Any) -> str | None:
    """Find the name of the cache argument of a model's `forward`; None if it has no known one."""
    return next((name for name in CACHE_NAMES if name in arguments(model)), None)


def arguments(model: Any) -> Mapping[str, Any]:
    """Return the parameters of a model's `forward` by name."""
    return inspect.signature(model.forward).parameters


class ModelStep(ABC):
    """A step of `qformer.llm.decoding` with a transformers model.

    Args:
        cached: keep keys and values between tokens.
    """

    def __init__(self, model: Any, cached: bool) -> None:
        self.model = model
        self.arguments = arguments(model)
        self.cache_name = cache_name(model) if cached else None
        self.cache: Any = None
        self.begun = False

    def __call__(self, texts: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute logits of the next token, float[n, V], for texts so far long[n, t], each of which continues a row.

        In the first call `rows` are the B input rows, which are read once each, however many texts start from one (its
        texts are adjacent). Later they are rows of the previous call: texts of the same B rows in the same order.
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
        """Compute logits of the last position, float32[n, V], with only the arguments that this `forward` takes."""
        if self.cache_name is not None:
            inputs[self.cache_name] = self.cache
        usual = {"use_cache": self.cache_name is not None, "logits_to_keep": 1}
        inputs |= {name: value for name, value in usual.items() if name in self.arguments}
        return self.model(**inputs).logits[:, -1].float()

    @abstractmethod
    def _count(self) -> int:
        """Return B, the number of input rows."""

    @abstractmethod
    def _new_cache(self) -> Any: ...

    @abstractmethod
    def _text_cache(self) -> Any:
        """Return the part of the cache in which the texts of a row differ."""

    @abstractmethod
    def _repeat(self, rows: Tensor) -> None:
        """Repeat the inputs: one of the B rows for each text, long[n]."""

    @abstractmethod
    def _read_whole(self, texts: Tensor) -> Tensor:
        """Compute logits after the rows and their whole texts long[n, t]."""

    @abstractmethod
    def _read_next(self, token: Tensor) -> Tensor:
        """Compute logits after one more token of each text, long[n, 1]."""


class CausalStep(ModelStep):
    """Steps of a decoder-only model after rows of embeddings.

    Args:
        embeds: float[B, X, L], padded on the left. mask: long[B, X], 1 where there is a token.
        ids: long[3, B, X], positions of a model that numbers them by time, row and column; None counts tokens.
    """

    def __init__(
        self, model: Any, embeds: Tensor, mask: Tensor, cached: bool = True, ids: Tensor | None = None
    ) -> None:
        super().__init__(model, cached)
        self.embeds, self.mask, self.ids = embeds, mask, ids
        # How far the ids of what is generated are ahead of the number of tokens: a picture has fewer ids than tokens.
        self.ahead = None if ids is None else mrope.ahead(ids, mask)

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
        if self.ids is not None and self.ahead is not None:
            self.ids, self.ahead = self.ids[:, rows], self.ahead[rows]

    def _read_whole(self, texts: Tensor) -> Tensor:
        embeds, mask = self.embeds, self.mask
        if texts.shape[1]:
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(texts).to(embeds.dtype)], dim=1)
            mask = torch.cat([mask, torch.ones_like(texts)], dim=1)
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._forward(inputs_embeds=embeds, attention_mask=mask, **self._positions(places, self.embeds.shape[1]))

    def _read_next(self, token: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(token)], dim=1)
        places = self.mask.sum(dim=1, keepdim=True) - 1
        return self._forward(input_ids=token, attention_mask=self.mask, **self._positions(places))

    def _positions(self, places: Tensor, given: int = 0) -> dict[str, Tensor]:
        """Pass the positions of tokens in their row, not counting padding, if `forward` takes them.

        Args:
            places: long[n, t], the number of each token in its row.
            given: how many columns are of the rows themselves, whose ids are known.
        """
        if self.ids is None or self.ahead is None:
            return {"position_ids": places} if "position_ids" in self.arguments else {}
        generated = (places + self.ahead[:, None])[:, given:].expand(3, -1, -1)
        return {"position_ids": torch.cat([self.ids[..., :given], generated], dim=2)}


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
        # T5's configuration counts the encoder's layers too; a cache without a configuration grows with use.
        own = DynamicCache(config=config) if getattr(config, "layer_types", None) else DynamicCache()
        return EncoderDecoderCache(own, DynamicCache())

    def _text_cache(self) -> Any:
        return self.cache.self_attention_cache  # the encoder's part is the same for all texts of a row

    def _repeat(self, rows: Tensor) -> None:
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows]  # (n, X, L)
        self.mask = self.mask[rows]

    def _read_whole(self, texts: Tensor) -> Tensor:
        return self._forward(encoder_outputs=self.encoded, attention_mask=self.mask, decoder_input_ids=texts)

    def _read_next(self, token: Tensor) -> Tensor:
        return self._read_whole(token)
