"""The pair of files of VQAv2 and OK-VQA: one sample for each question, whatever the records look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qformer.data import sources
from qformer.types import BadSample, UsageError


def vqa(folder: Path, questions: Any, annotations: Any) -> Any:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations}))
    given = {"annotations": str(folder / "a.json")} if annotations != "none" else {}
    return sources.build("vqa", path=str(folder / "q.json"), images=str(folder / "images"), **given)


def ten(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)]


def test_a_question_is_a_sample_with_answers_as_often_as_they_were_given(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000000042.jpg").touch()
    given = [*["yes"] * 7, *["no"] * 3]
    annotations = [
        {"question_id": 4201, "image_id": 42, "answers": ten("net"), "answer_type": "other"},
        {"question_id": 4200, "image_id": 42, "answers": ten(*given), "multiple_choice_answer": "yes"},
    ]
    questions = [
        {"question_id": 4200, "image_id": 42, "question": "Is it?"},
        {"question_id": 4201, "image_id": 42, "question": "What is it?"},
        {"question_id": 900, "image_id": 9, "question": "How many?"},
    ]
    source = vqa(tmp_path, questions, annotations)
    samples = [source[i] for i in range(len(source))]
    assert [(sample.question, sample.answers) for sample in samples] == [
        ("Is it?", given),
        ("What is it?", ["net"]),
        ("How many?", []),
    ]
    assert [sample.image.name for sample in samples] == [
        *["000000000042.jpg"] * 2,
        "COCO_val2014_000000000009.jpg",  # there is neither: named as in 2014
    ]
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert samples[1].facts["answer_type"] == "other"
    assert not samples[0].captions


def test_bad_records_are_bad_one_by_one(tmp_path: Path) -> None:
    questions: list[Any] = [{"question_id": i, "image_id": 1, "question": "what?"} for i in (1, 2, 5)]
    questions[1]["image_id"] = "x"
    questions += [{"question_id": 3, "image_id": 1}, {"question_id": [4], "image_id": 1, "question": "why?"}, "text"]
    annotations = [
        {"question_id": 1, "image_id": 1, "answers": ten("a")},
        {"question_id": 5, "image_id": 1, "answers": ["a", {"answer": None}, {"answer": "b"}]},
        {"question_id": [4], "image_id": 1, "answers": ten("a")},
        "text",
    ]
    source = vqa(tmp_path, questions, annotations)
    found = []
    for place in range(len(source)):
        try:
            found.append(source[place].answers)
        except BadSample as bad:
            found.append(bad.kind)
    assert found == [["a"], "no image", ["a", "b"], "no question", [], "no image"]


def test_ids_are_equal_as_text_and_as_numbers(tmp_path: Path) -> None:
    questions = [{"question_id": "7", "image_id": "42", "question": "what?"}]
    source = vqa(tmp_path, questions, [{"question_id": 7, "answers": ten("a")}])
    assert (source[0].answers, source[0].image.name) == (["a"], "COCO_val2014_000000000042.jpg")
    assert source[0].facts["question_id"] == "7"


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no list `annotations`"):
        vqa(tmp_path, [{"question_id": 1, "image_id": 1, "question": "what?"}], None)
    with pytest.raises(UsageError, match="requires; expected an object with a list `questions`"):
        vqa(tmp_path, None, [])
    with pytest.raises(UsageError, match="has no question"):
        vqa(tmp_path, [], [])
    with pytest.raises(UsageError, match=r"no file at 'none'; data\.annotations must be a JSON file"):
        sources.build("vqa", path=str(tmp_path / "q.json"), images=str(tmp_path / "images"), annotations="none")
