"""Vision transformers over tiles of unequal sizes: one sequence of all their tokens, in which each tile sees itself.

Linear layers and norms run once over all tokens, and no padding is computed. Attention over such a sequence is one
kernel (`torch.nn.attention.varlen`) on a GPU that has it, for queries in half precision; elsewhere tiles of equal size
attend together, one size after the other.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from qformer.ragged import pack
from qformer.vision.base import VisionEncoder, by_size
from qformer.vision.levels import levels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Tokens of one sequence at most, unless a single tile has more: beyond this only memory grows.
SEQUENCE = 1 << 14
#: The first generation of GPUs, and the widest heads, for which torch has the kernel of packed sequences.
GENERATION, WIDEST = (8, 0), 256


class Segments:
    """Stretches of a packed sequence; tokens attend within their own.

    Attributes:
        lengths: number of tokens of each, in their order.
        edges: int32[count + 1], where each begins and the last ends.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.edges = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(device)

    def runs(self) -> Iterator[tuple[slice, int]]:
        """Neighbors of equal length: where they are, and that length."""
        start = 0
        for length, same in groupby(self.lengths):
            stop = start + length * len(list(same))
            yield slice(start, stop), length
            start = stop


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Joint projections [..., 3 * D] -> queries, keys and values, [..., heads, D / heads] each."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None = None) -> Tensor:
    """Self-attention within each tile.

    Args:
        query, key, value: [N, S, heads, d] of N tiles of equal size, or, with `segments`, [n, heads, d] of all tokens.

    Returns:
        [N, S, heads * d], or [n, heads * d].
    """
    if segments is None:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (N, heads, S, d) each
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    if _has_kernel(query):
        longest = max(segments.lengths)
        packed = varlen_attn(query, key, value, segments.edges, segments.edges, longest, longest)
        return cast("Tensor", packed).flatten(1)
    found = [
        attend(*(part[run].unflatten(0, (-1, length)) for part in (query, key, value))).flatten(0, 1)
        for run, length in segments.runs()
    ]
    return torch.cat(found)


def _has_kernel(query: Tensor) -> bool:
    """Check if torch attends over packed sequences of [n, heads, d] in one kernel on the device of `query`."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= WIDEST
        and torch.cuda.get_device_capability(query.device) >= GENERATION
    )


class Tower(VisionEncoder):
    """A vision transformer made of `blocks`, which takes tiles of unequal sizes as one sequence.

    A block is called with a residual stream float[N, S, width] and None, or float[n, width] and its `Segments`, and
    with whatever `turns` gives.

    Attributes:
        layers: whose tokens come out, see `qformer.vision.levels`; None: those of the last block.
    """

    def __init__(
        self, *, width: int, patch_size: int, image_size: int, depth: int, layers: tuple[int, ...] | None, **other: Any
    ) -> None:
        read = levels(layers, depth)
        super().__init__(width=width * len(read), patch_size=patch_size, image_size=image_size, **other)
        self.layers, self._read = layers, read

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Normalized pixels float[N, 3, h, w] -> float[N, S, width], what the first block reads."""

    def turns(self, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """More arguments of each block, for a sequence of tiles with these (rows, columns): by default none."""
        return ()

    def stack(self) -> nn.ModuleList:
        """All blocks, the first one first."""
        return cast("nn.ModuleList", self.blocks)

    def stop_gradients(self) -> None:
        """Turn gradients off for the blocks behind the last layer that is read; call it when the blocks are made."""
        for block in list(self.stack())[self._read[0] :]:
            block.requires_grad_(False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalized pixels float[N, 3, h, w] -> float32[N, extra + rows * columns, D]."""
        return self.run(self.embed(pixels), None, *self.turns([self.grid(pixels.shape[-1], pixels.shape[-2])]))

    def run(self, x: Tensor, *arguments: Any) -> Tensor:
        """Pass embedded tokens [..., width] through the blocks: [..., D], the last of the layers read first."""
        found = {0: x}
        for number, block in enumerate(list(self.stack())[: self._read[0]], start=1):
            x = block(x, *arguments)
            if number in self._read:
                found[number] = x
        return x if len(self._read) == 1 else torch.cat([found[number] for number in self._read], dim=-1)

    def encode_all(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Tiles of any sizes, each float[3, h, w] in [0, 1] -> the tokens of each, float[S, D], in the same order.

        Unequal tiles are packed into sequences of at most `SEQUENCE` tokens.

        Raises:
            UsageError: as `forward`.
        """
        found: dict[int, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            for members in self._sequences(pixels):
                found.update(zip(members, self._encode_sequence([pixels[i] for i in members]), strict=True))
        return [found[index] for index in range(len(pixels))]

    def _sequences(self, pixels: Sequence[Tensor]) -> Iterator[list[int]]:
        """Numbers of the tiles of each sequence, those of one size side by side."""
        members: list[int] = []
        total = 0
        for index in (index for same in by_size(pixels) for index in same):
            rows, columns = self.grid(pixels[index].shape[-1], pixels[index].shape[-2])
            count = self.extra + self.per_patch * rows * columns
            if members and total + count > SEQUENCE:
                yield members
                members, total = [], 0
            members, total = [*members, index], total + count
        if members:
            yield members

    def _encode_sequence(self, pixels: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tokens of tiles among which those of one size are side by side."""
        groups = by_size(pixels)
        stacks = [self.normalized(torch.stack([pixels[i] for i in members])) for members in groups]
        if len(groups) == 1:
            return self.encode(stacks[0]).unbind()
        grids = [self.grid(stack.shape[-1], stack.shape[-2]) for stack in stacks for _ in stack]
        embedded = [self.embed(stack) for stack in stacks]
        lengths = [stack.shape[1] for stack in embedded for _ in stack]
        x = pack([stack.flatten(0, 1) for stack in embedded])  # (n, width)
        return self.run(x, Segments(lengths, x.device), *self.turns(grids)).split(lengths)
