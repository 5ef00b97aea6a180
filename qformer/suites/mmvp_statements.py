"""`qformer eval --bench mmvp-vlm`: which photo of a pair a statement fits, for any model that compares both.

Each statement is compared with the two photos of its pair, by cosines (`itc`) and, where the model has a head for it,
by matching (`itm`). A pair counts if both of its statements find their photo, as in `evaluate_vlm.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

import torch

from qformer.evaluation.benchmarks import ALL, Benchmark, Item, Measured, Record
from qformer.evaluation.mmvp import correlation, pairs_right, statements_right
from qformer.identity import stamp
from qformer.metrics.proportions import correlation_interval, share_interval
from qformer.mmvp.folder import name_kinds
from qformer.suites.mmvp_questions import PARSER, PEOPLE
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from qformer.mmvp.folder import Statement
    from qformer.retrieval.embedders import Embedder
    from qformer.types import Sample, Tiles

NO_PHOTOS = "it compares photos with statements; `qformer.stages.evaluate.photo_pairs` runs it"


@dataclass(frozen=True)
class PhotoPair:
    """Two statements, each of its own photo, and their pattern, named as in the whole table."""

    first: Statement
    second: Statement
    pattern: str

    @property
    def id(self) -> str:
        return f"{self.first.number}-{self.second.number}"

    @property
    def digest(self) -> str:
        """Digest of the texts and of the state of both files."""
        both = (self.first, self.second)
        told = json.dumps([[one.prompt, one.image.name, str(stamp(one.image))] for one in both])
        return hashlib.sha256(told.encode()).hexdigest()[:12]


class MmvpVlm(Benchmark):
    """Statements about pairs of photos."""

    stage = "stage1"
    writes = False

    def item(self, sample: Sample, place: int) -> Item:
        """Raises UsageError: these are no questions."""
        raise UsageError(NO_PHOTOS)

    def predict(self, model: Any, tiles: Tiles, items: Sequence[Sequence[Item]], ask: Any) -> list[Record]:
        """Raises UsageError: a pair has two photos."""
        raise UsageError(NO_PHOTOS)

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Raises UsageError: see `measure_pairs`."""
        raise UsageError(NO_PHOTOS)


def pair_up(statements: Sequence[Statement]) -> list[PhotoPair]:
    """The pairs of MMVP-VLM's rows, the statement of the odd photo first; give all rows, by which kinds are named."""
    names = name_kinds(statements)
    rows = [sorted(both, key=lambda one: one.number) for both in zip(statements[::2], statements[1::2], strict=True)]
    return [PhotoPair(first, second, names[first.kind]) for first, second in rows]


@torch.no_grad()
def compare_pair(embedder: Embedder, images: Sequence[Tensor], texts: list[str]) -> dict[str, list[list[float]]]:
    """Logits of two texts with two photos by each way of comparing, [text][photo].

    Args:
        images: two of uint8[3, h, w].
    """
    by_image = torch.tensor(embedder(images, [texts, texts]))  # (photos, texts)
    found = {"itc": (embedder.scale * by_image).T.tolist()}
    matches = embedder.match(images, texts)
    return found if matches is None else found | {"itm": matches.T.tolist()}


def measure_pairs(pairs: Sequence[PhotoPair], records: Sequence[Record]) -> Measured:
    """Shares of pairs of which both statements find their photo: the mean of the patterns, as published, and each."""
    names = dict.fromkeys(pair.pattern for pair in pairs)
    measured = Measured({}, [])
    patterns: dict[str, dict[str, float]] = {}
    for way in [way for way in ("itc", "itm") if all(way in record for record in records)]:
        logits = torch.tensor([row for record in records for row in record[way]])  # (2n, 2)
        right = pairs_right(statements_right(logits))
        measured.intervals.setdefault(ALL, {})[way] = share_interval(sum(right), len(right))
        for name in names:
            own = [one for one, pair in zip(right, pairs, strict=True) if pair.pattern == name]
            patterns.setdefault(name, {"count": len(own)})[way] = sum(own) / len(own)
            measured.intervals.setdefault(f"pattern: {name}", {})[way] = share_interval(sum(own), len(own))
        measured.total[way] = sum(values[way] for values in patterns.values()) / len(patterns)
    measured.groups["pattern"] = patterns
    return measured


def read_pattern_scores(result: Path) -> dict[str, dict[str, float]]:
    """Accuracy by pattern that `--bench mmvp -o` wrote, by column: of a model, and of people where they answered.

    Raises:
        UsageError: it is no such file.
    """
    try:
        told = json.loads(result.read_text(encoding="utf-8"))["groups"]["pattern"]
        found = {PARSER: {str(name): float(values[PARSER]) for name, values in told.items()}}
        people = {str(name): float(values[PEOPLE]) for name, values in told.items() if PEOPLE in values}
        return found | ({PEOPLE: people} if people else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"'{result}' has no accuracy by pattern ({error!r}); give what `qformer eval --bench mmvp -o` wrote"
        ) from error


def correlate(measured: Measured, others: Mapping[str, float], source: Path) -> dict[str, Correlation]:
    """Correlations over patterns of each way of comparing with somebody's accuracy, and Fisher's 95 % intervals.

    An interval is that of so many patterns; it does not know how many pairs each of them has.

    Args:
        others: accuracy by pattern. source: where it comes from, for messages.

    Raises:
        UsageError: fewer than two patterns are shared.
    """
    shared = [name for name in measured.groups["pattern"] if name in others]
    if len(shared) < 2:
        raise UsageError(f"'{source}' has {len(shared)} of these patterns; give a result of the same ones")
    found = {}
    for way in measured.total:
        own = [measured.groups["pattern"][name][way] for name in shared]
        value = correlation(own, [others[name] for name in shared])
        found[way] = Correlation(value, correlation_interval(value, len(shared)), len(shared))
    return found


@dataclass(frozen=True)
class Correlation:
    """A coefficient over so many patterns, with its interval; NaN where one side is constant, or patterns are few."""

    value: float
    interval: tuple[float, float]
    patterns: int

    def __str__(self) -> str:
        low, high = self.interval
        ends = "" if isnan(low) else f" ({low:.2f} to {high:.2f})"
        return "none, one side is constant" if isnan(self.value) else f"{self.value:.2f}{ends}"

    def record(self) -> dict[str, Any]:
        """Plain data, with None in place of what there is not."""
        value, low, high = (None if isnan(one) else one for one in (self.value, *self.interval))
        return {"value": value, "interval": None if low is None else [low, high], "patterns": self.patterns}
