"""From a source to training batches, as a pure function of (seed, number of the batch).

Which sample stands at position p of the endless stream is a function of (seed, p) (`qformer.data.orders`); so are the
caption that is drawn, where an encoder-decoder cuts it, crop and mirror. So a batch is the same whatever the number of
workers, and a resumed run reads on exactly where it stopped. A bad sample is replaced by another drawn from the same
seed, counted and recorded; it never ends the stream by itself.
"""

from __future__ import annotations

import json
import signal
from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from qformer import distributed
from qformer.cleaning import clean_caption, clean_question, is_mangled
from qformer.data.columns import columns_of
from qformer.data.orders import extent_of, indices, number_of, order_of
from qformer.data.transforms import augment
from qformer.files.records import Form, read_lines, replace_records
from qformer.images import read_image
from qformer.resolution.base import cut_all
from qformer.types import BadSample, Batch, Sample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from qformer.data.features import FeatureStore
    from qformer.data.sources import Source
    from qformer.resolution.base import ResolutionStrategy
    from qformer.schema import DataConfig

REPLACEMENTS = 50  # tries for one place in a batch; with a fifth of all samples bad, 50 misses do not happen
WINDOW = 1000
#: What asks a run to end, as far as the system has it: Ctrl-C, `kill` and schedulers, a terminal that closes, Slurm.
ENDING = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if name in signal.Signals.__members__
)
Item = TypeVar("Item")


@dataclass
class Loaded:
    """A batch, the keys of its samples, and the samples that were skipped on the way to it.

    A record of `skipped` has `batch` and `position` (of the stream), `index` (in the source), `kind` and `detail`;
    `replacement` says that it was drawn for another bad sample, not met at its own place in the epoch.
    """

    batch: Batch
    keys: list[str]
    skipped: list[dict[str, Any]]


@dataclass
class Batches(Dataset[Loaded]):
    """Batch number i of a run, made from nothing but the seed and i. With a `store` its tokens replace the pixels."""

    source: Source
    strategy: ResolutionStrategy
    data: DataConfig
    seed: int
    store: FeatureStore | None = None

    def __post_init__(self) -> None:
        self._order = order_of(self.source, (self.seed,))
        self.extent = extent_of(self._order)

    def __getitem__(self, number: int) -> Loaded:
        tiles: list[Tiles] = []
        samples: list[Sample] = []
        texts: list[str] = []
        drawn: list[str] = []
        cuts: list[float] = []
        skipped: list[dict[str, Any]] = []
        for position in range(number * self.data.batch, (number + 1) * self.data.batch):
            rng = np.random.default_rng([self.seed, position])
            image, sample, text, answer = self._good_sample(position, rng, skipped)
            cuts.append(float(rng.random()))  # the last of a position's draws
            tiles.append(image)
            samples.append(sample)
            texts.append(text)
            drawn.append(answer)
        asked = all(drawn)
        batch = Batch(
            tiles=Tiles.join(tiles),
            text=texts,
            image_id=[sample.image_id for sample in samples],
            question=[clean_question(sample.question or "") for sample in samples] if asked else None,
            answers=[sample.answers for sample in samples] if asked else None,
            answer=drawn if asked else None,
            cuts=cuts,
        )
        return Loaded(batch, [sample.key for sample in samples], [{"batch": number, **record} for record in skipped])

    def _good_sample(
        self, position: int, rng: np.random.Generator, skipped: list[dict[str, Any]]
    ) -> tuple[Tiles, Sample, str, str]:
        """What stands at a position: the image, its record, and the caption and the answer that are drawn."""
        others = islice(self._order.others(position, rng), REPLACEMENTS - 1)
        for tries, index in enumerate(chain([self._order.at(position)], others)):
            try:
                sample = self.source[index]
                text, answer = draw_texts(sample, rng)
                return self._see(index, sample, rng), sample, text, answer
            except BadSample as bad:
                record = {"position": position, "index": str(index), "kind": bad.kind, "detail": bad.detail}
                skipped.append(record | ({"replacement": True} if tries else {}))
        raise UsageError(
            f"{REPLACEMENTS} samples in a row could not be used, the last: {skipped[-1]}; check data.train"
        )

    def _see(self, index: Any, sample: Sample, rng: np.random.Generator) -> Tiles:
        """A random crop of the image, cut into tiles."""
        if self.store is not None:
            crop = int(rng.integers(self.store.crops))
            return self.store.read(number_of(self.source, index), crop, sample, self.strategy)
        return cut_all([augment(read_image(sample.image), self.data.crop, self.data.flip, rng)], self.strategy)


