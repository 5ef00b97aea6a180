"""Tokenizer of captions for scoring: the output of Stanford's PTBTokenizer on English text, without Java.

COCO's evaluation (arXiv:1504.00325) tokenizes with `-preserveLines -lowerCase` of CoreNLP 3.4.1 and drops punctuation.
The rules here were derived from the output of that program for every character, every word of up to five letters and
deliberately awkward sentences. They include its quirks: brackets become `-lrb-`, which is not dropped, and `!!` is kept
while `!` is dropped.

At each place all rules are tried, and the longest match wins, the first one of several. Lookahead counts as a match.
"""

# ruff: noqa: RUF001 - this module is about these characters
from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Letters of any script. Numerals that are not digits do not count, marks on letters do.
NUMERALS = "²³¹¼-¾⁰-₉⅐-↉①-⒛⓪-⓿❶-➓〇〡-〩〸-〺"
MARKS = (
    "\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ef-\u036f\u0483-\u0487\u0591-\u05bd"
    "\u064b-\u065e\u0900-\u0903\u093c-\u094e"
)
L = rf"(?:[^\W\d_{NUMERALS}]|[{MARKS}])"
LD = rf"(?:[^\W_{NUMERALS}]|[{MARKS}])"
A, AD = "[A-Za-z]", "[A-Za-z0-9]"
Q = "['\u0092\u2019]"  # apostrophes
SPACE, GAP = r"[ \t\xa0]", r"[ \t\xa0\u2000-\u200a\u3000\n]"

# Abbreviations. Those before a name and titles never end a sentence ...
TITLES = (
    "z cf dr ft lt mr ms mt ph st vs wm adj adm adv ave cie col cpl det drs ens gen gov hon jos maj mme mrs pfc pvt "
    "rep rev sen sfc sgt spc ste alex asst atty brig capt cmdr dept elec govs insp invt mlle msgr natl pres prof reps "
    "sens supt attys comdr lieut profs supts treas messrs"
)
# ... these do before a capital letter, and then the period is a separate token as well,
ENDINGS = (
    "al co ct ga jr ky md mo rd rt sq sr va vt ala apr aug bhd cos dak dec esq est etc ext feb fla fri inc ind jan jul "
    "jun kan ltd mar mon neb nev nov oct plc sep seq sys tel thu tue wed wis wyo ariz assn bldg blvd bros colo conn "
    "corp intl kans mich minn mont okla penn sept tenn tues univ assoc calif thurs"
)
CAPITAL_ENDINGS = "az la pa ark del ill ore tex mass miss wash"  # ordinary words in lower case
SMALL_TITLES, SMALL_ENDINGS = "mfg mtg", "pte pty ppte ppty ptes ptys pptes pptys"  # never in capitals
BEFORE_NUMBERS = "ca no op pp art fig nos figs prop"
# Words that start a sentence after `U.S.`
STARTS = (
    "a about according additionally after an as at but earlier he her here however if in it last many more now "
    "once one other our she since so some such that the their then there these they this we what when while yet you"
)


def _any(words: str, case: bool = False) -> str:
    """Make a pattern for one of these words in any case; with `case`, not all in lower case."""
    listed = sorted(words.split(), key=len, reverse=True)
    if case:
        return "(?:" + "|".join(f"{word.title()}|{word.upper()}" for word in listed) + ")"
    return f"(?i:{'|'.join(listed)})"


def _small(words: str) -> str:
    return "(?:" + "|".join(f"{word}|{word.title()}" for word in sorted(words.split(), key=len, reverse=True)) + ")"


