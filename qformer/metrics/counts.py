"""Numbers and colors in free replies, such as `There are four objects, 3 of them red.`"""

from __future__ import annotations

import re
from itertools import accumulate
from operator import mul

_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS: dict[str, int] = {
    **{word: number for number, word in enumerate(_UNITS)},
    **{word: 10 * number for number, word in enumerate(_TENS, start=2)},
    **{
        f"{ten}{between}{unit}": 10 * tens + units
        for tens, ten in enumerate(_TENS, start=2)
        for units, unit in enumerate(_UNITS[:10])
        if units
        for between in ("-", " ")
    },
    "dozen": 12,
}
#: Longest names first, since `six` begins `sixteen` and `twenty` begins `twenty-one`; a number of digits stands alone.
_NUMBER = "|".join(
    [r"(?<![\w.,])\d{1,3}(?:,\d{3}){1,2}(?![\w,]|\.\d)", r"(?<![\w.,])\d{1,6}(?:\.0+)?(?![\w]|[.,]\d)"]
    + [rf"\b{word}\b" for word in sorted(WORDS, key=len, reverse=True)]
)
NUMBER = re.compile(_NUMBER)
#: Layouts, whose numbers are not how many there are: `3 x 3`, `three rows of three`.
GRID = re.compile(
    rf"\b\d+\s*[x\u00d7*]\s*\d+|(?:{_NUMBER})(?:\s+by\s+|\s+rows?(?:\s+of\s+|\s+(?:and|by|with)\s+))(?:{_NUMBER})"
)
DIGITS = re.compile(r"\d+")
#: Things counted out, as `1, 2, 3 and 4`: only the last of them is how many there are.
COUNTED_OUT = re.compile(r"\b1,\s*2(?:,?(?:\s+and)?\s+\d{1,3}|,\d{1,3})*\b")
#: Numbers of several words: `two dozen`, `half a dozen`, `a hundred and five`.
SCALED = re.compile(rf"(?:\b(half a|a)|({_NUMBER}))[ -](?:(dozen)s?|hundred(?: and ({_NUMBER}))?)\b")
NOTHING = re.compile(
    r"(?:\bno|\bnot any|n't any)(?: \w+)? (?:objects?|circles?|shapes?|things?)\b"
    r"|^\W*(?:none|nothing)(?: at all| of them)?\W*$"
    r"|\b(?:there(?:'s| is| are)|see|count|find) (?:none|nothing)\b|\bthere (?:aren't|are not) any\W*$"
)
BULLET = re.compile(r"^\s*(\d{1,3})[.)]\s", re.MULTILINE)
#: Where a reply of several numbers says which one is meant.
MEANT = (
    re.compile(rf"(?:\btotal(?:s|ing|ling)?(?: number)?(?: of| is|:)*|=|\baltogether:?)\s*\W{{0,3}}({_NUMBER})"),
    re.compile(rf"({_NUMBER})(?:\s+\w+){{0,4}}\s+(?:in total|altogether|in all|overall)\b"),
    re.compile(rf"\banswer\b[^.\d]{{0,20}}?\W{{0,3}}({_NUMBER})"),
)
#: What a reply concludes from other numbers: `so there are nine circles`; not their layout: `so 3 in each row`.
CONCLUDED = re.compile(
    r"(?:\b(?:(?<!or )so|thus|hence|therefore|making|makes?|giving|gives?|equals?|adds? up to|comes? to)\b|->|\u2192)"
    rf"(?:[ ,:]+(?!(?!one\b)(?:{_NUMBER}))[a-z']+){{0,6}}?[ ,:]+(?!one\b)\W{{0,3}}({_NUMBER})"
    r"(?!\s+(?:rows?|columns?|pairs?|groups?|each|per|(?:on|in|of|for)\s+(?:each|every|these|them))\b)"
)
COLORS = (
    *("red", "green", "blue", "gray", "grey", "brown", "beige", "black", "white", "yellow", "orange", "purple"),
    *("pink", "cyan", "tan", "khaki", "taupe", "olive"),
)
_COLOR = rf"\b(?:{'|'.join(COLORS)})(?:ish)?\b"
COLOR = re.compile(rf"\b({'|'.join(COLORS)})(?:ish)?\b")
#: What is said of something: `the area left of the red rectangle is gray`; not of whose it is, as `the edge's red end`.
SAID = re.compile(
    r"\b(?:is|are|looks?|appears?|seems?|(?:it|that|this|there|which|color)'s)\b"
    rf"(?: (?!not\b)[\w'-]+){{0,4}}? {COLOR.pattern}"
)
_TONE = rf"(?:(?:a|an|the|any|light|dark|pale|bright|deep|pure|solid|longer|color)\s+)*{_COLOR}"
_OR = r"\s*,?\s*(?:or|nor|and)\s+"
#: Colors that a reply denies: `isn't red, green or blue`, `neither red nor blue`, `instead of red`, `red? No, gray`.
#: A reply that is `not red, gray` is gray, and one that is not sure hedges and denies nothing.
DENIED = re.compile(
    rf"(?:(?:\b(?:not|cannot|neither|never)|n't)(?:\s(?!(?:but|and|because|since|so|only|just|sure|certain)\b)[\w'-]+){{0,5}}?"
    rf"\s+|\b(?:nor|no|without|instead of|rather than|unlike)\s+){_TONE}"
    rf"(?:(?:\s*,\s*{_TONE})*(?:{_OR}{_TONE})+|(?:\s*,\s*{_TONE}){{2,}})?"
    rf"|{_COLOR}\s+(?:is|was|does)(?:n't|\s+not)\b(?!\s+it\b)|{_COLOR}\W+no\s*[,.;:!\u2014-]"
)
_THING = r"(?:rectangle|box|block|shape|square|object|figure)\b"
#: What is in the picture, which nobody asks for while a reply names another color: `red rectangle`, `the box is red`.
BESIDE = re.compile(
    rf"{_COLOR}(?:[ -]colou?red)?"
    rf"(?: (?:tall|wide|long|thin|narrow|large|big|small|solid|filled|vertical|horizontal))? {_THING}"
    rf"|(?:^|[.,;:!?]|\b(?:and|but|while|whereas)\b)\s*(?:the|this|its) (?:\w+ )?{_THING}(?: in the \w+)?(?: itself)?"
    rf" (?:is|looks|appears|seems) (?:\w+ )?{_COLOR}"
)
LONGEST = 2000  # characters of a reply that are read


