"""Captions that the Q-Former of stage one writes itself, without a language model: what it learned from ITG."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from qformer.llm.decoding import GenerateConfig, write
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.model.qformer import KeyValues, QFormer
    from qformer.types import Tiles


class Captioning:
    """The part of a stage-one model that writes.

    Attributes:
        qformer: with its captioning head.
        tokenizer: whose bos token `[DEC]` begins a caption and whose `[SEP]` ends it.
    """

    qformer: QFormer
    tokenizer: Any

    @abstractmethod
    def encode_images(self, images: Tiles) -> KeyValues:
        """Compute the keys and values that the Q-Former reads of B images."""

    @overload
    def caption(
        self,
        tiles: Tiles,
        beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        return_ids: Literal[False] = False,
    ) -> list[str]: ...
    @overload
    def caption(
        self, tiles: Tiles, beams: int = 3, max_length: int = 30, min_length: int = 10, *, return_ids: Literal[True]
    ) -> Tensor: ...
    @torch.no_grad()
    def caption(
        self, tiles: Tiles, beams: int = 3, max_length: int = 30, min_length: int = 10, return_ids: bool = False
    ) -> list[str] | Tensor:
        """Caption B images with the Q-Former alone, by beam search; `[DEC]` begins a caption and `[SEP]` ends it.

        Args:
            beams: 1 is greedy.
            max_length, min_length: tokens, `[DEC]` counted, as the original counts.
            return_ids: give the new tokens, long[B, new], padded on the right, instead of strings.

        Raises:
            UsageError: lengths or beams that cannot be.
        """
        if not (beams >= 1 and 0 <= min_length <= max_length and max_length >= 2):
            raise UsageError(
                f"got beams={beams}, min_length={min_length}, max_length={max_length}; "
                "give at least one beam, and lengths of 2 or more with the smaller one first"
            )
        # The original leaves the end out of a text's length, so that a text of `min_length` tokens may just end.
        config = GenerateConfig(beams, max_length - 1, max(min_length - 1, 0))
        ids = self._write(tiles, config)
        return ids if return_ids else self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def sample_captions(
        self, tiles: Tiles, draws: Tensor, top_p: float = 0.9, max_length: int = 30, min_length: int = 0
    ) -> list[str]:
        """Captions of B images that the Q-Former writes by nucleus sampling, n of each.

        Args:
            draws: float[B * n, max_length - 1], a number in [0, 1) for each token: those of one image stand together.
            max_length, min_length: tokens, `[DEC]` counted.

        Returns:
            B * n captions, those of one image together.
        """
        config = GenerateConfig(
            do_sample=True,
            top_p=top_p,
            max_new_tokens=max_length - 1,
            min_new_tokens=max(min_length - 1, 0),
            num_return_sequences=len(draws) // len(tiles),
            draws=draws.tolist(),
        )
        return self.tokenizer.batch_decode(self._write(tiles, config), skip_special_tokens=True)

    def _write(self, tiles: Tiles, config: GenerateConfig) -> Tensor:
        """Ids that the Q-Former writes about B images after `[DEC]`, long[B * n, new]."""
        image = self.encode_images(tiles)
        cache = self.qformer.start_text(image)

        def step(texts: Tensor, rows: Tensor | None) -> Tensor:
            nonlocal cache
            cache = cache if rows is None else cache.select(rows)
            logits, cache = self.qformer.next_token(texts[:, -1], cache)
            return logits.float()

        start = torch.full((len(tiles), 1), self.tokenizer.bos_token_id, device=image.layers[0][0].device)
        return write(step, start, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id, config)