WORD = rf"{L}{LD}*(?:[.!?]{L}{LD}*)*"
APOSTROPHIC = (
    rf"(?:(?:[A-HJ-XZdlno]{Q}{L}{{2}}|{A}+[aeiouyAEIOUY]{Q}[aeiouA-Z]){LD}*|[lLdDjJ]{Q}|[oO][lL]{Q}|[cC]{Q}[eE]st)"
)
PART = rf"{LD}+"
THING = rf"(?:[dDoOlL]{Q}{A})?{PART}(?:[_-]{PART})*"
ACRONYM = rf"{A}(?:\.{A})+"
JOINED = rf"{AD}[A-Za-z0-9.,\xad]*(?:-(?:{ACRONYM}\.|{AD}+))+"
SLASHED = rf"{AD}+(?:-{A}+){{0,2}}(?:\\?/{AD}+(?:-{A}+){{0,2}}){{1,2}}"
NUMBER = r"[-+]?(?:\d+(?:[.:,]\d+)*|(?:[.:,]\d+)+)"
ABBREVIATED = rf"(?:{_any(ENDINGS)}|{_any(CAPITAL_ENDINGS, case=True)}|{_small(SMALL_ENDINGS)}|(?i:Ph\.D))"
TITLE = rf"(?:{_any(TITLES)}|{_small(SMALL_TITLES)})"
NAME = r"[A-Za-z][A-Za-z0-9:._-]*"
ATTRIBUTE = rf"{SPACE}+{NAME}(?:{SPACE}*={SPACE}*(?:\"[^\"\n]*\"|'[^'\n]*'))?"
TAG = rf"<(?:/{NAME}{SPACE}*|{NAME}(?:{ATTRIBUTE})*{SPACE}*/?|[!?][A-Za-z-][^>\n]*)>"
SENTENCE = rf"{GAP}(?:{GAP}|[A-ZÀ-ÖØ-ÞΑ-ΩА-Я]|{TAG})"
FULL_URL = r"(?i:https?://)[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-]"
LIKELY_URL = (
    r"(?i:[^\w\s\"`'<>|.!?(){},$\[\]:;/=…-]*(?:[^\W\d][\w-]*\.)+(?:com|net|org|edu)|www\.(?:[\w-]+\.)+[a-z]{2,4})"
    r"(?:/[^ \t\n\f\"<>|()]+[^ \t\n\f\"<>|.!?(){},-])?"
)
IN_EMAIL = r"[^ \t\n\"<>|().\xa0]+"
EMAIL = rf"(?:&lt;|<)?[A-Za-z0-9][^ \t\n\"'<>|()\xa0]*@(?:{IN_EMAIL}\.)*{IN_EMAIL}(?:&gt;|>)?"
FILE = (
    rf"(?:{LD}+\.)+(?i:bat|bmp|cgi|class|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|"
    "ps|py|sql|tar|txt|wav|xml|x|zip)"
)
PHONE = (
    r"(?:(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?[0-9]{3,5}|"
    r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})"
)
REDUCED = rf"{Q}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
SMILEY = r"[<>]?[:;=][-o*']?[()DPdpO\\@|{\[\]]"
QUOTED = "[`\x91-\x94\u2018-\u201f\u2039\u203a\xab\xbb]"
KEPT = (  # single characters that are tokens; all others without a rule, such as emojis, are dropped
    "-,:;/%&=\\\\^|~<>+()\\[\\]{}`'\"!¡¥-©¬®-±´¶-¸¿×÷\u037e\u0387\u0589\u0e3f\u2016\u2017\u2020-\u2023\u2030-\u2038"
    "\u203b\u203e-\u2042\u207a-\u207e\u208a-\u208e\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118"
    "\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
QUOTES = dict.fromkeys("\x91‘‛‹", "`") | dict.fromkeys("\x92’›", "'")
QUOTES |= dict.fromkeys("\x93“«", "``") | dict.fromkeys("\x94”»", "''")
SPLIT = "can|not gon|na got|ta lem|me gim|me wan|na"


def _keep(text: str) -> str:
    return text


def _solid(text: str) -> str:
    return re.sub(SPACE, "\xa0", text)


def _straight(text: str) -> str:
    return re.sub(Q, "'", text)


def _bracketed(text: str) -> str:
    return re.sub(r"[][(){}]", lambda sign: BRACKETS[sign[0]], text)


def _point(text: str) -> str:
    """Add the period of the sentence to that of an abbreviation."""
    return f"{text} ."


def _as(token: str) -> Callable[[str], str]:
    return lambda text: token


# Pattern of a token, pattern of the text after it, and how the token is written.
RULES: list[tuple[str, str, Callable[[str], str]]] = [
    *((f"(?i:{first})", f"(?i:{rest})", _keep) for first, _, rest in (word.partition("|") for word in SPLIT.split())),
    (TAG, "", _solid),
    (r"&(?:MD|mdash|ndash);|[\x96\x97\u2013-\u2015]", "", _as("--")),
    ("&amp;", "", _as("&")),
    (r"&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);", "", _keep),
    (rf"{A}+", rf"[nN]{Q}[tT]", _keep),
    (f"[nN]{Q}[tT]", "", _straight),
    (WORD, REDUCED, _keep),
    (WORD, "", _keep),
    (APOSTROPHIC, "", _keep),
    (rf"{Q}[nN]{Q}?|{Q}(?i:em|till?|cause)|[yY]{Q}|{Q}[2-9]0[sS]", "", _keep),
    (f"{Q}[0-9]{{2}}", GAP, _keep),
    ("'[tT]", "(?i:is|was)", _keep),
    (FULL_URL, "", _keep),
    (LIKELY_URL, "", _keep),
    (EMAIL, "", _keep),
    (rf"@[A-Za-z_][A-Za-z0-9_]*|#{L}+", "", _keep),
    (REDUCED, "[^A-Za-z]", _straight),
    (REDUCED.replace("'", "", 1), "", _straight),
    (r"[0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4}", "", _keep),
    (NUMBER, "", _keep),
    ("[⁰-₉²³¹]+", "", _keep),
    (rf"[0-9]{{1,4}}(?:-|{SPACE})[0-9]{{1,4}}/[0-9]{{1,4}}|[0-9]{{1,4}}\\?/[0-9]{{1,4}}", "", _solid),
    ("[½¼¾⅓⅔]", "", FRACTIONS.__getitem__),
    (r"[A-Z]*\$", "", _keep),
    ("[€¤₠\x80]", "", _as("$")),
    ("£", "", _as("#")),
    ("¢", "", _as("cents")),
    (THING, "", _keep),
    (JOINED, "", _keep),
    (SLASHED, "", _keep),
    (r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", "", lambda text: text.replace("&amp;", "&")),
    (r"[cC]\+\+|[cCfF]#", "", _keep),
    (rf"(?:{WORD}|{THING}|{JOINED}|[0-9]+)\.", "[,;:、]", _keep),
    (rf"{ABBREVIATED}\.", SENTENCE, _point),
    (rf"{ABBREVIATED}\.", r"(?s:..)", _keep),
    (rf"{ABBREVIATED}\.", "", _point),
    (rf"{TITLE}\.", "", _keep),
    (rf"{_any(BEFORE_NUMBERS)}\.", r"[ \t\xa0\n]?[0-9]", _keep),
    (rf"{ACRONYM}\.", rf"{GAP}+(?:(?:{_any(STARTS, case=True)}|(?i:m[rs]\.)){GAP}|{TAG})", _point),
    (A, rf"\.{GAP}+(?:(?:{_any(STARTS, case=True)}|(?i:m[rs]\.)){GAP}|{TAG})", _keep),
    (rf"(?:{ACRONYM}|{A})\.", "", _keep),
    (FILE, r"[ \t\xa0\n,.;:?!()\"']", _keep),
    (PHONE, "", lambda text: _bracketed(_solid(text))),
    (SMILEY, "[^A-Za-z0-9]", lambda text: re.sub("[()]", lambda sign: BRACKETS[sign[0]], text)),
    (r"[][(){}]", "", _bracketed),
    (r"\"|&quot;", "[A-Za-z0-9$]", _as("``")),
    (r"\"|&quot;", "", _as("''")),
    ("'", r"[A-Za-z][^ \t\n\xa0]", _as("`")),
    ("&apos;", "", _as("'")),
    (rf"{QUOTED}{{1,2}}", "", lambda text: "".join(QUOTES.get(sign, sign) for sign in text)),
    (r"'{1,2}|<<|>>|\\\*|\*+|#+|@+|_+|[?!]+", "", _keep),
    (r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|…", "", _as("...")),
    ("-+|\xad", "", lambda text: "--" if 2 <= len(text) <= 4 else text.replace("\xad", "-")),
    ("&lt;", "", _as("<")),
    ("&gt;", "", _as(">")),
    (rf"[.$]|[{KEPT}]", "", _keep),
]
COMPILED = [(re.compile(f"({token})(?:{after})"), write) for token, after, write in RULES]
SKIPPED = re.compile(r"[ \t\xa0\u2000-\u200a\u3000]+|&nbsp;")
PLAIN = re.compile(r"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)\b)[A-Za-z]+(?=[ \n]|\Z)")


def tokenize(captions: Iterable[str]) -> list[str]:
    """Tokenize captions for the scorers: tokens in lower case without punctuation, joined by spaces.

    All captions are read as the lines of one text, as in the original: the first word of a line can affect the last
    period of the line before. Line breaks inside a caption become spaces (the original miscounts lines at some).
    """
    lines = tokenize_lines(captions)
    return [" ".join(token for token in line if token not in DROPPED) for line in lines]


def tokenize_lines(captions: Iterable[str]) -> list[list[str]]:
    """Split each caption into its tokens in lower case, including punctuation."""
    text = "\n".join(re.sub(r"[\r\n\v\f\x85\u2028\u2029]", " ", caption) for caption in captions)
    lines: list[list[str]] = [[]]
    for token in _scan(text):
        if token == "\n":
            lines.append([])
        else:
            lines[-1] += token.lower().split(" ")
    return lines


def _scan(text: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        if text[place] == "\n":
            yield "\n"
            place += 1
        elif found := SKIPPED.match(text, place):
            place = found.end()
        elif found := PLAIN.match(text, place):
            yield found[0]
            place = found.end()
        else:
            token, length = _longest(text, place)
            if token:
                yield token
            place += length


def _longest(text: str, place: int) -> tuple[str, int]:
    """Match the token that starts here, if any; also returns the length of the text that it covers."""
    reach, token, taken = 0, "", 1
    for rule, write in COMPILED:
        found = rule.match(text, place)
        if found and found.end() - place > reach:
            reach, token, taken = found.end() - place, write(found[1]), len(found[1])
    return token.replace("\xad", ""), taken
