"""Texts of a sample: captions, questions and answers as they are cleaned, as the original does, and drawn."""

from __future__ import annotations

import re

import numpy as np

from qformer.data.columns import columns_of
from qformer.types import BadSample, Sample

MAX_WORDS = 50
PUNCTUATION = re.compile(r'[.!"()*#:;~]')
MANGLED = re.compile("[\x00-\x08\x0e-\x1b\x7f\ufffd]")  # control characters, and what stands for a lost character


def is_mangled(text: str) -> bool:
    """Whether characters were lost before this text came here, or it was read in another encoding than it has."""
    return MANGLED.search(text) is not None


def without_mangled(text: str) -> str:
    """What a model has written, less halves of characters, such as the last one where it was stopped."""
    return MANGLED.sub("", text)


def clean_question(text: str) -> str:
    """Lower case, punctuation removed except `?`, trailing spaces stripped, at most 50 words."""
    return _first_words(PUNCTUATION.sub("", text.lower()).rstrip(" "))


def clean_caption(text: str) -> str:
    """Lower case, punctuation to spaces, runs of spaces to one, outer spaces stripped, at most 50 words."""
    spaced = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", text.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])


def draw_texts(sample: Sample, rng: np.random.Generator) -> tuple[str, str]:
    """One of the captions, as `usable_captions` gives them, and one of the answers to the question.

    Each answer is as likely as it was often given (open answers of VQAv2, as in the original). Where there are no
    captions the answer stands in for one; where nothing is asked it is empty.

    Raises:
        BadSample: kind `no caption`, nothing is left after cleaning; `no answer`, a question without one; `not utf-8`,
            characters were lost before the text came here.
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
    """What was answered, repetitions kept; nothing where nothing is asked."""
    return [answer for answer in sample.answers if answer.strip()] if sample.question is not None else []


def usable_captions(sample: Sample) -> list[str]:
    """The captions that can be used, cleaned, behind the prompt of their source.

    Raises:
        BadSample: kind `no caption`: none has a letter or a digit; `not utf-8`: those that have are mangled.
    """
    captions = cleaned(sample.captions)
    if not captions:
        raise BadSample("not utf-8" if any(map(is_mangled, sample.captions)) else "no caption", _describe(sample))
    return [f"{sample.prompt} {caption}" if sample.prompt else caption for caption in captions]


def _describe(sample: Sample) -> str:
    """Which record lacks something, and what it has instead."""
    return f"{sample.key}; {columns_of(sample.facts)}" if sample.facts else sample.key


def cleaned(captions: list[str]) -> list[str]:
    """Those of the captions that are whole and have a letter or a digit, cleaned."""
    whole = [caption for caption in captions if not is_mangled(caption)]
    return [clean for clean in map(clean_caption, whole) if any(map(str.isalnum, clean))]