def draw_texts(sample: Sample, rng: np.random.Generator) -> tuple[str, str]:
    """One of the captions, as `usable_captions` gives them, and one of the answers to the question.

    Each answer is as likely as it was often given (open answers of VQAv2, as in the original). Where there are no
    captions the answer stands in for one; where nothing is asked it is empty.

    Raises:
        BadSample: kind `no caption`, nothing is left after cleaning; `no answer`, a question without one; `not utf-8`,
            characters were lost before the text came here.
    """
    if sample.question is not None and any(map(is_mangled, [sample.question, *sample.answers])):
        raise BadSample("not utf-8", sample.key)
    answers = answers_of(sample)
    answer = answers[int(rng.integers(len(answers)))] if len(answers) > 1 else "".join(answers)
    if sample.question is not None and not sample.captions:
        if not answer:
            raise BadSample("no answer", _told(sample))
        return answer, answer
    captions = usable_captions(sample)
    return captions[int(rng.integers(len(captions)))], answer


def answers_of(sample: Sample) -> list[str]:
    """What was answered, repetitions kept; nothing where nothing is asked."""
    return [answer for answer in sample.answers if answer.strip()] if sample.question is not None else []


def usable_captions(sample: Sample) -> list[str]:
    """The captions that can be used, cleaned, behind the prompt of their source.

    Raises:
        BadSample: kind `no caption`: none has a letter or a digit; `not utf-8`: those that have are mangled.
    """
    captions = cleaned(sample.captions)
    if not captions:
        raise BadSample("not utf-8" if any(map(is_mangled, sample.captions)) else "no caption", _told(sample))
    return [f"{sample.prompt} {caption}" if sample.prompt else caption for caption in captions]


def _told(sample: Sample) -> str:
    """Which record lacks something, and what it has instead."""
    return f"{sample.key}; {columns_of(sample.facts)}" if sample.facts else sample.key


def cleaned(captions: list[str]) -> list[str]:
    """Those of the captions that are whole and have a letter or a digit, cleaned."""
    whole = [caption for caption in captions if not is_mangled(caption)]
    return [clean for clean in map(clean_caption, whole) if any(map(str.isalnum, clean))]


class SkippedLine(Form):
    """A line of `skipped.jsonl`."""

    batch: int
    kind: str


class Skipped:
    """Counts what was skipped, writes `skipped.jsonl`, and stops a run whose data are mostly bad.

    Each of several processes does so for what it reads; rank 1 writes `skipped-1.jsonl`.
    """

    def __init__(self, folder: Path, max_bad: float) -> None:
        rank = distributed.rank()
        self.path = folder / (f"skipped-{rank}.jsonl" if rank else "skipped.jsonl")
        self.max_bad = max_bad
        self.kinds: Counter[str] = Counter()
        self._window: deque[bool] = deque(maxlen=WINDOW)

    def forget_from(self, batch: int) -> None:
        """Take over what an interrupted run has recorded, less the batches from this one on, which are made again."""
        if not self.path.is_file():
            return
        kept = [record for record in read_lines(self.path, SkippedLine) if record["batch"] < batch]
        replace_records(self.path, kept)
        self.kinds = Counter(record["kind"] for record in kept if "replacement" not in record)

    def add(self, loaded: Loaded) -> None:
        """Record one batch. A sample is counted when it is met at its own place, not when it is drawn for another.

        Raises:
            UsageError: more than `max_bad` of the last 1,000 samples could not be used.
            OSError: it could not be written; it is counted all the same.
        """
        self._window.extend([True] * len(loaded.skipped) + [False] * len(loaded.keys))
        if not loaded.skipped:
            return
        self.kinds.update(record["kind"] for record in loaded.skipped if "replacement" not in record)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in loaded.skipped)
        bad = sum(self._window)
        if len(self._window) == WINDOW and bad > self.max_bad * WINDOW:
            raise UsageError(
                f"{bad} of the last {WINDOW} samples could not be used ({self.summary()}), more than data.max_bad "
                f"{self.max_bad:.0%}; see {self.path} and mend the data or raise data.max_bad"
            )

    def summary(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())


