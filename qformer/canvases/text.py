"""True texts about canvases: captions, descriptions that answer every question, and the questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformer.canvases.canvas import plain_relation
from qformer.canvases.layout import ARRANGED
from qformer.canvases.names import (
    ARRANGEMENTS,
    NUMBERS,
    VOCABULARY,
    counted,
    crowds,
    edge_phrases,
    everything,
    full_name,
    look_name,
    name,
)
from qformer.canvases.questions import KINDS, canvas_questions
from qformer.scenes.text import RELATIONS, Question, join, pick, with_article, word_phrase

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from qformer.canvases.canvas import Canvas, CanvasObject

__all__ = ["KINDS", "VOCABULARY", "Question", "canvas_captions", "canvas_description", "canvas_questions"]

MAX_WORDS = 50  # of a caption; training cuts longer ones (`qformer.data.texts`)


def canvas_description(canvas: Canvas, boxes: bool = False) -> str:
    """Describe a canvas in full, with fixed wording: every question about it can be answered from this text.

    Args:
        boxes: tell the box of each object that is told one by one, which the kinds `box` and `content` ask for.
    """
    edges = edge_phrases(canvas)
    return ", ".join([_opening(canvas), join(everything(canvas, boxes)), *([join(edges)] if edges else [])])


def tells_all(canvas: Canvas, caption: str) -> bool:
    """Check if one of the first two captions of a canvas leaves nothing out: neither edges, arrangement nor words."""
    words = [word_phrase(item.word) for item in canvas.told() if item.word]
    return all(phrase in caption for phrase in (*_rest(canvas), *words))


def _rest(canvas: Canvas) -> list[str]:
    """Phrases behind the objects: their arrangement, where there are enough, and the edges."""
    phrases = edge_phrases(canvas)
    arranged = [ARRANGEMENTS[canvas.layout]] if len(canvas.objects) >= ARRANGED else []
    return [*arranged, *([join(phrases)] if phrases else [])]


def _opening(canvas: Canvas) -> str:
    count = len(canvas.objects)
    if count == 1:
        return "there is one object"
    if count < ARRANGED:
        return f"there are {NUMBERS[count]} objects"
    if canvas.layout == "scattered":
        return f"there are {NUMBERS[count]} scattered objects"
    return f"there are {NUMBERS[count]} objects {ARRANGEMENTS[canvas.layout]}"


def canvas_captions(canvas: Canvas, rng: np.random.Generator) -> list[str]:
    """Write four to eight true captions. The first two tell everything but boxes, the others a part.

    None has more words than training keeps; the first two leave something out where they would.
    """
    told = [canvas.told()[i] for i in rng.permutation(len(canvas.told()))]
    groups = [f"{NUMBERS[number]} {look_name(item, number)}" for item, number in crowds(canvas)]
    phrases = everything(canvas)
    order = rng.permutation(len(phrases))
    placed = [f"{canvas.position(item)} {look_name(item)}{word_phrase(item.word)}" for item in told]
    found = [
        _within([join(phrases[i] for i in order), *_rest(canvas)], told),
        _within([", ".join([*placed, *groups]), *_rest(canvas)], told),
        join(counted(canvas)),
        pick(rng, [with_article(full_name(canvas, item)) for item in told] + groups),
    ]
    aligned = [(a, where, b) for a in told for b in told if a is not b and (where := plain_relation(canvas, a, b))]
    if aligned:
        a, where, b = pick(rng, aligned)
        found.append(f"{with_article(name(a))} {RELATIONS[where]} {with_article(name(b))}")
    written = [item for item in told if item.word]
    if written:
        found.append(f"the word {written[0].word} on {with_article(name(written[0]))}")
    if edges := edge_phrases(canvas):
        found.append(pick(rng, edges))
    if len(canvas.objects) >= ARRANGED:
        found.append(_opening(canvas))
    return found


def _within(parts: list[str], told: Iterable[CanvasObject]) -> str:
    """Join parts as far as they have at most `MAX_WORDS` words; without words on objects if the first is too long."""
    while len(parts) > 1 and len(" ".join(parts).split()) > MAX_WORDS:
        parts = parts[:-1]
    text = ", ".join(parts)
    if len(text.split()) > MAX_WORDS:
        for item in told:
            text = text.replace(word_phrase(item.word), "") if item.word else text
    return text
