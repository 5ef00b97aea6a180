"""A reader of descriptions of canvases, written without their code: what it knows of a canvas, and what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.canvases.canvas import Canvas

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "moon", "arrow")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
COUNTS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight"),
    *("nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)
ROWS, COLUMNS = ("top", "center", "bottom"), ("left", "center", "right")
PLACES = {f"{r} {c}" if (r, c) != ("center", "center") else "center": (r, c) for r in ROWS for c in COLUMNS}
SINGULAR = {word + ending: word for word in (*SHAPES, "object") for ending in ("", "s", "es")}
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
LOOK = (
    rf"(?P<size>small|large) (?P<hollow>hollow )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})(?:e?s)?"
    r"(?: pointing (?P<direction>up|right|down|left))?"
)
THING = re.compile(
    rf"(?P<number>\w+) {LOOK}(?: with the word (?P<word>\w+) on it)?(?: at the (?P<place>{PLACE}))?"
    r"(?: in the box (?P<box>\[[\d, ]+\]))?"
)
EDGE = re.compile(rf"the (left|right|top|bottom) edge is ({'|'.join(COLOURS)})")
OPENING = re.compile(r"there (?:is|are) (\w+)( scattered)? objects?( in rows| in a grid)?, ")


@dataclass(frozen=True)
class Thing:
    """One object, or so many equal ones."""

    number: int
    size: str
    hollow: bool
    colour: str
    shape: str
    direction: str | None
    word: str | None = None
    place: str | None = None
    box: str | None = None


@dataclass
class Known:
    things: list[Thing]
    edges: dict[str, str]
    layout: str
    total: int


def read(text: str) -> Known:
    opening = OPENING.match(text)
    assert opening, text
    rest = text[opening.end() :]
    edges = dict(EDGE.findall(rest))
    rest = EDGE.sub("", rest)
    things = []
    for match in THING.finditer(rest):
        told: dict[str, Any] = match.groupdict()
        told["number"] = 1 if told["number"] in ("a", "an") else COUNTS.index(told["number"])
        things.append(Thing(**{**told, "hollow": bool(told["hollow"])}))
    assert re.fullmatch(r"(, | and )*", THING.sub("", rest)), rest
    total = COUNTS.index(opening[1])
    assert total == sum(thing.number for thing in things), text
    return Known(things, edges, ((opening[2] or "") + (opening[3] or "")).strip(), total)


def look(canvas: Canvas) -> Known:
    """The same from the objects' boxes in pixels, one by one."""
    things = []
    for item in canvas.objects:
        left, top, right, bottom = item.box
        row = ROWS[int(3 * (top + bottom) / 2 / canvas.height)]
        column = COLUMNS[int(3 * (left + right) / 2 / canvas.width)]
        place = next(name for name, where in PLACES.items() if where == (row, column))
        sides = zip((left, top, right, bottom), (canvas.width, canvas.height) * 2, strict=True)
        box = str([round(100 * at / length) for at, length in sides])
        size = "large" if right - left > 31 else "small"
        things.append(Thing(1, size, item.hollow, item.colour, item.shape, item.direction, item.word, place, box))
    edges = {
        edge: colour for edge, colour in zip(("left", "right", "top", "bottom"), canvas.edges, strict=True) if colour
    }
    layout = {"scattered": "scattered", "rows": "in rows", "grid": "in a grid"}[canvas.layout]
    return Known(things, edges, layout, len(canvas.objects))


def named(known: Known, name: str) -> list[Thing]:
    """The things that a name such as `the red stars` or `the object at the center` fits."""
    if match := re.fullmatch(rf"the object at the ({PLACE})", name):
        return [thing for thing in known.things if thing.place == match[1]]
    if match := re.fullmatch(r"the object with the word (\w+)", name):
        return [thing for thing in known.things if thing.word == match[1]]
    words = [SINGULAR.get(word, word) for word in re.sub("^(the|an?) ", "", name).split()]
    assert {*words} <= {*SHAPES, *COLOURS, "object"}, name
    return [thing for thing in known.things if all(word in (thing.colour, thing.shape, "object") for word in words)]


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` is from `b`, where their places are in one row or one column."""
    assert a.place is not None
    assert b.place is not None
    (row, column), (other_row, other_column) = PLACES[a.place], PLACES[b.place]
    if row == other_row and column != other_column:
        return "left" if COLUMNS.index(column) < COLUMNS.index(other_column) else "right"
    if column == other_column and row != other_row:
        return "above" if ROWS.index(row) < ROWS.index(other_row) else "below"
    return None


def solve(known: Known, question: str) -> str | None:
    def one(name: str) -> Thing:
        (thing,) = named(known, name)
        assert thing.number == 1
        return thing

    def same(name: str, field: str) -> Any:
        found = {getattr(thing, field) for thing in named(known, name)}
        assert len(found) == 1, (question, found)
        return found.pop()

    def count(name: str) -> int:
        return sum(thing.number for thing in named(known, name))

    def yes(fact: object) -> str:
        return "yes" if fact else "no"

    def content(box: str) -> str:
        (thing,) = [thing for thing in known.things if thing.box == box]
        name = f"{'hollow ' * thing.hollow}{thing.colour} {thing.shape}"
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

    rules: dict[str, Callable[..., Any]] = {
        r"what color is the (\w+) edge": lambda edge: known.edges[edge],
        r"is the (left|right|top|bottom) edge (\w+)": lambda edge, colour: yes(known.edges[edge] == colour),
        r"what color (?:is|are) (.+)": lambda name: same(name, "colour"),
        r"what shape (?:is|are) (.+)": lambda name: same(name, "shape"),
        r"what word is on (.+)": lambda name: one(name).word,
        r"what is the box of (.+)": lambda name: one(name).box,
        r"what is in the box (.+)": content,
        r"how are the objects arranged": lambda: known.layout,
        r"how many (.+) are there": lambda name: COUNTS[count(name)],
        r"where (?:does|do) (.+) point": lambda name: same(name, "direction"),
        r"(?:does|do) (.+) point (\w+)": lambda name, where: yes(same(name, "direction") == where),
        r"where is (.+) relative to (.+)": lambda name, other: relation(one(name), one(other)),
        r"where is (.+)": lambda name: one(name).place,
        r"(?:is|are) (.+) hollow or filled": lambda name: "hollow" if same(name, "hollow") else "filled",
        r"(?:is|are) (.+) (hollow|filled)": lambda name, state: yes(same(name, "hollow") == (state == "hollow")),
        r"is (.+) small or large": lambda name: one(name).size,
        rf"is there an object at the ({PLACE})": lambda place: yes([t for t in known.things if t.place == place]),
        r"(?:is|are) there exactly (\w+) (.+)": lambda number, name: yes(count(name) == COUNTS.index(number)),
        r"is there an? (.+)": lambda name: yes(named(known, name)),
        r"is the word (\w+) in the picture": lambda word: yes([t for t in known.things if t.word == word]),
        r"is (.+?) (?:to the )?(left|right|above|below)(?: of)? (the .+)": lambda name, where, other: yes(
            relation(one(name), one(other)) == where
        ),
        r"is (the .+?) (?:an? )?(\w+)": lambda name, value: yes(value in (one(name).colour, one(name).shape)),
    }
    matches = ((re.fullmatch(pattern, question.removesuffix("?")), rule) for pattern, rule in rules.items())
    return next((rule(*match.groups()) for match, rule in matches if match), None)
