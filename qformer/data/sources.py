"""Data sources: things of known length that give a `Sample` for an index.

`build("jsonl", path="annotations.jsonl", where={"split": "train"})`. A source is a frozen dataclass with `__len__` and
`__getitem__(index) -> Sample`; its fields are the YAML options. A record that cannot be used raises `BadSample` when
it is asked for; a source that cannot be used at all raises `UsageError` when it is made. A source that is read in an
order of its own also has `order(seed)` and `indices()` (`qformer.data.orders`), and where its indices are no numbers
`number(index)`, which is another index of the same sample.
"""

from __future__ import annotations

import dataclasses
import json
import os
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qformer import lookup, trust
from qformer.data.fetching import expand_local
from qformer.data.orders import Mixed, Order, Seed, indices, number_of, order_of
from qformer.formats import SUFFIXES, UNREAD
from qformer.types import BadSample, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qformer.config import Choice

SOURCES: dict[str, Any] = {
    "jsonl": "qformer.data.sources:JsonLines",
    "folder": "qformer.data.sources:Folder",
    "webdataset": "qformer.data.webdataset:WebDataset",
    "datasets": "qformer.data.huggingface:HuggingFace",
    "coco": "qformer.data.annotations:Coco",
    "karpathy": "qformer.data.annotations:Karpathy",
    "visual_genome": "qformer.data.annotations:VisualGenome",
    "vqa": "qformer.data.questions:Vqa",
    "gqa": "qformer.data.questions:Gqa",
    "aokvqa": "qformer.data.questions:AokVqa",
    "scenes": "qformer.data.scenes:Scenes",
    "mix": "qformer.data.sources:Mix",
}
DRAWN = frozenset({"scenes", "phrases", "stories"})  # sources that open nothing when they are made
NOT_JSON = (ValueError, RecursionError)  # the latter for 1,000 brackets in a row
BLANK = b" \t\r\n\xef\xbb\xbf"  # and the mark that some editors put in front of UTF-8
CACHE = "shards"  # folder of a run for what sources keep


