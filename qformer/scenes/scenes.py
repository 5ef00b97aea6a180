"""A data source that draws its own pictures: seeded, endless, any pixel size, with true captions and questions.

`Scenes` yields `Sample`s as any other source does, and gives the `Scene` behind each, so that what a model sees can
be checked against what is there. Training, validation and test pictures never coincide; a test picture always holds
a combination of shapes, colours and relations that no training picture holds (`qformer.scenes.text` has the rule).

The captions speak of left and right and the pictures hold words: do not flip them as an augmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qformer.scenes.text import (
    GROUPINGS,
    KINDS,
    PAIRS,
    POSITIONS,
    SIZES,
    WORDS,
    Question,
    Scene,
    SceneObject,
    captions,
    description,
    held_out,
    pick,
    questions,
)
from qformer.types import Sample, UsageError

__all__ = ["KINDS", "Question", "Scene", "SceneObject", "Scenes", "captions", "description", "draw", "questions"]

SPLITS = ("train", "val", "test", "any")
SUPERSAMPLING = 4  # masks are drawn so many times larger and averaged down
JITTER = 0.04  # an object's centre may lie this far from its cell's, so little that rows and columns stay plain
GAP = 0.01  # an object keeps this far from the border of its cell
SIDES = {"small": (0.19, 0.21), "large": (0.29, 0.31)}  # a cell is 1/3
GROUND = (125, 166)  # shades of grey on which black, white and every colour stand out
WRITTEN = 1 / 3  # share of the large objects that carry a word; on small ones it could not be read

RGB = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 25),
    "green": (30, 150, 50),
    "blue": (30, 80, 220),
    "purple": (140, 40, 160),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
PALE = ("orange", "yellow", "white")  # a word on these is black, on the others white
MIDDLE = {"triangle": 0.68, "heart": 0.42}  # height of a word on a shape, from its top; others 0.5

Outline = list[tuple[float, float]]  # corners (x, y), y downwards


def _arc(start: float, stop: float, radius: float = 1, x: float = 0, steps: int = 48) -> Outline:
    """Points on a circle around (x, 0), from angle `start` to `stop` in turns."""
    turns = [start + (stop - start) * i / steps for i in range(steps + 1)]
    return [(x + radius * math.cos(math.tau * t), radius * math.sin(math.tau * t)) for t in turns]


def _star() -> Outline:
    turns = [i / 10 - 1 / 4 for i in range(10)]
    radii = [1, 0.45] * 5
    return [(r * math.cos(math.tau * t), r * math.sin(math.tau * t)) for r, t in zip(radii, turns, strict=True)]


def _heart() -> Outline:
    angles = [math.tau * i / 64 for i in range(64)]
    return [
        (16 * math.sin(t) ** 3, -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t))
        for t in angles
    ]


def _moon() -> Outline:
    """A disc less another one, which passes through the horns of the crescent and leaves its middle filled."""
    horn, centre = 0.12, 0.72
    x, y = math.cos(math.tau * horn), math.sin(math.tau * horn)
    turn = math.atan2(y, x - centre) / math.tau
    return _arc(horn, 1 - horn) + _arc(1 - turn, turn, math.hypot(x - centre, y), centre)


def _unit(points: Outline) -> Outline:
    """The outline stretched to fill the square from (0, 0) to (1, 1)."""
    xs, ys = zip(*points, strict=True)
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


OUTLINES: dict[str, Outline] = {
    "circle": _unit(_arc(0, 1)),
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "star": _unit(_star()),
    "heart": _unit(_heart()),
    "cross": _unit([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]),
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "moon": _unit(_moon()),
}


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes: sample `i` is a function of the fields and of `i` alone, in any process, in any order.

    Attributes:
        split: `val` resembles `train`; `test` holds combinations that neither has; `any` is for text about scenes that
            nobody sees.
        size: of the pictures in pixels: one side, or (width, height).
        seed: another seed gives other scenes.
        count: length of the source; nothing is stored, so it may be any number.
        objects: least and greatest number of objects in a scene.
        questions: whether each sample asks a question, of the kinds in turn. Its scene is then drawn until that
            kind can be asked, hence differs from the scene of the same index without questions.
        captions: keep the first so many of each picture; the first two tell everything, the others a part.
    """

    split: Literal["train", "val", "test", "any"] = "train"
    size: int | tuple[int, int] = 112
    seed: int = 0
    count: int = 1_000_000
    objects: tuple[int, int] = (1, 4)
    questions: bool = False
    captions: int | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"split is '{self.split}'; scenes have {', '.join(SPLITS)}")
        if min(self.pixels) < 1:
            raise UsageError(f"size is {self.size}; give a positive number of pixels, such as 112 or (160, 112)")
        if self.seed < 0 or self.count < 0:
            raise UsageError(f"seed is {self.seed} and count is {self.count}; neither may be negative")
        if self.captions is not None and self.captions < 1:
            raise UsageError(f"captions is {self.captions}; give how many to keep, at least 1, or leave it out")
        least, greatest = self.objects
        if not 1 <= least <= greatest <= max(GROUPINGS):
            raise UsageError(f"objects is {self.objects}; give the least and the greatest number, from 1 to 4")

    @property
    def pixels(self) -> tuple[int, int]:
        """(width, height) of the pictures."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """The picture `uint8[h, w, 3]` with its captions and, if asked for, a question whose kind ends the key."""
        scene, question, rng = self._draw(index)
        key = f"scenes/{self.split}/{self.seed}/{index}"
        if question is not None:
            key = f"{key}:{question.kind}"
        return Sample(
            image=self.picture(scene),
            key=key,
            image_id=key,
            captions=captions(scene, rng)[: self.captions],
            question=question.question if question else None,
            answers=[question.answer] if question else [],
        )

    def picture(self, scene: Scene) -> np.ndarray:
        """uint8[h, w, 3]."""
        return draw(scene, *self.pixels)

    def scene(self, index: int) -> Scene:
        """What the picture of that sample shows; draws nothing."""
        return self._draw(index)[0]

    def _draw(self, index: int) -> tuple[Scene, Question | None, np.random.Generator]:
        """The scene, its question if there is to be one, and the generator for the text that follows."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        if not self.questions:
            return _compose(rng, self.split, self.objects), None, rng
        kinds = [kind for kind in KINDS if kind != "relation" or self.objects[1] > 1]
        while True:
            scene = _compose(rng, self.split, self.objects)
            for question in questions(scene, rng):
                if question.kind == kinds[index % len(kinds)]:
                    return scene, question, rng


