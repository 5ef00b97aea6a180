"""Plans of several pictures of one row and of clips, and which frames of a clip are taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qformer import resolution
from qformer.resolution.base import ResolutionStrategy
from qformer.types import Plan, UsageError
from qformer.videos.rows import plan_row
from tests.resolution.test_strategies import EVERY, made

PICTURES = [(640, 480), (300, 900), (448, 448)]


@pytest.mark.parametrize("name", EVERY)
def test_a_row_of_one_picture_is_that_picture(name: str) -> None:
    assert made(name).plan_many([(640, 480)]) == made(name).plan(640, 480)
    with pytest.raises(UsageError, match="the row has no pictures"):
        made(name).plan_many([])
    with pytest.raises(UsageError, match="the picture is 0 x 5 pixels"):
        made(name).plan_many([(640, 480), (0, 5)])


@pytest.mark.parametrize("name", ["fixed", "pad_square", "uhd", "oryx", "qwen2vl"])
def test_pictures_of_a_row_are_planned_one_by_one(name: str) -> None:
    parts = [made(name).plan(*size) for size in PICTURES]
    row = made(name).plan_many(PICTURES)
    assert row.parts == tuple(parts)
    assert row.tokens == sum(part.tokens for part in parts)
    assert row.tiles == tuple(tile for part in parts for tile in part.tiles)


def test_pictures_of_a_row_share_the_tiles_of_internvl() -> None:
    """12 // 3 = 4 tiles at most for each of three, and their thumbnails; one for each of 13."""
    row = made("internvl").plan_many(PICTURES)
    assert [part.grid for part in row.parts] == [(1, 1), (1, 3), (1, 1)]  # 1 is the nearest of their quotients
    assert [len(part.tiles) for part in row.parts] == [1, 4, 1]
    assert row.markers == 6
    assert [len(part.tiles) for part in made("internvl").plan_many([(640, 480)] * 13).parts] == [1] * 13
    assert made("internvl", min_tiles=6).plan_many([(640, 480)] * 4).parts[0].grid == (1, 1)  # no grid has 6 to 3 tiles


def test_rows_have_the_text_of_a_chat_between_pictures_and_frames() -> None:
    """Of a picture, a clip of two frames and a picture; there is none by default."""
    chat = made("internvl", between="\n", frame="Frame{}: ", shared=False)
    picture, clip = (64, 48, 0), (64, 48, 2)
    for strategy, leads in ((chat, ["", "\nFrame1: ", "\nFrame2: ", "\n"]), (made("internvl"), [""] * 4)):
        row = plan_row([picture, clip, picture], strategy)
        assert [tile.lead for part in row.parts for tile in part.tiles if tile.before] == leads
        assert (row.tiles, row.markers) == (tuple(tile for part in row.parts for tile in part.tiles), 8)
    assert [part.grid for part in chat.plan_many(PICTURES).parts] == [chat.plan(*size).grid for size in PICTURES]
    assert [part.tiles[0].lead for part in made("anyres", between="; ").plan_many(PICTURES).parts] == ["", "; ", "; "]


def test_pictures_of_a_row_are_one_padded_tile_each_in_anyres() -> None:
    row = made("anyres").plan_many([(640, 480), (3, 8)])
    wide, tall = row.parts
    (tile,) = tall.tiles
    assert (tile.content, tile.canvas, tile.offset) == ((3, 8), (8, 8), (2, 0))  # 2.5 is rounded down
    assert (tile.scaled, tile.fill) == ((384, 384), (127, 127, 127))
    assert (tall.tokens, tall.newline, tall.overview, wide.tokens, row.tokens) == (730, "end", 0, 730, 1460)
    assert wide.tiles[0].offset == (0, 80)


def shape(plan: Plan) -> tuple[int, int, tuple[int, int] | None, str]:
    return len(plan.tiles), plan.tokens, plan.fine, plan.newline


@pytest.mark.parametrize("name", EVERY)
def test_a_clip_has_no_overview_and_all_its_frames(name: str) -> None:
    clip = made(name).plan_video(640, 480, 5)
    assert (clip.image, clip.overview, clip.parts) == ((640, 480), None, ())
    assert {frame for tile in clip.tiles for frame in tile.frames} == set(range(5))
    assert [tile.frames for tile in clip.tiles] == sorted(tile.frames for tile in clip.tiles)
    with pytest.raises(UsageError, match="the clip has 0 frames"):
        made(name).plan_video(640, 480, 0)
    with pytest.raises(UsageError, match="the picture is 640 x 0 pixels"):
        made(name).plan_video(640, 0, 5)


