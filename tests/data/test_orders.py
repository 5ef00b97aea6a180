"""Orders: every index once per epoch, a function of seed and position alone, weights that are met."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qformer.data.base import Shuffled
from qformer.data.orders import BLOCK, Mixed, Windows, extent_of, quotas
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES = (5, 0, 7, 1, 4, 9, 3)
ALL = [(shard, place) for shard, size in enumerate(SIZES) for place in range(size)]


@dataclass
class Counting:
    """Shards of known sizes that remember which were counted and prepared."""

    sizes: Sequence[int] = SIZES
    counted: set[int] = field(default_factory=set)
    prepared: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sizes)

    def count(self, shard: int) -> int:
        self.counted.add(shard)
        return self.sizes[shard]

    def prepare(self, shards: Sequence[int]) -> None:
        self.prepared.append(list(shards))


@pytest.mark.parametrize("width", [1, 2, 3, 100])
def test_every_sample_of_every_shard_once_per_epoch(width: int) -> None:
    order = Windows(Counting(), width, (3,))
    seen = [order.at(position) for position in range(4 * len(ALL))]
    epochs = [seen[i : i + len(ALL)] for i in range(0, len(seen), len(ALL))]
    assert all(sorted(epoch) == ALL for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    places = list(range(4 * len(ALL)))
    np.random.default_rng(0).shuffle(places)
    jumping = Windows(Counting(), width, (3,))
    assert [jumping.at(position) for position in places] == [seen[position] for position in places]
    assert [Windows(Counting(), width, (3,)).at(position) for position in places[:40]] == [seen[p] for p in places[:40]]
    assert [Windows(Counting(), width, (4,)).at(position) for position in range(len(ALL))] != epochs[0]


def test_shards_are_shuffled_together_by_windows() -> None:
    order = Windows(Counting([10] * 8), 2, (0,))
    shards = [order.at(position)[0] for position in range(80)]
    for start in range(0, 80, 20):
        window = shards[start : start + 20]
        assert len(set(window)) == 2
        assert window != sorted(window)
        assert window != sorted(window, reverse=True)
    assert len(set(shards)) == 8


def test_only_what_is_needed_is_counted() -> None:
    shards = Counting([10] * 8)
    order = Windows(shards, 2, (0,))
    order.at(25)
    assert len(shards.counted) == 4
    assert len(shards.prepared) == 1
    assert len(shards.prepared[0]) == 2
    assert not set(shards.prepared[0]) & shards.counted  # what comes next


def test_what_stands_in_for_a_bad_sample() -> None:
    """The same window from a random place on, then the next ones, over the end of the epoch."""
    order = Windows(Counting([1, 2, 40, 1, 1, 1, 30]), 1, (1,))
    for position in range(76):
        own = order.at(position)
        others = list(islice(order.others(position, np.random.default_rng(0)), 300))
        size = order.shards.count(own[0])
        assert {shard for shard, _ in others[:size]} == {own[0]}
        assert len(set(others[:size])) == size
        assert len({shard for shard, _ in others}) == 7
        assert order.at(position) == own


def test_shards_without_samples() -> None:
    with pytest.raises(UsageError, match="none of the 3 shards has a sample"):
        Windows(Counting([0, 0, 0]), 2, (0,)).at(0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1], [BLOCK]),
        ([1, 1], [BLOCK // 2] * 2),
        ([3, 1], [7500, 2500]),
        ([1, 1, 1], [3334, 3333, 3333]),
        ([1e9, 1], [BLOCK - 1, 1]),
        ([0.2, 1e-9, 0.8], [2000, 1, 7999]),
    ],
)
def test_quotas(weights: list[float], expected: list[int]) -> None:
    assert quotas(weights).tolist() == expected
    assert quotas(weights).sum() == BLOCK


def test_a_mixture_meets_its_weights_and_keeps_epochs() -> None:
    def mixed() -> Mixed:
        return Mixed([Shuffled(7, (5, 0)), Windows(Counting(), 2, (5, 1)), Shuffled(1000, (5, 2))], [2, 1, 5], (5,))

    order = mixed()
    seen = [order.at(position) for position in range(25_000)]
    parts = np.array([part for part, _ in seen])
    assert np.bincount(parts[:BLOCK]).tolist() == [2500, 1250, 6250]
    assert np.abs(np.bincount(parts[:400]) / 400 - np.array([0.25, 0.125, 0.625])).max() < 0.08  # from the start on
    for part, size in enumerate((7, len(ALL), 1000)):
        own: list[Any] = [index for which, index in seen if which == part]
        for start in range(0, len(own) - size, size):
            assert len(set(own[start : start + size])) == size
    for position in (24_999, 0, 10_000, 9_999, 17_123):
        assert mixed().at(position) == seen[position]


def test_a_part_that_is_all_bad_is_replaced_by_the_others() -> None:
    order = Mixed([Shuffled(7, (0, 0)), Shuffled(9, (0, 1)), Shuffled(5, (0, 2))], [1, 1, 1], (0,))
    position = next(position for position in range(100) if order.at(position)[0] == 1)
    others = Counter(part for part, _ in islice(order.others(position, np.random.default_rng(0)), 48))
    assert others == {0: 16, 1: 16, 2: 16}
    assert next(order.others(position, np.random.default_rng(0)))[0] == 1


def test_what_an_order_is_a_function_of() -> None:
    """More samples, or more tars, are read in another order from the first position on."""
    parts = [Shuffled(7, (0,)), Windows(Counting([10] * 8), 2, (0,)), Mixed([Shuffled(3, (0,))], [1], (0,))]
    assert extent_of(Mixed(parts, [1, 1, 1], (0,))) == [7, 8, [3]]
    assert [Shuffled(8, (0,)).at(place) for place in range(7)] != [Shuffled(7, (0,)).at(place) for place in range(7)]