def _compose(rng: np.random.Generator, split: str, objects: tuple[int, int]) -> Scene:
    """A random scene of that split, with a number of objects between the two given.

    Number, groups, cells, sizes and words are settled first; then shapes and colours are drawn until the split
    allows them. So the split cannot bias the former, and the rule it follows does not bias the latter.
    """
    count = int(rng.integers(objects[0], objects[1] + 1))
    groups = pick(rng, GROUPINGS[count])
    members = rng.permutation([group for group, size in enumerate(groups) for _ in range(size)]).tolist()
    sizes = [pick(rng, SIZES) for _ in groups]
    cells = sorted(rng.permutation(len(POSITIONS))[:count].tolist())
    words = rng.permutation(len(WORDS))[:count].tolist()
    places = [_place(rng, cells[i], sizes[members[i]], WORDS[words[i]]) for i in range(count)]
    ground = int(rng.integers(*GROUND))
    while True:
        pairs = rng.permutation(len(PAIRS))[: len(groups)].tolist()
        kinds = [PAIRS[pairs[group]] for group in members]
        items = tuple(SceneObject(shape, colour, *place) for (shape, colour), place in zip(kinds, places, strict=True))
        scene = Scene(items, ground)
        if split == "any" or (held_out(scene, diagonals=False) if split == "test" else not held_out(scene, True)):
            return scene


def _place(
    rng: np.random.Generator, cell: int, size: str, word: str
) -> tuple[str, str, float, float, float, str | None]:
    """What `SceneObject` holds beside shape and colour, in its order."""
    side = rng.uniform(*SIDES[size])
    jitter = min(JITTER, (1 / 3 - side) / 2 - GAP)
    row, column = divmod(cell, 3)
    x, y = ((2 * i + 1) / 6 + rng.uniform(-jitter, jitter) for i in (column, row))
    written = rng.random() < WRITTEN and size == "large"
    return size, POSITIONS[cell], x, y, side, word if written else None


def draw(scene: Scene, width: int, height: int) -> np.ndarray:
    """The picture `uint8[height, width, 3]`, smooth at any size.

    Words are in capitals, since those can be read when they are smallest: from about 112 pixels on.
    """
    image = Image.new("RGB", (width, height), (scene.ground,) * 3)
    for item in scene.objects:
        left, top, right, bottom = item.box(width, height)
        x, y = math.floor(left), math.floor(top)
        canvas = (math.ceil(right) - x, math.ceil(bottom) - y)
        body, ink = _masks(item, canvas, (left - x, top - y), right - left)
        image.paste(RGB[item.colour], (x, y), body)
        if ink is not None:
            image.paste(RGB["black" if item.colour in PALE else "white"], (x, y), ink)
    return np.array(image)


def _masks(
    item: SceneObject, canvas: tuple[int, int], offset: tuple[float, float], side: float
) -> tuple[Image.Image, Image.Image | None]:
    """Coverage of the object and of the word on it, as grey images of size `canvas`; all in pixels."""
    scale = SUPERSAMPLING
    (x, y), side = (scale * offset[0], scale * offset[1]), scale * side
    size = (scale * canvas[0], scale * canvas[1])
    body = Image.new("L", size)
    pen = ImageDraw.Draw(body)
    pen.polygon([(x + side * u, y + side * v) for u, v in OUTLINES[item.shape]], fill=255)
    if item.word is None:
        return body.reduce(scale), None
    # The letters stand in a rim of the object's own colour, so that they can be wider than a star or a heart is.
    text = item.word.upper()
    font, rim = _font(text, round(side))
    middle = (x + side / 2, y + side * MIDDLE.get(item.shape, 0.5))
    pen.text(middle, text, fill=255, font=font, anchor="mm", stroke_width=rim)
    ink = Image.new("L", size)
    ImageDraw.Draw(ink).text(middle, text, fill=255, font=font, anchor="mm")
    return body.reduce(scale), ink.reduce(scale)


@lru_cache(maxsize=1024)
def _font(text: str, side: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """The largest font in which `text` and a rim around it stay inside a square of that side, and the rim's width."""
    rim = side // 20
    left, top, right, bottom = ImageFont.load_default(100).getbbox(text)
    size = 100 * min((side - 2 * rim) / (right - left), 0.42 * side / (bottom - top))
    return ImageFont.load_default(max(size, 1)), rim
