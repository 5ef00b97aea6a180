"""Trials on scenes, asked of models whose answers are known: one that sees everything, one that says one word."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import trial_set as trials
from benchmarks.trial_set import TrialCase
from qformer.evaluation.zero_shot import SIZE, UNSEEN
from qformer.scenes.scenes import Scenes
from qformer.scenes.text import NUMBERS, Scene, SceneObject, questions
from qformer.types import Tiles

COUNT = 6


@cache
def known(scene: Scene) -> dict[str, str]:
    """All that can be asked of a scene."""
    rng = np.random.default_rng(0)
    return {one.question: one.answer for _ in range(300) for one in questions(scene, rng)}


class Seer:
    """Knows each picture's scene, follows contexts; `errs` says of which questions it says what it should not."""

    def __init__(self, seed: int = 0, errs: Any = lambda question: None) -> None:
        source = Scenes(UNSEEN, SIZE, seed=seed, count=trials.LIMIT * COUNT)
        self.errs = errs
        self.scenes = {source.picture(s).tobytes(): s for s in map(source.scene, range(len(source)))}
        self.frontend = SimpleNamespace(tiles=self.look)
        self.seen: list[Scene] = []

    def look(self, pictures: list[np.ndarray]) -> Tiles:
        """A tile holds the number of its scene instead of pixels."""
        self.seen = [self.scenes[picture.tobytes()] for picture in pictures]
        return Tiles.from_pixels(torch.arange(len(pictures)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2))

    def answer(self, tiles: Tiles, asked: list[str], context: Any = None, history: Any = None, **_: Any) -> list[str]:
        places = [int(tile.flatten()[0]) for tile in tiles.pixels]
        contexts = context or [None] * len(asked)
        return [self.say(self.seen[p], q, c) for p, q, c in zip(places, asked, contexts, strict=True)]

    def say(self, scene: Scene, question: str, context: str | None) -> str:
        if context is not None:
            return context.split(" is ")[-1].removeprefix("a ").removeprefix("at the ")
        if wrong := self.errs(question):
            return wrong
        if found := re.fullmatch(r"are there (\w+) (.*)\?", question):
            return "yes" if known(scene)[f"how many {found[2]} are there?"] == found[1] else "no"
        if found := re.fullmatch(r"what color is the (\w+)\?", question):
            return next(item.colour for item in scene.objects if item.shape == found[1])
        if found := re.fullmatch(r"what shape is the object at the (.*)\?", question):
            return next(item.shape for item in scene.objects if item.position == found[1])
        return known(scene)[question]

    def self_ask(self, tiles: Tiles, **_: Any) -> list[tuple[str, str]]:
        return [next(iter(known(scene).items())) for scene in self.seen]


@pytest.mark.weekly
def test_who_sees_everything_is_right_everywhere() -> None:
    found = {trial.name: trial for trial in trials.run(Seer(), COUNT)}  # type: ignore[arg-type]
    assert {name: (trial.right, len(trial.asked)) for name, trial in found.items() if name != "context corrects"} == {
        name: (COUNT, COUNT) for name in found if name != "context corrects"
    }
    assert not found["context corrects"].asked  # nothing was wrong before
    logic = Counter(one.expected for one in found["logic on a number"].asked)
    assert set(logic) == {"yes", "no"}


def test_only_what_was_wrong_is_corrected_and_only_what_was_right_is_misled() -> None:
    """Colours are all answered wrong: contexts about them correct, the misleading ones are about the rest."""
    model = Seer(errs=lambda question: "pink" if "color" in question else None)
    found = {trial.name: trial for trial in trials.run(model, COUNT)}  # type: ignore[arg-type]
    corrected, misled = found["context corrects"].asked, found["context misleads"].asked
    assert len(corrected) == len(misled) == COUNT
    assert {one.kind for one in corrected} == {"colour"}
    assert "colour" not in {one.kind for one in misled}
    assert all(one.seen == "pink" and one.expected in one.prompt for one in corrected)
    assert all(one.seen != one.expected and one.expected in one.prompt for one in misled)
    assert all(one.right for one in (*corrected, *misled))


@pytest.mark.weekly
def test_scenes_are_drawn_by_the_seed() -> None:
    asked = [
        [one.prompt for trial in trials.run(Seer(seed), COUNT, seed) for one in trial.asked]  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    ]
    assert asked[0] == asked[1] != asked[2]


def item(shape: str, colour: str, position: str) -> SceneObject:
    return SceneObject(shape, colour, "small", position, 0.5, 0.5, 0.2)


@pytest.mark.parametrize(
    ("said", "seen", "failure"),
    [
        ("red", None, None),
        ("blue", None, "wrong link"),
        ("white", None, "wrong ground"),
        ("two", None, "no answer"),
        ("", None, "no answer"),
        ("blue", "blue", "stale knowledge"),
    ],
)
def test_kinds_of_failure(said: str, seen: str | None, failure: str | None) -> None:
    scene = Scene((item("star", "red", "top left"), item("moon", "blue", "center")), 140)
    assert TrialCase(scene, "what color is the star?", "colour", "red", said, seen).failure == failure


def test_a_wrong_number_is_no_link() -> None:
    scene = Scene((item("star", "red", "top left"),), 140)
    assert TrialCase(scene, "how many stars are there?", "count", NUMBERS[1], NUMBERS[3]).failure == "wrong ground"
