"""The page of `qformer eval`: what a model said of some images, the right beside the wrong."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any

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
    parts = [f"<h1>{escape(title)}</h1><p class=soft>{escape(note)}</p>"]
    if table[1]:
        parts.append(sheet.table(*table))
    parts.append(f"<p class=soft>{NOTE}</p>")
    for name, reason in measured.missing.items():
        parts.append(f"<p class=soft>{escape(name)} is not available: {escape(reason)}</p>")
    for name, chosen in _kinds(items, measured).items():
        cards = [_card(source, images[items[row].id], items[row], records, share) for row, share in _spread(chosen)]
        parts.append(f"<h2>{name}, {len(chosen)} of {len(items)}</h2><ol class=hits>{''.join(cards)}</ol>")
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
    source: Source, listed: ImageRecord, item: Item, records: Mapping[str, dict[str, Any]], share: float | None
) -> str:
    said = said_of(item, records[item.id])
    try:
        pixels = Image.fromarray(listed.read(source).permute(1, 2, 0).numpy())
        shown = sheet.picture(pixels, alt=item.question or said)
    except BadSample:
        shown = "<div class=gone>cannot be read any more</div>"
    outlined = "yes" if item.question and share is not None and share >= RIGHT else ""
    earned = "" if share is None else f"<span>{100 * share:.0f}</span>"
    texts = [("asks", item.question), ("said", said or "(nothing)"), *(("soft", text) for text in _truth(item))]
    lines = "".join(f"<p class='line {kind}'>{escape(text)}</p>" for kind, text in texts if text)
    return f"<li class='hit {outlined}'>{shown}<div class=place><b>{escape(item.id)}</b>{earned}</div>{lines}</li>"


def _truth(item: Item) -> list[str]:
    """What should have been said: captions, answers and how many gave them, or the right choice and all of them."""
    if item.choices:
        right = [] if item.right is None else [item.choices[item.right]]
        return [*right, "of " + ", ".join(item.choices)]
    counts = Counter(item.accepted).most_common(TRUTHS)
    return [f"{text} ({count})" if count > 1 else text for text, count in counts]
