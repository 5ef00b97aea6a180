"""`qformer capfilt`: captions of web images, written and filtered (BLIP, arXiv:2201.12086; BLIP-2, section 3.4).

Every image is captioned several times by nucleus sampling. These own captions and the original ones are ranked by their
similarity to the image, and the best few are kept, of which training draws one each time.

The data are cut into parts (so many samples, or a tar), and those into blocks of images that go through the models
together. A part is a function of seed and data, whichever process makes it: several write the files that one would. A
part in progress is a journal with a line for each block: a `kill -9` costs one block (`stages.filtered`).
"""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qformer import checkpoint, distributed
from qformer.config import Choice, load_config
from qformer.data import sources
from qformer.data.loader import cleaned
from qformer.data.orders import indices
from qformer.formats import SUFFIXES, UNREAD
from qformer.images import read_image
from qformer.model.capfilt import NEW_TOKENS, load_captioner, load_ranker
from qformer.types import BadSample, UsageError
from stages.evaluate import AUTOCAST, pairs
from stages.filtered import FORMS, Part, finish_all, writing
from stages.resume import console

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qformer.data.sources import Source
    from qformer.model.capfilt import Captioner, Ranker
    from qformer.types import Sample

LOOK = 100  # samples that may be bad before the first that can be used
SETTINGS = "capfilt.json"


@dataclass(frozen=True)
class Settings:
    """What the result depends on; a run goes on only with the same. For each see `qformer capfilt --help`."""

    data: list[str]
    captioner: str
    ranker: str
    captions: int = 10
    keep: int = 2
    top_p: float = 0.9
    prompt: str | None = None
    seed: int = 0
    batch: int = 16
    part: int = 1000
    form: str | None = None
    precision: str = "fp32"


def capfilt(
    settings: Settings, output: Path, shard: str | None = None, device: str | None = None, trust: bool = False
) -> None:
    """Caption and filter the data, or go on with it; `shard` is `i/n`, or what torchrun says.

    With `trust` both models may run the code that they name.

    Raises:
        UsageError: data or models that cannot be used, a folder that was begun with other settings, or a full disk.
    """
    number, of = _share(shard)
    with writing(output):
        (output / "work").mkdir(parents=True, exist_ok=True)
    source = open_data(settings.data, output)
    settings = _settle(settings, output, source)
    if device is None and torch.cuda.is_available():
        device = f"cuda:{distributed.local_rank()}" if of > 1 and shard is None else "cuda"
    run = Run(settings, output, source, device or "cpu", trust)
    show = shard is not None or number == 0  # of those that torchrun starts one speaks
    finished = []
    with _progress(show) as progress:
        task = progress.add_task("captions", total=_total(source, settings.part, number, of), speed="")
        run.tell = lambda count, speed: progress.update(task, advance=count, speed=speed)
        for place, members in parts(source, settings.part):
            part = Part(output, place, str(settings.form))
            if place % of == number:
                run.make(part, members)
            finished.append(part)
    left = [part for part in finished if not part.file.exists()]
    if left:
        if show:
            done = len(finished) - len(left)
            console.print(f"{done} of {len(finished)} parts are done; the others are left to other processes")
        return
    finish_all(output, finished)


