"""Pixels of tiles: equal to Pillow's, of pictures and of clips, by the fast path and by the exact one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qformer.resolution import base
from qformer.resolution.base import cut, cut_all
from qformer.types import Plan, Tile, UsageError
from tests.resolution.test_strategies import EVERY, made

BICUBIC = Image.Resampling.BICUBIC


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_pillow(image: Tensor, tile: Tile) -> Tensor:
    """The tile, step by step as the published systems make it."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(tile.content, BICUBIC)
    canvas = Image.new("RGB", tile.canvas, tile.fill)
    canvas.paste(picture, tile.offset)
    shown = canvas.crop(tile.box)
    if tile.scaled is not None:
        shown = shown.resize(tile.scaled, BICUBIC)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [(500, 333), (90, 700), (31, 9)])
def test_pixels_equal_those_of_pillow(name: str, size: tuple[int, int]) -> None:
    image, plan = noise(3, size[1], size[0]), made(name).plan(*size)
    tiles = cut(image, plan)
    for got, tile in zip(tiles, plan.tiles, strict=True):
        assert got.is_contiguous()
        assert got.equal(by_pillow(image, tile))
    assert all(map(torch.equal, made(name).slice(image), tiles))


@pytest.mark.parametrize("name", EVERY)
def test_several_pictures_of_unequal_size(name: str) -> None:
    images = [noise(3, 120, 200), noise(3, 300, 90, seed=1)]
    tiles = cut_all(images, made(name))
    assert [plan.image for plan in tiles.plans] == [(200, 120), (90, 300)]
    each = [pixels for image, plan in zip(images, tiles.plans, strict=True) for pixels in cut(image, plan)]
    for got, exact in zip(tiles.pixels, each, strict=True):
        assert (got.int() - exact.int()).abs().max() <= (1 if name == "fixed" else 0)


@pytest.mark.parametrize("name", EVERY)
def test_tiles_of_clips_show_their_frames(name: str) -> None:
    clip = noise(3, 3, 60, 80)
    plan = made(name).plan_video(80, 60, 3)
    for got, tile in zip(cut(clip, plan), plan.tiles, strict=True):
        expected = torch.stack([by_pillow(clip[frame], tile) for frame in tile.frames])
        assert got.equal(expected if len(tile.frames) > 1 else expected[0])
    with pytest.raises(UsageError, match="reads frame 2, but there are 2"):
        cut(clip[:2], plan)
    with pytest.raises(UsageError, match="reads frame 2, but there are 1"):
        cut(clip[0], plan)


def test_the_last_frame_of_an_odd_clip_is_shown_twice() -> None:
    clip = noise(3, 3, 28, 28)
    tiles = cut(clip, made("qwen2vl", frame_tokens=(1, 4)).plan_video(28, 28, 3))
    assert [tuple(tile.shape) for tile in tiles] == [(2, 3, 28, 28)] * 2
    assert tiles[0].equal(clip[:2])
    assert tiles[1].equal(clip[[2, 2]])


def test_the_fast_path_differs_by_a_level_here_and_there() -> None:
    image, plan = noise(3, 300, 400), made("uhd").plan(400, 300)
    differs = torch.cat(
        [
            (exact.int() - fast.int()).abs().flatten()
            for exact, fast in zip(cut(image, plan), cut(image, plan, exact=False), strict=True)
        ]
    )
    assert differs.max() <= 1
    assert 0 < (differs > 0).float().mean() < 0.02


def test_floats_are_padded_with_the_same_color() -> None:
    image = noise(3, 30, 90) // 4 + 96  # no overshoot to clamp
    plan = made("pad_square").plan(90, 30)
    (exact,), (fractions,) = cut(image, plan), cut(image.float() / 255, plan)
    torch.testing.assert_close(fractions * 255, exact.float(), atol=2.0, rtol=0)
    assert fractions[:, 0, 0].mul(255).round().tolist() == [122, 116, 104]


def test_a_canvas_that_no_memory_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = noise(3, 1, 20000)
    with pytest.raises(UsageError, match="would be padded to 20000 x 20000, more than 178,956,970 pixels"):
        cut(thin, made("pad_square").plan(20000, 1))
    assert cut(thin, made("uhd").plan(20000, 1))[0].shape[1] == 14
    monkeypatch.setattr(base, "LARGEST", 99)
    square = Tile((5, 2), (10, 10), (0, 0), (0, 0, 10, 10))
    with pytest.raises(UsageError, match="a picture of 5 x 2 pixels would be padded"):
        cut(thin, Plan((20000, 1), (square,), (1, 1), 0, 1))