def test_a_strategy_without_a_rule_for_clips_plans_each_frame_as_a_picture() -> None:
    clip, picture = made("uhd").plan_video(640, 480, 3), made("uhd").plan(640, 480)
    assert clip.tokens == 3 * picture.tokens
    assert clip.tiles[5:10] == tuple(replace(tile, frames=(1,)) for tile in picture.tiles)


@pytest.mark.parametrize(
    ("newline", "place", "newlines"),
    [("one_token", "end", 1), ("frame", "frame", 4), ("grid", "row", 56), ("no_token", "", 0)],
)
def test_clips_of_anyres(newline: str, place: str, newlines: int) -> None:
    """27 x 27 tokens of a frame become 14 x 14, and newlines stand where the option says."""
    clip = made("anyres", newline=newline).plan_video(640, 480, 4)
    assert shape(clip) == (4, 4 * 196 + newlines, (14, 14), place)
    assert {tile.size for tile in clip.tiles} == {(384, 384)}


@pytest.mark.parametrize(
    ("size", "compression", "frame", "fine", "tokens"),
    [
        ((640, 480), 4, (512, 384), (12, 16), 13122),
        ((640, 480), 16, (512, 384), (6, 8), 3522),
        ((1920, 1080), 4, (640, 320), (10, 20), 13506),
        ((1920, 1080), 16, (640, 256), (4, 10), 2882),
        ((1, 1), 4, (256, 256), (8, 8), 4674),
    ],
)
def test_clips_of_oryx(
    size: tuple[int, int], compression: int, frame: tuple[int, int], fine: tuple[int, int], tokens: int
) -> None:
    clip = made("oryx", compression=compression).plan_video(*size, 64)
    assert shape(clip) == (64, tokens, fine, "")
    assert tokens == 2 + 64 * (fine[0] * (fine[1] + 1) + 1)
    assert {tile.size for tile in clip.tiles} == {frame}
    with pytest.raises(UsageError, match="too thin for Oryx"):
        made("oryx", compression=compression).plan_video(5000, 50, 8)


def test_frames_of_oryx_hold_whole_blocks_of_tokens() -> None:
    small = resolution.build("oryx", patch=20, stride=40)
    assert small.plan(640, 480).tiles[1].size == (640, 480)
    with pytest.raises(UsageError, match=r"video_stride 64 is no multiple of two of resolution.patch 20"):
        small.plan_video(640, 480, 2)


