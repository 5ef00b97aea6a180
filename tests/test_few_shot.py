"""Examples in front of questions: which, in which order, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.few_shot_trial import few_shot
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import Sample, UsageError
from tests.model.test_vision_language import _images, _model
from tests.workspace import make_workspace


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("examples"))


def source(root: Path, *numbers: int, answer: str = "two") -> Any:
    return [Sample(_images(root, n)[0], str(n), question=f"how many {n}?", answers=[answer]) for n in numbers]


def test_examples_grow_in_front_and_questions_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one equal batches of three: what is drawn for a question does not depend on its batch."""
    model, shown = _model(root), source(root, 3, 4, 5)
    seen: list[tuple[list[str], list[list[Any]]]] = []
    answer = VisionLanguageModel.answer

    def watched(self: Any, tiles: Any, questions: Any, examples: Any, **options: Any) -> Any:
        seen.append((questions, examples))
        return answer(self, tiles, questions, examples=examples, **options)

    monkeypatch.setattr(VisionLanguageModel, "answer", watched)
    options: dict[str, Any] = {"shots": (2, 0, 1, 0), "max_new_tokens": 3}
    found = few_shot(model, source(root, 0, 1, 2), shown, batch=3, **options)
    assert [len(row[0]) for _, row in seen] == [0, 1, 2]
    for place in range(3):
        one, two = seen[1][1][place], seen[2][1][place]
        assert one == two[1:]  # the same objects: the nearest example stays
        assert len({question for _, question, _ in two}) == 2
    assert all(questions == ["how many 0?", "how many 1?", "how many 2?"] for questions, _ in seen)
    alone = few_shot(model, source(root, 0, 1, 2), shown, batch=1, **options)
    assert found == alone
    tiles = model.frontend.tiles(_images(root, 0, 1, 2))
    asked = ["how many 0?", "how many 1?", "how many 2?"]
    greedy = {"num_beams": 1, "max_new_tokens": 3}
    assert found.said[0] == answer(model, tiles, asked, **greedy)
    assert found.said[2] == answer(model, tiles, asked, examples=seen[2][1], **greedy)


def test_what_is_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(root)
    monkeypatch.setattr(VisionLanguageModel, "answer", lambda *_, **__: ["two", "Two.", "six"])
    found = few_shot(model, source(root, 0, 1, 2), source(root, 3, 4), (0, 2))
    assert found.accuracy == {0: pytest.approx(2 / 3), 2: pytest.approx(2 / 3)}
    assert found.copied == {0: 0, 2: pytest.approx(1 / 3)}


def test_what_cannot_be_asked(root: Path) -> None:
    model, asked = _model(root), source(root, 0)
    with pytest.raises(UsageError, match=r"\[3\] examples cannot be drawn of 2"):
        few_shot(model, asked, source(root, 1, 2), (3,))
    with pytest.raises(UsageError, match="'1' has no question"):
        few_shot(model, asked, [Sample(_images(root, 1)[0], "1", captions=["a cat"])], (1,))
