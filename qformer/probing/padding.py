"""The attack with padding of LLaVA-UHD (Xu et al. 2024, section 3 and appendix), and what shows that padding does it.

A rectangle stands in the middle of a square that is all padding's gray, and the model is asked for the color of an
edge. Who has learned that this gray is padding, and padding is nothing, names the color of the rectangle. So does
whoever knows no word for gray and has to name some color. So the same question is asked about the same rectangle on
other grounds, and without any.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

from PIL import Image

from qformer.metrics.counts import parse_color
from qformer.metrics.proportions import share_interval
from qformer.probing.pictures import Color, ask_all, draw_rectangle, rectangle_size, require_numbers
from qformer.scenes.scenes import RGB
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.probing.pictures import Ask

FILL: Color = (122, 116, 104)
ASPECTS = ((1, 9), (1, 2), (2, 3), (3, 2), (2, 1), (9, 1))  # width, height
KINDS = ("<1:1", ">1:1")
SIDES = ("left", "right", "top", "bottom")
RECTANGLES = ("red", "green", "blue")
EDGE = "what color is the {} edge?"
COLORED = "yellow"  # a ground that has a name, and that nobody pads with
OTHER_GRAY: Color = (145, 145, 145)  # nobody pads with it either; objects of the drawn worlds stand on such grays
#: Where the rectangle stands, besides on padding: in a color, in another gray, in nothing.
ALONE, ON_COLOR, ON_GRAY = "alone", "on_yellow", "on_other_gray"
NAMED, FOOLED, ONLY_PADDING = "named", "fooled", "only_padding"
RATES = (NAMED, ALONE, ON_COLOR, ON_GRAY, FOOLED, ONLY_PADDING)
WAYS = 1 + len((ALONE, ON_COLOR, ON_GRAY))  # in which each question is asked
ALL = "all"


@dataclass
class PaddingEffect:
    """Answers that name the rectangle's color, by kind of rectangle and side asked for.

    `named` is the published rate: of answers about the rectangle on padding. `alone`, `on_yellow` and `on_other_gray`
    are those about the same rectangle without any ground, where the answer is right, and on two other grounds, where it
    is wrong as on padding. `fooled` are answers that padding has changed: the color is named on padding and alone, but
    not on yellow, so that edges can be seen. `only_padding` are those of them that another gray does not bring about.

    Attributes:
        asked: questions of each kind and side.
        counts: answers by (kind, side), and by rate.
    """

    asked: int
    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)

    def shares(self, rate: str) -> dict[str, dict[str, float]]:
        """A rate in 0..1, by kind of rectangle and side."""
        return {kind: {side: self.counts[kind, side][rate] / self.asked for side in SIDES} for kind in KINDS}

    def pooled(self, kind: str, rate: str) -> tuple[int, int]:
        """Answers that count for a rate, and how many were asked, of all sides of a kind, or of `all`."""
        own = [counts[rate] for (named, _), counts in self.counts.items() if kind in (named, ALL)]
        return sum(own), self.asked * len(own)

    def record(self) -> dict[str, dict[str, dict[str, float | list[float]]]]:
        """Each rate by kind of rectangle and of `all`, with its count and 95 % interval, as plain data."""
        return {kind: {rate: self._told(kind, rate) for rate in RATES} for kind in (*KINDS, ALL)}

    def _told(self, kind: str, rate: str) -> dict[str, float | list[float]]:
        count, asked = self.pooled(kind, rate)
        ends = [round(end, 4) for end in share_interval(count, asked)]
        return {"count": count, "asked": asked, "share": round(count / asked, 4), "interval": ends}


def padding_attack(
    ask: Ask, fill: Color = FILL, side: int = 512, repeats: int = 5, seed: int = 0, question: str = EDGE
) -> dict[str, dict[str, float]]:
    """Ask for the color at the edges of a square that is all `fill` but for a rectangle in its middle.

    Who has learned that `fill` is padding, and padding is nothing, names the color of the rectangle; `padding_effect`
    tells them from those who name it anyway.

    Args:
        ask: is called once for each aspect ratio of the rectangle.
        fill: RGB of the square; by default LLaVA-1.5's padding, the mean of CLIP's pictures.
        side: of the square, in pixels.
        repeats: sizes of each rectangle; it is red, green and blue, and of six aspect ratios.
        question: with {} for `left`, `right`, `top` or `bottom`.

    Returns:
        Shares in 0..1 of answers that name the rectangle's color, for rectangles narrower than high (`<1:1`) and wider
        (`>1:1`), by the side asked for.

    Raises:
        UsageError: a number below 1, a rectangle too thin to see, a fill that is no color or that of a rectangle, a
            question without its {}, or too few answers of `ask`.
    """
    fill = _check(fill, side, repeats, question)
    effect = PaddingEffect(len(RECTANGLES) * repeats * len(ASPECTS) // 2)
    for aspect in ASPECTS:
        rows = list(_rows(aspect, side, repeats, seed))
        for row, named in zip(rows, _named(ask, rows, side, fill, question), strict=True):
            effect.counts.setdefault((row.kind, row.edge), Counter())[NAMED] += named
    return effect.shares(NAMED)


def padding_effect(
    ask: Ask, fill: Color = FILL, side: int = 512, repeats: int = 5, seed: int = 0, question: str = EDGE
) -> PaddingEffect:
    """Make the attack with its baselines: the same questions about the same rectangles on other grounds, and alone.

    Args:
        ask: is called four times for each aspect ratio, the first time as by `padding_attack`, which see.

    Raises:
        UsageError: as of `padding_attack`.
    """
    fill = _check(fill, side, repeats, question)
    effect = PaddingEffect(len(RECTANGLES) * repeats * len(ASPECTS) // 2)
    grounds = {NAMED: fill, ALONE: None, ON_COLOR: RGB[COLORED], ON_GRAY: OTHER_GRAY}
    for aspect in ASPECTS:
        rows = list(_rows(aspect, side, repeats, seed))
        told = {way: _named(ask, rows, side, ground, question) for way, ground in grounds.items()}
        for row, *named in zip(rows, *told.values(), strict=True):
            found = dict(zip(told, named, strict=True))
            found[FOOLED] = found[NAMED] and found[ALONE] and not found[ON_COLOR]
            found[ONLY_PADDING] = found[FOOLED] and not found[ON_GRAY]
            effect.counts.setdefault((row.kind, row.edge), Counter()).update(found)
    return effect


@dataclass(frozen=True)
class _Row:
    """A question: about a rectangle of this size and color, and its kind by shape; and the edge that is asked for."""

    kind: str
    size: tuple[int, int]
    color: str
    edge: str


def _rows(aspect: tuple[int, int], side: int, repeats: int, seed: int) -> Iterator[_Row]:
    kind = KINDS[aspect[0] > aspect[1]]
    for repeat in range(repeats):
        size = rectangle_size(side, aspect, random.Random(f"{seed} {repeat}").uniform(0.6, 0.85) * side)
        for color in RECTANGLES:
            yield from (_Row(kind, size, color, edge) for edge in SIDES)


def _named(ask: Ask, rows: list[_Row], side: int, ground: Color | None, question: str) -> list[bool]:
    """Tell for each row if the answer names the rectangle's color; without a ground the rectangle is all there is."""
    pictures = [
        Image.new("RGB", row.size, RGB[row.color])
        if ground is None
        else draw_rectangle(side, row.size, row.color, ground)
        for row in rows
    ]
    told = ask_all(ask, pictures, [question.format(row.edge) for row in rows])
    return [parse_color(reply) == row.color for row, reply in zip(rows, told, strict=True)]


def _check(fill: Color, side: int, repeats: int, question: str) -> Color:
    """The fill as Python's numbers, also of NumPy's. Raises UsageError: see `padding_attack`."""
    require_numbers(side=side, repeats=repeats)
    if len(fill) != 3 or not all(isinstance(v, Integral) and 0 <= v <= 255 for v in fill):
        raise UsageError(f"the fill is {fill}; give red, green and blue, each 0 to 255")
    if tuple(fill) in {RGB[color] for color in RECTANGLES}:
        raise UsageError(f"the fill {fill} is the color of a rectangle, which nobody would see; give another")
    if "{}" not in question:
        raise UsageError(f"the question '{question}' does not say which edge; put {{}} where left or right goes")
    red, green, blue = map(int, fill)
    return red, green, blue
