"""The benchmark of what encoders see: where tiles show an object, and which tile is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.seeing import STRATEGIES, best_tile, features, in_tile
from qformer import resolution, vision
from qformer.canvases.canvas import Canvas, CanvasObject
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.source import Canvases
from qformer.resolution.base import cut_all

STAR = CanvasObject("star", "red", 200.0, 60.0, 36)
CROSS = CanvasObject("cross", "blue", 60.0, 150.0, 24)
CANVAS = Canvas(330, 210, (STAR, CROSS), 140)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_chosen_tile_shows_the_object_there(name: str) -> None:
    """The center of the box is the center of the star's color, in the pixels of the tile."""
    strategy = resolution.build(name, **STRATEGIES[name])
    tiles = cut_all([torch.from_numpy(draw_canvas(CANVAS)).permute(2, 0, 1)], strategy)
    plan = tiles.plans[0]
    number, (left, top, right, bottom) = best_tile(plan, STAR.box)
    pixels = tiles.pixels[number].numpy().astype(int)
    red = (pixels[0] - pixels[2] > 60).nonzero()
    share = in_tile(plan.tiles[number], plan.image, STAR.box)[1]
    assert share > 0.99, name
    assert abs(red[0].mean() + 0.5 - (top + bottom) / 2) < 0.12 * (bottom - top)
    assert abs(red[1].mean() + 0.5 - (left + right) / 2) < 0.12 * (right - left)
    assert np.ptp(red[1]) + 1 == pytest.approx(right - left, abs=3)


def test_an_object_is_read_where_it_is_largest() -> None:
    strategy = resolution.build("internvl", **STRATEGIES["internvl"])
    plan = strategy.plan(360, 360)  # nine tiles at its own size, and a thumbnail
    number, place = best_tile(plan, (30, 30, 60, 60))
    assert (number, place) == (0, pytest.approx([30, 30, 60, 60]))
    assert in_tile(plan.tiles[-1], plan.image, (30, 30, 60, 60))[0] == pytest.approx([10, 10, 20, 20])


def test_features_of_all_objects() -> None:
    encoder = vision.build("hf", path="mini:vit").freeze()
    strategy = resolution.build("oryx", **STRATEGIES["oryx"])
    got = features(encoder, strategy, [Canvases(seed=3).canvas(i) for i in range(3)])
    objects = [item for i in range(3) for item in Canvases(seed=3).canvas(i).objects]
    assert got["shape"][0].shape == (len(objects), 4 * 160)
    assert len(got["small shape"][1]) == sum(item.size == "small" for item in objects)
    assert got["count"][0].shape == (3, 160)
