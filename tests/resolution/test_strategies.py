"""Plans of pictures by each published strategy: tables worked out from the rules, and what holds at every size.

Sizes at which the last bit of a float decides, and those beyond the usual, are recorded from the released code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformer import resolution
from qformer.resolution.base import ResolutionStrategy
from qformer.types import Plan, UsageError

SIZE = tuple[int, int]


@cache
def made(name: str, **options: Any) -> ResolutionStrategy:
    return resolution.build(name, **options)


# size: columns and rows, size of a slice, size of the overview
UHD: dict[SIZE, tuple[SIZE, SIZE, SIZE]] = {
    (1, 1): ((1, 1), (336, 336), (336, 336)),
    (300, 300): ((1, 1), (336, 336), (336, 336)),
    (336, 336): ((1, 1), (336, 336), (336, 336)),
    (337, 336): ((2, 1), (224, 462), (322, 322)),
    (336, 337): ((1, 2), (462, 224), (322, 336)),
    (400, 400): ((1, 2), (462, 224), (336, 336)),  # 2 x 1 and 1 x 2 are equally near; recorded
    (470, 470): ((1, 2), (462, 224), (336, 336)),
    (475, 475): ((1, 2), (462, 224), (336, 336)),
    (480, 470): ((2, 1), (238, 462), (336, 322)),
    (476, 476): ((2, 2), (336, 336), (336, 336)),
    (582, 582): ((2, 2), (336, 336), (336, 336)),
    (640, 480): ((2, 2), (378, 280), (378, 280)),
    (480, 640): ((2, 2), (280, 378), (280, 378)),
    (672, 448): ((2, 1), (280, 378), (406, 266)),
    (672, 672): ((2, 2), (336, 336), (336, 336)),
    (800, 600): ((3, 2), (308, 350), (378, 280)),
    (672, 1008): ((2, 3), (336, 336), (266, 406)),
    (1008, 672): ((3, 2), (336, 336), (406, 266)),
    (672, 1088): ((2, 3), (322, 336), (252, 420)),
    (1000, 1000): ((3, 2), (266, 406), (336, 336)),
    (1024, 768): ((3, 2), (308, 350), (378, 280)),
    (1920, 1080): ((3, 2), (364, 308), (448, 252)),
    (1080, 1920): ((2, 3), (294, 364), (252, 448)),
    (3000, 1000): ((6, 1), (224, 462), (574, 182)),  # six strips; 3 x 2 is equally near; recorded
    (1000, 3000): ((1, 6), (462, 224), (182, 574)),
    (4000, 500): ((7, 1), (350, 308), (938, 112)),
    (500, 4000): ((1, 7), (308, 350), (112, 938)),
    (20000, 20000): ((3, 2), (266, 406), (336, 336)),
    (10000, 1): ((1, 1), (29988, 14), (29988, 14)),  # as published: no upper bound
    (6, 20000): ((1, 3), (14, 11186), (14, 19390)),
    (113, 1000): ((1, 3), (182, 574), (112, 994)),
}

# size: columns and rows, at most 12
INTERNVL: dict[SIZE, SIZE] = {
    (1, 1): (1, 1),
    (448, 448): (1, 1),
    (447, 448): (1, 1),
    (633, 634): (1, 1),  # 633 / 634 is nearer to 1 than to any other quotient; area does not count
    (500, 333): (3, 2),
    (600, 400): (3, 2),
    (640, 480): (4, 3),
    (480, 640): (3, 4),
    (350, 300): (4, 3),
    (800, 1300): (2, 3),
    (739, 213): (3, 1),  # 3.469: nearer to 3 than to 4
    (213, 739): (1, 4),  # 0.288: nearer to 1/4 than to 1/3, so its transpose is cut otherwise
    (567, 233): (5, 2),
    (700, 300): (5, 2),
    (100, 200): (1, 2),  # 2 x 4 of the same ratio needs half of its area
    (200, 100): (2, 1),
    (448, 896): (1, 2),
    (896, 448): (2, 1),
    (1344, 448): (3, 1),
    (633, 633): (1, 1),  # 633^2 is below half of four tiles
    (634, 634): (2, 2),  # and 634^2 is above it
    (897, 897): (2, 2),
    (950, 950): (2, 2),
    (951, 951): (3, 3),
    (1000, 1000): (3, 3),
    (1345, 897): (3, 2),
    (1920, 1080): (4, 2),
    (1080, 1920): (2, 4),
    (3000, 1000): (6, 2),
    (1000, 3000): (2, 6),
    (5000, 50): (12, 1),
    (50, 5000): (1, 12),
    (20000, 20000): (3, 3),
}

# size: columns and rows, size of the content, rows and columns of tokens
ANYRES: dict[SIZE, tuple[SIZE, SIZE, SIZE]] = {
    (1, 1): ((1, 1), (384, 384), (27, 27)),
    (100, 100): ((1, 1), (384, 384), (27, 27)),
    (384, 384): ((1, 1), (384, 384), (27, 27)),
    (385, 384): ((2, 1), (385, 384), (27, 28)),  # 54 - 2 * 13: an odd column of padding stays
    (50, 40): ((1, 1), (384, 308), (21, 27)),
    (640, 480): ((2, 2), (768, 576), (40, 54)),
    (480, 640): ((2, 2), (576, 768), (54, 40)),
    (700, 300): ((2, 1), (768, 330), (23, 54)),
    (768, 768): ((2, 2), (768, 768), (54, 54)),
    (769, 768): ((3, 2), (769, 768), (54, 55)),
    (1152, 384): ((3, 1), (1152, 384), (27, 81)),
    (384, 1152): ((1, 3), (384, 1152), (81, 27)),
    (300, 900): ((1, 3), (384, 1152), (81, 27)),
    (2304, 384): ((6, 1), (2304, 384), (27, 162)),
    (217, 992): ((1, 3), (253, 1152), (81, 17)),  # 217 * (1152 / 992) rounded up; 217 * 1152 / 992 is 252
    (992, 217): ((3, 1), (1152, 253), (17, 81)),
    (800, 1300): ((3, 4), (946, 1536), (108, 67)),
    (896, 1344): ((3, 4), (1024, 1536), (108, 73)),  # 7,884 > 9 * 729, but by less than a tenth a side
    (1132, 1356): ((3, 4), (1152, 1380), (98, 81)),
    (1000, 1000): ((3, 3), (1152, 1152), (81, 81)),
    (1153, 1151): ((4, 3), (1155, 1152), (81, 82)),
    (1920, 1080): ((5, 3), (1920, 1080), (60, 108)),
    (1080, 1920): ((3, 5), (1080, 1920), (108, 60)),
    (1700, 1700): ((5, 5), (1920, 1920), (80, 80)),  # 135 // (5 / 3) in floats; recorded
    (2048, 1536): ((6, 4), (2048, 1536), (70, 93)),
    (1536, 2048): ((4, 6), (1536, 2048), (93, 70)),
    (2304, 2304): ((6, 6), (2304, 2304), (81, 81)),
    (20000, 20000): ((6, 6), (2304, 2304), (81, 81)),
    (5000, 50): ((6, 1), (2304, 24), (1, 162)),
    (20000, 1): ((1, 1), (384, 1), (1, 27)),
    (1, 20000): ((1, 1), (1, 384), (27, 1)),
}

NEXT = {"size": 336, "pins": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), "max_patches": None}
NEXT_336: dict[SIZE, tuple[SIZE, SIZE, SIZE]] = {
    (336, 336): ((1, 2), (336, 336), (24, 24)),
    (384, 384): ((2, 2), (672, 672), (48, 48)),
    (640, 480): ((2, 2), (672, 504), (36, 48)),
    (800, 1300): ((2, 2), (414, 672), (48, 30)),
    (1009, 336): ((3, 1), (1008, 336), (24, 72)),
    (217, 992): ((1, 3), (221, 1008), (72, 16)),
    (5000, 50): ((3, 1), (1008, 11), (0, 72)),  # no row is left: the base alone is read
}

# size: low view, native view; None: refused
ORYX: dict[SIZE, tuple[SIZE, SIZE] | None] = {
    (1, 1): ((384, 384), (64, 64)),
    (31, 31): ((384, 384), (64, 64)),
    (31, 32): ((384, 384), (64, 64)),  # 64 x 66 rounded down
    (32, 32): ((384, 384), (32, 32)),
    (64, 64): ((384, 384), (64, 64)),
    (33, 65): ((256, 512), (32, 64)),  # of the rounded 32 x 64: 271 x 543
    (50, 10): ((832, 160), (320, 64)),
    (20, 100): ((160, 832), (64, 320)),
    (100, 20): ((832, 160), (320, 64)),
    (95, 96): ((288, 448), (64, 96)),
    (300, 400): ((320, 416), (288, 384)),
    (384, 384): ((384, 384), (384, 384)),
    (640, 480): ((416, 320), (640, 480)),
    (480, 640): ((320, 416), (480, 640)),
    (127, 1000): ((96, 1216), (96, 992)),
    (1000, 1000): ((384, 384), (992, 992)),
    (1535, 1535): ((384, 384), (1504, 1504)),
    (1536, 1536): ((384, 384), (1536, 1536)),
    (1537, 1536): ((384, 352), (1536, 1504)),
    (1920, 1080): ((512, 256), (1920, 1056)),
    (1080, 1920): ((256, 512), (1056, 1920)),
    (2048, 1152): ((512, 288), (2048, 1152)),
    (3000, 1000): ((672, 192), (2656, 864)),
    (1000, 3000): ((192, 672), (864, 2656)),
    (4096, 4096): ((384, 384), (1536, 1536)),
    (20000, 20000): ((384, 384), (1504, 1504)),  # 20,000 * 0.0768 is below 1,536 in floats; recorded
    (1300, 50): ((2400, 32), (1280, 32)),
    (50, 1300): ((32, 2400), (32, 1280)),
    (2000, 60): ((3008, 32), (1984, 32)),
    (20000, 700): ((2144, 64), (8192, 256)),
    (5000, 50): None,
    (50, 5000): None,
}

# size: size of the tile; None: refused
QWEN2VL: dict[SIZE, SIZE | None] = {
    (1, 1): (56, 56),  # four tokens at least
    (14, 14): (56, 56),
    (28, 28): (56, 56),
    (42, 42): (56, 56),  # half to even: 1.5 -> 2
    (70, 70): (56, 56),  # 2.5 -> 2
    (98, 98): (112, 112),  # 3.5 -> 4
    (126, 154): (112, 168),  # 4.5 -> 4, 5.5 -> 6
    (55, 57): (56, 56),
    (41, 43): (56, 84),  # 28 x 56 is two tokens: scaled by sqrt(3136 / 1763) = 1.33 and rounded up
    (100, 100): (112, 112),
    (224, 224): (224, 224),
    (640, 480): (644, 476),
    (480, 640): (476, 644),
    (1000, 1000): (1008, 1008),
    (1344, 1344): (1344, 1344),
    (1920, 1080): (1932, 1092),
    (1080, 1920): (1092, 1932),
    (3584, 3584): (3584, 3584),
    (3585, 3584): (3584, 3584),
    (3597, 3597): (3584, 3584),  # 128.46 tokens a side
    (3598, 3598): (3584, 3584),  # 128.5 -> 128, half to even
    (3599, 3599): (3584, 3584),  # 129 are too many, so it is scaled and rounded down
    (4096, 4096): (3584, 3584),
    (20000, 20000): (3556, 3556),  # 127.99... in floats; recorded
    (2000, 10): (1988, 28),
    (10, 2000): (28, 1988),
    (13, 2600): (28, 2604),
    (200, 1): (196, 28),
    (1, 200): (28, 196),
    (20000, 100): (19992, 112),
    (201, 1): None,
    (20000, 99): None,
}

EVERY = ("fixed", "pad_square", "uhd", "internvl", "anyres", "oryx", "qwen2vl", "overlap512")
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000)) | st.tuples(st.integers(1, 20000), st.integers(1, 20000))


def fine(plan: Plan) -> list[int]:
    """Numbers of the tiles of the fine view."""
    return [i for i in range(len(plan.tiles)) if i != plan.overview or len(plan.tiles) == 1]


@pytest.mark.parametrize("size", UHD)
def test_uhd_cuts_slices_of_the_encoder_s_area(size: SIZE) -> None:
    grid, piece, overview = UHD[size]
    plan = made("uhd").plan(*size)
    assert plan.grid == grid
    assert {plan.tiles[i].size for i in fine(plan)} == {piece}
    assert plan.overview == len(plan.tiles) - 1
    assert plan.tiles[-1].size == plan.tiles[-1].content == overview
    if len(plan.tiles) > 1:
        assert plan.tiles[0].content == (grid[0] * piece[0], grid[1] * piece[1])
        assert "".join(tile.after for tile in plan.tiles) == ("," * (grid[0] - 1) + "\n") * grid[1]
    assert plan.markers == len(plan.tiles) - 1
    assert plan.tokens == 144 * len(plan.tiles)
    assert plan.image == size
    assert plan.fine is None


def test_uhd_has_two_variants_and_their_parts_are_options() -> None:
    paper = made("uhd", variant="arxiv").plan(3000, 1000)
    assert paper.grid == (5, 1)  # six slices at most, and 5, 6 are equally near
    assert paper.tokens == 6 * 64
    assert made("uhd", max_slices=9).plan(1000, 1000).grid == (3, 3)
    plain = made("uhd", schema=False, queries=32).plan(640, 480)
    assert (plain.markers, plain.tokens) == (0, 5 * 32)
    even = made("uhd", multiple=2).plan(640, 480)
    assert even.tiles[0].size == (364, 280)
    assert not any(side % 28 for tile in even.tiles for side in tile.size)


@pytest.mark.parametrize(
    ("size", "brought"),
    [((337, 336), (1024, 1020)), ((672, 1008), (682, 1024)), ((3000, 1000), (1024, 341)), ((1, 1), (1024, 1024))],
)
def test_uhd_reckons_from_a_picture_that_is_rescaled(size: SIZE, brought: SIZE) -> None:
    plan = made("uhd", rescale=1024).plan(*size)
    assert plan.tiles == made("uhd").plan(*brought).tiles
    assert plan.image == size


@pytest.mark.parametrize("size", INTERNVL)
def test_internvl_takes_the_nearest_ratio(size: SIZE) -> None:
    plan = made("internvl").plan(*size)
    columns, rows = INTERNVL[size]
    assert plan.grid == (columns, rows)
    assert {tile.size for tile in plan.tiles} == {(448, 448)}
    assert len(plan.tiles) == columns * rows + (columns * rows > 1)
    assert plan.overview == len(plan.tiles) - 1
    assert plan.tokens == 256 * len(plan.tiles)
    assert (plan.tiles[0].before, plan.tiles[-1].after, plan.markers) == ("<img>", "</img>", 2)


def test_internvl_without_thumbnail_and_with_other_numbers_of_tiles() -> None:
    plan = made("internvl", thumbnail=False).plan(640, 480)
    assert (len(plan.tiles), plan.overview, plan.tiles[-1].after) == (12, None, "</img>")
    assert made("internvl", thumbnail=False).plan(448, 448).overview == 0
    assert made("internvl", max_tiles=6).plan(640, 480).grid == (3, 2)
    assert made("internvl", min_tiles=2).plan(448, 448).grid == (2, 2)
    assert made("internvl", max_tiles=40).plan(20000, 20000).grid == (6, 6)


@pytest.mark.parametrize(
    ("size", "expected", "options"),
    [*((s, e, None) for s, e in ANYRES.items()), *((s, e, NEXT) for s, e in NEXT_336.items())],
)
def test_anyres_fits_the_picture_into_a_pin(
    size: SIZE, expected: tuple[SIZE, SIZE, SIZE], options: dict[str, Any] | None
) -> None:
    grid, content, tokens = expected
    plan = made("anyres", **options or {}).plan(*size)
    side = 336 if options else 384
    unit = side // 14
    assert (plan.grid, plan.tiles[1].content, plan.fine) == (grid, content, tokens)
    assert plan.tiles[0].content == (side, side)  # the base, squashed, comes first
    assert plan.overview == 0
    assert len(plan.tiles) == 1 + grid[0] * grid[1]
    assert plan.tokens == unit**2 + tokens[0] * (tokens[1] + 1)
    canvas = (grid[0] * side, grid[1] * side)
    for tile in plan.tiles[1:]:
        assert tile.canvas == canvas
        assert tile.offset == ((canvas[0] - content[0]) // 2, (canvas[1] - content[1]) // 2)
    assert plan.newline == "row"


@pytest.mark.parametrize("size", ORYX)
def test_oryx_keeps_the_native_size_and_adds_a_low_view(size: SIZE) -> None:
    expected = ORYX[size]
    if expected is None:
        with pytest.raises(UsageError, match=f"{size[0]} x {size[1]} pixels is too thin for Oryx"):
            made("oryx").plan(*size)
        return
    low, native = expected
    plan = made("oryx").plan(*size)
    assert [tile.size for tile in plan.tiles] == [low, native]
    assert plan.overview == 0
    assert plan.fine == (native[1] // 16, native[0] // 16)
    rows, columns = low[1] // 16, low[0] // 16
    assert plan.tokens == 3 + rows * (columns + 1) + plan.fine[0] * (plan.fine[1] + 1)


def test_tokens_of_oryx_as_published() -> None:
    found = [made("oryx").plan(*size).tokens for size in [(640, 480), (1920, 1080), (4096, 4096)]]
    assert found == [1773, 8517, 9915]


@pytest.mark.parametrize("size", QWEN2VL)
def test_qwen2vl_rounds_to_tokens(size: SIZE) -> None:
    expected = QWEN2VL[size]
    if expected is None:
        with pytest.raises(UsageError, match="beyond 200 : 1"):
            made("qwen2vl").plan(*size)
        return
    plan = made("qwen2vl").plan(*size)
    (tile,) = plan.tiles
    assert tile.size == expected
    assert plan.fine == (expected[1] // 28, expected[0] // 28)
    assert plan.tokens == expected[0] * expected[1] // 784
    assert (tile.before, tile.after, plan.markers) == ("<|vision_start|>", "<|vision_end|>", 2)


def test_bounds_of_qwen2vl_are_options() -> None:
    paper = made("qwen2vl", min_tokens=100)
    assert [paper.plan(*size).tiles[0].size for size in [(224, 224), (2000, 10)]] == [(280, 280), (3976, 28)]
    assert made("qwen2vl", max_tokens=64).plan(1000, 1000).tokens == 64
    assert made("qwen2vl", patch=20, max_tokens=128).plan(640, 480).tiles[0].size == (520, 360)
    with pytest.raises(UsageError, match="no token left"):
        made("qwen2vl", max_tokens=4).plan(1000, 10)


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (9, 4), (336, 84), (640, 480), (480, 640), (20000, 1), (3, 20000)])
def test_pad_square_keeps_the_aspect_ratio(size: SIZE) -> None:
    plan = made("pad_square").plan(*size)
    (tile,) = plan.tiles
    side = max(size)
    assert (tile.content, tile.canvas, tile.box) == (size, (side, side), (0, 0, side, side))
    assert tile.offset == ((side - size[0]) // 2, (side - size[1]) // 2)
    assert (tile.scaled, tile.size, tile.fill) == ((336, 336), (336, 336), (122, 116, 104))
    assert (plan.overview, plan.tokens, plan.markers) == (0, 576, 0)


@given(st.sampled_from([name for name in EVERY if name != "overlap512"]), SIZES)
@settings(max_examples=700, deadline=None)
def test_tiles_cover_the_picture_exactly_once_in_reading_order(name: str, size: SIZE) -> None:
    """The tiles of the fine view are the cells of a grid over one canvas, which holds the whole content."""
    try:
        plan = made(name).plan(*size)
    except UsageError:
        assert name in ("oryx", "qwen2vl")
        assert max(size) / min(size) > 20
        return
    tiles = [plan.tiles[i] for i in fine(plan)]
    assert len({(tile.content, tile.canvas, tile.offset, tile.fill) for tile in tiles}) == 1
    (width, height), columns, rows = tiles[0].canvas, *plan.grid
    across, down = width // columns, height // rows
    assert (columns * across, rows * down) == (width, height)
    boxes = [(x, y, x + across, y + down) for y in range(0, height, down) for x in range(0, width, across)]
    assert [tile.box for tile in tiles] == boxes
    (x, y), content = tiles[0].offset, tiles[0].content
    assert 0 <= x <= width - content[0]
    assert 0 <= y <= height - content[1]
    assert min(content) >= 1
    assert plan.image == size
    assert all(tile.frames == (0,) for tile in plan.tiles)
    if plan.overview is not None:
        whole = plan.tiles[plan.overview]
        assert len(plan.tiles) == 1 or (whole.content == whole.canvas == whole.size and whole.offset == (0, 0))


@given(SIZES)
@settings(max_examples=300, deadline=None)
def test_caps_hold(size: SIZE) -> None:
    assert len(made("uhd").plan(*size).tiles) <= 8
    assert len(made("uhd", variant="arxiv").plan(*size).tiles) <= 7
    assert len(made("internvl").plan(*size).tiles) <= 13
    assert len(made("internvl", max_tiles=6).plan(*size).tiles) <= 7
    plan = made("anyres").plan(*size)
    assert len(plan.tiles) <= 37
    assert plan.fine is not None
    assert plan.fine[0] * plan.fine[1] <= 1.1**2 * 9 * 729
    shrunk = made("anyres", max_patches=1).plan(*size).fine
    assert shrunk is not None
    assert shrunk[0] * shrunk[1] <= 1.1**2 * 729
    for name in ("oryx", "qwen2vl"):
        try:
            plan = made(name).plan(*size)
        except UsageError:
            continue
        width, height = plan.tiles[-1].size
        if name == "oryx":
            assert width * height <= 1536**2
        else:
            assert 4 <= plan.tokens <= 16384
            assert plan.fine == (height // 28, width // 28)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_a_picture_without_pixels_is_refused(name: str, size: SIZE) -> None:
    with pytest.raises(UsageError, match=f"the picture is {size[0]} x {size[1]} pixels"):
        made(name).plan(*size)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uhd", {"variant": "eccv"}, "resolution.variant"),
        ("uhd", {"size": 13}, "resolution.size is 13; give 14 or more"),
        ("uhd", {"max_slices": 0}, "resolution.max_slices is 0"),
        ("uhd", {"max_slice": 7}, "did you mean 'max_slices'"),
        ("internvl", {"min_tiles": 13}, "min_tiles 13 is more than"),
        ("internvl", {"max_tiles": 100_000_000}, "max_tiles is 100000000; give at most 1,000"),
        ("internvl", {"size": 27}, "resolution.size is 27"),
        ("anyres", {"pins": [[384, 700]]}, "multiples of resolution.size 384"),
        ("anyres", {"pins": []}, "resolution.pins"),
        ("anyres", {"newline": "two"}, "resolution.newline"),
        ("anyres", {"fps": 0}, "resolution.fps is 0"),
        ("oryx", {"compression": 8}, "give 4 or 16"),
        ("oryx", {"stride": 40}, "no multiple of resolution.patch 16"),
        ("qwen2vl", {"max_tokens": 3}, "min_tokens 4 is more than"),
        ("qwen2vl", {"frame_tokens": [5, 4]}, "frame_tokens"),
        ("qwen2vl", {"utils": "0.0.9"}, "resolution.utils"),
        ("pad_square", {"patch": 0}, "resolution.patch is 0"),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolution.build(name, **options)


def test_what_the_released_code_crashes_on_is_refused() -> None:
    with pytest.raises(UsageError, match="no pixel left in one direction when its longer side is 1024"):
        made("uhd", rescale=1024).plan(10000, 1)
    with pytest.raises(UsageError, match="no row of tokens left"):
        made("anyres", pins=((38400, 384),), max_patches=1, size=384, patch=192).plan(20000, 200)
