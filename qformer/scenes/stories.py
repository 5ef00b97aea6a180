"""Text about scenes to train language models without images: a description, a prompt, and a reply.

The description takes the place of the visual tokens of an image. After stage two, which trains on captions only, a
model that has learned to answer from descriptions also answers about images. So visual question answering, context,
dialogue and self-asked questions are zero-shot, as in BLIP-2.
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
#: Relative frequency of the harder kinds of questions, for which two objects must be found and compared.
HARD = {"relation": 4, "yes/no": 2}
RUN = 64  # stories
TASKS = {"describe": 0.2, "ask": 0.45, "context": 0.15, "dialogue": 0.15, "self-ask": 0.05}  # share of each

#: Conversion of a question about one property to a statement, by kind: pattern, statement, possible claims.
STATEMENTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "colour": (r"what color is (.*)\?", "{} is {}", COLOURS),
    "shape": (r"what shape is (.*)\?", "{} is a {}", SHAPES),
    "count": (r"how many (.*) are there\?", "the number of {} is {}", NUMBERS[1:]),
    "position": (r"where is (.*)\?", "{} is at the {}", POSITIONS),
    "word": (r"what word is on (.*)\?", "the word on {} is {}", WORDS),
}


@dataclass(frozen=True)
class Story:
    """Text that a model reads (`description`, then `prompt`) and the `reply` that it should write.

    Attributes:
        kind: a task, or the kind of a question.
        unordered: read the description as a bag of words for each object, in any order of objects.
    """

    description: str
    prompt: str
    reply: str
    kind: str
    unordered: bool = False


@dataclass(frozen=True)
class Stories:
    """Source of text about the scenes of `Scenes`; story `i` is a function of the fields and `i` alone.

    By default stories are about any scene, since language models have read about more than a set of images shows. If
    some combinations were missing, a model would learn that no circle is green, and answer so for the test.

    Attributes:
        task: task of every story; None draws one for each, with the shares in `TASKS`.
        unordered: number of stories at the start whose descriptions are all unordered, which are learned several times
            as fast; after them, every second run of `RUN` stories is. With 0, no story is unordered.
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
    """Describe a scene completely, in one of three forms."""
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
    """Put a statement in front, as often false as true; the answer follows it, as users expect of a context."""
    asked = [q for q in questions(scene, rng) if q.kind in STATEMENTS and q.question != "how many objects are there?"]
    if not asked:
        return _question(scene, rng)
    one = pick(rng, asked)
    claim = one.answer if rng.random() < 0.5 else pick(rng, STATEMENTS[one.kind][2])
    context = f"Context: {statement(one, claim)}."
    if rng.random() < 0.25:  # an unrelated context does not change the answer
        other = _draw_question(scene, rng)
        context = f"Context: {statement(one, one.answer)}."
        return f"{context} {TEMPLATES[0].format(other.question)}", other.answer, "context"
    return f"{context} {pick(rng, TEMPLATES).format(one.question)}", claim, "context"


def statement(question: Question, claim: str) -> str:
    """Turn a question and a claim into a statement: `what color is the star?` and `red` -> `the star is red`."""
    pattern, form, _ = STATEMENTS[question.kind]
    found = re.fullmatch(pattern, question.question)
    assert found is not None, question
    return form.format(found[1], claim)


def _dialogue(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    turns = [_draw_question(scene, rng) for _ in range(int(rng.integers(2, 4)))]
    history = " ".join(f"Question: {turn.question} Answer: {turn.answer}." for turn in turns[:-1])
    return f"{history} {pick(rng, TEMPLATES).format(turns[-1].question)}", turns[-1].answer, "dialogue"


def _self_ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    return SELF_ASK, _draw_question(scene, rng).question, "self-ask"


_WRITE: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str, str]]] = {
    "describe": _caption,
    "ask": _question,
    "context": _context,
    "dialogue": _dialogue,
    "self-ask": _self_ask,
}
