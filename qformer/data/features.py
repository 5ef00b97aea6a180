"""Store of a frozen image encoder's tokens, which is filled once and then read by training in place of the images.

It is a folder with `store.json`, which describes how the tokens were made, and memory-mapped safetensors shards with
equal numbers of samples; only the rows of requested images are read. Each sample is stored as several crops, which are
functions of the numbers of sample and crop. Training draws one of them from (seed, position), like everything else in a
batch. Texts are not stored but come from the source, and each sample is compared with the stored one.
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

from qformer.data.shard_file import FILES, PARTS, ROWS, Manifest, Unsound, read_shard, write_shard
from qformer.data.transforms import augment
from qformer.files import soundness
from qformer.files.packing import pack
from qformer.files.records import read_object
from qformer.identity import digest, is_same, look
from qformer.images import read_file
from qformer.types import BadSample, Sample, Tiles, UsageError
from qformer.videos import Clip, is_video
from qformer.videos.rows import cut_row, parts_of, plan_row, read_row, sizes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.resolution.base import ResolutionStrategy
    from qformer.schema import DataConfig

MANIFEST = "store.json"
NO_FILE = (0, 0, 0)
DIGITS = 15  # hexadecimal digits of a digest to keep
OPEN = 256  # shards kept open


@dataclass
class StoredSample:
    """Sample to store: the tiles of all its crops, or the fault that prevents them.

    Attributes:
        number: number of the sample in its source.
        mark: result of `mark`; 0 if the source raised an error.
        fault: kind and detail of a `BadSample`.
        file: size, modification time and start of the digest of the image's file; `NO_FILE` if there is no file.
        shown: `sizes_of` each crop.
    """

    number: int
    mark: int
    tiles: Tiles | None = None
    fault: tuple[str, str] | None = None
    file: tuple[int, int, int] = NO_FILE
    shown: list[list[tuple[int, int, int]]] = field(default_factory=list)


@dataclass
class CropDataset(Dataset[StoredSample]):
    """Data set whose item n holds the crops of sample n."""

    source: Source
    strategy: ResolutionStrategy
    data: DataConfig

    def __getitem__(self, number: int) -> StoredSample:
        assert self.data.features is not None
        views = StoredSample(number, 0)
        try:
            sample = self.source[number]
            views.mark, parts = mark(sample), parts_of(sample.image)
            views.file = _file_of(parts)
            if views.file != NO_FILE:
                data = [read_file(one) for one in parts]
                views.file = (*views.file[:2], _start_of(digest(b"".join(data))))
                parts = [one if is_video(one) else own for one, own in zip(parts, data, strict=True)]
            row = read_row(parts, self.strategy)
            draws = [np.random.default_rng([number, crop]) for crop in range(self.data.features.crops)]
            crops = [augment(row, self.data.crop, self.data.flip, rng) for rng in draws]
            views.tiles = Tiles.join([cut_row(crop, self.strategy) for crop in crops])
            views.shown = list(map(sizes_of, crops))
        except BadSample as bad:
            views.fault = bad.kind, bad.detail
        return views


def _file_of(parts: list[Any]) -> tuple[int, int, int]:
    """Get size and time of the files of what a sample shows, or -1 twice if one does not exist."""
    return (*(look(parts) or (-1, -1)), 0) if all(isinstance(one, Path) for one in parts) else NO_FILE


def _start_of(digest: str) -> int:
    return int(digest[:DIGITS], 16)


def mark(sample: Sample) -> int:
    """Compute a cheap positive fingerprint of an image, from its bytes or pixels, or from the end of its path."""
    known = b"\0".join(map(_known, parts_of(sample.image)))
    return int.from_bytes(hashlib.blake2b(known, digest_size=8).digest()) >> 1 or 1


def _known(image: Any) -> bytes:
    if isinstance(image, Path):
        return "/".join(image.parts[-2:]).encode()
    return bytes(image.frames.numpy() if isinstance(image, Clip) else image)


@dataclass
class Shard:
    """Open shard, in which crops are ordered by sample, tiles by crop, and rows by tile.

    Attributes:
        rows: the file.
        first_tile, first_row: first tile of each crop, and first row of each tile.
        sizes: width and height of each crop, which determine its plan.
        marks, files: fields of each `StoredSample`; shards of earlier versions have no `files`.
        faults: faults of the samples that are not stored, by place.
        parts: `sizes_of` the crops that show several pictures or a clip, by number of the crop.
    """

    rows: Any
    first_tile: list[int]
    first_row: list[int]
    sizes: list[list[int]]
    marks: list[int]
    faults: dict[str, tuple[str, str]]
    files: list[list[int]]
    parts: dict[int, list[list[int]]]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> Shard:
        """Open a shard; `verify` also compares checksums, for which the whole file is read.

        Raises:
            Unsound: the shard is damaged.
        """
        file, lists, faults = read_shard(path, verify)
        first_tile, first_row = ([0, *accumulate(lists[name])] for name in ("tiles", "lengths"))
        files = lists.get(FILES, [list(NO_FILE)] * len(lists["marks"]))
        parts: dict[int, list[list[int]]] = {}
        for crop, *size in lists.get(PARTS, ()):
            parts.setdefault(crop, []).append(size)
        return cls(file, first_tile, first_row, lists["sizes"], lists["marks"], faults, files, parts)

    def read(self, crop: int) -> list[Tensor]:
        """Read the packed tokens of each tile of a crop."""
        starts = self.first_row[self.first_tile[crop] : self.first_tile[crop + 1] + 1]
        rows = self.rows.get_slice(ROWS)[starts[0] : starts[-1]].clone()  # else a worker would send the whole file
        return list(rows.split([stop - start for start, stop in pairwise(starts)]))


@dataclass
class ShardWriter:
    """Shard that is being filled."""

    dtype: Any
    rows: list[Tensor] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    files: list[tuple[int, int, int]] = field(default_factory=list)
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    parts: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, views: StoredSample, crops: int, tokens: Iterator[Tensor]) -> None:
        """Add the next sample.

        Args:
            tokens: tokens of each of its tiles, float[S, D].

        Raises:
            UsageError: the values do not fit the dtype of the store.
        """
        if views.fault is not None:
            self.faults[str(len(self.marks))] = views.fault
        for crop, shown in enumerate(views.shown, len(self.sizes)):
            if len(shown) > 1 or shown[0][2]:
                self.parts += [(crop, *size) for size in shown]
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
        """Write the shard atomically.

        Raises:
            OSError: the shard cannot be written, as on a full disk.
        """
        tensors = {
            ROWS: torch.cat(self.rows) if self.rows else torch.empty(0, 0, dtype=torch.int8),
            "lengths": torch.tensor([len(rows) for rows in self.rows], dtype=torch.int32),
            "tiles": torch.tensor(self.tiles, dtype=torch.int32),
            "sizes": torch.tensor(self.sizes, dtype=torch.int32),
            "marks": torch.tensor(self.marks, dtype=torch.int64),
            FILES: torch.tensor(self.files, dtype=torch.int64),
        }
        if self.parts:  # without them, as in stores of one picture a sample
            tensors[PARTS] = torch.tensor(self.parts, dtype=torch.int64)
        write_shard(path, tensors, self.faults)


@dataclass
class FeatureStore:
    """Folder of shards.

    Attributes:
        about: content of `store.json`: `made`, the configuration of the store by sections; `encoder`, the sizes of the
            image encoder; `per_shard`, the number of samples in a shard; `bytes_per_sample`, an estimate.
    """

    folder: Path
    about: dict[str, Any]
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict)
    _present: set[int] = field(default_factory=set)
    _same: set[int] = field(default_factory=set)  # samples whose files have another time but the same bytes
    _sound: Any = None

    def __post_init__(self) -> None:
        """Create flags, shared among data workers, of the shards whose checksums need no (further) check."""
        self._sound = torch.full((len(self),), not soundness.checks()).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    @classmethod
    def read_manifest(cls, folder: Path) -> FeatureStore:
        """Open the store in a folder. Raises UsageError: `store.json` is damaged."""
        try:
            about = read_object(folder / MANIFEST, Manifest)
        except UsageError as error:
            raise _damaged_store_error(error) from error
        if soundness.checks() and not soundness.seal_holds(about):
            raise _damaged_store_error(f"'{folder / MANIFEST}' is not as it was written: its checksum is another")
        return cls(folder, about)

    def check(self, made: dict[str, dict[str, Any]]) -> None:
        """Compare the configuration of the store with `made`. Raises UsageError: they differ; it says where."""
        differs = [
            f"{section}.{key} was {self.about['made'].get(section, {}).get(key)}, is {values.get(key)}"
            for section, values in made.items()
            for key in sorted(values.keys() | self.about["made"].get(section, {}).keys())
            if self.about["made"].get(section, {}).get(key) != values.get(key)
        ]
        if differs:
            raise UsageError(
                f"the features in '{self.folder}' were stored under another configuration ({'; '.join(differs)}); "
                "give data.features another folder, or restore these values"
            )

    @cached_property
    def samples(self) -> int:
        return int(self.about["made"]["data"]["samples"])

    @cached_property
    def crops(self) -> int:
        return int(self.about["made"]["data"]["crops"])

    def numbers(self, shard: int) -> range:
        """Numbers of the samples in a shard."""
        size = self.about["per_shard"]
        return range(shard * size, min((shard + 1) * size, self.samples))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.safetensors"

    def __len__(self) -> int:
        return -(-self.samples // self.about["per_shard"])

    def missing(self) -> list[int]:
        """List the shards that are not filled yet."""
        return [shard for shard in range(len(self)) if not self.has(shard)]

    def has(self, shard: int) -> bool:
        """Check if a shard exists and is not cut off."""
        if shard not in self._present and _is_whole(self.path(shard)):
            self._present.add(shard)
        return shard in self._present

    def read(self, number: int, crop: int, sample: Sample, strategy: ResolutionStrategy) -> Tiles:
        """Read the tokens of a crop of sample `number`, which the source gives as `sample`.

        Raises:
            BadSample: the sample could not be read when the store was filled.
            UsageError: the store holds another image under this number, the image's file has changed, or the shard is
                damaged.
        """
        shard, place = divmod(number, self.about["per_shard"])
        opened = self._opened(shard)
        bad = str(place) in opened.faults
        if not bad and opened.marks[place] != mark(sample):
            raise UsageError(
                f"sample {number} of data.train ('{sample.key}') shows another image than in '{self.folder}'; "
                "the data have changed: give data.features another folder"
            )
        self._check(number, sample, opened.files[place])
        if bad:
            raise BadSample(*opened.faults[str(place)])
        row = place * self.crops + crop
        plan = plan_row(opened.parts.get(row) or [(*opened.sizes[row], 0)], strategy)
        tokens = opened.read(row)
        if len(plan.tiles) != len(tokens):
            raise self._damaged_shard_error(
                shard, f"sample {number} has {len(tokens)} tiles, and would have {len(plan.tiles)}"
            )
        return Tiles([], [plan], tokens)

    def _check(self, number: int, sample: Sample, file: list[int]) -> None:
        parts, (size, time, start) = parts_of(sample.image), file
        if tuple(file) == NO_FILE or number in self._same or _file_of(parts)[:2] in ((size, time), (-1, -1), (0, 0)):
            return
        if not is_same(parts, size, time, f"{start:0{DIGITS}x}"):
            shard = self.path(number // self.about["per_shard"])
            raise UsageError(
                f"'{' + '.join(map(str, parts))}' has changed since its tokens were stored; remove '{shard}', or the "
                "whole folder if more images have changed, and run the same command to store them again"
            )
        self._same.add(number)

    def faults(self) -> list[tuple[int, str, str]]:
        """List number, kind and detail of every sample that is not stored."""
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
        """Describe how a shard differs from `store.json`; empty if it does not."""
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
            f"'{self.path(shard)}' is missing or damaged ({what}); remove it, and run the same command to fill it again"
        )


def _damaged_store_error(what: object) -> UsageError:
    return UsageError(f"the store of features is damaged ({what}); remove the folder, or give data.features another")


def _is_whole(path: Path) -> bool:
    try:
        safe_open(path, "pt")  # compares the size of the file with its header
    except (SafetensorError, OSError):
        return False
    return True
