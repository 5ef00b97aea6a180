"""Canvases, checked by a reader of their descriptions that shares no code with them, by boxes and by pixels."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np
import pytest

from qformer.canvases.canvas import Canvas, CanvasObject
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.source import Canvases
from qformer.canvases.text import KINDS, VOCABULARY, canvas_captions, canvas_description, canvas_questions
from qformer.data import sources
from qformer.scenes.scenes import RGB, Scenes
from qformer.scenes.text import WORDS, Question
from qformer.types import UsageError
from tests.data.canvas_reader import COLOURS, COUNTS, SHAPES, look, read, solve

SPLITS = ("train", "val", "test")
NEVER_TRAINED = set(zip(SHAPES, ("green", "blue", "purple", "black", "white", "red", "orange", "yellow"), strict=False))
NEVER_POINTED = {(colour, ("up", "right", "down", "left")[place % 4]) for place, colour in enumerate(COLOURS)}
NEIGHBOURS = set(zip(SHAPES, (*SHAPES[1:], SHAPES[0]), strict=True))
#: Number of different answers of each kind; boxes and contents have too many to count.
ANSWERS = {
    **{"colour": 8, "shape": 9, "count": 16, "position": 9, "relation": 4, "yes/no": 2, "word": 16, "edge": 8},
    **{"direction": 4, "state": 2, "layout": 3},
}


@cache
def canvases(split: Any, count: int, **options: Any) -> tuple[Canvas, ...]:
    source = Canvases(split, seed=1, **options)
    return tuple(source.canvas(i) for i in range(count))


@cache
def asked(split: str, count: int) -> tuple[Question, ...]:
    rng = np.random.default_rng(2)
    return tuple(question for canvas in canvases(split, count) for question in canvas_questions(canvas, rng))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_follows_from_the_description_and_from_the_boxes(split: str) -> None:
    rng = np.random.default_rng(0)
    kinds: Counter[str] = Counter()
    for canvas in canvases(split, 500):
        told, seen = read(canvas_description(canvas, boxes=True)), look(canvas)
        plain = read(canvas_description(canvas))
        for question in canvas_questions(canvas, rng):
            for known in (told, seen, *([plain] if "box" not in question.question else [])):
                assert solve(known, question.question) == question.answer, (question, canvas_description(canvas, True))
            kinds[question.kind] += 1
    assert kinds.keys() == set(KINDS)
    assert min(kinds.values()) > 30


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_of_each_kind_are_equally_frequent(split: str) -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for question in asked(split, 2500):
        found[question.kind][question.answer] += 1
    for kind, number in ANSWERS.items():
        answers = found[kind]
        assert len(answers) == number, kind
        slack = 5 * (answers.total() / number) ** 0.5 / answers.total()
        (commonest, times), *_ = answers.most_common()
        assert times / answers.total() < 1.12 / number + slack, (kind, commonest, answers)
        assert min(answers.values()) / answers.total() > 0.82 / number - slack, (kind, answers)
    assert found["box"].most_common(1)[0][1] <= 3
    assert found["content"].most_common(1)[0][1] / found["content"].total() < 0.05


def test_each_form_of_a_yes_no_question_is_balanced() -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    values = "|".join((*COLOURS, *SHAPES, *WORDS, "top", "bottom", "center", "left", "right", "up", "down"))
    for question in asked("train", 2500):
        if question.kind == "yes/no":
            form = re.sub(rf"\b({values})\b|(?<=exactly )\w+", "_", question.question)
            found[re.sub(r"\ban?\b|s\b|es\b", "", form)][question.answer] += 1
            if state := re.search(r"(hollow|filled)\?", question.question):
                found[state[1]][question.answer] += 1
    common = [(form, answers) for form, answers in found.items() if answers.total() > 80]
    assert len(common) >= 6
    for form, answers in common:
        assert abs(answers["yes"] / answers.total() - 0.5) < 2 / answers.total() ** 0.5, (form, answers)


def test_the_text_of_a_question_does_not_tell_its_answer() -> None:
    """Naive Bayes over every two words of a question, learnt in training, guesses no better than chance on a test."""

    def clues(question: Question) -> list[tuple[str, ...]]:
        return [(question.kind, *clue) for clue in combinations(sorted(set(question.question.split())), 2)]

    learnt: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    answers: dict[str, set[str]] = defaultdict(set)
    right: dict[str, list[bool]] = defaultdict(list)
    known = [question for question in asked("train", 2500) if question.kind in ANSWERS]
    for question in known:
        answers[question.kind].add(question.answer)
        for clue in clues(question):
            learnt[clue][question.answer] += 1
    for question in asked("test", 2500)[::2]:
        if question.kind not in ANSWERS:
            continue
        counts = [learnt[clue] for clue in clues(question)]
        guess = max(answers[question.kind], key=lambda a: sum(np.log((n[a] + 1) / (n.total() + 1)) for n in counts))
        right[question.kind].append(guess == question.answer)
    for kind, hits in right.items():
        chance = 1 / len(answers[kind])
        assert np.mean(hits) < chance + 4 * (chance / len(hits)) ** 0.5, (kind, np.mean(hits), len(hits))


def test_captions_are_true_and_the_first_tells_every_object() -> None:
    rng = np.random.default_rng(0)
    for canvas in canvases("train", 300):
        seen = look(canvas)
        found = canvas_captions(canvas, rng)
        assert 4 <= len(found) <= 8
        for caption in found:
            assert len(caption.split()) <= 50
        total = f"there {'is one object' if seen.total == 1 else 'are sixteen objects'}, {found[0]}"
        things = read(
            re.sub("sixteen", COUNTS[seen.total], re.sub(", (scattered|in rows|in a grid)", "", total))
        ).things
        kinds = Counter((thing.shape, thing.colour, thing.size, thing.hollow, thing.direction) for thing in seen.things)
        told: Counter[Any] = Counter()
        for thing in things:
            told[thing.shape, thing.colour, thing.size, thing.hollow, thing.direction] += thing.number
        assert told == kinds, (found[0], kinds)


@pytest.mark.parametrize("options", [{}, {"sides": (120, 120)}, {"sides": (480, 480)}], ids=str)
def test_objects_keep_their_size_their_distance_and_clear_of_the_edges(options: dict[str, Any]) -> None:
    counts = set()
    for canvas in canvases("train", 300, **options):
        counts.add(len(canvas.objects))
        low, high = options.get("sides", (120, 480))
        assert low <= min(canvas.width, canvas.height) <= max(canvas.width, canvas.height) <= high
        assert max(canvas.width, canvas.height) <= 4 * min(canvas.width, canvas.height)
        left, right, top, bottom = (canvas.band if colour else 0 for colour in canvas.edges)
        for item in canvas.objects:
            x0, y0, x1, y1 = item.box
            assert x1 - x0 == y1 - y0 == item.side
            assert item.side in ({*range(24, 30)} if item.size == "small" else {*range(34, 41)})
            assert x0 > left
            assert y0 > top
            assert x1 < canvas.width - right
            assert y1 < canvas.height - bottom
            assert item.word is None or (item.size == "large" and not item.hollow)
            assert (item.direction is not None) == (item.shape in ("arrow", "triangle"))
        for a, b in combinations([item.box for item in canvas.objects], 2):
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 4
        words = [item.word for item in canvas.objects if item.word]
        assert len(set(words)) == len(words)
        assert len({item.pair for item in canvas.objects}) <= 4
    assert counts == ({*range(1, 17)} if options.get("sides") != (120, 120) else {1, 2, 3, 4})


def test_rows_and_grids_are_what_they_are_called() -> None:
    found: Counter[str] = Counter()
    for canvas in canvases("train", 600):
        found[canvas.layout] += 1
        lines = Counter(round(2 * item.y) // 3 for item in canvas.objects)  # to a pixel and a half
        if canvas.layout == "rows":
            assert len(lines) <= 8
            assert sum(count for count in lines.values()) == len(canvas.objects)
            ys = sorted(item.y for item in canvas.objects)
            steps = [b - a for a, b in pairwise(ys)]
            assert all(step <= 1 or step > 24 for step in steps)
        elif canvas.layout == "grid":
            xs, ys = {item.x for item in canvas.objects}, {item.y for item in canvas.objects}
            assert len(xs) * len(ys) == len(canvas.objects)
            assert min(len(xs), len(ys)) >= 2
            for line in (sorted(xs), sorted(ys)):
                assert len({b - a for a, b in pairwise(line)}) == 1
        else:
            assert len(canvas.objects) < 6 or len(lines) > 2
    assert min(found["rows"], found["scattered"]) > 100
    assert found["grid"] > 10


@pytest.mark.parametrize(
    ("options", "number"), [({"objects": (6, 16)}, 455), ({"objects": (6, 9), "sides": (120, 240)}, 648)]
)
def test_rows_are_not_a_grid(options: dict[str, Any], number: int) -> None:
    """Where there is little room gaps are alike: these two were grids to the pixel, and were to be called rows."""
    canvas = Canvases(seed=77, questions=("layout",), **options).canvas(number)
    lines = [sorted({item.x for item in canvas.objects}), sorted({item.y for item in canvas.objects})]
    even = all(len({b - a for a, b in pairwise(line)}) == 1 for line in lines)
    assert (even and len(lines[0]) * len(lines[1]) == len(canvas.objects)) == (canvas.layout == "grid")


def held_out_relations(canvas: Canvas) -> set[tuple[str, str, str]]:
    """A shape in a third of the canvas to the left of, or above, that of the next shape."""
    found = set()
    for a, b in permutations(canvas.objects, 2):
        if (a.shape, b.shape) in NEIGHBOURS:
            if int(3 * a.x / canvas.width) < int(3 * b.x / canvas.width):
                found.add((a.shape, "left", b.shape))
            if int(3 * a.y / canvas.height) < int(3 * b.y / canvas.height):
                found.add((a.shape, "above", b.shape))
    return found


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_never_shows_a_held_out_combination(split: str) -> None:
    shown: Counter[tuple[str, str]] = Counter()
    pointed = set()
    for canvas in canvases(split, 2500 if split == "train" else 800):
        shown.update({item.pair for item in canvas.objects})
        pointed |= {(item.colour, item.direction) for item in canvas.objects if item.shape == "arrow"}
        assert not held_out_relations(canvas)
    assert not shown.keys() & NEVER_TRAINED
    assert len(shown) == 9 * 8 - len(NEVER_TRAINED)
    assert not pointed & NEVER_POINTED
    assert len(pointed) == 8 * 3
    assert min(shown.values()) > 0.5 * shown.total() / len(shown)


def test_every_test_canvas_shows_a_held_out_combination() -> None:
    pairs, stands, pointed = set(), set(), set()
    for canvas in canvases("test", 2500):
        new = {item.pair for item in canvas.objects} & NEVER_TRAINED
        arrows = {(i.colour, i.direction) for i in canvas.objects if i.shape == "arrow"} & NEVER_POINTED
        relations = held_out_relations(canvas)
        assert new or arrows or relations
        pairs, stands, pointed = pairs | new, stands | relations, pointed | arrows
    assert pairs == NEVER_TRAINED
    assert pointed == NEVER_POINTED
    assert len(stands) == 2 * len(SHAPES)


def test_no_two_splits_share_a_picture() -> None:
    drawn = [canvas for split in SPLITS for canvas in canvases(split, 300)]
    drawn += [Canvases("train", seed=2).canvas(i) for i in range(300)]
    assert len(set(drawn)) == len(drawn)
    shades = [{canvas.ground for canvas in canvases(split, 300)} for split in SPLITS]
    assert all(not a & b for a, b in combinations(shades, 2))  # so they never can
    assert all(len(one) > 8 for one in shades)


def test_a_sample_depends_on_fields_and_index_alone() -> None:
    state = np.random.get_state()[1].copy()
    options: dict[str, Any] = {"seed": 7, "questions": True}
    forward = [Canvases(**options)[i] for i in range(13)]
    source = Canvases(**options)
    for i in reversed(range(13)):
        again = source[i]
        assert np.array_equal(again.image, forward[i].image)
        assert (again.key, again.captions, again.question) == (forward[i].key, forward[i].captions, forward[i].question)
    assert np.array_equal(np.random.get_state()[1], state)
    assert forward[3].key == forward[3].image_id == "canvases/train/7/3:position"
    assert canvas_description(Canvases().canvas(2), boxes=True) == (
        "there are two objects, a small hollow white triangle pointing left at the top right in the box "
        "[65, 19, 82, 39] and a small green moon at the center right in the box [62, 47, 79, 67], the left edge is "
        "orange and the top edge is orange"
    )


@pytest.mark.parametrize("options", [{}, {"objects": (1, 1)}, {"sides": (120, 120)}, {"objects": (12, 16)}], ids=str)
def test_question_samples_ask_all_kinds_in_turn(options: dict[str, Any]) -> None:
    source = Canvases("test", questions=True, **options)
    kinds: Counter[str] = Counter()
    for i in range(26):
        sample = source[i]
        kinds[sample.facts["question_type"]] += 1
        assert sample.key.endswith(f":{sample.facts['question_type']}")
        assert sample.answers == [solve(look(source.canvas(i)), sample.question or "")]
    missing = {"relation", "layout"} if options.get("objects") == (1, 1) else set()
    missing |= {"layout"} if "sides" in options else set()
    assert kinds.keys() == set(KINDS) - missing
    assert max(kinds.values()) <= min(kinds.values()) + 1


def extent(image: np.ndarray, canvas: Canvas, item: CanvasObject) -> tuple[int, ...]:
    """Extent of what differs from the ground within two pixels around an object."""
    left, top, right, bottom = item.box
    window = image[top - 2 : bottom + 2, left - 2 : right + 2]
    rows, columns = np.nonzero((window != canvas.ground).any(axis=2))
    return left - 2 + columns.min(), top - 2 + rows.min(), left - 1 + columns.max(), top - 1 + rows.max()


def test_boxes_are_the_extents_of_the_pixels() -> None:
    for canvas in canvases("train", 150):
        image = draw_canvas(canvas)
        assert image.shape == (canvas.height, canvas.width, 3)
        ground = np.ones(image.shape[:2], bool)
        for item in canvas.objects:
            assert extent(image, canvas, item) == item.box, item
            left, top, right, bottom = item.box
            ground[top:bottom, left:right] = False
            inside = image[top:bottom, left:right].reshape(-1, 3)
            others = [RGB[c] for c in COLOURS if c not in (item.colour, "black", "white")]
            assert (inside == RGB[item.colour]).all(axis=1).mean() > (0.08 if item.hollow else 0.2), item
            assert not any((inside == other).all(axis=1).any() for other in others)
        left, right, top, bottom = (canvas.band if colour else 0 for colour in canvas.edges)
        middle = image[top : canvas.height - bottom, left : canvas.width - right]
        assert (middle[ground[top : canvas.height - bottom, left : canvas.width - right]] == canvas.ground).all()
        x, y = canvas.width // 2, canvas.height // 2
        shown = (image[y, 0], image[y, -1], image[0, x], image[-1, x])
        for colour, pixel in zip(canvas.edges, shown, strict=True):
            assert tuple(pixel) == (RGB[colour] if colour else (canvas.ground,) * 3)


def one(shape: str, word: str | None = None, direction: str | None = None, hollow: bool = False, side: int = 36) -> Any:
    return draw_canvas(Canvas(60, 60, (CanvasObject(shape, "blue", 30, 30, side, word, direction, hollow),), 140))


def test_looks_can_be_told_apart() -> None:
    plain = [one(shape, side=24) for shape in SHAPES]
    hollow = [one(shape, hollow=True, side=24) for shape in SHAPES]
    turned = [
        one(shape, direction=where, side=24) for shape in ("arrow", "triangle") for where in ("right", "down", "left")
    ]
    for a, b in combinations([*plain, *hollow, *turned], 2):
        assert (np.abs(a.astype(int) - b).sum(axis=2) > 60).sum() > 24  # pixels of 576
    for a, b in combinations([one("circle"), *(one("circle", word, side=34) for word in WORDS)], 2):
        assert (np.abs(a.astype(int) - b).sum(axis=2) > 60).sum() > 24


@pytest.mark.parametrize(("where", "half"), [("up", (0, 1)), ("down", (0, -1)), ("left", (1, 1)), ("right", (1, -1))])
def test_triangles_and_arrows_point_where_they_say(where: str, half: tuple[int, int]) -> None:
    """The first pixels of a triangle on the side where it points are few, those on the other side many."""
    axis, step = half
    for shape in ("triangle", "arrow"):
        filled = (one(shape, direction=where) != 140).any(axis=2)
        widths = filled.sum(axis=1 - axis)[::step]
        widths = widths[widths > 0]
        assert widths[:3].mean() < widths[-3:].mean()
        assert widths[1] < 8


def test_the_vocabulary_is_closed() -> None:
    rng = np.random.default_rng(0)
    for canvas in canvases("any", 300):
        asks = [f"{question.question} {question.answer}" for question in canvas_questions(canvas, rng)]
        text = " ".join([*canvas_captions(canvas, rng), canvas_description(canvas, boxes=True), *asks])
        assert set(re.sub(r"[\[\],?]", " ", text).split()) <= set(VOCABULARY)
    assert len(VOCABULARY) < 300
    assert all(re.fullmatch("[a-z]+|[0-9]+", word) for word in VOCABULARY)


def test_the_source_has_no_end_and_is_built_from_a_configuration() -> None:
    options = {"split": "val", "sides": [120, 200], "seed": "3", "questions": ["count", "edge"], "captions": 2}
    source = sources.build("canvases", **options, count=10**12)
    assert source == Canvases("val", (120, 200), seed=3, questions=("count", "edge"), captions=2, count=10**12)
    last = source[10**12 - 1]
    assert last.facts == {"question_type": "edge"}
    assert len(last.captions) == 2
    for index in (-1, 10**12):
        with pytest.raises(IndexError):
            source[index]


def test_other_options_are_other_pictures_and_have_other_keys() -> None:
    """In a mixture, one id marks one picture: its captions are added up, and it is never a negative of itself."""
    parts: list[dict[str, Any]] = [{}, {"sides": [120, 200]}, {"objects": [1, 4]}, {"aspect": 1.5}]
    mixed = sources.build("mix", sources=[{"name": "canvases", "count": 2, **part} for part in parts])
    ids = [mixed[number].image_id for number in range(8)]
    assert ids[:3] == ["canvases/train/0/0", "canvases/train/0/1", "canvases/train/0,sides=(120,200)/0"]
    assert len(set(ids)) == 8
    assert Scenes(objects=(2, 3))[0].image_id != Scenes()[0].image_id == Scenes(size=64)[0].image_id


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"split": "dev"}, "split is 'dev'"),
    ({"sides": (100, 200)}, "sides is"),
    ({"sides": (300, 200)}, "sides is"),
    ({"sides": (120, 100_000)}, "from 120 to 4096"),
    ({"count": 2**70}, "give at most"),
    ({"objects": (16, 16), "sides": (120, 250)}, "hardly any size has room for 16"),
    ({"aspect": 0.5}, "aspect is"),
    ({"seed": -1}, "seed is -1"),
    ({"objects": (0, 4)}, "objects is"),
    ({"objects": (1, 17)}, "objects is"),
    ({"objects": (8, 16), "sides": (120, 120)}, "of which 4 fit"),
    ({"captions": 0}, "captions is 0"),
    ({"questions": ("size",)}, "questions has 'size'"),
    ({"questions": ("layout",), "objects": (1, 4)}, "questions has 'layout'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Canvases(**options)
