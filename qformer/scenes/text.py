"""Drawn scenes, and true texts about them: captions, a description, questions with answers.

A `Scene` has one to four objects in the cells of a 3 x 3 grid. `captions` and `description` describe it, `questions`
asks about it. All text is lower case, from a closed vocabulary, and unambiguous without punctuation.

Left, right, above and below are used only for two objects in one row or one column, since two of them hold on a
diagonal. The text of a question does not hint at its answer, and the answers of each kind are equally frequent over
many scenes.

Some combinations are held out of training, so that a test can ask for unseen ones:

*   one color per shape, each color once: its index in `COLOURS` is that of the shape in `SHAPES` plus three (a green
    circle, a blue square, ...);
*   one order per pair of adjacent `SHAPES`: a shape to the left of, or above, the next one (a circle to the left of a
    square, or above it; to the right and below occur in training).

Both rules treat all shapes and colors alike, so none becomes rarer than the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "moon")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SIZES = ("small", "large")
POSITIONS = (
    *("top left", "top center", "top right"),
    *("center left", "center", "center right"),
    *("bottom left", "bottom center", "bottom right"),
)
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
WORDS = (
    *("sun", "cat", "dog", "bus", "tea", "map", "key", "jam"),
    *("cup", "egg", "fish", "bird", "tree", "book", "milk", "rain"),
)
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "position", "relation", "yes/no", "word")

# Possible sizes of groups of equal shape and color, by number of objects. One is drawn; some are listed twice.
GROUPINGS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,),),
    2: ((2,), (1, 1), (1, 1)),
    3: ((3,), (2, 1), (1, 1, 1), (1, 1, 1)),
    4: ((4,), (3, 1), (2, 2), (2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
}

Pair = tuple[str, str]  # shape and color
PAIRS: tuple[Pair, ...] = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
T = TypeVar("T")


@dataclass(frozen=True)
class SceneObject:
    """Object in a scene.

    Attributes:
        shape, colour, size, position: one of `SHAPES`, `COLOURS`, `SIZES`, `POSITIONS`.
        x, y: center, as fractions of the width and height of the image.
        side: side of the square that it fills, as a fraction of the shorter side of the image.
        word: word on it, one of `WORDS`; None if there is none.
    """

    shape: str
    colour: str
    size: str
    position: str
    x: float
    y: float
    side: float
    word: str | None = None

    @property
    def pair(self) -> Pair:
        return self.shape, self.colour

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) in the 3 x 3 grid."""
        return divmod(POSITIONS.index(self.position), 3)

    def box(self, width: float = 1, height: float = 1) -> tuple[float, float, float, float]:
        """Bounding box (left, top, right, bottom) in an image of this size; by default as fractions of a square image.

        Objects keep their proportions: a circle stays a circle in a wide image.
        """
        half = self.side * min(width, height) / 2
        x, y = self.x * width, self.y * height
        return x - half, y - half, x + half, y + half


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, one per cell, with different words; `ground` is the gray background (0..255)."""

    objects: tuple[SceneObject, ...]
    ground: int


@dataclass(frozen=True)
class Question:
    """Question with exactly one right answer; `kind` is one of `KINDS`."""

    kind: str
    question: str
    answer: str


def relations(a: SceneObject, b: SceneObject) -> tuple[str, ...]:
    """List the `RELATIONS` of `a` to `b`: one if they are in the same row or column, two on a diagonal."""
    (row, column), (other_row, other_column) = a.cell, b.cell
    horizontal = ("left",) if column < other_column else ("right",) if column > other_column else ()
    vertical = ("above",) if row < other_row else ("below",) if row > other_row else ()
    return horizontal + vertical


def pair_held_out(pair: Pair) -> bool:
    """Check if a shape and color are held out: no training scene has such an object."""
    shape, colour = pair
    return (COLOURS.index(colour) - SHAPES.index(shape)) % len(COLOURS) == 3


def relation_held_out(shape: str, relation: str, other: str) -> bool:
    """Check if a relation of a shape to another shape is held out: no training scene has it."""
    step = (SHAPES.index(other) - SHAPES.index(shape)) % len(SHAPES)
    if relation in ("left", "above"):
        return step == 1
    return step == len(SHAPES) - 1


def held_out(scene: Scene, diagonals: bool) -> bool:
    """Check if a scene has a held-out combination, with `diagonals` also among objects on a diagonal."""
    return any(pair_held_out(o.pair) for o in scene.objects) or any(
        relation_held_out(a.shape, relation, b.shape)
        for a, b in permutations(scene.objects, 2)
        if diagonals or len(relations(a, b)) == 1
        for relation in relations(a, b)
    )


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draw one of the options with equal probability."""
    return options[int(rng.integers(len(options)))]


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Write four to six true captions. The first two describe every object in full, the others are short."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    one = objects[0]
    size = f"{one.size} " if rng.random() < 0.5 else ""
    found = [
        join(with_article(_full_name(o)) for o in objects),
        ", ".join(f"{o.position} {o.size} {_name(o)}{word_phrase(o.word)}" for o in objects),
        join(_count_phrase(count, *pair) for pair, count in Counter(o.pair for o in objects).items()),
        with_article(f"{size}{_name(one)} at the {one.position}"),
    ]
    aligned = [(a, b) for a, b in permutations(objects, 2) if len(relations(a, b)) == 1]
    if aligned:
        a, b = pick(rng, aligned)
        found.append(f"{with_article(_name(a))} {RELATIONS[relations(a, b)[0]]} {with_article(_name(b))}")
    written = [o for o in objects if o.word]
    if written:
        found.append(f"the word {written[0].word} on {with_article(_name(written[0]))}")
    return found


