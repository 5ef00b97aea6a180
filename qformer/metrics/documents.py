"""Scores of answers about documents, charts and written words: ANLS, relaxed accuracy, OCRBench.

`anls`              DocVQA, InfographicVQA: the evaluation of rrc.cvc.uab.es (Biten et al., arXiv:1907.00490, eq. 1)
`relaxed_accuracy`  ChartQA: `relaxed_correctness` of google-research/pix2struct, which DePlot and lmms-eval share
`ocr_right`         OCRBench: `example.py` of Yuliang-Liu/MultimodalOCR
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PRINT = "print_height"  # fact: height in pixels of the picture of the print that an answer is read from
BOUNDS = (4, 6, 8, 12, 16, 24)  # pixels of print between the bins that results are told apart by
THRESHOLD = 0.5  # a similarity below it earns nothing
TOLERANCE = 0.05  # of the true number


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, 1):
        before, row[0] = row[0], place
        for column, other in enumerate(second, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (letter != other))
    return row[-1]


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one answer to the nearest accepted one, 0 where it is below 0.5.

    Case does not count, nor how many spaces part two words. As in the published evaluation the distance is divided by
    the length of the longer text as it was given, spaces at its ends included.

    Raises:
        ValueError: there are no accepted answers.
    """
    if not accepted:
        raise ValueError("no accepted answers; give at least one")
    similarity = max(1 - _distance(answer, truth) for truth in accepted)
    return similarity if similarity >= THRESHOLD else 0.0


def _distance(answer: str, truth: str) -> float:
    length = max(len(answer.upper()), len(truth.upper()))
    folded = [" ".join(text.lower().split()) for text in (answer, truth)]
    return edit_distance(*folded) / length if length else 0.0


def relaxed_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 if an answer is within 5 % of an accepted number, or is an accepted text in any case; else 0.

    Both must be a number as a whole: `1,234` and `$5` are texts. `12%` is 0.12. The number 0 has no 5 %, so it is
    compared as a text.

    Raises:
        ValueError: there are no accepted answers.
    """
    if not accepted:
        raise ValueError("no accepted answers; give at least one")
    return float(any(_is_near(answer.strip(), truth.strip()) for truth in accepted))


def _is_near(answer: str, truth: str) -> bool:
    given, wanted = _read_number(answer), _read_number(truth)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= TOLERANCE
    return answer.lower() == truth.lower()


def _read_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocr_right(answer: str, accepted: Sequence[str], formula: bool = False) -> float:
    """1 if an answer contains an accepted text, else 0.

    Args:
        formula: the text is LaTeX, in which case counts and spaces do not.
    """
    return float(any(_fold_ocr(truth, formula) in _fold_ocr(answer, formula) for truth in accepted))


def _fold_ocr(text: str, formula: bool) -> str:
    plain = text.strip().replace("\n", " ")
    return plain.replace(" ", "") if formula else plain.lower()


def print_size(height: float) -> str:
    """Bin of a height of print in pixels, as `08-12 px`, written so that bins are in order."""
    for least, most in zip((0, *BOUNDS), BOUNDS, strict=False):
        if height < most:
            return f"{least:02}-{most:02} px"
    return f"{BOUNDS[-1]} px or more"
