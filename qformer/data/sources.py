"""Table of data sources, which have a known length and give a `Sample` for an index.

`build("jsonl", path="annotations.jsonl", where={"split": "train"})`. A source is a frozen dataclass with `__len__` and
`__getitem__(index) -> Sample`; its fields are the YAML options. A record that cannot be used raises `BadSample` when it
is read; a source that cannot be used at all raises `UsageError` when it is built. A source with its own order also has
`order(seed)` and `indices()` (`qformer.data.orders`), and, if its indices are not numbers, `number(index)`, which is
another index of the same sample.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer import lookup, trust
from qformer.data.base import Order, Seed, Source, indices, number_of, order_of
from qformer.types import Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qformer.config import Choice

SOURCES: dict[str, Any] = {
    "jsonl": "qformer.data.json_lines:JsonLines",
    "folder": "qformer.data.folders:Folder",
    "webdataset": "qformer.data.webdataset:WebDataset",
    "datasets": "qformer.data.huggingface:HuggingFace",
    "coco": "qformer.data.annotations:Coco",
    "karpathy": "qformer.data.annotations:Karpathy",
    "visual_genome": "qformer.data.annotations:VisualGenome",
    "vqa": "qformer.data.questions:Vqa",
    "gqa": "qformer.data.questions:Gqa",
    "aokvqa": "qformer.data.questions:AokVqa",
    "naturalbench": "qformer.data.natural:NaturalBench",
    "mmvp": "qformer.mmvp.folder:Mmvp",
    "scenes": "qformer.scenes.scenes:Scenes",
    "canvases": "qformer.canvases.source:Canvases",
    "twins": "qformer.canvases.pairs:Twins",
    "two_pictures": "qformer.canvases.two_pictures:TwoPictures",
    "clips": "qformer.canvases.clips:Clips",
    "areas": "qformer.canvases.areas:Areas",
    "mosaics": "qformer.mosaics.source:Mosaics",
    "pages": "qformer.suites.pages:Pages",
    "mix": "qformer.data.mix:Mix",
}
#: Sources that open no files.
DRAWN = frozenset(
    {"scenes", "canvases", "twins", "two_pictures", "clips", "areas", "phrases", "stories", "canvas_stories", "views"}
)
ELSEWHERE = "none"  # in the configuration of a model that was not trained here; no source
CACHE = "shards"  # folder of a run for the caches of sources


def build(name: str, **options: Any) -> Source:
    """Build a source of the table, or a custom dataclass `module:Class`.

    Every source also takes `prompt`, a text in front of its cleaned captions.

    Raises:
        UsageError: unknown name or option, or a missing or empty file.
    """
    return build_at(name, options, "data")


def for_run(choice: Choice, run: str | None = None) -> Source:
    """Build the source that a configuration names; its cache (counts, fetched shards) is in the folder `run`, if given.

    Raises:
        UsageError: as in `build`; or (`Untrusted`) a class, a command or an address from somebody else's file.
    """
    with choice.building():
        return build_at(choice.name, choice.options, "data", None if run is None else str(Path(run) / CACHE))


def check(name: str, options: Mapping[str, Any], where: str = "data", table: Mapping[str, Any] = SOURCES) -> None:
    """Check the options of a source, and of all sources in it, without opening anything.

    Args:
        where: path of the options in the configuration.
        table: table of names.

    Raises:
        UsageError: as in `build`, except for faults in files.
    """
    options, _ = _split_prompt(options, where)
    lookup.check(table, name, options, where)
    if name == "mix":
        for number, entry in enumerate(options["sources"]):
            place = f"{where}.sources.{number}"
            part, own, _ = read_part(entry, place)
            check(part, own, place)
    elif name == "mosaics":
        check(*read_named(options["photos"], f"{where}.photos"), f"{where}.photos")
    elif name in DRAWN:
        lookup.build(table, name, options, where)


def _split_prompt(options: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    options = dict(options)
    prompt = options.pop("prompt", "")
    if not isinstance(prompt, str):
        raise UsageError(f"{where}.prompt is {prompt!r}; give the text that goes in front of the captions")
    return options, prompt


def read_part(entry: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], float]:
    """Read name, options and weight of a source in a mixture."""
    name, options = read_named(entry, where)
    weight = options.pop("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UsageError(f"{where}.weight is {weight!r}; give a positive number, or leave the source out")
    return name, options, float(weight)


def read_named(entry: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Read name and options of a source in another."""
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"{where}.name is required; give one of {', '.join(sorted(SOURCES))}")
    return name, options


def build_at(name: str, options: dict[str, Any], where: str, cache: str | None = None) -> Source:
    options, prompt = _split_prompt(options, where)
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
    """Source that adds a text in front of the captions of another source."""

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
