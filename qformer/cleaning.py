"""How captions and questions are cleaned before a model reads them, as the original does."""

from __future__ import annotations

import re

MAX_WORDS = 50
PUNCTUATION = re.compile(r'[.!"()*#:;~]')


def clean_question(text: str) -> str:
    """Lower case, punctuation removed except `?`, trailing spaces stripped, at most 50 words."""
    return _first_words(PUNCTUATION.sub("", text.lower()).rstrip(" "))


def clean_caption(text: str) -> str:
    """Lower case, punctuation to spaces, runs of spaces to one, outer spaces stripped, at most 50 words."""
    spaced = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", text.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])
