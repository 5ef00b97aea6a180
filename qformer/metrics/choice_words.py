"""Words of a free answer that speak for one of two options: its letter, or what sets its text apart from the other's.

The rules are for English. `qformer.metrics.choice_reply` weighs what is found here.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from qformer.metrics.negation import ARTICLES, NEGATORS, WORD, is_negated, listed

OTHER = {"a": "b", "b": "a"}
NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = {word: str(number) for number, word in enumerate(NAMES.split())}
#: Words that mean the same as another one in such questions.
SAME = {
    "shut": "closed",
    "seated": "sitting",
    "rear": "back",
    "fewer": "less",
    "grey": "gray",
    "single": "1",
    "towards": "toward",
    "daytime": "day",
    "nighttime": "night",
    "anticlockwise": "counterclockwise",
}
#: The same for whole phrases.
PHRASES = {
    r"\b(?:counter|anti)[ -]clockwise\b": "counterclockwise",
    r"\binvisible\b": "not visible",
    r"\bcan(?:not|'t| not) (?:be seen|see (?:it|them)\b)": "is not visible",
    r"\bcan (?:be seen|see (?:it|them)\b)": "is visible",
    r"\bof course\b(?! not)": "yes",
    r"\bI (?:don't|do not) (?:think|believe) so\b|\bthere (?:is|are) none\b": "no",
    r"\bI (?:think|believe|guess) so\b|\A\W*(?:it|they|there|he|she) (?:is|are|does|do|has|have)\W*\Z": "yes",
}
WIDE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # Chinese, Japanese and Korean, written without spaces
WHOLE = frozenset({"toward", "towards", "forward", "forwards", "finish", "almost"})
FUNCTION = ARTICLES | listed(
    "is are was be it its this that there has have having does do did of to in on at by from with for and or i "
    "he she they his her their you we one ones side"
)
YES = listed("yes yeah yep yup correct true certainly sure indeed absolutely definitely")
AFFIRMING = listed("that this it is that's it's quite absolutely almost not")
NO = listed("no nope nah false incorrect")
IDIOMS = re.compile(
    r"\b(?:no|without(?: a)?) doubt\b|\bwhy not\b|\bnot only\b|\bcan ?not be more\b|\bno problem\b|"
    r"\bon the one hand\b|\bas far as\b[^,.]*,|\bfor sure\b|\b(?:no|not) (?:more|fewer|less) than\b|"
    r"\bno question\b|\bnone other than\b|\bnot to mention\b|\bif (?:I'm|I am) not (?:mistaken|wrong)\b",
    re.IGNORECASE,
)
INSTEAD = (
    r"(?:rather than|instead of|as opposed to|(?:any|every)thing but|all but|far from|other than|unlike|ruled? out|"
    r"exclude)"
)
DENIED = re.compile(
    r"\s*[)\]\"']*\s*(?:is|are|was|would be|can|could|does|do)(?:n't| not)\b|"
    r"\s*[)\]\"']*\s*(?:is|can be|would be|must be|seems)\s+"
    r"(?:\w+ )?(?:wrong|incorrect|false|impossible|ruled out|excluded)\b",
    re.IGNORECASE,
)
#: Clauses that tell what is not so, or was only thought.
UNREAL = re.compile(
    r"\b(?:if|unlike|in contrast to|although|though|would|might|may|could|thought|at first|first sight|seemed|said|"
    r"first answer|because|since|unless|in a mirror|used to|explanation|reason)\b",
    re.IGNORECASE,
)
#: Openings of sentences of which only the last clause tells what is so.
ASIDE = re.compile(r"\W*(?:unlike|in contrast to|compared)\b", re.IGNORECASE)
REASONS = re.compile(r"\W*(?:explanation|reason(?:ing)?)\b", re.IGNORECASE)
PREDICATE = listed(
    "is are was be it's he's she's they're looks look faces face facing points pointing heads heading turned "
    "turns seems appears says shows moves stands sits lies located placed"
)
LETTER = re.compile(r"(?<![\w-])(?<!\w')([abAB])(?!-?\w|'\w)")
CLAUSE = re.compile(r"\n+|[.!?;]+(?=\s|$)|,\s|…|\.{2,}|:\s|\s[-\u2013\u2014]\s|(?<!thing )(?<!all )\b(?:but|yet)\b")
CHOOSING = re.compile(
    r"\b(?:answer|option|choice|letter|choose|pick|select|say|with|think|guess|believe)"
    r"(?: (?:is|would be|must be|it's))?\Z",
    re.IGNORECASE,
)
NEAR = 100  # characters around a mention that are looked at, so that a loop of a model costs no square of its length
SENTENCE = re.compile(r"\n+|[.!?]+(?=\s|$)")


@dataclass(frozen=True)
class Mention:
    """A place of the text that speaks for a choice, by a letter or by words; `unreal` in a clause of that kind."""

    start: int
    end: int
    choice: str
    is_letter: bool
    denied: bool
    unreal: bool
    predicate: bool


@dataclass(frozen=True)
class OptionPair:
    """Words that tell two options apart.

    Attributes:
        words: of each, in order, as `stem_of` has them, without articles.
        marks: words of each alone. bound: True if these are prepositions, which count only in front of a shared word.
        shared: words of both that mean something.
        negative: the one that denies the other, as `Not visible`; None where neither does.
        asks: True for yes and no. ordinal: True if the options themselves count something as first or second.
    """

    words: dict[str, tuple[str, ...]]
    marks: dict[str, frozenset[str]]
    bound: bool
    shared: frozenset[str]
    negative: str | None
    asks: bool
    ordinal: bool

    @staticmethod
    @lru_cache(maxsize=512)
    def of(texts: tuple[str, str]) -> OptionPair:
        words = {
            name: tuple(stem_of(word) for word in words_of(plain(text))) for name, text in zip("ab", texts, strict=True)
        }
        first, second = (frozenset(words[name]) for name in "ab")
        alone = {"a": first - second - ARTICLES, "b": second - first - ARTICLES}
        marks = {name: own - LITTLE - NEGATORS for name, own in alone.items()}
        if not (first & second) - LITTLE:  # as of on and off
            marks = {name: own or alone[name] - NEGATORS for name, own in marks.items()}
        denying = [name for name in "ab" if alone[name] & NEGATORS and not alone[OTHER[name]] & NEGATORS]
        negative = denying[0] if denying and not marks["a"] and not marks["b"] else None
        asks = {words[name][:1] for name in "ab"} == {("yes",), ("no",)}  # and nothing more, such as `No, it doesn't`
        asks = asks and {word for name in "ab" for word in words[name][1:]} <= LITTLE | NEGATORS
        if asks:
            negative = "a" if words["a"][0] == "no" else "b"
        bound = not (marks["a"] or marks["b"])
        shared = (first & second) - LITTLE
        ordinal = bool((first | second) & ORDINALS)
        return OptionPair(words, alone if bound else marks, bound, shared, negative, asks, ordinal)


def plain(text: str) -> str:
    """The text with plain brackets, quotes and letters, without marks of Markdown, TeX and numbered lists."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"[\u2018\u2019\u201b\u00b4]", "'", text)
    text = re.sub(r"[\u201c-\u201e\u00ab\u00bb\u300c-\u300f\u2039\u203a]", '"', text)
    for mark, same in {"。": ". ", "、": ", ", "【": "(", "】": ")"}.items():
        text = text.replace(mark, same)
    text = re.sub(rf"(?<=[{WIDE}])(?=[A-Za-z])|(?<=[A-Za-z])(?=[{WIDE}])", " ", text)
    text = re.sub(r"<(\w+)>(.*?)</\1>", r" \2 ", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?:[_#$`\\>]|(?<!\s)\*|\*(?!\s))+(?!\w+})|^\s*-\s", " ", text, flags=re.MULTILINE)
    text = re.sub(r"(?m)^\s*\d+\.\s+(?=\S)", "", text)
    for words, plain in PHRASES.items():
        text = re.sub(words, plain, text, flags=re.IGNORECASE)
    return IDIOMS.sub(" ", text)


def words_of(text: str) -> list[str]:
    return [word for word in (found.lower() for found in WORD.findall(text)) if word not in ARTICLES]


@lru_cache(maxsize=4096)
def stem_of(word: str) -> str:
    """A word without its ending, numbers as digits."""
    word = SAME.get(word, word)
    word = NUMBERS.get(word, word)
    if len(word) > 5 and word not in WHOLE:
        word = re.sub(r"-?(?:hand|wards?|ish|most)$", "", word)
    word = re.sub(r"(?:'s|s')$", "", word)
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+", word):
        return word.replace(",", "")
    if word in NEGATORS or not word.isalpha():
        return word
    word = {"lying": "lie", "lies": "lie", "has": "have", "having": "have", "people": "person"}.get(word, word)
    word = {"men": "man", "women": "woman"}.get(word, word)
    plural = next((ending for ending in ("es", "s") if word.endswith(ending) and not word.endswith("ss")), "")
    for ending in (plural, "ing", "ed", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


#: Words that tell options apart only if nothing else does, as they are and as stems.
LITTLE = frozenset(stem for word in FUNCTION for stem in (word, stem_of(word)) if not stem.isdecimal())


ORDINALS = frozenset(stem_of(word) for word in ("first", "second", "former", "latter"))
PLACED = {
    name: re.compile(
        rf"\b(?:the )?(?:{first}|{second}) (?:option|choice|answer)\b|\A\W*(?:the )?{second}\W*\Z", re.IGNORECASE
    )
    for name, first, second in (("a", "first", "former"), ("b", "second", "latter"))
}


def with_letters(text: str, pair: OptionPair) -> str:
    """The text with letters in place of `the first option` and the like, unless the options count things themselves."""
    for name, words in PLACED.items() if not pair.ordinal else ():
        text = words.sub(f"({name})", text)
    return text


def without_echo(text: str, pair: OptionPair) -> str:
    """The text without a list of both options, `(a) Open (b) Closed`, unless they stand in a sentence."""
    names = [
        r"\W{0,3}(?:(?:a|an|the)\W+)?" + r"\W+(?:(?:a|an|the)\W+)?".join(r"[\w':-]+" for _ in pair.words[name])
        for name in "ab"
    ]
    listed = re.compile(rf"\(?\b[aA]\b[).:]{names[0]}\W+(?:(?:or|and)\W+)?\(?\b[bB]\b[).:]{names[1]}\W*", re.IGNORECASE)

    def emptied(found: re.Match[str]) -> str:
        stems = {stem_of(word) for word in words_of(found[0])}
        return " … " if all(stems >= set(pair.words[name]) for name in "ab") else found[0]

    return listed.sub(emptied, text)


@lru_cache(maxsize=64)
def parts(text: str, breaks: re.Pattern[str]) -> tuple[tuple[int, int], ...]:
    """Start and end of each part of a text between breaks, which belong to the part in front of them."""
    ends = [found.end() for found in breaks.finditer(text)]
    return tuple(zip([0, *ends], [*ends, len(text)], strict=True))


def mentions_of(text: str, pair: OptionPair) -> list[Mention]:
    """All mentions of an option, in order."""
    found = []
    sentences = parts(text, SENTENCE)
    for start, end in parts(text, CLAUSE):
        sentence = next((part for part in reversed(sentences) if part[0] <= start), (0, 0))
        places = [
            (m.start(1), m.end(1), m[1].lower(), True) for m in LETTER.finditer(text, start, end) if _is_letter(text, m)
        ]
        letters = {place for place, *_ in places}
        tokens = [
            (m.start(), m.end(), m[0].lower()) for m in WORD.finditer(text, start, end) if m.start() not in letters
        ]
        tokens = [token for token in tokens if token[2] not in ARTICLES and not _is_sum(text, token)]
        places += [(*place, False) for place in _word_places(text[start:end], tokens, start, pair)]
        supposed = bool(places) and UNREAL.search(text, start, end) is not None
        for left, right, choice, is_letter in sorted(places):
            before = words_of(text[max(start, left - NEAR) : left])
            denied = (is_letter or pair.negative is None or pair.asks) and _is_denied(
                text, start, left, right, is_letter
            )
            contrast = ASIDE.match(text, *sentence) is not None and end < sentence[1]
            unreal = supposed or before[-2:] == ["as", "in"] or contrast or REASONS.match(text, *sentence) is not None
            predicate = bool(PREDICATE & set(before[-4:]))
            found.append(Mention(left, right, choice, is_letter, denied, unreal, predicate))
    return found


def _is_sum(text: str, token: tuple[int, int, str]) -> bool:
    """Tell if a number is calculated with, or an end of a range."""
    near = text[max(0, token[0] - 2) : token[0]] + "|" + text[token[1] : token[1] + 2]
    added = re.search(r"\b(?:adding|plus|minus|times)\s+$", text[max(0, token[0] - 12) : token[0]], re.IGNORECASE)
    sign = re.search(r"[*+=\u00d7\u00f7]|\d[-\u2013]\||\|[-\u2013]\d", near)
    return token[2][0].isdecimal() and (added is not None or sign is not None)


def _is_letter(text: str, found: re.Match[str]) -> bool:
    """Tell the letter of an option from an article: every b is one, and an a by what stands around it."""
    if found[1] in "bB":
        return True
    before, after = text[max(0, found.start() - NEAR) : found.start()].rstrip(), text[found.end() :][:NEAR]
    if re.search(r"[(\[{<\"'`:=]$", before) and re.match(r"\s*[)\]}>\"'`]", after):
        return True
    if re.match(r"\s*(?:[).:,;=!?\]}\n-]|/\s*\(?[bB]\b)", after):
        return True
    if not after.strip():  # or an article, if the reply was cut off there
        return found[1] == "A" or not before or not before[-1].isalnum() or CHOOSING.search(before) is not None
    if re.match(r"\s+(?:is|fits|and|or|because|since|rather|instead|not|but|was|over|as)\b", after):
        return True
    opens = not before or before[-1] in ".!?\n:"
    if found[1] == "A":
        return not opens or bool(re.match(r"\s+[A-Z(]", after))
    return bool(re.search(r"\b(?:option|choice|letter|answer)$", before, re.IGNORECASE))


def _word_places(
    clause: str, tokens: list[tuple[int, int, str]], offset: int, pair: OptionPair
) -> list[tuple[int, int, str]]:
    """Start, end and choice of each place of a clause where words stand for an option."""
    stems = [stem_of(word) for _, _, word in tokens]
    if pair.asks:
        return _answer_places(clause, tokens, offset, pair)
    if pair.negative is not None:
        cores = [place for place, stem in enumerate(stems) if stem in pair.shared]
        denies = {place: is_negated(clause[: tokens[place][0] - offset][-NEAR:]) for place in cores}
        return [(*tokens[place][:2], pair.negative if denies[place] else OTHER[pair.negative]) for place in cores]
    places = []
    for place, (start, end, _) in enumerate(tokens):
        for name in "ab":
            bound = not pair.bound or bool(pair.shared & set(stems[place + 1 : place + 3]))
            if stems[place] in pair.marks[name] and bound:
                places.append((start, end, name))
    for name in "ab":
        core, own = set(pair.words[name]) - LITTLE, set(pair.words[name]) - set(pair.words[OTHER[name]])
        if not pair.marks[name] and core and core | own <= set(stems) and not places:
            start, end, _ = tokens[next(place for place, stem in enumerate(stems) if stem in core)]
            return [(start, end, name)]
    return places


def _answer_places(
    clause: str, tokens: list[tuple[int, int, str]], offset: int, pair: OptionPair
) -> list[tuple[int, int, str]]:
    """Places of a yes or a no; `no wheels` is none, nor is `a true story`."""
    yes = "a" if pair.negative == "b" else "b"
    places = []
    for place, (start, end, word) in enumerate(tokens):
        closed = re.match(r"\s*(?:[^\w\s]|$)", clause[end - offset :]) is not None
        plain = word in ("yes", "yeah", "yep", "yup")
        if word in NO and closed:
            places.append((start, end, OTHER[yes]))
        elif plain or (word in YES and closed and {word for _, _, word in tokens[:place]} <= AFFIRMING):
            places.append((start, end, yes))
    return places


def _is_denied(text: str, start: int, left: int, right: int, is_letter: bool) -> bool:
    before = text[max(start, left - NEAR) : left]
    if is_negated(before, is_letter) or re.search(rf"\b{INSTEAD}\W+(?:\w+\W+){{0,2}}$", before, re.IGNORECASE):
        return True
    if re.match(
        r"\W*(?:can be |is )?(?:ruled out|excluded|wrong|incorrect|false|impossible|not possible)\b",
        text[right : right + NEAR],
        re.IGNORECASE,
    ):
        return True
    return is_letter and DENIED.match(text, right) is not None
