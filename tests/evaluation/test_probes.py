"""Probes against oracles that read the drawn pictures exactly, and geometry against hand-made plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qformer import resolution
from qformer.config import load_config
from qformer.evaluation import probes
from qformer.evaluation.probes import (
    counting_by_position,
    counting_by_size,
    coverage,
    cut_boxes,
    padding_attack,
    scaled,
    useful,
)
from qformer.model import connectors
from qformer.probing import padding
from qformer.scenes.scenes import RGB
from qformer.types import Plan, Tile, UsageError
from tests.resolution.test_strategies import made

ONCE = ("fixed", "pad_square", "uhd", "internvl", "anyres", "oryx", "qwen2vl")


def objects(picture: Image.Image) -> int:
    """Number of connected regions that are not the ground; each has a single color, and no other at its edge."""
    pixels = np.asarray(picture).astype(int) @ [65536, 256, 1]
    ground = pixels[0, 0]
    runs, region = [], list[int]()  # (row, first, behind the last, color) of equal pixels; the region of each

    def root(one: int) -> int:
        while region[one] != one:
            one = region[one]
        return one

    above: list[int] = []
    for y, row in enumerate(pixels):
        ends = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        own = []
        for x, end in pairwise(ends):
            if row[x] == ground:
                continue
            number = len(runs)
            runs.append((y, x, end, row[x]))
            region.append(number)
            for other in above:
                _, left, right, color = runs[other]
                if left <= end and x <= right:
                    assert color == row[x], "objects touch"
                    region[root(other)] = number
            own.append(number)
        assert all(runs[p][2] < runs[q][1] for p, q in pairwise(own)), "objects touch"
        above = own
    return len({root(one) for one in region})


def exact(pictures: list[Image.Image], questions: list[str]) -> list[str]:
    assert all(question.startswith("how many") for question in questions)
    return [f"There are {objects(picture)}." for picture in pictures]


def by_tile(pictures: list[Image.Image], questions: list[str]) -> list[str]:
    """Count in each tile of `overlap512`, and add up."""
    size = 120 if pictures[0].width == 180 else 512
    boxes = [tile.box for tile in made("overlap512", size=size).plan(*pictures[0].size).tiles]
    return [str(sum(objects(picture.crop(box)) for box in boxes)) for picture in pictures]


def edge(picture: Image.Image, question: str) -> str:
    """Color at the middle of the edge that is asked for."""
    width, height = picture.size
    (side,) = [side for side in ("left", "right", "top", "bottom") if side in question]
    place = {"left": (0, height // 2), "right": (width - 1, height // 2), "top": (width // 2, 0)}
    color = picture.getpixel(place.get(side, (width // 2, height - 1)))
    return next((name for name, rgb in RGB.items() if rgb == color), "gray")


def test_whoever_counts_what_is_there_is_flat() -> None:
    heat = counting_by_position(exact, side=180, repeats=4)
    assert heat.mean.tolist() == [[4.0] * 3] * 3
    assert heat.answers == Counter({4: 36})
    other = counting_by_position(exact, side=200, cells=2, objects=9, repeats=2)
    assert (other.mean.shape, other.answers) == ((2, 2), Counter({9: 8}))


@pytest.mark.parametrize("side", [180, 768])
def test_whoever_counts_in_overlapping_tiles_shows_them(side: int) -> None:
    heat = counting_by_position(by_tile, side=side, repeats=1)
    assert heat.mean.tolist() == [[4.0, 8.0, 4.0], [8.0, 16.0, 8.0], [4.0, 8.0, 4.0]]
    assert heat.answers == Counter({4: 4, 8: 4, 16: 1})


def test_objects_stay_inside_their_cell_and_only_move() -> None:
    shown: list[list[Image.Image]] = []

    def look(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        shown.append(pictures)
        return ["who knows"] * len(questions)

    heat = counting_by_position(look, repeats=2)
    assert heat.answers == Counter({None: 18})
    assert heat.mean.isnan().all()
    inside = [
        np.asarray(pictures[0].crop((256 * c, 256 * r, 256 * c + 256, 256 * r + 256)))
        for (r, c), pictures in zip(np.ndindex(3, 3), shown, strict=True)
    ]
    assert all((one == inside[0]).all() for one in inside)
    for (row, column), pictures in zip(np.ndindex(3, 3), shown, strict=True):
        for picture in pictures:
            drawn = (np.asarray(picture) != probes.GROUND).any(axis=2)
            rest = drawn.copy()
            rest[256 * row + 1 : 256 * row + 255, 256 * column + 1 : 256 * column + 255] = False
            assert drawn.any()
            assert not rest.any()
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(shown[0], shown[0][1:], strict=False))


def test_nine_circles_at_every_size() -> None:
    found = counting_by_size(exact, sizes=(60, 120, 180), repeats=2)
    assert found == {size: Counter({9: 2}) for size in (60, 120, 180)}
    tiles = counting_by_size(by_tile, sizes=(512, 768), repeats=2)
    assert tiles[512] == Counter({9: 2})
    assert all(number is not None and number > 9 for number in tiles[768])


def test_whoever_sees_padding_as_nothing_is_fooled() -> None:
    none = dict.fromkeys(("left", "right", "top", "bottom"), 0.0)
    fill = (122, 116, 104)

    def sober(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        for picture in pictures:
            pixels = np.asarray(picture)
            rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert (rim == fill).all()
            assert objects(picture) == 1
        return [edge(picture, question) for picture, question in zip(pictures, questions, strict=True)]

    def fooled(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        unpadded = []
        for picture in pictures:
            rows, columns = np.where((np.asarray(picture) != fill).any(axis=2))
            unpadded.append(picture.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
        return [edge(picture, question) for picture, question in zip(unpadded, questions, strict=True)]

    assert padding_attack(sober, side=120, repeats=2) == {"<1:1": none, ">1:1": none}
    every = dict.fromkeys(none, 1.0)
    assert padding_attack(fooled, side=120, repeats=2) == {"<1:1": every, ">1:1": every}
    numbers: Any = tuple(np.array(fill))
    assert padding_attack(fooled, fill=numbers, side=120, repeats=2) == {"<1:1": every, ">1:1": every}

    def narrow(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        """Fooled at the left of what is narrow and red."""
        return [
            "red" if "left" in question and np.ptp(np.where((np.asarray(p) != fill).any(2))[1]) < 60 else "?"
            for p, question in zip(pictures, questions, strict=True)
        ]

    shares = padding_attack(narrow, side=120, repeats=1)
    assert shares["<1:1"]["right"] == shares[">1:1"]["left"] == 0
    assert shares["<1:1"]["left"] == pytest.approx(1 / 3, abs=0.12)


def test_the_same_seed_draws_the_same_pictures() -> None:
    def drawn(seed: int) -> list[bytes]:
        seen: list[bytes] = []

        def look(pictures: list[Image.Image], questions: list[str]) -> list[str]:
            seen.extend(picture.tobytes() for picture in pictures)
            return ["4"] * len(questions)

        counting_by_position(look, side=60, cells=1, repeats=2, seed=seed)
        counting_by_size(look, sizes=(60,), repeats=2, seed=seed)
        padding_attack(look, side=60, repeats=1, seed=seed)
        return seen

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def bad(**options: Any) -> Any:
    return options


@pytest.mark.parametrize(
    ("probe", "options", "message"),
    [
        (counting_by_position, bad(repeats=0), "repeats is 0"),
        (counting_by_position, bad(cells=0), "cells is 0"),
        (counting_by_position, bad(side=30), "would be too small"),
        (counting_by_position, bad(objects=2.5), "objects is 2.5"),
        (counting_by_size, bad(sizes=()), "got no sizes"),
        (counting_by_size, bad(sizes=(200, 20)), "20 x 20 pixels are too small"),
        (counting_by_size, bad(sizes=(0,)), "size is 0"),
        (padding_attack, bad(fill=(1, 2)), "the fill is"),
        (padding_attack, bad(fill=RGB["red"]), "the color of a rectangle"),
        (padding_attack, bad(side=20), "too thin to see"),
        (padding_attack, bad(question="what color?"), "does not say which edge"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_asked(probe: Any, options: Any, message: str) -> None:
    def never(_pictures: Sequence[Any], _questions: Sequence[str]) -> list[str]:
        raise AssertionError

    with pytest.raises(UsageError, match=message):
        probe(never, **options)


def test_too_few_answers_are_noticed() -> None:
    with pytest.raises(UsageError, match="2 questions were asked and 1 answers came"):
        counting_by_position(lambda *_: ["4"], side=60, cells=1, repeats=2)


def test_coverage_of_overlapping_tiles() -> None:
    assert coverage(made("overlap512").plan(768, 768), 3, 3).tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert coverage(made("overlap512", size=120).plan(180, 180), 3, 3).tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    wide = coverage(made("overlap512").plan(768, 400), 3, 2)
    assert (wide.dtype, wide.tolist()) == (torch.long, [[1, 2, 1], [1, 2, 1]])


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("size", [(768, 768), (640, 480), (1920, 1080), (500, 1500), (301, 207)])
def test_other_strategies_see_everything_once(name: str, size: tuple[int, int]) -> None:
    plan = made(name).plan(*size)
    for columns, rows in ((3, 3), (7, 5), (64, 64)):
        assert (coverage(plan, columns, rows) == 1).all()


def test_what_no_tile_shows_whole_is_cut() -> None:
    plan = made("internvl").plan(896, 448)
    assert plan.grid == (2, 1)
    boxes = [(0, 0, 448, 448), (448, 0, 896, 448), (400, 100, 448, 200), (400, 100, 449, 200), (0, 0, 896, 448)]
    assert cut_boxes(plan, boxes) == [False, False, False, True, True]
    assert cut_boxes(made("overlap512").plan(768, 768), [(300, 300, 500, 500), (100, 0, 612, 9), (200, 0, 600, 9)]) == [
        False,
        True,
        True,
    ]
    # An overview that is alone shows everything; one beside finer tiles does not count.
    assert cut_boxes(made("fixed").plan(640, 480), [(0, 0, 640, 480)]) == [False]
    assert cut_boxes(made("anyres").plan(400, 30), [(0, 0, 400, 30)]) == [True]


def test_padding_and_offsets_are_reckoned_with() -> None:
    """A picture of 40 x 20 in the middle of a square of 40, cut into upper and lower half."""
    halves = tuple(Tile((40, 20), (40, 40), (0, 10), box) for box in ((0, 0, 40, 20), (0, 20, 40, 40)))
    plan = Plan((80, 40), halves, (1, 2), None, 0)
    assert useful(plan) == 0.5
    assert coverage(plan, 1, 2).tolist() == [[1], [1]]
    assert coverage(plan, 1, 1).tolist() == [[1]], "the seam belongs to the lower tile"
    assert cut_boxes(plan, [(0, 0, 80, 20), (0, 0, 80, 20.5), (0, 20, 80, 40)]) == [False, True, False]


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 5, 999)])
def test_boxes_outside_are_refused(box: tuple[int, int, int, int]) -> None:
    plan = made("fixed").plan(64, 64)
    with pytest.raises(UsageError, match="not inside the picture"):
        cut_boxes(plan, [box])
    with pytest.raises(UsageError, match="0 x 3 cells"):
        coverage(plan, 0, 3)
    with pytest.raises(UsageError, match="shows 2 pictures"):
        coverage(made("fixed").plan_many([(64, 64), (64, 64)]), 3, 3)


def test_the_configuration_that_overlap_exposes_never_overlaps_in_training() -> None:
    """Canvases of 240 and 480 px are whole tiles; pictures of the probe are not with `--tile 240`, and are with 320."""
    config = load_config(Path(__file__).parents[2] / "configs" / "probe_tiles.yaml")
    strategy = resolution.chosen(config.resolution)
    sides = {side for source in config.data.train.options["sources"] for side in source["sides"]}
    assert sides == {240, 480}
    for side in (*sides, scaled(768, 320)):
        assert (coverage(strategy.plan(side, side), 24, 24) == 1).all()
    overlapping = strategy.plan(scaled(768, 240), scaled(768, 240))
    assert coverage(overlapping, 3, 3).tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    connector = connectors.build("pixel_shuffle_mlp", 160, 128, patch=20)
    assert connector.count_tokens(overlapping) == connector.count_tokens(strategy.plan(480, 480)) == 4 * 36


def test_padding_is_all_that_tells_the_other_two_configurations_apart() -> None:
    padded, native = (
        load_config(Path(__file__).parents[2] / "configs" / f"probe_{name}.yaml") for name in ("padding", "native")
    )
    assert padded.data == native.data
    assert padded.llm == native.llm
    strategies = [resolution.chosen(config.resolution) for config in (padded, native)]
    assert strategies[0].plan(200, 400).tiles[0].fill == padding.FILL
    assert [round(useful(one.plan(200, 400)), 2) for one in strategies] == [0.5, 1.0]
    assert strategies[1].plan(240, 240).tokens == strategies[0].plan(240, 240).tokens // 4 == 36
