"""The page on which several results of `qformer probe` stand side by side, and its table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qformer.figures import page as sheet
from qformer.figures.probes import STYLE, farthest, figures
from qformer.probing.comparison import MEAN, POSITION, SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    from qformer.probing.comparison import ComparedRow

SIDE_BY_SIDE = """
.beside { display: flex; flex-wrap: wrap; gap: 12px; } .beside figure { margin: 0; max-width: 560px; }
@media (max-width: 600px) { td { white-space: normal; } }
"""
FIGURES = {POSITION: "position", SIZE: "sizes"}
NOTE = (
    "Shares in % with Wilson's 95 % intervals; differences are those to the first run, in percentage points (Newcombe) "
    "or answers (Welch). The pictures are the same for all, which these intervals leave out of account."
)


def comparison_table(rows: Sequence[ComparedRow], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each run's number, and behind them the differences to the first run."""
    head = ["", "", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    table = []
    for row in rows:
        scale = 1 if row.unit == MEAN else 100
        digits = 2 if row.unit == MEAN else 1
        values = [
            "-" if value is None else f"{scale * value:.{digits}f}{_ends(ends, scale, digits)}"
            for value, ends in zip(row.values, row.intervals, strict=True)
        ]
        differences = [
            "-" if one is None else f"{scale * one[0]:+.{digits}f}{_ends(one[1], scale, digits)}"
            for one in row.differences
        ]
        table.append([row.probe, row.what if row.unit != MEAN else f"mean answer, {row.what}", *values, *differences])
    return head, table


def _ends(ends: tuple[float, float] | None, scale: int, digits: int) -> str:
    return "" if ends is None else f" ({scale * ends[0]:.{digits}f} to {scale * ends[1]:.{digits}f})"


def comparison_page(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], rows: Sequence[ComparedRow], warnings: Sequence[str]
) -> str:
    """The whole page: what differs, and both kinds of pictures of each run.

    Args:
        results: as `qformer probe` writes them. names: of the runs. warnings: sentences on what cannot be compared.
    """
    title = "Probes: " + " and ".join(names)
    parts = [sheet.heading(title, NOTE), *map(sheet.paragraph, warnings)]
    positions = [one for result in results if (one := result.get("counting_position"))]
    spread = max((farthest(one["mean"], one["objects"]) for one in positions), default=None)  # one scale for all maps
    drawn = [figures(result, spread) for result in results]
    (_, *head), table = comparison_table(rows, names)
    for probe in dict.fromkeys(row.probe for row in rows):
        parts += [sheet.section(probe.capitalize())]
        parts += [sheet.table(head, [cells for own, *cells in table if own == probe])]
        shown = [
            (name, own[FIGURES[probe]]) for name, own in zip(names, drawn, strict=True) if FIGURES.get(probe) in own
        ]
        parts += [_side_by_side(shown, probe)] if shown else []
    return sheet.page(title, parts, STYLE + SIDE_BY_SIDE)


def _side_by_side(shown: Sequence[tuple[str, Image.Image]], what: str) -> Markup:
    figure = "<figure><figcaption>{}</figcaption><img class=figure alt='{}' src='{}'></figure>"
    parts = [
        Markup(figure).format(name, f"{what}, {name}", sheet.data_uri(image, max(image.size), "PNG"))
        for name, image in shown
    ]
    return Markup("<div class=beside>{}</div>").format(Markup("").join(parts))
