"""What is counted as right: answers, names, the commonest answer; and what a blind model is shown."""

from __future__ import annotations

import numpy as np
import pytest

from qformer.evaluation.zero_shot import BlindScenes, Captioned, Reply, accuracy, majority
from qformer.scenes.scenes import Scenes


def reply(kind: str, answer: str, said: str) -> Reply:
    return Reply(kind, "?", answer, said)


def test_an_answer_is_right_when_it_is_the_whole_answer() -> None:
    assert reply("colour", "red", " red. ").right
    assert not reply("colour", "red", "red star").right
    assert not reply("position", "center left", "center").right


def test_accuracy_is_of_all_and_of_each_kind() -> None:
    share, kinds = accuracy(
        [reply("colour", "red", "red"), reply("colour", "red", "blue"), reply("word", "cat", "cat")]
    )
    assert share == pytest.approx(2 / 3)
    assert kinds == {"colour": 0.5, "word": 1.0}


def test_majority_takes_the_commonest_answer_of_each_kind() -> None:
    answers = {"yes/no": ["yes", "no", "yes"], "colour": ["red", "blue"]}
    replies = [reply(kind, answer, "whatever") for kind, told in answers.items() for answer in told]
    assert majority(replies) == pytest.approx((2 + 1) / 5)


def test_an_object_is_named_by_both_words() -> None:
    scene = Scenes("test", size=8, objects=(1, 1)).scene(0)
    (item,) = scene.objects
    assert Captioned(scene, f"a large {item.colour} {item.shape}, at the top").named
    assert not Captioned(scene, f"a large {item.colour} thing").named
    assert not Captioned(scene, f"a {item.colour}ish {item.shape}").named


def test_blind_scenes_tell_the_same_behind_one_picture() -> None:
    seeing, blind = (kind("test", size=16, count=5, questions=True) for kind in (Scenes, BlindScenes))
    for index in range(5):
        told, same = seeing[index], blind[index]
        assert (told.captions, told.question, told.answers, told.key) == (
            same.captions,
            same.question,
            same.answers,
            same.key,
        )
        assert len(np.unique(np.asarray(same.image))) == 1
        assert np.array_equal(same.image, blind[0].image)
        assert same.image.shape == told.image.shape
