"""Data sources: things of known length that give a `Sample` for an index.

`build("jsonl", path="annotations.jsonl", where={"split": "train"})`. A source is a frozen dataclass with `__len__` and
`__getitem__(index) -> Sample`; its fields are the YAML options. A record that cannot be used raises `BadSample` when
it is asked for; a source that cannot be used at all raises `UsageError` when it is made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qformer import lookup
from qformer.types import BadSample, Sample, UsageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

SOURCES: dict[str, Any] = {
    "jsonl": "qformer.data.sources:JsonLines",
    "folder": "qformer.data.sources:Folder",
    "scenes": "qformer.data.scenes:Scenes",
}


class Source(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


def build(name: str, **options: Any) -> Source:
    """A source of the table, or `module:Class` of a dataclass of your own.

    Raises:
        UsageError: unknown name or option, a missing file, or nothing in it.
    """
    source = lookup.build(SOURCES, name, options, "data")
    if not len(source):
        raise UsageError(f"the data source '{name}' with {options} is empty; give one with samples")
    return source


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line: `image` and `captions` (a list) or `caption`, or `question` and `answers` or `answer`.

    Attributes:
        path: the file.
        images: folder that `image` is relative to; the file's own folder by default.
        where: keep the records whose fields equal these, such as {split: train}.
    """

    path: str
    images: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    _lines: list[tuple[int, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        path = Path(self.path)
        if not path.is_file():
            raise UsageError(
                f"no file at '{path}'; data.path of a jsonl source must be a file with one JSON object per line"
            )
        if self.images is not None and not Path(self.images).is_dir():
            raise UsageError(f"no folder at '{self.images}'; data.images must be the folder that holds the images")
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and self._keep(line)]
        if not kept:
            raise UsageError(
                f"'{path}' has no record{f' with {self.where}' if self.where else ''}; check the file and data.where"
            )
        object.__setattr__(self, "_lines", kept)

    def _keep(self, line: str) -> bool:
        if not self.where:
            return True
        try:
            record = json.loads(line)
        except ValueError:
            return True  # kept here, so that it is counted as bad when it is asked for
        return isinstance(record, dict) and all(record.get(key) == value for key, value in self.where.items())

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        number, line = self._lines[index]
        key = f"{self.path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadSample("not json", str(error)) from error
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise BadSample("no image", "the record has no 'image' path")
        image = Path(self.images or Path(self.path).parent) / record["image"]
        captions = _strings(record, "captions", "caption")
        question = record.get("question")
        return Sample(
            image=image,
            key=key,
            image_id=str(image),
            captions=captions,
            question=question if isinstance(question, str) else None,
            answers=_strings(record, "answers", "answer"),
        )


def _strings(record: dict[str, Any], many: str, one: str) -> list[str]:
    value = record.get(many, record.get(one, []))
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


@dataclass(frozen=True)
class Folder:
    """Image files anywhere below `path`, each with a .txt of the same name beside it: one caption per line."""

    path: str
    _files: list[Path] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        root = Path(self.path)
        if not root.is_dir():
            raise UsageError(
                f"no folder at '{root}'; data.path of a folder source must hold images with .txt files beside them"
            )
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"no image below '{root}'; put {', '.join(sorted(IMAGE_SUFFIXES))} files there")
        object.__setattr__(self, "_files", files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image = self._files[index]
        try:
            captions = image.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace").splitlines()
        except OSError as error:
            raise BadSample("no caption", f"{image.with_suffix('.txt')}: {error.strerror}") from error
        return Sample(image=image, key=str(image), image_id=str(image), captions=captions)