class Source(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


def build(name: str, **options: Any) -> Source:
    """A source of the table, or `module:Class` of a dataclass of your own.

    Every source also takes `prompt`, a text that is put in front of its captions once they are cleaned.

    Raises:
        UsageError: unknown name or option, a missing file, or nothing in it.
    """
    return _build(name, options, "data")


def for_run(choice: Choice, run: str | None = None) -> Source:
    """The source that a configuration names; what it keeps (counts, fetched shards) is kept beside the run, if any.

    Raises:
        UsageError: as of `build`; or (`Untrusted`) what somebody else's file names would run or be called.
    """
    with choice.building():
        return _build(choice.name, choice.options, "data", None if run is None else str(Path(run) / CACHE))


def check(name: str, options: Mapping[str, Any], where: str = "data", table: Mapping[str, Any] = SOURCES) -> None:
    """Refuse options of a source, and of those that it mixes, before anything is opened.

    Args:
        where: their path in the configuration. table: of names.

    Raises:
        UsageError: as `build`, but for what only the files can tell.
    """
    options, _ = _without_prompt(options, where)
    target = lookup.check(table, name, options, where)
    if target is Mix:
        for number, entry in enumerate(options["sources"]):
            place = f"{where}.sources.{number}"
            part, own, _ = _part(entry, place)
            check(part, own, place)
    elif name in DRAWN:
        lookup.build(table, name, options, where)


def _without_prompt(options: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    options = dict(options)
    prompt = options.pop("prompt", "")
    if not isinstance(prompt, str):
        raise UsageError(f"{where}.prompt is {prompt!r}; give the text that goes in front of the captions")
    return options, prompt


def _part(entry: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], float]:
    """Name, options and weight of a source in a mix."""
    options = dict(entry)
    name, weight = options.pop("name", None), options.pop("weight", 1)
    if not isinstance(name, str):
        raise UsageError(f"{where}.name is required; say what the source is: {', '.join(sorted(SOURCES))}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UsageError(f"{where}.weight is {weight!r}; give a positive number, or leave the source out")
    return name, options, float(weight)


def _build(name: str, options: dict[str, Any], where: str, cache: str | None = None) -> Source:
    options, prompt = _without_prompt(options, where)
    if options.get("cache") is not None:
        trust.judge(str(options["cache"]), trust.WRITTEN)
    found = lookup.find(SOURCES, name, where, own=True)
    if dataclasses.is_dataclass(found) and "cache" in {f.name for f in dataclasses.fields(found)}:
        options = {"cache": cache} | options
    source = lookup.build(SOURCES, name, options, where)
    if getattr(source, "order", None) is None and not len(source):
        raise UsageError(f"the data source '{name}' with {options} is empty; give one with samples")
    return Prompted(source, prompt.strip()) if prompt.strip() else source


@dataclass(frozen=True)
class Prompted:
    """A source whose captions stand behind a text."""

    source: Source
    prompt: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Sample:
        return dataclasses.replace(self.source[index], prompt=self.prompt)

    def order(self, seed: Seed) -> Order:
        return order_of(self.source, seed)

    def indices(self) -> Iterator[Any]:
        return indices(self.source)

    def number(self, index: Any) -> int:
        return number_of(self.source, index)


@dataclass(frozen=True)
class Mix:
    """Several sources at once, each with its own epochs, drawn by weight.

    Attributes:
        sources: their configurations, each with `name`, options, and optionally `weight` and `prompt`. Of a batch, a
            source gives its weight's share (1 by default), to 1 in 10,000.
        cache: folder for what they keep.

    Sources name images by their paths, so that one image in two of them has one id. Where a source of your own gives
    numbers, or no id, it is its own images that they name: number 1 of another one is another image.
    """

    sources: list[dict[str, Any]]
    cache: str | None = None
    _parts: list[Any] = field(init=False, repr=False, compare=False)
    _weights: list[float] = field(init=False, repr=False, compare=False)
    _spaces: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts, weights, spaces = [], [], []
        for number, entry in enumerate(self.sources):
            where = f"data.sources.{number}"
            name, options, weight = _part(entry, where)
            parts.append(_build(name, options, where, self.cache))
            weights.append(weight)
            own = {key: value for key, value in options.items() if key != "prompt"}
            spaces.append(f"{name} {json.dumps(own, sort_keys=True, default=str)}")
        if not parts:
            raise UsageError("data.sources is empty; give a list of sources, each with a name")
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_spaces", spaces)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __getitem__(self, index: int | tuple[int, Any]) -> Sample:
        """Of an index (part, index in it), or a number that counts through the parts."""
        if isinstance(index, int):
            part = bisect_right(self._starts, index) - 1
            index = part, index - self._starts[part]
        part, own = index
        sample: Sample = self._parts[part][own]
        if isinstance(sample.image_id, str):
            return sample
        name = sample.key if sample.image_id is None else sample.image_id
        return dataclasses.replace(sample, image_id=f"{self._spaces[part]} {name!r}")

    def number(self, index: tuple[int, Any]) -> int:
        part, own = index
        return self._starts[part] + number_of(self._parts[part], own)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(part) for part in self._parts)][:-1]

    def order(self, seed: Seed) -> Order:
        return Mixed([order_of(part, (*seed, number)) for number, part in enumerate(self._parts)], self._weights, seed)

    def indices(self) -> Iterator[tuple[int, Any]]:
        """One of each source in turn, so that the first few are of all of them."""
        left = [(number, indices(part)) for number, part in enumerate(self._parts)]
        while left:
            for entry in list(left):
                number, own = entry
                try:
                    yield number, next(own)
                except StopIteration:
                    left.remove(entry)


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line: `image` and `captions` (a list) or `caption`, or `question` and `answers` or `answer`.

    Attributes:
        path: the file, or several: a list, or a pattern such as `captions-*.jsonl` or `{00..11}.jsonl`.
        images: folder that `image` is relative to; the file's own folder by default.
        where: keep the records whose fields equal these, such as {split: train}; all by default.
    """

    path: str | list[str]
    images: str | None = None
    where: dict[str, Any] | None = None
    _files: list[str] = field(init=False, repr=False, compare=False)
    _lines: Any = field(init=False, repr=False, compare=False)  # int64[n, 4]: file, number, start, length in bytes

    def __post_init__(self) -> None:
        named = isinstance(self.path, str) and Path(self.path).is_file()  # whatever signs its name holds
        files = [str(self.path)] if named else expand_local(self.path)
        if missing := [file for file in files if not Path(file).is_file()]:
            raise UsageError(
                f"no file at '{missing[0]}'; data.path of a jsonl source must be files with one JSON object per line"
            )
        if self.images is not None and not Path(self.images).is_dir():
            raise UsageError(f"no folder at '{self.images}'; data.images must be the folder that holds the images")
        kept = []
        for number, file in enumerate(files):
            kept += [(number, *line) for line in self._kept(Path(file))]
        if not kept:
            raise UsageError(
                f"'{self.path}' has no record{f' with {self.where}' if self.where else ''}; "
                "check the file and data.where"
            )
        object.__setattr__(self, "_files", files)
        object.__setattr__(self, "_lines", np.array(kept, dtype=np.int64))

    def _kept(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """Number, start and length of each line that is a record."""
        start = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip(BLANK) and self._keep(line):
                    yield number, start, len(line)
                start += len(line)

    def _keep(self, line: bytes) -> bool:
        if not self.where:
            return True
        try:
            record = json.loads(line.decode("utf-8-sig", errors="replace"))
        except NOT_JSON:
            return True  # kept here, so that it is counted as bad when it is asked for
        return isinstance(record, dict) and all(record.get(key) == value for key, value in self.where.items())

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        which, number, start, length = self._lines[index].tolist()
        path = Path(self._files[which])
        key = f"{path}:{number}"
        try:
            with path.open("rb") as file:
                line = os.pread(file.fileno(), length, start)
        except OSError as error:
            raise BadSample("unreadable", f"{key}: {error.strerror}") from error
        try:
            record = json.loads(line.decode("utf-8-sig", errors="replace"))
        except NOT_JSON as error:
            raise BadSample("not json", str(error)) from error
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise BadSample("no image", "the record has no 'image' path")
        image = Path(self.images or path.parent) / record["image"]
        return Sample(image=image, key=key, image_id=str(image), facts=record, **texts_of(record))


def texts_of(record: dict[str, Any]) -> dict[str, Any]:
    """`captions` (or `caption`), `question` and `answers` (or `answer`) of a record; what is no text is left out."""
    return {
        "captions": strings(record.get("captions")) or strings(record.get("caption")),
        "question": next(iter(strings(record.get("question"))), None),
        "answers": strings(record.get("answers")) or strings(record.get("answer")),
    }


def strings(value: Any) -> list[str]:
    """The texts in a list of anything, or the one text. Half a surrogate pair, which no tokeniser takes, becomes ?."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return [text.encode("utf-8", "replace").decode() for text in texts]


