"""Read which of two options a free answer chooses: `parse_choice`, by rules for English, without a model.

A reply is read clause by clause. An option is mentioned by its letter or by the words that set it apart; a mention
behind a negation stands for the other option. What is stated as the answer counts most, then what the reply opens with,
then all that it asserts. A reply that asserts both or none, or whose letter and words disagree, chooses nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from qformer.types import UsageError

OTHER = {"a": "b", "b": "a"}
OPTIONS = re.compile(r"\s*\(a\)\s*(.+?)[\s,;]*\(b\)\s*(.+?)\s*", re.IGNORECASE | re.DOTALL)
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
#: Words that mean the same as another one in such questions.
SAME = {"shut": "closed", "seated": "sitting", "rear": "back", "fewer": "less", "grey": "gray", "single": "1", "towards": "toward"}
#: The same for whole phrases.
PHRASES = {
    r"\bcan(?:not|'t| not) (?:be seen|see (?:it|them)\b)": "is not visible",
    r"\bcan (?:be seen|see (?:it|them)\b)": "is visible",
    r"\bof course\b(?! not)": "yes",
}
WHOLE = frozenset({"toward", "towards", "forward", "forwards", "finish", "almost"})
ARTICLES = frozenset({"a", "an", "the"})
FUNCTION = ARTICLES | frozenset(
    "is are was be it its this that there has have having does do did of to in on at by from with for and or i he she "
    "they his her their you we one ones side".split()
)
NEGATORS = frozenset(
    "not no never cannot without neither nor nobody none unlike isn't aren't wasn't weren't doesn't don't didn't can't "
    "couldn't won't wouldn't hasn't haven't".split()
)
YES = frozenset("yes yeah yep yup correct true certainly sure indeed absolutely definitely".split())
NO = frozenset("no nope nah false incorrect".split())
IDIOMS = re.compile(
    r"\b(?:no|without(?: a)?) doubt\b|\bwhy not\b|\bnot only\b|\bcan ?not be more\b|\bno problem\b|"
    r"\bon the one hand\b|\bas far as\b[^,.]*,|\bfor sure\b",
    re.IGNORECASE,
)
INSTEAD = r"(?:rather than|instead of|as opposed to|anything but|far from|other than|unlike|ruled? out|exclude)"
UNSURE = re.compile(
    r"(?:can(?:not|'t| not)|unable to|not able to|hard to|impossible to|difficult to|not possible to|too \w+ to|"
    r"(?:do not|don't|not) have enough|not enough|insufficient)\b[^.!?\n]{0,30}?"
    r"\b(?:tell|say|determined?|answer|help|know|decide|assist|judge|information|clearly)\b|"
    r"(?:can(?:not|'t)|unable to|not able to|don't|do not)\b[^.!?\n]{0,20}?\b(?:see|view|access|have access to)\b"
    r"[^.!?\n]{0,12}?\b(?:image|picture|photo)s?\b|\b(?:do not|don't|not) know\b|\bnot (?:sure|clear)\b|\bun(?:sure|clear)\b"
    r"|\bno idea\b|\bdepends\b|\bmaybe\b|\bperhaps\b|\bnot [^.!?\n]{0,25}enough to\b",
    re.IGNORECASE,
)
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
AFFIRMED = re.compile(r"\s*[)\]\"']*\s*(?:\w+ ){0,2}?(?:is|it is|fits)(?: also)?(?: the)? (?:right|correct|best|better)\b")
DENIED = re.compile(
    r"\s*[)\]\"']*\s*(?:is|are|was|would be|can|could|does|do)(?:n't| not)\b|\s*[)\]\"']*\s*(?:is|can be|seems)\s+"
    r"(?:\w+ )?(?:wrong|incorrect|false|impossible|ruled out|excluded)\b",
    re.IGNORECASE,
)
CONCLUDING = re.compile(r"\b(?:so|therefore|hence|thus|consequently|conclusion|this means|which means)\b", re.IGNORECASE)
#: Clauses that tell what is not so, or was only thought.
UNREAL = re.compile(
    r"\b(?:if|although|though|would|might|may|could|thought|at first|first sight|seemed|said|first answer|because|"
    r"since|unless|in a mirror|used to|explanation)\b",
    re.IGNORECASE,
)
NONE_OF_THEM = re.compile(
    r"\bneither\b|\bnone of\b|\bboth (?!point|show|tell|photos|images|pictures|sides|wings|eyes)|\beither\b|"
    r"\bone\b[^.!?]*\bthe other\b|\bbetween \S+ and\b",
    re.IGNORECASE,
)
PREDICATE = frozenset(
    "is are was be it's he's she's they're looks look faces face facing points pointing heads heading turned turns "
    "seems appears says shows moves stands sits lies located placed".split()
)
RELATION = frozenset("than of behind beside near with by front next".split())
WORD = re.compile(r"\d+(?:[:.,]\d+)*|[^\W\d_]+(?:['-][^\W\d_]+)*")
LETTER_PAIR = re.compile(r"\([abAB]\)")
LETTER = re.compile(r"(?<![\w'’])([abAB])(?![\w'’])")
CLAUSE = re.compile(r"[.!?;\n]+(?=\s|$)|,\s|…|\.{2,}|:\s|\s[-–—]\s|(?<!anything )\b(?:but|yet)\b")
JOINED = re.compile(r"[\s)\]\"'.,]*(?:\bor\b|\band\b|/|&|\bas well as\b)[\s(\[\"']*(?:(?:option|answer|a|an|the|with|is|it|she|he)\W+)*(?:\w+ )?\(?")
OPENER = re.compile(
    r"[\W\d]*(?:(?:sure|well|ok|okay|answer|hmm|so|ah|I (?:think|believe|guess|see)|it's|it is|option)\W+)*(?:(?:a|an|the)\s+)?\W*",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[.!?\n]+(?=\s|$)")


@dataclass(frozen=True)
class _Mention:
    """A place of the text that speaks for a choice, by a letter or by words; `unreal` in a clause of that kind."""

    start: int
    end: int
    choice: str
    is_letter: bool
    denied: bool
    unreal: bool
    predicate: bool


def parse_choice(reply: str, options: str | Sequence[str]) -> str | None:
    """Read which of two options a reply chooses.

    Args:
        reply: a model's or a person's free answer.
        options: both texts, or one as MMVP has it, `(a) Open (b) Closed`.

    Returns:
        `a`, `b`, or None where the reply chooses none, or both.

    Raises:
        UsageError: there are not two options.
    """
    pair = _Options.of(split_options(options))
    text = _without_echo(_plain(reply), pair)
    if not text.strip():
        return None
    return _decide(text, pair)


def split_options(options: str | Sequence[str]) -> tuple[str, str]:
    """Split `(a) Open (b) Closed` into its texts; two texts stay as they are.

    Raises:
        UsageError: there are not two.
    """
    found = OPTIONS.fullmatch(options) if isinstance(options, str) else None
    texts = [found[1], found[2]] if found else [] if isinstance(options, str) else [str(text) for text in options]
    if len(texts) != 2:
        raise UsageError(f"the options are {options!r}; give two, as '(a) Open (b) Closed' or a list")
    return texts[0], texts[1]


@dataclass(frozen=True)
class _Options:
    """What tells two options apart.

    Attributes:
        words: of each, in order, as `_stem` has them, without articles.
        marks: words of each alone. bound: True if these are prepositions, which count only in front of a shared word.
        shared: words of both that mean something.
        negative: the one that denies the other, as `Not visible`; None where neither does.
        asks: True for yes and no.
    """

    words: dict[str, tuple[str, ...]]
    marks: dict[str, frozenset[str]]
    bound: bool
    shared: frozenset[str]
    negative: str | None
    asks: bool

    @staticmethod
    @lru_cache(maxsize=512)
    def of(texts: tuple[str, str]) -> _Options:
        words = {name: tuple(_stem(word) for word in _words(_plain(text))) for name, text in zip("ab", texts, strict=True)}
        first, second = (frozenset(words[name]) for name in "ab")
        alone = {"a": first - second - ARTICLES, "b": second - first - ARTICLES}
        marks = {name: own - LITTLE - NEGATORS for name, own in alone.items()}
        if not (first & second) - LITTLE:  # as of on and off
            marks = {name: own or alone[name] - NEGATORS for name, own in marks.items()}
        denying = [name for name in "ab" if alone[name] & NEGATORS and not alone[OTHER[name]] & NEGATORS]
        negative = denying[0] if denying and not marks["a"] and not marks["b"] else None
        asks = {words["a"], words["b"]} == {("yes",), ("no",)}
        if asks:
            negative = "a" if words["a"] == ("no",) else "b"
        bound = not (marks["a"] or marks["b"])
        shared = (first & second) - LITTLE
        return _Options(words, alone if bound else marks, bound, shared, negative, asks)


def _plain(text: str) -> str:
    """The text with plain brackets, quotes and letters, without marks of Markdown, TeX and numbered lists."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"[‘’‛`´]", "'", re.sub(r"[“”„«»「」『』‹›]", '"', text)).replace("。", ". ").replace("、", ", ")
    text = text.replace("【", "(").replace("】", ")")
    text = re.sub(r"<(\w+)>(.*?)</\1>", r" \2 ", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[*_#$\\>]+(?!\w+})|^\s*-\s", " ", text, flags=re.MULTILINE)
    text = re.sub(r"(?m)^\s*\d+\.\s+(?=\S)", "", text)
    for words, plain in PHRASES.items():
        text = re.sub(words, plain, text, flags=re.IGNORECASE)
    return IDIOMS.sub(" ", text)


def _words(text: str) -> list[str]:
    return [word for word in (found.lower() for found in WORD.findall(text)) if word not in ARTICLES]


@lru_cache(maxsize=4096)
def _stem(word: str) -> str:
    """A word without its ending, numbers as digits."""
    word = SAME.get(word, word)
    word = NUMBERS.get(word, word)
    if len(word) > 5 and word not in WHOLE:
        word = re.sub(r"-?(?:hand|wards?|ish|most)$", "", word)
    word = re.sub(r"(?:'s|s')$", "", word)
    if word in NEGATORS or not word.isalpha():
        return word
    word = {"lying": "lie", "lies": "lie", "has": "have", "having": "have", "people": "person"}.get(word, word)
    for ending in ("ing", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


#: Words that tell options apart only if nothing else does, as they are and as stems.
LITTLE = frozenset(stem for word in FUNCTION for stem in (word, _stem(word)) if not stem.isdecimal())


def _without_echo(text: str, pair: _Options) -> str:
    """The text without a list of both options, `(a) Open (b) Closed`, unless they stand in a sentence."""
    names = [r"\W{0,3}" + r"\W+(?:(?:a|an|the)\W+)?".join(r"[\w':-]+" for _ in pair.words[name]) for name in "ab"]
    listed = re.compile(rf"\(?\b[aA]\b[).:]{names[0]}\W+(?:(?:or|and)\W+)?\(?\b[bB]\b[).:]{names[1]}\W*")

    def emptied(found: re.Match[str]) -> str:
        stems = {_stem(word) for word in _words(found[0])}
        return " … " if all(stems >= set(pair.words[name]) for name in "ab") else found[0]

    return listed.sub(emptied, text)


def _decide(text: str, pair: _Options) -> str | None:
    """The choice behind the last correction that makes one, or else that of the whole text."""
    marks = list(CORRECTION.finditer(text)) + ([] if pair.asks else list(RECONSIDERED.finditer(text)))
    for mark in sorted(marks, key=lambda found: -found.start()):
        before = _words(text[: mark.start()])[-2:]
        if not set(before) & NEGATORS:
            choice = _settle(text[mark.end() :], pair)
            if choice is not None:
                return choice
    return _settle(text, pair)


def _settle(text: str, pair: _Options) -> str | None:
    mentions = _mentions(text, pair)
    words = set() if any(one.is_letter for one in mentions) else {_stem(word) for word in _words(text)}
    fitting = [name for name in "ab" if words and words <= set(pair.words[name])]
    equal = [name for name in fitting if words == set(pair.words[name])]
    if len(equal or fitting) == 1:
        return (equal or fitting)[0]
    text = _blank(text, UNSURE)
    mentions = _mentions(text, pair)
    found = _open_dropped(text, _agreeing(text, mentions))
    if pair.asks and not mentions and not NONE_OF_THEM.search(text):
        denied = any(word in NEGATORS or word.endswith("n't") for word in _words(text))
        return pair.negative if denied and not LETTER_PAIR.search(text) else None
    for look in (_stated, _opening, _concluded, _asserted):
        choice = look(text, found)
        if choice is not None:
            return None if _disagree(found) else choice
    return None


def _blank(text: str, pattern: re.Pattern[str]) -> str:
    """The text with spaces in place of each sentence in which a pattern is found."""
    for start, end in _parts(text, SENTENCE):
        if pattern.search(text, start, end):
            text = text[:start] + " " * (end - start) + text[end:]
    return text


def _parts(text: str, breaks: re.Pattern[str]) -> list[tuple[int, int]]:
    ends = [found.end() for found in breaks.finditer(text)]
    return list(zip([0, *ends], [*ends, len(text)], strict=True))


def _mentions(text: str, pair: _Options) -> list[_Mention]:
    """All mentions of an option, in order."""
    found = []
    for start, end in _parts(text, CLAUSE):
        places = [(m.start(1), m.end(1), m[1].lower(), True) for m in LETTER.finditer(text, start, end) if _is_letter(text, m)]
        letters = {place for place, *_ in places}
        tokens = [(m.start(), m.end(), m[0].lower()) for m in WORD.finditer(text, start, end) if m.start() not in letters]
        tokens = [token for token in tokens if token[2] not in ARTICLES]
        places += [(*place, False) for place in _word_places(text[start:end], tokens, start, pair)]
        for left, right, choice, is_letter in sorted(places):
            before, whole = _words(text[start:left]), text[start:end]
            denied = (is_letter or pair.negative is None or pair.asks) and _is_denied(text, start, left, right, is_letter)
            unreal = UNREAL.search(whole) is not None or before[-2:] == ["as", "in"]
            predicate = bool(PREDICATE & set(before[-4:]))
            found.append(_Mention(left, right, choice, is_letter, denied, unreal, predicate))
    return found


def _is_letter(text: str, found: re.Match[str]) -> bool:
    """Tell the letter of an option from an article: every b is one, and an a by what stands around it."""
    if found[1] in "bB":
        return True
    before, after = text[: found.start()].rstrip(), text[found.end() :]
    if re.search(r"[(\[{<\"'`:=]$", before) and re.match(r"\s*[)\]}>\"'`]", after):
        return True
    if re.match(r"\s*(?:[).:,;=!?\]}\n-]|$)", after):
        return True
    if re.match(r"\s+(?:is|fits|and|or|because|since|rather|instead|not|but|was|over|as)\b", after):
        return True
    opens = not before or before[-1] in ".!?\n:"
    if found[1] == "A":
        return not opens or bool(re.match(r"\s+[A-Z(]", after))
    return bool(re.search(r"\b(?:option|choice|letter|answer)$", before, re.IGNORECASE))


