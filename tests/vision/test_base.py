"""What every image encoder promises: tiles of any sizes, remainders refused or left unread, position tables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.model.frontend import FrontEnd
from qformer.types import Tiles, UsageError
from qformer.vision.base import Absent, VisionEncoder, resize_positions

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WIDTH = 8


class Patches(VisionEncoder):
    """Tokens that saw all patches; each patch twice, the second time doubled."""

    per_patch = 2

    def __init__(self) -> None:
        super().__init__(width=WIDTH, patch_size=14, image_size=28, extra=1)
        self.project = nn.Linear(3 * 14 * 14, WIDTH)
        self.calls: list[tuple[int, ...]] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.calls.append(tuple(pixels.shape))
        tokens = self.project(F.unfold(pixels, 14, stride=14).transpose(1, 2))
        whole = tokens.mean(dim=1, keepdim=True)
        return torch.cat([whole, torch.stack([tokens, 2 * tokens], dim=2).flatten(1, 2) + whole], dim=1)


class Floors(Patches):
    floors = True


def tiles() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, h, w, generator=generator) for h, w in ((28, 28), (14, 42), (28, 28), (42, 14), (14, 42))]


def test_tiles_of_any_sizes_are_those_one_by_one_in_their_order() -> None:
    torch.manual_seed(0)
    encoder = Patches()
    rows = encoder.encode_all(tiles())
    assert encoder.calls == [(2, 3, 28, 28), (2, 3, 14, 42), (1, 3, 42, 14)]  # those of one size together
    assert [len(row) for row in rows] == [9, 7, 9, 7, 7]
    for row, tile in zip(rows, tiles(), strict=True):
        torch.testing.assert_close(row, encoder(tile[None])[0], **CLOSE)


def test_tokens_of_a_patch_are_counted() -> None:
    encoder = Patches().freeze()
    visual = FrontEnd(encoder)(Tiles(tiles(), [Tiles.from_pixels(tile[None]).plans[0] for tile in tiles()]))
    assert visual.per_patch == 2
    for row, (rows, columns) in zip(visual.rows, visual.grids, strict=True):
        assert len(row) == visual.extra + visual.per_patch * rows * columns


def test_without_an_adapter_tokens_stay_as_they_are() -> None:
    encoder = Patches().freeze()
    frontend, pixels = FrontEnd(encoder), torch.rand(2, 3, 28, 28)
    assert frontend(Tiles.from_pixels(pixels)).padded()[0].equal(encoder(pixels))
    assert frontend.encode(pixels).equal(encoder(pixels))
    assert not [name for name in frontend.state_dict() if not name.startswith("encoder.")]


def test_the_rest_of_a_tile_is_refused_or_left_unread() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 41, 30)
    with pytest.raises(UsageError, match="30x41 pixels does not divide into patches of 14"):
        Patches()(pixels)
    encoder = Floors()
    assert encoder.grid(30, 41) == (2, 2)
    tokens = encoder(pixels)
    assert tokens.shape == (1, 1 + 2 * 4, WIDTH)
    assert tokens.equal(encoder(pixels[..., :28, :28]))
    changed = pixels.clone()
    changed[..., 28:, :] = changed[..., :, 28:] = 0
    assert tokens.equal(encoder(changed))
    with pytest.raises(UsageError, match="13x41 pixels is smaller than a patch of 14"):
        encoder.grid(13, 41)


def test_position_tables_are_resized_as_asked() -> None:
    """Bilinear stays between two neighbors; bicubic looks further and overshoots at an edge."""
    table = torch.cat([torch.full((1, 1, 1), 9.0), torch.tensor([0.0, 0, 1, 1]).repeat(4).view(1, 16, 1)], dim=1)
    linear = resize_positions(table, 1, (8, 8), mode="bilinear")
    assert linear[0, 0, 0] == 9
    torch.testing.assert_close(linear[0, 1:9, 0], torch.tensor([0, 0, 0, 0.25, 0.75, 1, 1, 1]))
    cubic = resize_positions(table, 1, (8, 8))
    assert cubic[0, 1:].min() < 0 < 1 < cubic[0, 1:].max()
    assert resize_positions(table, 1, (4, 4), mode="bilinear") is table


def test_an_encoder_says_how_its_table_is_resized() -> None:
    from qformer.vision.options import EvaConfig

    encoder = EvaConfig(image_size=28, patch_size=14, width=8, depth=1, heads=2, mlp_hidden=8).build().eval()
    with torch.no_grad():
        encoder.pos_embed.copy_(torch.randn(1, 5, 8))
        pixels = torch.rand(1, 3, 56, 56)
        bicubic = encoder(pixels)
        encoder.interpolation = "bilinear"
        assert not torch.allclose(encoder(pixels), bicubic, atol=1e-4)


def test_what_stands_for_an_encoder_knows_its_tokens() -> None:
    """A store of today says what is unusual of an encoder; older ones say nothing of it."""
    old = Absent(width=4, patch_size=14, image_size=28, extra=1)
    new = Absent(width=4, patch_size=14, image_size=28, extra=1, per_patch=2, floors=True)
    assert (old.per_patch, old.floors, new.per_patch, new.floors) == (1, False, 2, True)
    with pytest.raises(UsageError, match="does not divide"):
        old.grid(30, 30)
    assert new.grid(30, 30) == (2, 2)
