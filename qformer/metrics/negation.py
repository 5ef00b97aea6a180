"""Reach of a negation in an English sentence: `not` denies what follows it, up to the clause behind it.

`The dog without a collar faces left` denies a collar and no direction, and `no, it is closed` denies what was asked.
"""

from __future__ import annotations

import re


def listed(words: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(words.split())


NEGATORS = listed(
    "not no never cannot without neither nor nobody none unlike isn't aren't wasn't weren't doesn't don't "
    "didn't can't couldn't won't wouldn't hasn't haven't"
)
ARTICLES = listed("a an the")
WORD = re.compile(r"\d+(?:[:.,]\d+)*|[^\W\d_]+(?:['-][^\W\d_]+)*")
REACH = 5  # words
FINITE = (
    r"(?:is|are|was|were|has|have|seems?|appears?|faces?|looks?|points?|heads|turns|moves|shows|stands?|sits?|lies|"
    r"(?:it|he|she|that|there)'s|they're)"
)
#: What follows from a denial, or is its reason, and is denied no more.
CONSEQUENCE = re.compile(
    rf"\b(?:so|therefore|hence|thus|because|since|while|whereas|which means)\b|\b(?:and|as)\b.*\b{FINITE}\b",
    re.IGNORECASE | re.DOTALL,
)
#: Answers to a question, which deny nothing behind them: `no, it is closed`, `No (b)`, `No (option b)`.
ANSWER = re.compile(r"\W*(?:it|it's|they|they're|he|he's|she|she's|this|that|that's|there)\b", re.IGNORECASE)
LABEL = re.compile(r"\W*(?:\((?:option|choice|answer|letter)\W*)?", re.IGNORECASE)
#: What stands in front of a negation that tells of a noun: `a man with no hat`, `the bird that isn't flying`.
OWNER = re.compile(r"\b(?:with|has|have|having)\W+$", re.IGNORECASE)
RELATIVE = re.compile(r"\b(?:that|who|which)\W+(?:(?:is|are|was|were|does|do|has|have)\W+)?$", re.IGNORECASE)
VERBAL = re.compile(r"(?:\b(?:is|are|was|were|be)|'s|'re)\W+$", re.IGNORECASE)
#: Words between a negation and the letter of an option: `not (b)`, `I would not say that the answer is (b)`.
LETTERED = ARTICLES | listed(
    "b option choice answer letter choose pick select say go with think guess believe would could can must be is "
    "it it's that correct right best likely or nor either both"
)


def is_negated(before: str, is_letter: bool = False) -> bool:
    """Tell if a negation reaches the end of a part of a clause.

    Args:
        before: what stands in front of a mention, from the beginning of its clause.
        is_letter: the mention is the letter of an option.
    """
    found = [word for word in WORD.finditer(before) if word[0].lower() not in ARTICLES][-REACH:]
    return any(
        _reaches(word[0].lower(), before[: word.start()], before[word.end() :], is_letter)
        for word in found
        if word[0].lower() in NEGATORS
    )


def _reaches(negator: str, lead: str, gap: str, is_letter: bool) -> bool:
    """Tell if a negation with what stands before it reaches over a gap."""
    words = [word.lower() for word in WORD.findall(gap)]
    if negator == "no" and (ANSWER.match(gap) or (is_letter and LABEL.fullmatch(gap))):
        return False
    if is_letter and gap.rstrip().endswith("(") and not LETTERED.issuperset(words):
        return False  # a label behind a statement: `it does not have wheels (b)`
    if CONSEQUENCE.search(gap):
        return False
    describes = (
        negator in ("without", "unlike")
        or (negator == "no" and OWNER.search(lead) is not None)
        or (negator == "not" and words[:1] != [] and words[0].endswith("ing") and not VERBAL.search(lead))
        or RELATIVE.search(lead) is not None
    )
    return not (describes and re.search(rf"\w\W+{FINITE}\b", gap, re.IGNORECASE))
