"""Cleaning of captions, questions and answers as in the original, and random choice among those of a sample."""

from __future__ import annotations

import re

import numpy as np

from qformer.data.columns import columns_of
from qformer.types import BadSample, Sample

MAX_WORDS = 50
PUNCTUATION = re.compile(r'[.!"()*#:;~]')
MANGLED = re.compile("[\x00-\x08\x0e-\x1b\x7f\ufffd]")  # control characters and the replacement character


def is_mangled(text: str) -> bool:
    """Check if a text has lost characters, or was decoded with the wrong encoding."""
    return MANGLED.search(text) is not None


def without_mangled(text: str) -> str:
    """Remove incomplete characters from a model's output, such as a last one that was cut off."""
    return MANGLED.sub("", text)


def clean_question(text: str) -> str:
    """Convert to lower case, remove punctuation except `?` and trailing spaces, and keep at most 50 words."""
    return _first_words(PUNCTUATION.sub("", text.lower()).rstrip(" "))


def clean_caption(text: str) -> str:
    """Convert to lower case, replace punctuation by spaces, collapse and strip spaces, and keep at most 50 words."""
    spaced = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", text.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])


def draw_texts(sample: Sample, rng: np.random.Generator) -> tuple[str, str]:
    """Draw one of the captions from `usable_captions`, and one of the answers to the question.

    The probability of an answer is proportional to how often it was given (open answers of VQAv2, as in the original).
    Without captions, the answer is used as one; without a question, the answer is empty.

    Raises:
        BadSample: kinds `no caption` (nothing is left after cleaning), `no answer` (a question without one) and
            `not utf-8` (the text has lost characters).
    """
    if sample.question is not None and any(map(is_mangled, [sample.question, *sample.answers])):
        raise BadSample("not utf-8", sample.key)
    answers = answers_of(sample)
    answer = answers[int(rng.integers(len(answers)))] if len(answers) > 1 else "".join(answers)
    if sample.question is not None and not sample.captions:
        if not answer:
            raise BadSample("no answer", _describe(sample))
        return answer, answer
    captions = usable_captions(sample)
    return captions[int(rng.integers(len(captions)))], answer


def answers_of(sample: Sample) -> list[str]:
    """Get the answers that are not blank, with repetitions; none without a question."""
    return [answer for answer in sample.answers if answer.strip()] if sample.question is not None else []


def usable_captions(sample: Sample) -> list[str]:
    """Get the usable captions, cleaned, after the prompt of their source.

    Raises:
        BadSample: kinds `no caption` (none has a letter or a digit) and `not utf-8` (those that have one are mangled).
    """
    captions = cleaned(sample.captions)
    if not captions:
        raise BadSample("not utf-8" if any(map(is_mangled, sample.captions)) else "no caption", _describe(sample))
    return [f"{sample.prompt} {caption}" if sample.prompt else caption for caption in captions]


def _describe(sample: Sample) -> str:
    """Describe a record that lacks something, with the columns that it has."""
    return f"{sample.key}; {columns_of(sample.facts)}" if sample.facts else sample.key


def cleaned(captions: list[str]) -> list[str]:
    """Clean the captions, and drop those that are mangled or have no letter or digit."""
    whole = [caption for caption in captions if not is_mangled(caption)]
    return [clean for clean in map(clean_caption, whole) if any(map(str.isalnum, clean))]
