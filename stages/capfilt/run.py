"""`qformer capfilt`: write captions for web images and filter them (BLIP, arXiv:2201.12086; BLIP-2, section 3.4).

Every image is captioned several times by nucleus sampling. These own captions and the original ones are ranked by their
similarity to the image, and the best few are kept; training draws one of them each time.

The data is split into parts (n samples, or a tar), and a part into blocks of images that go through the models
together. A part is a function of seed and data alone, so several processes write the same files as one. A journal has a
line for each block, so a `kill -9` costs one block (`capfilt.files`). If the data changes before the run is continued,
results are kept with their records, and only new records are processed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qformer import devices, distributed
from qformer.checkpoints import folder as checkpoint
from qformer.data import sources
from qformer.data.arguments import open_data
from qformer.data.base import indices
from qformer.data.texts import cleaned, without_mangled
from qformer.files.records import Form, read_object, replace_text, writing
from qformer.images import read_image
from qformer.progress import Bar, console
from qformer.retrieval.embedders import load_embedder
from qformer.stages.capfilt.files import FORMS, Part, beyond, finish_all, recall
from qformer.stages.capfilt.models import NEW_TOKENS, load_captioner
from qformer.stages.evaluate.settings import AUTOCAST
from qformer.types import BadSample, UsageError
from qformer.videos.rows import only_picture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.retrieval.embedders import Embedder
    from qformer.stages.capfilt.models import Captioner
    from qformer.types import Sample

LOOK = 100  # samples to try until one can be used
SETTINGS = "capfilt.json"


@dataclass(frozen=True)
class Settings:
    """Settings that determine the result; a run continues only with the same ones. See `qformer capfilt --help`."""

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
    settings: Settings, output: Path, *, shard: str | None = None, device: str | None = None, trust: bool = False
) -> None:
    """Caption and filter the data, or continue an interrupted run.

    Args:
        shard: `i/n`, the share of this process; None takes it from torchrun.
        trust: allow both models to run the code that they name.

    Raises:
        UsageError: data or models that cannot be used, a folder that was started with other settings, or a full disk.
    """
    number, of = _share(shard)
    with writing(output):
        (output / "work").mkdir(parents=True, exist_ok=True)
    source = open_data(settings.data, output)
    settings = _settle(settings, output, source)
    if device is None and torch.cuda.is_available() and of > 1 and shard is None:
        device = f"cuda:{distributed.local_rank()}"
    run = Run(settings, output, source, str(devices.choose(device)), trust)
    show = shard is not None or number == 0  # with torchrun, only one process prints
    finished = []
    with Bar("{task.fields[speed]}", console=console, disable=not show) as progress:
        task = progress.add_task("captions", total=_total(source, settings.part, number, of), speed="")
        run.report = lambda count, speed: progress.update(task, advance=count, speed=speed)
        for place, members, digest in parts(source, settings.part):
            part = Part(output, place, str(settings.form))
            if place % of == number:
                run.make(part, members, digest)
            finished.append(part)
    left = [part for part in finished if not part.is_made()]
    if left:
        if show:
            done = len(finished) - len(left)
            console.print(f"{done} of {len(finished)} parts are done; other processes make the rest")
        return
    with writing(output):
        for part in beyond(output, len(finished), str(settings.form)):
            part.remove()
    finish_all(output, finished)


@dataclass
class Run:
    """A run in progress; its models are loaded when there is work for them."""

    settings: Settings
    output: Path
    source: Source
    device: str
    trust: bool = False
    report: Any = None
    made: int = 0
    start: float = field(default_factory=time.perf_counter)

    @cached_property
    def captioner(self) -> Captioner:
        settings = self.settings
        return load_captioner(settings.captioner, self.device, settings.prompt, settings.top_p, self.trust)

    @cached_property
    def ranker(self) -> Embedder:
        return load_embedder(self.settings.ranker, self.device, self.trust)

    @cached_property
    def _made_before(self) -> dict[str, dict[str, Any]]:
        """Results of all parts from before the data changed; read only if it did."""
        return recall(self.output)

    def make(self, part: Part, members: Iterator[Any], digest: str | None) -> None:
        """Caption the samples with these indices, unless the part is complete or another process makes it.

        Args:
            digest: the digest of the records, if it is known without reading them.
        """
        samples = list(members) if digest is None or not part.is_of(digest) else []
        marks = _apart([self._mark(index) for index in samples])
        digest = digest or _digest(marks)
        with part.claimed(digest) as mine:
            if not mine:
                if part.is_made():
                    self.report(part.stats()["samples"], "")
                return
            known = part.resume()
            if part.is_made() or known.keys() - {*marks} or "_made_before" in self.__dict__:
                known = self._made_before | known
            self._fill(part, samples, marks, known)
            part.finish(self.source, samples, digest)

    def _fill(self, part: Part, samples: list[Any], marks: list[str], known: dict[str, dict[str, Any]]) -> None:
        """Make the results that are not `known` yet, block by block."""
        size = self.settings.batch
        blocks = [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
        todo = [[place for place in block if marks[place] not in known] for block in blocks]
        with ThreadPoolExecutor(1) as ahead:  # decodes the next block while the models read this one
            coming = ahead.submit(self._read, samples, todo[0]) if todo else None
            for number, block in enumerate(blocks):
                assert coming is not None
                read, skipped = coming.result()
                if number + 1 < len(blocks):
                    coming = ahead.submit(self._read, samples, todo[number + 1])
                if read:
                    made = self._filter(read, samples, marks)
                    part.add(made)
                    known |= {one["mark"]: one for one in made}
                found = [known[marks[place]] | {"place": place} for place in block if marks[place] in known]
                part.records += [one for one in found if "kind" not in one]
                part.skipped += skipped
                part.skipped += [_skipped(samples[one["place"]], one) for one in found if "kind" in one]
                ahead.submit(part.show, self.source, samples).result()  # one thread reads the source, not two
                self._report_speed(len(block), len(read))

    def _mark(self, index: Any) -> str:
        """Identify a record by its captions and its image (path, size and time, or bytes), or by its fault."""
        try:
            sample = self.source[index]
            image = only_picture(sample)
        except BadSample as bad:
            return f"{bad.kind}: {bad.detail}"
        seen = _of_file(image).encode() if isinstance(image, Path) else bytes(image)
        return _digest([hashlib.blake2b(seen, digest_size=16).hexdigest(), *sample.captions])

    def _read(
        self, samples: list[Any], block: list[int]
    ) -> tuple[list[tuple[int, Sample, Tensor]], list[dict[str, Any]]]:
        """Read the samples at these places with their pixels; also returns the records of those that are skipped."""
        read, skipped = [], []
        for place in block:
            try:
                sample = self.source[samples[place]]
                read.append((place, sample, read_image(only_picture(sample))))
            except BadSample as bad:
                skipped.append(_skipped(samples[place], {"kind": bad.kind, "detail": bad.detail}))
        return read, skipped

    def _filter(
        self, read: list[tuple[int, Sample, Tensor]], samples: list[Any], marks: list[str]
    ) -> list[dict[str, Any]]:
        """Make the journal entries of a block: each image with all its captions, the best first, or a reason."""
        settings, made = self.settings, []
        images = [image for _, _, image in read]
        draws = [row for place, _, _ in read for row in draw(settings.seed, samples[place], settings.captions)]
        dtype = AUTOCAST.get(settings.precision)
        with torch.autocast(torch.device(self.device).type, dtype) if dtype else nullcontext():
            own = self.captioner(images, draws)
            texts = []
            for row, (_, sample, _) in enumerate(read):
                written = own[row * settings.captions : (row + 1) * settings.captions]
                texts.append(candidates(sample.captions, written))
            ranked = self.ranker(images, [list(one) for one in texts]) if any(texts) else [[] for _ in texts]
        for (place, sample, _), captions, scores in zip(read, texts, ranked, strict=True):
            one: dict[str, Any] = {"mark": marks[place], "key": sample.key}
            fault = "no caption" if not captions else "no score" if not all(map(math.isfinite, scores)) else None
            if fault is not None:
                made.append(one | {"kind": fault, "detail": sample.key})
                continue
            best = sorted(zip(captions, scores, captions.values(), strict=True), key=lambda one: -one[1])
            rows = [[text, round(score, 5), origin] for text, score, origin in best]
            one |= {"kept": rows[: settings.keep], "dropped": rows[settings.keep :]}
            made.append(one | {"cut": self.ranker.too_long(list(captions))})
        return made

    def _report_speed(self, count: int, new: int) -> None:
        self.made += new
        self.report(count, f"{self.made / (time.perf_counter() - self.start):.1f} images/s")


def candidates(original: list[str], own: list[str]) -> dict[str, str]:
    """Map every caption, cleaned as for training, to its origin; a caption of both is an original one."""
    return dict.fromkeys(cleaned([*map(without_mangled, own)]), "own") | dict.fromkeys(cleaned(original), "original")


def draw(seed: int, index: Any, captions: int) -> list[list[float]]:
    """Draw the random numbers for sampling the captions of a sample; they depend on seed and index alone."""
    return np.random.default_rng([seed, *_flat(index)]).random((captions, NEW_TOKENS)).tolist()


def _flat(index: Any) -> list[int]:
    return [number for part in index for number in _flat(part)] if isinstance(index, tuple) else [index]


def _skipped(index: Any, fault: dict[str, Any]) -> dict[str, Any]:
    return {"index": str(index), "kind": fault["kind"], "detail": fault["detail"]}


def _apart(marks: list[str]) -> list[str]:
    """Append a number to each mark, so that equal records have different marks."""
    seen: Counter[str] = Counter()
    found = []
    for mark in marks:
        found.append(f"{mark}.{seen[mark]}")
        seen[mark] += 1
    return found


def _of_file(image: Path) -> str:
    """Identify a file by path, size and time, so that an image replaced under its name counts as new."""
    try:
        found = image.stat()
    except OSError:  # reading the image will report it
        return os.path.abspath(image)
    return f"{os.path.abspath(image)} {found.st_size} {found.st_mtime_ns}"


def _digest(words: list[str]) -> str:
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()


def parts(source: Source, size: int) -> Iterator[tuple[int, Iterator[Any], str | None]]:
    """Yield the number and the indices of each part, which is `size` samples or one tar; tars are opened lazily.

    For a tar, the third value is a digest of its name, size and time; otherwise it is None.
    """
    inner = source.source if isinstance(source, sources.Prompted) else source
    shards = getattr(inner, "shards", None)
    if shards is not None:
        for shard, name in enumerate(shards.names):
            found = os.stat(name) if os.path.isfile(name) else None
            version = [] if found is None else [str(found.st_size), str(found.st_mtime_ns)]
            members = ((shard, place) for shard in [shard] for place in range(shards.count(shard)))
            yield shard, members, _digest([name, *version])
        return
    everything, number = indices(source), 0
    while chunk := list(islice(everything, size)):
        yield number, iter(chunk), None
        number += 1


def _total(source: Source, size: int, number: int, of: int) -> int | None:
    """Count the samples of this process; None for tars, which are not counted in advance."""
    if getattr(getattr(source, "source", source), "shards", None) is not None:
        return None
    count = len(source)
    return sum(min(size, count - first) for first in range(number * size, count, of * size))


def _settle(settings: Settings, output: Path, source: Source) -> Settings:
    """Fill in the checkpoints and the format, and compare them with an earlier run in this folder.

    Raises:
        UsageError: an unknown format, or a setting that differs from the earlier run.
    """
    models = [
        path if checkpoint.is_foreign(path) else str(checkpoint.find(path))
        for path in (settings.captioner, settings.ranker)
    ]
    file = output / SETTINGS
    before = _begun(file) if file.exists() else None
    form = settings.form or (before or {}).get("form") or _form(source)
    if form not in FORMS:
        raise UsageError(f"the format is '{form}'; give one of {', '.join(FORMS)}")
    settings = replace(settings, form=form, captioner=models[0], ranker=models[1])
    if before is None:
        with writing(output):
            replace_text(file, json.dumps(asdict(settings), indent=1), shared=True)
    elif other := [name for name, value in asdict(settings).items() if before.get(name) != value]:
        raise UsageError(
            f"'{output}' was started with {other[0]} {before.get(other[0])!r}, not {getattr(settings, other[0])!r}; "
            "give the same value, or another folder"
        )
    return settings


def _begun(file: Path) -> dict[str, Any]:
    """Read the settings of an earlier run.

    Raises:
        UsageError: they are damaged.
    """
    try:
        return read_object(file, Form)
    except UsageError as error:
        raise UsageError(f"{error}, so the settings of this folder are unknown; give another one with -o") from error


def _form(source: Source) -> str:
    """Choose the format: JSON lines if images are files, tars if they come from tars or are drawn."""
    for index in islice(indices(source), LOOK):
        try:
            return "jsonl" if isinstance(source[index].image, Path) else "webdataset"
        except BadSample as bad:
            last = bad
    raise UsageError(f"none of the first {LOOK} samples can be used ({last}); check the data")


def _share(shard: str | None) -> tuple[int, int]:
    """Return the number of this process and the number of processes."""
    if shard is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    number, slash, of = shard.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise UsageError(f"the shard is '{shard}'; give i/n with i from 0 to n - 1, such as 0/8")
    return int(number), int(of)
