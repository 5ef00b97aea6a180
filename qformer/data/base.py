"""Protocols of data sources and orders, and the default order.

A source has a known length and gives a `Sample` for an index. An order gives the index at position p of the endless
stream of samples, as a function of the seed and p alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qformer.types import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator


class Source(Protocol):
    """Sequence of samples.

    A source may also have `order(seed)`, `indices()` and `number(index)`; the functions below have defaults for them.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


Seed = tuple[int, ...]
EPOCH, SHARDS, WITHIN, BLOCKS, PARTS = (kind << 32 for kind in range(1, 6))  # separate the random streams of one seed


class Order(Protocol):
    """Order of a source: `at` gives the index at a position, `others` yields endless replacements for it."""

    def at(self, position: int) -> Any: ...
    def others(self, position: int, rng: np.random.Generator) -> Iterator[Any]: ...


def order_of(source: Source, seed: Seed) -> Order:
    """Get the order of a source: its own, or else a new shuffle of all indices for each epoch."""
    own = getattr(source, "order", None)
    return Shuffled(len(source), seed) if own is None else own(seed)


def indices(source: Source) -> Iterator[Any]:
    """Yield every index of a source once, not shuffled; shards are opened only when they are reached."""
    own = getattr(source, "indices", None)
    yield from range(len(source)) if own is None else own()


def number_of(source: Source, index: Any) -> int:
    """Convert an index of a source to a number in 0 ... len(source) - 1, which is another index of the same sample."""
    own = getattr(source, "number", None)
    return int(index) if own is None else int(own(index))


@dataclass
class Shuffled:
    """Order in which each epoch is a permutation of 0 ... size - 1."""

    size: int
    seed: Seed
    _epochs: dict[int, np.ndarray] = field(default_factory=dict)

    def at(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch not in self._epochs:
            self._epochs.clear()
            shuffled = np.random.default_rng([*self.seed, EPOCH, epoch]).permutation(self.size)
            self._epochs[epoch] = shuffled.astype(np.min_scalar_type(self.size))  # each worker keeps one in memory
        return int(self._epochs[epoch][place])

    def others(self, position: int, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield int(rng.integers(self.size))
