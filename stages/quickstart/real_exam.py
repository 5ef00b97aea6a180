"""The exam of the quickstart on photos: captions and closed answers of a stage-two model and of its blind twin."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qformer.data.held_out import read_groups
from qformer.evaluation.benchmarks import AskOptions, Item, likeliest
from qformer.evaluation.caption import require_scorers, score_captions
from qformer.evaluation.tasks import MultipleChoice
from qformer.metrics.intervals import paired_interval
from qformer.progress import track
from qformer.resolution.base import cut_all
from qformer.stages.quickstart.photos import gray
from qformer.stages.quickstart.questions import KINDS, Closed
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qformer.data.base import Source
    from qformer.data.held_out import Group, ImageRecord
    from qformer.model.image_text import ImageTextModel
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Tiles

GROUP = 64  # photos encoded and captioned at a time: more share the reading of the weights for each word
GREEDY: dict[str, Any] = {"num_beams": 1, "length_penalty": 1.0}


@dataclass(frozen=True)
class Photos:
    """Held-out photos: their source, and those of its records that are used."""

    source: Source
    listed: list[ImageRecord]

    def groups(self, model: VisionLanguageModel | ImageTextModel, numbers: Sequence[int]) -> Iterator[Group]:
        """Read some of the photos in groups, cut as the model needs them; `numbers` of a group count in `listed`."""
        chosen = [self.listed[number] for number in numbers]
        ranges = [range(start, min(start + GROUP, len(chosen))) for start in range(0, len(chosen), GROUP)]
        for group in read_groups(self.source, chosen, model.frontend.strategy, ranges):
            group.numbers = [numbers[place] for place in group.numbers]
            if group.tiles is not None:
                yield group


def caption_all(model: VisionLanguageModel, photos: Photos, count: int) -> dict[int, str]:
    """Let the model caption the first `count` photos; returns the captions by number of the photo."""
    said: dict[int, str] = {}
    for group in track(photos.groups(model, range(count)), "captions", -(-count // GROUP)):
        assert group.tiles is not None
        said |= zip(group.numbers, model.generate(group.tiles, **GREEDY), strict=True)
    return said


def score_all(said: dict[int, str], photos: Photos) -> dict[str, float]:
    """Score captions by the captions of people, as fractions; nothing where the scorers are not installed."""
    try:
        require_scorers()
    except UsageError:
        return {}
    return score_captions(list(said.values()), [photos.listed[number].captions for number in said], java=False).total


def answer_all(model: VisionLanguageModel, photos: Photos, questions: Sequence[Closed]) -> dict[int, list[float]]:
    """Compute the losses of the choices of each question, by its place; those about unreadable photos are left out."""
    by_photo: dict[int, list[int]] = defaultdict(list)
    for place, one in enumerate(questions):
        by_photo[one.photo].append(place)
    found: dict[int, list[float]] = {}
    for group in track(photos.groups(model, list(by_photo)), "questions", -(-len(by_photo) // GROUP)):
        assert group.tiles is not None
        places = [place for number in group.numbers for place in by_photo[number]]
        asked = [[questions[place] for place in by_photo[number]] for number in group.numbers]
        found |= zip(places, _losses(model, group.tiles, asked), strict=True)
    return found


def guess_all(model: VisionLanguageModel, questions: Sequence[Closed], size: int) -> list[list[float]]:
    """Compute the same for a blind model, which sees one gray picture each time; equal questions are asked once."""
    distinct = list({(one.question, one.choices): one for one in questions}.values())
    tiles = cut_all([torch.from_numpy(gray(size)).permute(2, 0, 1)], model.frontend.strategy)
    losses = _losses(model, tiles, [distinct])
    by_text = {(one.question, one.choices): own for one, own in zip(distinct, losses, strict=True)}
    return [by_text[one.question, one.choices] for one in questions]


@torch.no_grad()
def _losses(model: VisionLanguageModel, tiles: Tiles, asked: Sequence[Sequence[Closed]]) -> list[list[float]]:
    """Losses of the choices of the questions about each photo, photo by photo."""
    items = [[Item("", "", one.question, choices=list(one.choices), right=one.right) for one in own] for own in asked]
    return [record["losses"] for record in MultipleChoice().predict(model, tiles, items, AskOptions())]


@dataclass(frozen=True)
class Answers:
    """Questions, and the losses of their choices to a model and to its blind twin."""

    questions: list[Closed]
    seeing: list[list[float]]
    blind: list[list[float]]

    @property
    def said(self) -> list[str]:
        """The likeliest answers to the model."""
        return self._likeliest(self.seeing)

    @property
    def guessed(self) -> list[str]:
        """The likeliest answers to the blind twin."""
        return self._likeliest(self.blind)

    @property
    def calibrated(self) -> list[str]:
        """The answers whose likelihood the picture raises most, which takes off what words are common anyway.

        (Contextual calibration, Zhao et al. 2021, arXiv:2102.09690, with the blind twin as the input without content.)
        """
        pairs = zip(self.seeing, self.blind, strict=True)
        return self._likeliest([[s - b for s, b in zip(seen, blind, strict=True)] for seen, blind in pairs])

    def _likeliest(self, losses: list[list[float]]) -> list[str]:
        return [one.choices[likeliest(own)] for one, own in zip(self.questions, losses, strict=True)]

    def measure(self) -> dict[str, Any]:
        """Compare the answers with those of the blind twin; empty if there are no questions.

        Returns:
            `questions`, `photos`; `accuracy`, `blind`, `majority` (always the commonest answer of a kind); the
            `difference` between seeing and blind and its 95 % `interval` over photos; the same of `calibrated`;
            `commonest` (the largest share of an answer); and `by_kind`: count, accuracy, blind, majority, calibrated.
        """
        if not self.questions:
            return {}
        names = {"accuracy": self.said, "blind": self.guessed, "calibrated": self.calibrated}
        right = {name: self._right(given) for name, given in names.items()}
        photos, total = [one.photo for one in self.questions], len(self.questions)
        by_kind = {}
        for kind in KINDS:
            if places := [place for place, one in enumerate(self.questions) if one.kind == kind]:
                common = Counter(self.questions[place].answer for place in places).most_common(1)[0][1]
                shares = {name: float(np.mean([own[place] for place in places])) for name, own in right.items()}
                by_kind[kind] = {"count": len(places), **shares, "majority": common / len(places)}
        compared = {
            name: {
                "accuracy": float(np.mean(own)),
                "difference": float(np.mean(own) - np.mean(right["blind"])),
                "interval": list(paired_interval(own, right["blind"], photos)),
            }
            for name, own in right.items()
        }
        return {
            "questions": total,
            "photos": len(set(photos)),
            **compared["accuracy"],
            "calibrated": compared["calibrated"],
            "blind": float(np.mean(right["blind"])),
            "majority": sum(own["majority"] * own["count"] for own in by_kind.values()) / total,
            "commonest": Counter(one.answer for one in self.questions).most_common(1)[0][1] / total,
            "by_kind": by_kind,
        }

    def _right(self, given: list[str]) -> list[float]:
        return [float(answer == one.answer) for answer, one in zip(given, self.questions, strict=True)]
