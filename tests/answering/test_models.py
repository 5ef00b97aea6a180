"""Answers of models of transformers and of our checkpoints, against what the models say when asked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import qformer
from qformer.answering.kept import KeptAnswers
from qformer.answering.models import Checkpoint, TransformersModel
from qformer.resolution import build
from qformer.types import UsageError
from tests.answering.local_models import Oracle, make_llava, with_processor
from tests.fixtures import reading

PICTURES = [Image.new("RGB", (40, 30), "red"), Image.effect_noise((30, 60), 90).convert("RGB")]
QUESTIONS = ["what is this", "how many objects are there?"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return with_processor(make_llava(tmp_path_factory.mktemp("llava"), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reading.copy(tmp_path_factory.mktemp("old")) / "stage2"


def by_hand(oracle: Oracle, image: Image.Image, question: str) -> str:
    """Greedy words behind `USER: <image> x 4`: the picture's shorter side at 28, and its middle."""
    from transformers import AutoImageProcessor

    pixels = AutoImageProcessor.from_pretrained(oracle.folder)(images=image, return_tensors="pt")["pixel_values"]
    text = f"USER: {'<image>' * 4}\n{question} ASSISTANT:"
    ids = oracle.tokenizer(text, return_tensors="pt")["input_ids"]
    written = oracle.model.generate(input_ids=ids, pixel_values=pixels, do_sample=False, max_new_tokens=64)
    return oracle.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_model_of_transformers_says_what_it_would_say(llava: Oracle) -> None:
    model = TransformersModel(str(llava.folder), "cpu")
    told = model(PICTURES, QUESTIONS)
    assert told == [by_hand(llava, *pair) for pair in zip(PICTURES, QUESTIONS, strict=True)]
    assert len(set(told)) == 2
    assert model.identity == TransformersModel(str(llava.folder), "cpu").identity


def test_a_chat_template_goes_first(llava: Oracle) -> None:
    model = TransformersModel(str(llava.folder), "cpu")
    model.processor.chat_template = (
        "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "{% endfor %}{{ '!' if add_generation_prompt }}"
    )
    assert model._prompt("why?") == "<image>why?!"
    assert model(PICTURES[:1], ["why?"])


def test_what_is_no_such_model_is_one_sentence(tmp_path: Path, llava: Oracle) -> None:
    with pytest.raises(UsageError, match=r"cannot be loaded .*; give an image-text-to-text model"):
        TransformersModel(str(tmp_path), "cpu")
    for file in llava.folder.iterdir():
        if "processor" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UsageError, match="processor"):
        TransformersModel(str(tmp_path), "cpu")
    model = TransformersModel(str(llava.folder), "cpu")
    model.processor.chat_template = "no picture at all"
    with pytest.raises(UsageError, match="does not answer a question about a picture"):
        model(PICTURES, QUESTIONS)


def test_a_checkpoint_answers_as_it_does(stage2: Path) -> None:
    model: Any = qformer.load(stage2, "cpu")
    ask = Checkpoint(str(stage2), "cpu")
    assert ask(PICTURES, QUESTIONS) == model.answer(model.frontend.tiles(PICTURES), QUESTIONS)
    assert ask.tile == model.frontend.encoder.image_size
    other = Checkpoint(str(stage2), "cpu", build("overlap512", size=ask.tile))
    assert other.identity != ask.identity
    assert len(other.model.frontend.tiles([Image.new("RGB", (ask.tile * 3 // 2, ask.tile))]).pixels) == 2
    with pytest.raises(UsageError, match="puts ',' around tiles"):
        Checkpoint(str(stage2), "cpu", build("uhd"))


def test_answers_are_kept_and_belong_to_pixels_question_and_model(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(images: list[Any], questions: list[str]) -> list[str]:
        asked.extend(questions)
        if "stop" in questions:
            raise KeyboardInterrupt
        return [f"{image.getpixel((0, 0))[0]} {question}" for image, question in zip(images, questions, strict=True)]

    file, told = tmp_path / "answers.jsonl", list[int]()
    red, blue = Image.new("RGB", (2, 3), "red"), Image.new("RGB", (2, 3), "blue")
    kept = KeptAnswers(ask, file, {"model": "a"}, batch=2)
    with pytest.raises(KeyboardInterrupt):
        kept([red, blue, red], ["one", "one", "stop"])
    with file.open("a") as opened:
        opened.write('{"id": "broken')
    again = KeptAnswers(ask, file, {"model": "a"}, batch=2, on_answers=told.append)
    asked.clear()
    assert again([red, blue, red, red], ["one", "one", "two", "two"]) == ["255 one", "0 one", "255 two", "255 two"]
    assert asked == ["two"]
    assert (again.known, again.new, sum(told)) == (2, 1, 4)
    assert KeptAnswers(ask, file, {"model": "b"})([red], ["one"]) == ["255 one"]
    assert asked == ["two", "one"]
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    assert "one" in [line["question"] for line in lines]
