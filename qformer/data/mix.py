"""Mixture of data sources, drawn by weight, each with epochs of its own."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qformer.data.base import Order, Seed, indices, number_of, order_of
from qformer.data.orders import Mixed
from qformer.data.sources import build_at, read_part
from qformer.types import Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Mix:
    """Several sources, drawn by weight, each with its own epochs.

    Attributes:
        sources: their configurations, each with `name`, options, and optionally `weight` (1 by default) and `prompt`.
            The share of a source is proportional to its weight, to within 1 in 10,000.
        cache: folder for the caches of the sources.

    Images are identified by their files or bytes, so one image in two sources has one id. Numeric ids of a custom
    source are qualified by the source, since number 1 of another source is another image.
    """

    sources: list[dict[str, Any]]
    cache: str | None = None
    _parts: list[Any] = field(init=False, repr=False, compare=False)
    _weights: list[float] = field(init=False, repr=False, compare=False)
    _spaces: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts, weights, spaces = [], [], []
        for number, entry in enumerate(self.sources):
            where = f"data.sources.{number}"
            name, options, weight = read_part(entry, where)
            parts.append(build_at(name, options, where, self.cache))
            weights.append(weight)
            own = {key: value for key, value in options.items() if key != "prompt"}
            spaces.append(f"{name} {json.dumps(own, sort_keys=True, default=str)}")
        if not parts:
            raise UsageError("data.sources is empty; give a list of sources, each with a name")
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_spaces", spaces)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __getitem__(self, index: int | tuple[int, Any]) -> Sample:
        """Get the sample at an index (part, index in it), or at a number that counts through the parts."""
        if isinstance(index, int):
            part = bisect_right(self._starts, index) - 1
            index = part, index - self._starts[part]
        part, own = index
        sample: Sample = self._parts[part][own]
        if isinstance(sample.image_id, str):
            return sample
        return dataclasses.replace(sample, image_id=f"{self._spaces[part]} {sample.image_id!r}")

    def number(self, index: tuple[int, Any]) -> int:
        part, own = index
        return self._starts[part] + number_of(self._parts[part], own)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(part) for part in self._parts)][:-1]

    def order(self, seed: Seed) -> Order:
        return Mixed([order_of(part, (*seed, number)) for number, part in enumerate(self._parts)], self._weights, seed)

    def indices(self) -> Iterator[tuple[int, Any]]:
        """Yield an index of each source in turn, so that the first few come from all of them."""
        left = [(number, indices(part)) for number, part in enumerate(self._parts)]
        while left:
            for entry in list(left):
                number, own = entry
                try:
                    yield number, next(own)
                except StopIteration:
                    left.remove(entry)
