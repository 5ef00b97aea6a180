"""Cutting an image by its plan, pixels as PIL makes them; BLIP-2's own square; building strategies by name."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from qformer import resolution
from qformer.resolution.base import ResolutionStrategy, cut, cut_all, resize
from qformer.resolution.fixed import Fixed
from qformer.types import Plan, Tile, Tiles, UsageError


def noise(width, height, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_pil(image, width, height):
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def plan_of(*tiles, image=(10, 10)):
    return Plan(image=image, tiles=tiles, grid=(1, 1), overview=None, tokens=0)


@pytest.mark.parametrize(
    ("old", "new"), [((100, 60), (28, 28)), ((30, 90), (42, 14)), ((20, 15), (64, 48)), ((64, 50), (64, 25))]
)
def test_resize_is_that_of_pil(old, new):
    image = noise(*old)
    got = resize(image, *new)
    assert got.dtype == torch.uint8
    assert got.shape == (3, new[1], new[0])
    difference = (got.int() - by_pil(image, *new).int()).abs()
    # Both round to bytes between the two passes; Pillow 13 runs them in another order for some shapes.
    assert (difference <= 1).float().mean() > 0.95
    assert difference.max() <= 4


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_resize_does_not_depend_on_the_layout(layout):
    image = noise(50, 40)
    if layout == "channels last":
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert (resize(image, 28, 28).int() - by_pil(noise(50, 40), 28, 28).int()).abs().max() <= 1


def test_resize_to_the_same_size_changes_nothing():
    image = noise(28, 14)
    assert resize(image, 28, 14).equal(image)


def test_fixed_squashes_the_whole_image():
    plan = Fixed(size=28).plan(100, 60)
    assert plan.image == (100, 60)
    assert plan.grid == (1, 1)
    assert plan.overview == 0
    assert plan.tokens == 32
    assert plan.tiles == (Tile((28, 28), (28, 28), (0, 0), (0, 0, 28, 28)),)
    assert plan.tiles[0].size == (28, 28)
    image = noise(100, 60)
    (tile,) = cut(image, plan)
    assert (tile.int() - by_pil(image, 28, 28).int()).abs().max() <= 1


def test_fixed_defaults_to_the_size_of_pretraining():
    assert Fixed().plan(5, 900).tiles[0].size == (224, 224)


def test_cut_pastes_the_content_at_its_offset_on_black():
    image = noise(3, 2)
    tile = Tile(content=(3, 2), canvas=(7, 5), offset=(3, 1), box=(0, 0, 7, 5))
    (got,) = cut(image, plan_of(tile))
    expected = torch.zeros(3, 5, 7, dtype=torch.uint8)
    expected[:, 1:3, 3:6] = image
    assert got.equal(expected)


def test_cut_crops_left_top_right_bottom():
    image = noise(8, 6)
    boxes = [(0, 0, 4, 3), (4, 0, 8, 3), (1, 2, 3, 6)]
    got = cut(image, plan_of(*(Tile((8, 6), (8, 6), (0, 0), box) for box in boxes)))
    for tile, (left, top, right, bottom) in zip(got, boxes, strict=True):
        assert tile.shape == (3, bottom - top, right - left)
        assert tile.is_contiguous()
        for y in range(top, bottom):
            for x in range(left, right):
                assert tile[:, y - top, x - left].equal(image[:, y, x])


def test_cut_crops_the_resized_and_pasted_canvas():
    image = noise(50, 30)
    tile = Tile(content=(20, 12), canvas=(28, 28), offset=(4, 8), box=(0, 14, 14, 28))
    (got,) = cut(image, plan_of(tile))
    canvas = torch.zeros(3, 28, 28, dtype=torch.uint8)
    canvas[:, 8:20, 4:24] = by_pil(image, 20, 12)
    assert (got.int() - canvas[:, 14:28, 0:14].int()).abs().max() <= 1
    assert got[:, 6:].eq(0).all()
    assert got[:, :, :4].eq(0).all()


def test_cut_keeps_tiles_of_different_content_apart():
    image = noise(16, 16)
    tiles = [
        Tile((8, 8), (8, 8), (0, 0), (0, 0, 8, 8)),
        Tile((16, 16), (16, 16), (0, 0), (0, 0, 8, 8)),
        Tile((8, 8), (16, 16), (0, 0), (0, 0, 8, 8)),
        Tile((8, 8), (16, 16), (8, 8), (0, 0, 8, 8)),
    ]
    small, whole, pasted, black = cut(image, plan_of(*tiles))
    assert small.equal(pasted)
    assert whole.equal(image[:, :8, :8])
    assert black.eq(0).all()


def test_cut_resizes_once_for_tiles_of_one_canvas(monkeypatch):
    calls = []
    monkeypatch.setattr("qformer.resolution.base.resize", lambda *args: calls.append(args) or resize(*args))
    cut(noise(50, 30), plan_of(*(Tile((28, 28), (28, 28), (0, 0), (x, 0, x + 14, 28)) for x in (0, 14))))
    assert len(calls) == 1


def test_cut_does_not_touch_or_share_the_image():
    image = noise(8, 8)
    before = image.clone()
    got = cut(image, plan_of(Tile((8, 8), (8, 8), (0, 0), (0, 0, 4, 8))))
    got[0].zero_()
    assert image.equal(before)


def test_cut_all_plans_by_width_and_height():
    tiles = cut_all([noise(50, 30), noise(20, 60, seed=1)], Fixed(size=14))
    assert isinstance(tiles, Tiles)
    assert [plan.image for plan in tiles.plans] == [(50, 30), (20, 60)]
    assert [tuple(tile.shape) for tile in tiles.pixels] == [(3, 14, 14)] * 2
    assert tiles.pixels[1].equal(resize(noise(20, 60, seed=1), 14, 14))


# by name


def test_build_by_name_reads_options_as_yaml_writes_them():
    assert resolution.build("fixed") == Fixed()
    assert resolution.build("fixed", size="364") == Fixed(size=364)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fixd", {}, "unknown resolution 'fixd': did you mean 'fixed'"),
        ("zebra", {}, "unknown resolution 'zebra': known are .*fixed"),
        ("fixed", {"sizes": 28}, "resolution.sizes is not an option of 'fixed': did you mean 'size'"),
        ("fixed", {"size": "wide"}, "resolution.size: .*'wide'"),
        ("fixed", {"size": 0}, "size is 0"),
        ("fixed", {"size": 28.5}, "resolution.size"),
        ("no_such_module:Strategy", {}, "no_such_module"),
        ("qformer.resolution.fixed:Fixd", {}, "Fixd"),
    ],
)
def test_build_says_what_is_wrong(name, options, message):
    with pytest.raises(UsageError, match=message):
        resolution.build(name, **options)


@dataclass(frozen=True)
class Half(ResolutionStrategy):
    """A strategy of somebody else: the left half."""

    side: int = 28

    def plan(self, width: int, height: int) -> Plan:
        tile = Tile((self.side, self.side), (self.side, self.side), (0, 0), (0, 0, self.side // 2, self.side))
        return plan_of(tile, image=(width, height))


def test_build_takes_a_strategy_from_outside(monkeypatch):
    outside = types.ModuleType("outside")
    outside.Half = Half
    monkeypatch.setitem(sys.modules, "outside", outside)
    strategy = resolution.build("outside:Half", side=14)
    assert [tuple(tile.shape) for tile in cut_all([noise(20, 20)], strategy).pixels] == [(3, 14, 7)]


def test_a_canvas_is_filled_and_a_crop_is_scaled_at_last():
    image = torch.full((3, 10, 20), 200, dtype=torch.uint8)
    tile = Tile((20, 10), (20, 20), (0, 5), (0, 0, 20, 20), scaled=(16, 16), fill=(1, 2, 3))
    (pixels,) = cut(image, plan_of(tile))
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]
    assert pixels[:, 8, 8].tolist() == [200] * 3
    (fractions,) = cut(image / 255, plan_of(tile))
    torch.testing.assert_close(fractions * 255, pixels.float(), atol=1.0, rtol=0)
    plain, filled = cut(image, plan_of(Tile(*(getattr(tile, n) for n in ("content", "canvas", "offset", "box"))), tile))
    assert plain.shape == (3, 20, 20)
    assert not plain[:, 0].any()  # of another colour, although content, canvas and offset are the same
    assert filled[:, 0, 0].tolist() == [1, 2, 3]