def description(scene: Scene) -> str:
    """Describe a scene in full, with fixed wording: every question about it can be answered from this text."""
    count = len(scene.objects)
    opening = "there is one object" if count == 1 else f"there are {NUMBERS[count]} objects"
    return f"{opening}, {join(with_article(_full_name(o)) for o in scene.objects)}"


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Write one question of each kind that the scene allows, in the order of `KINDS`.

    A kind is omitted if no question would be unambiguous, and at random to balance the frequencies of its answers; call
    again for more.
    """
    return [Question(kind, *asked) for kind, ask in _ASK.items() if (asked := ask(scene, rng)) is not None]


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    target = pick(rng, scene.objects)
    return f"what color is {pick(rng, _references(scene, target, hidden='colour'))}?", target.colour


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    target = pick(rng, scene.objects)
    return f"what shape is {pick(rng, _references(scene, target, hidden='shape'))}?", target.shape


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if rng.random() < 0.1:
        return "how many objects are there?", NUMBERS[len(scene.objects)]
    groups = Counter(o.pair for o in scene.objects)
    (shape, colour), count = pick(rng, list(groups.items()))
    if rng.random() > _SHARES[count]:
        return None
    names = [f"{colour} {plural(shape)}"]
    if sum(o.shape == shape for o in scene.objects) == count:
        names.append(plural(shape))
    if sum(o.colour == colour for o in scene.objects) == count:
        names.append(f"{colour} objects")
    return f"how many {pick(rng, names)} are there?", NUMBERS[count]


def _position(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    target = pick(rng, scene.objects)
    names = _references(scene, target, hidden="position")
    return (f"where is {pick(rng, names)}?", target.position) if names else None


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    related = _pick_related(scene, rng)
    if related is None:
        return None
    name, relation, other, _ = related
    return f"where is {name} relative to {other}?", relation


def _word(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    written = [(o, o.word) for o in scene.objects if o.word]
    if not written:
        return None
    target, word = pick(rng, written)
    return f"what word is on {pick(rng, _references(scene, target, hidden='word'))}?", word


def _yes_no(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    asks = [_yes_no_pair, _yes_no_place, _yes_no_attribute, _yes_no_relation, _yes_no_word]
    truth = rng.random() < 0.5
    asked = [text for ask in asks if (text := ask(scene, truth, rng)) is not None]
    return pick(rng, asked), "yes" if truth else "no"


def _yes_no_pair(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    shape, colour = pair = pick(rng, scene.objects).pair
    if not truth:
        # A held-out pair is replaced by a held-out one and a seen pair by a seen one. Otherwise the answer could be
        # guessed from the fact that a pair is asked about in training, or is new in a test.
        present = {o.pair for o in scene.objects}
        same = pair_held_out(pair)
        absent = [p for p in PAIRS if p not in present and pair_held_out(p) == same]
        near = [p for p in absent if p[0] == shape or p[1] == colour]
        shape, colour = pick(rng, near or absent)
    return f"is there {with_article(f'{colour} {shape}')}?"


def _yes_no_place(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    taken = {o.position for o in scene.objects}
    return f"is there an object at the {pick(rng, [p for p in POSITIONS if (p in taken) == truth])}?"


def _yes_no_attribute(scene: Scene, truth: bool, rng: np.random.Generator) -> str:
    # The object is never named by shape or color, since held-out pairs make one depend on the other.
    target = pick(rng, scene.objects)
    name = pick(rng, [_reference(target, way) for way in ("position", "word") if getattr(target, way)])
    if rng.random() < 0.5:
        return f"is {name} {pick(rng, [c for c in COLOURS if (c == target.colour) == truth])}?"
    return f"is {name} {with_article(pick(rng, [s for s in SHAPES if (s == target.shape) == truth]))}?"


def _yes_no_relation(scene: Scene, truth: bool, rng: np.random.Generator) -> str | None:
    related = _pick_related(scene, rng)
    if related is None:
        return None
    name, relation, other, alternatives = related
    return f"is {name} {RELATIONS[relation if truth else pick(rng, alternatives)]} {other}?"


def _yes_no_word(scene: Scene, truth: bool, rng: np.random.Generator) -> str | None:
    written = {o.word for o in scene.objects if o.word}
    if not written:
        return None
    return f"is the word {pick(rng, [w for w in WORDS if (w in written) == truth])} in the picture?"


_ASK = dict(zip(KINDS, (_colour, _shape, _count, _position, _relation, _yes_no, _word), strict=True))


def _sampling_shares() -> dict[int, float]:
    """Compute the share of groups of each size to ask about, so that all sizes are equally frequent in questions."""
    offered = dict.fromkeys(GROUPINGS, 0.0)
    for ways in GROUPINGS.values():
        for way in ways:
            for size in way:
                offered[size] += 1 / (len(ways) * len(way))
    rarest = min(offered.values())
    return {size: rarest / frequency for size, frequency in offered.items()}


_SHARES = _sampling_shares()


def _pick_related(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str, list[str]] | None:
    """Pick two objects in one row or column: (name, relation, name of the other, relations that do not hold)."""
    aligned = [
        (a, b)
        for a, b in permutations(scene.objects, 2)
        if len(relations(a, b)) == 1 and _references(scene, a, "position") and _references(scene, b, "position")
    ]
    if not aligned:
        return None
    a, b = pick(rng, aligned)
    (relation,) = relations(a, b)
    # As with pairs, false relations must be held out if the true one is, and seen if it is seen.
    new = relation_held_out(a.shape, relation, b.shape)
    others = [r for r in RELATIONS if r != relation and relation_held_out(a.shape, r, b.shape) == new]
    name, other = (pick(rng, _references(scene, o, "position")) for o in (a, b))
    return name, relation, other, others


def _references(scene: Scene, target: SceneObject, hidden: str) -> list[str]:
    """List names that fit only `target` and do not reveal the property `hidden`."""
    ways = ("shape", "colour", "pair", "position", "word")
    hidden_ways = {hidden, "pair"} if hidden in ("shape", "colour") else {hidden}
    return [
        _reference(target, way)
        for way in ways
        if way not in hidden_ways
        and (value := getattr(target, way)) is not None
        and sum(getattr(o, way) == value for o in scene.objects) == 1
    ]


def _reference(target: SceneObject, way: str) -> str:
    return {
        "shape": f"the {target.shape}",
        "colour": f"the {target.colour} object",
        "pair": f"the {_name(target)}",
        "position": f"the object at the {target.position}",
        "word": f"the object with the word {target.word}",
    }[way]


def _name(target: SceneObject) -> str:
    return f"{target.colour} {target.shape}"


def word_phrase(word: str | None) -> str:
    """Write ` with the word cat on it`, or nothing without a word."""
    return f" with the word {word} on it" if word else ""


def _full_name(target: SceneObject) -> str:
    return f"{target.size} {_name(target)}{word_phrase(target.word)} at the {target.position}"


def _count_phrase(count: int, shape: str, colour: str) -> str:
    return with_article(f"{colour} {shape}") if count == 1 else f"{NUMBERS[count]} {colour} {plural(shape)}"


def plural(shape: str) -> str:
    """Plural of a noun: `cross` -> `crosses`."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def with_article(phrase: str) -> str:
    """Put `a` or `an` in front of a phrase."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def join(phrases: Iterable[str]) -> str:
    """Join phrases as `a, b and c`."""
    *most, last = phrases
    return f"{', '.join(most)} and {last}" if most else last
