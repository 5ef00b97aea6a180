"""Visual question answering: normalization and scoring of answers (VQAv2's own evaluation, Antol et al. 2015).

People answered every question ten times. A model's answer scores min(1, matches / 3) against each subset of nine of
these answers, and the mean of the ten scores is its accuracy. First its spelling is normalized to that of the
annotations.

There are two rules for the answers of people (`Rule`). `vqav2` is the rule of `vqaEval.py` in GT-Vision-Lab/VQA as of
2017, which LAVIS also uses; with it, ten equal answers that need normalization ("Yes", "two") cannot be matched.
`normalised` always normalizes people's answers like the model's, as `TextVQAAccuracyEvaluator` does for TextVQA
(facebookresearch/mmf). The script of 2021 normalizes both sides if people differ, and neither if they agree.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Rule = Literal["normalised", "vqav2"]
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")  # decimal points stay
DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PEOPLE = 10  # number of people who answered each question of VQAv2
# Correct spellings, which the evaluation also recognizes with one apostrophe missing. Those that would be another word
# without it (its, were, hell) are not included.
APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the evaluation itself, and so in every published number


def normalise_answer(answer: str) -> str:
    """Normalize a model's answer: one line, no punctuation or articles, lower case, digits, apostrophes."""
    return _spell(without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def without_punctuation(text: str) -> str:
    """Remove punctuation beside a space, or all of it beside a number like 1,000; else it becomes a space."""
    clean = text
    for sign in PUNCTUATION:
        vanishes = f"{sign} " in text or f" {sign}" in text or THOUSANDS.search(text)
        clean = clean.replace(sign, "" if vanishes else " ")
    return FULL_STOP.sub("", clean)


def _spell(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, accepted: Sequence[str], rule: Rule = "normalised") -> float:
    """Compute the accuracy of an answer, in [0, 1].

    Args:
        answer: the answer of the model.
        accepted: the answers of people, ten in VQAv2 and OK-VQA, with repetitions. If there are fewer than ten, any of
            them is right, and both rules normalize them like the model's answer.
        rule: `vqav2` normalizes only the punctuation of people's answers, and only if these differ.

    Raises:
        ValueError: there are no accepted answers.
    """
    if not accepted:
        raise ValueError("no accepted answers; give at least one")
    prediction = normalise_answer(answer)
    if len(accepted) < PEOPLE:
        return float(prediction in map(normalise_answer, accepted))
    if rule == "normalised":
        truth = [normalise_answer(text) for text in accepted]
    else:
        truth = [without_punctuation(text) for text in accepted] if len(set(accepted)) > 1 else list(accepted)
    matches = [text == prediction for text in truth]
    agreeing = sum(matches)
    return sum(min(1.0, (agreeing - own) / 3) for own in matches) / len(truth)


def is_vqav2(facts: Sequence[Mapping[str, object]]) -> bool:
    """Return True for records from VQA's own annotations, in which some answers have the type yes/no or number.

    OK-VQA has the same columns with only one type of answer; VizWiz has no question types.
    """
    types = {str(record["answer_type"]) for record in facts if "question_type" in record and "answer_type" in record}
    return bool(types & {"yes/no", "number"})


def mean_accuracy(answers: Iterable[str], accepted: Iterable[Sequence[str]]) -> float:
    """Compute the mean accuracy over all questions by the rule `normalised`; published numbers are 100 times the mean.

    Raises:
        ValueError: there are no questions, or the two arguments differ in length.
    """
    scores = [accuracy(answer, known) for answer, known in zip(answers, accepted, strict=True)]
    if not scores:
        raise ValueError("no answers to score; give at least one")
    return sum(scores) / len(scores)
