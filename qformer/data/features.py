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
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from qformer.data.shard_file import FILES, ROWS, Manifest, Unsound, read_shard, write_shard
from qformer.data.transforms import augment
from qformer.files import soundness
from qformer.files.packing import pack
from qformer.files.records import read_object
from qformer.identity import digest, is_same, look
from qformer.images import read_file, read_image
from qformer.resolution.base import cut_all
from qformer.types import BadSample, Sample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.resolution.base import ResolutionStrategy
    from qformer.schema import DataConfig

MANIFEST = "store.json"
NO_FILE = (0, 0, 0)
DIGITS = 15  # of a digest, in base 16, that are kept
OPEN = 256  # shards kept open


@dataclass
class StoredSample:
    """A sample as it is stored: the tiles of all its crops, or why there are none.

    Attributes:
        number: of the sample in its source. mark: see `mark`; 0 where the source does not give it.
        fault: kind and detail of a `BadSample`.
        file: size and time of the image's file, and the start of its digest; `NO_FILE` where it is in none.
    """

    number: int
    mark: int
    tiles: Tiles | None = None
    fault: tuple[str, str] | None = None
    file: tuple[int, int, int] = NO_FILE


@dataclass
class CropDataset(Dataset[StoredSample]):
    """Item n holds the crops of sample n that a store keeps."""

    source: Source
    strategy: ResolutionStrategy
    data: DataConfig

    def __getitem__(self, number: int) -> StoredSample:
        assert self.data.features is not None
        views = StoredSample(number, 0)
        try:
            sample = self.source[number]
            views.mark = mark(sample)
            data, views.file = sample.image, _file_of(sample.image)
            if isinstance(data, Path):
                data = read_file(data)
                views.file = (*views.file[:2], _start_of(digest(data)))
            image = read_image(data)
        except BadSample as bad:
            views.fault = bad.kind, bad.detail
            return views
        draws = [np.random.default_rng([number, crop]) for crop in range(self.data.features.crops)]
        views.tiles = cut_all([augment(image, self.data.crop, self.data.flip, rng) for rng in draws], self.strategy)
        return views


def _file_of(image: Any) -> tuple[int, int, int]:
    """Size and time; -1 twice of a file that is not there."""
    if not isinstance(image, Path):
        return NO_FILE
    return (*(look(image) or (-1, -1)), 0)


def _start_of(digest: str) -> int:
    return int(digest[:DIGITS], 16)


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
        sizes: width and height of each crop, from which its plan follows. marks, files: of each sample, see
            `StoredSample`; shards of earlier versions have no `files`.
        faults: samples that are not stored, by their place.
    """

    rows: Any
    first_tile: list[int]
    first_row: list[int]
    sizes: list[list[int]]
    marks: list[int]
    faults: dict[str, tuple[str, str]]
    files: list[list[int]]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Shard:
        """Raises Unsound: it is damaged; that a bit has changed is found with `verify` only, which reads it whole."""
        file, lists, faults = read_shard(path, verify)
        first_tile, first_row = ([0, *accumulate(lists[name])] for name in ("tiles", "lengths"))
        files = lists.get(FILES, [list(NO_FILE)] * len(lists["marks"]))
        return cls(file, first_tile, first_row, lists["sizes"], lists["marks"], faults, files)

    def read(self, crop: int) -> list[Tensor]:
        """The packed tokens of each tile of a crop."""
        starts = self.first_row[self.first_tile[crop] : self.first_tile[crop + 1] + 1]
        rows = self.rows.get_slice(ROWS)[starts[0] : starts[-1]].clone()  # else a worker would send the whole file
        return list(rows.split([stop - start for start, stop in pairwise(starts)]))


@dataclass
class ShardWriter:
    """A shard in the making."""

    dtype: Any
    rows: list[Tensor] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    files: list[tuple[int, int, int]] = field(default_factory=list)
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, views: StoredSample, crops: int, tokens: Iterator[Tensor]) -> None:
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
        self.files.append(views.file)

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
            FILES: torch.tensor(self.files, dtype=torch.int64),
        }
        write_shard(path, tensors, self.faults)


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
    _present: set[int] = field(default_factory=set)
    _same: set[int] = field(default_factory=set)  # samples whose files were read, and have other times alone
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
            raise _damaged_store_error(error) from error
        if soundness.checks() and not soundness.seal_holds(about):
            raise _damaged_store_error(f"'{folder / MANIFEST}' is not as it was written: its checksum is another")
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
        if shard not in self._present and _is_whole(self.path(shard)):
            self._present.add(shard)
        return shard in self._present

    def read(self, number: int, crop: int, sample: Sample, strategy: ResolutionStrategy) -> Tiles:
        """The tokens of a crop of sample `number`, which the source gives as `sample`.

        Raises:
            BadSample: it could not be read when the store was filled.
            UsageError: the store holds another image under this number, the image's file has changed since, or the
                shard is damaged.
        """
        shard, place = divmod(number, self.about["per_shard"])
        opened = self._opened(shard)
        bad = str(place) in opened.faults
        if not bad and opened.marks[place] != mark(sample):
            raise UsageError(
                f"sample {number} of data.train ('{sample.key}') shows another image than the one in '{self.folder}'; "
                "the data have changed: give data.features another folder"
            )
        self._check(number, sample, opened.files[place])
        if bad:
            raise BadSample(*opened.faults[str(place)])
        row = place * self.crops + crop
        width, height = opened.sizes[row]
        plan, tokens = strategy.plan(width, height), opened.read(row)
        if len(plan.tiles) != len(tokens):
            raise self._damaged_shard_error(
                shard, f"sample {number} has {len(tokens)} tiles, and would have {len(plan.tiles)}"
            )
        return Tiles([], [plan], tokens)

    def _check(self, number: int, sample: Sample, file: list[int]) -> None:
        image, (size, time, start) = sample.image, file
        if not isinstance(image, Path) or tuple(file) == NO_FILE or number in self._same:
            return
        if look(image) in (None, (size, time)):
            return
        if not is_same(image, size, time, f"{start:0{DIGITS}x}"):
            shard = self.path(number // self.about["per_shard"])
            raise UsageError(
                f"'{image}' has changed since its tokens were stored; remove '{shard}', or the whole folder if more "
                "images have, and the same command stores them anew"
            )
        self._same.add(number)

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
            raise self._damaged_shard_error(shard, error) from error
        if fault := self._find_mismatch(opened, len(self.numbers(shard))):
            raise self._damaged_shard_error(shard, fault)
        return opened

    def _find_mismatch(self, shard: Shard, samples: int) -> str:
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

    def _damaged_shard_error(self, shard: int, what: object) -> UsageError:
        return UsageError(
            f"'{self.path(shard)}' is missing or damaged ({what}); remove it, and the same command fills it again"
        )


def _damaged_store_error(what: object) -> UsageError:
    return UsageError(f"the store of features is damaged ({what}); remove the folder, or give data.features another")


def _is_whole(path: Path) -> bool:
    try:
        safe_open(path, "pt")  # compares the size of the file with what stands in it
    except (SafetensorError, OSError):
        return False
    return True
