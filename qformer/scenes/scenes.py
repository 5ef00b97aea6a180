"""Data source that draws its own images: seeded, of any number and size, with true captions and questions.

`Scenes` gives `Sample`s like any other source, and also the `Scene` of each, so that the output of a model can be
checked against the content of the image. Images of training, validation and test never coincide, and each test image
has a combination of shapes, colors and relations that no training image has (the rule is in `qformer.scenes.text`).

Captions mention left and right, and images contain words, so do not flip them as an augmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

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
SUPERSAMPLING = 4  # factor by which masks are drawn larger, then averaged down
JITTER = 0.04  # largest offset of an object from the center of its cell; small, so that rows and columns are clear
GAP = 0.01  # smallest distance of an object from the border of its cell
SIDES = {"small": (0.19, 0.21), "large": (0.29, 0.31)}  # a cell is 1/3
GROUND = (125, 166)  # shades of gray on which black, white and every color stand out
WRITTEN = 1 / 3  # share of large objects with a word; on small ones it would not be readable

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
    """Outline of a disc minus a second one through the horns of the crescent."""
    horn, center = 0.12, 0.72
    x, y = math.cos(math.tau * horn), math.sin(math.tau * horn)
    turn = math.atan2(y, x - center) / math.tau
    return _arc(horn, 1 - horn) + _arc(1 - turn, turn, math.hypot(x - center, y), center)


def _unit(points: Outline) -> Outline:
    """Stretch an outline to fill the square from (0, 0) to (1, 1)."""
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
    """Drawn scenes; sample `i` is a function of the fields and `i` alone, in any process and any order.

    Attributes:
        split: `val` resembles `train`; `test` has combinations that neither has; `any` is for text about scenes that
            are not shown.
        size: size of the images in pixels: one side, or (width, height).
        seed: seed of the scenes.
        count: length of the source, which may be any number, since nothing is stored.
        objects: minimum and maximum number of objects in a scene.
        questions: add a question to each sample, of each kind in turn. Scenes are drawn until that kind can be asked,
            so they differ from those of the same index without questions.
        captions: number of captions to keep; the first two describe every object, the others a part.
        apart: no two samples show the same.
    """

    apart: ClassVar[bool] = True

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
        """(width, height) of the images."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Draw an image `uint8[h, w, 3]` with captions and, with `questions`, a question whose kind ends the key."""
        scene, question, rng = self._draw(index)
        own = "" if self.objects == (1, max(GROUPINGS)) else f",objects={self.objects}".replace(" ", "")
        key = f"scenes/{self.split}/{self.seed}{own}/{index}"
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
        """Draw a scene, uint8[h, w, 3]."""
        return draw(scene, *self.pixels)

    def scene(self, index: int) -> Scene:
        """Get the scene of a sample without drawing it."""
        return self._draw(index)[0]

    def _draw(self, index: int) -> tuple[Scene, Question | None, np.random.Generator]:
        """Compose a scene and its question, and return them with the generator for its captions."""
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
    """Compose a random scene of a split, with a number of objects in the given range.

    Number, groups, cells, sizes and words are drawn first, then shapes and colors until the split allows them. So the
    split does not bias the former, and its rule does not bias the latter.
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
    """Draw the fields of `SceneObject` after shape and color, in their order."""
    side = rng.uniform(*SIDES[size])
    jitter = min(JITTER, (1 / 3 - side) / 2 - GAP)
    row, column = divmod(cell, 3)
    x, y = ((2 * i + 1) / 6 + rng.uniform(-jitter, jitter) for i in (column, row))
    written = rng.random() < WRITTEN and size == "large"
    return size, POSITIONS[cell], x, y, side, word if written else None


def draw(scene: Scene, width: int, height: int) -> np.ndarray:
    """Draw a scene, `uint8[height, width, 3]`, antialiased at any size.

    Words are in capitals, which stay readable at the smallest size: from about 112 pixels on.
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
    """Draw the masks of an object and of the word on it, as gray images of size `canvas`; all in pixels."""
    scale = SUPERSAMPLING
    (x, y), side = (scale * offset[0], scale * offset[1]), scale * side
    size = (scale * canvas[0], scale * canvas[1])
    body = Image.new("L", size)
    pen = ImageDraw.Draw(body)
    pen.polygon([(x + side * u, y + side * v) for u, v in OUTLINES[item.shape]], fill=255)
    if item.word is None:
        return body.reduce(scale), None
    # The letters have a rim in the color of the object, so that they can be wider than a star or a heart.
    text = item.word.upper()
    font, rim = word_font(text, round(side))
    middle = (x + side / 2, y + side * MIDDLE.get(item.shape, 0.5))
    pen.text(middle, text, fill=255, font=font, anchor="mm", stroke_width=rim)
    ink = Image.new("L", size)
    ImageDraw.Draw(ink).text(middle, text, fill=255, font=font, anchor="mm")
    return body.reduce(scale), ink.reduce(scale)


@lru_cache(maxsize=1024)
def word_font(text: str, side: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """Find the largest font in which `text` with a rim fits into a square of this side, and the width of the rim."""
    rim = side // 20
    left, top, right, bottom = ImageFont.load_default(100).getbbox(text)
    size = 100 * min((side - 2 * rim) / (right - left), 0.42 * side / (bottom - top))
    return ImageFont.load_default(max(size, 1)), rim
