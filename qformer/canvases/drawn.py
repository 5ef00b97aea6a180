"""Base of the sources of canvases: their options, and questions of each kind in turn."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from qformer.canvases.canvas import MOST
from qformer.canvases.layout import compose, room, share_with_room
from qformer.scenes.scenes import SPLITS
from qformer.types import Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.canvases.canvas import Canvas
    from qformer.scenes.text import Question

SMALLEST = 120  # pixels, room for a large object in each of the nine positions, with bands
LARGEST = 4096  # pixels; a picture with such sides takes 50 MB
RAREST = 1e-3  # share of sizes that must have room for the least number of objects, since they are drawn until one has
Shown = TypeVar("Shown")


@dataclass(frozen=True)
class Sized:
    """Options of a source of drawn pictures; sample `i` is a function of them and `i` alone, in any process and order.

    Attributes:
        split: `val` resembles `train`; `test` has combinations that neither has; `any` is for text about what is not
            shown.
        sides: least and greatest width and height, in pixels; equal ones give squares of one size.
        aspect: greatest ratio of the longer side to the shorter one.
        seed: seed of the pictures.
        count: length of the source, which may be any number, since nothing is stored.
        NAME, STREAM: beginning of the keys, and what separates the random numbers from those of other sources.
        VARIED: options that change what is drawn, and so stand in a key where they are not the usual ones.
        apart: no two samples show the same.
    """

    NAME: ClassVar[str]
    STREAM: ClassVar[int]
    VARIED: ClassVar[tuple[str, ...]] = ("sides", "aspect")
    apart: ClassVar[bool] = True

    split: Literal["train", "val", "test", "any"] = "train"
    sides: tuple[int, int] = (120, 480)
    aspect: float = 4.0
    seed: int = 0
    count: int = 1_000_000

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"split is '{self.split}'; {self.NAME} have {', '.join(SPLITS)}")
        if not SMALLEST <= self.sides[0] <= self.sides[1] <= LARGEST:
            raise UsageError(
                f"sides is {self.sides}; give the least and the greatest side in pixels, from {SMALLEST} to {LARGEST}"
            )
        if self.aspect < 1:
            raise UsageError(f"aspect is {self.aspect}; give the greatest ratio of the sides, at least 1")
        if self.seed < 0 or self.count < 0:
            raise UsageError(f"seed is {self.seed} and count is {self.count}; neither may be negative")
        if self.count > sys.maxsize:
            raise UsageError(f"count is {self.count}; give at most {sys.maxsize}")

    def __len__(self) -> int:
        return self.count

    def rng(self, index: int, *more: int) -> np.random.Generator:
        """Make the generator of a sample."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.NAME} has no {index}, but {self.count}")
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index, self.STREAM, *more))

    def key(self, index: int, kind: str | None) -> str:
        """Name of a sample, which ends with the kind of its question.

        Options that change what is drawn stand in it where they are not the usual ones: the same number of the same
        seed is then another picture.
        """
        own = "".join(
            f",{option.name}={getattr(self, option.name)}".replace(" ", "")
            for option in fields(self)
            if option.name in self.VARIED and getattr(self, option.name) != option.default
        )
        return f"{self.NAME}/{self.split}/{self.seed}{own}/{index}{'' if kind is None else f':{kind}'}"


