"""Captioned photos of a quickstart: any source of data, divided into training and held-out photos, and gray ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer import lookup
from qformer.config import Choice
from qformer.data import sources
from qformer.data.arguments import choose_data
from qformer.data.base import indices
from qformer.data.features import mark
from qformer.data.sources import build_at, read_part
from qformer.types import BadSample, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Photos for those who give none: the 5,000 of COCO's validation with five captions each, from a hub; about 0.8 GB.
#: They are named by their files, since the name of the data set alone would bring all of it.
COCO = "lmms-lab/COCO-Caption2017"
PUBLIC = {
    "name": "datasets",
    "path": f"hf://datasets/{COCO}/data/val-{{00000..00001}}-of-00002.parquet",
    "caption": "answer",
}
TRAIN, HELD = "train", ("dev", "val", "valid", "validation", "test")
SHARE = 5  # one photo of so many is held out if the source does not divide them itself
GRAY = 128
PART, BLIND = f"{__name__}:Part", f"{__name__}:Gray"


@dataclass(frozen=True)
class Part:
    """One of two parts of another source: training, or what is held out.

    Attributes:
        source: its configuration, with `name`.
        held: the photos that are held out; else the others.
        split: keep the records whose field `split` is one of these. By default a fifth is held out, by a hash of the
            photo's file name or bytes, so that all records of a photo are in the same part, wherever the files are.
        cache: folder for the caches of the source.
    """

    source: dict[str, Any]
    held: bool = False
    split: list[str] | None = None
    cache: str | None = None
    _whole: Any = field(init=False, repr=False, compare=False)
    _kept: list[Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name, options, _ = read_part(self.source, "data.source")
        whole = build_at(name, options, "data.source", self.cache)
        kept = []
        for index in indices(whole):
            try:
                sample = whole[index]
            except BadSample:
                continue  # whoever reads all of the source counts it
            chosen = self._holds_out(sample) == self.held if self.split is None else split_of(sample) in self.split
            if chosen:
                kept.append(index)
        if not kept:
            raise UsageError(
                f"no photo of {self.source} is {'held out' if self.held else 'left to train on'}; give more"
            )
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_kept", kept)

    @staticmethod
    def _holds_out(sample: Sample) -> bool:
        return mark(sample) % SHARE == 0

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self._whole[self._kept[index]]
        return sample


@dataclass(frozen=True)
class Gray:
    """Records of another source whose pictures are all the same small gray one: nothing is to be seen in them.

    Attributes:
        source: its configuration, with `name`.
        size: pixels of a side.
        cache: folder for the caches of the source.
    """

    source: dict[str, Any]
    size: int
    cache: str | None = None
    _whole: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name, options, _ = read_part(self.source, "data.source")
        object.__setattr__(self, "_whole", build_at(name, options, "data.source", self.cache))

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> Sample:
        return dataclasses.replace(self._whole[index], image=gray(self.size))


def gray(size: int) -> np.ndarray:
    """Return a gray picture, uint8[size, size, 3]."""
    return np.full((size, size, 3), GRAY, np.uint8)


def split_of(sample: Sample) -> str | None:
    """Return the field `split` of a record, if it is a text."""
    found = sample.facts.get("split")
    return found if isinstance(found, str) else None


def divide(words: Sequence[str]) -> tuple[Choice, Choice]:
    """Choose the sources of training and of held-out photos.

    A source with the option `split` is divided by that, records with a field `split` by this field, and others by
    `Part`.

    Args:
        words: a source as on the command line (`qformer.data.arguments.choose_data`); without any, `PUBLIC`.

    Raises:
        UsageError: the source cannot be opened, or no photos are left for one of the parts.
    """
    if not words:
        return _public()
    choice = choose_data(words)
    target = lookup.find(sources.SOURCES, choice.name, "data", own=True)
    has_option = dataclasses.is_dataclass(target) and "split" in {one.name for one in dataclasses.fields(target)}
    if has_option and "split" not in choice.options:
        return _by_option(choice)
    if choice.name == "jsonl" and "where" in choice.options:
        return _shares(choice)
    known = {split for split in map(split_of, _readable(choice)) if split is not None}
    held = next((name for name in HELD if name in known), None)
    if TRAIN not in known or held is None:
        return _shares(choice)
    if choice.name == "jsonl":
        return _with(choice, where={"split": TRAIN}), _with(choice, where={"split": held})
    return _part(choice, split=[TRAIN]), _part(choice, held=True, split=[held])


def blind(choice: Choice, size: int) -> Choice:
    """Return the same records with gray pictures of `size` pixels."""
    return Choice.model_validate({"name": BLIND, "source": choice.model_dump(), "size": size})


def _public() -> tuple[Choice, Choice]:
    choice = Choice.model_validate(PUBLIC)
    try:
        sources.for_run(choice)
    except UsageError as error:
        raise UsageError(
            f"no photos were given, and the public ones of '{COCO}' could not be fetched ({error}); give "
            "captioned photos with --data, such as --data path=captions.jsonl"
        ) from error
    return _shares(choice)


def _by_option(choice: Choice) -> tuple[Choice, Choice]:
    train = _with(choice, split=TRAIN)
    sources.for_run(train)
    for name in HELD:
        try:
            sources.for_run(_with(choice, split=name))
        except (UsageError, FileNotFoundError):
            continue
        return train, _with(choice, split=name)
    return _shares(train)


def _shares(choice: Choice) -> tuple[Choice, Choice]:
    return _part(choice), _part(choice, held=True)


def _part(choice: Choice, **options: Any) -> Choice:
    return Choice.model_validate({"name": PART, "source": choice.model_dump(), **options})


def _with(choice: Choice, **options: Any) -> Choice:
    return choice.model_copy(update=options)


def _readable(choice: Choice) -> Iterator[Sample]:
    source = sources.for_run(choice)
    for index in indices(source):
        try:
            yield source[index]
        except BadSample:
            continue
