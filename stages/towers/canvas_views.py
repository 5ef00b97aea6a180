"""Data source `views`: what a vision tower is trained on: pieces of canvases, or whole ones, with the objects in them.

An object is told by its properties. Scenes are mixed in, so that one tower knows both, and crowds (`crowds`).
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from qformer.canvases.canvas import DIRECTIONS, POINTING, SHAPES, Box, Canvas, CanvasObject, held_out
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.source import Canvases
from qformer.canvases.text import canvas_captions
from qformer.resolution.base import resize
from qformer.scenes.phrases import Properties
from qformer.scenes.scenes import Scenes, draw
from qformer.scenes.text import COLOURS, POSITIONS, SIZES, WORDS
from qformer.stages.towers.crowds import draw_crowd
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from qformer.scenes.text import Scene

VALUES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "word": WORDS,
    "position": POSITIONS,
    "direction": DIRECTIONS,
    "state": ("filled", "hollow"),
}
#: Kinds of views that training mixes, by their share: pieces at their own size, pieces that are scaled a little, whole
#: canvases that are squashed into the square, former scenes, and crowds.
OF_PIECES = {"own": 0.15, "scaled": 0.15, "squashed": 0.05, "scene": 0.15, "crowd": 0.5}
OF_WHOLE = {"own": 0.1, "scaled": 0.1, "scene": 0.15, "crowd": 0.65}
#: Smallest and largest factor of a scaled view, and of its width alone: what InternVL, AnyRes and UHD do to canvases.
SCALES, STRETCHES = (0.75, 1.4), (0.87, 1.15)
WRITTEN = 0.6  # share of the objects with room for a word that get one; on canvases by themselves few have
SQUARE = 0.8  # share of the crowds, of those that are shown whole, that are no larger than a scene
CROWDED = 2  # times SCENE, the greatest side of a crowd that is shown whole
WINDOWS = 6  # pieces of a canvas of which the one that cuts the fewest objects is taken
SCENE = 120  # pixels, side of a former scene: its objects are as large there as those of a canvas
STREAM = 5  # separates these random numbers from those of other sources with the same seed


@dataclass(frozen=True)
class View:
    """Part of a canvas or scene that a tower sees, and all that is to be known of it.

    Attributes:
        pixels: uint8[h, w, 3].
        canvas: what it shows at its own size; its objects are those that are whole.
        boxes: float[objects, 4], left, top, right and bottom of each in `pixels`.
        objects: all properties of each; the size only where the view is not scaled.
        caption: of all of it.
    """

    pixels: np.ndarray
    canvas: Canvas
    boxes: np.ndarray
    objects: list[Properties]
    caption: str


@dataclass(frozen=True)
class Views:
    """Seeded source of views of canvases and former scenes; view `i` is a function of the fields and `i` alone.

    Attributes:
        size: side of the square pieces, in pixels; None for whole canvases.
        patch: sides of whole canvases are cut, or scaled, to multiples of this.
        mixed: add scaled and squashed views, former scenes and crowds; else all are at their own size.
    """

    split: Literal["train", "val", "test"] = "train"
    size: int | None = SCENE
    patch: int = 20
    mixed: bool = True
    seed: int = 0
    count: int = 1_000_000

    def __post_init__(self) -> None:
        if self.patch < 1 or (self.size or SCENE) < max(60, self.patch):
            raise UsageError(f"size is {self.size} and patch is {self.patch}; give a size of at least 60 and a patch")
        Canvases(self.split, seed=self.seed, count=self.count)
        if self.count < 1:
            raise UsageError(f"count is {self.count}; give at least one view")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> View:
        """Draw a view with its phrases and its caption."""
        rng = np.random.default_rng((self.seed, index, STREAM))
        shares = (OF_PIECES if self.size else OF_WHOLE) if self.mixed else {"own": 1.0}
        kind = str(rng.choice(list(shares), p=list(shares.values())))
        if kind == "scene":
            scene = Scenes(self.split, size=SCENE, seed=self.seed, count=self.count).scene(index)
            canvas, pixels, scale = as_canvas(scene), draw(scene, SCENE, SCENE), (1.0, 1.0)
        elif kind == "crowd":
            canvas = written(draw_crowd(rng, self.split, *self._crowd_size(rng)), rng)
            pixels, scale = draw_canvas(canvas), (1.0, 1.0)
        else:
            canvas, pixels, scale = self._show_allowed(index, kind, rng)
        boxes = np.array([item.box for item in canvas.objects], dtype=float).reshape(-1, 4) * [*scale, *scale]
        objects = [properties(canvas, item, sized=scale == (1.0, 1.0)) for item in canvas.objects]
        captions = canvas_captions(canvas, rng)
        return View(pixels, canvas, boxes, objects, captions[int(rng.integers(len(captions)))])

    def _crowd_size(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw (width, height): that of the pieces, or, of whole canvases, a square of one size for most of them."""
        side = self.size or self._multiple(SCENE, np.ceil)
        if self.size or rng.random() < SQUARE:
            return side, side
        width, height = rng.integers(SCENE, CROWDED * SCENE + 1, 2).tolist()
        return self._multiple(width, np.floor), self._multiple(height, np.floor)

    def _show_allowed(
        self, index: int, kind: str, rng: np.random.Generator
    ) -> tuple[Canvas, np.ndarray, tuple[float, float]]:
        """Cut a view out of the first canvas from this one on of which it shows only what the split may show.

        In a piece, objects may be side by side that are in one third of the whole canvas, in an order that is held out.
        """
        source = Canvases(self.split, seed=self.seed, count=sys.maxsize)
        for place in itertools.count(index):
            shown = self._show(written(source.canvas(place), rng), kind, rng)
            if self.split == "test" or not held_out(shown[0]):
                break
        return shown

    def _show(
        self, whole: Canvas, kind: str, rng: np.random.Generator
    ) -> tuple[Canvas, np.ndarray, tuple[float, float]]:
        """Cut a view out of a canvas; returns what it shows, its pixels, and its scale by width and height."""
        across = down = 1.0
        if kind == "scaled":
            down = _factor(SCALES, rng)
            across = down * _factor(STRETCHES, rng)
        width, height = shown = whole.width, whole.height
        left = top = 0
        if self.size is None:
            kept = self._multiple(width, np.floor), self._multiple(height, np.floor)
            left, top = (int(rng.integers(side - less + 1)) for side, less in zip((width, height), kept, strict=True))
            if kind == "own" and cut_out(whole, left, top, *kept).objects:
                width, height = shown = kept
            else:
                left, top = 0, 0
                shown = self._multiple(across * width, np.rint), self._multiple(down * height, np.rint)
        else:
            shown = self.size, self.size
            if kind != "squashed":
                width, height = min(round(self.size / across), width), min(round(self.size / down), height)
                left, top = window(whole, width, height, rng)
        pixels = draw_canvas(whole)[top : top + height, left : left + width]
        if (width, height) != shown:
            pixels = scaled(pixels, *shown)
        return cut_out(whole, left, top, width, height), pixels, (shown[0] / width, shown[1] / height)

    def _multiple(self, side: float, to_whole: Callable[[float], float]) -> int:
        return max(int(to_whole(side / self.patch)), 1) * self.patch


