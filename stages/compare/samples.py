"""Samples of a comparison: as many of the training data as are seen, those that are asked about, and gray ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.config import Choice
from qformer.data import sources
from qformer.data.base import order_of
from qformer.data.features import mark
from qformer.identity import look
from qformer.types import BadSample, Sample
from qformer.videos.gray import painted_gray
from qformer.videos.rows import parts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.data.base import Order, Source

SOME = 64  # samples of a drawn source that are hashed; its options fix all of them
DIGITS = 12  # of the hashes that stand in tables and names of folders


@dataclass(frozen=True)
class Some:
    """Part of a source: the samples that its order of seed 0 shows first, those of a mixture by their weights.

    Every seed of a comparison trains on them, in an order of its own, so that one store of tokens is enough.

    Attributes:
        source: name and options of the whole source.
        count: samples of the part.
    """

    source: dict[str, Any]
    count: int
    _whole: Source = field(init=False, repr=False, compare=False)
    _order: Order = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        options = dict(self.source)
        whole = sources.build(options.pop("name"), **options)
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_order", order_of(whole, (0,)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self._whole[self._order.at(index)]


def part_of(choice: Choice, count: int) -> Choice:
    """A source with at most `count` samples: itself, or `Some` of it; so is a class of the user, to be countable."""
    size = len(sources.for_run(choice))
    if size <= count and ":" not in choice.name:
        return choice
    options = {"source": choice.model_dump(mode="json"), "count": min(size, count)}
    return Choice.model_validate({"name": "qformer.stages.compare.samples:Some", **options})


@dataclass
class Asked:
    """Samples of a source at some of its indices."""

    source: Source
    places: Sequence[Any]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.places[index]]


@dataclass
class Grayed:
    """The samples of a source with everything that they show painted gray, at its own sizes."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        shown = [painted_gray(part) for part in parts_of(sample.image)]
        return replace(sample, image=shown if isinstance(sample.image, list) else shown[0])


def digest(value: Any) -> str:
    """Hash plain data to `DIGITS` hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def describe(sample: Sample) -> list[Any]:
    """Collect what a sample says and shows, without its folder: texts, a mark of the picture, sizes of its files."""
    parts = parts_of(sample.image)
    sizes = [found[0] for one in parts if isinstance(one, Path) and (found := look(one)) is not None]
    return [mark(sample), sizes, sample.captions, sample.question, sample.answers, sample.prompt]


def digest_data(choice: Choice, source: Source) -> str:
    """Hash training data: options and the first samples of a drawn source, all samples of any other."""
    drawn = _is_drawn(choice.model_dump(mode="json"))
    count = len(source) if not drawn else min(len(source), SOME)
    options = choice.model_dump(mode="json")
    found: list[Any] = [options] if drawn else [weights] if (weights := _weights(options)) else []
    for index in range(count):
        try:
            found.append(describe(source[index]))
        except BadSample as bad:
            found.append([bad.kind])
    return digest([len(source), found])


def _weights(options: dict[str, Any]) -> list[Any]:
    """Weights of the parts of a mixture, and of theirs; empty for any other source."""
    parts = options.get("sources", []) if options.get("name") == "mix" else []
    return [[part.get("weight"), _weights(part)] for part in parts]


def _is_drawn(options: dict[str, Any]) -> bool:
    if "source" in options:
        return _is_drawn(options["source"])
    if options.get("name") == "mix":
        return all(map(_is_drawn, options.get("sources", [])))
    return options.get("name") in sources.DRAWN
