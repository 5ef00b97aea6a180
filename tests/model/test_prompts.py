"""VQA presets, prompts with context and history, and the cleaning of captions and questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qformer.cleaning import clean_caption, clean_question
from qformer.model.prompts import vqa_preset, vqa_prompt
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("preset", "family", "prompt", "length_penalty"),
    [
        ("paper", "causal", "Question: why? Answer:", -1.0),
        ("paper", "seq2seq", "Question: why? Short answer:", -1.0),
        ("lavis", "causal", "Question: why? Short answer:", 0.0),
        ("lavis", "seq2seq", "Question: why? Short answer:", -1.0),
    ],
)
def test_presets(preset: str, family: str, prompt: str, length_penalty: float) -> None:
    assert vqa_prompt("why?", preset, family) == prompt
    settings = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": length_penalty}
    assert vqa_preset(preset, family).generate == settings


def test_the_paper_is_the_default() -> None:
    assert vqa_prompt("why?") == vqa_prompt("why?", "paper", "causal")


@pytest.mark.parametrize(("preset", "family", "meant"), [("papers", "causal", "paper"), ("paper", "causel", "causal")])
def test_unknown_names_are_told(preset: str, family: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        vqa_prompt("why?", preset, family)


def test_context_and_history_stand_in_front() -> None:
    history = [("which city is this?", "singapore"), ("is it big?", "yes")]
    turns = "Question: which city is this? Answer: singapore. Question: is it big? Answer: yes."
    assert vqa_prompt("why?", history=history) == f"{turns} Question: why? Answer:"
    assert vqa_prompt("why?", context="A harbour.", history=history) == f"A harbour. {turns} Question: why? Answer:"
    assert vqa_prompt("why?", context="", history=[]) == "Question: why? Answer:"


def test_braces_of_a_question_are_kept() -> None:
    assert vqa_prompt("what is {}?") == "Question: what is {}? Answer:"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("What colour is the Bus?", "what colour is the bus?"),
        ('Who said: "Stop!" (twice)?  ', "who said stop twice?"),
        ("a.b*c#d;e~f", "abcdef"),
        ("", ""),
    ],
)
def test_clean_question(given: str, expected: str) -> None:
    assert clean_question(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("A Cat.", "a cat"),
        ("a dog;a cat. Running", "a dog a cat running"),
        ("  two   dogs!! (running)\n", "two dogs running"),
        ("it's 3-4 years old?", "it's 3-4 years old?"),
        ("one\n", "one"),
        ("...", ""),
    ],
)
def test_clean_caption(given: str, expected: str) -> None:
    assert clean_caption(given) == expected


@pytest.mark.parametrize("clean", [clean_caption, clean_question])
def test_fifty_words_are_kept(clean: Callable[[str], str]) -> None:
    assert clean(" ".join(["word"] * 60)) == " ".join(["word"] * 50)