def _word_places(
    clause: str, tokens: list[tuple[int, int, str]], offset: int, pair: _Options
) -> list[tuple[int, int, str]]:
    """Start, end and choice of each place of a clause where words stand for an option."""
    stems = [_stem(word) for _, _, word in tokens]
    if pair.asks:
        return _answer_places(clause, tokens, offset, pair)
    if pair.negative is not None:
        cores = [place for place, stem in enumerate(stems) if stem in pair.shared]
        denies = {place: bool(NEGATORS & {word for _, _, word in tokens[max(0, place - 5) : place]}) for place in cores}
        return [(*tokens[place][:2], pair.negative if denies[place] else OTHER[pair.negative]) for place in cores]
    places = []
    for place, (start, end, _) in enumerate(tokens):
        for name in "ab":
            bound = not pair.bound or bool(pair.shared & set(stems[place + 1 : place + 3]))
            if stems[place] in pair.marks[name] and bound:
                places.append((start, end, name))
    for name in "ab":
        core = set(pair.words[name]) - LITTLE
        if not pair.marks[name] and core and core <= set(stems) and not places:
            start, end, _ = tokens[next(place for place, stem in enumerate(stems) if stem in core)]
            return [(start, end, name)]
    return places


def _answer_places(clause: str, tokens: list[tuple[int, int, str]], offset: int, pair: _Options) -> list[tuple[int, int, str]]:
    """Places of a yes or a no; `no wheels` is none, nor is `a true story`."""
    yes = "a" if pair.negative == "b" else "b"
    places = []
    for place, (start, end, word) in enumerate(tokens):
        closed = re.match(r"\s*(?:[^\w\s]|$)", clause[end - offset :]) is not None
        plain = word in ("yes", "yeah", "yep", "yup")
        if word in NO and closed:
            places.append((start, end, OTHER[yes]))
        elif plain or (word in YES and closed and (place == 0 or tokens[place - 1][2] in ("is", "that's"))):
            places.append((start, end, yes))
    return places


