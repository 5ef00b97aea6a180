"""The store of a frozen image encoder's tokens: filled once, then read by training in place of the images.

A folder with `store.json`, which says of what the tokens are, and shards of equally many samples as safetensors that
are memory-mapped: of a shard only the rows of the images that are asked for are read. A sample is stored as several
crops, which follow from its number and theirs alone; which one a visit draws follows from (seed, position), as all of
a batch does. Texts are not stored: they come from the source, as ever, and each sample is held against what was stored.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from qformer import soundness
from qformer.data.shard_file import ROWS, Unsound, read_shard, write_shard
from qformer.data.transforms import augment
from qformer.images import read_image
from qformer.packing import pack
from qformer.records import Form, read_object
from qformer.resolution.base import cut_all
from qformer.schema import Count, Positive
from qformer.types import BadSample, Sample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.config import DataConfig
    from qformer.data.sources import Source
    from qformer.resolution.base import ResolutionStrategy

MANIFEST = "store.json"
OPEN = 256  # shards kept open


@dataclass
class Views:
    """A sample as it is stored: the tiles of all its crops, or why there are none.

    Attributes:
        number: of the sample in its source. mark: see `mark`; 0 where the source does not give it.
        fault: kind and detail of a `BadSample`.
    """

    number: int
    mark: int
    tiles: Tiles | None = None
    fault: tuple[str, str] | None = None


@dataclass
class Crops(Dataset[Views]):
    """Item n holds the crops of sample n that a store keeps."""

    source: Source
    strategy: ResolutionStrategy
    data: DataConfig

    def __getitem__(self, number: int) -> Views:
        assert self.data.features is not None
        views = Views(number, 0)
        try:
            sample = self.source[number]
            views.mark = mark(sample)
            image = read_image(sample.image)
        except BadSample as bad:
            views.fault = bad.kind, bad.detail
            return views
        draws = [np.random.default_rng([number, crop]) for crop in range(self.data.features.crops)]
        views.tiles = cut_all([augment(image, self.data.crop, self.data.flip, rng) for rng in draws], self.strategy)
        return views


def mark(sample: Sample) -> int:
    """Tells one image from another at no cost: of its bytes or pixels, or of the end of its path; above 0."""
    image = sample.image
    known = "/".join(image.parts[-2:]).encode() if isinstance(image, Path) else bytes(image)
    return int.from_bytes(hashlib.blake2b(known, digest_size=8).digest()) >> 1 or 1


@dataclass
class Shard:
    """An open shard; its samples, their crops, and the tiles of these stand behind one another.

    Attributes:
        rows: the file. first_tile, first_row: of crop c, and of tile t.
        sizes: width and height of each crop, from which its plan follows. marks: of each sample.
        faults: samples that are not stored, by their place.
    """

    rows: Any
    first_tile: list[int]
    first_row: list[int]
    sizes: list[list[int]]
    marks: list[int]
    faults: dict[str, tuple[str, str]]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Shard:
        """Raises Unsound: it is damaged; that a bit has changed is found with `verify` only, which reads it whole."""
        file, lists, faults = read_shard(path, verify)
        first_tile, first_row = ([0, *accumulate(lists[name])] for name in ("tiles", "lengths"))
        return cls(file, first_tile, first_row, lists["sizes"], lists["marks"], faults)

    def read(self, crop: int) -> list[Tensor]:
        """The packed tokens of each tile of a crop."""
        starts = self.first_row[self.first_tile[crop] : self.first_tile[crop + 1] + 1]
        rows = self.rows.get_slice(ROWS)[starts[0] : starts[-1]].clone()  # else a worker would send the whole file
        return list(rows.split([stop - start for start, stop in pairwise(starts)]))


@dataclass
class Filling:
    """A shard in the making."""

    dtype: Any
    rows: list[Tensor] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, views: Views, crops: int, tokens: Iterator[Tensor]) -> None:
        """The next sample; `tokens` of its tiles, float[S, D] each.

        Raises:
            UsageError: they do not fit the dtype of the store.
        """
        if views.fault is not None:
            self.faults[str(len(self.marks))] = views.fault
        plans = [None] * crops if views.tiles is None else views.tiles.plans
        for plan in plans:
            self.tiles.append(0 if plan is None else len(plan.tiles))
            self.sizes.append((0, 0) if plan is None else plan.image)
            try:
                self.rows += [pack(next(tokens), self.dtype) for _ in range(self.tiles[-1])]
            except OverflowError as error:
                raise UsageError(
                    f"{error} (sample {views.number}); set data.features.dtype to int8 if it is fp16, or use an image "
                    "encoder whose tokens are finite"
                ) from error
        self.marks.append(views.mark)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)

    def write(self, path: Path) -> None:
        """Write the shard so that it is there whole or not at all.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        tensors = {
            ROWS: torch.cat(self.rows) if self.rows else torch.empty(0, 0, dtype=torch.int8),
            "lengths": torch.tensor([len(rows) for rows in self.rows], dtype=torch.int32),
            "tiles": torch.tensor(self.tiles, dtype=torch.int32),
            "sizes": torch.tensor(self.sizes, dtype=torch.int32),
            "marks": torch.tensor(self.marks, dtype=torch.int64),
        }
        write_shard(path, tensors, self.faults)


class Sizes(Form):
    """Of the image encoder."""

    width: Positive
    patch_size: Positive
    image_size: Positive
    extra: Count


class Amounts(Form):
    """Of what is stored."""

    samples: Positive
    crops: Positive


class Made(Form):
    """Of what a store is made, by sections of the configuration."""

    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)
    data: Amounts


class Manifest(Form):
    """What `store.json` says, see `FeatureStore`; one from before there were checksums has none."""

    made: Made
    encoder: Sizes
    per_shard: Positive
    bytes_per_sample: Positive


