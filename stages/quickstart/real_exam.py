"""The exam of the quickstart on photos: captions and closed answers of a stage-two model and of its blind twin."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qformer.data.held_out import read_groups
from qformer.evaluation.benchmarks import AskOptions, Item, likeliest
from qformer.evaluation.caption import require_scorers, score_captions
from qformer.evaluation.intervals import paired_interval
from qformer.evaluation.tasks import MultipleChoice
from qformer.progress import track
from qformer.resolution.base import cut_all
from qformer.stages.quickstart.photos import gray
from qformer.stages.quickstart.questions import KINDS, Closed
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.data.held_out import Group, ImageRecord
    from qformer.model.image_text import ImageTextModel
    from qformer.model.vision_language import VisionLanguageModel

GROUP = 32  # photos encoded at a time
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


def answer_all(model: VisionLanguageModel, photos: Photos, questions: Sequence[Closed]) -> list[str]:
    """Choose the likeliest answer to each question about a photo; a photo that cannot be read has the answer ""."""
    by_photo: dict[int, list[int]] = defaultdict(list)
    for place, one in enumerate(questions):
        by_photo[one.photo].append(place)
    answers = [""] * len(questions)
    for group in track(photos.groups(model, list(by_photo)), "questions", -(-len(by_photo) // GROUP)):
        assert group.tiles is not None
        places = [place for number in group.numbers for place in by_photo[number]]
        asked = [[questions[place] for place in by_photo[number]] for number in group.numbers]
        for place, answer in zip(places, _choose(model, group.tiles, asked), strict=True):
            answers[place] = answer
    return answers


def guess_all(model: VisionLanguageModel, questions: Sequence[Closed], size: int) -> list[str]:
    """Let a blind model answer, which sees the same gray picture each time; equal questions are asked once."""
    distinct = list({(one.question, one.choices): one for one in questions}.values())
    tiles = cut_all([torch.from_numpy(gray(size)).permute(2, 0, 1)], model.frontend.strategy)
    guesses = dict(
        zip(((one.question, one.choices) for one in distinct), _choose(model, tiles, [distinct]), strict=True)
    )
    return [guesses[one.question, one.choices] for one in questions]


@torch.no_grad()
def _choose(model: VisionLanguageModel, tiles: Any, asked: Sequence[Sequence[Closed]]) -> list[str]:
    """The likeliest answers to the questions about each photo, photo by photo."""
    items = [[Item("", "", one.question, choices=list(one.choices), right=one.right) for one in own] for own in asked]
    losses = MultipleChoice().predict(model, tiles, items, AskOptions())
    flat = [one for own in asked for one in own]
    return [one.choices[likeliest(found["losses"])] for one, found in zip(flat, losses, strict=True)]


def compare(questions: Sequence[Closed], seeing: Sequence[str], blind: Sequence[str]) -> dict[str, Any]:
    """Compare the answers of a model with those of its blind twin.

    Returns:
        `accuracy`, `blind`, `majority` (always the commonest answer of a kind), `difference` and its 95 % `interval`
        over photos, `commonest` (the largest share of an answer), and `by_kind`: count, accuracy, blind, majority.
    """
    right = [float(answer == one.answer) for answer, one in zip(seeing, questions, strict=True)]
    guessed = [float(answer == one.answer) for answer, one in zip(blind, questions, strict=True)]
    by_kind = {}
    for kind in KINDS:
        places = [place for place, one in enumerate(questions) if one.kind == kind]
        if places:
            common = Counter(questions[place].answer for place in places).most_common(1)[0][1]
            by_kind[kind] = {
                "count": len(places),
                "accuracy": sum(right[place] for place in places) / len(places),
                "blind": sum(guessed[place] for place in places) / len(places),
                "majority": common / len(places),
            }
    total = len(questions)
    low, high = paired_interval(right, guessed, [one.photo for one in questions])
    return {
        "questions": total,
        "photos": len({one.photo for one in questions}),
        "accuracy": sum(right) / total,
        "blind": sum(guessed) / total,
        "difference": (sum(right) - sum(guessed)) / total,
        "interval": [low, high],
        "majority": sum(kind["majority"] * kind["count"] for kind in by_kind.values()) / total,
        "commonest": Counter(one.answer for one in questions).most_common(1)[0][1] / total,
        "by_kind": by_kind,
    }


def held_pixels(photos: Photos, number: int) -> Tensor:
    """Read a held-out photo again, uint8[3, h, w].

    Raises:
        BadSample: it cannot be read any more.
    """
    return photos.listed[number].read(photos.source)