def _is_denied(text: str, start: int, left: int, right: int, is_letter: bool) -> bool:
    before = text[start:left]
    words = _words(before)
    if NEGATORS & set(words[-5:]) or re.search(rf"\b{INSTEAD}\W+(?:\w+\W+){{0,2}}$", before, re.IGNORECASE):
        return True
    if re.match(r"\W*(?:can be |is )?(?:ruled out|excluded|wrong|incorrect|false)\b", text[right:], re.IGNORECASE):
        return True
    return is_letter and DENIED.match(text, right) is not None


def _open_dropped(text: str, found: list[_Mention]) -> list[_Mention]:
    """The mentions without those that leave the choice open: `a or b`, `both`, and questions."""
    open_places: set[int] = set()
    for place, (one, next_) in enumerate(zip(found, found[1:], strict=False)):
        between = text[one.end : next_.start]
        if one.choice != next_.choice and not next_.denied and JOINED.fullmatch(between):
            open_places |= {place, place + 1}
            open_places |= {near for near in (place - 1, place + 2) if 0 <= near < len(found) and _touch(text, found, near, place)}
    for start, end in _parts(text, SENTENCE):
        own = {place for place, one in enumerate(found) if start <= one.start < end}
        asks = text[start:end].rstrip().endswith("?") and (len({found[place].choice for place in own}) > 1 or len(own) < len(found))
        if asks or NONE_OF_THEM.search(text, start, end):
            open_places |= own
    return [one for place, one in enumerate(found) if place not in open_places]


