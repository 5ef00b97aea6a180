"""Models of `qformer eval A B --bench mmvp-vlm` in one table: patterns down, models across."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformer.evaluation.benchmarks import ALL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.evaluation.benchmarks import Measured
    from qformer.suites.mmvp_statements import Correlation

NONE = "-"


@dataclass
class PhotoTower:
    """A model that compared photos with statements.

    Attributes:
        pairs: that were compared. skipped: records of those that could not be read. resumed: known from before.
        parameters: of the whole model. side: of the square that its image encoder reads, in pixels.
        zero_shot: share of photos that are named right, number of photos, number of classes.
        correlations: with others' accuracy by pattern, by their column and the way of comparing.
    """

    name: str
    measured: Measured
    pairs: int
    skipped: list[dict[str, Any]]
    resumed: int
    parameters: int
    side: int | None
    zero_shot: tuple[float, int, int] | None = None
    correlations: dict[str, dict[str, Correlation]] = field(default_factory=dict)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Plain data."""
        told: dict[str, Any] = {"checkpoint": self.name, "parameters": self.parameters, "side": self.side}
        told |= {"pairs": self.pairs, "skipped": self.skipped, "resumed": self.resumed, "seconds": self.seconds}
        told |= {"scores": self.measured.total, "groups": self.measured.groups, "intervals": self.measured.intervals}
        if self.zero_shot is not None:
            told["zero_shot"] = dict(zip(("accuracy", "images", "classes"), self.zero_shot, strict=True))
        for column, found in self.correlations.items():
            records = {way: one.record() for way, one in found.items()}
            name = "correlation" if column == "parser" else f"correlation_{column}"
            told[name] = {way: one["value"] for way, one in records.items()}
            told[f"{name}_intervals"] = {way: one["interval"] for way, one in records.items()}
        return told


def side_of(model: Any) -> int | None:
    """Side of the square that a model's image encoder reads, in pixels; None where it does not say.

    Our models have it in their encoder, those of transformers in `config.vision_config`, open_clip's in `visual`.
    """
    for path in ("frontend.encoder", "config.vision_config", "visual"):
        found = model
        for name in path.split("."):
            found = getattr(found, name, None)
        side = getattr(found, "image_size", None)
        side = side[0] if isinstance(side, tuple | list) else side
        if isinstance(side, int):
            return side
    return None


def short_name(name: str) -> str:
    """A name for files: the last part of a model's, and a digest that tells equal ones apart."""
    last = re.sub(r"[^A-Za-z0-9_-]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-")
    return f"{last}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def towers_table(
    towers: Sequence[PhotoTower], others: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what a model is, its accuracy by pattern and in the mean, zero-shot accuracy, correlations.

    A model that compares in two ways has two columns. Shares are in %, with the ends of their intervals.

    Args:
        others: accuracy by pattern of somebody who was asked in words, by column of theirs.
    """
    columns = [(tower, way) for tower in towers for way in tower.measured.total]
    names = {"parser": "MLLM"}
    head = ["", *(f"{tower.name} ({way})" for tower, way in columns), *(names.get(one, one) for one in others)]
    blank = [""] * len(others)
    rows = [
        ["parameters, millions", *(f"{tower.parameters / 1e6:.1f}" for tower, _ in columns), *blank],
        ["side, pixels", *(f"{tower.side}" if tower.side else NONE for tower, _ in columns), *blank],
    ]
    for pattern in dict.fromkeys(name for tower in towers for name in tower.measured.groups["pattern"]):
        told = [_pattern(tower, way, pattern) for tower, way in columns]
        asked = [f"{100 * one[pattern]:.1f}" if pattern in one else NONE for one in others.values()]
        rows.append([pattern, *told, *asked])
    means = [_share(tower, ALL, way, tower.measured.total[way]) for tower, way in columns]
    rows.append(["mean of patterns", *means, *(f"{100 * _mean(one):.1f}" for one in others.values())])
    if any(tower.zero_shot for tower in towers):
        shares = [NONE if tower.zero_shot is None else f"{100 * tower.zero_shot[0]:.1f}" for tower, _ in columns]
        rows.append(["zero-shot accuracy", *shares, *blank])
    for one in others:
        values = [str(tower.correlations[one][way]) for tower, way in columns]
        rows.append([f"correlation with {names.get(one, one)}", *values, *blank])
    return head, rows


def _pattern(tower: PhotoTower, way: str, pattern: str) -> str:
    scores = tower.measured.groups["pattern"].get(pattern, {})
    return _share(tower, f"pattern: {pattern}", way, scores[way]) if way in scores else NONE


def _share(tower: PhotoTower, label: str, way: str, share: float) -> str:
    low, high = tower.measured.intervals[label][way]
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _mean(accuracy: Mapping[str, float]) -> float:
    return sum(accuracy.values()) / len(accuracy)
