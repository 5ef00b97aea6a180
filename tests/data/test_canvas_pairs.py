"""Pairs differ in exactly one thing, which their question asks for; their files are those of MMVP."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qformer.canvases.canvas import Canvas, CanvasObject, held_out
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.pairs import PATTERNS, CanvasPair, Twins, write_pairs
from qformer.canvases.text import VOCABULARY
from qformer.data import sources
from qformer.types import UsageError
from tests.data.canvas_reader import look, solve

#: What of an object may differ, by pattern; of `presence` and `count` one object is there only once.
DIFFERS = {
    "direction": {"direction"},
    "state": {"hollow"},
    "position": {"x", "y"},
    "colour": {"colour"},
    "text": {"word"},
    "viewpoint": {"side", "x", "y"},
}


@cache
def pairs(split: Any, count: int = 180) -> tuple[CanvasPair, ...]:
    source = Twins(split, seed=1)
    return tuple(source.pair(number) for number in range(count))


def without(canvas: Canvas, other: Canvas) -> list[CanvasObject]:
    return [item for item in canvas.objects if item not in other.objects]


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_differ_in_exactly_one_thing(split: str) -> None:
    for pair in pairs(split):
        first, second = pair.canvases
        alone, other = without(first, second), without(second, first)
        bare = [dataclasses.replace(canvas, objects=(), layout="") for canvas in pair.canvases]
        assert bare[0] == bare[1]
        assert (first.layout == second.layout) == (pair.pattern != "structure")
        if pair.pattern == "structure":
            looks = [Counter(dataclasses.replace(i, x=0, y=0) for i in canvas.objects) for canvas in pair.canvases]
            assert looks[0] == looks[1]
        elif pair.pattern in ("presence", "count"):
            assert sorted([len(alone), len(other)]) == [0, 1]
        else:
            (a,), (b,) = alone, other
            differ = {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}
            assert differ <= DIFFERS[pair.pattern]
            assert differ
            if pair.pattern == "viewpoint":
                assert max(abs(a.x - b.x), abs(a.y - b.y)) <= 0.5
        images = [draw_canvas(canvas).astype(int) for canvas in pair.canvases]
        changed = np.abs(images[0] - images[1]).any(axis=2)
        assert changed.sum() > 20
        for item in (*alone, *other):
            left, top, right, bottom = item.box
            changed[top:bottom, left:right] = False
        assert not changed.any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_question_has_another_answer_for_each(split: str) -> None:
    first: dict[str, Counter[str]] = {pattern: Counter() for pattern in PATTERNS}
    order: Counter[int] = Counter()
    for pair in pairs(split):
        assert sorted(pair.right) == [0, 1]
        for canvas, right in zip(pair.canvases, pair.right, strict=True):
            assert solve(look(canvas), pair.question) == pair.options[right], pair
            assert split == "any" or held_out(canvas) == (split == "test")
        first[pair.pattern][pair.options[pair.right[0]]] += 1
        order[pair.right[0]] += 1
        assert set(re.findall("[a-z]+", f"{pair.question} {pair.options}")) <= set(VOCABULARY)
    assert abs(order[0] / order.total() - 0.5) < 0.15
    assert {answers.total() for answers in first.values()} == {len(pairs(split)) // len(PATTERNS)}
    for pattern in ("presence", "state", "viewpoint"):
        assert max(first[pattern].values()) < 0.85 * first[pattern].total(), first[pattern]
    for pattern in ("colour", "position", "text", "count"):
        assert max(first[pattern].values()) < 0.55 * first[pattern].total(), first[pattern]


def test_samples_are_both_of_a_pair_and_depend_on_the_index_alone() -> None:
    source = sources.build("twins", split="val", patterns=["colour", "text"], count=10, sides=[120, 200])
    assert isinstance(source, Twins)
    for number in (3, 0):
        pair = source.pair(number)
        for place in (1, 0):
            sample = source[2 * number + place]
            assert np.array_equal(np.asarray(sample.image), draw_canvas(pair.canvases[place]))
            assert sample.answers == [pair.options[pair.right[place]]]
            assert sample.facts["choices"] == list(pair.options)
            assert sample.facts["question_type"] == pair.pattern == ("colour", "text")[number % 2]
            assert sample.captions
    with pytest.raises(IndexError):
        source[10]


def test_a_folder_of_pairs_is_laid_out_as_that_of_mmvp(tmp_path: Path) -> None:
    source = Twins(sides=(120, 160), patterns=("colour", "count"), seed=3)
    written = write_pairs(tmp_path / "pairs", source, pairs=4)
    assert written == [source.pair(number) for number in range(4)]
    with (tmp_path / "pairs" / "Questions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Index"] for row in rows] == [str(number) for number in range(1, 9)]
    for number, row in enumerate(rows):
        pair = written[number // 2]
        match = re.fullmatch(r"\(a\) (.+) \(b\) (.+)", row["Options"])
        assert match
        canvas = pair.canvases[number % 2]
        chosen = match[{"(a)": 1, "(b)": 2}[row["Correct Answer"]]]
        assert solve(look(canvas), row["Question"]) == chosen
        assert row["Pattern"] == PATTERNS[pair.pattern]
        with Image.open(tmp_path / "pairs" / "MMVP Images" / f"{number + 1}.jpg") as image:
            assert image.size == (canvas.width, canvas.height)
            assert np.abs(np.asarray(image).astype(int) - draw_canvas(canvas)).mean() < 3
    with pytest.raises(UsageError, match="exists"):
        write_pairs(tmp_path / "pairs", source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ()}, "give some of"),
        ({"patterns": ("size",)}, "give some of"),
        ({"objects": (1, 4)}, "patterns that need 6"),
        ({"objects": (5, 5), "patterns": ("colour", "count")}, "none is taken away, which count need"),
        ({"sides": (1, 2)}, "sides is"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Twins(**options)
