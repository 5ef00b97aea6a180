"""Questions about canvases, each with exactly one right answer, which also follows from `canvas_description`.

The text of a question does not hint at its answer, and the answers of each kind are equally frequent over many
canvases. Crowds are asked about by group: "what color are the stars?". A few objects can each be named by their place.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb
from typing import TYPE_CHECKING

from qformer.canvases.canvas import (
    DIRECTIONS,
    EDGES,
    MOST,
    SHAPES,
    TOLD,
    pair_held_out,
    plain_relation,
    relation_held_out,
)
from qformer.canvases.layout import ARRANGED, GROUPS, HOLLOW, grids
from qformer.canvases.names import ARRANGEMENTS, NUMBERS, box_text, references, singular, state_name
from qformer.scenes.text import COLOURS, GROUPINGS, POSITIONS, RELATIONS, WORDS, Question, pick, plural, with_article

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from qformer.canvases.canvas import Canvas, CanvasObject, Pair

    Asked = tuple[str, str]  # question and answer

KINDS = (
    *("colour", "shape", "count", "position", "relation", "yes/no", "word"),
    *("edge", "box", "content", "direction", "state", "layout"),
)
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
EACH = (1, MOST)
TOTAL = 0.25  # share of questions of the kind `count` that ask for the number of all objects


def canvas_questions(canvas: Canvas, rng: np.random.Generator, numbers: tuple[int, int] = EACH) -> list[Question]:
    """Write one question of each kind that the canvas allows, in the order of `KINDS`.

    A kind is omitted if no question would be unambiguous, and at random to balance the frequencies of its answers; call
    again for more.

    Args:
        numbers: least and greatest number of objects of the canvases, for the balance of counts.
    """
    found = []
    for kind in KINDS:
        asked = _ASK[kind](canvas, rng, *((numbers,) if kind in ("count", "yes/no") else ()))
        if asked is not None:
            found.append(Question(kind, *asked))
    return found


def _group(canvas: Canvas, rng: np.random.Generator) -> CanvasObject:
    """Pick a group, large ones as often as small ones, and one of its objects."""
    pair = pick(rng, list(dict.fromkeys(item.pair for item in canvas.objects)))
    return pick(rng, [item for item in canvas.objects if item.pair == pair])


def _colour(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    target = _group(canvas, rng)
    names = references(canvas, target, ("colour",))
    if not names:
        return None
    text, number = pick(rng, names)
    return f"what color {_be(number)} {text}?", target.colour


def _shape(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    target = _group(canvas, rng)
    names = references(canvas, target, ("shape", "word"))  # an arrow has no word
    if not names:
        return None
    text, number = pick(rng, names)
    return f"what shape {_be(number)} {text}?", target.shape


def _count(canvas: Canvas, rng: np.random.Generator, numbers: tuple[int, int]) -> Asked | None:
    if rng.random() < TOTAL:
        return "how many objects are there?", NUMBERS[len(canvas.objects)]
    counted = _counted(canvas, rng, numbers)
    return None if counted is None else (f"how many {plural(counted[0])} are there?", NUMBERS[counted[1]])


def _counted(canvas: Canvas, rng: np.random.Generator, numbers: tuple[int, int]) -> tuple[str, int] | None:
    """Pick a group, all sizes of groups equally often: the name of one of it, and its number."""
    target = _group(canvas, rng)
    number = canvas.alike(target)
    if rng.random() > _shares(numbers).get(number, 1.0):
        return None
    names: dict[str, str | Pair] = {f"{target.colour} {target.shape}": target.pair, target.shape: target.shape}
    names[f"{target.colour} object"] = target.colour
    return pick(rng, [text for text, key in names.items() if canvas.numbers[key] == number]), number


@lru_cache
def _shares(numbers: tuple[int, int]) -> dict[int, float]:
    """Share of groups of each size to ask about, so that all sizes are equally frequent in questions."""
    offered = dict.fromkeys(range(1, numbers[1] + 1), 0.0)
    for count in range(numbers[0], numbers[1] + 1):
        if count <= TOLD:
            for way in GROUPINGS[count]:
                for size in way:
                    offered[size] += 1 / (len(GROUPINGS[count]) * len(way))
            continue
        for size in range(1, count):  # one of the parts of a random composition of `count`
            ways = [comb(count - size - 1, parts - 2) / comb(count - 1, parts - 1) for parts in range(2, GROUPS + 1)]
            offered[size] += sum(ways) / GROUPS
        offered[count] += 1 / GROUPS
    rarest = min(offered.values())
    return {size: rarest / frequency for size, frequency in offered.items()}


def _placed(canvas: Canvas) -> tuple[CanvasObject, ...]:
    """Objects that are told one by one and lie anywhere: each position is as frequent as any other."""
    return canvas.told() if canvas.layout == "scattered" else ()


def _position(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    named = [(item, names) for item in _placed(canvas) if (names := _one(canvas, item, "position"))]
    if not named:
        return None
    target, names = pick(rng, named)
    return f"where is {pick(rng, names)}?", canvas.position(target)


def _box(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    named = [(item, names) for item in canvas.told() if (names := _one(canvas, item, "position"))]
    if not named:
        return None
    target, names = pick(rng, named)
    return f"what is the box of {pick(rng, names)}?", box_text(canvas.box(target))


def _content(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    told = canvas.told()
    if not told:
        return None
    target = pick(rng, told)
    return f"what is in the box {box_text(canvas.box(target))}?", with_article(state_name(target))


def _relation(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    related = _related(canvas, rng)
    if related is None:
        return None
    name, relation, other, _ = related
    return f"where is {name} relative to {other}?", relation


def _related(canvas: Canvas, rng: np.random.Generator) -> tuple[str, str, str, list[str]] | None:
    """Pick two objects plainly beside or above each other: (name, relation, other name, relations that do not hold)."""
    told = [(item, names) for item in _placed(canvas) if (names := _one(canvas, item, "position"))]
    aligned = [
        (a, relation, b)
        for a in told
        for b in told
        if a is not b and (relation := plain_relation(canvas, a[0], b[0])) is not None
    ]
    if not aligned:
        return None
    (a, names), relation, (b, others) = pick(rng, aligned)
    # False relations must be held out if the true one is, and seen if it is seen; else the text could tell them.
    new = relation_held_out(a.shape, relation, b.shape)
    wrong = [one for one in RELATIONS if one != relation and relation_held_out(a.shape, one, b.shape) == new]
    return pick(rng, names), relation, pick(rng, others), wrong


def _word(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    written = [(item, names) for item in canvas.told() if item.word and (names := _one(canvas, item, "word"))]
    if not written:
        return None
    target, names = pick(rng, written)
    return f"what word is on {pick(rng, names)}?", target.word or ""


def _edge(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    coloured = [(edge, colour) for edge, colour in zip(EDGES, canvas.edges, strict=True) if colour]
    if not coloured:
        return None
    edge, colour = pick(rng, coloured)
    return f"what color is the {edge} edge?", colour


def _direction(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    pointing = [item for item in canvas.objects if item.direction]
    named = [(item, name) for item in pointing for name in references(canvas, item, ())]
    if not named:
        return None
    target, (text, number) = pick(rng, named)
    return f"where {_do(number)} {text} point?", target.direction or ""


def _state(canvas: Canvas, rng: np.random.Generator) -> Asked | None:
    target = _group(canvas, rng)
    names = references(canvas, target, ("word",))  # on hollow objects there are none
    if not names or _thinned(target, rng):
        return None
    text, number = pick(rng, names)
    return f"{_be(number)} {text} hollow or filled?", target.state


def _thinned(target: CanvasObject, rng: np.random.Generator) -> bool:
    """Leave out some filled objects, of which there are more."""
    return not target.hollow and bool(rng.random() > HOLLOW / (1 - HOLLOW))


def _layout(canvas: Canvas, _rng: np.random.Generator) -> Asked | None:
    count = len(canvas.objects)
    if count < ARRANGED or len({item.pair for item in canvas.objects}) > 1 or not grids(count):
        return None  # only where each of the three was possible
    return "how are the objects arranged?", ARRANGEMENTS[canvas.layout]


def _yes_no(canvas: Canvas, rng: np.random.Generator, numbers: tuple[int, int]) -> Asked | None:
    truth = bool(rng.random() < 0.5)
    asked = [text for ask in _FORMS if (text := ask(canvas, truth, rng)) is not None]
    asked += _is_number(canvas, truth, rng, numbers)
    return pick(rng, asked), "yes" if truth else "no"


def _is_pair(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str:
    shape, colour = pair = _group(canvas, rng).pair
    if not truth:
        present = {item.pair for item in canvas.objects}
        same = pair_held_out(*pair)
        absent = [one for one in PAIRS if one not in present and pair_held_out(*one) == same]
        near = [one for one in absent if one[0] == shape or one[1] == colour]
        shape, colour = pick(rng, near or absent)
    return f"is there {with_article(f'{colour} {shape}')}?"


def _is_placed(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str | None:
    if canvas.crowded:
        return None
    taken = {canvas.position(item) for item in canvas.objects}
    return f"is there an object at the {pick(rng, [p for p in POSITIONS if (p in taken) == truth])}?"


def _is_attribute(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str | None:
    # The object is never named by shape or color, since held-out pairs make one depend on the other.
    names = [(item, text) for item in canvas.told() for text in _one(canvas, item, "shape", "colour")]
    if not names:
        return None
    target, text = pick(rng, names)
    if rng.random() < 0.5:
        return f"is {text} {pick(rng, [c for c in COLOURS if (c == target.colour) == truth])}?"
    shapes = SHAPES[:-1] if " word " in text else SHAPES  # an arrow has no word
    return f"is {text} {with_article(pick(rng, [s for s in shapes if (s == target.shape) == truth]))}?"


def _is_related(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str | None:
    related = _related(canvas, rng)
    if related is None:
        return None
    name, relation, other, wrong = related
    return f"is {name} {RELATIONS[relation if truth else pick(rng, wrong)]} {other}?"


def _is_word(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str | None:
    written = {item.word for item in canvas.objects if item.word}
    if not written:
        return None
    return f"is the word {pick(rng, [w for w in WORDS if (w in written) == truth])} in the picture?"


def _is_edge(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str | None:
    coloured = [(edge, colour) for edge, colour in zip(EDGES, canvas.edges, strict=True) if colour]
    if not coloured:
        return None
    edge, colour = pick(rng, coloured)
    return f"is the {edge} edge {pick(rng, [c for c in COLOURS if (c == colour) == truth])}?"


def _is_direction(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str | None:
    # Without the color, since held-out arrows make the direction depend on it.
    named = [
        (item, name) for item in canvas.objects if item.direction for name in references(canvas, item, ("colour",))
    ]
    if not named:
        return None
    target, (text, number) = pick(rng, named)
    return f"{_do(number)} {text} point {pick(rng, [d for d in DIRECTIONS if (d == target.direction) == truth])}?"


def _is_state(canvas: Canvas, truth: bool, rng: np.random.Generator) -> str | None:
    target = _group(canvas, rng)
    names = references(canvas, target, ("word",))
    if not names or _thinned(target, rng):
        return None
    text, number = pick(rng, names)
    other = "filled" if target.hollow else "hollow"
    return f"{_be(number)} {text} {target.state if truth else other}?"


def _is_number(canvas: Canvas, truth: bool, rng: np.random.Generator, numbers: tuple[int, int]) -> list[str]:
    counted = _counted(canvas, rng, numbers)
    if counted is None or numbers[1] < 2:
        return []
    text, number = counted
    if not truth:  # one or two more or fewer, around a circle, so that no number is likelier to be wrong
        near = [(number - 1 + step) % numbers[1] + 1 for step in (-2, -1, 1, 2)]
        number = pick(rng, [one for one in near if one != number])
    return [f"{_be(number)} there exactly {NUMBERS[number]} {text if number == 1 else plural(text)}?"]


def _one(canvas: Canvas, item: CanvasObject, *hidden: str) -> list[str]:
    """Names that fit one object alone."""
    return singular(references(canvas, item, hidden))


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


def _do(number: int) -> str:
    return "does" if number == 1 else "do"


_ASK: dict[str, Callable[..., Asked | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "yes/no": _yes_no,
    "word": _word,
    "edge": _edge,
    "box": _box,
    "content": _content,
    "direction": _direction,
    "state": _state,
    "layout": _layout,
}
_FORMS = (
    *(_is_pair, _is_placed, _is_attribute, _is_related, _is_word),
    *(_is_edge, _is_direction, _is_state),
)