def _agreeing(text: str, found: list[_Mention]) -> list[_Mention]:
    """The mentions without letters that stand right in front of the words of the other option, and without these."""
    wrong: set[int] = set()
    for place, (one, next_) in enumerate(zip(found, found[1:], strict=False)):
        beside = not WORD.search(text, one.end, next_.start)
        if beside and one.is_letter and not next_.is_letter and _chosen([one, next_]) is None:
            wrong |= {place, place + 1}
    return [one for place, one in enumerate(found) if place not in wrong]


def _touch(text: str, found: list[_Mention], near: int, place: int) -> bool:
    """Tell if a mention stands right beside one of the same choice, as a letter beside its words."""
    first, second = (found[near], found[place]) if near < place else (found[place + 1], found[near])
    return first.choice == second.choice and len(text[first.end : second.start].strip(" ().,:\"'")) < 4


def _chosen(found: Sequence[_Mention]) -> str | None:
    """The one choice for which all mentions speak."""
    choices = {OTHER[one.choice] if one.denied else one.choice for one in found}
    return choices.pop() if len(choices) == 1 else None


def _stated(text: str, found: list[_Mention]) -> str | None:
    """What is called the answer, the last time that one is."""
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


def _opening(text: str, found: list[_Mention]) -> str | None:
    """What the reply opens with, if that stands by itself."""
    if not found or found[0].denied or not OPENER.fullmatch(text[: found[0].start]):
        return None
    own = [one for one in found if one.choice == found[0].choice]
    last = found[0]
    for one in own[1:]:
        if not WORD.search(text, last.end, one.start):
            last = one
    return found[0].choice if re.match(r"\s*(?:[^\w\s]|\n|$)", text[last.end :]) else None


