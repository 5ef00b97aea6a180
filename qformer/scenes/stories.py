"""Text about scenes for language models that never see a picture: a description, something asked, the reply.

The description stands where the visual tokens of a picture will stand. A model that learned to answer from it answers,
after a stage two that has shown it captions only, about pictures: visual question answering, a given context, dialogue
and questions of its own are then zero-shot, as in BLIP-2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from qformer.scenes.scenes import Scenes
from qformer.scenes.text import (
    COLOURS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    WORDS,
    Question,
    captions,
    description,
    pick,
    questions,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.scenes.text import Scene

TEMPLATES = ("Question: {} Answer:", "Question: {} Short answer:")
SELF_ASK = "Ask a question about the picture. Question:"
#: Kinds of questions that are asked several times as often as others: two objects are to be found and compared.
HARD = {"relation": 4, "yes/no": 2}
RUN = 64  # stories
TASKS = {"describe": 0.2, "ask": 0.45, "context": 0.15, "dialogue": 0.15, "self-ask": 0.05}  # share of each

#: How a question about one property becomes a statement, by kind: pattern, statement, and what may be claimed.
STATEMENTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "colour": (r"what color is (.*)\?", "{} is {}", COLOURS),
    "shape": (r"what shape is (.*)\?", "{} is a {}", SHAPES),
    "count": (r"how many (.*) are there\?", "the number of {} is {}", NUMBERS[1:]),
    "position": (r"where is (.*)\?", "{} is at the {}", POSITIONS),
    "word": (r"what word is on (.*)\?", "the word on {} is {}", WORDS),
}


@dataclass(frozen=True)
class Story:
    """What a model reads (`description`, then `prompt`) and should write.

    Attributes:
        kind: a task, or that of a question.
        unordered: the description is read as one bag of words for each object, objects in any order.
    """

    description: str
    prompt: str
    reply: str
    kind: str
    unordered: bool = False


@dataclass(frozen=True)
class Stories:
    """A source of text: story `i` is a function of the fields and of `i` alone. Scenes are those of `Scenes`.

    By default of any scene: language models have read of more than pictures show. Were some combinations missing, a
    model would learn that no circle is green, and say so of the green circles of the test.

    Attributes:
        task: what every story asks for; None draws one for each by the shares of `TASKS`.
        unordered: how many descriptions are unordered, which is learned several times as fast: the first so many all
            are, of the others every second run of `RUN` stories.
    """

    split: Literal["train", "val", "test", "any"] = "any"
    seed: int = 0
    count: int = 1_000_000
    task: Literal["describe", "ask", "context", "dialogue", "self-ask"] | None = None
    unordered: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Story:
        scene = Scenes(self.split, seed=self.seed, count=self.count).scene(index)
        rng = np.random.default_rng((self.seed, index, 1))
        task = self.task or str(rng.choice(list(TASKS), p=list(TASKS.values())))
        prompt, reply, kind = _WRITE[task](scene, rng)
        unordered = index < self.unordered or (self.unordered > 0 and index // RUN % 2 == 0)
        return Story(_describe(scene, rng), prompt, reply, kind, unordered)


def _describe(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in full, in one of three ways of putting it: nothing is left out."""
    return pick(rng, [description(scene), *captions(scene, rng)[:2]])


def _draw_question(scene: Scene, rng: np.random.Generator) -> Question:
    asked = questions(scene, rng) or [Question("count", "how many objects are there?", _object_count(scene))]
    return pick(rng, [question for question in asked for _ in range(HARD.get(question.kind, 1))])


def _object_count(scene: Scene) -> str:
    return NUMBERS[len(scene.objects)]


def _caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    return "", pick(rng, captions(scene, rng)), "describe"


def _question(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    asked = _draw_question(scene, rng)
    return pick(rng, TEMPLATES).format(asked.question), asked.answer, asked.kind


def _context(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """A statement in front, as often false as true: the answer follows it, as people expect of a context."""
    asked = [q for q in questions(scene, rng) if q.kind in STATEMENTS and q.question != "how many objects are there?"]
    if not asked:
        return _question(scene, rng)
    one = pick(rng, asked)
    claim = one.answer if rng.random() < 0.5 else pick(rng, STATEMENTS[one.kind][2])
    told = f"Context: {statement(one, claim)}."
    if rng.random() < 0.25:  # a context that says nothing about what is asked changes nothing
        other = _draw_question(scene, rng)
        told = f"Context: {statement(one, one.answer)}."
        return f"{told} {TEMPLATES[0].format(other.question)}", other.answer, "context"
    return f"{told} {pick(rng, TEMPLATES).format(one.question)}", claim, "context"


def statement(question: Question, claim: str) -> str:
    """`what color is the star?` and a claim -> `the star is red`. For the kinds of `STATEMENTS`."""
    pattern, form, _ = STATEMENTS[question.kind]
    found = re.fullmatch(pattern, question.question)
    assert found is not None, question
    return form.format(found[1], claim)


def _dialogue(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    turns = [_draw_question(scene, rng) for _ in range(int(rng.integers(2, 4)))]
    told = " ".join(f"Question: {turn.question} Answer: {turn.answer}." for turn in turns[:-1])
    return f"{told} {pick(rng, TEMPLATES).format(turns[-1].question)}", turns[-1].answer, "dialogue"


def _self_ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    return SELF_ASK, _draw_question(scene, rng).question, "self-ask"


_WRITE: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str, str]]] = {
    "describe": _caption,
    "ask": _question,
    "context": _context,
    "dialogue": _dialogue,
    "self-ask": _self_ask,
}
