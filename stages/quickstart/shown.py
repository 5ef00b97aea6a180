"""Parts of the quickstarts' reports: curves, queries with what was found before and after re-ranking, and styles."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from qformer.figures import page as sheet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jinja2 import Template
    from markupsafe import Markup

    from qformer.evaluation.retrieval import Scores

QUERIES, BEST = 6, 5
STYLE = """
.side { display: flex; flex-wrap: wrap; gap: 0 24px; } figure { margin: 8px 0; } figcaption { color: var(--soft); }
.wide img.curves { max-width: none; height: 260px; }
.query { border-top: 1px solid var(--line); padding: 12px 0; } .row { display: flex; gap: 8px; align-items: center; }
.row span { width: 84px; flex: none; color: var(--soft); font-size: 13px; }
.row img { width: 96px; min-width: 0; flex: 0 1 96px; }
img.found { outline: 3px solid var(--right); outline-offset: 1px; }
.row + .row { margin-top: 8px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 16px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px; font-size: 14px; }
.card img { width: 100%; max-width: 200px; display: block; margin: 0 auto 8px; } .card p { margin: 4px 0; }
code { background: var(--raised); padding: 1px 4px; border-radius: 4px; }
td + td { white-space: nowrap; } .side > div { max-width: 100%; }
pre code { display: block; padding: 10px; overflow-x: auto; }
"""
MACROS = """\
{% macro marked(text, right) %}<span class={{ "right" if right else "wrong" }}>{{ text }}</span>{% endmacro %}
{% macro figure(path, name) %}
<figure class=wide><figcaption>{{ name }}</figcaption>
<img class=curves alt='losses of {{ name }}' src='{{ png(folder / path / "curves.png") }}'></figure>
{% endmacro %}
{% macro searches(queries) %}
{% for caption, rows in queries %}
<div class=query><p>{{ caption }}</p>
{% for name, pictures in rows.items() %}<div class=row><span>{{ name }}</span>{{ pictures | join }}</div>{% endfor %}
</div>
{% endfor %}
{% endmacro %}
"""


def template(text: str) -> Template:
    """A template of a report, in which the macros `marked`, `figure` and `searches` are defined."""
    return sheet.ENVIRONMENT.from_string(MACROS + text)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def png(path: Path) -> str:
    """The address of a picture that carries its bytes."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def telling(scores: Scores, choices: Sequence[int]) -> list[int]:
    """Choose the queries to show among these texts: half where re-ranking changed the first place, half in order."""
    before, after = scores.itc.argmax(dim=0), scores.text_to_image.argmax(dim=0)
    changed = [number for number in choices if before[number] != after[number]][: QUERIES // 2]
    others = [number for number in choices if number not in changed]
    return changed + others[: QUERIES - len(changed)]


def query(
    text: int, owner: int, scores: Scores, show: Callable[[int, str], Markup], reranked: bool = True
) -> dict[str, list[Markup]]:
    """The best pictures for a text before and after re-ranking.

    Args:
        text, owner: numbers of the text and of its picture.
        show: makes HTML of the picture with a number, of a CSS class.
        reranked: the bridge has learned ITM; otherwise there is nothing after.
    """
    rows = {}
    columns = {"ITC": scores.itc[:, text]} | ({"re-ranked": scores.text_to_image[:, text]} if reranked else {})
    for label, column in columns.items():
        best = column.topk(min(BEST, len(column))).indices.tolist()
        rows[label] = [show(image, "found" if image == owner else "") for image in best]
    return rows
