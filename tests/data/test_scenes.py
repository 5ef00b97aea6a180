"""Scenes are checked by an oracle that reads the text back and looks at boxes and pixels, never at the cells.

`Seen` is what the oracle knows of an object. It comes from the boxes of a scene or from its description, and
`right_answer` must agree with the question from either.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qformer.lookup import build
from qformer.scenes.scenes import (
    KINDS,
    RGB,
    Question,
    Scene,
    SceneObject,
    Scenes,
    captions,
    description,
    draw,
    questions,
)
from qformer.scenes.text import COLOURS, POSITIONS, SHAPES, WORDS
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

SPLITS = ("train", "val", "test")
NEVER_TRAINED = set(zip(SHAPES, ("green", "blue", "purple", "black", "white", "red", "orange", "yellow"), strict=True))
COUNTS = ("zero", "one", "two", "three", "four")
SINGULAR = {shape + ending: shape for shape in SHAPES for ending in ("", "s", "es")}
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
PLACE = "|".join(sorted(POSITIONS, key=len, reverse=True))
PHRASE = re.compile(
    rf"(?:(?P<number>{'|'.join(NUMBERS)}) |(?P<first>{PLACE}) )"
    rf"(?:(?P<size>small|large) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})(?:s|es)?"
    rf"(?: with the word (?P<word>{'|'.join(WORDS)}) on it)?(?: at the (?P<place>{PLACE}))?"
)
NEIGHBOURS = list(zip(SHAPES, (*SHAPES[1:], SHAPES[0]), strict=True))
NEVER_TOLD = re.compile(
    "|".join(
        rf"{a} (?:to the left of|above) (?:an?|the) (?:\w+ )?{b}|{b} (?:to the right of|below) (?:an?|the) (?:\w+ )?{a}"
        for a, b in NEIGHBOURS
    )
    + "".join(f"|{colour} {shape}" for shape, colour in NEVER_TRAINED)
)
RELATION = re.compile(r"(.+?) (to the left of|to the right of|above|below) (.+)")


@dataclass(frozen=True)
class Seen:
    shape: str
    colour: str
    size: str
    word: str | None
    x: float
    y: float

    @property
    def place(self) -> str:
        return POSITIONS[3 * int(3 * self.y) + int(3 * self.x)]


def look(scene: Scene) -> list[Seen]:
    seen = []
    for item in scene.objects:
        left, top, right, bottom = item.box()
        size = "large" if right - left > 0.25 else "small"
        seen.append(Seen(item.shape, item.colour, size, item.word, (left + right) / 2, (top + bottom) / 2))
    return seen


def relation(a: Seen, b: Seen) -> str | None:
    """Where `a` plainly is from `b`: one direction outweighs the other three times."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 3 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def parse(phrase: str) -> tuple[int, dict[str, str]]:
    """(number of objects, their properties that are told)"""
    match = PHRASE.fullmatch(phrase)
    assert match, phrase
    told = {name: value for name, value in match.groupdict().items() if value}
    number = NUMBERS[told.pop("number", "a")]
    if "first" in told:
        told["place"] = told.pop("first")
    return number, told


def fitting(seen: list[Seen], told: dict[str, str]) -> list[Seen]:
    return [s for s in seen if all(getattr(s, name) == value for name, value in told.items())]


def read(text: str) -> list[tuple[int, dict[str, str]]]:
    return [parse(phrase) for phrase in re.split(r", | and ", text)]


def from_description(text: str) -> list[Seen]:
    """What can be known from the text alone, each object in the middle of its cell."""
    opening, _, rest = text.partition(", ")
    found = []
    for _, told in read(rest):
        row, column = divmod(POSITIONS.index(told["place"]), 3)
        middle = (2 * column + 1) / 6, (2 * row + 1) / 6
        found.append(Seen(told["shape"], told["colour"], told["size"], told.get("word"), *middle))
    assert opening.split()[2] == COUNTS[len(found)]
    return found


def named(seen: list[Seen], name: str) -> list[Seen]:
    """The objects that a name such as `the red star`, `red stars` or `the object at the center` fits."""
    if match := re.fullmatch(rf"the object at the ({PLACE})", name):
        return fitting(seen, {"place": match[1]})
    if match := re.fullmatch(r"the object with the word (\w+)", name):
        return fitting(seen, {"word": match[1]})
    words = [SINGULAR.get(word, word) for word in name.removeprefix("the ").split()]
    assert {*words} <= {*SHAPES, *COLOURS, "object", "objects"}, name
    told = {"colour" if word in COLOURS else "shape": word for word in words if not word.startswith("object")}
    return fitting(seen, told)


