"""Files of VQAv2, OK-VQA, GQA, A-OKVQA and NoCaps as their authors write them, and files that are something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qformer.data import sources
from qformer.types import BadSample, UsageError

QUESTIONS: dict[str, Any] = {
    "info": {"version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "license": {"name": "CC"},
    "questions": [
        {"image_id": 42, "question": "What color is the bus?", "question_id": 42000},
        {"image_id": 73, "question": "Is it day?", "question_id": 73000},
        {"image_id": "x", "question": "What?", "question_id": 1},
        {"image_id": 42, "question_id": 42001},
        "nothing",
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 42000,
            "image_id": 42,
            "question_type": "what color is the",
            "answer_type": "other",
            "multiple_choice_answer": "red",
            "answers": [
                {"answer": "red" if n < 7 else "blue", "answer_confidence": "yes", "answer_id": n + 1}
                for n in range(10)
            ],
        }
    ]
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("COCO_val2014_000000000042.jpg", "000000000073.jpg", "n7.jpg", "0a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def build(folder: Path, name: str, values: Any, **options: Any) -> Any:
    (folder / "questions.json").write_text(json.dumps(values))
    return sources.build(name, path=str(folder / "questions.json"), images=str(folder), **options)


def test_vqa(folder: Path) -> None:
    (folder / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    source = build(folder, "vqa", QUESTIONS, annotations=str(folder / "annotations.json"))
    first, second = source[0], source[1]
    assert (first.image, second.image) == (folder / "COCO_val2014_000000000042.jpg", folder / "000000000073.jpg")
    assert (first.question, first.answers) == ("What color is the bus?", ["red"] * 7 + ["blue"] * 3)
    types = {"question_type": "what color is the", "answer_type": "other"}
    assert first.facts == types | {"question_id": 42000, "image_id": 42}
    assert (second.answers, second.facts) == ([], {"question_id": 73000, "image_id": 73})
    for index, kind in ((2, "no image"), (3, "no question"), (4, "no image")):
        with pytest.raises(BadSample) as caught:
            source[index]
        assert caught.value.kind == kind


def test_vqa_test_dev_has_the_images_of_test_and_no_answers(folder: Path) -> None:
    source = build(folder, "vqa", QUESTIONS | {"data_subtype": "test-dev2015"})
    (folder / "COCO_test2015_000000000042.jpg").write_bytes(b"")
    assert source[0].image.name == "COCO_test2015_000000000042.jpg"
    assert source[0].answers == []


def test_gqa(folder: Path) -> None:
    record = {
        "imageId": "n7",
        "question": "Is the bus red?",
        "answer": "yes",
        "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
        "isBalanced": True,
    }
    sample = build(folder, "gqa", {"201": record})[0]
    assert (sample.image.name, sample.question, sample.answers) == ("n7.jpg", "Is the bus red?", ["yes"])
    assert sample.facts["question_id"] == "201"
    assert (sample.facts["structural"], sample.facts["semantic"]) == ("verify", "attr")


def test_aokvqa(folder: Path) -> None:
    record = {
        "split": "val",
        "image_id": 73,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is it?",
        "choices": ["a cat", "a dog"],
        "correct_choice_idx": 1,
        "direct_answers": ["dog", "puppy"],
        "rationales": ["It barks."],
    }
    sample = build(folder, "aokvqa", [record])[0]
    assert (sample.image.name, sample.answers) == ("000000000073.jpg", ["dog", "puppy"])
    assert (sample.facts["choices"], sample.facts["label"]) == (["a cat", "a dog"], 1)


def test_nocaps_says_the_domain_and_its_test_images_have_no_captions(folder: Path) -> None:
    images = [{"id": 0, "file_name": "0a.jpg", "domain": "out-domain", "open_images_id": "0a"}]
    captions = [{"image_id": 0, "id": n, "caption": f"A bus {n}."} for n in range(2)]
    known = build(folder, "coco", {"images": images, "annotations": captions})[0]
    assert known.facts == {"image_id": 0, "domain": "out-domain"}
    assert known.captions == ["A bus 0.", "A bus 1."]
    assert build(folder, "coco", {"images": images})[0].captions == []


def test_karpathy_keeps_cocos_number(folder: Path) -> None:
    image = {"filename": "0a.jpg", "split": "test", "cocoid": 391895, "sentences": [{"raw": "A man."}]}
    assert build(folder, "karpathy", {"images": [image]}, split="test")[0].facts == {"image_id": 391895}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("vqa", {"annotations": []}, "a list `questions`"),
        ("vqa", {"questions": []}, "has no question"),
        ("gqa", [], "questions by id"),
        ("aokvqa", {}, "a list of questions with `choices`"),
        ("vqa", [{"image": "a.jpg", "question": "what?"}], "read by name: jsonl"),
        ("karpathy", [{"image": "a.jpg", "question": "what?"}], "a list of questions; read it by name: jsonl"),
    ],
)
def test_another_file_is_refused(folder: Path, name: str, values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(folder, name, values)


def test_answers_that_are_no_answers_are_refused(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(QUESTIONS))
    with pytest.raises(UsageError, match="no list `annotations`"):
        build(folder, "vqa", QUESTIONS, annotations=str(folder / "a.json"))
    with pytest.raises(UsageError, match="no file at"):
        build(folder, "vqa", QUESTIONS, annotations=str(folder / "none.json"))
    (folder / "other.json").write_text(json.dumps({"annotations": [{"question_id": 999, "answers": []}]}))
    with pytest.raises(UsageError, match="answers none of the questions"):
        build(folder, "vqa", QUESTIONS, annotations=str(folder / "other.json"))
    with pytest.raises(UsageError, match="no folder"):
        sources.build("vqa", path=str(folder / "a.json"), images=str(folder / "none"))