def training_batches(batches: Dataset[Loaded], workers: int, start: int, stop: int) -> Iterator[Loaded]:
    """Batches `start` to `stop`, made ahead of time by `workers` processes; 0 makes them in this one.

    Of W processes that train together number i of rank r is item i * W + r: together they see what one process with
    batches W times as large would see.

    Raises:
        UsageError: of the source or of `Batches`.
    """
    world = distributed.world()
    yield from read_ahead(batches, workers, range(start * world + distributed.rank(), stop * world, world))


def read_ahead(items: Dataset[Item], workers: int, places: Iterable[int]) -> Iterator[Item]:
    """The items at these places, in order, made ahead of time by `workers` processes; 0 makes them in this one.

    Raises:
        UsageError: of the items; from a worker it arrives inside a traceback, of which it is the end.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # the loader draws a seed; from the global one a resumed run would draw it again
    )
    try:
        yield from loader
    except UsageError as error:
        *_, last = str(error).strip().splitlines()
        raise UsageError(last.removeprefix(f"{UsageError.__module__}.UsageError: ")) from error


def _leave_signals(_worker: int) -> None:
    """What ends a run is for its own process to handle: it finishes the step, for which it needs its workers."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Held:
    """Held-out data, whole: images as tiles in groups, every caption of each image, on however many records they stand.

    Attributes:
        groups: the tiles of the images, `batch` images each.
        captions: the captions of each image, as `usable_captions` gives them, or the answers to a question without.
        samples: the records of the images. skipped: what could not be used.
    """

    groups: list[Tiles]
    captions: list[list[str]]
    samples: list[Sample]
    skipped: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def asks(self) -> bool:
        """Whether all are questions with answers."""
        return all(map(answers_of, self.samples))

    def questions(self, start: int, stop: int) -> list[str]:
        """Those of the samples from `start` to `stop`, cleaned."""
        return [clean_question(sample.question or "") for sample in self.samples[start:stop]]


def held_out(source: Source, strategy: ResolutionStrategy, limit: int | None, batch: int) -> Held:
    """The first `limit` usable images of a source, not augmented, with all their captions.

    Records of one image are one image, as in `qformer eval`; only questions about it stay apart. It ends where another
    image than those begins.

    Raises:
        UsageError: no record can be used.
    """
    held = Held([], [], [], [])
    images: list[Tensor] = []
    known: dict[str | int, list[str]] = {}  # the captions of each image
    for index in indices(source):
        try:
            sample = source[index]
            asks = bool(answers_of(sample))
            captions = usable_captions(sample) if sample.captions or not asks else answers_of(sample)
            if not asks and sample.image_id in known:
                known[sample.image_id] += captions
                continue
            if len(held) == limit:
                break
            images.append(read_image(sample.image))
        except BadSample as bad:
            held.skipped.append({"index": str(index), "kind": bad.kind, "detail": bad.detail})
            continue
        held.samples.append(sample)
        held.captions.append(captions)
        if not asks:
            known[sample.image_id] = captions
        if len(images) == batch:
            held.groups.append(cut_all(images, strategy))
            images = []
    if images:
        held.groups.append(cut_all(images, strategy))
    if not held.samples:
        raise UsageError(
            f"none of the {len(held.skipped)} validation samples could be used ({held.skipped[:3]}); "
            "check data.validation"
        )
    return held
