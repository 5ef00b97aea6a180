"""Rules by which benchmarks read an answer out of what a model said; each names where it is from.

Published ones are as their authors wrote them, also where they misread a reply, since published numbers come from them.
Those of BlindTest (`read_*`) are ours, since its authors publish none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qformer.metrics.counts import parse_count, with_digits

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST = 1000  # digits
WORD = re.compile(r"\w+")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER = re.compile(r"\d+(?:[.,/]\d+)*")
WHOLE = re.compile(r"\d+(?:\.0+)?|\d{1,3}(?:,\d{3})+")
PAIR = re.compile(
    r"[({]\s*(\d+)(?:\s*,\s*|\s*[)}]\s*(?:,|and|by|[x\u00d7])?\s*[({]\s*)(\d+)\s*[)}]"
)  # (3,4), {3}{4}, {3}, {4}
TIMES = re.compile(r"(?<![\d.,])(\d+)\s*(?:[x\u00d7*]|by)\s*(\d+)(?![\d]|[.,]\d)", re.IGNORECASE)  # 5x6, 5 by 6
BARE = re.compile(
    r"(?:[^\d{}]*\banswer\b[^\d{}]*|[^\w-]*)(\d+)(?:\s*[,;&]\s*|\s+and\s+|\s+)(\d+)\W*", re.IGNORECASE
)  # 5, 6
NAMED = (  # rows={3}, columns: 4; not the number of columns for that of rows
    re.compile(r"row(?:(?!column)[^{}\d])*\{?\s*(\d+)", re.IGNORECASE),
    re.compile(r"column(?:(?!row)[^{}\d])*\{?\s*(\d+)", re.IGNORECASE),
)
COUNTED = (
    re.compile(r"(\d+)\s*\}?\s*row", re.IGNORECASE),
    re.compile(r"(\d+)\s*\}?\s*column", re.IGNORECASE),
)  # 3 rows
MARKERS = ("answer is", "answer is:", "answer:")


def first_word(reply: str, words: Sequence[str]) -> str | None:
    """The one of `words` that a reply says first, as a whole word in any case; None if it says none of them.

    NaturalBench's rule (`naturalbench_vqa.py` of Baiqi-Li/NaturalBench) for yes and no, and for the letters A and B.
    An article counts as the letter: `It is a dog, so B` is A.
    """
    return next((word for word in WORD.findall(reply.lower()) if word in words), None)


def only_word(reply: str, words: Sequence[str]) -> str | None:
    """The one of `words` that a reply says, as a whole word in any case; None if it says none or several of them.

    The rule of VLMEvalKit for HallusionBench (`YOrN_Extraction`). There a reply that is neither goes to a language
    model, and so does `Yes: ...`, since it splits at spaces; here this is a yes, and the others are wrong.
    """
    said = {word for word in WORD.findall(reply.lower()) if word in words}
    return said.pop() if len(said) == 1 else None


def option_letter(reply: str) -> str:
    """The letter of an option in lower case; whatever stands there where it is none, empty if nothing does.

    Cambrian-1's rule (`eval/eval/ade/ade_test.py`, `eval/eval/coco`): the first character behind an opening
    parenthesis, after the last `answer is` or `answer:`. So `B. two` is b, and `two` is t; `The answer is: B` is wrong.
    """
    text = reply.lower().strip()
    for marker in MARKERS:
        text = text.rpartition(marker)[2]
    return text.strip().rstrip(".").lstrip("(").rstrip(")")[:1]


def in_braces(reply: str) -> str | None:
    """Text in the first pair of braces, as BlindTest asks for it; None without braces."""
    found = BRACES.search(reply)
    return found[1].strip() if found else None


def read_count(reply: str) -> str | None:
    """A whole number without zeros in front: the one in braces or, without braces, the first.

    Of a reply without digits, the one in words, as `parse_count` reads it. None if there is none, as in `{2.5}`.
    """
    held = in_braces(reply)
    text = reply if held is None else held
    if found := NUMBER.search(text):
        return _number(found[0].partition(".")[0].replace(",", "")) if WHOLE.fullmatch(found[0]) else None
    count = parse_count(text)
    return None if count is None else str(count)


def read_letter(reply: str) -> str | None:
    """A letter in lower case: the one in braces or, without braces, the only one that the reply has; else None."""
    held = in_braces(reply)
    letters = [sign for sign in (reply if held is None else held) if sign.isalpha()]
    return letters[0].lower() if len(letters) == 1 else None


def read_grid(reply: str) -> str | None:
    """Rows and columns as `5,6`: beside their names, as a pair in parentheses or braces, as `5 x 6`, or all there is.

    They may be in words; else None.
    """
    text = reply if re.search(r"\d", reply) else with_digits(reply)
    for patterns in (COUNTED, NAMED):
        found = [pattern.search(text) for pattern in patterns]
        if all(found):
            return ",".join(_number(one[1]) for one in found if one)
    pair = PAIR.search(text) or TIMES.search(text) or BARE.fullmatch(text)
    return f"{_number(pair[1])},{_number(pair[2])}" if pair else None


def _number(digits: str) -> str:
    """The number without zeros in front; of one with thousands of digits, which Python does not read, the beginning."""
    return str(int(digits[:LONGEST]))


def read_yes_no(reply: str) -> str | None:
    """`yes` or `no`, whichever the reply says; None where it says both or neither."""
    return only_word(reply, ("yes", "no"))
