"""Visual question answering: how answers are normalised and scored (VQAv2's own evaluation, Antol et al. 2015).

People answered every question ten times. A model's answer counts min(1, matches / 3) against every choice of nine of
them, and the mean of the ten is its accuracy. Before that its spelling is brought to the one of the annotations.

What people said is compared by two rules (`Rule`). `vqav2`: that of `vqaEval.py` of GT-Vision-Lab/VQA as of 2017,
which LAVIS has, and by which ten equal answers that need normalising ("Yes", "two") are matched by nothing.
`normalised`: what people said is always normalised like the model's answer, as by TextVQA's
`TextVQAAccuracyEvaluator` (facebookresearch/mmf). The script of 2021 normalises both sides where people differ, and
neither where they agree.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Rule = Literal["normalised", "vqav2"]
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")  # the point of a number stays
DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PEOPLE = 10  # who answered each question of VQAv2
# Right spellings of which the evaluation also knows those with one apostrophe missing. What would be another word
# without it (its, were, hell) is not among them.
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
} | {"somebody'd": "somebodyd"}  # the wrong way round in the evaluation itself; every published number has it so


def normalise_answer(answer: str) -> str:
    """As a model's answer is compared: one line, no punctuation or articles, lower case, digits, apostrophes."""
    return _spell(without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def without_punctuation(text: str) -> str:
    """Signs beside a space vanish, signs inside a word become a space; a number with thousands loses all of them."""
    clean = text
    for sign in PUNCTUATION:
        vanishes = f"{sign} " in text or f" {sign}" in text or THOUSANDS.search(text)
        clean = clean.replace(sign, "" if vanishes else " ")
    return FULL_STOP.sub("", clean)


def _spell(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, accepted: Sequence[str], rule: Rule = "normalised") -> float:
    """The share in [0, 1] that an answer earns.

    Args:
        answer: what the model said.
        accepted: what people said, ten in VQAv2 and OK-VQA, repetitions included. Fewer than ten are answers of which
            any is right, normalised like the model's by either rule: three in agreement cannot be asked of them.
        rule: `vqav2` normalises only people's punctuation, and only where they differ.

    Raises:
        ValueError: nothing is accepted.
    """
    if not accepted:
        raise ValueError("no accepted answers; give at least one")
    said = normalise_answer(answer)
    if len(accepted) < PEOPLE:
        return float(said in map(normalise_answer, accepted))
    if rule == "normalised":
        truth = [normalise_answer(text) for text in accepted]
    else:
        truth = [without_punctuation(text) for text in accepted] if len(set(accepted)) > 1 else list(accepted)
    matches = [text == said for text in truth]
    agreeing = sum(matches)
    return sum(min(1.0, (agreeing - own) / 3) for own in matches) / len(truth)


def is_vqav2(facts: Sequence[Mapping[str, object]]) -> bool:
    """Whether these are questions of VQA's own annotations, by what each record says: some ask for yes or a number.

    OK-VQA has the same columns and one type of answer, VizWiz no types of questions.
    """
    types = {record["answer_type"] for record in facts if "question_type" in record and "answer_type" in record}
    return bool(types & {"yes/no", "number"})


def mean_accuracy(answers: Iterable[str], accepted: Iterable[Sequence[str]]) -> float:
    """Over all questions, by the rule `normalised`; published numbers are 100 times such a mean.

    Raises:
        ValueError: no questions, or another number of answers than of lists of accepted ones.
    """
    scores = [accuracy(answer, known) for answer, known in zip(answers, accepted, strict=True)]
    if not scores:
        raise ValueError("no answers to score; give at least one")
    return sum(scores) / len(scores)
