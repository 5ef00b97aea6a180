"""Training batches from a source, as a pure function of (seed, number of the batch).

The sample at position p of the endless stream is a function of (seed, p) (`qformer.data.orders`), and so are its
caption, the cut of the caption for an encoder-decoder, crop and flip. Batches do not depend on the number of workers,
and a resumed run continues exactly where it stopped. A bad sample is counted, recorded and replaced by another that is
drawn from the same seed; it never ends the stream by itself.
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
from qformer.data.base import number_of, order_of
from qformer.data.orders import extent_of
from qformer.data.texts import clean_question, draw_texts
from qformer.data.transforms import augment
from qformer.files.records import Form, read_lines, replace_records
from qformer.types import BadSample, Batch, Sample, Tiles, UsageError
from qformer.videos.rows import cut_row, read_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qformer.data.base import Source
    from qformer.data.features import FeatureStore
    from qformer.resolution.base import ResolutionStrategy
    from qformer.schema import DataConfig

REPLACEMENTS = 50  # tries for one position; even with a fifth of all samples bad, 50 failures in a row do not happen
WINDOW = 1000
#: Signals that ask a run to end, if the system has them: Ctrl-C, `kill` and schedulers, a closed terminal, Slurm.
ENDING = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if name in signal.Signals.__members__
)
Item = TypeVar("Item")


@dataclass
class BatchRecord:
    """Batch, the keys of its samples, and records of the samples that were skipped.

    A record of `skipped` has `batch` and `position` (in the stream), `index` (in the source), `kind` and `detail`;
    `replacement` is set if the sample was drawn to replace another bad one, not at its own position in the epoch.
    """

    batch: Batch
    keys: list[str]
    skipped: list[dict[str, Any]]


@dataclass
class Batches(Dataset[BatchRecord]):
    """Data set whose item i is batch i of a run, a function of the seed and i; tokens of a `store` replace pixels."""

    source: Source
    strategy: ResolutionStrategy
    data: DataConfig
    seed: int
    store: FeatureStore | None = None

    def __post_init__(self) -> None:
        self._order = order_of(self.source, (self.seed,))
        self.extent = extent_of(self._order)

    def __getitem__(self, number: int) -> BatchRecord:
        tiles: list[Tiles] = []
        samples: list[Sample] = []
        texts: list[str] = []
        drawn: list[str] = []
        cuts: list[float] = []
        skipped: list[dict[str, Any]] = []
        for position in range(number * self.data.batch, (number + 1) * self.data.batch):
            rng = np.random.default_rng([self.seed, position])
            image, sample, text, answer = self._good_sample(position, rng, skipped)
            cuts.append(float(rng.random()))  # the last draw for a position
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
        return BatchRecord(
            batch, [sample.key for sample in samples], [{"batch": number, **record} for record in skipped]
        )

    def _good_sample(
        self, position: int, rng: np.random.Generator, skipped: list[dict[str, Any]]
    ) -> tuple[Tiles, Sample, str, str]:
        """Get image, record, drawn caption and drawn answer at a position, or those of a replacement if it is bad."""
        others = islice(self._order.others(position, rng), REPLACEMENTS - 1)
        for tries, index in enumerate(chain([self._order.at(position)], others)):
            try:
                sample = self.source[index]
                text, answer = draw_texts(sample, rng)
                return self._read_tiles(index, sample, rng), sample, text, answer
            except BadSample as bad:
                record = {"position": position, "index": str(index), "kind": bad.kind, "detail": bad.detail}
                skipped.append(record | ({"replacement": True} if tries else {}))
        last = " ".join(f"{record['kind']}: {record['detail']}".split())  # one line: workers hand on the last one
        raise UsageError(
            f"{REPLACEMENTS} samples in a row could not be used, the last ({record['index']}) for it is {last}; check "
            "data.train"
        )

    def _read_tiles(self, index: Any, sample: Sample, rng: np.random.Generator) -> Tiles:
        """Read a random crop of what the sample shows as tiles, or its stored tokens."""
        if self.store is not None:
            crop = int(rng.integers(self.store.crops))
            return self.store.read(number_of(self.source, index), crop, sample, self.strategy)
        row = read_row(sample.image, self.strategy)
        return cut_row(augment(row, self.data.crop, self.data.flip, rng), self.strategy)


class SkippedLine(Form):
    """Line of `skipped.jsonl`."""

    batch: int
    kind: str


class Skipped:
    """Counter of skipped samples, which writes `skipped.jsonl` and stops a run with too many bad samples.

    Each process counts its own samples; rank 1 writes `skipped-1.jsonl`.
    """

    def __init__(self, folder: Path, max_bad: float) -> None:
        rank = distributed.rank()
        self.path = folder / (f"skipped-{rank}.jsonl" if rank else "skipped.jsonl")
        self.max_bad = max_bad
        self.kinds: Counter[str] = Counter()
        self._window: deque[bool] = deque(maxlen=WINDOW)

    def forget_from(self, batch: int) -> None:
        """Load the records of an interrupted run, without those from `batch` on, which will be read again."""
        if not self.path.is_file():
            return
        kept = [record for record in read_lines(self.path, SkippedLine) if record["batch"] < batch]
        replace_records(self.path, kept)
        self.kinds = Counter(record["kind"] for record in kept if "replacement" not in record)

    def add(self, loaded: BatchRecord) -> None:
        """Record one batch. A sample is counted at its own position, not when it is drawn as a replacement.

        Raises:
            UsageError: more than `max_bad` of the last 1,000 samples could not be used.
            OSError: the record could not be written; the samples are counted anyway.
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
                f"{self.max_bad:.0%}; see {self.path} and fix the data or raise data.max_bad"
            )

    def summary(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())


def training_batches(batches: Dataset[BatchRecord], workers: int, start: int, stop: int) -> Iterator[BatchRecord]:
    """Yield batches `start` to `stop`, prefetched by `workers` processes; 0 reads them in this process.

    Among W processes, batch i of rank r is item i * W + r, so together they see the samples that a single process with
    W times larger batches would see.

    Raises:
        UsageError: from the source or from `Batches`.
    """
    world = distributed.world()
    yield from read_ahead(batches, workers, range(start * world + distributed.rank(), stop * world, world))


def read_ahead(items: Dataset[Item], workers: int, places: Iterable[int]) -> Iterator[Item]:
    """Yield the items at these indices in order, prefetched by `workers` processes; 0 reads them in this process.

    Raises:
        UsageError: from the items; one from a worker is extracted from its traceback.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # the loader draws a seed, which must not advance the global generator
    )
    try:
        yield from loader
    except UsageError as error:
        *_, last = str(error).strip().splitlines()
        raise UsageError(last.removeprefix(f"{UsageError.__module__}.UsageError: ")) from error


def _ignore_signals(_worker: int) -> None:
    """Ignore signals that end a run in workers: the main process handles them, and needs workers for its last step."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
