"""What the mini towers say is what they said when it was recorded, whatever versions of other libraries are below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.canary.recording import EACH, KINDS, MARGIN, WAYS, measured, texts

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.canary
RECORDED = json.loads((Path(__file__).parent / "texts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["caption", "answer"])
def test_texts_are_those_recorded(kind: str, task: str) -> None:
    """In a batch and one by one; and none is a close call, so that another text would be a fault."""
    for way in WAYS:
        images, questions, said = zip(*RECORDED[kind][task][way], strict=True)
        assert texts(kind, way, [*images], _asked(questions)) == [*said], way
        for image, question, text in RECORDED[kind][task][way]:
            alone, margin = measured(kind, way, image, question)
            assert alone == text, way
            assert margin >= MARGIN, (way, image)


def test_the_record_tells_pictures_and_ways_apart() -> None:
    """What would be said of any picture, or in any way, would show little."""
    for kind in KINDS:
        recorded = RECORDED[kind]["caption"]
        assert all(len({text for _, _, text in recorded[way]}) == EACH for way in WAYS)
        assert len({text for way in WAYS for _, _, text in recorded[way]}) > EACH


def _asked(questions: Sequence[str | None]) -> list[str] | None:
    return None if questions[0] is None else [str(question) for question in questions]
