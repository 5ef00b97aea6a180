"""Our tokeniser against the tokens that Java gave, kept in `tests/golden/ptb.json`, and against Java where it is."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from qformer.metrics.ptb import tokenize, tokenize_lines
from tests.golden.make_ptb import java_lines

PAIRS = json.loads((Path(__file__).parent.parent / "golden" / "ptb.json").read_text("utf-8"))
HAS_JAVA = shutil.which("java") is not None and find_spec("pycocoevalcap") is not None


def test_tokens_are_those_of_java() -> None:
    """All in one text: what a line begins with decides about the last point of the one before."""
    ours = [" ".join(tokens) for tokens in tokenize_lines(sentence for sentence, _ in PAIRS)]
    wrong = [(pair[0], pair[1], mine) for pair, mine in zip(PAIRS, ours, strict=True) if pair[1] != mine]
    assert not wrong
    assert len(PAIRS) > 300


def test_punctuation_is_dropped_but_not_all_of_it() -> None:
    """Brackets are written in small letters, which the evaluation's list of punctuation has in capitals."""
    said = [
        'A man (left) said: "Go!!" - twice...',
        "",
        "The dog's -- and the dogs' -- bone.",
        "no.",
        "5 p.m. on Main St.",
    ]
    assert tokenize(said) == [
        "a man -lrb- left -rrb- said go !! twice",
        "",
        "the dog 's and the dogs bone",
        "no.",
        "5 p.m. on main st.",
    ]


def test_line_breaks_inside_a_caption_are_spaces() -> None:
    assert tokenize(["a\ndog\r\nruns\u2028fast", "a cat"]) == ["a dog runs fast", "a cat"]


@pytest.mark.skipif(not HAS_JAVA, reason="needs java and pycocoevalcap")
def test_the_golden_tokens_are_what_java_says() -> None:
    assert java_lines([sentence for sentence, _ in PAIRS]) == [tokens for _, tokens in PAIRS]
