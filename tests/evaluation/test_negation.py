"""Negations in free answers: what they deny, and what stands behind them and is so."""

from __future__ import annotations

import pytest

from qformer.metrics.choice_reply import parse_choice
from qformer.metrics.negation import is_negated

CASES = {
    "(a) Left (b) Right": {
        "The dog without a collar is facing left.": "a",
        "The man with no hat faces right.": "b",
        "The person not wearing a hat is on the left.": "a",
        "The bird that isn't flying faces left.": "a",
        "Unlike the cat the dog faces left": "a",
        "There's no question it faces left.": "a",
        "The dog is not facing left.": "b",
        "It isn't facing left and looks right.": "b",
    },
    "(a) Standing (b) Sitting": {
        "There are no chairs so he is standing.": "a",
        "The woman who has no bag is sitting.": "b",
        "No dog is sitting": "a",
        "Nobody is standing": "b",
    },
    "(a) Open (b) Closed": {
        "There are no people and the door is closed.": "b",
        "no it is closed": "b",
        "You cannot see the teeth because the mouth is closed.": "b",
        "I do not think it is open": "b",
        "It does not look like it is open.": "b",
        "I don't believe the answer is (a)": "b",
        "I would not choose (a)": "b",
        "it has been opened": "a",
    },
    "(a) Yes (b) No": {
        "No (b)": "b",
        "**No (b)**": "b",
        "Answer: No [b]": "b",
        "No (option b)": "b",
        "no b": "b",
        "No (a)": None,  # its letter and its word disagree
        "not b": "a",
        "It's not (b)": "a",
        "It does not have wheels (b)": "b",
        "There is no leash so the answer is b": "b",
    },
    "(a) No (b) Yes": {"No (a)": "a", "Yes (b)": "b"},
    "(a) 2 (b) 3": {"not more than 2": "a", "No fewer than 3": "b", "If I am not mistaken there are 3.": "b"},
    "(a) Visible (b) Not visible": {"The feet are invisible.": "b", "The dog without a collar is visible.": "a"},
}


@pytest.mark.parametrize(("options", "reply"), [(options, reply) for options in CASES for reply in CASES[options]])
def test_a_negation_denies_its_own_clause(options: str, reply: str) -> None:
    assert parse_choice(reply, options) == CASES[options][reply]


@pytest.mark.parametrize(
    ("options", "reply", "right"),
    [
        ("(a) Clockwise (b) Counterclockwise", "counter clockwise", "b"),
        ("(a) Clockwise (b) Counterclockwise", "anti-clockwise", "b"),
        ("(a) Vertical (b) Horizontal", "The text is written vertically.", "a"),
        ("(a) Man (b) Woman", "two women", "b"),
        ("(a) 1,000 (b) 2,000", "2000", "b"),
        ("(a) 5 (b) 6", "5-6", None),
    ],
)
def test_other_forms_of_a_word_mean_the_same(options: str, reply: str, right: str | None) -> None:
    assert parse_choice(reply, options) == right


def test_a_negation_reaches_over_four_words() -> None:
    assert is_negated("it is not at all that very ")
    assert not is_negated("it is not at all that very much ")
    assert not is_negated("")