@dataclass(frozen=True)
class Drawn(Sized):
    """Options of a source of canvases: those of `Sized`, and objects.

    Attributes:
        objects: least and greatest number of objects; no more than fit on the largest canvas.
        BOUNDS: least and greatest number of objects that can be asked for.
    """

    VARIED: ClassVar[tuple[str, ...]] = ("sides", "aspect", "objects")
    BOUNDS: ClassVar[tuple[int, int]] = (1, MOST)

    objects: tuple[int, int] = (1, MOST)

    def __post_init__(self) -> None:
        super().__post_init__()
        (first, last), fit = self.BOUNDS, room(self.sides[1], self.sides[1])
        if not first <= self.objects[0] <= min(self.objects[1], fit) <= self.objects[1] <= last:
            raise UsageError(
                f"objects is {self.objects}; give the least and the greatest number, from {first} to {last}, of which "
                f"{fit} fit on {self.sides[1]} pixels"
            )
        if share_with_room(self.sides, self.aspect, self.objects[0]) < RAREST:
            raise UsageError(
                f"objects is {self.objects} and sides is {self.sides}, of which hardly any size has room for "
                f"{self.objects[0]} objects; give fewer objects, or a larger least side"
            )

    @property
    def numbers(self) -> tuple[int, int]:
        """Least and greatest number of objects that there are."""
        return self.objects[0], min(self.objects[1], room(self.sides[1], self.sides[1]))

    def compose(self, rng: np.random.Generator) -> Canvas:
        """Compose a canvas of the split."""
        return compose(rng, self.split, self.numbers, self.sides, self.aspect)


@dataclass(frozen=True)
class Quiz(ABC, Generic[Shown]):
    """Questions of each kind in turn, for a source whose samples are composed before they are drawn.

    Attributes:
        questions: add a question to each sample, of each kind in turn, or of those that are listed (`KINDS`). It is
            drawn until that kind can be asked, so that it differs from that of the same index without questions.
        captions: number of captions to keep, the first of those that a sample has.
    """

    KINDS: ClassVar[tuple[str, ...]]

    questions: bool | tuple[str, ...] = False
    captions: int | None = None

    def check_quiz(self, room: str) -> None:
        """Refuse a number of captions below 1, and kinds that the options do not allow; `room` is what limits them."""
        if self.captions is not None and self.captions < 1:
            raise UsageError(f"captions is {self.captions}; give how many to keep, at least 1, or leave it out")
        possible = self.possible()
        for kind in self.kinds():
            if kind not in possible:
                raise UsageError(
                    f"questions has '{kind}'; give true for every kind, or some of those that {room} allow: "
                    f"{', '.join(possible)}"
                )

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Shown:
        """Compose what a sample shows."""

    @abstractmethod
    def ask(self, shown: Shown, rng: np.random.Generator) -> Sequence[Question]:
        """Write questions about it, of the kinds that it allows."""

    def possible(self) -> tuple[str, ...]:
        """Kinds of questions that the options allow."""
        return self.KINDS

    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions, which are asked in turn; none without questions."""
        return (self.possible() if self.questions else ()) if isinstance(self.questions, bool) else self.questions

    def pose(self, index: int, rng: np.random.Generator) -> tuple[Shown, Question | None]:
        """Compose a sample and, with `questions`, that of the kind whose turn it is, without drawing it."""
        kinds = self.kinds()
        while True:
            shown = self.draw(rng)
            if not kinds:
                return shown, None
            for question in self.ask(shown, rng):
                if question.kind == kinds[index % len(kinds)]:
                    return shown, question


@dataclass(frozen=True)
class Asking(Quiz[Shown], Drawn):
    """Source of canvases that can ask a question about each sample; options as of `Drawn` and `Quiz`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_quiz(f"up to {self.numbers[1]} objects")

    @abstractmethod
    def tell(self, shown: Shown, rng: np.random.Generator) -> list[str]:
        """Write captions of it; the first two of a canvas tell everything but boxes, the others a part."""

    @abstractmethod
    def picture(self, shown: Shown) -> Any:
        """Draw it, in a form of `Sample.image`."""

    def __getitem__(self, index: int) -> Sample:
        """Draw a sample with captions and, with `questions`, a question whose kind ends the key."""
        shown, question, rng = self.composed(index)
        key = self.key(index, question.kind if question else None)
        return Sample(
            image=self.picture(shown),
            key=key,
            image_id=key,
            captions=self.tell(shown, rng)[: self.captions],
            question=question.question if question else None,
            answers=[question.answer] if question else [],
            facts={"question_type": question.kind} if question else {},
        )

    def composed(self, index: int) -> tuple[Shown, Question | None, np.random.Generator]:
        """Compose a sample and its question without drawing it; return them with the generator for its captions."""
        rng = self.rng(index)
        return (*self.pose(index, rng), rng)
