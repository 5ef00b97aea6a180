"""Text about canvases, clips and two pictures to train language models without images, beside that about scenes.

As in `qformer.scenes.stories`, a description takes the place of the visual tokens. Boxes are told where they are asked
for, and sometimes otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from qformer.canvases.canvas import DIRECTIONS, SHAPES
from qformer.canvases.clips import Clips, clip_description
from qformer.canvases.names import NUMBERS, VOCABULARY
from qformer.canvases.source import Canvases
from qformer.canvases.text import canvas_description, tells_all
from qformer.canvases.two_pictures import TwoPictures, row_description
from qformer.scenes.stories import RUN, SELF_ASK, TASKS, TEMPLATES, Stories, Story
from qformer.scenes.text import COLOURS, POSITIONS, WORDS, Question, pick, with_article
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    Written = tuple[str, str, str, list[Question]]  # prompt, reply, kind, and what must be told for it

TOTAL = "how many objects are there?"
STREAM = 4  # separates these random numbers from those of other sources with the same seed
SCENES = 0.15  # share of former stories
CLIPS, ROWS = 0.2, 0.25  # shares of the others that are about clips and about two pictures
DRILL = 0.5  # share of drilled questions among the first stories, if there are such
#: Shares of the drilled kinds, which a model that only sees them now and then does not learn.
DRILLED = {"box": 0.4, "order": 0.2, "which": 0.2, "content": 0.1, "count": 0.1}
BOXED = ("box", "content")  # kinds that need the boxes
BOXES = 0.25  # share of other descriptions that tell them
#: Relative frequency of the kinds that take longest to learn, beside 1 for the others.
HARD = {"relation": 3, "yes/no": 2, "count": 3, "box": 10, "content": 3, "order": 5, "which": 3, "more": 5, "edge": 2}

#: Conversion of a question about one property to a statement, by kind: patterns with statements, and possible claims.
STATEMENTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "colour": ({r"what color (is|are) (.*)\?": "{1} {0} {claim}"}, COLOURS),
    "edge": ({r"what color (is) (.*)\?": "{1} {0} {claim}"}, COLOURS),
    "shape": ({r"what shape is (.*)\?": "{0} is {claim}"}, tuple(map(with_article, SHAPES))),
    "count": ({r"how many (.*) are there\?": "the number of {0} is {claim}"}, NUMBERS[1:]),
    "position": ({r"where is (.*)\?": "{0} is at the {claim}"}, POSITIONS),
    "word": ({r"what word is on (.*)\?": "the word on {0} is {claim}"}, WORDS),
    "direction": (
        {r"where does (.*) point\?": "{0} points {claim}", r"where do (.*) point\?": "{0} point {claim}"},
        DIRECTIONS,
    ),
    "state": ({r"(is|are) (.*) hollow or filled\?": "{1} {0} {claim}"}, ("hollow", "filled")),
}


@dataclass(frozen=True)
class CanvasStories:
    """Source of text about drawn things of all kinds; story `i` is a function of the fields and `i` alone.

    Attributes:
        split, seed, count: those of `Canvases`. By default stories are about any canvas, see `Stories`.
        task: task of every story; None draws one for each, with the shares in `TASKS`.
        unordered: number of stories at the start whose descriptions are all unordered, see `Stories`.
        drill: number of stories at the start; half of the ordered ones among them ask a question of the kinds in
            `DRILLED`. Copying four numbers shows no progress for thousands of stories, and rare ones do not get there.
    """

    split: Literal["train", "val", "test", "any"] = "any"
    seed: int = 0
    count: int = 1_000_000
    task: Literal["describe", "ask", "context", "dialogue", "self-ask"] | None = None
    unordered: int = 0
    drill: int = 0

    #: Words that a tokenizer should have, also those that are rare.
    words: ClassVar[tuple[str, ...]] = VOCABULARY

    def __post_init__(self) -> None:
        Canvases(self.split, seed=self.seed, count=self.count)
        if self.count < 1 or min(self.unordered, self.drill) < 0:
            raise UsageError(
                f"count is {self.count}, unordered is {self.unordered} and drill is {self.drill}; give at least one "
                "story, and no negative number"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Story:
        rng = np.random.default_rng((self.seed, index, STREAM))
        unordered = index < self.unordered or (self.unordered > 0 and index // RUN % 2 == 0)
        if index < self.drill and not unordered and rng.random() < DRILL and (story := self._drill(index, rng)):
            return story
        if rng.random() < SCENES:
            story = Stories(self.split, seed=self.seed, count=self.count, task=self.task)[index]
            return replace(story, unordered=unordered)
        topic = self._draw(index, rng)
        task = self.task or str(rng.choice(list(TASKS), p=list(TASKS.values())))
        prompt, reply, kind, needed = _WRITE[task](topic, rng)
        return Story(describe(topic, needed, rng), prompt, reply, kind, unordered)

    def _drill(self, index: int, rng: np.random.Generator) -> Story | None:
        """Ask a question of a drilled kind about the first topic from this one on that has one; None if none has."""
        kind = str(rng.choice(list(DRILLED), p=list(DRILLED.values())))
        about = {"order": self._clip, "which": self._row}.get(kind, self._canvas)
        for place in range(index, index + self.count):
            topic = about(place % self.count, rng)
            asked = [one for one in topic.questions if one.kind == kind]
            if asked and (topic.boxed or kind not in BOXED):
                one = pick(rng, asked)
                told = describe(topic, [one], rng)
                return Story(told, pick(rng, TEMPLATES).format(one.question), one.answer, one.kind)
        return None

    def _draw(self, index: int, rng: np.random.Generator) -> Topic:
        """Draw a topic: a canvas, a clip, or two pictures."""
        way = rng.random()
        about = self._clip if way < CLIPS else self._row if way < CLIPS + ROWS else self._canvas
        return about(index, rng)

    def _canvas(self, index: int, rng: np.random.Generator) -> Topic:
        return about_canvas(Canvases(self.split, seed=self.seed, count=self.count), index, rng)

    def _clip(self, index: int, rng: np.random.Generator) -> Topic:
        return about_clip(Clips(self.split, seed=self.seed, count=self.count), index, rng)

    def _row(self, index: int, rng: np.random.Generator) -> Topic:
        return about_row(TwoPictures(self.split, seed=self.seed, count=self.count), index, rng)


@dataclass(frozen=True)
class Topic:
    """Subject of a story and its texts.

    Attributes:
        whole: descriptions from which every question but those of `BOXED` can be answered, and from the first one also
            `TOTAL`.
        boxed: a description with boxes; None if nothing has one.
        captions: what can be said of it.
        questions: of different kinds.
    """

    whole: list[str]
    boxed: str | None
    captions: list[str]
    questions: list[Question]


def about_canvas(source: Canvases, index: int, rng: np.random.Generator) -> Topic:
    """Collect the texts about a canvas."""
    canvas = source.canvas(index)
    asked = source.ask(canvas, rng) or [Question("count", TOTAL, NUMBERS[len(canvas.objects)])]
    boxed = canvas_description(canvas, boxes=True) if canvas.told() else None
    told, whole = source.tell(canvas, rng), canvas_description(canvas)
    # A caption that had to leave something out answers too little.
    return Topic([whole, *(one if tells_all(canvas, one) else whole for one in told[:2])], boxed, told, asked)


def about_clip(source: Clips, index: int, rng: np.random.Generator) -> Topic:
    """Collect the texts about a clip."""
    clip = source.clip(index)
    return Topic([clip_description(clip)], None, source.tell(clip, rng), source.ask(clip, rng))


def about_row(source: TwoPictures, index: int, rng: np.random.Generator) -> Topic:
    """Collect the texts about two pictures."""
    row = source.row(index)
    return Topic([row_description(row)], None, source.tell(row, rng), source.ask(row, rng))


def describe(topic: Topic, needed: list[Question], rng: np.random.Generator) -> str:
    """Describe a topic so that the questions `needed` can be answered."""
    if topic.boxed and (rng.random() < BOXES or any(one.kind in BOXED for one in needed)):
        return topic.boxed
    return topic.whole[0] if any(one.question == TOTAL for one in needed) else pick(rng, topic.whole)


def _draw(questions: list[Question], rng: np.random.Generator) -> Question:
    return pick(rng, [question for question in questions for _ in range(HARD.get(question.kind, 1))])


def _caption(topic: Topic, rng: np.random.Generator) -> Written:
    return "", pick(rng, topic.captions), "describe", []


def _question(topic: Topic, rng: np.random.Generator) -> Written:
    asked = _draw(topic.questions, rng)
    return pick(rng, TEMPLATES).format(asked.question), asked.answer, asked.kind, [asked]


def _context(topic: Topic, rng: np.random.Generator) -> Written:
    """Put a statement in front, as often false as true; the answer follows it, as users expect of a context."""
    stated = [(q, s) for q in topic.questions if q.question != TOTAL and (s := statement(q)) is not None]
    if not stated:
        return _question(topic, rng)
    one, (form, claims) = pick(rng, stated)
    own = with_article(one.answer) if one.kind == "shape" else one.answer
    if rng.random() < 0.25:  # an unrelated context does not change the answer
        other = _draw(topic.questions, rng)
        prompt = f"Context: {form.format(claim=own)}. {TEMPLATES[0].format(other.question)}"
        return prompt, other.answer, "context", [other]
    claim = own if rng.random() < 0.5 else pick(rng, claims)
    reply = claim.partition(" ")[2] if one.kind == "shape" else claim
    return f"Context: {form.format(claim=claim)}. {pick(rng, TEMPLATES).format(one.question)}", reply, "context", []


def statement(question: Question) -> tuple[str, tuple[str, ...]] | None:
    """Turn a question into a statement with a place for the `claim`, and possible claims; None if there is none.

    `what color are the stars?` -> `the stars are {claim}`, and the colors.
    """
    patterns, claims = STATEMENTS.get(question.kind, ({}, ()))
    for pattern, form in patterns.items():
        if found := re.fullmatch(pattern, question.question):
            return form.format(*found.groups(), claim="{claim}"), claims
    return None


def _dialogue(topic: Topic, rng: np.random.Generator) -> Written:
    turns: list[Question] = []
    for _ in range(min(int(rng.integers(2, 4)), len(topic.questions))):
        turns.append(_draw([one for one in topic.questions if one not in turns], rng))
    history = [f"Question: {turn.question} Answer: {turn.answer}." for turn in turns[:-1]]
    prompt = " ".join([*history, pick(rng, TEMPLATES).format(turns[-1].question)])
    return prompt, turns[-1].answer, "dialogue", turns


def _self_ask(topic: Topic, rng: np.random.Generator) -> Written:
    asked = _draw(topic.questions, rng)
    return SELF_ASK, asked.question, "self-ask", [asked]


_WRITE: dict[str, Callable[[Topic, np.random.Generator], Written]] = {
    "describe": _caption,
    "ask": _question,
    "context": _context,
    "dialogue": _dialogue,
    "self-ask": _self_ask,
}
