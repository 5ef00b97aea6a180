"""Scores of answers about documents by hand, and the numbers that the published implementations gave for the same.

Golden: `anls` of lmms-eval 75571cf (`lmms_eval/api/metrics.py`), which is that of rrc.cvc.uab.es; `relaxed_correctness`
of google-research/pix2struct and lmms-eval; `ocrbench_process_results` of lmms-eval. Each was run beside ours on 20,000
random pairs (OCRBench: on its 1,000 questions), too, without a difference.
"""

from __future__ import annotations

import pytest

from qformer.metrics.documents import anls, edit_distance, ocr_right, relaxed_accuracy


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("kitten", "sitting", 3), ("ab", "", 2), ("", "abc", 3), ("abc", "abc", 0), ("abcd", "bcda", 2)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("answer", "accepted", "golden"),
    [
        ("ITC Limited", ["ITC limited", "itc"], 1.0),
        ("itc  limited", ["ITC limited"], 1.0),  # one more space does not count ...
        ("itc limitd", ["itc limited"], 1 - 1 / 11),
        ("ab", ["abcd"], 0.5),  # at the threshold it earns what it is
        ("a", ["abcd"], 0.0),
        ("xy", ["ab"], 0.0),
        ("2,005", ["2005"], 0.8),
        (" abcd", ["abce"], 0.8),  # ... but the longer text is measured as it was given
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("yes", ["no", "yess"], 0.75),
    ],
)
def test_anls(answer: str, accepted: list[str], golden: float) -> None:
    assert anls(answer, accepted) == pytest.approx(golden)


@pytest.mark.parametrize(
    ("answer", "truth", "golden"),
    [
        ("105", "100", 1.0),
        ("105.01", "100", 0.0),
        ("95", "100", 1.0),
        ("-95", "-100", 1.0),
        ("94.9", "100", 0.0),
        ("12%", "0.12", 1.0),
        ("12", "12%", 0.0),
        ("0.0", "0", 0.0),  # nothing is within 5 % of 0, so the texts must agree
        ("0", "0", 1.0),
        ("1,234", "1234", 0.0),
        ("$5", "5", 0.0),
        ("Blue", "blue", 1.0),
        ("blue.", "blue", 0.0),
        ("nan", "5", 0.0),
        ("2009 or so", "2009", 0.0),
    ],
)
def test_relaxed_accuracy(answer: str, truth: str, golden: float) -> None:
    assert relaxed_accuracy(answer, [truth]) == golden


def test_any_accepted_answer_will_do() -> None:
    assert relaxed_accuracy(" 10 ", ["blue", "10.2"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "accepted", "formula", "golden"),
    [
        ("The word is Centre.", ["CENTRE"], False, 1.0),
        ("center", ["CENTRE"], False, 0.0),
        ("ANTONIO'S", ["ANTONIOS", "ANTONIO'S"], False, 1.0),
        ("a\nb", ["a b"], False, 1.0),
        ("ab", ["a b"], False, 0.0),
        ("y_{2}=-1", ["y _ { 2 } = - 1\n"], True, 1.0),
        ("Y_{2}=-1", ["y _ { 2 } = - 1\n"], True, 0.0),  # case counts in a formula
    ],
)
def test_ocrbench_looks_for_the_text(answer: str, accepted: list[str], formula: bool, golden: float) -> None:
    assert ocr_right(answer, accepted, formula) == golden


def test_without_accepted_answers_there_is_no_score() -> None:
    for score in (anls, relaxed_accuracy):
        with pytest.raises(ValueError, match="no accepted answers"):
            score("a", [])
