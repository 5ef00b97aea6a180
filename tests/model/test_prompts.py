"""The table of prompts, context, history and what is left of them where room is short; the cleaning of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qformer.data.texts import clean_caption, clean_question
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import PRESETS, TASKS, Prompt, compose, vqa_preset, vqa_prompt
from qformer.scenes.stories import SELF_ASK, TEMPLATES
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
    ("task", "causal", "seq2seq"),
    [
        ("caption", "a photo of", "a photo of"),
        ("vqa", "Question: why? Answer:", "Question: why? Short answer:"),
        ("context", "Context: it rains. Question: why? Answer:", "Context: it rains. Question: why? Short answer:"),
        ("dialogue", "Question: why? Answer:", "Question: why? Answer:"),
        ("knowledge", "Question: why? Answer:", "Question: why? Answer:"),
        ("reasoning", "Question: why? Answer: Let's think step by step.", "why? Let's think step by step."),
        ("writing", "why?", "why?"),
        ("ask", "Ask a question about the picture. Question:", "Ask a question about the picture. Question:"),
    ],
)
def test_every_task_of_the_table(task: str, causal: str, seq2seq: str) -> None:
    """Both presets: they differ in visual questions only. Free text stands in front as it is, except as a context."""
    assert set(PRESETS["lavis"]) == set(TASKS)
    context = "it rains." if task == "context" else None
    for family, expected in (("causal", causal), ("seq2seq", seq2seq)):
        assert compose("why?", task, "paper", family, context).text == expected
        if task != "context":
            assert compose("why?", task, "paper", family, "It rains.").text == f"It rains. {expected}"
        if task != "vqa":
            assert PRESETS["lavis"][task] == TASKS[task]
        row = TASKS[task][family]
        assert row.asks == ("why?" in expected)
        assert GenerateConfig.of(row.generate).num_beams == 5


def test_the_mini_towers_learned_these_words() -> None:
    assert all(row.template == SELF_ASK for row in TASKS["ask"].values())
    assert {row.template for task in ("vqa", "dialogue") for row in TASKS[task].values()} == set(TEMPLATES)


def test_a_context_is_labelled_once() -> None:
    assert compose("why?", "context", context="Context: it rains").text == "Context: it rains. Question: why? Answer:"
    assert compose("why?", "context").text == "Question: why? Answer:"


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_behind_earlier_turns_a_question_is_worded_like_them(family: str) -> None:
    turns = [("who?", "a man."), ("where?", "at sea")]
    expected = "Question: who? Answer: a man. Question: where? Answer: at sea. Question: why? Answer:"
    assert vqa_prompt("why?", "paper", family, history=turns) == expected
    assert compose("why?", "dialogue", "lavis", family, history=turns).text == expected


def words(text: str) -> int:
    return len(text.split())


FULL = Prompt("a b c d", ("Question: q1 Answer: a1.", "Question: q2 Answer: a2."), "Question: why now? Answer:")


@pytest.mark.parametrize(
    ("room", "context", "turns"),
    [
        (99, "a b c d", 2),
        (16, "a b c d", 2),
        (15, "b c d", 2),
        (13, "d", 2),
        (12, "", 2),
        (11, "", 1),
        (8, "", 1),
        (7, "", 0),
        (1, "", 0),
    ],
)
def test_room_is_made_from_the_start_of_a_prompt(room: int, context: str, turns: int) -> None:
    kept = FULL.fit(words, room)
    assert kept == Prompt(context, FULL.turns[2 - turns :], FULL.instruction)
    assert kept.text.endswith("Question: why now? Answer:")


def test_a_context_without_spaces_is_cut_too() -> None:
    kept = Prompt("字" * 1000, (), "why?").fit(len, 105)
    assert kept == Prompt("字" * 88, (), "why?")  # in pieces of 16, the last of which is half full


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
