"""Order of what the language model reads, proven by tokens that say where they come from: (tile, row, column)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qformer.model.connectors import (
    CONNECTORS,
    MLP,
    AvgPool,
    Compressor,
    Connector,
    PatchMerger,
    PixelShuffleMLP,
    build,
)
from qformer.model.frontend import FrontEnd
from qformer.types import Plan, Tile, Tiles, UsageError
from qformer.vision.base import VisionEncoder

PATCH, SEP, BEGIN, END, NEWLINE = 14, -4.0, -2.0, -3.0, -1.0
Place = tuple[float, ...]


class Naming(VisionEncoder):
    """Each token is (number of its tile, row, column, 1); tiles are filled with their number."""

    def __init__(self) -> None:
        super().__init__(width=4, patch_size=PATCH, image_size=28, extra=1, mean=(0,) * 3, std=(1 / 255,) * 3)

    def encode(self, pixels: Tensor) -> Tensor:
        rows, columns = self.grid(pixels.shape[-1], pixels.shape[-2])
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        number = pixels[:, 0, 0, 0].round()[:, None, None].expand(-1, rows, columns)
        named = torch.stack([number, *(x.expand_as(number) for x in (row, column)), torch.ones_like(number)], dim=-1)
        return torch.cat([torch.full((len(pixels), 1, 4), -9.0), named.flatten(1, 2)], dim=1)


def tile(rows: int, columns: int, **more: Any) -> Tile:
    size = (columns * PATCH, rows * PATCH)
    return Tile(content=size, canvas=size, offset=(0, 0), box=(0, 0, *size), **more)


def plan_of(*tiles: Tile, **more: Any) -> Plan:
    values: dict[str, Any] = {"image": (100, 80), "grid": (1, 1), "overview": 0, "tokens": 0}
    return Plan(tiles=tiles, **(values | more))


def produce(connector: Connector, *plans: Plan, marker: Any = None) -> list[list[Place]]:
    """What the connector makes of rows of these plans, whose tiles are numbered through; rounded to three digits."""
    pixels: list[Tensor] = []
    for plan in plans:
        for planned in plan.tiles:
            width, height = planned.size
            pixels.append(torch.full((3, height, width), len(pixels), dtype=torch.uint8))
    visual = FrontEnd(Naming().freeze())(Tiles(pixels, list(plans)))
    embeds, mask = connector(visual) if marker is None else connector(visual, None, marker)
    rows = [
        [tuple(round(x, 3) for x in token) for token in row[own].tolist()]
        for row, own in zip(embeds, mask, strict=True)
    ]
    extra = [0 if marker is None else plan.markers for plan in plans]
    assert [len(row) for row in rows] == [connector.count_tokens(p) + n for p, n in zip(plans, extra, strict=True)]
    return rows


def grid(number: float, rows: int, columns: int, end: float | None = None) -> list[Place]:
    """The tokens of a tile row by row, with something after each row."""
    found: list[Place] = []
    for row in range(rows):
        found += [(number, row, column, 1) for column in range(columns)]
        found += [] if end is None else [(end,) * 4]
    return found


def mlp() -> MLP:
    connector = MLP(4, 4)
    connector.mlp = nn.Identity()
    nn.init.constant_(connector.image_newline, NEWLINE)
    return connector


def compressor() -> Compressor:
    connector = Compressor(4, 4, patch=PATCH)
    connector.proj = nn.Identity()
    for name, value in (("newline", NEWLINE), ("begin", BEGIN), ("sep", SEP), ("end", END)):
        nn.init.constant_(getattr(connector, f"image_{name}"), value)
    return connector


def index_tiles(count: int, side: int) -> list[Tensor]:
    """Projected tiles of float[side, side, 4] that hold (tile, row, column, 0)."""
    line = torch.arange(float(side))
    row, column = line[:, None].expand(side, side), line.expand(side, side)
    return [torch.stack([torch.full_like(row, n), row, column, torch.zeros_like(row)], dim=-1) for n in range(count)]


def test_anyres_as_released_without_interpolation() -> None:
    """OneVision's own sequence of 385x384: two crops side by side, of whose padding 13 columns go on either side."""
    crop = tile(27, 27)
    plan = plan_of(crop, crop, crop, image=(385, 384), grid=(2, 1), fine=(27, 28), newline="row")
    made = mlp().sequence(index_tiles(3, 27), plan)
    assert len(made) == mlp().count_tokens(plan) == 1512
    assert made[[0, 728, 729, 742, 743, 756, 757, 758]].tolist() == [
        *([0, 0, 0, 0], [0, 26, 26, 0]),
        *([1, 0, 13, 0], [1, 0, 26, 0], [2, 0, 0, 0], [2, 0, 13, 0], [NEWLINE] * 4),
        [1, 1, 13, 0],
    ]


