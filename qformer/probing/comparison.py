"""Results of `qformer probe` side by side: shares of right answers, mean answers by place, attacks with padding.

The same pictures are shown to all who are probed with one tile and seed; intervals of differences do not use that, so
they are rather too wide than too narrow.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qformer.metrics.proportions import count_mean, difference_interval, mean_difference, share_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

POSITION, SIZE, PADDING = "counting by position", "counting by size", "padding attack"
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NINE = "9"  # circles
NOTHING = "none"  # answers without a number
RATES = {"named": "names the rectangle", "fooled": "fooled", "only_padding": "fooled by padding's gray only"}
SHARE, MEAN = "share", "mean answer"
Ends = tuple[float, float]
Told = tuple[float, Ends | None, Any]  # a number, its interval, and what its differences are made of


@dataclass
class ComparedRow:
    """One number of each run.

    Attributes:
        probe: one of `POSITION`, `SIZE` and `PADDING`. what: it is the number of. unit: `share` or `mean answer`.
        values: of each run, None where it has none; intervals: theirs, where there is one.
        differences: of each further run to the first: the difference and its interval, where both have the number.
    """

    probe: str
    what: str
    unit: str
    values: list[float | None] = field(default_factory=list)
    intervals: list[Ends | None] = field(default_factory=list)
    differences: list[tuple[float, Ends] | None] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(results: Sequence[Mapping[str, Any]]) -> list[ComparedRow]:
    """Rows of all numbers that at least one of the runs has, each further run beside the first.

    Args:
        results: as `qformer probe` writes them, `probes.json`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError: one has another shape.
    """
    rows = [*_by_position(results), *_by_size(results), *_by_padding(results)]
    return [row for row in rows if any(value is not None for value in row.values)]


def _by_position(results: Sequence[Mapping[str, Any]]) -> list[ComparedRow]:
    found = [result.get("counting_position") for result in results]
    shares = [one and _right(one["answers"], str(int(one["objects"]))) for one in found]
    for one in found:
        _ = one and [float(mean) for row in one.get("mean", []) for mean in row if mean is not None]  # it is drawn
    rows = [_row(POSITION, "right, all places", SHARE, shares, _share_difference)]
    for place, name in enumerate(PLACES):
        means = [one and one.get("cells") and _mean(one["cells"][place]) for one in found]
        rows.append(_row(POSITION, name, MEAN, means, _mean_difference))
    return rows


def _by_size(results: Sequence[Mapping[str, Any]]) -> list[ComparedRow]:
    """Sizes are compared as multiples of the tile, since runs with other tiles are shown other sizes."""
    found: list[dict[float, Any]] = []
    for result in results:
        sizes = result.get("counting_size") or {}
        found.append({round(int(size) / int(result["tile"]), 1): answers for size, answers in sizes.items()})
    rows = []
    for size in sorted({size for sizes in found for size in sizes}):
        shares = [sizes[size] and _right(sizes[size], NINE) if size in sizes else None for sizes in found]
        rows.append(_row(SIZE, f"right, {size:g} tile{'s' * (size != 1)} wide", SHARE, shares, _share_difference))
    return rows


def _by_padding(results: Sequence[Mapping[str, Any]]) -> list[ComparedRow]:
    rows = []
    for rate, name in RATES.items():
        told = [one and one["all"][rate] for result in results for one in [result.get("padding_baseline")]]
        shares = [one and _share(_whole(one["count"]), _whole(one["asked"])) for one in told]
        rows.append(_row(PADDING, name, SHARE, shares, _share_difference))
    return rows


def _row(
    probe: str, what: str, unit: str, told: Sequence[Told | None], difference: Callable[[Any, Any], Any]
) -> ComparedRow:
    row = ComparedRow(probe, what, unit, [one[0] if one else None for one in told], [one and one[1] for one in told])
    first = told[0]
    row.differences = [difference(one[2], first[2]) if one and first else None for one in told[1:]]
    return row


def _right(answers: Mapping[str, int], truth: str) -> Told | None:
    """The share of answers that are right; None where nothing was answered. Raises ValueError: one is no number."""
    counts = {answer if answer == NOTHING else str(int(answer)): _whole(count) for answer, count in answers.items()}
    asked = sum(counts.values())
    return _share(counts.get(truth, 0), asked) if asked else None


def _whole(count: Any) -> int:
    """A count as it is. Raises TypeError: it is another thing, such as a text or a negative number."""
    if type(count) is not int or count < 0:
        raise TypeError(f"{count!r} is no count")
    return count


def _share(count: int, asked: int) -> Told:
    return count / asked, share_interval(count, asked), (count, asked)


def _mean(answers: Mapping[str, int]) -> Told | None:
    """The mean of answers that hold a number, with how often each came."""
    numbers = {float(answer): _whole(count) for answer, count in answers.items() if answer.isdecimal()}
    return (count_mean(numbers), None, numbers) if sum(numbers.values()) else None


def _share_difference(own: tuple[int, int], first: tuple[int, int]) -> tuple[float, Ends]:
    return own[0] / own[1] - first[0] / first[1], difference_interval(own, first)


def _mean_difference(own: Mapping[float, int], first: Mapping[float, int]) -> tuple[float, Ends] | None:
    return mean_difference(own, first) if min(sum(own.values()), sum(first.values())) > 1 else None
