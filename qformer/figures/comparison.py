"""Figures of a comparison: accuracy by cost, curves, paired differences, skills by system; each a PIL image.

They are narrow, so that they can be read on a phone, and systems differ by mark and line as well as by color: those of
Okabe and Ito, which people with any kind of color vision can tell apart.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes

    from qformer.metrics.paired import Difference, Interval

    Curve = Sequence[tuple[int, float]]  # (step, value)

WIDTH, DPI = 4.3, 200  # inches: at 358 CSS pixels, which a phone has, a point of type is 1.16 of them
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
MARKS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
STYLE: dict[str, Any] = {"fontsize": 9.5}
LONGEST = 24  # letters of a name in a line


def by_cost(systems: Mapping[str, tuple[float, Interval]], axis: str) -> Image.Image:
    """Draw accuracy against a cost, on a logarithmic axis.

    Args:
        systems: by name (cost, accuracy with its interval).
        axis: name of the cost.
    """
    rows = -(-len(systems) // 2)
    figure, panel = _panel(3.1 + 0.22 * rows)
    for (name, (cost, accuracy)), style in zip(systems.items(), _styles(), strict=False):
        reach = [[accuracy.mean - accuracy.low], [accuracy.high - accuracy.mean]]
        panel.errorbar([cost], [accuracy.mean], reach, label=_short(name), **style | {"linestyle": "none"}, capsize=2)
    if all(cost > 0 for cost, _ in systems.values()):
        panel.set_xscale("log")
        panel.margins(x=0.12)
        _few_ticks(panel, [cost for cost, _ in systems.values()])
    panel.set_xlabel(axis, **STYLE)
    _as_shares(panel, "accuracy, 95 % interval")
    _legend(figure, panel)
    return _drawn(figure)


def curves(systems: Mapping[str, Sequence[Curve]], axis: str) -> Image.Image:
    """Draw a line for each system, the mean of its seeds, in a band from the lowest to the highest of them.

    Args:
        systems: by name, of each seed its points (step, value). Steps that not all seeds have are left out.
        axis: name of the value; one of accuracy is shown in per cent.
    """
    rows = -(-len(systems) // 2)
    figure, panel = _panel(3.1 + 0.22 * rows)
    for (name, seeds), style in zip(systems.items(), _styles(), strict=False):
        known = [dict(seed) for seed in seeds if seed]
        steps = sorted(set.intersection(*map(set, known))) if known else []
        if not steps:
            continue
        values = np.array([[seed[step] for step in steps] for seed in known], dtype=float)  # (seeds, steps)
        panel.plot(steps, values.mean(axis=0), label=_short(name), **style)
        if len(known) > 1:
            panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.13, lw=0)
    panel.set_xlabel("step", **STYLE)
    if "accuracy" in axis:
        _as_shares(panel, axis)
    else:
        panel.set_ylabel(axis, **STYLE)
    _legend(figure, panel)
    return _drawn(figure)


def forest(differences: Mapping[str, Difference], reference: str) -> Image.Image:
    """Draw paired differences to the reference with their intervals.

    The band around 0 reaches to the smallest difference that would have been seen. A filled mark is a difference that
    was seen, an open one is none.
    """
    figure, panel = _panel(1.15 + 0.5 * len(differences))
    for place, one in enumerate(differences.values()):
        color = COLORS[4] if not one.seen else COLORS[0] if one.mean > 0 else COLORS[1]
        width = 0.31
        panel.fill_between(
            [-one.smallest, one.smallest], place - width, place + width, color="#7F7F7F", alpha=0.22, lw=0
        )
        panel.plot([one.low, one.high], [place, place], color=color, lw=2.2, solid_capstyle="butt")
        panel.plot([one.mean], [place], "o", color=color, markersize=7, markerfacecolor=color if one.seen else "white")
        panel.text(
            0.0,
            place - width - 0.04,
            _short(list(differences)[place], 40),
            ha="left",
            va="bottom",
            transform=panel.get_yaxis_transform(),
            **STYLE,
        )
    panel.axvline(0, color="black", lw=0.8)
    panel.set_ylim(len(differences) - 0.5, -0.85)
    panel.set_yticks([])
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    panel.set_xlabel(f"difference to {_short(reference)}, points\nband: smaller ones would not have been seen", **STYLE)
    return _drawn(figure)


def skills(systems: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """Draw accuracy in 0..1 by skill and system as a heat map, with the numbers in per cent.

    Each skill has a scale of its own, from its worst system to its best, so that systems can be told apart.
    """
    names = list(dict.fromkeys(skill for own in systems.values() for skill in own))
    values = np.array([[own.get(skill, np.nan) for skill in names] for own in systems.values()], float)
    known = ~np.isnan(values)
    low = np.where(known, values, np.inf).min(axis=0, initial=np.inf)
    high = np.where(known, values, -np.inf).max(axis=0, initial=-np.inf)
    spread = np.where(high > low, high - low, 1)
    figure, panel = _panel(1.6 + 0.34 * len(systems), max(WIDTH, 1.5 + 0.29 * len(names)))
    level = (values - low) / spread
    panel.imshow(level, cmap="cividis", vmin=-0.15, vmax=1.0, aspect="auto")
    for (row, column), one in np.ndenumerate(values):
        text, dark = (f"{100 * one:.0f}", level[row, column] < 0.45) if known[row, column] else ("-", False)
        panel.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    panel.set_xticks(range(len(names)), [_short(name) for name in names], rotation=50, ha="right", **STYLE)
    panel.set_yticks(range(len(systems)), [_short(name) for name in systems], **STYLE)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_title("accuracy in %; bright: the best of a skill", loc="right", **STYLE)
    return _drawn(figure)


def _panel(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panel = figure.add_subplot()
    panel.tick_params(labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def _styles() -> Iterator[dict[str, Any]]:
    """Color, mark and line of one system after the other: no two have the same mark and line before there are 33."""
    for number, (color, mark) in enumerate(zip(cycle(COLORS), cycle(MARKS), strict=False)):
        yield {"color": color, "marker": mark, "markersize": 5, "linestyle": LINES[number // len(COLORS) % len(LINES)]}


def _legend(figure: Figure, panel: Axes) -> None:
    if panel.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=2, fontsize=8.5, frameon=False, handlelength=1.8, columnspacing=1)


def _as_shares(panel: Axes, axis: str) -> None:
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    panel.set_ylabel(axis, **STYLE)


def _few_ticks(panel: Axes, costs: Sequence[float]) -> None:
    """Put plain numbers at a logarithmic axis: the least, the middle and the greatest cost, with two digits."""
    low, high = float(np.log10(min(costs))), float(np.log10(max(costs)))
    ticks = [float(f"{10**place:.2g}") for place in np.linspace(low, high, 3)] if high - low > 0.2 else [costs[0]]
    panel.set_xticks(ticks, [_plain(tick) for tick in ticks])
    panel.set_xticks([], minor=True)


def _plain(number: float) -> str:
    """`36`, `1,200`, `2.7e+09` as 2.7 G."""
    for size, letter in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _short(name: str, most: int = LONGEST) -> str:
    """A name in at most so many letters; matplotlib reads no formula in it."""
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")


def _drawn(figure: Figure) -> Image.Image:
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