def test_anyres_as_released_with_interpolation() -> None:
    """OneVision's own sequence of 2048x1536 with at most four times 729 tokens: 108 x 144 of 162 become 46 x 62."""
    crop = tile(27, 27)
    plan = plan_of(*[crop] * 25, image=(2048, 1536), grid=(6, 4), fine=(46, 62), newline="row")
    made = mlp().sequence(index_tiles(25, 27), plan)
    assert len(made) == mlp().count_tokens(plan) == 729 + 46 * 63
    row, columns = 0.674, [9.661, 11.984, 14.306]
    known = torch.tensor([[1, row, column, 0] for column in columns] + [[2, row, 1.242, 0]])
    torch.testing.assert_close(made[[729, 730, 731, 737]], known, atol=6e-4, rtol=0)
    between = torch.tensor([2.79, row, 5.452, 0])  # two crops mixed
    torch.testing.assert_close(made[748], between, atol=6e-4, rtol=0)


def test_anyres_with_no_rows_left_and_several_pictures() -> None:
    """An even grid can lose all its rows; of several pictures each ends with a newline, in parts of one row."""
    crop = tile(2, 2)
    narrow = plan_of(crop, crop, crop, image=(1000, 1), grid=(2, 1), fine=(0, 4), newline="row")
    alone = plan_of(crop, newline="end")
    both = Plan.join([alone, plan_of(tile(1, 2), newline="end")])
    first, second = produce(mlp(), narrow, both)
    assert first == grid(0, 2, 2)
    assert second == [*grid(3, 2, 2), (NEWLINE,) * 4, *grid(4, 1, 2), (NEWLINE,) * 4]


@pytest.mark.parametrize("newline", ["", "row", "frame", "end"])
def test_frames_of_a_clip(newline: Any) -> None:
    """Frames of 2x4 are interpolated to 1x2, which are the means of halves."""
    frame = tile(2, 4)
    clip = plan_of(frame, replace(frame, frames=(1,)), overview=None, fine=(1, 2), newline=newline)
    (row,) = produce(mlp(), clip)
    halves = [[(number, 0.5, 0.5, 1), (number, 0.5, 2.5, 1)] for number in (0, 1)]
    line, none = [(NEWLINE,) * 4], []
    after = line if newline in ("row", "frame") else none
    assert row == [*halves[0], *after, *halves[1], *(line if newline else none)]


def test_two_adapters_keep_the_pairs_together_through_crops_and_rows() -> None:
    connector = MLP(4, 4, adapters=2)
    connector.mlp = connector.second = nn.Identity()
    crop = tile(2, 2)
    plan = plan_of(crop, crop, crop, image=(100, 50), grid=(2, 1), fine=(2, 4), newline="row")
    doubled = [
        t.repeat_interleave(2, dim=1) + torch.tensor([0, 0.5]).repeat(2)[None, :, None] for t in index_tiles(3, 2)
    ]
    made = connector.sequence(doubled, plan)
    assert len(made) == connector.count_tokens(plan) == 8 + 2 * (8 + 1)
    assert made[8:16, 0].tolist() == [1, 1.5, 1, 1.5, 2, 2.5, 2, 2.5]
    assert torch.equal(made[16], connector.image_newline)
    with pytest.raises(UsageError, match=r"newlines after rows of 3x1 crops .*but 2 crops"):
        connector.sequence(doubled, replace(plan, grid=(3, 1)))


