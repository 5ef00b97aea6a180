"""Rules of reading an answer out of a reply: the published ones with their quirks, and ours for BlindTest.

Golden: `extract_answer` of Baiqi-Li/NaturalBench, `extract_mcq_answer` of cambrian-mllm/cambrian (`ade_test.py`) and
`YOrN_Extraction` of VLMEvalKit e8e78f0, which were also run beside ours on 20,000 random replies without a difference.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qformer.metrics.replies import (
    first_word,
    only_word,
    option_letter,
    read_count,
    read_grid,
    read_letter,
    read_yes_no,
)

YES_NO, LETTERS = ("yes", "no"), ("a", "b")


@pytest.mark.parametrize(
    ("reply", "words", "golden"),
    [
        ("Yes, it is.", YES_NO, "yes"),
        ("There is no way, yes?", YES_NO, "no"),  # the first counts
        ("None of them, nothing.", YES_NO, None),
        ("NO", YES_NO, "no"),
        ("(B) on the left", LETTERS, "b"),
        ("It is a dog, so B", LETTERS, "a"),  # as published
        ("", YES_NO, None),
    ],
)
def test_the_first_word(reply: str, words: tuple[str, ...], golden: str | None) -> None:
    assert first_word(reply, words) == golden


@pytest.mark.parametrize(
    ("reply", "golden"),
    [("Yes.", "yes"), ("No, not at all", "no"), ("yes and no", None), ("nobody knows", None), ("yes/no", None)],
)
def test_the_only_word(reply: str, golden: str | None) -> None:
    assert only_word(reply, YES_NO) == golden


@pytest.mark.parametrize(
    ("reply", "golden"),
    [
        ("(B)", "b"),
        ("B. two", "b"),
        ("b", "b"),
        ("The answer is (C).", "c"),
        ("Answer: D", "d"),
        ("two", "t"),
        ("The answer is: B", ":"),  # as published: the colon stays
        ("", ""),
    ],
)
def test_the_letter_of_an_option(reply: str, golden: str) -> None:
    assert option_letter(reply) == golden


@pytest.mark.parametrize(
    ("read", "reply", "wanted"),
    [
        (read_count, "{2}", "2"),
        (read_count, "Between the 3 lines there are { 02 }", "2"),
        (read_count, "There are 5 circles", "5"),
        (read_count, "9" * 5000, "9" * 1000),
        (read_grid, f"({'0' * 5000}5, 6)", "0,6"),
        (read_letter, "The letter is {O}", "o"),
        (read_letter, "(o)", "o"),
        (read_letter, "the letter o", None),
        (read_grid, "rows={5} columns={6}", "5,6"),
        (read_grid, "columns={6} rows={5}", "5,6"),
        (read_grid, "Rows: 5, Columns: 6", "5,6"),
        (read_grid, "(5, 6)", "5,6"),
        (read_grid, "{5}{6}", "5,6"),
        (read_grid, "rows and columns: {5} {6}", "5,6"),
        (read_grid, "(56)", None),
        (read_grid, "5 rows and 6 columns, so 30 cells", "5,6"),
        (read_grid, "{6} columns, {5} rows", "5,6"),
        (read_count, "two", "2"),
        (read_count, "{two}", "2"),
        (read_count, "There are five circles.", "5"),
        (read_count, "{2.5}", None),
        (read_count, "2.0", "2"),
        (read_count, "{1/2}", None),
        (read_count, "1,000", "1000"),
        (read_count, "{1,2}", None),
        (read_count, "It is 2.", "2"),
        (read_count, "There are none", "0"),
        (read_count, "This one has 2", "2"),
        (read_count, "{}", None),
        (read_count, "the lines", None),
        (read_count, "$\\boxed{3}$", "3"),
        (read_count, "{Two}", "2"),
        (read_grid, "5,6", "5,6"),
        (read_grid, "5, 6", "5,6"),
        (read_grid, "5, 6.", "5,6"),
        (read_grid, "5x6", "5,6"),
        (read_grid, "5 x 6", "5,6"),
        (read_grid, "5 \u00d7 6", "5,6"),
        (read_grid, "5 by 6", "5,6"),
        (read_grid, "A 5x6 grid, so 30 cells", "5,6"),
        (read_grid, "{5x6}", "5,6"),
        (read_grid, "{5} x {6}", "5,6"),
        (read_grid, "{5} and {6}", "5,6"),
        (read_grid, "**5, 6**", "5,6"),
        (read_grid, "[5, 6]", "5,6"),
        (read_grid, "5 and 6", "5,6"),
        (read_grid, "5\n6", "5,6"),
        (read_grid, "The answer is 5, 6.", "5,6"),
        (read_grid, "Answer: 5,6", "5,6"),
        (read_grid, "three rows and four columns", "3,4"),
        (read_grid, "rows={three} columns={four}", "3,4"),
        (read_grid, "Five by six", "5,6"),
        (read_grid, "five, six", "5,6"),
        (read_grid, "5.5, 6", None),
        (read_grid, "5x6.5", None),
        (read_grid, "5, 6, 7", None),
        (read_grid, "56", None),
        (read_grid, "5", None),
        (read_grid, "", None),
        (read_grid, "five", None),
        (read_grid, "I see 5, 6 or so", None),
        (read_grid, "6 columns x 5 rows", "5,6"),
        (read_grid, "-5, 6", None),
        (read_grid, "1920x", None),
        (read_yes_no, "Yes.", "yes"),
        (read_yes_no, "Not touching", None),
        (read_yes_no, "Yes/No", None),
    ],
)
def test_answers_of_blindtest(read: Callable[[str], str | None], reply: str, wanted: str | None) -> None:
    """The rules are ours: lmms-eval misses what is not at the start, VLMEvalKit what has no braces."""
    assert read(reply) == wanted
