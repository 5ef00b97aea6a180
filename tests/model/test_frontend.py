"""Tiles of several sizes through the frozen encoder, their rows joined per image, and BLIP-2's own connector."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qformer.model.connectors import QFormerConnector
from qformer.model.frontend import FrontEnd, TokenNorm, join_tiles
from qformer.model.qformer import QFormer
from qformer.resolution.base import ResolutionStrategy, cut_all
from qformer.schema import QFormerConfig
from qformer.types import Plan, Tile, Tiles, UsageError
from qformer.vision.base import VisionEncoder

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WIDTH, QUERIES = 12, 4


class Patches(VisionEncoder):
    """A Linear over patches of 14, in front of them a token that saw all of them."""

    def __init__(self):
        super().__init__(width=WIDTH, patch_size=14, image_size=28, extra=1)
        self.project = nn.Linear(3 * 14 * 14, WIDTH)
        self.sizes = []

    def encode(self, pixels):
        self.sizes.append((len(pixels), pixels.shape[-1], pixels.shape[-2]))
        tokens = self.project(F.unfold(pixels, 14, stride=14).transpose(1, 2))
        summary = tokens.mean(dim=1, keepdim=True)
        return torch.cat([summary, tokens + summary], dim=1)


class Views(ResolutionStrategy):
    """An overview of 28 x 28; beside it half of a wide image, or both halves of a very wide one, 28 x 42 each."""

    def plan(self, width, height):
        tiles = [Tile((28, 28), (28, 28), (0, 0), (0, 0, 28, 28))]
        if width > height:
            tiles.append(Tile((56, 42), (56, 42), (0, 0), (0, 0, 28, 42)))
        if width > 2 * height:
            tiles.append(Tile((56, 42), (56, 42), (0, 0), (28, 0, 56, 42)))
        return Plan((width, height), tuple(tiles), (len(tiles) - 1 or 1, 1), 0, QUERIES * len(tiles))


@pytest.fixture
def frontend():
    torch.manual_seed(0)
    frontend = FrontEnd(Patches().freeze(), adapter=TokenNorm(WIDTH))
    nn.init.normal_(frontend.norm.weight)
    nn.init.normal_(frontend.norm.bias)
    return frontend


@pytest.fixture
def connector():
    torch.manual_seed(1)
    config = QFormerConfig(
        hidden_size=16, layers=2, heads=2, intermediate_size=24, queries=QUERIES, encoder_width=WIDTH, vocab_size=9
    )
    connector = QFormerConnector(QFormer(config), 10)
    for weight in connector.parameters():
        nn.init.normal_(weight, std=0.3)
    return connector.eval()


def uneven_images():
    """Two, one, three and two tiles, of two sizes that alternate."""
    generator = torch.Generator().manual_seed(4)
    sizes = [(40, 30), (30, 40), (90, 30), (50, 40)]
    pixels = [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for w, h in sizes]
    return cut_all(pixels, Views())


def test_norm_is_that_of_the_image_tokens_with_the_eps_of_the_original(frontend):
    tiles = Tiles.from_pixels(torch.rand(3, 3, 42, 28))
    with torch.no_grad():
        frontend.encoder.project.weight *= 0.02  # small tokens, so that eps matters
        frontend.encoder.project.bias *= 0.02
    visual = frontend(tiles)
    tokens = frontend.encoder(torch.stack(tiles.pixels))
    centred = tokens - tokens.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * frontend.norm.weight
    torch.testing.assert_close(visual.padded()[0], expected + frontend.norm.bias, **CLOSE)
    assert visual.padded()[0].shape == (3, 1 + 6, WIDTH)
    assert visual.padded()[1] is None
    assert visual.grids == [(3, 2)] * 3
    assert visual.extra == 1
    assert visual.counts == [1, 1, 1]
    assert visual.plans is tiles.plans


def test_norm_is_computed_in_fp32(frontend):
    tiles = Tiles.from_pixels(torch.rand(2, 3, 28, 28))
    exact = frontend(tiles).padded()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = frontend(tiles).padded()[0]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, exact, atol=0.2, rtol=0)


def test_bytes_and_fractions_are_the_same_pixels(frontend):
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    by_bytes = frontend(Tiles.from_pixels(pixels)).padded()[0]
    torch.testing.assert_close(by_bytes, frontend(Tiles.from_pixels(pixels.float() / 255)).padded()[0], **CLOSE)


def test_tiles_of_all_sizes_come_out_in_their_order(frontend):
    tiles = uneven_images()
    visual = frontend(tiles)
    assert frontend.encoder.sizes == [(4, 28, 28), (4, 28, 42)]  # one call for each size
    padded, mask = visual.padded()
    assert padded.shape == (8, 7, WIDTH)
    assert visual.counts == [2, 1, 3, 2]
    lengths = [5, 7, 5, 5, 7, 7, 5, 7]
    assert mask.tolist() == [[place < length for place in range(7)] for length in lengths]
    assert visual.grids == [(3, 2) if length == 7 else (2, 2) for length in lengths]
    for index, tile in enumerate(tiles.pixels):
        torch.testing.assert_close(visual.rows[index], frontend.encode(tile[None])[0], **CLOSE)


def test_a_larger_size_first_is_put_back_too(frontend):
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, h, 28, generator=generator) for h in (42, 14, 28, 14, 42)]
    plan = Views().plan(28, 28)
    visual = frontend(Tiles(pixels, [plan] * 5))
    assert visual.lengths == [7, 3, 5, 3, 7]
    for index, tile in enumerate(pixels):
        torch.testing.assert_close(visual.rows[index], frontend.encode(tile[None])[0], **CLOSE)


def test_a_tile_that_is_not_made_of_patches_is_refused(frontend):
    with pytest.raises(UsageError, match="30x28"):
        frontend(Tiles.from_pixels(torch.rand(1, 3, 28, 30)))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (torch.rand(2, 28, 28, 3), r"the pixels are float32\[2, 28, 28, 3\]; give uint8\[N, 3, h, w\]"),
        (torch.zeros(2, 4, 28, 28, dtype=torch.uint8), r"the pixels are uint8\[2, 4, 28, 28\]"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.bool), r"the pixels are bool"),
        (torch.rand(3, 28, 28), r"the pixels are float32\[3, 28, 28\]"),
        (torch.rand(2, 3, 28, 28) * 255, "outside 0 to 1"),
        (torch.rand(2, 3, 28, 28) - 0.5, "outside 0 to 1"),
        (torch.full((2, 3, 28, 28), float("nan")), "outside 0 to 1"),
    ],
)
def test_pixels_that_are_none(frontend, pixels, said):
    with pytest.raises(UsageError, match=said):
        frontend(Tiles.from_pixels(pixels))
    with pytest.raises(UsageError, match=said):
        frontend.encode(pixels)


def test_fractions_stay_between_0_and_1_when_they_are_resized(frontend):
    edge = torch.zeros(3, 40, 40)
    edge[:, :, 20:] = 1  # bicubic overshoots beside it
    tiles = frontend.tiles([edge])
    assert (tiles.pixels[0].min(), tiles.pixels[0].max()) == (0, 1)
    by_bytes = frontend.tiles([(edge * 255).byte()])
    torch.testing.assert_close(tiles.pixels[0] * 255, by_bytes.pixels[0].float(), atol=1.0, rtol=0)
    assert frontend(tiles).padded()[0].isfinite().all()


def test_norm_trains_although_the_encoder_is_frozen(frontend):
    frontend(uneven_images()).padded()[0].sum().backward()
    assert frontend.norm.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in frontend.encoder.parameters())


def test_join_tiles_puts_the_rows_of_an_image_behind_one_another():
    rows = torch.arange(12.0).view(4, 3, 1) + 1  # four tiles of three rows
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    joined, valid = join_tiles(rows, mask, [1, 2, 1])
    assert joined.squeeze(2).tolist() == [[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9], [10, 11, 12, 0, 0, 0]]
    assert valid.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    joined, valid = join_tiles(rows, None, [1, 3])
    assert joined.squeeze(2).tolist() == [[1, 2, 3, 0, 0, 0, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert valid.int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 9]


def test_join_tiles_of_equal_counts_has_no_padding():
    rows = torch.randn(4, 3, 2)
    joined, valid = join_tiles(rows, None, [2, 2])
    assert joined.equal(rows.view(2, 6, 2))
    assert valid is None
    mask = torch.rand(4, 3) > 0.5
    assert join_tiles(rows, mask, [2, 2])[1].equal(mask.view(2, 6))
    same_rows, same_mask = join_tiles(rows, mask, [1, 1, 1, 1])
    assert same_rows is rows
    assert same_mask is mask


def test_join_tiles_sends_gradient_back_to_every_row():
    rows = torch.randn(3, 2, 2, requires_grad=True)
    joined, _ = join_tiles(rows, None, [1, 2])
    (joined * 2).sum().backward()
    assert rows.grad.eq(2).all()


def test_connector_gives_every_image_its_counted_prefix(frontend, connector):
    tiles = uneven_images()
    prefix, mask = connector(frontend(tiles))
    counts = [connector.count_tokens(plan) for plan in tiles.plans]
    assert counts == [8, 4, 12, 8]
    assert prefix.shape == (4, 12, 10)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[place < count for place in range(12)] for count in counts]
    for b in range(4):
        alone, all_there = connector(frontend(tiles[b : b + 1]))
        assert all_there.all()
        assert alone.shape == (1, counts[b], 10)
        torch.testing.assert_close(prefix[b][mask[b]], alone[0], **CLOSE)
        one_by_one = [connector.qformer.encode_image(frontend.encode(t[None]))[0] for t in tiles[b : b + 1].pixels]
        torch.testing.assert_close(alone[0], connector.projection(torch.cat(one_by_one)), **CLOSE)


def test_connector_of_one_tile_is_one_token_per_query(frontend, connector):
    prefix, mask = connector(frontend(Tiles.from_pixels(torch.rand(3, 3, 28, 28))))
    assert prefix.shape == (3, QUERIES, 10)
    assert mask.shape == (3, QUERIES)
    assert mask.all()
