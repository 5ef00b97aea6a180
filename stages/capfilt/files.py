"""The files of `qformer capfilt`: parts that training reads, their journals, and a summary.

Results are identified by the input record they were made from, so the data can change between runs (`Part.is_of`,
`recall`).

captions-00003.jsonl   or .tar: a part, with one line, or image and texts, for each image
work/                  journals with the results for each record, and the counts of finished parts
sheet.png              some images of the first part with all their captions
skipped.jsonl, summary.json   written for all parts when the last one is done
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from rich.table import Table

from qformer.data.shards import add_member
from qformer.files.records import Form, read_lines, read_object, replace_records, replace_text, replacing, writing
from qformer.formats import FORMATS
from qformer.images import read_file, read_head, read_image
from qformer.progress import console
from qformer.types import BadSample, UsageError
from qformer.videos.rows import only_picture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qformer.data.base import Source

FORMS = {"jsonl": ".jsonl", "webdataset": ".tar"}
ORIGINS = ("own", "original")
SHOWN = 12  # images on the sheet


class Ranked(Form):
    """An image with all its captions, each with its score and its origin."""

    kept: list[list[str | float]]
    dropped: list[list[str | float]]
    cut: int
    mark: str = ""
    key: str = ""


class Faulty(Form):
    """An image without captions, and the reason."""

    kind: str
    detail: str
    mark: str = ""


class Block(Form):
    """A line of a journal."""

    records: list[Ranked | Faulty]


class Counts(Form):
    """The counts of a finished part; for each origin the number of kept captions and the sum of their scores."""

    samples: int
    images: int
    skipped: list[dict[str, Any]]
    cut: int
    own: list[float]
    original: list[float]


@dataclass
class Part:
    """A part of the result: a file, and a journal of the results that go into it.

    Attributes:
        records: results so far, in the order of the samples; `place` is the position among them.
        skipped: samples without a result, with the reason.
    """

    output: Path
    number: int
    form: str
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        name = f"captions-{self.number:05d}"
        self.file = self.output / f"{name}{FORMS[self.form]}"
        self.journal, self.counted, self.lock = (
            self.output / "work" / f"{name}{suffix}" for suffix in (".jsonl", ".json", ".lock")
        )

    def is_of(self, digest: str) -> bool:
        """Return True if the part is complete and was made from the records of this digest (old versions lack one)."""
        return self.is_made() and self.stats().get("of", digest) == digest

    def is_made(self) -> bool:
        """Return True if the part is complete, from any records; a part with damaged counts is made again."""
        try:
            return self.file.exists() and bool(self.stats())
        except UsageError:
            return False

    @contextmanager
    def claimed(self, digest: str) -> Iterator[bool]:
        """Lock the part; yields True if this process must make it, as nobody has made it or is making it."""
        if self.is_of(digest):
            yield False
            return
        lock = FileLock(self.lock)
        with writing(self.output), suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            yield False
            return
        try:
            yield not self.is_of(digest)
            self.lock.unlink(missing_ok=True)  # the next process to take the lock finds the part complete
        finally:
            lock.release()

    def resume(self) -> dict[str, dict[str, Any]]:
        """Read the results in the journal, by the mark of their record; a last line cut off by a kill is dropped.

        Raises:
            UsageError: another line is damaged.
        """
        if not self.journal.exists():
            return {}
        lines = read_lines(self.journal, Block)
        with writing(self.output):
            replace_records(self.journal, lines)
        return _by_mark(lines)

    def add(self, made: list[dict[str, Any]]) -> None:
        """Append the results for a block of records to the journal."""
        with writing(self.output), self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"records": made}) + "\n")

    def show(self, source: Source, samples: list[Any], least: int = SHOWN) -> None:
        """Draw the sheet once the first part has enough images for it."""
        sheet, records = self.output / "sheet.png", self.records[:SHOWN]
        if self.number or sheet.exists() or len(records) < least:
            return
        from qformer.figures import curves as pictures

        try:
            images = [read_image(only_picture(source[samples[record["place"]]])) for record in records]
        except BadSample:  # lost since it was captioned; `finish` will count it
            return
        with writing(self.output):
            pictures.ranked_captions(sheet, images, records)

    def finish(self, source: Source, samples: list[Any], digest: str) -> None:
        """Write the part in the form that training reads; `digest` identifies its records."""
        self.show(source, samples, least=1)
        skipped = list(self.skipped)
        kept = []
        write = self._write_tar if self.form == "webdataset" else self._write_lines
        with writing(self.output), replacing(self.file) as partial:
            for record, fault in write(partial, source, samples):
                if fault is None:
                    kept.append(record)
                else:
                    skipped.append({"index": str(samples[record["place"]]), "kind": fault.kind, "detail": fault.detail})
            counts: dict[str, Any] = {origin: [] for origin in ORIGINS}
            for record in kept:
                for _, score, origin in record["kept"]:
                    counts[origin].append(score)
            cut = sum(record["cut"] for record in self.records)
            stats = {"of": digest, "samples": len(samples), "images": len(kept), "skipped": skipped, "cut": cut}
            stats |= {origin: [len(scores), sum(scores)] for origin, scores in counts.items()}
            self.counted.unlink(missing_ok=True)  # it was of other records
        with writing(self.output):
            replace_text(self.counted, json.dumps(stats), shared=True)

    def remove(self) -> None:
        """Delete the files of a part that the data no longer has."""
        for file in (self.file, self.counted, self.journal):
            file.unlink(missing_ok=True)
        shutil.rmtree(self._images, ignore_errors=True)

    @property
    def _images(self) -> Path:
        return self.output / "images" / f"{self.number:05d}"

    def stats(self) -> dict[str, Any]:
        """Read the counts of the finished part.

        Raises:
            UsageError: there are none yet, or they are damaged.
        """
        return read_object(self.counted, Counts)

    def _write_lines(
        self, path: Path, source: Source, samples: list[Any]
    ) -> Iterator[tuple[dict[str, Any], BadSample | None]]:
        """Write a line for each image; an image that is not a file is saved as one."""
        with path.open("w", encoding="utf-8") as file:
            for record in self.records:
                try:
                    image = only_picture(source[samples[record["place"]]])
                except BadSample as bad:  # it was readable before
                    yield record, bad
                    continue
                if isinstance(image, bytes | np.ndarray):
                    data, suffix = _encoded(image)
                    own = self._images / f"{record['place']:05d}.{suffix}"
                    own.parent.mkdir(parents=True, exist_ok=True)
                    own.write_bytes(data)
                    name = own.relative_to(self.output).as_posix()
                else:
                    name = os.path.relpath(os.path.abspath(image), self.output.resolve())
                file.write(json.dumps({"image": name} | _described(record)) + "\n")
                yield record, None

    def _write_tar(
        self, path: Path, source: Source, samples: list[Any]
    ) -> Iterator[tuple[dict[str, Any], BadSample | None]]:
        """Write each image unchanged, with its captions as JSON and the best one as text."""
        with path.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for record in self.records:
                try:
                    data, suffix = _encoded(only_picture(source[samples[record["place"]]]))
                except BadSample as bad:
                    yield record, bad
                    continue
                described, name = _described(record), f"{self.number:05d}-{record['place']:05d}"
                add_member(tar, f"{name}.{suffix}", data)
                add_member(tar, f"{name}.json", json.dumps(described).encode())
                add_member(tar, f"{name}.txt", described["captions"][0].encode())
                yield record, None


def recall(output: Path) -> dict[str, dict[str, Any]]:
    """Read the results of all parts, by the mark of their record."""
    return {
        mark: made
        for journal in sorted((output / "work").glob("captions-*.jsonl"))
        for mark, made in _by_mark(read_lines(journal, Block)).items()
    }


def _by_mark(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Index results by the mark of their record; those of older versions have none and are made again."""
    return {made["mark"]: made for line in lines for made in line["records"] if "mark" in made}


