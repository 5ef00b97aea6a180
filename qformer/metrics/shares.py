"""Scores that are shares: of questions, of pairs or groups that must be right together, or means of several parts.

A benchmark says what counts once (`Unit`), and a `Score` is the mean of the units with its interval.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qformer.metrics.intervals import weighted_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

Key = TypeVar("Key", bound="Hashable")


@dataclass(frozen=True)
class Unit:
    """One thing that is counted.

    Attributes:
        rows: numbers of the answers that it is made of.
        value: what it earned, in [0, 1].
        cluster: the image, or whatever else makes units stand or fall together; intervals draw whole clusters.
        part: task or source, where the score is a mean over these.
    """

    rows: tuple[int, ...]
    value: float
    cluster: Hashable
    part: Hashable = None


@dataclass(frozen=True)
class Score:
    """A mean of units, or a weighted sum of the means of their parts.

    Attributes:
        weights: weight of each part; empty for parts of equal weight, those that there are.
    """

    units: Sequence[Unit]
    weights: Mapping[Any, float] = field(default_factory=dict)

    def within(self, rows: Collection[int]) -> Score:
        """The same score of some answers: of the units all of whose answers are among them."""
        return Score([unit for unit in self.units if all(row in rows for row in unit.rows)], self.weights)

    @property
    def lacking(self) -> list[Hashable]:
        """Parts that have a weight and no unit."""
        return [part for part in self.weights if part not in self._parts()]

    @property
    def mean(self) -> float | None:
        """Mean in [0, 1]; None without units, or where a part with a weight has none."""
        if not self.units or self.lacking:
            return None
        return sum(weight * sum(unit.value for unit in own) / len(own) for weight, own in self._weighed())

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `mean`."""
        if not self.units or self.lacking:
            return None
        return weighted_interval(
            [(weight, [unit.value for unit in own], [unit.cluster for unit in own]) for weight, own in self._weighed()]
        )

    def _parts(self) -> dict[Hashable, list[Unit]]:
        parts: dict[Hashable, list[Unit]] = defaultdict(list)
        for unit in self.units:
            parts[unit.part].append(unit)
        return parts

    def _weighed(self) -> list[tuple[float, list[Unit]]]:
        parts = self._parts()
        weights = self.weights or dict.fromkeys(parts, 1 / len(parts))
        return [(weight, parts[part]) for part, weight in weights.items()]


def all_right(
    right: Sequence[float],
    keys: Sequence[Key | None],
    cluster: Callable[[Key], Hashable],
    size: int | Mapping[Key, int] | None = None,
) -> list[Unit]:
    """Units that earn 1 if all answers of the same key are right, else 0.

    Args:
        right: of each answer 1 or 0. keys: of each answer what it belongs to; None leaves it out.
        cluster: of a key.
        size: number of answers of a whole unit, or of each; others, some of whose answers are not there, are left out.
    """
    rows: dict[Key, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            rows.setdefault(key, []).append(row)
    if size is not None:
        rows = {key: own for key, own in rows.items() if len(own) == (size if isinstance(size, int) else size[key])}
    return [Unit(tuple(own), float(all(right[row] for row in own)), cluster(key)) for key, own in rows.items()]
