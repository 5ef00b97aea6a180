"""Data source `pages`: receipts, charts and other pictures of print, with questions and the lines that are printed.

A folder has `annotations.jsonl`, a line for each picture, and its questions there or in `qa.jsonl`. Where a record of a
picture has `ocr_lines` and `ocr_boxes`, the height of the print that an answer is read from is known.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qformer.data.json_lines import JsonLines
from qformer.metrics.documents import PRINT
from qformer.mosaics.album import TENTHS, tenth
from qformer.types import BadSample, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

PICTURES, QUESTIONS = "annotations.jsonl", "qa.jsonl"
KIND = ("question_type", "kind", "field")  # columns that say what is asked for
OTHERS = 3  # wrong answers to choose from
SHORTEST = 2  # characters of a line that counts as a part of an answer
Lines = list[tuple[str, float]]  # text and height in pixels of the picture


@dataclass(frozen=True)
class Pages:
    """Questions about pictures of print, each with its kind, the height of its print, and answers to choose from.

    Attributes:
        path: folder with `annotations.jsonl` and, if the questions are not in it, `qa.jsonl`.
        split: as of `mosaics`: eight tenths of the pictures, a tenth, another, or all, by the name of the picture.
        seed: seed of the answers to choose from.
    """

    path: str
    split: Literal["train", "val", "test", "any"] = "train"
    seed: int = 0
    _rows: Any = field(init=False, repr=False, compare=False)
    _places: list[int] = field(init=False, repr=False, compare=False)
    _lines: dict[Any, Lines] = field(init=False, repr=False, compare=False)
    _answers: dict[str, list[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; give a number that is not negative")
        if not (Path(self.path) / PICTURES).is_file():
            raise UsageError(f"no '{PICTURES}' in '{self.path}'; data.path of pages is a folder that has one")
        pictures = JsonLines(path=str(Path(self.path) / PICTURES))
        asked = Path(self.path) / QUESTIONS
        rows = JsonLines(path=str(asked)) if asked.is_file() else pictures
        lines: dict[Any, Lines] = {}
        for place in range(len(pictures)):
            if (sample := _read(pictures, place)) is not None:
                lines[sample.image_id] = printed(sample.facts)
        places, answers = [], defaultdict(list)
        for place in range(len(rows)):
            sample = _read(rows, place)
            if sample is None or tenth(sample.image_id) in TENTHS[self.split]:
                places.append(place)  # one that cannot be read is counted where it is used
            if sample is not None and sample.answers:
                answers[kind_of(sample)].append(sample.answers[0])
        if not places:
            raise UsageError(f"no picture of '{self.path}' is in the split '{self.split}'; give another, such as any")
        for name, value in (("_rows", rows), ("_places", places), ("_lines", lines), ("_answers", dict(answers))):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """Get a question; among its facts are `question_type`, `choices`, and `print_height` in pixels of the picture.

        Raises:
            BadSample: as of `jsonl`; `no question`.
        """
        sample: Sample = self._rows[self._places[index]]
        if sample.question is None:
            raise BadSample("no question", sample.key)
        kind = kind_of(sample)
        facts = {name: value for name, value in sample.facts.items() if not name.startswith("ocr_")}
        facts["question_type"] = kind
        if (height := print_height(sample.answers, self._lines.get(sample.image_id, []))) is not None:
            facts[PRINT] = height
        if sample.answers:
            rng = np.random.default_rng((self.seed, index))
            same = set(map(_bare, sample.answers))
            others = [text for text in dict.fromkeys(self._answers[kind]) if _bare(text) not in same]
            offered = [sample.answers[0], *(others[one] for one in rng.permutation(len(others))[:OTHERS])]
            facts["choices"] = [offered[one] for one in rng.permutation(len(offered))]
        return replace(sample, facts=facts)


def _read(rows: JsonLines, place: int) -> Sample | None:
    try:
        return rows[place]
    except BadSample:
        return None


def kind_of(sample: Sample) -> str:
    """Kind of a question, as one of the columns `KIND` says; `open` without them."""
    return next((str(sample.facts[name]) for name in KIND if sample.facts.get(name)), "open")


def printed(facts: dict[str, Any]) -> Lines:
    """Lines of a record with their heights, in pixels of its picture; boxes are left, top, right, bottom.

    `ocr_boxes_raw` are in pixels of `orig_size`, from which the picture was scaled to `size`.
    """
    lines, boxes, scale = facts.get("ocr_lines"), facts.get("ocr_boxes"), 1.0
    try:
        if boxes is None and (boxes := facts.get("ocr_boxes_raw")) is not None:
            scale = facts["size"][1] / facts["orig_size"][1]
        return [(str(text), scale * (box[3] - box[1])) for text, box in zip(lines or [], boxes or [], strict=True)]
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):  # lines without boxes say no height
        return []


def print_height(answers: Sequence[str], lines: Lines) -> float | None:
    """Height of the print that an answer is read from, in pixels of the picture; None where it is not printed.

    It is the greatest of the lines that hold an answer whole, or else the least of those that are parts of one.
    """
    for answer in filter(None, map(_bare, answers)):
        if whole := [height for text, height in lines if answer in _bare(text)]:
            return max(whole)
    for answer in answers:
        words = f" {_words(answer)} "
        told = [(_words(text), height) for text, height in lines]
        if parts := [height for text, height in told if len(text) >= SHORTEST and f" {text} " in words]:
            return min(parts)
    return None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _bare(text: str) -> str:
    return _words(text).replace(" ", "")