def parse_count(reply: str) -> int | None:
    """The number of things that a reply gives, in digits or words; None where it gives none.

    Of several numbers the total is meant, or what is called the answer, or what a reply concludes, or what is the sum
    or the product of those before it, or else the first that is not the word `one`, which is mostly a pronoun. Of a
    numbered list, or of things counted out, it is the last one's, unless another number is told beside them. `None` and
    `There are no circles` are 0, and `a single circle` is 1.
    """
    text = reply[:LONGEST].casefold().replace("\u2019", "'")
    text = GRID.sub(" ", SCALED.sub(_scaled, text))
    listed = [*BULLET.findall(text), *(DIGITS.findall(found[0])[-1] for found in COUNTED_OUT.finditer(text))]
    text = COUNTED_OUT.sub(" ", BULLET.sub(" ", text))
    for pattern in MEANT:
        if found := pattern.search(text):
            return _value(found[1])
    if concluded := CONCLUDED.findall(text):
        return _value(concluded[-1])
    found_all = [match[0] for match in NUMBER.finditer(text)]
    others = [number for number in found_all if number != "one"]
    for numbers in (others, found_all):
        if (result := _result([_value(number) for number in numbers])) is not None:
            return result
    told = others or listed[-1:] or found_all
    if told:
        return _value(told[0])
    return 0 if NOTHING.search(text) else 1 if re.search(r"\ba single\b", text) else None


def with_digits(text: str) -> str:
    """The beginning of a text, in lower case, with its numbers in digits: `three rows` is `3 rows`."""
    return NUMBER.sub(lambda found: str(_value(found[0])), text[:LONGEST].casefold())


def parse_color(reply: str) -> str | None:
    """The color that a reply says something is, or else the first that it names, in lower case; None without any.

    What it denies does not count, as in `not red`, and that of a thing in the picture, as in `the red rectangle has a
    gray edge`, only where it names no other. `Grey` is `gray`.
    """
    text = DENIED.sub(" ", reply[:LONGEST].casefold().replace("\u2019", "'"))
    for part in (BESIDE.sub(" ", text), text):
        if found := SAID.search(part) or COLOR.search(part):
            return found[1].replace("grey", "gray")
    return None


def _result(numbers: list[int]) -> int | None:
    """The first number behind at least two that is their sum or product, as in `two circles, two squares: four`."""
    sums, products = accumulate(numbers), accumulate(numbers, mul)
    before = zip(sums, products, strict=True)
    for place, (number, results) in enumerate(zip(numbers[1:], before, strict=False), start=1):
        if place > 1 and number in results:
            return number
    return None


def _scaled(found: re.Match[str]) -> str:
    article, number, dozen, rest = found.groups()
    if article == "half a":
        return "6" if dozen else "50"
    return str((_value(number) if number else 1) * (12 if dozen else 100) + (_value(rest) if rest else 0))


def _value(number: str) -> int:
    return WORDS[number] if number in WORDS else int(number.partition(".")[0].replace(",", ""))