def test_oryx_two_views_and_a_clip() -> None:
    """Pictures are doubled; a clip's frames of 4x4 become 2x2 tokens, which the mean of a block and its equal read."""
    connector = compressor()
    picture = plan_of(tile(1, 2), tile(2, 3), fine=(2, 3))
    frame = tile(4, 4)
    clip = plan_of(frame, replace(frame, frames=(1,)), overview=None, fine=(2, 2))
    for projector in (connector.vlm_query_projector, connector.vlm_key_projector):
        nn.init.zeros_(projector.weight)  # all keys are equal, so that the mean is added to the mean
    first, second = produce(connector, picture, clip)
    twice = [
        tuple(2 * x if x >= 0 else x for x in token) for token in [*grid(0, 1, 2, NEWLINE), *grid(1, 2, 3, NEWLINE)]
    ]
    assert first == [(BEGIN,) * 4, *twice[:3], (SEP,) * 4, *twice[3:], (END,) * 4]
    assert len(first) == 3 + 1 * (2 + 1) + 2 * (3 + 1)
    frames = []
    for number in (2, 3):
        for row in (1, 5):
            frames += [(2 * number, row, 1, 2), (2 * number, row, 5, 2), (NEWLINE,) * 4]
        frames.append((SEP,) * 4)
    assert second == [(BEGIN,) * 4, *frames, (END,) * 4]
    assert len(second) == 2 + 2 * (2 * (2 + 1) + 1)
    with pytest.raises(UsageError, match="joins 2x2 patches, but a tile has 4x5"):
        connector.count_tokens(plan_of(tile(4, 5), overview=None, fine=(2, 2)))


@pytest.mark.parametrize("kind", [PixelShuffleMLP, PatchMerger])
def test_blocks_of_four_row_by_row(kind: Any) -> None:
    """The tiles in their order; in a block the upper two patches, then the lower two."""
    connector = kind(4, 4)
    connector.mlp = nn.Identity()
    connector.ln_q = nn.Identity()
    (row,) = produce(connector, plan_of(tile(2, 4), tile(4, 2)))
    corners = [(0, 0, 0), (0, 0, 2), (1, 0, 0), (1, 2, 0)]
    assert [token[:3] for token in row] == corners
    assert row[1] == (0, 0, 2, 1, 0, 0, 3, 1, 0, 1, 2, 1, 0, 1, 3, 1)


def test_markers_stand_around_tiles_of_every_connector() -> None:
    """Slices, each with a comma or the end of its row, then the overview, as LLaVA-UHD has it; and in parts."""
    slices = [tile(2, 2, after=mark) for mark in (",", "\n")]
    uhd = plan_of(*slices, tile(2, 2), overview=2, grid=(2, 1))
    shown = plan_of(tile(2, 2, before="<img>"), tile(2, 2, after="</img>"), overview=None)
    vectors = {mark: torch.full((4,), -10.0 - number) for number, mark in enumerate((",", "\n", "<img>", "</img>"))}
    comma, line, start, stop = ((-10.0 - number,) * 4 for number in range(4))
    one, both = produce(mlp(), uhd, Plan.join([shown, uhd]), marker=vectors.__getitem__)
    assert one == [*grid(0, 2, 2), comma, *grid(1, 2, 2), line, *grid(2, 2, 2)]
    first = [start, *grid(3, 2, 2), *grid(4, 2, 2), stop]
    assert both == [*first, *grid(5, 2, 2), comma, *grid(6, 2, 2), line, *grid(7, 2, 2)]
    made = produce(compressor(), uhd, marker=vectors.__getitem__)[0]
    assert [token[0] for token in made if token[0] < 0] == [
        *(BEGIN, NEWLINE, NEWLINE, SEP, -10, NEWLINE, NEWLINE, SEP, -11, NEWLINE, NEWLINE, END),
    ]
    pooled = AvgPool(4, 4, queries=1)
    pooled.mlp = nn.Identity()
    assert produce(pooled, uhd, marker=vectors.__getitem__)[0] == [
        *((0, 0.5, 0.5, 1), comma, (1, 0.5, 0.5, 1), line, (2, 0.5, 0.5, 1))
    ]


