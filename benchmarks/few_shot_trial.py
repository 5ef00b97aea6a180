"""Whether examples help: answers behind 0, 1, 2, 4 ... other pictures with question and answer in the same prompt.

BLIP-2 was not found to learn from them (arXiv:2301.12597, section 5), since it was trained on one picture with one text
at a time. Each number of examples asks the same questions, and fewer examples are the last of the more, next to the
question, so that nothing but their number differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer.evaluation.vqa import accuracy
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qformer.data.base import Source
    from qformer.model.answers import AnsweredExample
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Sample

SHOTS = (0, 1, 2, 4)
GREEDY: dict[str, Any] = {"num_beams": 1, "length_penalty": 1.0}


@dataclass(frozen=True)
class FewShot:
    """What was said behind each number of examples.

    Attributes:
        said: by number of examples, an answer to each question.
        accuracy: by number of examples, the mean in [0, 1]: as VQAv2 counts answers of several people; one answer must
            be met, in whatever spelling.
        copied: by number of examples, the share of answers that are one of their answers; 0 without examples.
    """

    said: dict[int, list[str]]
    accuracy: dict[int, float]
    copied: dict[int, float]


def few_shot(
    model: VisionLanguageModel,
    asked: Source,
    shown: Source,
    shots: Iterable[int] = SHOTS,
    batch: int = 32,
    seed: int = 0,
    **options: Any,
) -> FewShot:
    """Ask the questions of one source behind examples of another, drawn anew for each question.

    Args:
        asked, shown: sources whose samples have a question and answers, such as two splits of one data set.
        shots: numbers of examples.
        batch: questions at a time.
        options: of `VisionLanguageModel.answer`; greedy by default.

    Raises:
        UsageError: a sample without question or answer, fewer samples to show than examples, or a prompt that is longer
            than the positions of the language model.
    """
    numbers = sorted(set(shots))
    if not numbers or numbers[0] < 0 or numbers[-1] > len(shown):
        raise UsageError(f"{numbers} examples cannot be drawn of {len(shown)}; give numbers from 0 up to that")
    settings = GREEDY | options
    said: dict[int, list[str]] = {number: [] for number in numbers}
    right: dict[int, list[float]] = {number: [] for number in numbers}
    copied: dict[int, list[bool]] = {number: [] for number in numbers}
    rng = np.random.default_rng(seed)
    for start in range(0, len(asked), batch):
        samples = [_checked(asked[place]) for place in range(start, min(start + batch, len(asked)))]
        places = [rng.choice(len(shown), numbers[-1], replace=False).tolist() for _ in samples]
        drawn = {place: _example(model, _checked(shown[place])) for row in places for place in row}
        tiles = model.frontend.tiles([sample.image for sample in samples])
        for number in numbers:
            examples = [[drawn[place] for place in row[len(row) - number :]] for row in places]
            texts = model.answer(tiles, _questions(samples), examples=examples, **settings)
            said[number] += texts
            right[number] += [accuracy(text, sample.answers) for text, sample in zip(texts, samples, strict=True)]
            copied[number] += [
                text in {answer for *_, answer in row} for text, row in zip(texts, examples, strict=True)
            ]
    shares = ({number: float(np.mean(values[number])) for number in numbers} for values in (right, copied))
    return FewShot(said, *shares)


def _questions(samples: Sequence[Sample]) -> list[str]:
    return [sample.question or "" for sample in samples]


def _example(model: VisionLanguageModel, sample: Sample) -> AnsweredExample:
    return model.frontend.tiles([sample.image]), sample.question or "", sample.answers[0]


def _checked(sample: Sample) -> Sample:
    if not sample.question or not sample.answers:
        raise UsageError(f"'{sample.key}' has no question with an answer; give data of questions")
    return sample
