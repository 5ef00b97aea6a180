"""Pictures and the page of `qformer probe`: answers by place and size, shares that were fooled, geometry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from qformer.figures import page as sheet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Means = Sequence[Sequence[float | None]]  # rows of mean answers; None where there was none

NONE = "none"  # in place of a number, in counts of answers
SHOWN = 7  # answers with a color of their own
DPI = 110
SHAPES = {"<1:1": "narrower than high", ">1:1": "wider than high"}  # of rectangles
#: Rates of the attack with padding, and what their columns are called.
RATES = {
    "named": "on padding",
    "alone": "alone",
    "on_yellow": "on yellow",
    "on_other_gray": "on another gray",
    "fooled": "fooled",
    "only_padding": "by padding's gray only",
}
BASELINE = (
    "The rectangle's color is named: on padding, where it is wrong; without any ground, where it is right; on yellow "
    "and on a gray that nobody pads with, where it is wrong again. Fooled: named on padding and alone, and not on "
    "yellow, so that the edge was seen there. By padding's gray only: of these, not on the other gray. 95 % intervals "
    "(Wilson)."
)
STYLE = """
.figure { display: block; width: 100%; max-width: 760px; height: auto; border-radius: 6px; margin: 8px 0; }
.mark { color: var(--wrong); } td { white-space: nowrap; }
"""


def farthest(mean: Means, truth: int) -> float:
    """Distance of the mean answer that is farthest from the truth, at least 1."""
    return max([1.0, *(abs(one - truth) for row in mean for one in row if one is not None)])


def heat_map(mean: Means, truth: int, spread: float | None = None) -> Image.Image:
    """Draw the mean answer for each place of the objects; what is right is white, too many red, too few blue.

    Args:
        truth: the number of objects.
        spread: distance from the truth at which colors end, by default that of the farthest answer.
    """
    values = np.array([[np.nan if one is None else one for one in row] for row in mean], float)
    spread = farthest(mean, truth) if spread is None else spread
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis = figure.add_subplot()
    shown = axis.imshow(values, cmap="RdBu_r", vmin=truth - spread, vmax=truth + spread)
    for (row, column), value in np.ndenumerate(values):
        dark = abs(value - truth) > 0.6 * spread
        text = "-" if np.isnan(value) else f"{value:.1f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=15, color="white" if dark else "black")
    axis.set(title=f"mean answer; {truth} is right", xticks=[], yticks=[], xlabel="where the objects are")
    bar = figure.colorbar(shown, shrink=0.8)
    bar.ax.set_ylim(max(0.0, truth - spread), truth + spread)
    return _drawn(figure)


def stacked_bars(sizes: Mapping[str, Mapping[str, int]]) -> Image.Image:
    """Draw the shares of answers for each size of the picture; rare ones are `other`."""
    totals: dict[str, int] = {}
    for answers in sizes.values():
        for answer, count in answers.items():
            totals[answer] = totals.get(answer, 0) + count
    often = sorted((one for one in totals if one != NONE), key=lambda one: -totals[one])[:SHOWN]
    kinds = sorted(often, key=int)
    rows = {kind: [answers.get(kind, 0) for answers in sizes.values()] for kind in kinds}
    rows["other"] = [
        sum(count for answer, count in answers.items() if answer not in (*kinds, NONE)) for answers in sizes.values()
    ]
    rows["no number"] = [answers.get(NONE, 0) for answers in sizes.values()]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.add_subplot()
    asked = np.array([max(sum(answers.values()), 1) for answers in sizes.values()])
    bottom, colors = np.zeros(len(sizes)), {"other": "#9a9a9a", "no number": "#d8d8d8"}
    for number, (kind, counts) in enumerate(rows.items()):
        if any(counts):
            heights = 100 * np.array(counts) / asked
            axis.bar(list(sizes), heights, 0.8, bottom, label=kind, color=colors.get(kind, f"C{number}"))
            bottom += heights
    axis.set(title="answers; 9 is right", xlabel="side of the picture in pixels", ylabel="% of answers", ylim=(0, 100))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _drawn(figure)


def coverage_maps(strategies: Mapping[str, Sequence[Mapping[str, Any]]], image: Sequence[int]) -> Image.Image | None:
    """Draw in how many tiles each ninth of a picture of this size is seen, a panel for each strategy."""
    maps = {
        name: one["coverage"]
        for name, records in strategies.items()
        for one in records
        if one["image"] == list(image) and "coverage" in one
    }
    if not maps:
        return None
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows), layout="constrained")
    for number, (name, values) in enumerate(maps.items()):
        axis = figure.add_subplot(rows, columns, number + 1)
        axis.imshow(values, cmap="Reds", vmin=0, vmax=5)
        for (row, column), value in np.ndenumerate(np.array(values)):
            axis.text(column, row, f"{value}", ha="center", va="center", fontsize=12)
        axis.set_title(name, fontsize=10)
        axis.set(xticks=[], yticks=[])
    return _drawn(figure)


def _drawn(figure: Figure) -> Image.Image:
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def attack_table(padding: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the shares that were fooled, by the side asked for."""
    sides = list(next(iter(padding.values())))
    rows = [[SHAPES.get(kind, kind), *(f"{one[side]:.1%}" for side in sides)] for kind, one in padding.items()]
    return ["rectangle", *sides], rows


