"""Keys and values of attention, which a Q-Former keeps of images and of texts between passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class KeyValues:
    """Cross-attention keys and values of B images in each layer that has cross-attention.

    Attributes:
        layers: pairs of float[B, heads, S, H / heads].
        mask: bool[B, 1, 1, S], or None where every token exists.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor | None

    def __len__(self) -> int:
        return len(self.layers[0][0])

    def select(self, images: Tensor) -> KeyValues:
        """Select the images long[n], in that order; gradients flow back to each."""
        layers = [(keys[images], values[images]) for keys, values in self.layers]
        return KeyValues(layers, None if self.mask is None else self.mask[images])

    def join(self, other: KeyValues) -> KeyValues:
        """Concatenate these images and those of `other`; the shorter ones are padded."""
        own, others = (part.layers[0][0].shape[2] for part in (self, other))
        others = others if len(other) else own  # no images have any length
        more = max(own, others)

        def padded(rows: Tensor) -> Tensor:
            return F.pad(rows, (0, 0, 0, more - rows.shape[2]))  # (B, heads, more, H / heads)

        layers = [
            (
                torch.cat([padded(keys), padded(theirs[0])]),
                torch.cat([padded(values), padded(theirs[1])]),
            )
            for (keys, values), theirs in zip(self.layers, other.layers, strict=True)
        ]
        if self.mask is None and other.mask is None and own == others:
            return KeyValues(layers, None)
        masks = []
        for part, length in ((self, own), (other, others)):
            exists = part.layers[0][0].new_ones(len(part), 1, 1, length, dtype=torch.bool)
            masks.append(F.pad(exists if part.mask is None else part.mask, (0, more - length)))
        return KeyValues(layers, torch.cat(masks))


@dataclass
class TextCache:
    """A cache of the self-attention keys and values of every layer, for generation token by token.

    Attributes:
        layers: pairs of float[B, heads, Q + t, H / heads]: the queries, which never change, then t tokens of text.
        length: t.
    """

    layers: list[tuple[Tensor, Tensor]]
    length: int = 0

    def select(self, rows: Tensor) -> TextCache:
        """Select the rows long[n], in that order."""
        return TextCache([(keys[rows], values[rows]) for keys, values in self.layers], self.length)