def right_answer(seen: list[Seen], question: str) -> str:
    def the(name: str) -> Seen:
        (single,) = named(seen, name)  # a question about one object must fit one only
        return single

    def yes(fact: object) -> str:
        return "yes" if fact else "no"

    rules: dict[str, Callable[..., Any]] = {
        r"what color is (.+)": lambda name: the(name).colour,
        r"what shape is (.+)": lambda name: the(name).shape,
        r"what word is on (.+)": lambda name: the(name).word,
        r"how many (.+) are there": lambda name: COUNTS[len(named(seen, name))],
        r"where is (.+) relative to (.+)": lambda name, other: relation(the(name), the(other)),
        r"where is (.+)": lambda name: the(name).place,
        rf"is there an object at the ({PLACE})": lambda place: yes(fitting(seen, {"place": place})),
        r"is there an? (.+)": lambda name: yes(named(seen, name)),
        r"is the word (\w+) in the picture": lambda word: yes(fitting(seen, {"word": word})),
        r"is (.+?) (?:to the )?(left|right|above|below)(?: of)? (the .+)": lambda name, where, other: yes(
            relation(the(name), the(other)) == where
        ),
        r"is (the .+?) (?:an? )?(\w+)": lambda name, value: yes(value in (the(name).colour, the(name).shape)),
    }
    matches = ((re.fullmatch(pattern, question.removesuffix("?")), rule) for pattern, rule in rules.items())
    return next(rule(*match.groups()) for match, rule in matches if match)


def check_caption(seen: list[Seen], caption: str) -> None:
    if match := re.fullmatch(r"the word (\w+) on (.+)", caption):
        assert fitting(seen, {"word": match[1], **parse(match[2])[1]}), caption
    elif match := RELATION.fullmatch(caption):
        a, b = (fitting(seen, parse(phrase)[1]) for phrase in (match[1], match[3]))
        holds = match[2].removeprefix("to the ").removesuffix(" of")
        assert any(relation(x, y) == holds for x in a for y in b), caption
    else:
        for number, told in read(caption):
            alike = fitting(seen, told)
            assert len(alike) == number if number > 1 else alike, caption


def scenes(split: Any, count: int) -> list[Scene]:
    source = Scenes(split, seed=1)
    return [source.scene(i) for i in range(count)]


def asked(split: str, count: int) -> list[Question]:
    rng = np.random.default_rng(2)
    return [question for scene in scenes(split, count) for question in questions(scene, rng)]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_the_first_two_tell_everything(split):
    rng = np.random.default_rng(0)
    for scene in scenes(split, 400):
        seen = look(scene)
        found = captions(scene, rng)
        assert 4 <= len(found) <= 6
        for caption in found:
            check_caption(seen, caption)
        everything = Counter((s.shape, s.colour, s.size, s.word, s.place) for s in seen)
        for caption in found[:2]:
            told = [told for _, told in read(caption)]
            assert Counter((t["shape"], t["colour"], t["size"], t.get("word"), t["place"]) for t in told) == everything


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_boxes_and_from_the_description(split):
    rng = np.random.default_rng(0)
    kinds = set()
    for scene in scenes(split, 600):
        for question in questions(scene, rng):
            assert right_answer(look(scene), question.question) == question.answer, question
            assert right_answer(from_description(description(scene)), question.question) == question.answer, question
            kinds.add(question.kind)
    assert kinds == set(KINDS)


def test_objects_lie_in_their_cells_and_apart():
    for scene in scenes("train", 500):
        assert [s.place for s in look(scene)] == [item.position for item in scene.objects]
        words = [item.word for item in scene.objects if item.word]
        assert len(set(words)) == len(words)
        for width, height in ((1, 1), (3, 1), (1, 3)):
            boxes = [item.box(width, height) for item in scene.objects]
            assert all(x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height for x0, y0, x1, y1 in boxes)
            for a, b in combinations(boxes, 2):
                assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_of_each_kind_are_equally_frequent(split):
    found = defaultdict(Counter)
    for question in asked(split, 4000):
        found[question.kind][question.answer] += 1
    sizes = {"colour": 8, "shape": 8, "count": 4, "position": 9, "relation": 4, "yes/no": 2, "word": 16}
    for kind, answers in found.items():
        assert len(answers) == sizes[kind]
        expected = answers.total() / len(answers)
        freedom = len(answers) - 1
        statistic = sum((n - expected) ** 2 / expected for n in answers.values())
        assert statistic < freedom + 6 * (2 * freedom) ** 0.5, (kind, answers)