def _concluded(text: str, found: list[_Mention]) -> str | None:
    """What follows a `so` or `therefore`."""
    for mark in reversed(list(CONCLUDING.finditer(text))):
        sentence = SENTENCE.search(text, mark.end())
        own = [one for one in found if mark.end() <= one.start < (sentence.start() + 1 if sentence else len(text))]
        if own:
            return _chosen(own)
    return None


def _asserted(text: str, found: list[_Mention]) -> str | None:
    """What all says, or the letters, or what is said of something rather than beside it."""
    real = [one for one in found if not one.unreal] or found
    beside = [one for one in real if not _is_beside(text, one)]
    for part in (real, [one for one in real if one.is_letter], beside, [one for one in beside if one.predicate]):
        choice = _chosen(part)
        if choice is not None:
            return choice
    return None


def _is_beside(text: str, one: _Mention) -> bool:
    """Tell if a mention stands behind a preposition, as that of the car in `larger than the car`."""
    return bool(RELATION & set(_words(text[max(0, one.start - 20) : one.start])[-2:]))


def _disagree(found: Sequence[_Mention]) -> bool:
    """Tell if all letters speak for one option and all words for the other."""
    kinds = [_chosen([one for one in found if one.is_letter == kind and not one.unreal]) for kind in (True, False)]
    return None not in kinds and kinds[0] != kinds[1]
