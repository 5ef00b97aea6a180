"""Pages of one self-contained HTML file, pictures included: contact sheets of what was searched and what was found.

`contact_sheet` shows one search. `page`, `table`, `picture` and `search` are what reports are put together from. They
read well on a phone and on a wide screen, in light and in dark; every text is escaped.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

SIDE = 320  # pixels of a thumbnail's longer side: sharp at half of that on a dense screen
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --back: #fff; --raised: #f6f6f9;
  --right: #18794e; --wrong: #b5333a; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #a5abb5; --line: #393d45; --back: #15171a;
  --raised: #1f2226; --right: #4cc38a; --wrong: #ff8589; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1180px;
  margin: 0 auto; padding: 24px 16px; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; }
p { max-width: 70ch; } .soft { color: var(--soft); } .right { color: var(--right); } .wrong { color: var(--wrong); }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td, th { padding: 4px 14px 4px 0; text-align: right; } td:first-child, th:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 1px solid var(--line); } .wide { overflow-x: auto; }
.search { border-top: 1px solid var(--line); padding: 16px 0 20px; }
.asked { display: flex; gap: 14px; align-items: flex-start; margin: 0 0 4px; }
.asked img { max-width: min(240px, 42%); max-height: 240px; border-radius: 6px; flex: none; }
.asked p { margin: 0; } .asked .line { font-size: 17px; font-weight: 600; } .asked .line + .line { font-size: 14px;
  font-weight: 400; margin-top: 4px; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 14px 0 6px; }
.hits { display: grid; gap: 10px; list-style: none; margin: 0; padding: 0; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(170px, 47%), 1fr)); }
.lists { display: grid; gap: 0 24px; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
.lists .hits { grid-template-columns: 1fr; gap: 6px; } .lists .place { margin-top: 0; }
.hit { background: var(--raised); border-radius: 8px; padding: 8px; font-size: 13px; line-height: 1.4; min-width: 0; }
.hit.yes { outline: 3px solid var(--right); }
.hit p { margin: 4px 0 0; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
.hit img, .hit .gone { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; display: block; border-radius: 4px; }
.hit .gone { border: 1px dashed var(--line); color: var(--soft); display: grid; place-content: center;
  text-align: center; padding: 8px; }
.place { display: flex; flex-wrap: wrap; gap: 0 10px; color: var(--soft); margin-top: 4px;
  font-variant-numeric: tabular-nums; }
.place b { color: var(--ink); } .place .right, .place .wrong { font-weight: 600; }
.hit .line + .line { color: var(--soft); font-size: 12px; }
"""


@dataclass(frozen=True)
class Card:
    """A picture or a text that was asked with, or one that was found.

    Attributes:
        image: of any size, drawn as a thumbnail; None where there is none.
        lines: captions, file names; the first one counts most.
        scores: names with numbers, such as {"ITC": 0.31, "ITM": 0.92}; a text stands as it is.
        right: True is outlined and marked as the right one, False marked as a wrong one, None not marked.
        gone: stands in place of the image where it cannot be shown, such as "no file any more".
        place: stands in front instead of its number in the list.
    """

    image: Image.Image | None = None
    lines: Sequence[str] = ()
    scores: Mapping[str, float | str] = field(default_factory=dict)
    right: bool | None = None
    gone: str = ""
    place: str = ""


def contact_sheet(title: str, query: Card, hits: Sequence[Card], note: str = "") -> str:
    """One search as a whole HTML page.

    Args:
        title: heading of the page.
        query: what was asked with: an image, lines of text, or both.
        hits: what was found, the best first.
        note: a sentence below the heading.
    """
    head = f"<h1>{escape(title)}</h1>" + (f"<p class=soft>{escape(note)}</p>" if note else "")
    return page(title, [head, search(query, {"": hits})])


def search(query: Card, found: Mapping[str, Sequence[Card]]) -> str:
    """One search as a part of a page: what was asked with, and lists of hits under their names."""
    image = "" if query.image is None else picture(query.image)
    parts = [f"<div class=asked>{image}<div>{_lines(query)}{_scores(query)}</div></div>"]
    pictured = any(hit.image is not None or hit.gone for hits in found.values() for hit in hits)
    parts.append(f"<div{'' if pictured else ' class=lists'}>")  # lists of texts stand side by side where there is room
    for name, hits in found.items():
        cards = "".join(_hit(place, hit) for place, hit in enumerate(hits, start=1))
        shown = f"<ol class=hits>{cards}</ol>" if hits else "<p class=soft>Nothing was found.</p>"
        parts.append(f"<div>{f'<h3>{escape(name)}</h3>' if name else ''}{shown}</div>")
    return f"<section class=search>{''.join(parts)}</div></section>"


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page of parts that are HTML, with further rules of CSS."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><body>{''.join(parts)}</body></html>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in rows)
    return f"<div class=wide><table><tr>{''.join(f'<th>{escape(cell)}' for cell in head)}{body}</table></div>"


def picture(image: Image.Image, kind: str = "", alt: str = "", form: str = "JPEG") -> str:
    """A thumbnail as an HTML image that carries its own bytes; `kind` is its class. PNG suits drawings."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, form, quality=82)
    data = base64.b64encode(stream.getvalue()).decode()
    return f"<img class='{kind}' alt='{escape(alt)}' src='data:image/{form.lower()};base64,{data}'>"


def _hit(place: int, hit: Card) -> str:
    mark = {True: "<span class=right>✓ right</span>", False: "<span class=wrong>✗</span>", None: ""}[hit.right]
    shown = f"<div class=gone>{escape(hit.gone)}</div>" if hit.gone else ""
    if hit.image is not None:
        shown = picture(hit.image, alt=hit.lines[0] if hit.lines else f"hit {place}")
    head = f"<div class=place><b>{escape(hit.place or str(place))}</b>{mark}{_named(hit)}</div>"
    return f"<li class='hit{' yes' if hit.right else ''}'>{shown}{head}{_lines(hit)}</li>"


def _lines(card: Card) -> str:
    return "".join(f"<p class=line>{escape(line)}</p>" for line in card.lines)


def _scores(card: Card) -> str:
    return f"<div class=place>{_named(card)}</div>" if card.scores else ""


def _named(card: Card) -> str:
    values = {name: value if isinstance(value, str) else f"{value:.3f}" for name, value in card.scores.items()}
    return "".join(f"<span>{escape(name)} {escape(value)}</span>" for name, value in values.items())