def test_each_form_of_a_yes_no_question_is_balanced():
    found = defaultdict(Counter)
    for question in asked("train", 4000):
        if question.kind == "yes/no":
            form = re.sub(rf"\b({PLACE}|{'|'.join((*COLOURS, *SHAPES, *WORDS))})\b", "_", question.question)
            found[re.sub(r"\ban?\b", "a", form)][question.answer] += 1
    common = [answers for answers in found.values() if answers.total() > 200]
    assert len(common) >= 4
    for answers in common:
        assert abs(answers["yes"] / answers.total() - 0.5) < 3 / answers.total() ** 0.5


def test_the_text_of_a_question_does_not_give_its_answer_away():
    """Naive Bayes over every two words of a question, learnt in training, guesses no better than chance on a test."""

    def clues(question: Question) -> list[tuple[str, ...]]:
        return [(question.kind, *clue) for clue in combinations(sorted(set(question.question.split())), 2)]

    learnt, answers, right = defaultdict(Counter), defaultdict(set), defaultdict(list)
    for question in asked("train", 5000):
        answers[question.kind].add(question.answer)
        for clue in clues(question):
            learnt[clue][question.answer] += 1
    for question in asked("test", 2000):
        known = [learnt[clue] for clue in clues(question)]
        guess = max(answers[question.kind], key=lambda a: sum(np.log((n[a] + 1) / (n.total() + 1)) for n in known))
        right[question.kind].append(guess == question.answer)
    for kind, hits in right.items():
        chance = 1 / len(answers[kind])
        assert np.mean(hits) < chance + 3 * (chance / len(hits)) ** 0.5, (kind, np.mean(hits))


def held_out_relations(scene: Scene, plain: bool) -> set[tuple[str, str | None, str]]:
    """A shape before the next one of `SHAPES`, from left to right or from top to bottom; if `plain`, not diagonally."""
    found = set()
    for a, b in permutations(look(scene), 2):
        if (a.shape, b.shape) in NEIGHBOURS:
            stands = {relation(a, b)} if plain else {"left" * (a.x < b.x - 0.2), "above" * (a.y < b.y - 0.2)}
            found |= {(a.shape, where, b.shape) for where in stands & {"left", "above"}}
    return found


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_never_shows_or_tells_a_held_out_combination(split):
    rng = np.random.default_rng(0)
    shown = Counter()
    for scene in scenes(split, 1500):
        shown.update((item.shape, item.colour) for item in scene.objects)
        assert not held_out_relations(scene, plain=False)
        texts = [*captions(scene, rng), *(question.question for question in questions(scene, rng))]
        assert not any(NEVER_TOLD.search(text) for text in texts)
    assert not shown.keys() & NEVER_TRAINED
    assert len(shown) == len(SHAPES) * len(COLOURS) - len(NEVER_TRAINED)
    assert min(shown.values()) > 0.5 * shown.total() / len(shown)


def test_every_test_scene_shows_a_held_out_combination():
    pairs, stands, single = set(), set(), 0
    for scene in scenes("test", 1500):
        new = {(item.shape, item.colour) for item in scene.objects} & NEVER_TRAINED
        relations = held_out_relations(scene, plain=True)
        assert new or relations
        pairs, stands, single = pairs | new, stands | relations, single + (len(scene.objects) == 1)
    assert pairs == NEVER_TRAINED
    assert len(stands) == 2 * len(SHAPES)
    assert single > 300


def test_splits_and_seeds_share_no_scene():
    drawn = [Scenes(split, seed=seed).scene(i) for split in SPLITS for seed in (0, 1) for i in range(200)]
    assert len(set(drawn)) == len(drawn)


def test_a_sample_depends_on_fields_and_index_alone():
    state = np.random.get_state()[1].copy()
    forward = [Scenes(size=48, seed=7)[i] for i in range(12)]
    source = Scenes(size=48, seed=7)
    for i in reversed(range(12)):
        again = source[i]
        assert np.array_equal(again.image, forward[i].image)
        assert (again.key, again.captions) == (forward[i].key, forward[i].captions)
    assert np.array_equal(np.random.get_state()[1], state)
    assert forward[3].key == forward[3].image_id == "scenes/train/7/3"
    assert forward[3].question is None
    assert description(Scenes(seed=0).scene(0)) == (
        "there are four objects, a small purple moon at the top left, a small yellow star at the top right, "
        "a small purple square at the center left and a small purple square at the center right"
    )


