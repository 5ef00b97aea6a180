"""Tiles of unequal sizes as one sequence: as one by one, without padding, in each tower that is made of our blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer import vision
from qformer.model.frontend import FrontEnd
from qformer.stages.recompute import recompute_layers
from qformer.types import Tiles, UsageError
from qformer.vision import packed
from qformer.vision.levels import levels
from qformer.vision.packed import Segments, Tower, attend

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {"image_size": 56, "patch_size": 14, "width": 32, "depth": 3, "heads": 4, "mlp_hidden": 48}
TOWERS = ("clip", "eva", "oryx", "qwen2vl")


def make(name: str, **options: Any) -> Tower:
    """A tiny tower in which no parameter has a neutral value, so that one left out shows."""
    encoder = vision.build(name, **{**SIZES, "precision": "fp32", **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(encoder, Tower)
    return encoder.eval()


def tiles() -> list[Tensor]:
    """Six tiles of four sizes, two of which come twice but not side by side."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((56, 56), (28, 84), (56, 56), (84, 28), (28, 84), (14, 14))
    return [torch.rand(3, h, w, generator=generator) for h, w in sizes]


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_packed_is_one_by_one_without_padding(name: str) -> None:
    encoder = make(name)
    expected = [encoder(tile[None])[0] for tile in tiles()]
    calls: list[int] = []
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _module, given, _out: calls.append(given[0].numel() // 32))
    rows = encoder.encode_all(tiles())
    total = sum(map(len, expected))
    blocks = [count for count in calls if count == total]
    assert len(blocks) == 2 * 3  # each block normalizes twice, all tokens at once and nothing beside them
    assert sum(count for count in calls if count != total) in (0, total)  # CLIP normalizes before its blocks too
    for row, alone in zip(rows, expected, strict=True):
        assert row.dtype == torch.float32
        torch.testing.assert_close(row, alone, **CLOSE)


@torch.no_grad()
def test_tiles_of_one_size_are_those_of_a_batch_bit_by_bit() -> None:
    encoder, pixels = make("eva"), torch.rand(3, 3, 28, 56)
    assert torch.stack(encoder.encode_all(list(pixels))).equal(encoder(pixels))
    assert encoder.encode_all([]) == []


@torch.no_grad()
def test_long_batches_become_several_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make("oryx")
    whole = encoder.encode_all(tiles())
    seen: list[int] = []
    encoder.blocks[0].register_forward_hook(lambda _module, given, _out: seen.append(given[0].numel() // 32))
    monkeypatch.setattr(packed, "SEQUENCE", 20)
    rows = encoder.encode_all(tiles())
    assert seen == [16, 16, 12, 12, 12 + 1]
    for row, expected in zip(rows, whole, strict=True):
        torch.testing.assert_close(row, expected, **CLOSE)


def test_gradients_are_those_of_one_by_one() -> None:
    encoder = make("qwen2vl")
    found = []
    for encode in (encoder.encode_all, lambda given: [encoder(tile[None])[0] for tile in given]):
        encoder.zero_grad()
        sum(row.square().mean() for row in encode(tiles())).backward()
        found.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    for name, gradient in found[1].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[0][name], gradient, atol=1e-5, rtol=1e-4)


def test_recomputed_layers_take_a_packed_sequence() -> None:
    encoder = make("eva")
    before = encoder.encode_all(tiles())
    recompute_layers(encoder)
    after = encoder.encode_all(tiles())
    for row, expected in zip(after, before, strict=True):
        assert row.equal(expected)
    sum(row.sum() for row in after).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("name", TOWERS)
def test_frozen_towers_give_no_gradient_and_stay_so(name: str) -> None:
    encoder = make(name).freeze()
    torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(row.requires_grad for row in encoder.encode_all([tile.requires_grad_() for tile in tiles()]))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_the_residual_stream_stays_in_single(name: str) -> None:
    """Stored in half, and under autocast."""
    single, half = make(name), vision.build(name, **SIZES, precision="fp16")
    half.load_state_dict(single.state_dict())
    kinds = {type(m) for m in half.modules() for p in m.parameters(recurse=False) if p.dtype == torch.half}
    assert nn.LayerNorm not in kinds
    assert kinds & {nn.Conv2d, nn.Conv3d}
    expected = single.encode_all(tiles())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = single.encode_all(tiles())
    for rows, most in ((half.eval().encode_all(tiles()), 0.05), (mixed, 0.5)):
        for row, exact in zip(rows, expected, strict=True):
            assert row.dtype == torch.float32
            assert 0 < (row - exact).abs().max() < most


@torch.no_grad()
def test_the_front_end_packs_and_knows_the_grids() -> None:
    encoder = make("qwen2vl").freeze()
    given = [(255 * tile).byte() for tile in tiles()]
    visual = FrontEnd(encoder)(Tiles(given, [Tiles.from_pixels(tile[None]).plans[0] for tile in given]))
    assert visual.grids == [(4, 4), (2, 6), (4, 4), (6, 2), (2, 6), (1, 1)]
    for row, tile in zip(visual.rows, given, strict=True):
        torch.testing.assert_close(row, encoder(tile[None] / 255)[0], **CLOSE)


def test_one_kernel_attends_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stand-in computes with a block mask, from what the kernel is given."""
    given: list[Any] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, most: int, same: int) -> Tensor:
        given.append((starts.tolist(), starts.dtype, most))
        assert ends is starts
        assert same == most
        inside = torch.bucketize(torch.arange(len(query)), starts[1:], right=True)
        heads = (part.transpose(0, 1) for part in (query, key, value))
        return F.scaled_dot_product_attention(*heads, attn_mask=inside[:, None] == inside).transpose(0, 1)

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, 2, 8, generator=generator) for _ in range(3))
    segments = Segments([3, 3, 1, 5], query.device)
    expected = attend(query, key, value, segments)
    monkeypatch.setattr(packed, "varlen_attn", kernel)
    assert attend(query, key, value, segments).equal(expected)
    assert not given  # not on a CPU
    monkeypatch.setattr(packed, "_has_kernel", lambda _query: True)
    torch.testing.assert_close(attend(query, key, value, segments), expected, **CLOSE)
    assert given == [([0, 3, 6, 7, 12], torch.int32, 5)]


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_layers_are_concatenated_the_last_one_first(name: str) -> None:
    """Also in a packed sequence; the tokens of each are those of a tower that ends there."""
    encoder = make(name, layers=[1, -1])
    assert encoder.width == 2 * 32
    ends = [make(name), make(name, depth=1)]
    for end in ends:
        end.load_state_dict({key: encoder.state_dict()[key] for key in end.state_dict()})
    rows = encoder.encode_all(tiles())
    for row, tile in zip(rows, tiles(), strict=True):
        expected = torch.cat([end(tile[None])[0] for end in ends], dim=1)
        torch.testing.assert_close(encoder(tile[None])[0], expected, **CLOSE)
        torch.testing.assert_close(row, expected, **CLOSE)


def test_blocks_behind_the_last_layer_do_not_run() -> None:
    encoder = make("eva", layers=[0, 2])
    tokens = encoder(tiles()[0][None])
    assert tokens.shape == (1, 17, 64)
    tokens.square().mean().backward()
    idle = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert idle == {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert idle == {name for name, _ in encoder.named_parameters() if name.startswith("blocks.2.")}


def test_layers_are_counted_as_transformers_does() -> None:
    assert levels(None, 3) == (3,)
    assert levels([1, -1, 2], 3) == (3, 2, 1)
    assert levels([-4, 3], 3) == (3, 0)
    with pytest.raises(UsageError, match="layer 4 does not exist in a model of 3 blocks; use -4 to 3"):
        vision.build("eva", **SIZES, layers=[1, 4])
    with pytest.raises(UsageError, match=r"vision\.layers is \[3, -1\]; name one layer or more, each of them once"):
        vision.build("qwen2vl", **SIZES, layers=[3, -1])
    with pytest.raises(UsageError, match=r"vision\.layers is \[\]; name one"):
        vision.build("oryx", **SIZES, layers=[])


def test_a_tile_that_is_not_made_of_patches_is_refused_in_any_company() -> None:
    with pytest.raises(UsageError, match="30x28 pixels does not divide into patches of 14"):
        make("eva").encode_all([*tiles(), torch.rand(3, 28, 30)])


def test_neighbors_of_equal_length_attend_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: Counter[tuple[int, ...]] = Counter()
    plain = F.scaled_dot_product_attention

    def counted(query: Tensor, *others: Tensor) -> Tensor:
        shapes[tuple(query.shape)] += 1
        return plain(query, *others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    make("oryx", depth=1).encode_all(tiles())
    assert shapes == {(2, 4, 16, 8): 1, (3, 4, 12, 8): 1, (1, 4, 1, 8): 1}
