"""What the page shows beside Gradio's own components, as escaped HTML that follows its light and dark colours."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

from qformer.demo.transcript import data_uri
from qformer.retrieval.places import in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from qformer.demo.finding import Caption, Match, ShownHit

CARD = 160  # pixels of a thumbnail
CSS = """
.gradio-container { max-width: 1400px !important }
.lacking { padding: 1.5rem 0; color: var(--body-text-color-subdued) }
ol.bars { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem }
ol.bars p { margin: 0 0 .25rem; overflow-wrap: anywhere; color: var(--body-text-color) }
.bar { display: grid; grid-template-columns: 3.2rem 1fr 3.6rem; gap: .6rem; align-items: center; font-size: .85rem;
  color: var(--body-text-color-subdued) }
.bar i { display: block; height: .6rem; border-radius: .3rem; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); overflow: hidden }
.bar b { display: block; height: 100%; background: var(--color-accent) }
.bar.second b { background: var(--body-text-color-subdued) }
.bar output { text-align: right; font-variant-numeric: tabular-nums; color: var(--body-text-color) }
ol.hits { list-style: none; margin: 0; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)) }
ol.hits li { border: 1px solid var(--border-color-primary); border-radius: .5rem; overflow: hidden; font-size: .8rem;
  background: var(--background-fill-secondary); color: var(--body-text-color) }
ol.hits img, ol.hits .gone { width: 100%; aspect-ratio: 1; object-fit: cover; display: block }
ol.hits .gone { display: grid; place-items: center; text-align: center; padding: .5rem; box-sizing: border-box }
ol.hits div { padding: .1rem .5rem; overflow-wrap: anywhere }
ol.hits .told { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden }
ol.hits .numbers { display: flex; justify-content: space-between; gap: .4rem; font-variant-numeric: tabular-nums;
  padding-top: .35rem }
ol.hits small { color: var(--body-text-color-subdued) }
figure.seen { margin: 0; max-width: 640px } figure.wide { max-width: none }
figure.seen img { width: 100%; border-radius: .5rem; display: block } figure.wide div { overflow-x: auto }
figure.seen figcaption { color: var(--body-text-color-subdued); font-size: .85rem; padding: .4rem 0 }
ol.slices { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)) }
#chat .placeholder, #chat .placeholder-content { padding-inline: 1rem; text-align: center }
@media (max-width: 640px) {
  figure.wide img { width: 56rem; max-width: none }
  .tab-container button { padding-inline: .55rem !important; font-size: .9rem !important }
  #examples thead, #examples td:not(:first-child) { display: none }
  #examples tbody { display: flex; overflow-x: auto }
  #examples td { padding: .2rem }
}
.up { color: #15803d } .dark .up { color: #4ade80 } .down { color: #b45309 } .dark .down { color: #fbbf24 }
"""


def caption_bars(captions: Sequence[Caption]) -> str:
    """Captions with the mean likelihood of a token as bars."""
    rows = [
        f"<li><p>{escape(one.text)}</p>{_bar('score', math.exp(one.score), f'{one.score:.2f}')}</li>"
        for one in captions
    ]
    return f'<ol class="bars" aria-label="captions, the likeliest first">{"".join(rows)}</ol>'


def match_bars(matches: Sequence[Match]) -> str:
    """Texts, the best first, each with the probability of ITM and the cosine of ITC."""
    rows = [
        f"<li><p>{escape(one.text)}</p>{_bar('ITM', one.itm, f'{one.itm:.1%}')}"
        f"{_bar('ITC', one.itc, f'{one.itc:.3f}', 'second')}</li>"
        for one in matches
    ]
    return f'<ol class="bars" aria-label="texts, the best match first">{"".join(rows)}</ol>'


def _bar(name: str, share: float, shown: str, kind: str = "") -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<div class="bar {kind}"><span>{name}</span><i aria-hidden="true"><b style="width: {width:.1f}%"></b></i>'
        f"<output>{shown}</output></div>"
    )


def figure(picture: Image.Image, told: str, wide: bool = False) -> str:
    """A picture with what it shows below; a wide one is scrolled sideways by itself where the screen is narrow."""
    kind = "seen wide" if wide else "seen"
    shown = f'<img src="{data_uri(picture, 2000)}" alt="{escape(told)}">'
    return f'<figure class="{kind}"><div>{shown}</div><figcaption>{escape(told)}</figcaption></figure>'


def slice_cards(drawn: Sequence[tuple[Image.Image, str, dict[str, Any]]]) -> str:
    """What strategies make of a picture, side by side, with their tiles, visual tokens and cost."""
    cards = []
    for picture, name, numbers in drawn:
        tiles = "1 tile" if numbers["tiles"] == 1 else f"{numbers['tiles']} tiles"
        told = f"{name}: {tiles}, {numbers['tokens']:,} visual tokens, {numbers['cost']:,.0f} GFLOP"
        cards.append(f"<li>{figure(picture, told)}</li>")
    return f'<ol class="slices" aria-label="slices of each strategy">{"".join(cards)}</ol>'


def hit_cards(found: Sequence[ShownHit], what: str) -> str:
    """Hits as cards: thumbnail, place, scores, name and caption."""
    return f'<ol class="hits" aria-label="{escape(what)}">{"".join(map(_card, found, range(1, len(found) + 1)))}</ol>'


def _card(one: ShownHit, place: int) -> str:
    told = one.caption or one.name
    picture = f'<span class="gone">{escape(in_words(one.fault))}</span>'
    if one.picture is not None:
        picture = f'<img src="{data_uri(one.picture, CARD)}" alt="{escape(told)}">'
    score = f"{one.itc:.3f}" if one.itm is None else f"{one.itm:.1%}"
    move = ' <span class="up" title="not among the first by cosine">new</span>' if one.fresh else ""
    if one.moved:
        way, sign = ("up", "▲") if one.moved > 0 else ("down", "▼")
        move = f' <span class="{way}" title="{abs(one.moved)} places {way} by re-ranking">{sign}{abs(one.moved)}</span>'
    return (
        f'<li>{picture}<div class="numbers"><span>{place}{move}</span><span>{score}</span></div>'
        f'<div class="told" title="{escape(told)}">{escape(told)}</div>'
        f"<div><small>{escape(one.name) if one.caption else ''}</small></div></li>"
    )
