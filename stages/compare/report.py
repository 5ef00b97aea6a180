"""Views of a comparison: tables on the terminal, and one HTML page with its figures; from the table alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup
from rich.table import Column
from rich.table import Table as Drawn

from qformer.figures import comparison as figures
from qformer.figures import page as sheet
from qformer.progress import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from qformer.metrics.paired import Difference, Interval
    from qformer.stages.compare.table import Retrieval, Row, Table

PAGE = "report.html"
SIDE, DENSE = 2400, 2  # most pixels of a figure, and how many of them stand on one of the page
STYLE = """
.figures { display: flex; flex-wrap: wrap; gap: 0 32px; align-items: flex-start; }
.figures figure { margin: 0; max-width: 100%; } .figures img { max-width: 100%; height: auto; border-radius: 6px; }
td { white-space: nowrap; } td:first-child, th:first-child { position: sticky; left: 0; background: var(--back); }
.notes td:last-child { white-space: normal; min-width: 14em; } .notes :is(td, th):last-child { text-align: left; }
"""
FIGURE = sheet.ENVIRONMENT.from_string(
    "<figure><h3>{{ title }}</h3><img width={{ width }} alt='{{ title }}' src='{{ source }}'></figure>"
)
WRAPPED = sheet.ENVIRONMENT.from_string("<div class='{{ kind }}'>{{ inside }}</div>")
CLOCK = "Seconds to the first token and images a second were measured on one machine; everything else is counted."
HEADS = {
    "accuracy": (
        "system",
        "seeds",
        "accuracy %",
        "difference",
        "verdict",
        "smallest seen",
        "p",
        "blind %",
        "steps to 90 %",
    ),
    "counted": ("system", "tokens", "trained", "encoder", "connector", "prefill", "step", "training"),
    "measured": ("system", "first token", "images/s", "peak"),
    "origin": ("system", "steps", "images", "of stage one", "not asked", "configuration", "data"),
}


def show(table: Table) -> None:
    """Print the tables."""
    rows = [row for row in table.rows if row.accuracy is not None]
    for title, head, cells in _tables(table, rows, brief=True):
        if cells:
            drawn = Drawn(*(Column(one, overflow="fold") for one in head), title=title)  # names are never cut
            for line in cells:
                drawn.add_row(*line)
            console.print(drawn)
    for row in table.rows:
        if row.note:
            console.print(f"{row.name}: {row.note}", soft_wrap=True, markup=False)
    for one in table.retrieval:
        if one.loses:
            console.print(_loss(one), soft_wrap=True, markup=False)


def _tables(table: Table, rows: Sequence[Row], brief: bool) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, head and cells of each table; by skill without intervals where it has to be `brief`."""
    skills = list(dict.fromkeys(skill for row in rows for skill in row.skills))
    other = [row for row in rows if row.by_skill]
    end = " (" if brief else ""
    title = f"{table.questions:,} questions; differences to {table.reference}, in points; 95 % intervals"
    return [
        (title, HEADS["accuracy"], [_accuracy(row, table.reference) for row in table.rows]),
        (
            "accuracy by skill, %",
            ("skill", *(row.name for row in rows)),
            [[skill, *(_cut(_share(row.skills.get(skill)), end) for row in rows)] for skill in skills],
        ),
        (
            f"differences to {table.reference} by skill, in points; * where the interval excludes 0",
            ("skill", *(row.name for row in other)),
            [[skill, *(_marked(row.by_skill.get(skill), end) for row in other)] for skill in skills if other],
        ),
        ("costs: FLOPs of a row, of a step, of the training", HEADS["counted"], [_counted(r) for r in rows if r.cost]),
        ("costs on one machine", HEADS["measured"], [_measured(row) for row in rows if row.cost]),
        ("recall of stage one, %", ("stage one of", *_recalls(table)), _retrieval(table)),
        (
            f"{table.images:,} images; hashes of what was trained on what",
            HEADS["origin"],
            [_origin(row) for row in rows],
        ),
    ]


def page(table: Table) -> str:
    """The whole report as one HTML file."""
    rows = [row for row in table.rows if row.accuracy is not None]
    modes = {"published": "as configured", "tokens": "at equal visual tokens", "flops": "at equal training FLOPs"}
    note = f"{len(rows)} of {len(table.rows)} systems, {modes[table.mode]}, on the same {table.questions:,} questions."
    parts = [sheet.heading("Comparison of systems", note), sheet.paragraph(CLOCK)]
    shown = [
        [sheet.section(title[0].upper() + title[1:]), sheet.table(head, cells)]
        for title, head, cells in _tables(table, rows, brief=False)
        if cells
    ]
    parts += [*shown[0], *_figures(table, rows), *(part for own in shown[1:] for part in own)]
    if lost := [_loss(one) for one in table.retrieval if one.loses]:
        parts += list(map(sheet.paragraph, lost))
    if notes := [(row.name, row.note) for row in table.rows if row.note]:
        inside = sheet.table(("system", "what happened"), notes)
        parts += [sheet.section("Without all numbers"), Markup(WRAPPED.render(kind="notes", inside=inside))]
    made = ", ".join(f"{key} {value}" for key, value in table.made_by.items() if value)
    return sheet.page("Comparison of systems", [*parts, sheet.paragraph(f"Made with {made}.")], STYLE)