def written(canvas: Canvas, rng: np.random.Generator) -> Canvas:
    """Write words, all of them different, on some of the objects that have room for one and none yet."""
    words = [WORDS[number] for number in rng.permutation(len(WORDS))]
    words = [word for word in words if word not in {item.word for item in canvas.objects}]
    items = []
    for item, chance in zip(canvas.objects, rng.random(len(canvas.objects)), strict=True):
        has_room = item.size == "large" and not item.hollow and item.shape != "arrow" and item.word is None
        items.append(replace(item, word=words.pop()) if has_room and words and chance < WRITTEN else item)
    return replace(canvas, objects=tuple(items))


def scaled(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8[h, w, 3] as the resolution strategies do: uint8[height, width, 3]."""
    image: Tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return resize(image, width, height).permute(1, 2, 0).numpy()


def _factor(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


def window(canvas: Canvas, width: int, height: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a piece around a random object; of several, the one that cuts the fewest objects."""
    best, found = None, (0, 0)
    boxes = [item.box for item in canvas.objects]
    for _ in range(WINDOWS):
        item = canvas.objects[int(rng.integers(len(canvas.objects)))]
        corner = []
        for center, side, extent in ((item.x, width, canvas.width), (item.y, height, canvas.height)):
            room = (side - item.side) / 2 - 1  # a pixel for rounding
            corner.append(min(max(round(center - side / 2 + rng.uniform(-room, room)), 0), extent - side))
        left, top = corner
        whole = sum(_holds((left, top, left + width, top + height), box) for box in boxes)
        cut = sum(_touches((left, top, left + width, top + height), box) for box in boxes) - whole
        if best is None or (-cut, whole) > best:
            best, found = (-cut, whole), (left, top)
    return found


def _holds(outer: Box, box: Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _touches(outer: Box, box: Box) -> bool:
    return box[0] < outer[2] and box[2] > outer[0] and box[1] < outer[3] and box[3] > outer[1]


def cut_out(canvas: Canvas, left: int, top: int, width: int, height: int) -> Canvas:
    """Make the canvas that a piece shows, with the objects and edges that are wholly in it."""
    inside = [
        replace(item, x=item.x - left, y=item.y - top)
        for item in canvas.objects
        if _holds((left, top, left + width, top + height), item.box)
    ]
    seen = (left == 0, left + width == canvas.width, top == 0, top + height == canvas.height)
    first, second, third, fourth = (
        colour if is_seen else None for colour, is_seen in zip(canvas.edges, seen, strict=True)
    )
    edges = (first, second, third, fourth)
    piece = replace(canvas, width=width, height=height, objects=tuple(inside), edges=edges)
    order = sorted(range(len(inside)), key=lambda number: (piece.cell(inside[number]), number))
    return replace(piece, objects=tuple(inside[number] for number in order))


def as_canvas(scene: Scene) -> Canvas:
    """Make the canvas that a former scene of `SCENE` pixels shows; its triangles point up."""
    items = tuple(
        CanvasObject(
            item.shape,
            item.colour,
            item.x * SCENE,
            item.y * SCENE,
            round(item.side * SCENE),
            item.word,
            "up" if item.shape in POINTING else None,
        )
        for item in scene.objects
    )
    return Canvas(SCENE, SCENE, items, scene.ground)


def properties(canvas: Canvas, item: CanvasObject, sized: bool = True) -> Properties:
    """All that is to be known of an object: values by the keys of `VALUES`, those that it has."""
    known = {key: getattr(item, key) for key in ("colour", "shape", "word", "direction", "state")}
    known["position"] = canvas.position(item)
    if sized:
        known["size"] = item.size
    return {key: known[key] for key in VALUES if known.get(key) is not None}
