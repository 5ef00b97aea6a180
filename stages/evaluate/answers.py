"""The page of `qformer eval`: what a model said of some images, the right beside the wrong."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from qformer.evaluation.benchmarks import said_of
from qformer.figures import page as sheet
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.data.base import Source
    from qformer.data.held_out import ImageRecord
    from qformer.evaluation.benchmarks import Item, Measured

EACH = 12  # samples of a kind
TRUTHS = 5  # reference captions or answers that are shown
RIGHT = 0.995
STYLE = """
.hit .line { -webkit-line-clamp: 8; } .hit .said.line { font-size: 14px; font-weight: 600; color: var(--ink); }
.hit .asks.line { font-size: 13px; color: var(--ink); }
"""
CARDS = sheet.ENVIRONMENT.from_string("""\
<ol class=hits>
{% for card in cards %}
  <li class='hit {{ "yes" if card.right }}'>{{ card.picture }}
  <div class=place><b>{{ card.id }}</b>{% if card.score %}<span>{{ card.score }}</span>{% endif %}</div>
  {% for kind, text in card.lines if text %}<p class='line {{ kind }}'>{{ text }}</p>{% endfor %}</li>
{% endfor %}
</ol>""")
NOTE = "Bold is what the model said, below it what is true; behind the name stands what that earned, times 100."


def page(
    title: str,
    note: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    source: Source,
    images: Mapping[str, ImageRecord],
    items: Sequence[Item],
    records: Mapping[str, dict[str, Any]],
    measured: Measured,
) -> str:
    """One HTML file.

    Args:
        title, note: name of the checkpoint, and what was measured. table: head and rows of the numbers.
        images: of each item, by its id. items: those to choose from. records: what was said, by id.
    """
    parts = [sheet.heading(title, note), sheet.table(*table) if table[1] else Markup(), sheet.paragraph(NOTE)]
    parts += [sheet.paragraph(note) for note in measured.notes]
    parts += [sheet.paragraph(f"{name} is not available: {reason}") for name, reason in measured.missing.items()]
    for name, chosen in _kinds(items, measured).items():
        cards = [_card(source, images[items[row].id], items[row], records, share) for row, share in _spread(chosen)]
        parts += [sheet.section(f"{name}, {len(chosen)} of {len(items)}"), Markup(CARDS.render(cards=cards))]
    return sheet.page(f"Evaluation: {title}", parts, STYLE)


def _kinds(items: Sequence[Item], measured: Measured) -> dict[str, list[tuple[int, float | None]]]:
    """Rows of the items with what they earned. Captions are never simply right: the best and the worst half."""
    if not measured.each:
        return {"Not scored": [(row, None) for row in range(len(items))]}
    rows: list[tuple[int, float | None]] = list(enumerate(measured.each))
    if "CIDEr" in measured.total:
        rows.sort(key=lambda row: -(row[1] or 0))
        half = (len(rows) + 1) // 2
        kinds = {"The better half by CIDEr": rows[:half], "The worse half by CIDEr": rows[half:]}
    else:
        kinds = {
            "Right": [row for row in rows if (row[1] or 0) >= RIGHT],
            "Partly right": [row for row in rows if 0 < (row[1] or 0) < RIGHT],
            "Wrong": [row for row in rows if not row[1]],
        }
    return {name: chosen for name, chosen in kinds.items() if chosen}


def _spread(rows: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """A few of them, from all over."""
    count = min(EACH, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _card(
    source: Source, image: ImageRecord, item: Item, records: Mapping[str, dict[str, Any]], share: float | None
) -> dict[str, Any]:
    """Values of one card of `CARDS`."""
    prediction = said_of(item, records[item.id])
    try:
        pixels = Image.fromarray(image.read(source).permute(1, 2, 0).numpy())
        picture = sheet.picture(pixels, alt=item.question or prediction)
    except BadSample:
        picture = Markup("<div class=gone>cannot be read any more</div>")
    lines = [("asks", item.question), ("said", prediction or "(nothing)"), *(("soft", text) for text in _truth(item))]
    right = bool(item.question) and share is not None and share >= RIGHT
    score = "" if share is None else f"{100 * share:.0f}"
    return {"picture": picture, "id": item.id, "lines": lines, "right": right, "score": score}


def _truth(item: Item) -> list[str]:
    """References of an item: captions, answers and how many people gave them, or the right choice among all."""
    if item.choices:
        right = [] if item.right is None else [item.choices[item.right]]
        return [*right, "of " + ", ".join(item.choices)]
    counts = Counter(item.accepted).most_common(TRUTHS)
    return [f"{text} ({count})" if count > 1 else text for text, count in counts]
