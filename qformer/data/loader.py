"""From a source to training batches, as a pure function of (seed, number of the batch).

Position p of the endless stream is sample `order[p % n]` of epoch `p // n`, the order shuffled anew each epoch. The
caption that is drawn, crop and mirror depend on (seed, position) alone. So a batch is the same whatever the number of
workers, and a resumed run reads on exactly where it stopped. A bad sample is replaced by another drawn from the same
seed, counted and recorded; it never ends the stream by itself.
"""

from __future__ import annotations

import json
import signal
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from qformer import distributed
from qformer.cleaning import clean_caption, clean_question
from qformer.data.transforms import augment
from qformer.images import read_image
from qformer.resolution.base import cut_all
from qformer.types import BadSample, Batch, Sample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.config import DataConfig
    from qformer.data.sources import Source
    from qformer.resolution.base import ResolutionStrategy

REPLACEMENTS = 50  # tries for one place in a batch; with a fifth of all samples bad, 50 misses do not happen
WINDOW = 1000


@dataclass
class Loaded:
    """A batch, the keys of its samples, and the samples that were skipped on the way to it."""

    batch: Batch
    keys: list[str]
    skipped: list[dict[str, str]]


@dataclass
class Batches(Dataset[Loaded]):
    """Batch number i of a run, made from nothing but the seed and i."""

    source: Source
    strategy: ResolutionStrategy
    data: DataConfig
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Loaded:
        images: list[Tensor] = []
        samples: list[Sample] = []
        texts: list[str] = []
        skipped: list[dict[str, str]] = []
        for position in range(number * self.data.batch, (number + 1) * self.data.batch):
            image, sample, text = self._good_sample(position, skipped)
            images.append(image)
            samples.append(sample)
            texts.append(text)
        asked = all(sample.question is not None for sample in samples)
        batch = Batch(
            tiles=cut_all(images, self.strategy),
            text=texts,
            image_id=[sample.key if sample.image_id is None else sample.image_id for sample in samples],
            question=[clean_question(sample.question or "") for sample in samples] if asked else None,
            answers=[sample.answers for sample in samples] if asked else None,
        )
        return Loaded(batch, [sample.key for sample in samples], skipped)

    def _good_sample(self, position: int, skipped: list[dict[str, str]]) -> tuple[Tensor, Sample, str]:
        rng = np.random.default_rng([self.seed, position])
        index = self._index(position)
        for _ in range(REPLACEMENTS):
            try:
                sample = self.source[index]
                text = draw_text(sample, rng)
                return augment(read_image(sample.image), self.data.crop, self.data.flip, rng), sample, text
            except BadSample as bad:
                skipped.append({"index": str(index), "kind": bad.kind, "detail": bad.detail})
            index = int(rng.integers(len(self.source)))
        raise UsageError(
            f"{REPLACEMENTS} samples in a row could not be used, the last: {skipped[-1]}; check data.train"
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = np.random.default_rng([self.seed, 1 << 32, epoch]).permutation(len(self.source))
        return int(self._orders[epoch][place])


def draw_text(sample: Sample, rng: np.random.Generator) -> str:
    """One of the captions, cleaned; the first answer of a question without captions.

    Raises:
        BadSample: kind `no caption`, nothing is left after cleaning; `no answer`, a question without one.
    """
    if sample.question is not None and not sample.captions:
        if not sample.answers:
            raise BadSample("no answer", sample.key)
        return sample.answers[0]
    captions = [clean for clean in map(clean_caption, sample.captions) if clean]
    if not captions:
        raise BadSample("no caption", sample.key)
    return captions[int(rng.integers(len(captions)))]


class Skipped:
    """Counts what was skipped, writes `skipped.jsonl`, and stops a run whose data are mostly bad."""

    def __init__(self, folder: Path, max_bad: float) -> None:
        rank = distributed.rank()
        self.path = folder / (f"skipped-{rank}.jsonl" if rank else "skipped.jsonl")
        self.max_bad = max_bad
        self.kinds: Counter[str] = Counter()
        self._window: deque[bool] = deque(maxlen=WINDOW)

    def add(self, loaded: Loaded) -> None:
        """Record one batch.

        Raises:
            UsageError: more than `max_bad` of the last 1,000 samples could not be used.
        """
        self._window.extend([True] * len(loaded.skipped) + [False] * len(loaded.keys))
        if not loaded.skipped:
            return
        self.kinds.update(record["kind"] for record in loaded.skipped)
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
        UsageError: of the source or of `Batches`; from a worker it arrives inside a traceback, of which it is the end.
    """
    world = distributed.world()
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start * world + distributed.rank(), stop * world, world),
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Held:
    """Held-out data, whole: images as tiles in groups, every caption of each image.

    Attributes:
        groups: the tiles of the images, `batch` images each.
        captions: the cleaned captions of each image.
        samples: the records of the images. skipped: what could not be used.
    """

    groups: list[Tiles]
    captions: list[list[str]]
    samples: list[Sample]
    skipped: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.samples)


def held_out(source: Source, strategy: ResolutionStrategy, limit: int | None, batch: int) -> Held:
    """The first `limit` usable images of a source, not augmented, with all their captions."""
    held = Held([], [], [], [])
    images: list[Tensor] = []
    for index in range(len(source)):
        if limit is not None and len(held) == limit:
            break
        try:
            sample = source[index]
            captions = [clean for clean in map(clean_caption, sample.captions) if clean]
            if not captions:
                raise BadSample("no caption", sample.key)
            image = read_image(sample.image)
        except BadSample as bad:
            held.skipped.append({"index": str(index), "kind": bad.kind, "detail": bad.detail})
            continue
        images.append(image)
        held.samples.append(sample)
        held.captions.append(captions)
        if len(images) == batch:
            held.groups.append(cut_all(images, strategy))
            images = []
    if images:
        held.groups.append(cut_all(images, strategy))
    if not held.samples:
        raise UsageError(
            f"none of the {len(source)} validation samples could be used ({held.skipped[:3]}); check data.validation"
        )
    return held