def test_the_source_has_no_end():
    source = Scenes(count=10**12, size=32)
    assert len(source) == 10**12
    assert source[10**12 - 1].image.shape == (32, 32, 3)
    assert [sample.key for sample in Scenes(count=2, size=32)] == ["scenes/train/0/0", "scenes/train/0/1"]
    for index in (-1, 10**12):
        with pytest.raises(IndexError, match="of 1000000000000"):
            source[index]


@pytest.mark.parametrize("objects", [(1, 4), (1, 1), (4, 4)])
def test_question_samples_ask_all_kinds_in_turn(objects):
    source = Scenes("test", size=32, objects=objects, questions=True)
    samples = [source[i] for i in range(28)]
    kinds = Counter(sample.key.partition(":")[2] for sample in samples)
    assert kinds.keys() == set(KINDS) - ({"relation"} if objects == (1, 1) else set())
    assert max(kinds.values()) <= min(kinds.values()) + 1
    for i, sample in enumerate(samples):
        assert sample.answers == [right_answer(look(source.scene(i)), sample.question)]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (112, 112), (160, 90), (75, 211), (224, 224)])
def test_drawn_objects_have_their_colour_and_stay_in_their_box(size):
    source = Scenes(size=size, seed=5)
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    for i in range(25):
        scene, image = source.scene(i), source[i].image
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        ground = np.ones((height, width), bool)
        for item in scene.objects:
            left, top, right, bottom = item.box(width, height)
            inside = (columns + 1 > left) & (columns < right) & (rows + 1 > top) & (rows < bottom)
            ground &= ~inside
            body = (image[inside] == RGB[item.colour]).all(axis=1)
            others = [(image[inside] == RGB[c]).all(axis=1) for c in set(COLOURS) - {item.colour, "black", "white"}]
            assert body.sum() > 0.05 * inside.sum()
            assert not np.any(others)
            if item.word is None and min(size) >= 64:
                assert tuple(image[int((top + bottom) / 2), int((left + right) / 2)]) == RGB[item.colour]
        assert (image[ground] == scene.ground).all()


def one(shape: str, word: str | None = None, size: int = 112) -> np.ndarray:
    return draw(Scene((SceneObject(shape, "blue", "large", "center", 0.5, 0.5, 0.3, word),), ground=140), size, size)


def test_shapes_and_words_can_be_told_apart():
    for a, b in combinations([one(shape, size=32) for shape in SHAPES], 2):
        assert (np.abs(a.astype(int) - b).sum(axis=2) > 60).sum() > 8  # of about 90 pixels
    for shape in SHAPES:
        for a, b in combinations([one(shape), *(one(shape, word) for word in WORDS)], 2):
            rows, columns = np.nonzero((a != b).any(axis=2))
            assert len(rows) > 20
            assert 0.35 * 112 - 1 < min(*rows, *columns) <= max(*rows, *columns) < 0.65 * 112  # in the box


def test_the_vocabulary_is_small_and_plain():
    rng = np.random.default_rng(0)
    words = set()
    for scene in scenes("train", 1000):
        asks = [f"{question.question} {question.answer}" for question in questions(scene, rng)]
        words.update(re.sub(r"[,?]", " ", " ".join([*captions(scene, rng), description(scene), *asks])).split())
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert len(words) < 100


def test_the_source_is_built_from_a_configuration():
    table = {"scenes": "qformer.scenes.scenes:Scenes"}
    source = build(table, "scenes", {"split": "val", "size": [64, 48], "seed": "3"}, "data")
    assert source == Scenes("val", size=(64, 48), seed=3)
    assert source[0].image.shape == (48, 64, 3)


REFUSED = [("split", "dev"), ("size", 0), ("size", (64, -1)), ("seed", -1), ("count", -1), ("objects", (0, 4))]


@pytest.mark.parametrize(("field", "value"), [*REFUSED, ("objects", (3, 2)), ("objects", (1, 5)), ("captions", 0)])
def test_impossible_options_are_refused(field, value):
    with pytest.raises(UsageError, match=f"{field} is"):
        Scenes(**{field: value})


def test_only_the_captions_that_tell_everything():
    for index in range(20):
        every, two = Scenes()[index], Scenes(captions=2)[index]
        assert two.captions == every.captions[:2]
        assert all(item.colour in text for text in two.captions for item in Scenes().scene(index).objects)