class Sequencing(Connector):
    """One of somebody else's, with a `sequence` alone."""

    patch = PATCH

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens.unflatten(1, grid)

    def sequence(self, tiles: Any, plan: Plan) -> Tensor:
        return torch.cat([tile.flatten(0, 1) for tile in tiles])


def test_markers_around_a_sequence_of_ones_own() -> None:
    shown = plan_of(tile(1, 1, before="<img>"), tile(1, 2, after="</img>"))
    made = produce(Sequencing(), shown, marker=lambda text: torch.full((4,), -float(len(text))))[0]
    assert made == [(-5.0,) * 4, *grid(0, 1, 1), *grid(1, 1, 2), (-6.0,) * 4]
    between = plan_of(tile(1, 1, after=","), tile(1, 1))
    with pytest.raises(UsageError, match="no place for the markers between them; give it `pieces`"):
        produce(Sequencing(), between, marker=lambda text: torch.zeros(4))


OTHERS = [name for name in CONNECTORS if name != "qformer"]
#: Whose grids every connector divides: one tile, slices and an overview, AnyRes' crops, a clip, several pictures.
SQUARE, WIDE = tile(4, 4), tile(4, 8)
PLANS = [
    plan_of(SQUARE),
    plan_of(WIDE, SQUARE, overview=1),
    plan_of(SQUARE, SQUARE, SQUARE, image=(100, 60), grid=(2, 1), fine=(4, 8), newline="row"),
    plan_of(WIDE, replace(WIDE, frames=(1,)), overview=None, fine=(2, 4), newline="frame"),
    Plan.join([plan_of(SQUARE, newline="end"), plan_of(WIDE, newline="end")]),
]


@pytest.mark.parametrize("name", OTHERS)
def test_planned_is_produced_and_a_batch_is_its_rows(name: str) -> None:
    """Of every connector for every kind of plan; and a gradient reaches all that is trained."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"queries": 4} if name in ("resampler", "spatial_resampler", "avg_pool") else {}
    options |= {"queries": 4, "hidden": 8, "depth": 1, "side": 4} if name == "c_abstractor" else {}
    options |= {"patch": PATCH} if name == "compressor" else {}
    connector = build(name, 4, 8, **options)
    encoder = Naming().freeze()
    sizes = [planned.size for plan in PLANS for planned in plan.tiles]
    pixels = [torch.randint(0, 255, (3, height, width), dtype=torch.uint8) for width, height in sizes]
    tiles = Tiles(pixels, PLANS)
    prefix = connector(FrontEnd(encoder)(tiles))
    assert prefix.mask.sum(dim=1).tolist() == [connector.count_tokens(plan) for plan in PLANS]
    for number, plan in enumerate(PLANS):
        alone = connector(FrontEnd(encoder)(tiles[number : number + 1])).embeds[0]
        assert len(alone) == connector.count_tokens(plan)
        torch.testing.assert_close(prefix.embeds[number, : len(alone)], alone, atol=1e-5, rtol=1e-5)
        assert not prefix.embeds[number, len(alone) :].any()
    asked = connector(FrontEnd(encoder)(tiles[:2]), [["what?", "where?"], []])
    torch.testing.assert_close(asked.embeds, prefix.embeds[:1, : asked.embeds.shape[1]].expand(2, -1, -1))
    prefix.embeds.square().sum().backward()
    lacks = {part for part, weight in connector.named_parameters() if weight.requires_grad and weight.grad is None}
    assert not lacks
    with pytest.raises(UsageError, match="reads 1 tokens of a patch, but this image encoder makes 2"):
        connector(replace(FrontEnd(encoder)(tiles), per_patch=2))
