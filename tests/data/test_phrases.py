"""Phrases about objects: what they tell is true, and of what else it is true."""

from __future__ import annotations

import numpy as np
import pytest

from qformer.scenes.phrases import ALONE, VALUES, Phrases, draw_properties, matches, phrase, properties
from qformer.scenes.scenes import Scenes
from qformer.scenes.text import SceneObject, held_out
from qformer.types import UsageError

PICTURES = [Phrases(seed=3)[index] for index in range(150)]


def thing(shape: str, colour: str, position: str, word: str | None = None) -> SceneObject:
    return SceneObject(shape, colour, "large", position, 0.5, 0.5, 0.3, word)


def test_every_phrase_is_true_of_its_own_object() -> None:
    for scene, told in PICTURES:
        assert len(told) == 2 * len(scene.objects)
        owners = [item for item in scene.objects for _ in range(2)]
        assert matches(owners, told).diagonal().all()
        for item, one in zip(owners, told, strict=True):
            assert one == {key: getattr(item, key) for key in one}
            assert one


def test_matches_agrees_with_reading_each_object() -> None:
    items = [item for scene, _ in PICTURES[:40] for item in scene.objects]
    told = [one for _, phrases in PICTURES[:40] for one in phrases]
    expected = [[all(getattr(item, key) == value for key, value in one.items()) for one in told] for item in items]
    assert matches(items, told).tolist() == expected


def test_an_object_without_a_word_fits_no_word() -> None:
    items = [thing("star", "red", "top left"), thing("moon", "blue", "center", "cat")]
    told = [{"word": "cat"}, {"shape": "circle"}, {"shape": "moon"}, {}]
    assert matches(items, told).tolist() == [[False, False, False, True], [True, False, True, True]]


def test_properties_are_told_alone_and_together_and_words_often() -> None:
    item, rng = thing("star", "red", "center", "cat"), np.random.default_rng(0)
    told = [draw_properties(properties(item), ALONE, rng) for _ in range(4000)]
    alone = [next(iter(one)) for one in told if len(one) == 1]
    assert 0.5 < len(alone) / len(told) < 0.75
    assert set(alone) == set(VALUES)
    assert alone.count("word") > 1.5 * alone.count("shape") > 3 * alone.count("colour")
    shapes = [one for one in told if "shape" in one and len(one) > 1]
    assert 0.4 < np.mean(["colour" in one for one in shapes]) < 0.7


def test_phrases_in_words() -> None:
    told = {"size": "large", "colour": "red", "shape": "star", "word": "cat", "position": "top left"}
    assert phrase(told) == "large red star with the word cat on it at the top left"
    assert phrase({"word": "cat"}) == "object with the word cat on it"
    assert phrase({"shape": "moon"}) == "moon"


def test_scenes_are_those_of_the_training_split() -> None:
    for index, (scene, _) in enumerate(PICTURES):
        assert scene == Scenes("train", seed=3).scene(index)
        assert not held_out(scene, diagonals=True)
    assert Phrases(seed=1)[7] == Phrases(seed=1)[7]
    assert Phrases(seed=1)[7] != Phrases(seed=2)[7]
    assert len(Phrases(count=9)) == 9


def test_no_phrases() -> None:
    with pytest.raises(UsageError, match="phrases is 0"):
        Phrases(phrases=0)
