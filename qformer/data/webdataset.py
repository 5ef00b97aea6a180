"""Tars in the format of webdataset, img2dataset and the hub's `-wds` data sets, such as CC3M, CC12M, SBU and LAION."""

from __future__ import annotations

import json
import warnings
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qformer.data.base import Order, Seed
from qformer.data.columns import CAPTIONS, ColumnOptions, Columns, id_of, read_record, strings
from qformer.data.documents import NOT_JSON
from qformer.data.encodings import decode_text
from qformer.data.fetching import expand, fetcher
from qformer.data.members import IMAGES
from qformer.data.orders import Windows
from qformer.data.shards import Shards
from qformer.formats import FORMATS
from qformer.types import BadSample, LeftOut, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Fetcher = Callable[[str], Callable[[Path], None] | None]

ORDER = [suffix[1:] for suffixes in FORMATS.values() for suffix in suffixes] + ["img"]
GIGABYTE = 1e9


class Sharded:
    """Source of samples in `Shards`; an index is (shard, place in it), or a number that counts through all shards."""

    shards: Shards
    window: int

    def __len__(self) -> int:
        """Count the samples of all shards, which fetches all remote ones."""
        return sum(self.shards.count(shard) for shard in range(len(self.shards)))

    def order(self, seed: Seed) -> Order:
        return Windows(self.shards, self.window, seed)

    def indices(self) -> Iterator[tuple[int, int]]:
        for shard in range(len(self.shards)):
            yield from ((shard, place) for place in range(self.shards.count(shard)))

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        shard, place = index if isinstance(index, tuple) else self._place(index)
        key, members = self.shards.read(shard, place)
        return self.sample(f"{self.shards.names[shard]}/{key}", members)

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        raise NotImplementedError

    def number(self, index: int | tuple[int, int]) -> int:
        return self._starts[index[0]] + index[1] if isinstance(index, tuple) else index

    def _place(self, number: int) -> tuple[int, int]:
        if number >= self._starts[-1]:
            raise IndexError(f"sample {number} is after the last shard")
        shard = bisect_right(self._starts, number) - 1  # the last that starts here; those before it are empty
        return shard, number - self._starts[shard]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.shards.count(shard) for shard in range(len(self.shards)))]


def open_shards(names: list[str], fetch: Fetcher, source: Any) -> Shards:
    """Open shards with the options of a source; without a `cache`, they are kept until the program ends.

    Raises:
        UsageError: an option is not positive.
    """
    if source.window < 1 or source.keep_gb <= 0:
        raise UsageError(f"window is {source.window} and keep_gb {source.keep_gb}; both must be positive")
    if source.cache is not None:
        return Shards(names, Path(source.cache), source.keep_gb * GIGABYTE, fetch)
    folder = TemporaryDirectory(prefix="qformer-")
    shards = Shards(names, Path(folder.name), source.keep_gb * GIGABYTE, fetch)
    shards.owned = folder
    return shards


@dataclass(frozen=True)
class WebDataset(ColumnOptions, Sharded):
    """Tars with an image and its texts under one name: `17.jpg`, and `17.txt` (one caption) or `17.json`.

    `captions` (a list), `caption`, or `question` and `answers` are read from the JSON, as from a line of `jsonl`.
    `captions` takes precedence over the text file, and the text file over `caption`. If a sample has several images,
    the one without a further name is used (`17.jpg`, not `17.depth.png`), and a warning says so.

    Of `ColumnOptions`, `image` is a member (`rgb.png`), `caption` a member (`txt`) or a field of the JSON, and the
    others are fields of the JSON.

    Attributes:
        path: one pattern or several: paths, URLs (`https:`, `s3:`, `hf:`, ...) or `pipe:command`, with
            `{00000..00331}`, or `*` where files can be listed.
        window: number of shards that are shuffled together, and fetched before the first batch.
        keep_gb: gigabytes of fetched shards to keep, which should hold twice a window; the oldest are dropped.
        cache: folder for indices and fetched shards; beside the run by default.
    """

    path: str | list[str]
    window: int = 8
    keep_gb: float = 100.0
    cache: str | None = None
    shards: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", open_shards(expand(self.path), fetcher, self))

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        image = members[self._choose_image(key, members)]
        wanted = self.caption or "txt"
        text = {name: decode_text(members[name]) for name in ("json", wanted) if name in members}
        record = _parse_record(text.get("json"), key, needed=wanted not in text)
        if self.id is not None and self.id not in record:
            warnings.warn(
                f"'{self.path}': not every sample has '{self.id}' in its JSON; without it, images are the same if "
                "their bytes are",
                LeftOut,
                stacklevel=1,
            )
        if self.caption is not None:
            caption = text.get(wanted, record.get(wanted))
            record = {name: value for name, value in record.items() if name not in CAPTIONS}
            record |= {} if caption is None else {"captions": caption}
        elif "txt" in text and not strings(record.get("captions")):
            record["captions"] = [text["txt"]]
        _, texts = read_record(record, replace(Columns.of(self), image=None, caption=None), Path())
        return Sample(image=image, key=key, image_id=id_of(record, self.id, self.path), **texts)

    def _choose_image(self, key: str, members: dict[str, bytes]) -> str:
        """Choose the member that is the image.

        Raises:
            BadSample: kinds `no image`, and `several images` if none has an empty stem.
        """
        found = [name for name in members if name.rpartition(".")[2] in IMAGES]
        if not found or self.image not in (None, *members):
            raise BadSample("no image", f"{key} has {', '.join(members)}")
        if self.image is not None:
            return self.image
        alone = [name for name in found if "." not in name]
        if not alone and len(found) > 1:
            raise BadSample("several images", f"{key} has {', '.join(found)}; name one of them with data.image")
        chosen = min(alone, key=ORDER.index) if len(alone) > 1 else (alone or found)[0]
        if len(found) > 1:
            warnings.warn(
                f"'{self.path}': of several images in a sample ({', '.join(sorted(found))}) {chosen} is taken; name "
                "another with data.image",
                LeftOut,
                stacklevel=1,
            )
        return chosen


def _parse_record(text: str | None, key: str, needed: bool) -> dict[str, Any]:
    try:
        record = json.loads(text or "{}")
    except NOT_JSON as error:
        if needed:
            raise BadSample("not json", f"{key}: {error}") from error
        return {}
    return record if isinstance(record, dict) else {}
