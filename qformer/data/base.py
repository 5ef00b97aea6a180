"""What a data source is, and in which order one is read that has no order of its own.

A source is of known length and gives a `Sample` for an index. An order gives the index of position p of the endless
stream of samples, and is a function of the seed and of p alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qformer.types import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator


class Source(Protocol):
    """Samples by index: `len(source)` of them.

    A source may also have `order(seed)`, `indices()` and `number(index)`; the functions below fall back without them.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


Seed = tuple[int, ...]
EPOCH, SHARDS, WITHIN, BLOCKS, PARTS = (kind << 32 for kind in range(1, 6))  # keep draws of one seed apart


class Order(Protocol):
    """`at` gives the index of a position; `others` those that may stand in for it, without end."""

    def at(self, position: int) -> Any: ...
    def others(self, position: int, rng: np.random.Generator) -> Iterator[Any]: ...


def order_of(source: Source, seed: Seed) -> Order:
    """The order that a source brings along, or else all its indices, shuffled anew each epoch."""
    own = getattr(source, "order", None)
    return Shuffled(len(source), seed) if own is None else own(seed)


def indices(source: Source) -> Iterator[Any]:
    """Every index of a source once, not shuffled; of shards, those read so far are the only ones opened."""
    own = getattr(source, "indices", None)
    yield from range(len(source)) if own is None else own()


def number_of(source: Source, index: Any) -> int:
    """Which of 0 ... len(source) - 1 the sample of an index is; a source gives it for that number, too."""
    own = getattr(source, "number", None)
    return int(index) if own is None else int(own(index))


@dataclass
class Shuffled:
    """All of 0 ... size - 1, permuted in each epoch."""

    size: int
    seed: Seed
    _epochs: dict[int, np.ndarray] = field(default_factory=dict)

    def at(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch not in self._epochs:
            self._epochs.clear()
            shuffled = np.random.default_rng([*self.seed, EPOCH, epoch]).permutation(self.size)
            self._epochs[epoch] = shuffled.astype(np.min_scalar_type(self.size))  # each worker holds one
        return int(self._epochs[epoch][place])

    def others(self, position: int, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield int(rng.integers(self.size))
