"""Captions of mosaics and questions about them, each with one right answer that no word of the question gives away.

A caption is asked about where it belongs and where it does not equally often, and the photos of a mosaic, with one that
is absent, are drawn alike: so a true statement has the same captions and places as a false one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qformer.canvases.names import NUMBERS
from qformer.mosaics.layout import at, place_shares
from qformer.scenes.text import Question, pick

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from qformer.mosaics.layout import Mosaic

    Ask = Callable[..., "MosaicQuestion | None"]

KINDS = ("yes/no", "presence", "where", "count", "content")
OFFERED = 4  # answers to choose from
PAIR = 38  # words of two captions in one


@dataclass(frozen=True)
class MosaicQuestion(Question):
    """Question about a mosaic.

    Attributes:
        choices: answers to choose from, the right one among them, in random order.
        others: further answers that are right as well.
    """

    choices: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Teller:
    """Writer of texts about mosaics.

    Attributes:
        captions: of each photo of the album, cleaned.
        numbers: least and greatest number of photos of the mosaics.
    """

    captions: Sequence[Sequence[str]]
    numbers: tuple[int, int]

    def tell(self, mosaic: Mosaic, rng: np.random.Generator) -> list[str]:
        """Write captions: two places together, if they are short enough, then up to four places, each alone."""
        chosen = [mosaic.placed[place].photo for place in rng.permutation(len(mosaic.placed))[:4].tolist()]
        told = [(at(mosaic.names[photo]), pick(rng, self.captions[photo])) for photo in chosen]
        (first, one), (second, other), *_ = told
        both = len(one.split()) + len(other.split()) <= PAIR
        together = [f"{first}, {one}, and {second}, {other}"] if both else []
        return [*together, *(f"{place}, {caption}" for place, caption in told)]

    def ask(self, mosaic: Mosaic, rng: np.random.Generator) -> list[MosaicQuestion]:
        """Write one question of each kind of `KINDS`.

        The kind `where` is left out at random to balance the frequencies of its answers; call again for more.
        """
        asks: tuple[Ask, ...] = (self._is_placed, self._is_present, self._where, self._count, self._content)
        return [question for ask in asks if (question := ask(mosaic, rng)) is not None]

    def _is_placed(self, mosaic: Mosaic, rng: np.random.Generator) -> MosaicQuestion:
        photo, other = rng.choice(list(mosaic.names), 2, replace=False).tolist()
        truth = bool(rng.random() < 0.5)
        caption = pick(rng, self.captions[photo if truth else other])
        return _yes_no("yes/no", f"is this true of the photo {at(mosaic.names[photo])}, {caption}?", truth)

    def _is_present(self, mosaic: Mosaic, rng: np.random.Generator) -> MosaicQuestion:
        truth = bool(rng.random() < 0.5)
        caption = pick(rng, self.captions[pick(rng, list(mosaic.names)) if truth else mosaic.absent])
        return _yes_no("presence", f"is there a photo that shows this, {caption}?", truth)

    def _where(self, mosaic: Mosaic, rng: np.random.Generator) -> MosaicQuestion | None:
        photo = pick(rng, list(mosaic.names))
        right = mosaic.names[photo]
        if rng.random() > place_shares(self.numbers)[right]:
            return None
        asked = f"where is the photo that shows this, {pick(rng, self.captions[photo])}?"
        others = [name for name in mosaic.names.values() if name != right]
        return MosaicQuestion("where", asked, right, _offer(rng, right, others))

    def _count(self, mosaic: Mosaic, rng: np.random.Generator) -> MosaicQuestion:
        least, greatest = self.numbers
        number, every = len(mosaic.placed), greatest - least + 1
        # Neighbors around a circle, so that each of those offered is right equally often.
        first = number - least - int(rng.integers(min(OFFERED, every)))
        offered = [NUMBERS[least + (first + step) % every] for step in range(min(OFFERED, every))]
        choices = tuple(offered[place] for place in rng.permutation(len(offered)))
        return MosaicQuestion("count", "how many photos are there?", NUMBERS[number], choices)

    def _content(self, mosaic: Mosaic, rng: np.random.Generator) -> MosaicQuestion:
        photo = pick(rng, list(mosaic.names))
        own = self.captions[photo]
        right = pick(rng, own)
        others = [pick(rng, self.captions[other]) for other in mosaic.names if other != photo]
        rest = tuple(caption for caption in dict.fromkeys(own) if caption != right)
        asked = f"what does the photo {at(mosaic.names[photo])} show?"
        return MosaicQuestion("content", asked, right, _offer(rng, right, others), rest)


def _yes_no(kind: str, question: str, truth: bool) -> MosaicQuestion:
    return MosaicQuestion(kind, question, "yes" if truth else "no", ("yes", "no"))


def _offer(rng: np.random.Generator, right: str, others: Sequence[str]) -> tuple[str, ...]:
    """Answers to choose from: the right one and some others, in random order."""
    wrong = [others[place] for place in rng.permutation(len(others))[: OFFERED - 1]]
    offered = [right, *wrong]
    return tuple(offered[place] for place in rng.permutation(len(offered)))
