"""Phrases about single objects of drawn scenes, to train a ViT from scratch.

A contrastive ViT can match captions of random scenes by the color and position of any object, and learns nothing more
from them. A phrase names a random part of the properties of one object, often a single one. To find `star` among
objects of any color, or `object with the word cat on it`, a ViT has to recognize shapes and read words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qformer.scenes.scenes import Scenes
from qformer.scenes.text import COLOURS, POSITIONS, SHAPES, SIZES, WORDS, Scene, SceneObject
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VALUES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "word": WORDS,
    "position": POSITIONS,
}
#: Relative frequency of phrases with a single property; properties that are harder to see are more frequent.
ALONE = {"size": 1, "colour": 1, "shape": 4, "word": 8, "position": 1}

Properties = dict[str, str]  # values of some of the properties of an object


@dataclass(frozen=True)
class Phrases:
    """Seeded source of scenes of the training split with phrases.

    Attributes:
        size: side of the square images, in pixels.
        phrases: number of phrases for each object.
    """

    size: int = 112
    seed: int = 0
    count: int = 1_000_000
    phrases: int = 2

    def __post_init__(self) -> None:
        if self.phrases < 1:
            raise UsageError(f"phrases is {self.phrases}; give at least 1 for each object")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Scene, list[Properties]]:
        """Draw scene `index` of the training split, and `phrases` phrases for each of its objects in turn."""
        scene = Scenes("train", size=self.size, seed=self.seed, count=self.count).scene(index)
        rng = np.random.default_rng((self.seed, index, 2))
        known = [properties(item) for item in scene.objects]
        return scene, [draw_properties(one, ALONE, rng) for one in known for _ in range(self.phrases)]


def properties(item: SceneObject) -> Properties:
    """Collect the properties that an object has."""
    return {key: str(value) for key in VALUES if (value := getattr(item, key)) is not None}


def draw_properties(known: Properties, alone: Mapping[str, float], rng: np.random.Generator) -> Properties:
    """Draw a single property, or, equally often, a random half of the properties (at least the shape).

    Args:
        alone: relative frequency of each property by itself.
    """
    if rng.random() < 0.5:
        weights = np.array([alone[key] for key in known], dtype=float)
        key = str(rng.choice(list(known), p=weights / weights.sum()))
        return {key: known[key]}
    return {key: value for key, value in known.items() if rng.random() < 0.5} or {"shape": known["shape"]}


def phrase(named: Properties) -> str:
    """Write properties as `large red star with the word cat on it at the top left`; `object` if there is no shape."""
    words = [named[key] for key in ("size", "colour") if key in named] + [named.get("shape", "object")]
    if "word" in named:
        words.append(f"with the word {named['word']} on it")
    if "position" in named:
        words.append(f"at the {named['position']}")
    return " ".join(words)


def matches(items: Sequence[SceneObject], phrases: Sequence[Properties]) -> np.ndarray:
    """Matrix bool[R, T], True where a phrase (column) is true of an object (row)."""
    objects = np.array([[_code(key, getattr(item, key), -2) for key in VALUES] for item in items])  # -2: no match
    named = np.array([[_code(key, one.get(key), -1) for key in VALUES] for one in phrases])  # -1: matches any object
    return ((named == -1) | (objects[:, None] == named)).all(axis=2)  # (R, T, 5) -> (R, T)


def _code(key: str, value: str | None, missing: int) -> int:
    return missing if value is None else VALUES[key].index(value)