@pytest.mark.parametrize(
    ("size", "frames", "frame", "tokens"),
    [
        ((640, 480), 8, (644, 476), 1564),  # 768 tokens a pair at most: 391 fit
        ((1280, 720), 128, (728, 392), 23296),  # 24,576 tokens / 64 pairs
        ((1920, 1080), 768, (420, 224), 46080),  # 1.05 * 128 tokens a pair, beyond the budget
    ],
)
def test_clips_of_qwen2vl(size: tuple[int, int], frames: int, frame: tuple[int, int], tokens: int) -> None:
    clip = made("qwen2vl", video_tokens=24576).plan_video(*size, frames)
    assert shape(clip) == (frames // 2, tokens, (frame[1] // 28, frame[0] // 28), "")
    assert {tile.size for tile in clip.tiles} == {frame}


def test_frames_of_qwen2vl_are_paired_between_two_markers() -> None:
    odd = made("qwen2vl").plan_video(224, 224, 5)
    assert [tile.frames for tile in odd.tiles] == [(0, 1), (2, 3), (4, 4)]
    assert [(tile.before, tile.after) for tile in odd.tiles] == [
        ("<|vision_start|>", ""),
        ("", ""),
        ("", "<|vision_end|>"),
    ]
    assert odd.tokens == 3 * 144  # 224 x 224 is enlarged to the 128 tokens of a pair at least: 336 x 336
    one = made("qwen2vl").plan_video(224, 224, 1)
    assert [(tile.frames, tile.before, tile.after) for tile in one.tiles] == [
        ((0, 0), "<|vision_start|>", "<|vision_end|>")
    ]


def test_frames_of_internvl_are_a_tile_each_between_markers_of_their_own() -> None:
    clip = made("internvl").plan_video(640, 480, 3)
    assert shape(clip) == (3, 768, None, "")
    assert clip.markers == 6


@pytest.mark.parametrize(
    ("strategy", "most"), [(made("anyres"), 32), (made("oryx"), 64), (made("fixed"), 32), (made("internvl"), 32)]
)
def test_one_frame_a_second_up_to_a_number(strategy: ResolutionStrategy, most: int) -> None:
    assert strategy.sample(100, 25.0) == [0, 25, 50, 75]
    assert strategy.sample(90, 29.97) == [0, 30, 60]
    assert strategy.sample(3, 0.1) == [0, 1, 2]  # slower than one a second: all
    assert strategy.sample(1, 30.0) == [0]
    long = strategy.sample(10_000, 25.0)
    assert long == np.linspace(0, 9_999, most, dtype=int).tolist()
    assert len(long) == most
    for total, fps, message in [
        (0, 25.0, "0 frames"),
        (5, 0.0, "0.0 frames a second"),
        (5, float("nan"), "nan frames"),
    ]:
        with pytest.raises(UsageError, match=message):
            strategy.sample(total, fps)


def test_the_rate_and_the_largest_number_are_options() -> None:
    assert made("anyres", fps=2.0, max_frames=3).sample(50, 25.0) == [0, 24, 49]
    assert made("oryx", fps=0.5, max_frames=8).sample(100, 10.0) == [0, 20, 40, 60, 80]


@pytest.mark.parametrize(
    ("options", "total", "fps", "counts"),
    [
        ({}, 8, 25.0, (4, 4)),
        ({"fps": 0.5, "min_frames": 8}, 8, 25.0, (8, 8)),
        ({"frames": 7}, 8, 25.0, (8, 8)),  # 3.5 pairs -> 4
        ({"frames": 5}, 8, 25.0, (4, 4)),  # 2.5 -> 2
        ({"min_frames": 5}, 8, 25.0, (6, 6)),
        ({"max_frames": 7}, 600, 10.0, (6, 6)),
        ({"max_frames": 2}, 600, 10.0, (2, 2)),  # below min_frames, and the lower number of the two holds
        ({}, 127, 25.0, (10, 10)),  # 10.16
        ({}, 140, 25.0, (12, 10)),  # 11.2: to the nearest even number, or down
        ({}, 100_000, 25.0, (768, 768)),
        ({}, 3, 25.0, (2, 2)),
    ],
)
def test_the_number_of_frames_of_qwen2vl(
    options: dict[str, float], total: int, fps: float, counts: tuple[int, int]
) -> None:
    for utils, count in zip(("0.0.8", "0.0.14"), counts, strict=True):
        taken = made("qwen2vl", utils=utils, **options).sample(total, fps)
        assert len(taken) == count
        assert (taken[0], taken[-1]) == (0, total - 1)


def test_frames_of_qwen2vl_are_spread_evenly() -> None:
    assert made("qwen2vl", frames=4).sample(8, 25.0) == [0, 2, 5, 7]  # 2.33, 4.67
    assert made("qwen2vl", frames=4).sample(4, 0.0) == [0, 1, 2, 3]  # needs no rate


@pytest.mark.parametrize(
    ("options", "total", "message"),
    [
        ({}, 1, "give a clip of at least 2 frames"),
        ({"frames": 10}, 9, "10 frames of a clip of 9"),
        ({}, 0, "0 frames"),
    ],
)
def test_frames_that_are_not_there_are_refused(options: dict[str, int], total: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made("qwen2vl", **options).sample(total, 25.0)


@pytest.mark.parametrize("name", ["fixed", "pad_square", "uhd", "internvl"])
def test_strategies_without_a_rule_for_clips_take_as_many_frames_as_they_are_told(name: str) -> None:
    assert made(name, max_frames=3).sample(200, 25.0) == [0, 99, 199]
    assert made(name, max_frames=3).sample(60, 25.0) == [0, 25, 50]
    with pytest.raises(UsageError, match=r"resolution\.max_frames is 0; give 1 or more"):
        made(name, max_frames=0)
