"""Phrases about single objects of drawn scenes, for a ViT from scratch: what is told, and of what it is true.

Captions of random scenes can be told apart by the colour and the place of any object, so a contrastive ViT stops
there. A phrase tells a random part of what is true of one object, often one property alone: to find `star` among all
objects, whatever their colour, or `object with the word cat on it`, a ViT has to see shapes and read words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qformer.scenes.scenes import Scenes
from qformer.scenes.text import COLOURS, POSITIONS, SHAPES, SIZES, WORDS, Scene, SceneObject
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

VALUES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "word": WORDS,
    "position": POSITIONS,
}
#: How often a property is told alone, relative to the others that an object has; the harder to see, the more often.
ALONE = {"size": 1, "colour": 1, "shape": 4, "word": 8, "position": 1}

Properties = dict[str, str]  # values of some of the properties of an object


@dataclass(frozen=True)
class Phrases:
    """A source of scenes with phrases, endless and seeded; the scenes are those of the training split.

    Attributes:
        size: of the pictures in pixels, one side.
        phrases: for each object.
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
        """Scene `index` of the training split, and `phrases` of each of its objects in turn."""
        scene = Scenes("train", size=self.size, seed=self.seed, count=self.count).scene(index)
        rng = np.random.default_rng((self.seed, index, 2))
        return scene, [draw_properties(item, rng) for item in scene.objects for _ in range(self.phrases)]


def draw_properties(item: SceneObject, rng: np.random.Generator) -> Properties:
    """One property as often as a random half of them (at least the shape)."""
    known = {key: str(value) for key in VALUES if (value := getattr(item, key)) is not None}
    if rng.random() < 0.5:
        weights = np.array([ALONE[key] for key in known], dtype=float)
        key = str(rng.choice(list(known), p=weights / weights.sum()))
        return {key: known[key]}
    return {key: value for key, value in known.items() if rng.random() < 0.5} or {"shape": item.shape}


def phrase(told: Properties) -> str:
    """`large red star with the word cat on it at the top left`, less what is not told; `object` where no shape is."""
    words = [told[key] for key in ("size", "colour") if key in told] + [told.get("shape", "object")]
    if "word" in told:
        words.append(f"with the word {told['word']} on it")
    if "position" in told:
        words.append(f"at the {told['position']}")
    return " ".join(words)


def matches(items: Sequence[SceneObject], told: Sequence[Properties]) -> np.ndarray:
    """Whether a phrase is true of an object: bool[R, T]."""
    seen = np.array([[_code(key, getattr(item, key), -2) for key in VALUES] for item in items])  # -2: fits no phrase
    asked = np.array([[_code(key, one.get(key), -1) for key in VALUES] for one in told])  # -1: fits every object
    return ((asked == -1) | (seen[:, None] == asked)).all(axis=2)  # (R, T, 5) -> (R, T)


def _code(key: str, value: str | None, missing: int) -> int:
    return missing if value is None else VALUES[key].index(value)
