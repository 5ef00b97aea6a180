"""Lemmatization of nouns and verbs in answers (`two dogs running` becomes `two dog run`), as in the original.

Language models answer in phrases where people gave one word. BLIP-2 (arXiv:2301.12597) used this to evaluate OK-VQA.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

MODEL = "en_core_web_sm"


@cache
def load_lemmatizer() -> Any:
    """Load spaCy's small English pipeline.

    Raises:
        UsageError: spaCy or the pipeline is not installed.
    """
    try:
        spacy = import_module("spacy")
    except ImportError as error:
        raise UsageError("--lemmatize needs spaCy, which is not installed; run: pip install spacy") from error
    try:
        return spacy.load(MODEL)
    except OSError as error:
        raise UsageError(
            f"--lemmatize needs spaCy's pipeline {MODEL}, which is not installed; run: python -m spacy download {MODEL}"
        ) from error


def lemmatize(answers: Iterable[str]) -> list[str]:
    """Replace the nouns and verbs of each answer by their lemmas."""
    pipeline = load_lemmatizer()
    return [
        " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in text)
        for text in pipeline.pipe(answers)
    ]