def beyond(output: Path, count: int, form: str) -> list[Part]:
    """List the parts of an output whose number is `count` or higher."""
    named = [file.stem.removeprefix("captions-") for file in (output / "work").glob("captions-*.json")]
    return [Part(output, int(number), form) for number in named if number.isdecimal() and int(number) >= count]


def finish_all(output: Path, parts: list[Part]) -> None:
    """Write and print how many captions were kept and how many images skipped in all parts."""
    stats = [part.stats() for part in parts]
    skipped = [record for one in stats for record in one["skipped"]]
    totals = {origin: [sum(one[origin][i] for one in stats) for i in (0, 1)] for origin in ORIGINS}
    summary = {
        "images": sum(one["images"] for one in stats),
        "skipped": Counter(record["kind"] for record in skipped),
        "captions cut by the ranker": sum(one["cut"] for one in stats),
        "kept": {
            origin: {"captions": count, "mean score": round(score / count, 4) if count else None}
            for origin, (count, score) in totals.items()
        },
    }
    with writing(output):
        replace_records(output / "skipped.jsonl", skipped)
        replace_text(output / "summary.json", json.dumps(summary, indent=1), shared=True)
    table = Table("captions kept", "number", "mean similarity", title=f"{summary['images']} images in '{output}'")
    for origin, kept in cast("dict[str, dict[str, Any]]", summary["kept"]).items():
        table.add_row(origin, str(kept["captions"]), str(kept["mean score"] or ""))
    console.print(table)
    if cut := summary["captions cut by the ranker"]:
        console.print(f"{cut} captions are longer than the ranker reads and were ranked by their beginning")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(r["kind"] for r in skipped).most_common())
        console.print(f"skipped {kinds}: see {output / 'skipped.jsonl'}", soft_wrap=True)
    name = "jsonl" if parts[0].form == "jsonl" else "webdataset"
    console.print(
        f"train on it: data.train={{name: {name}, path: {output}/captions-*{FORMS[name]}}}",
        markup=False,
        soft_wrap=True,
    )


def _described(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a record to its written form: lists of captions, scores and origins."""
    kept, dropped = (
        {name: [row[i] for row in record[kind]] for i, name in enumerate(("captions", "scores", "origins"))}
        for kind in ("kept", "dropped")
    )
    return kept | {"dropped": dropped, "key": record["key"]}


def _encoded(image: bytes | Path | np.ndarray) -> tuple[bytes, str]:
    """Get the unchanged bytes of an image, or encode pixels as PNG; also returns the file ending for the content.

    Raises:
        BadSample: the file is gone, or is not an image any more.
    """
    if isinstance(image, np.ndarray):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        return stream.getvalue(), "png"
    data = image if isinstance(image, bytes) else read_file(image)
    return data, FORMATS[read_head(data)[0]][0][1:]