def _figures(table: Table, rows: Sequence[Row]) -> list[Markup]:
    if not rows:
        return []
    accuracy = {row.name: row.accuracy for row in rows if row.accuracy is not None}
    drawn: dict[str, Image.Image] = {}
    for axis, key in (("visual tokens", "tokens"), ("FLOPs of a training step", "step_flops")):
        points = {row.name: (row.cost[key], accuracy[row.name]) for row in rows if key in row.cost}
        if points:
            drawn[f"accuracy by {axis}"] = figures.by_cost(points, axis)
    if differences := {row.name: row.difference for row in rows if row.difference is not None}:
        drawn[f"differences to {table.reference}"] = figures.forest(differences, table.reference)
    if curved := {row.name: row.curves for row in rows if row.curves}:
        drawn["during training"] = figures.curves(curved, _axis(table))
    if skilled := {row.name: {n: one.mean for n, one in row.skills.items()} for row in rows if row.skills}:
        drawn["accuracy by skill"] = figures.skills(skilled)
    parts = [
        Markup(FIGURE.render(title=title, width=image.width // DENSE, source=sheet.data_uri(image, SIDE, "PNG")))
        for title, image in drawn.items()
    ]
    return [sheet.section("Figures"), Markup(WRAPPED.render(kind="figures", inside=Markup("").join(parts)))]


def _axis(table: Table) -> str:
    return "held-out loss" if any(row.curve == "loss" for row in table.rows if row.curves) else "held-out accuracy"


def _loss(one: Retrieval) -> str:
    named = ", ".join(one.systems)
    return f"the stage one of {named} finds less than the linear map of its own frozen towers"


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _points(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def _verdict(gap: Difference | None) -> str:
    """Meaning of a difference: its interval holds for all comparisons of the table together."""
    if gap is None:
        return ""
    return "better" if gap.low > 0 else "worse" if gap.high < 0 else "cannot tell"


def _marked(gap: Difference | None, end: str) -> str:
    """A difference by skill, with a star where its interval excludes 0."""
    star = "*" if _verdict(gap) in ("better", "worse") else ""
    return _cut(_points(gap), end) + star


def _accuracy(row: Row, reference: str) -> list[str]:
    gap = row.difference
    if row.accuracy is None:
        return [row.name, "0", row.note.partition(":")[0], *[""] * (len(HEADS["accuracy"]) - 3)]
    return [
        row.name,
        str(len(row.seeds)),
        _share(row.accuracy),
        "reference" if row.name == reference else _points(gap),
        _verdict(gap),
        "" if gap is None else f"{100 * gap.smallest:.1f}",
        "" if gap is None else f"{gap.p:.3f}" if gap.p >= 0.001 else "< 0.001",
        "-" if row.blind is None else f"{100 * row.blind.mean:.1f}",
        "-" if row.near is None else f"{row.near:,.0f}",
    ]


def _cut(cell: str, end: str) -> str:
    return cell.partition(end)[0] if end else cell


def _counted(row: Row) -> list[str]:
    cost = row.cost
    return [
        row.name,
        f"{cost['tokens']:,.1f}",
        _short(cost["trained"]),
        *(_short(cost[f"{part}_flops"]) for part in ("encoder", "connector", "prefill", "step")),
        "-" if row.training_flops is None else _short(row.training_flops),
    ]


def _measured(row: Row) -> list[str]:
    cost = row.cost
    times = f"{1000 * cost['first_token_seconds']:,.1f} ms", f"{cost['images_per_second']:,.1f}"
    return [row.name, *times, f"{_short(cost['peak_bytes'])}B"]


def _short(number: float) -> str:
    """A number with three digits and the letter of its thousands."""
    for letter, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g} "


def _origin(row: Row) -> list[str]:
    numbers = [f"{one:,}" for one in (row.steps, row.images, row.stage_one_images) if one is not None]
    return [row.name, *numbers, f"{row.refused:g}", row.hash, row.data]


def _recalls(table: Table) -> list[str]:
    names = {"i2t": "text of image", "t2i": "image of text"}
    keys = table.retrieval[0].bridge if table.retrieval else {}
    return [f"{names[way]} R@{rank}" for key in keys for way, _, rank in [key.partition("_r")]]


def _retrieval(table: Table) -> list[list[str]]:
    found = []
    for one in table.retrieval:
        mark = ", behind the linear map" if one.loses else ""
        found.append([", ".join(one.systems) + mark, *(f"{100 * value:.1f}" for value in one.bridge.values())])
        if one.linear is not None:
            found.append(["linear map of the same towers", *(f"{100 * one.linear[key]:.1f}" for key in one.bridge)])
    return found
