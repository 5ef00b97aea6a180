"""Closed questions with sure answers, made from the captions of a photo: who, animal, color, count, place, yes or no.

An answer needs several captions that say it and none that contradicts it. Captions leave out much, so a "no" also needs
captions without any word that goes with the thing (`HINTS`). Questions are balanced: within a kind all answers are
asked for about equally often, and each yes/no question has as many photos with "yes" as with "no", so that a model that
sees nothing gains little from knowing which answers are common.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(**rows: str) -> dict[str, frozenset[str]]:
    return {name: _words(text) for name, text in rows.items()}


WORD = re.compile(r"[a-z]+")
AGREE = 3  # captions that must name the answer to who, animal, place or yes
TWICE = 2  # captions that must name a color or a number, which are left out more often
MOST = 0.3  # largest share of an answer among those of its kind
EACH = 80  # questions of a kind, at most
ONES = 4  # captions that must speak of a single thing: leaving others out is common

PEOPLE = _table(
    man="man guy gentleman businessman fireman policeman cowboy",
    woman="woman lady businesswoman bride",
    boy="boy schoolboy",
    girl="girl schoolgirl",
)
#: Words that contradict an answer to "who", besides the other answers.
NOT_ALONE = _words(
    "men women boys girls guys ladies people persons children kids toddlers babies group crowd couple couples family "
    "two three four five several many others another players friends team each their they them onlookers "
    "spectators audience together both son daughter mother father mom dad wife husband bikers "
    "skateboarders guard guards guardsman owner coach officer soldier soldiers referee teacher parent parents"
)
AGES = _table(
    man="child kid toddler baby infant girlish female feminine little she her herself young youth teen teenager",
    woman="child kid toddler baby infant male little he him himself young youth teen teenager",
    boy="adult old elderly female she her herself baby infant",
    girl="adult old elderly male he him himself baby infant",
)
ANIMALS = _table(
    dog="dog dogs puppy puppies",
    horse="horse horses pony bronco",
    cat="cat cats kitten kittens",
    bird="bird birds seagull seagulls duck ducks pigeon pigeons parrot goose geese",
    cow="cow cows bull bulls cattle calf",
    sheep="sheep lamb goat goats",
    monkey="monkey monkeys",
)
OTHER_ANIMALS = _words(
    "animal animals fish elephant camel deer bear lion tiger zebra squirrel rabbit stuffed "
    "wooden rocking toy plastic statue carousel"
)
COLORS = _table(
    black="black",
    white="white",
    red="red",
    blue="blue",
    brown="brown",
    green="green",
    yellow="yellow",
    pink="pink",
    orange="orange",
    purple="purple",
)
#: Colors that are never the answer, since people disagree on them, but contradict one.
VAGUE = _words(
    "tan gray grey beige golden gold blond blonde silver dark light colorful multicolored maroon striped plaid spotted "
    "patterned checkered reddish purple tie"
)
COLORED = _words("dog shirt jacket coat hat dress helmet car ball collar swimsuit cap sweater vest shorts bike")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
COUNTED = {
    "dogs": "dog",
    "people": "person",
    "men": "man",
    "women": "woman",
    "boys": "boy",
    "girls": "girl",
    "children": "child",
}
#: Words that leave the number open; a person among them may be counted by one caption and not by the next.
UNCOUNTED = _words("group several many crowd other others another five six seven bunch pack some pair couple both each")
PLACES = _table(
    beach="beach seashore",
    snow="snow snowy",
    water="water lake ocean river pool sea",
    grass="grass grassy lawn",
    street="street sidewalk",
)
#: Words that go with a place, and so contradict the others.
AROUND = _table(
    beach="sand sandy shore shoreline surf waves wave coast",
    snow="ski skis skier skiing skiers snowboard snowboarder snowboarding sled sledding ice icy",
    water="swimming swims swim wave waves surf surfer surfing surfs surfboard pond stream creek boat raft kayak diving",
    grass="field yard park meadow pasture",
    street="road city corner crosswalk traffic downtown",
)
THINGS = _table(
    dog="dog dogs puppy puppies",
    bicycle="bicycle bicycles bicyclist cyclist bike bikes biker bmx",
    snow="snow snowy",
    water="water lake ocean river pool sea",
    child="child children kid kids boy boys girl girls toddler toddlers baby",
    woman="woman women lady ladies",
    man="man men guy guys gentleman",
)
#: Words with which a thing may well be in the photo though no caption names it.
HINTS = _table(
    dog="animal animals pet pets terrier retriever poodle shepherd collie labrador lab pup hound greyhound greyhounds "
    "canine bulldog pug husky leash muzzle corgi dalmatian beagle",
    bicycle="ride rides riding rider riders biking bikers cyclists cycling wheel wheels wheelie stunt trick tricks "
    "race racing racer motorcycle motorcycles motorcyclist motorbike dirt street sidewalk city ramp scooter tricycle",
    snow="ski skis skier skiing skiers slope slopes snowboard snowboarder snowboarding snowboarders snowball snowballs "
    "sled sleds sledding sleigh winter ice icy cold frozen glacier mountain mountains white",
    water="beach boat boats splash splashes splashing wet rain rainy puddle dock fish fishing pier shore shoreline "
    "bridge fountain sprinkler hose wading wades dive dives diving kayak canoe raft rafting bath bathing stream creek "
    "pond ice snow swim swims swimming swimmer surf surfs surfer surfing surfboard wave waves bathtub waterfall drink "
    "drinking drinks swimsuit bikini sand sandy jumping jumps coast harbor ship spray sprays waterskiing bottle tub",
    child="people person young family crowd group player players son daughter teen teens teenager teenagers youth "
    "infant little someone crowded couple audience small they them their others student students",
    woman="people person group crowd girl girls female females couple family someone they them bride mother mom player "
    "players adult adults she her child children kid kids baby toddler rider crowded others team friends onlookers "
    "spectators audience fans teenagers teens students wife climber skier surfer snowboarder bicyclist",
    man="people person group crowd boy boys male males couple family someone they them father dad player players adult "
    "adults he him his child children kid kids baby toddler rider crowded others team friends onlookers spectators "
    "audience fans teenagers teens students husband groom climber skier surfer snowboarder bicyclist skateboarder",
)
#: Words with which a thing that captions name may be another one.
AMBIGUOUS = _table(
    dog="hot stuffed toy statue",
    bicycle="dirt motor motorcycle motorcycles motorbike motocross motorcyclist exercise",
    snow="cone fake",
    water="bottle fountain",
)


@dataclass(frozen=True)
class Closed:
    """A question about a photo with the answers to choose from.

    Attributes:
        photo: number of the photo. kind: one of `KINDS`.
        choices: all answers of the kind. answer: the right one.
    """

    photo: int
    kind: str
    question: str
    choices: tuple[str, ...]
    answer: str

    @property
    def right(self) -> int:
        """Number of the right choice."""
        return self.choices.index(self.answer)


Asked = tuple[str, str]  # a question and its answer


def who(captions: list[list[str]]) -> list[Asked]:
    """Ask who the only person is: most captions say it, none names another person, age or number."""
    sure = []
    for name, words in PEOPLE.items():
        others = frozenset().union(*(other for key, other in PEOPLE.items() if key != name)) | NOT_ALONE | AGES[name]
        if _count(captions, words) >= AGREE and not _count(captions, others) and not _twice(captions, words):
            sure.append(("who is in the photo?", name))
    return sure


def animal(captions: list[list[str]]) -> list[Asked]:
    """Ask which animal is there: most captions say it, none names another."""
    found = _only(captions, ANIMALS, OTHER_ANIMALS)
    return [] if found is None else [("what animal is in the photo?", found)]


def color(captions: list[list[str]]) -> list[Asked]:
    """Ask for the color of a thing: captions give it right before its name, and no other anywhere for it."""
    asked = []
    for thing in sorted(COLORED):
        said = [_colors_of(words, thing) for words in captions]
        colors = {one for own in said for one in own}
        if len(colors) == 1 and sum(map(bool, said)) >= TWICE and not _count(captions, {f"{thing}s"}):
            (only,) = colors
            if only in COLORS and not _twice(captions, {thing}):
                asked.append((f"what color is the {thing}?", only))
    return asked


def count(captions: list[list[str]]) -> list[Asked]:
    """Ask how many there are of something: captions give the number, and none gives another or leaves it open."""
    if _count(captions, UNCOUNTED):
        return []
    asked = []
    for several, single in COUNTED.items():
        numbers = {name: _count_pairs(captions, {name}, several) for name in ("two", "three", "four")}
        said = [name for name, times in numbers.items() if times]
        alone = [words for words in captions if single in words]
        if len(said) == 1 and numbers[said[0]] >= TWICE and _number_is_sure(captions, said[0]):
            asked.append((f"how many {several} are in the photo?", said[0]))
        elif len(alone) >= ONES and not said and single == "dog" and not _several(captions, several, single):
            asked.append((f"how many {several} are in the photo?", "one"))
    return asked


def place(captions: list[list[str]]) -> list[Asked]:
    """Ask where the photo was taken: most captions say it, none has a word of another place."""
    for name, words in PLACES.items():
        rest = [key for key in PLACES if key != name]
        others = frozenset().union(*(PLACES[key] | AROUND[key] for key in rest)) - AROUND[name]
        if _count(captions, words) >= AGREE and not _count(captions, others):
            return [("where was the photo taken?", name)]
    return []


def yes_no(captions: list[list[str]]) -> list[Asked]:
    """Ask for things that most captions name, and for things with which no word of any caption goes."""
    asked = []
    for thing, words in THINGS.items():
        question = f"is there {'' if thing in ('snow', 'water') else 'a '}{thing} in the photo?"
        if not _count(captions, words | HINTS[thing]):
            asked.append((question, "no"))
        elif _count(captions, words) >= AGREE and not _count(captions, AMBIGUOUS.get(thing, frozenset())):
            asked.append((question, "yes"))
    return asked


#: The kinds of questions: what asks them, and the answers to choose from.
KINDS: dict[str, tuple[Callable[[list[list[str]]], list[Asked]], tuple[str, ...]]] = {
    "who": (who, tuple(PEOPLE)),
    "animal": (animal, tuple(ANIMALS)),
    "color": (color, tuple(COLORS)),
    "count": (count, tuple(NUMBERS)),
    "place": (place, tuple(PLACES)),
    "yes/no": (yes_no, ("yes", "no")),
}


def make_questions(photos: Sequence[Sequence[str]], each: int = EACH) -> list[Closed]:
    """Make balanced questions about photos, at most one of each kind and question about a photo; always the same ones.

    Args:
        photos: the captions of each photo, of which there should be at least three.
        each: largest number of questions of a kind.
    """
    asked: dict[str, list[Closed]] = defaultdict(list)
    for number, texts in enumerate(photos):
        captions = [WORD.findall(text.lower()) for text in texts]
        for kind, (rule, choices) in KINDS.items():
            asked[kind] += [Closed(number, kind, question, choices, answer) for question, answer in rule(captions)]
    chosen = []
    for kind in KINDS:
        drawn = sorted(asked[kind], key=lambda one: zlib.crc32(" ".join([one.question, *photos[one.photo]]).encode()))
        chosen += _paired(drawn, each) if kind == "yes/no" else _balanced(drawn, each)
    return sorted(chosen, key=lambda one: one.photo)


def _balanced(questions: list[Closed], each: int) -> list[Closed]:
    """Keep at most so many of each answer that none has more than `MOST` of those that are kept, one for a photo."""
    first = list({one.photo: one for one in reversed(questions)}.values())[::-1]
    counts = Counter(one.answer for one in first)
    limit = max((most for most in range(1, each + 1) if _fits(counts, most, each)), default=0)
    return _limited(first, dict.fromkeys(counts, limit), lambda one: one.answer)


def _fits(counts: Counter[str], most: int, each: int) -> bool:
    kept = [min(number, most) for number in counts.values()]
    return sum(kept) <= each and max(kept, default=0) <= MOST * sum(kept)


def _paired(questions: list[Closed], each: int) -> list[Closed]:
    """Keep as many photos with yes as with no for each question."""
    texts = sorted({one.question for one in questions})
    share = each // (2 * max(len(texts), 1))
    limits: dict[str, int] = {}
    for text in texts:
        answers = Counter(one.answer for one in questions if one.question == text)
        fewest = min(share, answers["yes"], answers["no"])
        limits |= {f"{text} yes": fewest, f"{text} no": fewest}
    return _limited(questions, limits, lambda one: f"{one.question} {one.answer}")


def _limited(questions: Iterable[Closed], limits: dict[str, int], group: Callable[[Closed], str]) -> list[Closed]:
    taken: Counter[str] = Counter()
    kept = []
    for one in questions:
        if taken[group(one)] < limits[group(one)]:
            taken[group(one)] += 1
            kept.append(one)
    return kept


def _count(captions: list[list[str]], words: Iterable[str]) -> int:
    """Count the captions with any of these words."""
    wanted = frozenset(words)
    return sum(not wanted.isdisjoint(caption) for caption in captions)


def _twice(captions: list[list[str]], words: Iterable[str]) -> bool:
    """Tell if a caption has two of these words, and so perhaps speaks of two things."""
    wanted = frozenset(words)
    return any(sum(word in wanted for word in caption) > 1 for caption in captions)


def _only(captions: list[list[str]], table: dict[str, frozenset[str]], never: frozenset[str]) -> str | None:
    """Find the row of a table that most captions name, if none names another."""
    named = {name: times for name, words in table.items() if (times := _count(captions, words))}
    ((name, times),) = named.items() if len(named) == 1 else ((None, 0),)
    return name if times >= AGREE and not _count(captions, never) else None


def _colors_of(words: list[str], thing: str) -> set[str]:
    """Collect the colors in front of a thing, over as many adjectives and colors as stand there."""
    found: set[str] = set()
    for number, word in enumerate(words):
        if word != thing:
            continue
        for before in reversed(words[max(number - 4, 0) : number]):
            if before in COLORS or before in VAGUE:
                found.add(before)
            elif before not in ("and", "haired", "sleeved", "short", "long", "t", "colored", "furry", "baseball"):
                break
    return found


def _count_pairs(captions: list[list[str]], firsts: set[str], second: str) -> int:
    """Count the captions in which one of some words comes before another one, perhaps with one word between."""
    return sum(
        any(word == second and firsts & set(words[max(place - 2, 0) : place]) for place, word in enumerate(words))
        for words in captions
    )


def _number_is_sure(captions: list[list[str]], name: str) -> bool:
    """Tell if most captions have a number, be it of the same thing or another, and none has a larger one or another."""
    others = {other for other in NUMBERS if other not in ("one", name)}
    return _count(captions, {name}) >= AGREE and not _count(captions, others)


def _several(captions: list[list[str]], several: str, single: str) -> bool:
    more = {several, "two", "three", "four", "animals", "puppies"}
    return bool(_count(captions, more)) or _twice(captions, {single})
