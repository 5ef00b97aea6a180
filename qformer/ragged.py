"""Rows of unequal length in one tensor: packed one after the other, or padded on the right to the longest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class Padding:
    """Places of padding among rows of unequal length, computed once for any number of tensors packed alike.

    Attributes:
        mask: bool[N, S], True where something is; None where all rows are equally long.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.longest = max(self.lengths, default=0)
        self.mask: Tensor | None = None
        if min(self.lengths, default=0) < self.longest:
            exists = torch.arange(self.longest) < torch.tensor(self.lengths)[:, None]
            starts = range(0, len(self.lengths) * self.longest, self.longest)
            ranges = [torch.arange(start, start + n) for start, n in zip(starts, self.lengths, strict=True)]
            self.mask = exists.to(device)
            self._places = torch.cat(ranges).to(device)

    def pad(self, packed: Tensor) -> Tensor:
        """[sum of lengths, ...] -> [N, S, ...] with zeros behind shorter rows; a view where all are equally long."""
        count = len(self.lengths)
        if self.mask is not None:
            empty = packed.new_zeros(count * self.longest, *packed.shape[1:])
            packed = empty.index_copy(0, self._places, packed)
        return packed.unflatten(0, (count, self.longest))


def pack(rows: Sequence[Tensor]) -> Tensor:
    """Tensors [S, ...], each of its own length, one after the other in their own precision: [sum of S, ...]."""
    with torch.autocast(rows[0].device.type, enabled=False):  # in bf16 it fails on rows of fp16
        return torch.cat(list(rows))