@dataclass
class FeatureStore:
    """A folder of shards.

    Attributes:
        about: what `store.json` says: `made` of what, by sections; `encoder`, the sizes of the image encoder;
            `per_shard`, samples of a shard; `bytes_per_sample`, an estimate.
    """

    folder: Path
    about: dict[str, Any]
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict)
    _there: set[int] = field(default_factory=set)
    _sound: Any = None

    def __post_init__(self) -> None:
        """Of each shard whether its checksum was compared, or need not be; data workers tell one another."""
        self._sound = torch.full((len(self),), not soundness.checks()).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    @classmethod
    def read_manifest(cls, folder: Path) -> FeatureStore:
        """Raises UsageError: `store.json` is damaged."""
        try:
            about = read_object(folder / MANIFEST, Manifest)
        except UsageError as error:
            raise _damaged(error) from error
        if soundness.checks() and not soundness.seal_holds(about):
            raise _damaged(f"'{folder / MANIFEST}' is not as it was written: its checksum is another")
        return cls(folder, about)

    def check(self, made: dict[str, dict[str, Any]]) -> None:
        """Raises UsageError: the store was made of something else; names what."""
        differs = [
            f"{section}.{key} was {self.about['made'].get(section, {}).get(key)}, is {values.get(key)}"
            for section, values in made.items()
            for key in sorted(values.keys() | self.about["made"].get(section, {}).keys())
            if self.about["made"].get(section, {}).get(key) != values.get(key)
        ]
        if differs:
            raise UsageError(
                f"the features in '{self.folder}' were stored under another configuration ({'; '.join(differs)}); "
                "give data.features another folder, or set these as they were"
            )

    @cached_property
    def samples(self) -> int:
        return int(self.about["made"]["data"]["samples"])

    @cached_property
    def crops(self) -> int:
        return int(self.about["made"]["data"]["crops"])

    def numbers(self, shard: int) -> range:
        """The samples of a shard."""
        size = self.about["per_shard"]
        return range(shard * size, min((shard + 1) * size, self.samples))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.safetensors"

    def __len__(self) -> int:
        return -(-self.samples // self.about["per_shard"])

    def missing(self) -> list[int]:
        """The shards that are still to be filled."""
        return [shard for shard in range(len(self)) if not self.has(shard)]

    def has(self, shard: int) -> bool:
        """Whether a shard is there and not cut off."""
        if shard not in self._there and _whole(self.path(shard)):
            self._there.add(shard)
        return shard in self._there

    def read(self, number: int, crop: int, sample: Sample, strategy: ResolutionStrategy) -> Tiles:
        """The tokens of a crop of sample `number`, which the source gives as `sample`.

        Raises:
            BadSample: it could not be read when the store was filled.
            UsageError: the store holds another image under this number, or its shard is damaged.
        """
        shard, place = divmod(number, self.about["per_shard"])
        opened = self._opened(shard)
        if str(place) in opened.faults:
            raise BadSample(*opened.faults[str(place)])
        if opened.marks[place] != mark(sample):
            raise UsageError(
                f"sample {number} of data.train ('{sample.key}') shows another image than the one in '{self.folder}'; "
                "the data have changed: give data.features another folder"
            )
        view = place * self.crops + crop
        width, height = opened.sizes[view]
        plan, tokens = strategy.plan(width, height), opened.read(view)
        if len(plan.tiles) != len(tokens):
            raise self._unsound(shard, f"sample {number} has {len(tokens)} tiles, and would have {len(plan.tiles)}")
        return Tiles([], [plan], tokens)

    def faults(self) -> list[tuple[int, str, str]]:
        """Number, kind and detail of every sample that is not stored."""
        return [
            (self.numbers(shard)[int(place)], *fault)
            for shard in range(len(self))
            for place, fault in self._read_shard(shard, verify=False).faults.items()
        ]

    def _opened(self, shard: int) -> Shard:
        if shard not in self._open:
            self._open[shard] = self._read_shard(shard, verify=not self._sound[shard])
            self._sound[shard] = True
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        return self._open[shard]

    def _read_shard(self, shard: int, verify: bool) -> Shard:
        try:
            opened = Shard.open(self.path(shard), verify)
        except Unsound as error:
            raise self._unsound(shard, error) from error
        if fault := self._misfit(opened, len(self.numbers(shard))):
            raise self._unsound(shard, fault)
        return opened

    def _misfit(self, shard: Shard, samples: int) -> str:
        """What of a shard does not go with `store.json`."""
        made = self.about["made"]["data"]
        packing, width = made.get("dtype"), self.about["encoder"]["width"]
        rows = shard.rows.get_slice(ROWS)
        columns = {"fp16": (width, "F16"), "int8": (width + 2, "I8")}.get(packing, (rows.get_shape()[1], ""))
        if len(shard.marks) != samples or len(shard.sizes) != samples * self.crops:
            return f"it holds {len(shard.marks)} samples with {len(shard.sizes)} crops instead of {samples}"
        if rows.get_shape()[0] and (rows.get_shape()[1], rows.get_dtype()) != columns:
            return f"its rows are {rows.get_dtype()} of {rows.get_shape()[1]} instead of {columns[1]} of {columns[0]}"
        return ""

    def _unsound(self, shard: int, what: object) -> UsageError:
        return UsageError(
            f"'{self.path(shard)}' is missing or damaged ({what}); remove it, and the same command fills it again"
        )


def _damaged(what: object) -> UsageError:
    return UsageError(f"the store of features is damaged ({what}); remove the folder, or give data.features another")


def _whole(path: Path) -> bool:
    try:
        safe_open(path, "pt")  # compares the size of the file with what stands in it
    except (SafetensorError, OSError):
        return False
    return True