@dataclass(frozen=True)
class Folder:
    """Image files anywhere below `path`, each with a .txt of the same name beside it: one caption per line.

    Folders that are links are followed, each once. Files of formats that are not read, such as HEIC, are bad samples.
    """

    path: str
    _files: list[Path] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        root = Path(self.path)
        if not root.is_dir():
            raise UsageError(
                f"no folder at '{root}'; data.path of a folder source must hold images with .txt files beside them"
            )
        files = sorted(file for file in _below(root) if file.suffix.lower() in SUFFIXES | UNREAD)
        endings = Counter(file.suffix.lower() for file in files)
        if not SUFFIXES & endings.keys():
            unread = "".join(f", {count} {ending}" for ending, count in sorted(endings.items()))
            raise UsageError(
                f"no image below '{root}' that is read{unread}; put {', '.join(sorted(SUFFIXES))} files there"
            )
        object.__setattr__(self, "_files", files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image = self._files[index]
        try:
            captions = image.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace").splitlines()
        except FileNotFoundError:  # an image without captions, which only training has no use for
            captions = []
        except OSError as error:
            raise BadSample("no caption", f"{image.with_suffix('.txt')}: {error.strerror}") from error
        return Sample(image=image, key=str(image), image_id=str(image), captions=captions)


def _below(root: Path) -> Iterator[Path]:
    """Everything below a folder, links followed; a folder that can be reached in several ways comes once."""
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders.sort()
        yield from (Path(place) / name for name in [*folders, *files])
