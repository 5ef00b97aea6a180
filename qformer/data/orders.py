"""Orders of sources: position p of the endless stream of samples -> an index of the source.

An order is a function of the seed and p alone, so a resumed run continues exactly where it stopped, with any number of
workers. Every epoch contains each index once. A source may have its own order (`order(seed)`): shards are shuffled as
wholes, then the samples of a few shards together; in a mixture, each part keeps its own epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, cycle, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qformer.data.base import BLOCKS, SHARDS, WITHIN, Order, Seed, Shuffled
from qformer.data.base import indices as indices  # its former place
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


BLOCK = 10_000  # samples of a mixture in which the shares are exact
TRIES = 16  # replacements from one part of a mixture before the next part is tried


def extent_of(order: Order) -> Any:
    """Get the number of samples or shards, by parts, that an order depends on besides its seed; None if unknown.

    Data with another extent are read in another order from the first position on.
    """
    if isinstance(order, Mixed):
        return [extent_of(part) for part in order.orders]
    if isinstance(order, Windows):
        return len(order.shards)
    return order.size if isinstance(order, Shuffled) else None


class Counted(Protocol):
    """Shards whose samples are counted on first use; `prepare` announces which shards come next."""

    def __len__(self) -> int: ...
    def count(self, shard: int) -> int: ...
    def prepare(self, shards: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class Window:
    """Shards that are shuffled together: positions from `start` to `stop`, as rows (shard, place in it)."""

    epoch: int
    number: int
    start: int
    places: np.ndarray

    @property
    def stop(self) -> int:
        return self.start + len(self.places)

    def at(self, position: int) -> tuple[int, int]:
        shard, place = self.places[position - self.start]
        return int(shard), int(place)


@dataclass
class Windows:
    """Order with shards shuffled anew each epoch, and the samples of `width` shards shuffled together.

    Positions depend only on the sample counts of earlier shards, so later shards need not be known. A run that starts
    in the middle of data that have not been counted yet has to count the earlier shards once.
    """

    shards: Counted
    width: int
    seed: Seed
    _here: Window | None = None
    _epoch: tuple[int, list[int]] | None = None

    def at(self, position: int) -> tuple[int, int]:
        if self._here is None or not self._here.start <= position < self._here.stop:
            self._here = self._find(position)
            self.shards.prepare(self._members(self._here.epoch, self._here.number + 1))
        return self._here.at(position)

    def others(self, position: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Yield the samples of the same window from a random place on, then those of the following windows."""
        self.at(position)
        window = self._here
        assert window is not None
        first = int(rng.integers(len(window.places)))
        for i in range(len(window.places)):
            yield window.at(window.start + (first + i) % len(window.places))
        for further in count(window.stop):
            window = window if further < window.stop else self._find(further, window)
            yield window.at(further)

    def _find(self, position: int, before: Window | None = None) -> Window:
        """Find the window of a position, starting from an earlier window if one is known."""
        before = before or self._here
        epoch = number = start = 0
        if before is not None and position >= before.stop:
            epoch, number, start = before.epoch, before.number + 1, before.stop
        while True:
            members = self._members(epoch, number)
            if not members and epoch == 0:  # the length of an epoch is known from here on
                if not start:
                    raise UsageError(f"none of the {len(self.shards)} shards has a sample; check data.train")
                epoch = position // start
                number, start = 0, epoch * start
            elif not members:
                epoch, number = epoch + 1, 0
            else:
                size = sum(self.shards.count(shard) for shard in members)
                if position < start + size:
                    return self._window(epoch, number, start, members)
                number, start = number + 1, start + size

    def _window(self, epoch: int, number: int, start: int, members: list[int]) -> Window:
        rows = [(shard, place) for shard in members for place in range(self.shards.count(shard))]
        shuffled = np.random.default_rng([*self.seed, WITHIN, epoch, number]).permutation(len(rows))
        return Window(epoch, number, start, np.array(rows, dtype=np.int64)[shuffled])  # (n, 2)

    def _members(self, epoch: int, number: int) -> list[int]:
        if self._epoch is None or self._epoch[0] != epoch:
            shuffled = np.random.default_rng([*self.seed, SHARDS, epoch]).permutation(len(self.shards))
            self._epoch = epoch, shuffled.tolist()
        return self._epoch[1][number * self.width : (number + 1) * self.width]


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Divide `BLOCK` samples among the parts by largest remainder, with at least one for each."""
    shares = np.asarray(weights, dtype=float) / sum(weights) * BLOCK
    whole = np.maximum(np.floor(shares), 1).astype(int)
    by_remainder = np.argsort(-(shares - whole), kind="stable")
    whole[by_remainder[: max(BLOCK - whole.sum(), 0)]] += 1
    whole[whole.argmax()] -= max(whole.sum() - BLOCK, 0)
    return whole


@dataclass
class Mixed:
    """Order of a mixture, whose parts are drawn by weight; an index is (part, index in it)."""

    orders: list[Order]
    weights: Sequence[float]
    seed: Seed
    _block: tuple[int, np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        self._quotas = quotas(self.weights)

    def at(self, position: int) -> tuple[int, Any]:
        part, own = self._split(position)
        return part, self.orders[part].at(own[part])

    def others(self, position: int, rng: np.random.Generator) -> Iterator[tuple[int, Any]]:
        """Yield indices of the same part, then of the next one if those are bad too."""
        first, own = self._split(position)
        for part in cycle([*range(first, len(self.orders)), *range(first)]):
            yield from ((part, index) for index in islice(self.orders[part].others(own[part], rng), TRIES))

    def _split(self, position: int) -> tuple[int, np.ndarray]:
        """Find the part of a position, and the number of earlier samples of each part."""
        block, place = divmod(position, BLOCK)
        if self._block is None or self._block[0] != block:
            parts = np.repeat(np.arange(len(self.orders)), self._quotas)
            parts = np.random.default_rng([*self.seed, BLOCKS, block]).permutation(parts)
            given = np.cumsum(parts[:, None] == np.arange(len(self.orders)), axis=0)  # (BLOCK, parts)
            self._block = block, parts, given
        _, parts, given = self._block
        part = int(parts[place])
        before = block * self._quotas + given[place]
        before[part] -= 1
        return part, before
