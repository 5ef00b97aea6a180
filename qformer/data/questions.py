"""Question files of public benchmarks in their official formats: VQAv2 and OK-VQA, GQA, A-OKVQA.

A sample is a question about an image; samples of the same image have the same `image_id`. `facts` has the other fields
of the record, such as `question_id`, `answer_type` or `choices`. JSON lines are read by `name: jsonl`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer.data.columns import strings, without_halves
from qformer.data.documents import read_json
from qformer.data.fetching import expand_local
from qformer.identity import plain_id
from qformer.types import BadSample, Sample, UsageError

Facts = dict[str, Any]
DIFFICULT = "difficult_direct_answer"  # in A-OKVQA: the annotators did not agree


@dataclass(frozen=True)
class QuestionRecord:
    """Question: candidate file names of its image in order of preference, text, accepted answers, and other fields."""

    images: list[str]
    question: Any
    answers: list[str]
    facts: Facts


class Questions:
    """Questions from a JSON file about images of a folder."""

    path: Any
    images: str
    asked: list[QuestionRecord]

    def __post_init__(self) -> None:
        if not Path(self.images).is_dir():
            raise UsageError(f"no folder at '{self.images}'; data.images must be the folder that holds the images")
        files = [self.path] if Path(str(self.path)).is_file() else expand_local(self.path)
        asked = [one for file in files for one in self.read(_read_json_file(str(file), "path"))]
        if not asked:
            raise UsageError(f"'{self.path}' has no question; check the file")
        object.__setattr__(self, "asked", asked)

    def read(self, values: Any) -> list[QuestionRecord]:
        raise NotImplementedError

    def refuse(self, expected: str) -> UsageError:
        return UsageError(f"'{self.path}' does not have the form that data.name requires; expected {expected}")

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Sample:
        one = self.asked[index]
        key = f"{self.path}: {one.facts.get('question_id', index)}"
        if not one.images:
            raise BadSample("no image", key)
        if not isinstance(one.question, str):
            raise BadSample("no question", key)
        places = [Path(self.images) / name for name in one.images]
        image = next((place for place in places if place.exists()), places[0])
        question = next(iter(strings(one.question)))
        return Sample(image=image, key=key, question=question, answers=one.answers, facts=one.facts)


@dataclass(frozen=True)
class Vqa(Questions):
    """VQA's and OK-VQA's `v2_OpenEnded_mscoco_val2014_questions.json` with `v2_mscoco_val2014_annotations.json`.

    VQA-CP has lists for both, with the `coco_split` of the image in each record.

    Attributes:
        path: the questions.
        annotations: the answers; without them, as in the test splits, answers are not scored.
        images: folder with COCO's images: `COCO_val2014_000000000042.jpg`, or `000000000042.jpg` as of 2017.
    """

    path: str
    images: str
    annotations: str | None = None
    asked: Any = field(init=False, repr=False, compare=False)

    def read(self, values: Any) -> list[QuestionRecord]:
        questions = values if isinstance(values, list) else _get(values, "questions")
        named = isinstance(values, list) and any("image" in record for record in values if isinstance(record, dict))
        if not isinstance(questions, list) or named:
            raise self.refuse(
                "an object with a list `questions`, as v2_OpenEnded_mscoco_val2014_questions.json; questions that name "
                "their images are read by name: jsonl"
            )
        whole = _get(values, "data_subtype")
        known = self._read_annotations()
        asked = []
        for record in questions:
            number, image = _question_id(record), plain_id(_get(record, "image_id"))
            subset = str(_get(record, "coco_split") or whole or "").replace("test-dev", "test")
            truth = known.get(str(number), {})
            kinds = {key: truth.get(key) for key in ("question_type", "answer_type")}
            facts = {key: without_halves(kind) for key, kind in kinds.items() if isinstance(kind, str)}
            answers = [sys.intern(one) for one in strings(truth.get("answers"))]  # a few answers occur a million times
            name = _coco_name(image)
            names = ([f"COCO_{subset}_{name}"] if subset else []) + [name] if name else []
            facts |= {"question_id": number, "image_id": image}
            asked.append(QuestionRecord(names, _get(record, "question"), answers, facts))
        if known and not any(str(one.facts["question_id"]) in known for one in asked):
            raise UsageError(
                f"'{self.annotations}' answers none of the questions of '{self.path}'; give the files of one split"
            )
        return asked

    def _read_annotations(self) -> dict[str, Facts]:
        """Read the annotations by question id as a text: ids may be numbers in one file and texts in the other."""
        if self.annotations is None:
            return {}
        values = _read_json_file(self.annotations, "annotations")
        listed = values if isinstance(values, list) else _get(values, "annotations")
        if not isinstance(listed, list):
            raise UsageError(f"'{self.annotations}' has no list `annotations`; give the answers to '{self.path}'")
        return {str(number): record for record in listed if (number := _question_id(record)) is not None}


@dataclass(frozen=True)
class Gqa(Questions):
    """GQA's `testdev_balanced_questions.json`: an object of questions by id.

    Attributes:
        path: one file or several: a list, or a pattern such as `train_all_questions_{0..9}.json`.
        images: folder with `n161313.jpg`, named by `imageId`.
    """

    path: str | list[str]
    images: str
    asked: Any = field(init=False, repr=False, compare=False)

    def read(self, values: Any) -> list[QuestionRecord]:
        if not isinstance(values, dict) or not all(isinstance(record, dict) for record in values.values()):
            raise self.refuse("an object of questions by id, as GQA's testdev_balanced_questions.json")
        asked = []
        for number, record in values.items():
            image, types = record.get("imageId"), record.get("types")
            facts = {"question_id": number, "image_id": image}
            if isinstance(types, dict):
                facts |= {kind: name for kind, name in types.items() if isinstance(name, str)}
            names = [f"{image}.jpg"] if isinstance(image, str | int) else []
            asked.append(QuestionRecord(names, record.get("question"), strings(record.get("answer")), facts))
        return asked


@dataclass(frozen=True)
class AokVqa(Questions):
    """A-OKVQA's `aokvqa_v1p0_val.json`: a list of questions with `choices` and `correct_choice_idx`.

    Attributes:
        path: the file.
        images: folder with COCO's images of 2017, `000000000042.jpg`.
    """

    path: str
    images: str
    asked: Any = field(init=False, repr=False, compare=False)

    def read(self, values: Any) -> list[QuestionRecord]:
        if not isinstance(values, list):
            raise self.refuse("a list of questions with `choices`, as A-OKVQA's aokvqa_v1p0_val.json")
        asked = []
        for record in values:
            image = plain_id(_get(record, "image_id"))
            facts = {
                key: record[key] for key in ("question_id", "image_id", "choices") if _get(record, key) is not None
            }
            facts[DIFFICULT] = _get(record, DIFFICULT) is True
            if isinstance(_get(record, "correct_choice_idx"), int):
                facts["label"] = record["correct_choice_idx"]
            names = [name] if (name := _coco_name(image)) else []
            answers = strings(_get(record, "direct_answers"))
            asked.append(QuestionRecord(names, _get(record, "question"), answers, facts))
        return asked


def _coco_name(image: Any) -> str:
    """Build the name `000000000042.jpg` from 42 or "42"; empty for anything else."""
    known = isinstance(image, int) or (isinstance(image, str) and re.fullmatch("[0-9]{1,12}", image))
    return f"{int(image):012d}.jpg" if known else ""


def _question_id(record: Any) -> int | str | None:
    """Get the id of a question, if it has a valid one."""
    return plain_id(_get(record, "question_id"))


def _get(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, dict) else None


def _read_json_file(path: str, option: str) -> Any:
    if not Path(path).is_file():
        raise UsageError(f"no file at '{path}'; data.{option} must be a JSON file of the benchmark")
    return read_json(Path(path))