@dataclass
class Run:
    """The models at work; they are loaded when there is something to do."""

    settings: Settings
    output: Path
    source: Source
    device: str
    trust: bool = False
    tell: Any = None
    made: int = 0
    start: float = field(default_factory=time.perf_counter)

    @cached_property
    def captioner(self) -> Captioner:
        settings = self.settings
        return load_captioner(settings.captioner, self.device, settings.prompt, settings.top_p, self.trust)

    @cached_property
    def ranker(self) -> Ranker:
        return load_ranker(self.settings.ranker, self.device, self.trust)

    def make(self, part: Part, members: Iterator[Any]) -> None:
        """Caption the samples with these indices, unless it is done or another process is at it."""
        with part.claimed() as mine:
            if not mine:
                if part.file.exists():
                    self.tell(part.stats()["samples"], "")
                return
            samples, size = list(members), self.settings.batch
            blocks = [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
            journal = part.resume()
            self.tell(sum(map(len, blocks[: len(journal)])), "")
            with ThreadPoolExecutor(1) as ahead:  # decodes the next block while the models read this one
                todo = blocks[len(journal) :]
                coming = ahead.submit(self._read, samples, todo[0]) if todo else None
                for number, block in enumerate(todo):
                    assert coming is not None
                    read, skipped = coming.result()
                    if number + 1 < len(todo):
                        coming = ahead.submit(self._read, samples, todo[number + 1])
                    part.add(self._filter(read, skipped, samples))
                    ahead.submit(part.show, self.source, samples).result()  # one thread reads the source, not two
                    self._told(len(block))
            part.finish(self.source, samples)

    def _read(self, samples: list[Any], block: range) -> tuple[list[tuple[int, Sample, Tensor]], list[dict[str, Any]]]:
        """The samples of a block with their pixels, and what cannot be used."""
        read, skipped = [], []
        for place in block:
            try:
                sample = self.source[samples[place]]
                read.append((place, sample, read_image(sample.image)))
            except BadSample as bad:
                skipped.append({"index": str(samples[place]), "kind": bad.kind, "detail": bad.detail})
        return read, skipped

    def _filter(
        self, read: list[tuple[int, Sample, Tensor]], skipped: list[dict[str, Any]], samples: list[Any]
    ) -> dict[str, Any]:
        """What the journal says of a block: a record for each image with all its captions, the best first."""
        settings, records, cut = self.settings, [], 0
        images = [image for _, _, image in read]
        draws = [row for place, _, _ in read for row in draw(settings.seed, samples[place], settings.captions)]
        dtype = AUTOCAST.get(settings.precision)
        with torch.autocast(torch.device(self.device).type, dtype) if dtype else nullcontext():
            own = self.captioner(images, draws) if read else []
            texts = []
            for row, (_, sample, _) in enumerate(read):
                written = own[row * settings.captions : (row + 1) * settings.captions]
                texts.append(candidates(sample.captions, written))
            ranked = self.ranker(images, [list(one) for one in texts]) if any(texts) else [[] for _ in texts]
        for (place, sample, _), captions, scores in zip(read, texts, ranked, strict=True):
            fault = "no caption" if not captions else "no score" if not all(map(math.isfinite, scores)) else None
            if fault is not None:
                skipped.append({"index": str(samples[place]), "kind": fault, "detail": sample.key})
                continue
            cut += self.ranker.too_long(list(captions))
            best = sorted(zip(captions, scores, captions.values(), strict=True), key=lambda one: -one[1])
            rows = [[text, round(score, 5), origin] for text, score, origin in best]
            records.append(
                {"place": place, "key": sample.key, "kept": rows[: settings.keep], "dropped": rows[settings.keep :]}
            )
        return {"records": records, "skipped": skipped, "cut": cut}

    def _told(self, count: int) -> None:
        self.made += count
        self.tell(count, f"{self.made / (time.perf_counter() - self.start):.1f} images/s")


def candidates(original: list[str], own: list[str]) -> dict[str, str]:
    """Every caption once, cleaned as for training, with where it comes from: the original ones first."""
    return dict.fromkeys(cleaned(own), "own") | dict.fromkeys(cleaned(original), "original")


def draw(seed: int, index: Any, captions: int) -> list[list[float]]:
    """The numbers by which the captions of a sample are sampled: of its place in the data alone."""
    return np.random.default_rng([seed, *_flat(index)]).random((captions, NEW_TOKENS)).tolist()


def _flat(index: Any) -> list[int]:
    return [number for part in index for number in _flat(part)] if isinstance(index, tuple) else [index]


def parts(source: Source, size: int) -> Iterator[tuple[int, Iterator[Any]]]:
    """Number and indices of each part: `size` samples, or one tar; what is not asked for is not opened."""
    inner = source.source if isinstance(source, sources.Prompted) else source
    shards = getattr(inner, "shards", None)
    if shards is not None:
        for shard in range(len(shards)):
            yield shard, ((shard, place) for shard in [shard] for place in range(shards.count(shard)))
        return
    everything, number = indices(source), 0
    while chunk := list(islice(everything, size)):
        yield number, iter(chunk)
        number += 1


def _total(source: Source, size: int, number: int, of: int) -> int | None:
    """Samples of a shard; of tars that nobody has counted it is not known."""
    if getattr(getattr(source, "source", source), "shards", None) is not None:
        return None
    count = len(source)
    return sum(min(size, count - first) for first in range(number * size, count, of * size))


def open_data(words: Sequence[str], output: Path) -> Source:
    """The source that `choose_data` names. Raises UsageError: it cannot be used."""
    return sources.for_run(choose_data(words), str(output))


def choose_data(words: Sequence[str]) -> Choice:
    """A folder, a file of JSON lines, tars, the `data.train` of a configuration, or options of a source as `key=value`.

    Raises:
        UsageError: nothing of these, or options that the source does not have.
    """
    first = words[0]
    key, equals, _ = first.partition("=")
    if len(words) > 1 or (equals and key.isidentifier() and not Path(first).exists()):
        named = {"name": "jsonl"} | pairs(list(words))
    elif first.startswith("pipe:") or "://" in first or ".tar" in first:
        named = {"name": "webdataset", "path": first}
    elif first.endswith((".yaml", ".yml")):
        named = load_config(first).data.train.model_dump()
    elif Path(first).is_dir():
        tars = any(Path(first).glob("*.tar"))
        named = {"name": "webdataset", "path": f"{first}/*.tar"} if tars else {"name": "folder", "path": first}
    elif first.lower().endswith(tuple(SUFFIXES | UNREAD)):
        raise UsageError(
            f"'{first}' is one picture; give the folder that holds it, or a list of pictures in JSON lines"
        )
    else:
        named = {"name": "jsonl", "path": first}
    choice = Choice(**named)
    sources.check(choice.name, choice.options)
    return choice


def _settle(settings: Settings, output: Path, source: Source) -> Settings:
    """With the checkpoints that are meant now and the format; those of an earlier run of this folder, if they agree."""
    models = [
        path if checkpoint.is_foreign(path) else str(checkpoint.find(path))
        for path in (settings.captioner, settings.ranker)
    ]
    file = output / SETTINGS
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = None
    form = settings.form or (before or {}).get("form") or _form(source)
    if form not in FORMS:
        raise UsageError(f"the format is '{form}'; known are {', '.join(FORMS)}")
    settings = replace(settings, form=form, captioner=models[0], ranker=models[1])
    if before is None:
        with writing(output):
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")
            os.replace(partial, file)
    elif other := [name for name, value in asdict(settings).items() if before.get(name) != value]:
        raise UsageError(
            f"'{output}' was begun with {other[0]} {before.get(other[0])!r}, not {getattr(settings, other[0])!r}; "
            "give the same, or another folder"
        )
    return settings


def _form(source: Source) -> str:
    """JSON lines where images are files, tars where they are in tars themselves, or drawn."""
    for index in islice(indices(source), LOOK):
        try:
            return "jsonl" if isinstance(source[index].image, Path) else "webdataset"
        except BadSample as bad:
            last = bad
    raise UsageError(f"none of the first {LOOK} samples can be used ({last}); check the data")


def _share(shard: str | None) -> tuple[int, int]:
    """Number of this process, and of how many."""
    if shard is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    number, slash, of = shard.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise UsageError(f"the shard is '{shard}'; write i/n with i from 0 to n - 1, such as 0/8")
    return int(number), int(of)


def _progress(show: bool) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(
        TextColumn("{task.description}"),
        *columns,
        TextColumn("{task.fields[speed]}"),
        console=console,
        disable=not show,
    )
