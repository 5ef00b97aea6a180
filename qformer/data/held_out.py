"""Images of a benchmark with all their captions, listed first and then read in groups to save memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformer.data.base import indices
from qformer.data.texts import answers_of, clean_question, usable_captions
from qformer.types import BadSample, Sample, Tiles, UsageError
from qformer.videos.rows import cut_row, glance, read_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.resolution.base import ResolutionStrategy


@dataclass
class ImageRecord:
    """Image: its index in the source, its name in messages, its captions from `usable_captions`, and its identity."""

    index: Any
    key: str
    captions: list[str]
    image_id: str | int = ""

    def read(self, source: Source) -> Tensor:
        """Read the image, uint8[3, h, w]; several of one record stand side by side, see `glance`.

        Raises:
            BadSample: the image cannot be read.
        """
        return glance(source[self.index].image)


@dataclass
class Group:
    """Images that are encoded together: `numbers` of those that could be read, and records of the others."""

    numbers: list[int]
    tiles: Tiles | None
    skipped: list[dict[str, Any]]


def list_images(source: Source, limit: int | None = None) -> tuple[list[ImageRecord], list[dict[str, Any]]]:
    """List the first `limit` images of a source, and the records that cannot be used, without reading the images.

    Records of the same image, such as a line for each caption, are merged.

    Raises:
        UsageError: no record can be used.
    """
    listed: list[ImageRecord] = []
    skipped: list[dict[str, Any]] = []
    by_id: dict[str | int, ImageRecord] = {}
    for index in indices(source):
        try:
            sample = source[index]
            captions = usable_captions(sample)
        except BadSample as bad:
            skipped.append(_record(index, bad))
            continue
        if sample.image_id in by_id:
            by_id[sample.image_id].captions += captions
            continue
        if len(listed) == limit:
            break
        listed.append(ImageRecord(index, sample.key, captions, sample.image_id))
        by_id[sample.image_id] = listed[-1]
    if not listed:
        raise UsageError(f"none of the {len(skipped)} records could be used ({skipped[:3]}); check --data")
    return listed, skipped


def read_groups(
    source: Source, listed: Sequence[ImageRecord], strategy: ResolutionStrategy, groups: Sequence[range]
) -> Iterator[Group]:
    """Read groups of images, not augmented; the next group is read while the caller works on one."""

    def read(numbers: range) -> Group:
        rows, group = [], Group([], None, [])
        for number in numbers:
            try:
                rows.append(_read(source[listed[number].index], strategy))
                group.numbers.append(number)
            except BadSample as bad:
                group.skipped.append(_record(listed[number].index, bad))
        group.tiles = Tiles.join(rows) if rows else None
        return group

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, groups[0]) if groups else None
        for following in [*groups[1:], None]:
            if coming is not None:
                done = coming.result()
                coming = None if following is None else ahead.submit(read, following)
                yield done


def _read(sample: Sample, strategy: ResolutionStrategy) -> Tiles:
    return cut_row(read_row(sample.image, strategy), strategy)


def _record(index: Any, bad: BadSample) -> dict[str, Any]:
    return {"index": str(index), "kind": bad.kind, "detail": bad.detail}


@dataclass
class HeldOut:
    """Held-out data in memory: images as tiles in groups, with all captions of each image.

    Attributes:
        groups: tiles of the images, `batch` images each: pixels, or tokens (`qformer.stages.features`).
        captions: captions of each image from `usable_captions`, or the answers of a question without captions.
        samples: one sample for each image or question.
        skipped: records that could not be used.
    """

    groups: Sequence[Tiles]
    captions: list[list[str]]
    samples: list[Sample]
    skipped: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def asks(self) -> bool:
        """True if all samples are questions with answers."""
        return all(map(answers_of, self.samples))

    def questions(self, start: int, stop: int) -> list[str]:
        """Get the cleaned questions of samples `start` to `stop`."""
        return [clean_question(sample.question or "") for sample in self.samples[start:stop]]


def held_out(source: Source, strategy: ResolutionStrategy, limit: int | None, batch: int) -> HeldOut:
    """Read the first `limit` usable images of a source, not augmented, with all their captions.

    Records of the same image are merged, as in `qformer eval`, except for questions. Reading stops at the first record
    of a further image.

    Raises:
        UsageError: no record can be used.
    """
    groups: list[Tiles] = []
    held = HeldOut(groups, [], [], [])
    rows: list[Tiles] = []
    known: dict[str | int, list[str]] = {}  # captions by image id
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
            rows.append(_read(sample, strategy))
        except BadSample as bad:
            held.skipped.append(_record(index, bad))
            continue
        held.samples.append(sample)
        held.captions.append(captions)
        if not asks:
            known[sample.image_id] = captions
        if len(rows) == batch:
            groups.append(Tiles.join(rows))
            rows = []
    if rows:
        groups.append(Tiles.join(rows))
    if not held.samples:
        raise UsageError(
            f"none of the {len(held.skipped)} validation samples could be used ({held.skipped[:3]}); "
            "check data.validation"
        )
    return held
