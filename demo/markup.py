"""HTML beside Gradio's own components, which follows their light and dark colors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qformer.figures.page import ENVIRONMENT, data_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from qformer.demo.finding import Caption, Match

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
.more .grid-wrap { padding-top: 2.6rem } #chat .bubble-wrap { margin-top: 2.6rem }
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


BARS = ENVIRONMENT.from_string("""\
<ol class="bars" aria-label="{{ label }}">
{% for text, bars in rows %}
  <li><p>{{ text }}</p>
  {% for name, share, shown in bars %}
    <div class="bar {{ "second" if loop.index > 1 }}"><span>{{ name }}</span>
    <i aria-hidden="true"><b style="width: {{ "%.1f" | format(100 * share) }}%"></b></i>
    <output>{{ shown }}</output></div>
  {% endfor %}
  </li>
{% endfor %}
</ol>""")

FIGURE = Markup('<figure class="{}"><div><img src="{}" alt="{}"></div><figcaption>{}</figcaption></figure>')


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
    return FIGURE.format("seen wide" if wide else "seen", data_uri(picture, 2000), caption, caption)


def slice_cards(drawn: Sequence[tuple[Image.Image, str, dict[str, Any]]]) -> str:
    """Slices of a picture by several strategies, side by side, with their tiles, visual tokens and cost."""
    cards = []
    for picture, name, numbers in drawn:
        tiles = "1 tile" if numbers["tiles"] == 1 else f"{numbers['tiles']} tiles"
        sizes = " and ".join(f"{width} x {height}" for width, height in dict.fromkeys(numbers["sizes"]))
        whose = name + " (this model's)" * numbers["own"] + ", there to be exposed" * bool(numbers["exposed"])
        read = f"{numbers['tokens']:,} visual tokens, {numbers['useful']:.0%} useful, {numbers['cost']:,.0f} GFLOP"
        cards.append(Markup("<li>{}</li>").format(figure(picture, f"{whose}: {tiles} of {sizes}, {read}")))
    return f'<ol class="slices" aria-label="slices of each strategy">{"".join(cards)}</ol>'
