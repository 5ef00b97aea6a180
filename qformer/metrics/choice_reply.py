"""Read which of two options a free answer chooses: `parse_choice`, by rules for English, without a model.

A reply is read clause by clause. An option is mentioned by its letter or by the words that set it apart; a mention
behind a negation stands for the other option. What is stated as the answer counts most, then what the reply opens with,
then all that it asserts. A reply that asserts both or none, or whose letter and words disagree, chooses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from qformer.metrics.choice_words import (
    CLAUSE,
    OTHER,
    SENTENCE,
    WORD,
    Mention,
    OptionPair,
    mentions_of,
    parts,
    plain,
    stem_of,
    with_letters,
    without_echo,
    words_of,
)
from qformer.types import UsageError

LONGEST = 2000  # characters; a loop of a model must not cost seconds
CORRECTIONS = 4  # the last ones are tried
OPTION_MARK = re.compile(r"\(([abc])\)", re.IGNORECASE)
UNSURE = re.compile(
    r"(?:can(?:not|'t| not)|unable to|not able to|hard to|impossible to|difficult to|not possible to|too \w+ to|"
    r"(?:do not|don't|not) have enough|not enough|insufficient)\b[^.!?\n]{0,30}?"
    r"\b(?:tell|say|determined?|answer|help|know|decide|assist|judge|information|clearly)\b|"
    r"(?:can(?:not|'t)|unable to|not able to|don't|do not)\b[^.!?\n]{0,20}?\b(?:see|view|access|have access to)\b"
    r"[^.!?\n]{0,12}?\b(?:image|picture|photo)s?\b|\b(?:do not|don't|not) know\b|\bnot (?:sure|clear)\b|"
    r"\bun(?:sure|clear)\b|\bno idea\b|\bdepends\b|\bnot [^.!?\n]{0,25}enough to\b",
    re.IGNORECASE,
)
REFUSED = re.compile(r"\blanguage model\b|\bas an AI\b|\bAI assistant\b|\bchatbot\b", re.IGNORECASE)
CORRECTION = re.compile(
    r"\bno,? wait\b|\bwait\b|\bactually\b|\bcorrection\b|\bscratch that\b|\bon second thought\b|\bI mean(?:t)?\b|"
    r"\blet me \w+ again\b|\blooking again\b|\boops\b|\boh no\b|\bsorry\b|\bhmm+\b|\bin fact\b|"
    r"\bapologi[sz]e[^.]*|\bmade a mistake\b",
    re.IGNORECASE,
)
RECONSIDERED = re.compile(r"(?<=[,?!.\-…])\s*no,\s", re.IGNORECASE)
STATED = re.compile(
    r"\b(?:answer|choice|option|conclusion|response|answer would|answer should|answer must)\b[^.!?\n:=]{0,30}?"
    r"(?:\bis\b|\bbe\b|\bremains\b|:|=)|\b(?:I|I'd|I would|we) (?:choose|pick|select|go with|say|answer)\b|"
    r"\banswer(?=\s*\(?[ab]\b)|\bboxed\b|\"(?:answer|choice)\":",
    re.IGNORECASE,
)
BOTH_STATED = re.compile(rf"(?:{STATED.pattern})\s*…\s*$", re.IGNORECASE)
AFFIRMED = re.compile(
    r"\s*[)\]\"']*\s*(?:\w+ ){0,2}?(?:is|it is|fits)(?: also)?(?: the)? (?:right|correct|best|better)\b"
)
CONCLUDING = re.compile(
    r"\b(?:so|therefore|hence|thus|consequently|conclusion|this means|which means)\b", re.IGNORECASE
)
TOTAL = re.compile(r"\b(?:in total|in all|altogether|total(?:ing|s)?(?: of| is|:)?)(?!\w)", re.IGNORECASE)
NONE_OF_THEM = re.compile(
    r"\bneither\b|\bnone of\b|(?<!with )\bboth (?!point|show|tell|photos|images|pictures|sides|wings|eyes|"
    r"of (?:its|his|her|their|the) \w)|\beither\b|"
    r"\bboth:|\bone\b[^.!?]*\bthe other\b|\bbetween \S+ and\b|\bor (?:it's |it is |is )?not\b",
    re.IGNORECASE,
)
RELATION = frozenset(["than", "of", "behind", "beside", "near", "with", "by", "front", "next"])
DENIES = re.compile(
    r"n't\b(?! (?:mean|think))|\bcannot\b|\b(?:is|are|was|were|do|does|did|has|have|can|am) (?:\w+ly )?not\b|"
    r"(?:\b(?:is|are|was|were|has|have|see|with)|'s) no\b|'s not\b|"
    r"^\W*(?:no|none|nobody|neither|not)\b|\bnot\W*$|\bno longer\b|\bafraid not\b",
    re.IGNORECASE,
)
#: Reasoning that was cut off before it came to an answer.
CUT_OFF = re.compile(r"\b(?:we (?:need|have|can|must)|let's|let us)\b[^.!?\n]*(?:[.!?:\n]+[^.!?\n]*)?[^.!?\s]\s*$")
HALF = re.compile(
    rf"{SENTENCE.pattern}|,\s+but\b"
)  # `neither is quite right, but (a) is closer` chooses behind its comma
LINE = re.compile(r"\n")
HEADING = re.compile(r"\s*\(?[abAB][).:].*:\s*")
ITSELF = re.compile(r"\b(?:it|him|her)self\b|\bthemselves\b", re.IGNORECASE)
OPEN_END = re.compile(r"\b(?:is|are|be) (?:both|neither)\W*(?:$|\n|[.!])", re.IGNORECASE)
EITHER = re.compile(r"\beither\b", re.IGNORECASE)
JOINED = re.compile(
    r"[\s)\]\"'.,]*(?:\bor\b|\band\b|/|&|\bas well as\b)[\s(\[\"']*"
    r"(?:(?:option|answer|a|an|the|with|is|it|she|he)\W+)*(?:\w+ )?\(?"
)
OPENER = re.compile(
    r"[\W\d]*(?:(?:sure|well|ok|okay|answer|hmm|so|ah|maybe|perhaps|\([c-h]\)|"
    r"I (?:think|believe|guess|see)|it's|it is|option)\W+)*(?:(?:a|an|the)\s+)?\W*",
    re.IGNORECASE,
)


def parse_choice(reply: str, options: str | Sequence[str]) -> str | None:
    """Read which of two options a reply chooses.

    Args:
        reply: a model's or a person's free answer. Of more than 2,000 characters the middle is not read.
        options: both texts, or one as MMVP has it, `(a) Open (b) Closed`.

    Returns:
        `a`, `b`, or None where the reply chooses none, or both.

    Raises:
        UsageError: there are not two options.
    """
    pair = OptionPair.of(split_options(options))
    if len(reply) > LONGEST:
        reply = f"{reply[: LONGEST // 2]}\n{reply[-LONGEST // 2 :]}"
    text = without_echo(with_letters(plain(reply), pair), pair)
    if not text.strip():
        return None
    return _decide(text, pair)


def split_options(options: str | Sequence[str]) -> tuple[str, str]:
    """Split `(a) Open (b) Closed` into its texts; two texts stay as they are.

    Raises:
        UsageError: there are not two.
    """
    texts = find_options(options) if isinstance(options, str) else [str(text) for text in options]
    if len(texts) != 2:
        raise UsageError(f"the options are {options!r:.100}; give two, as '(a) Open (b) Closed' or a list")
    return texts[0], texts[1]


def find_options(text: str) -> list[str]:
    """The two texts of `(a) Open (b) Closed`; none where one of them is missing, or a third follows.

    Each mark is looked at once: a stranger's table has cells of 100,000 characters.
    """
    parts_ = OPTION_MARK.split(text.strip())  # "", "a", " Open ", "b", " Closed"
    marks, texts = [mark.lower() for mark in parts_[1::2]], parts_[2::2]
    if parts_[0] or marks[:2] != ["a", "b"]:
        return []
    first, second = texts[0].strip().rstrip(",; \n\t"), text[text.lower().index("(b)") + 3 :].strip()
    third = any(mark == "c" and re.match(r"\s*\w", behind) for mark, behind in zip(marks, texts, strict=True))
    return [first, second] if first and second and not third else []


def _decide(text: str, pair: OptionPair) -> str | None:
    """The choice behind the last correction that makes one, or else that of the whole text."""
    marks = list(CORRECTION.finditer(text)) + ([] if pair.asks else list(RECONSIDERED.finditer(text)))
    for mark in sorted(marks, key=lambda found: -found.start())[:CORRECTIONS]:
        before = words_of(text[: mark.start()])[-2:]
        if not any(word == "not" or word.endswith("n't") for word in before):
            choice = _settle(text[mark.end() :], pair)
            if choice is not None:
                return choice
    return _settle(text, pair)


def _settle(text: str, pair: OptionPair) -> str | None:
    mentions = mentions_of(text, pair)
    words = set() if any(one.is_letter for one in mentions) else {stem_of(word) for word in words_of(text)}
    fitting = [name for name in "ab" if words and words <= set(pair.words[name])]
    equal = [name for name in fitting if words == set(pair.words[name])]
    if len(equal or fitting) == 1:
        return (equal or fitting)[0]
    text = _blank(_blank(text, REFUSED, SENTENCE), UNSURE, CLAUSE)
    mentions = mentions_of(text, pair)
    found = _open_dropped(text, _agreeing(text, mentions))
    if pair.asks and not mentions and not NONE_OF_THEM.search(text):
        start, end = parts(text.strip() + " ", SENTENCE)[0]
        return pair.negative if DENIES.search(text.strip(), start, end) else None
    undecided = _asserts_both(text, mentions)
    for look in (_stated, _opening, _concluded, _totaled, _asserted):
        choice = None if look is _asserted and undecided else look(text, found)
        if choice is not None:
            return None if _disagree(found) else choice
    return None


def _blank(text: str, pattern: re.Pattern[str], breaks: re.Pattern[str]) -> str:
    """The text with spaces in place of each part in which a pattern is found."""
    for start, end in parts(text, breaks):
        if pattern.search(text, start, end):
            text = text[:start] + " " * (end - start) + text[end:]
    return text


def _open_dropped(text: str, found: list[Mention]) -> list[Mention]:
    """The mentions without those that leave the choice open: `a or b`, `both`, and questions."""
    open_places = {place for place, one in enumerate(found) if _is_heading(text, found, place)}
    for place, (one, next_) in enumerate(pairwise(found)):
        between = text[one.end : next_.start]
        if one.choice != next_.choice and not (one.denied or next_.denied) and JOINED.fullmatch(between):
            open_places |= {place, place + 1}
            open_places |= {
                near for near in (place - 1, place + 2) if 0 <= near < len(found) and _touch(text, found, near, place)
            }
    for start, end in parts(text, HALF):
        own = {place for place, one in enumerate(found) if start <= one.start < end}
        asks = text[start:end].rstrip().endswith("?") and (
            len({found[place].choice for place in own}) > 1 or len(own) < len(found)
        )
        if asks or NONE_OF_THEM.search(text, start, end):
            open_places |= own
    return [one for place, one in enumerate(found) if place not in open_places]


def _is_heading(text: str, found: list[Mention], place: int) -> bool:
    """Tell if a mention is of a line such as `(a) Open:`, which says that an option is looked at, not chosen."""
    start, end = next((start, end) for start, end in parts(text, LINE) if start <= found[place].start < end)
    line = text[start:end]
    return (
        bool(HEADING.fullmatch(line))
        and start > 0
        and found[place].is_letter | (place > 0 and found[place - 1].is_letter)
    )


def _asserts_both(text: str, found: list[Mention]) -> bool:
    """Tell if a sentence says that both options hold, or neither, or gives both as the answer; or if none comes."""
    for start, end in parts(text, HALF):
        own = {one.choice for one in found if start <= one.start < end}
        least = 1 if EITHER.search(text, start, end) else 2
        if len(own) >= least and NONE_OF_THEM.search(text, start, end) and "?" not in text[start:end]:
            return True
    return any(ending.search(text) for ending in (CUT_OFF, OPEN_END, BOTH_STATED))


def _agreeing(text: str, found: list[Mention]) -> list[Mention]:
    """The mentions without letters that stand right in front of the words of the other option, and without these."""
    wrong: set[int] = set()
    for place, (one, next_) in enumerate(pairwise(found)):
        beside = not WORD.search(text, one.end, next_.start)
        if beside and one.is_letter and not next_.is_letter and _chosen([one, next_]) is None:
            wrong |= {place, place + 1}
    return [one for place, one in enumerate(found) if place not in wrong]


def _touch(text: str, found: list[Mention], near: int, place: int) -> bool:
    """Tell if a mention stands right beside one of the same choice, as a letter beside its words."""
    first, second = (found[near], found[place]) if near < place else (found[place + 1], found[near])
    return first.choice == second.choice and len(text[first.end : second.start].strip(" ().,:\"'")) < 4


def _chosen(found: Sequence[Mention]) -> str | None:
    """The one choice for which all mentions speak."""
    choices = {OTHER[one.choice] if one.denied else one.choice for one in found}
    return choices.pop() if len(choices) == 1 else None


def _stated(text: str, found: list[Mention]) -> str | None:
    """Find what is called the answer, the last time that one is."""
    for mark in reversed(list(STATED.finditer(text))):
        after = text[mark.end() :]
        skipped = len(after) - len(after.lstrip())
        sentence = SENTENCE.search(text, mark.end() + skipped)
        own = [one for one in found if mark.end() <= one.start < (sentence.start() + 1 if sentence else len(text))]
        asserted = [one for one in own if not one.denied]
        if own:
            return _chosen(asserted[:1] or own)
    affirmed = [one for one in found if one.is_letter and not one.denied and AFFIRMED.match(text, one.end)]
    return _chosen(affirmed[-1:])


def _opening(text: str, found: list[Mention]) -> str | None:
    """Find what the reply opens with, if that stands by itself."""
    if not found or found[0].denied or not OPENER.fullmatch(text[: found[0].start]):
        return None
    own = [one for one in found if one.choice == found[0].choice]
    last = found[0]
    for one in own[1:]:
        if not WORD.search(text, last.end, one.start):
            last = one
    return found[0].choice if re.match(r"\s*(?:[^\w\s]|\n|$)", text[last.end :]) else None


def _concluded(text: str, found: list[Mention]) -> str | None:
    """Find what follows a `so` or `therefore`."""
    for mark in reversed(list(CONCLUDING.finditer(text))):
        sentence = SENTENCE.search(text, mark.end())
        own = [one for one in found if mark.end() <= one.start < (sentence.start() + 1 if sentence else len(text))]
        if own:
            return _chosen(own)
    return None


def _totaled(text: str, found: list[Mention]) -> str | None:
    """Find what is called the total: in the clause of the word, the mention right behind it, or else the last one."""
    for mark in TOTAL.finditer(text):
        start, end = next((start, end) for start, end in parts(text, CLAUSE) if start <= mark.start() < end)
        own = [one for one in found if start <= one.start < end]
        if own:
            return _chosen([one for one in own if one.start >= mark.end()][:1] or own[-1:])
    return None


def _asserted(text: str, found: list[Mention]) -> str | None:
    """Find what all says, or the letters, or what is said of something and not beside it, or the first sentence."""
    real = [one for one in found if not one.unreal] or found
    beside = [one for one in real if not _is_beside(text, one)]
    itself = [one for one in real if ITSELF.search(text, _clause_start(text, one), one.start)]
    for part in (
        real,
        itself,
        [one for one in real if one.is_letter],
        beside,
        [one for one in beside if one.predicate],
        _of_first_sentence(text, beside),
    ):
        choice = _chosen(part)
        if choice is not None:
            return choice
    return None


def _of_first_sentence(text: str, found: list[Mention]) -> list[Mention]:
    """The mentions of the first sentence that has any: replies come to their point, and then ramble."""
    for start, end in parts(text, SENTENCE):
        own = [one for one in found if start <= one.start < end]
        if own:
            return own
    return []


def _clause_start(text: str, one: Mention) -> int:
    return next(start for start, end in parts(text, CLAUSE) if start <= one.start < end)


def _is_beside(text: str, one: Mention) -> bool:
    """Tell if a mention stands behind a preposition, as that of the car in `larger than the car`."""
    return bool(RELATION & set(words_of(text[max(0, one.start - 20) : one.start])[-2:]))


def _disagree(found: Sequence[Mention]) -> bool:
    """Tell if all letters speak for one option and all words for the other."""
    kinds = [
        _chosen([one for one in found if one.is_letter == kind and (kind or not one.unreal)]) for kind in (True, False)
    ]
    return None not in kinds and kinds[0] != kinds[1]
