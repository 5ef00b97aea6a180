"""Scoring of answers: the rules by hand, where the original has its say in tests/test_against_lavis_plain.py."""

from __future__ import annotations

import pytest

from qformer.evaluation.vqa import accuracy, is_vqav2, mean_accuracy, normalise_answer


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Red Bus.", "red bus"),
        ("two", "2"),
        ("None", "0"),
        ("on-off", "on off"),
        ("on - off", "on off"),
        ("10,000 people!", "10000 people"),
        ("3.5", "3.5"),
        ("dont\nknow", "don't know"),
        ("its a dog", "its dog"),
        ("", ""),
    ],
)
def test_normalised(answer: str, normalised: str) -> None:
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize(("agreeing", "share"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_is_the_mean_over_the_nines_of_ten_people(agreeing: int, share: float) -> None:
    assert accuracy("Red.", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(share)


def test_by_the_script_of_vqav2_punctuation_of_people_is_normalised_where_they_differ() -> None:
    assert accuracy("on-off", ["on-off"] * 9 + ["off"], "vqav2") == pytest.approx(1.0)
    assert accuracy("on-off", ["on-off"] * 10, "vqav2") == 0.0  # odd, but so are all published numbers
    assert accuracy("two", ["two"] * 8 + ["three"] * 2, "vqav2") == 0.0  # number words of people never are


@pytest.mark.parametrize("answer", ["Yes", "the cat", "two", "New York", "dont", "on-off"])
def test_what_ten_people_said_is_right_however_they_spell_it(answer: str) -> None:
    assert accuracy(answer, [answer] * 10) == 1.0
    assert accuracy(f"{answer}.", [answer] * 9 + ["else"]) == pytest.approx(1.0)
    assert accuracy("else", [answer] * 10) == 0.0
    assert accuracy(answer, [answer] * 10, "vqav2") == 0.0


def test_the_questions_of_vqav2_are_known_by_their_types() -> None:
    typed = [{"question_type": "is the", "answer_type": kind} for kind in ("other", "yes/no")]
    assert is_vqav2(typed)
    assert not is_vqav2([{"question_type": "four", "answer_type": "other"}] * 2)  # OK-VQA
    assert not is_vqav2([{"answer_type": "yes/no"}, {}])  # VizWiz, and a record without any


def test_of_fewer_than_ten_accepted_answers_any_is_right() -> None:
    """As JSON lines have them, written as people write."""
    assert accuracy("The dog", ["dog"]) == 1.0
    assert accuracy("2", ["Two"]) == 1.0
    assert accuracy("cat", ["a cat", "A kitten."]) == accuracy("kitten", ["a cat", "A kitten."]) == 1.0
    assert accuracy("cat", ["dog"]) == 0.0


def test_mean() -> None:
    assert mean_accuracy(["red", "blue"], [["red"] * 10, ["red"] * 10]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least one"):
        mean_accuracy([], [])
    with pytest.raises(ValueError, match="shorter"):
        mean_accuracy(["red", "blue"], [["red"]])
    with pytest.raises(ValueError, match="accepted"):
        accuracy("red", [])