def baseline_table(
    baseline: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the rates of the attack and of its baselines, all sides together, with their intervals."""
    rows = [[SHAPES.get(kind, kind), *(_with_ends(one[rate]) for rate in RATES)] for kind, one in baseline.items()]
    return ["rectangle", *RATES.values()], rows


def _with_ends(rate: Mapping[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['share']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def geometry_table(
    strategies: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what strategies make of pictures; a strategy's name stands in each of its rows."""
    head = ["strategy", "picture", "tiles", "seen, by thirds", "seen", "objects cut", "padding"]
    rows = []
    for name, records in strategies.items():
        for one in records:
            size = "{} x {}".format(*one["image"])
            if "refused" in one:
                rows.append([name, size, "refused", "", "", "", ""])
                continue
            thirds = " / ".join(" ".join(map(str, row)) for row in one["coverage"])
            seen = f"{one['least']}" if one["least"] == one["most"] else f"{one['least']} to {one['most']}"
            shares = [f"{one[key]:.0%}" for key in ("cut", "padding")]
            rows.append([name, size, f"{one['tiles']}", thirds, seen, *shares])
    return head, rows


def answers_in_words(answers: Mapping[str, int]) -> str:
    """Write a distribution, the commonest first: `4: 66.1%, 5: 16.6%, no number: 2.0%`."""
    asked = max(sum(answers.values()), 1)
    ordered = sorted(answers.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{'no number' if one == NONE else one}: {count / asked:.1%}" for one, count in ordered)


def figures(result: Mapping[str, Any], spread: float | None = None) -> dict[str, Image.Image]:
    """Pictures of a result of `qformer probe`, by the names of their files without `.png`; see `heat_map`."""
    found = {}
    if position := result.get("counting_position"):
        found["position"] = heat_map(position["mean"], position["objects"], spread)
    if sizes := result.get("counting_size"):
        found["sizes"] = stacked_bars(sizes)
    if strategies := result.get("geometry"):
        drawn = coverage_maps(strategies, result["square"])
        found |= {} if drawn is None else {"coverage": drawn}
    return found


def page(result: Mapping[str, Any], drawn: Mapping[str, Image.Image], exposed: Mapping[str, str]) -> str:
    """The whole of a result of `qformer probe` as one HTML page.

    Args:
        result: what `qformer probe --json` prints.
        drawn: its `figures`.
        exposed: faults that strategies are there to show, by their names.
    """
    title = f"Probes: {result['name']}"
    parts = [sheet.heading(title, "Generated by qformer probe; the pictures are those of LLaVA-UHD, section 3.")]
    if position := result.get("counting_position"):
        parts += [sheet.section("Counting by position"), _figure(drawn["position"], "heat map of the mean answer")]
        told = f"{position['objects']} objects in one ninth of a {position['side']} x {position['side']} picture. "
        parts += [sheet.paragraph(f"{told}Answers everywhere: {answers_in_words(position['answers'])}.")]
    if sizes := result.get("counting_size"):
        parts += [sheet.section("Counting by size"), _figure(drawn["sizes"], "answers by size, as stacked bars")]
        rows = [[size, answers_in_words(answers)] for size, answers in sizes.items()]
        parts += [sheet.table(["side in pixels", "answers to nine circles"], rows)]
    if padding := result.get("padding"):
        note = "Share of answers that name the color of a rectangle in the middle where the edge is all padding's gray."
        parts += [sheet.section("Padding attack"), sheet.paragraph(note), sheet.table(*attack_table(padding))]
        parts += [sheet.paragraph(BASELINE), sheet.table(*baseline_table(result["padding_baseline"]))]
    if strategies := result.get("geometry"):
        parts += [sheet.section("Geometry"), *_remarks(strategies, exposed)]
        if "coverage" in drawn:
            parts += [_figure(drawn["coverage"], "how many tiles see each ninth of a square picture")]
        parts += [sheet.table(*geometry_table(strategies))]
    return sheet.page(title, parts, STYLE)


def _remarks(strategies: Mapping[str, Any], exposed: Mapping[str, str]) -> list[Markup]:
    note = (
        "Tiles of the fine view that see each ninth of the picture; squares of a sixth of its shorter side that none "
    )
    parts = [sheet.paragraph(f"{note}of them shows whole; and how much of their area is padding.")]
    for name in strategies:
        if exposed.get(name):
            told = Markup("<p><b>{}</b> <span class=mark>is there to be exposed</span>: {}.</p>")
            parts.append(told.format(name, exposed[name]))
    return parts


def _figure(image: Image.Image, alt: str) -> Markup:
    source = sheet.data_uri(image, max(image.size), "PNG")
    return Markup("<img class=figure alt='{}' src='{}'>").format(alt, source)
