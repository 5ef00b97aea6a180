"""Trials like those of BLIP-2's first users, a hundred of each on drawn scenes, where the right answer is known.

Identify an object and ask on; give a context that corrects, and one that misleads; ask yes or no about a number that
was read; read a word; let the model ask itself. A wrong answer has one of four kinds (similar to the paper, section 5
and figure 7): another object's property (*wrong link*), something that the picture does not show (*wrong ground*), what
the picture shows although the context contradicts it (*stale knowledge*), or no answer to such a question.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer.evaluation.zero_shot import SIZE, UNSEEN
from qformer.scenes.scenes import Scenes
from qformer.scenes.stories import STATEMENTS, statement
from qformer.scenes.text import (
    COLOURS,
    NUMBERS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    WORDS,
    Question,
    pick,
    questions,
)
from qformer.types import Tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qformer.model.vision_language import VisionLanguageModel
    from qformer.scenes.text import Scene

FAILURES = ("wrong link", "wrong ground", "stale knowledge", "no answer")
GREEDY: dict[str, Any] = {"num_beams": 1, "length_penalty": 1.0}
GROUP = 50  # scenes encoded at a time
LIMIT = 40  # pictures drawn per usable one
#: Possible answers to a question of each kind.
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "count": NUMBERS,
    "position": POSITIONS,
    "relation": tuple(RELATIONS),
    "yes/no": ("yes", "no"),
    "word": WORDS,
}
ATTRIBUTES = {"colour": "colour", "shape": "shape", "position": "position", "word": "word"}


@dataclass(frozen=True)
class TrialCase:
    """One trial.

    Attributes:
        expected: right answer or, if the context misleads, the one that follows it.
        seen: answer by the picture, if that differs.
    """

    scene: Scene
    prompt: str
    kind: str
    expected: str
    said: str
    seen: str | None = None

    @property
    def right(self) -> bool:
        return self.said == self.expected

    @property
    def failure(self) -> str | None:
        """One of `FAILURES`, or None if the answer is right."""
        if self.right:
            return None
        if self.said not in ANSWERS[self.kind]:
            return "no answer"
        if self.said == self.seen:
            return "stale knowledge"
        shown = {getattr(item, ATTRIBUTES[self.kind]) for item in self.scene.objects if self.kind in ATTRIBUTES}
        return "wrong link" if self.said in shown else "wrong ground"


@dataclass
class Trial:
    """All trials of one name, with a phrase about what counts as right."""

    name: str
    counts: str
    asked: list[TrialCase] = field(default_factory=list)

    @property
    def right(self) -> int:
        return sum(one.right for one in self.asked)

    def failures(self) -> Counter[str]:
        """Count the failures of each kind."""
        return Counter(one.failure for one in self.asked if one.failure is not None)


def run(model: VisionLanguageModel, count: int = 100, seed: int = 0) -> list[Trial]:
    """Run all trials, each on `count` scenes that training never shows (fewer if too few pictures allow one)."""
    trials = [
        Trial("identify", "the shape or color in question"),
        Trial("follow-up", "the other property of the object just named"),
        Trial("context corrects", "the true context, given with a question that was answered wrong before"),
        Trial("context misleads", "the false context, given with a question that was answered right before"),
        Trial("logic on a number", "yes or no to a number, after the model's own count"),
        Trial("read a word", "the word on the object"),
        Trial("asks itself", "a question of its own that fits the picture, with the right answer"),
    ]
    for trial, tries in zip(trials, TRIES, strict=True):
        for scenes, tiles, rng in _pictures(model, seed, count):
            trial.asked += tries(model, scenes, tiles, rng)
            if len(trial.asked) >= count:
                break
        del trial.asked[count:]
    return trials


def _pictures(
    model: VisionLanguageModel, seed: int, count: int
) -> Iterator[tuple[list[Scene], Tiles, np.random.Generator]]:
    source = Scenes(UNSEEN, SIZE, seed=seed, count=LIMIT * count)
    for start in range(0, len(source), GROUP):
        scenes = [source.scene(place) for place in range(start, min(start + GROUP, len(source)))]
        tiles = model.frontend.tiles([source.picture(scene) for scene in scenes])
        yield scenes, tiles, np.random.default_rng((seed, start))


def _of_kinds(scene: Scene, rng: np.random.Generator, kinds: tuple[str, ...]) -> Question | None:
    found = [question for question in questions(scene, rng) if question.kind in kinds]
    return pick(rng, found) if found else None


def _chosen(scenes: list[Scene], tiles: Tiles, choose: Callable[[Scene], Any]) -> tuple[list[Scene], Tiles, list[Any]]:
    """Select the scenes for which `choose` returns something, with their pictures and its results."""
    found = [(place, some) for place, scene in enumerate(scenes) if (some := choose(scene)) is not None]
    places = [place for place, _ in found]
    return [scenes[place] for place in places], _some(tiles, places), [some for _, some in found]


def _some(tiles: Tiles, places: list[int]) -> Tiles:
    return Tiles.join([tiles[place : place + 1] for place in places])


def _ask(model: VisionLanguageModel, tiles: Tiles, asked: list[str], **given: Any) -> list[str]:
    said = model.answer(tiles, asked, **given, **GREEDY) if asked else []
    return [text.strip().strip(".") for text in said]


def identify(
    model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator
) -> list[TrialCase]:
    scenes, tiles, asked = _chosen(scenes, tiles, lambda scene: _of_kinds(scene, rng, ("shape", "colour")))
    said = _ask(model, tiles, [one.question for one in asked])
    return [_plain(*each) for each in zip(scenes, asked, said, strict=True)]


def read(model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator) -> list[TrialCase]:
    scenes, tiles, asked = _chosen(scenes, tiles, lambda scene: _of_kinds(scene, rng, ("word",)))
    said = _ask(model, tiles, [one.question for one in asked])
    return [_plain(*each) for each in zip(scenes, asked, said, strict=True)]


def _plain(scene: Scene, question: Question, said: str) -> TrialCase:
    return TrialCase(scene, question.question, question.kind, question.answer, said)


def follow_up(
    model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator
) -> list[TrialCase]:
    """Ask for the shape at a place, then for the color of that shape: right only if both are of the same object."""

    def alone(scene: Scene) -> Any:
        shapes = Counter(item.shape for item in scene.objects)
        single = [item for item in scene.objects if shapes[item.shape] == 1]
        return pick(rng, single) if single else None

    scenes, tiles, targets = _chosen(scenes, tiles, alone)
    first = [f"what shape is the object at the {item.position}?" for item in targets]
    named = _ask(model, tiles, first)
    second = [f"what color is the {name}?" for name in named]
    turns = [[(question, name)] for question, name in zip(first, named, strict=True)]
    said = _ask(model, tiles, second, history=turns)
    prompts = [f"{a} {name}. {b}" for a, name, b in zip(first, named, second, strict=True)]
    rows = zip(scenes, prompts, targets, said, strict=True)
    return [TrialCase(scene, prompt, "colour", item.colour, text) for scene, prompt, item, text in rows]


def corrects(
    model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator
) -> list[TrialCase]:
    return _told(model, scenes, tiles, rng, misleads=False)


def misleads(
    model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator
) -> list[TrialCase]:
    return _told(model, scenes, tiles, rng, misleads=True)


def _told(
    model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator, misleads: bool
) -> list[TrialCase]:
    """Ask without a context, and again with one if the first answer was right (or wrong)."""
    kinds = tuple(kind for kind in STATEMENTS if kind != "count")
    scenes, tiles, asked = _chosen(scenes, tiles, lambda scene: _of_kinds(scene, rng, kinds))
    first = _ask(model, tiles, [one.question for one in asked])
    places = [
        place for place, (one, said) in enumerate(zip(asked, first, strict=True)) if (said == one.answer) == misleads
    ]
    asked, scenes = [asked[place] for place in places], [scenes[place] for place in places]
    claims = [
        pick(rng, [claim for claim in STATEMENTS[one.kind][2] if claim != one.answer]) if misleads else one.answer
        for one in asked
    ]
    contexts = [statement(one, claim) for one, claim in zip(asked, claims, strict=True)]
    said = _ask(model, _some(tiles, places), [one.question for one in asked], context=contexts, task="context")
    return [
        TrialCase(scene, f"{context}. {one.question}", one.kind, claim, text, first[place])
        for scene, one, claim, context, text, place in zip(scenes, asked, claims, contexts, said, places, strict=True)
    ]


def logic(model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator) -> list[TrialCase]:
    """Ask for a count, then whether there are that many (or another number); the count is in the dialogue."""
    scenes, tiles, asked = _chosen(scenes, tiles, lambda scene: _of_kinds(scene, rng, ("count",)))
    read = _ask(model, tiles, [one.question for one in asked])
    turns = [[(one.question, said)] for one, said in zip(asked, read, strict=True)]
    truths = [bool(rng.random() < 0.5) for _ in asked]
    numbers = [
        one.answer if truth else pick(rng, [number for number in NUMBERS[1:] if number != one.answer])
        for one, truth in zip(asked, truths, strict=True)
    ]
    things = [one.question.removeprefix("how many ") for one in asked]
    second = [
        f"are there {number} {thing.removesuffix(' are there?')}?"
        for number, thing in zip(numbers, things, strict=True)
    ]
    said = _ask(model, tiles, second, history=turns)
    rows = zip(scenes, asked, read, second, truths, said, strict=True)
    return [
        TrialCase(scene, f"{one.question} {number}. {prompt}", "yes/no", "yes" if truth else "no", text)
        for scene, one, number, prompt, truth, text in rows
    ]


def asks_itself(
    model: VisionLanguageModel, scenes: list[Scene], tiles: Tiles, rng: np.random.Generator
) -> list[TrialCase]:
    """Let the model ask itself: right if the question fits the picture and has that answer."""
    found = []
    for scene, (question, said) in zip(scenes, model.self_ask(tiles, **GREEDY), strict=True):
        known = {one.question: one for _ in range(60) for one in questions(scene, rng)}
        one = known.get(question, Question("yes/no", question, "(it does not fit the picture)"))
        found.append(_plain(scene, one, said.strip().strip(".")))
    return found


TRIES = (identify, follow_up, corrects, misleads, logic, read, asks_itself)
