"""Self-contained HTML pages with the pictures inside: contact sheets of a query and its hits, and parts of reports.

`contact_sheet` shows one search; reports are built from `page`, `table`, `picture` and `search`. Pages read well on a
phone and on a wide screen, in light and dark mode. Templates of `ENVIRONMENT` escape every value that is not `Markup`.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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

#: Every value is escaped that is not `Markup`; lines with nothing but a tag of jinja leave no trace.
ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

PAGE = ENVIRONMENT.from_string("""\
<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>
<title>{{ title }}</title><style>{{ style }}</style><body>{{ parts | join("\n") }}</body></html>
""")

TABLE = ENVIRONMENT.from_string("""\
<div class=wide><table><tr>{% for cell in head %}<th>{{ cell }}{% endfor %}
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}
{% endfor %}
</table></div>""")

#: Lists of texts alone stand side by side where there is room.
SEARCH = ENVIRONMENT.from_string("""\
{% macro lines(card) %}{% for line in card.lines %}<p class=line>{{ line }}</p>{% endfor %}{% endmacro %}
{% macro scores(card) %}
  {% for name, value in card.scores.items() %}
    <span>{{ name }} {{ value if value is string else "%.3f" | format(value) }}</span>
  {% endfor %}
{% endmacro %}
<section class=search><div class=asked>{{ picture(query.image) if query.image }}
  <div>{{ lines(query) }}{% if query.scores %}<div class=place>{{ scores(query) }}</div>{% endif %}</div></div>
<div{{ "" if pictured else " class=lists" }}>
{% for name, hits in found.items() %}
  <div>{% if name %}<h3>{{ name }}</h3>{% endif %}{% if hits %}<ol class=hits>
  {% for hit in hits %}
    <li class='hit{{ " yes" if hit.right }}'>
    {% if hit.image %}
      {{ picture(hit.image, alt=hit.lines[0] if hit.lines else "hit %d" % loop.index) }}
    {% elif hit.gone %}
      <div class=gone>{{ hit.gone }}</div>
    {% endif %}
    <div class=place><b>{{ hit.place or loop.index }}</b>
      {{ {true: right, false: wrong, none: ""}[hit.right] }}{{ scores(hit) }}</div>{{ lines(hit) }}</li>
  {% endfor %}
  </ol>{% else %}<p class=soft>Nothing was found.</p>{% endif %}</div>
{% endfor %}
</div></section>""")
RIGHT, WRONG = Markup("<span class=right>✓ right</span>"), Markup("<span class=wrong>✗</span>")


@dataclass(frozen=True)
class Card:
    """A picture or a text: a query, or a hit.

    Attributes:
        image: any size, shown as a thumbnail; None for a text.
        lines: captions and file names, the most important first.
        scores: numbers by name, such as {"ITC": 0.31, "ITM": 0.92}; a string is shown as it is.
        right: True outlines and marks the card as right, False marks it as wrong, None does neither.
        gone: text in place of an image that cannot be shown, such as "no longer a file".
        place: text in place of the card's number in the list.
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
        query: an image, lines of text, or both.
        hits: results, the best first.
        note: a sentence below the heading.
    """
    return page(title, [heading(title, note), search(query, {"": hits})])


def heading(title: str, note: str = "") -> Markup:
    """The title of a page, and a sentence below it."""
    return Markup("<h1>{}</h1>").format(title) + (paragraph(note) if note else "")


def section(title: str) -> Markup:
    """The title of a section."""
    return Markup("<h2>{}</h2>").format(title)


def paragraph(text: str) -> Markup:
    """A sentence about the page, in a soft color."""
    return Markup("<p class=soft>{}</p>").format(text)


def search(query: Card, found: Mapping[str, Sequence[Card]]) -> Markup:
    """One search as a part of a page: the query, and lists of hits under their names."""
    pictured = any(hit.image is not None or hit.gone for hits in found.values() for hit in hits)
    return Markup(SEARCH.render(query=query, found=found, pictured=pictured, picture=picture, right=RIGHT, wrong=WRONG))


def page(title: str, parts: Iterable[Markup], style: str = "") -> str:
    """A whole page made of parts, with additional CSS rules."""
    return PAGE.render(title=title, parts=parts, style=Markup(STYLE + style))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table that scrolls sideways where it is wider than the page."""
    return Markup(TABLE.render(head=head, rows=rows))


def picture(image: Image.Image, kind: str = "", alt: str = "", form: str = "JPEG") -> Markup:
    """A thumbnail as an HTML image that carries its own bytes; `kind` is its CSS class. PNG suits drawings."""
    return Markup("<img class='{}' alt='{}' src='{}'>").format(kind, alt, data_uri(image, SIDE, form))


def data_uri(image: Image.Image, side: int, form: str = "JPEG") -> str:
    """An image as JPEG or PNG, at most `side` pixels wide and high, inside an address."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, form, quality=85)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
