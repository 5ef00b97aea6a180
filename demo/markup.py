"""HTML beside Gradio's own components, which follows their light and dark colors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qformer.demo.browser import FILES
from qformer.figures.page import ENVIRONMENT, data_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from qformer.demo.finding import Caption, Match
    from qformer.demo.transcript import Conversation

MOST_WORDS = 16  # words of an answer that have maps
#: Of the maps in a section, shows that of the word that is pointed at, or else of the one that is chosen.
PICK = """
.explained section:has(.words > :nth-child({n}) input:checked) .maps > :not(:nth-child({n})),
.explained section:has(.words > :nth-child({n}):hover) .maps > :not(:nth-child({n})) {{ display: none }}
.explained section:not(:has(.words > :hover)):has(.words > :nth-child({n}) input:checked) .maps > :nth-child({n}),
.explained section:has(.words > :nth-child({n}):hover) .maps > :nth-child({n}) {{ display: block !important }}
"""
CSS = (FILES / "style.css").read_text(encoding="utf-8") + "".join(PICK.format(n=n) for n in range(1, MOST_WORDS + 2))


TALK = ENVIRONMENT.from_string((FILES / "talk.html").read_text(encoding="utf-8"))
ABOUT = ENVIRONMENT.from_string("<h1>Ask a picture</h1><p>{{ facts | join(' · ') }}</p>")
FAULT = Markup('<p class="fault" role="alert">{}</p>')
NOTHING = "Choose a picture and ask about it; an empty question describes it. A new picture begins a new conversation."

BARS = ENVIRONMENT.from_string((FILES / "bars.html").read_text(encoding="utf-8"))

FIGURE = Markup(
    '<figure class="{}"><div><img src="{}" alt="{}"></div><figcaption>{} '
    '<button type="button" data-save aria-label="Save the picture: {}">Save</button></figcaption></figure>'
)

EXPLAINED = ENVIRONMENT.from_string((FILES / "explained.html").read_text(encoding="utf-8"))


def talk(conversation: Conversation, judged: bool = False) -> str:
    """Draw a conversation, with its buttons; `judged` ones have thumbs."""
    busy, turns, editing = conversation.is_busy, conversation.turns, conversation.editing
    return TALK.render(turns=turns, editing=editing, busy=busy, judged=judged, nothing=NOTHING)


def head(facts: Sequence[str]) -> str:
    """Draw the title of the page, and below it what it runs."""
    return ABOUT.render(facts=facts)


def fault(sentence: str) -> str:
    """Draw an error as a line."""
    return FAULT.format(sentence)


def caption_bars(captions: Sequence[Caption]) -> str:
    """Captions with the mean likelihood of a token as bars."""
    rows = [(one.text, [_bar("score", math.exp(one.score), f"{one.score:.2f}")]) for one in captions]
    return BARS.render(label="captions, the likeliest first", rows=rows)


def match_bars(matches: Sequence[Match]) -> str:
    """Texts, the best first, each with the probability of ITM and the cosine of ITC."""
    rows = [
        (one.text, [_bar("ITM", one.itm, f"{one.itm:.1%}"), _bar("ITC", one.itc, f"{one.itc:.3f}")]) for one in matches
    ]
    return BARS.render(label="texts, the best match first", rows=rows)


def _bar(name: str, share: float, shown: str) -> tuple[str, float, str]:
    return name, min(max(share, 0.0), 1.0), shown


def figure(picture: Image.Image, caption: str, wide: bool = False) -> Markup:
    """A picture with its caption below; on a narrow screen a wide one scrolls sideways by itself."""
    return FIGURE.format("seen wide" if wide else "seen", data_uri(picture, 2000), caption, caption, caption)


def explained(answers: Sequence[tuple[str, str, Sequence[tuple[str, Image.Image]]]]) -> str:
    """Draw answers side by side, each with a map of the whole and of its words: the one that is pointed at or chosen.

    Args:
        answers: question, answer, and maps with their words, of which the first is the whole.
    """
    shown = []
    for question, answer, maps in answers:
        texts = [
            f"the {f'word “{word}” of the ' * (place > 0)}answer “{answer}”" for place, (word, _) in enumerate(maps)
        ]
        drawn = [figure(one, f"What {text} is based on") for text, (_, one) in zip(texts, maps, strict=True)]
        shown.append({"question": question, "words": [word for word, _ in maps], "maps": drawn})
    return EXPLAINED.render(shown=shown)


def slice_cards(drawn: Sequence[tuple[Image.Image, str, dict[str, Any]]]) -> str:
    """Slices of a picture by several strategies, side by side, with their tiles, visual tokens and cost."""
    cards = []
    for picture, name, numbers in drawn:
        tiles = "1 tile" if numbers["tiles"] == 1 else f"{numbers['tiles']} tiles"
        sizes = " and ".join(f"{width} x {height}" for width, height in dict.fromkeys(numbers["sizes"]))
        fault = f" (only to be compared: {numbers['exposed']})" * bool(numbers["exposed"])
        whose = name + " (this model's)" * numbers["own"] + fault
        read = f"{numbers['tokens']:,} visual tokens, {numbers['useful']:.0%} useful, {numbers['cost']:,.0f} GFLOP"
        cards.append(Markup("<li>{}</li>").format(figure(picture, f"{whose}: {tiles} of {sizes}, {read}")))
    return f'<ol class="slices" aria-label="slices of each strategy">{"".join(cards)}</ol>'
