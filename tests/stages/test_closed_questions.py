"""Closed questions from captions: sure answers only, and balanced, on captions that were invented for this."""

from __future__ import annotations

from collections import Counter

import pytest

from qformer.stages.quickstart.questions import KINDS, MOST, make_questions


def asked(kind: str, *captions: str) -> dict[str, str]:
    rule, _ = KINDS[kind]
    return dict(rule([caption.split() for caption in captions]))


@pytest.mark.parametrize(
    ("kind", "captions", "question", "answer"),
    [
        ("who", ["a man sings", "the guy has a guitar", "a man on a stage", "a singer"], "who is in the photo?", "man"),
        ("who", ["a girl hops", "a little girl", "a child hops", "the girl"], "who is in the photo?", "girl"),
        ("animal", ["a pony eats", "a horse", "a horse eats", "lunch"], "what animal is in the photo?", "horse"),
        ("color", ["a red kite and a blue shirt", "the blue shirt", "a boy"], "what color is the shirt?", "blue"),
        ("count", ["two dogs run", "two dogs", "two puppies"], "how many dogs are in the photo?", "two"),
        ("count", ["a dog", "the dog sits", "one dog", "a dog sits"], "how many dogs are in the photo?", "one"),
        ("place", ["snow falls", "in the snow", "a snowy hill", "a hill"], "where was the photo taken?", "snow"),
        ("yes/no", ["a dog", "the dog", "a dog sits"], "is there a dog in the photo?", "yes"),
        ("yes/no", ["a cup on a table", "a cup", "a white cup"], "is there a dog in the photo?", "no"),
    ],
)
def test_an_answer_that_captions_agree_on(kind: str, captions: list[str], question: str, answer: str) -> None:
    assert asked(kind, *captions)[question] == answer


@pytest.mark.parametrize(
    ("kind", "captions"),
    [
        ("who", ["a man sings", "a man", "a singer"]),  # too few say it
        ("who", ["a man sings", "a man", "a man", "a woman sings"]),
        ("who", ["a man sings", "a man", "a man", "three people"]),
        ("who", ["a man and a man", "a man", "a man"]),
        ("who", ["a man", "a man", "a man holds a toddler"]),
        ("animal", ["a dog", "a dog", "a dog near a cat"]),
        ("animal", ["a horse", "a wooden horse", "a horse"]),
        ("color", ["a blue shirt", "a red shirt"]),
        ("color", ["a blue and white shirt", "a blue shirt"]),
        ("color", ["a blue shirt", "a shirt"]),
        ("color", ["a blue shirt", "blue shirts"]),
        ("count", ["two dogs", "two dogs", "three dogs", "two dogs"]),
        ("count", ["two dogs", "two dogs", "two dogs and another"]),
        ("count", ["a dog", "a dog", "a dog", "a dog", "dogs"]),
        ("place", ["snow", "in snow", "the snow", "snow on a street"]),
    ],
)
def test_captions_that_disagree_ask_nothing(kind: str, captions: list[str]) -> None:
    assert asked(kind, *captions) == {}


@pytest.mark.parametrize("hint", ["a pet on a rug", "a leash", "a terrier", "an animal"])
def test_no_is_not_said_of_what_a_caption_hints_at(hint: str) -> None:
    assert "is there a dog in the photo?" not in asked("yes/no", "a rug", "a rug on a floor", hint)


PHOTOS = [
    *[[f"a dog sits by pole {n}", "the dog sits", "a brown dog and a pole"] for n in range(30)],
    *[[f"a man by wall {n}", "the man stands", "a man on the street", "a street"] for n in range(9)],
    *[[f"a woman by wall {n}", "the woman stands", "a woman smiles"] for n in range(7)],
    *[[f"a boy by wall {n}", "the boy stands", "a boy smiles"] for n in range(5)],
    *[[f"a girl by wall {n}", "the girl stands", "a girl smiles"] for n in range(3)],
]


def test_no_answer_is_much_commoner_than_others() -> None:
    questions = make_questions(PHOTOS)
    who = Counter(one.answer for one in questions if one.kind == "who")
    assert set(who) == {"man", "woman", "boy", "girl"}
    assert max(who.values()) <= MOST * who.total()
    assert who["girl"] == 3  # none of the rare ones is left out
    assert not any(one.kind == "animal" for one in questions), "one answer alone is no question"


def test_yes_is_as_common_as_no_to_the_same_question() -> None:
    answers = Counter((one.question, one.answer) for one in make_questions(PHOTOS) if one.kind == "yes/no")
    assert answers["is there a dog in the photo?", "yes"] == 5
    for question, _ in answers:
        assert answers[question, "yes"] == answers[question, "no"]


def test_questions_are_always_the_same() -> None:
    first = make_questions(PHOTOS)
    again = make_questions(PHOTOS[::-1])
    told = {(tuple(PHOTOS[one.photo]), one.question) for one in first}
    assert told == {(tuple(PHOTOS[::-1][one.photo]), one.question) for one in again}
    assert [one.photo for one in first] == sorted(one.photo for one in first)
    assert all(one.choices[one.right] == one.answer for one in first)


def test_there_are_at_most_so_many_of_a_kind() -> None:
    kinds = Counter(one.kind for one in make_questions(PHOTOS, each=14))
    assert 0 < kinds["who"] <= 14
    assert 0 < kinds["yes/no"] <= 14
