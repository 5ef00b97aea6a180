"""Image tokens as rows of their own length: packed and padded without a copy where it can be, selected and joined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qformer.model.qformer import QFormer
from qformer.schema import QFormerConfig
from qformer.types import Plan, Tile, VisualTokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WIDTH = 6
TILE = Tile((28, 28), (28, 28), (0, 0), (0, 0, 28, 28))


def plan(tiles: int) -> Plan:
    return Plan((28, 28), (TILE,) * tiles, (1, 1), None, 4)


def uneven() -> VisualTokens:
    """Three images of two, one and three tiles, whose lengths all differ."""
    generator = torch.Generator().manual_seed(0)
    grids = [(1, 2), (3, 3), (2, 2), (1, 1), (4, 3), (2, 1)]
    rows = [torch.randn(1 + h * w, WIDTH, generator=generator) for h, w in grids]
    return VisualTokens(rows, grids, 1, [plan(2), plan(1), plan(3)])


def even(requires_grad: bool = False) -> tuple[Tensor, VisualTokens]:
    packed = torch.randn(12, WIDTH, requires_grad=requires_grad)
    return packed, VisualTokens.unpack(packed, [4, 4, 4], [(2, 2)] * 3, 0, [plan(2), plan(1)])


@pytest.fixture
def qformer() -> QFormer:
    torch.manual_seed(1)
    model = QFormer(
        QFormerConfig(
            hidden_size=16, layers=3, heads=2, intermediate_size=24, queries=4, encoder_width=WIDTH, vocab_size=9
        )
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def test_padding_is_zero_and_the_mask_tells_it() -> None:
    visual = uneven()
    padded, mask = visual.padded()
    assert visual.lengths == [3, 10, 5, 2, 13, 3]
    assert padded.shape == (6, 13, WIDTH)
    assert mask is not None
    assert mask.tolist() == [[place < length for place in range(13)] for length in visual.lengths]
    for row, length, whole in zip(visual.rows, visual.lengths, padded, strict=True):
        assert whole[:length].equal(row)
        assert not whole[length:].any()


def test_rows_of_one_length_are_padded_without_a_copy_or_a_mask() -> None:
    packed, visual = even()
    padded, mask = visual.padded()
    assert mask is None
    assert padded.shape == (3, 4, WIDTH)
    assert padded.data_ptr() == packed.data_ptr() == visual.rows[0].data_ptr()
    assert visual.packed is packed


def test_changed_rows_are_never_answered_from_the_tensor_they_once_were_views_of() -> None:
    packed, visual = even()
    other = replace(visual, rows=[torch.zeros(4, WIDTH)] * 3)
    assert not other.packed.any()
    visual.rows[1] = torch.full((4, WIDTH), 7.0)
    assert visual.padded()[0][1].eq(7).all()
    assert visual.padded()[0][2].equal(packed[8:])


def test_gradients_reach_what_the_rows_are_views_of() -> None:
    packed, visual = even(requires_grad=True)
    (visual.padded()[0].sum() + visual.rows[2].sum() + visual.select([1, 1]).packed.sum()).backward()
    assert packed.grad is not None
    assert packed.grad[:, 0].tolist() == [1] * 8 + [4] * 4
    rows = [row.requires_grad_() for row in uneven().rows]
    replace(uneven(), rows=rows).padded()[0].sum().backward()
    assert all(row.grad is not None and row.grad.eq(1).all() for row in rows)


def test_images_are_selected_with_all_their_tiles() -> None:
    visual = uneven()
    chosen = visual.select([2, 0])
    assert len(chosen) == 2
    assert chosen.counts == [3, 2]
    assert chosen.lengths == [2, 13, 3, 3, 10]
    assert chosen.grids == [(1, 1), (4, 3), (2, 1), (1, 2), (3, 3)]
    assert chosen.plans == [visual.plans[2], visual.plans[0]]
    assert chosen.packed.equal(visual.packed[visual.places([2, 0])])
    assert all(own is visual.rows[tile] for own, tile in zip(chosen.rows, [3, 4, 5, 0, 1], strict=True))


def test_no_image_still_has_a_width_and_a_gradient() -> None:
    """Without it, the process that fetches no image would miss a collective of the backward pass."""
    packed, visual = even(requires_grad=True)
    none = visual.select([])
    assert len(none) == 0
    assert none.packed.shape == (0, WIDTH)
    assert none.padded()[0].shape == (0, 0, WIDTH)
    assert none.places([]).shape == (0,)
    none.packed.sum().backward()
    assert packed.grad is not None
    assert VisualTokens.join([none, none]).packed.shape == (0, WIDTH)


def test_parts_of_unequal_lengths_are_joined() -> None:
    (_, first), second = even(), uneven()
    joined = VisualTokens.join([first, second])
    assert joined.counts == [2, 1, 2, 1, 3]
    assert joined.lengths == [4, 4, 4, *second.lengths]
    assert joined.plans == first.plans + second.plans
    assert joined.packed.equal(torch.cat([first.packed, second.packed]))
    stranger = VisualTokens(second.rows, [], 1, [], counts=second.counts)  # of another process
    assert VisualTokens.join([first, stranger]).counts == joined.counts
    assert VisualTokens.join([first, stranger]).select([4]).lengths == second.lengths[3:]


def test_tiles_that_are_not_those_of_the_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 tiles of tokens, but the plans hold 3"):
        VisualTokens(uneven().rows[:2], [(1, 2), (3, 3)], 1, [plan(3)])


def test_unequal_rows_are_read_as_each_by_itself(qformer: QFormer) -> None:
    """Tile by tile, and image by image, where the tiles stand one after the other without a gap."""
    visual = uneven()
    together = qformer.encode_image(visual)
    assert together.shape == (6, 4, 16)
    for row, queries in zip(visual.rows, together, strict=True):
        torch.testing.assert_close(queries, qformer.encode_image(row[None])[0], **CLOSE)
    per_tile, per_image = qformer.join_keys_values(visual)
    torch.testing.assert_close(qformer.encode_image(per_tile), together)
    assert [keys.shape[2] for keys, _ in per_image.layers] == [18, 18]  # the longest image, 2 + 13 + 3
    for image, queries in enumerate(qformer.encode_image(per_image)):
        alone = visual.select([image]).packed
        torch.testing.assert_close(queries, qformer.encode_image(alone[None])[0], **CLOSE)


def test_equal_rows_are_read_as_one_tensor_to_the_bit(qformer: QFormer) -> None:
    packed, visual = even()
    assert qformer.encode_image(visual).equal(qformer.encode_image(packed.view(3, 4, WIDTH)))
    single = VisualTokens.unpack(packed, [4, 4, 4], [(2, 2)] * 3, 0, [plan(1)] * 3)
    per_tile, per_image = qformer.join_keys_values(single)
    assert per_tile is per_image
    assert per_tile.mask is None


def test_a_tile_is_as_large_as_it_is_scaled_to() -> None:
    assert TILE.size == (28, 28)
    assert replace(TILE, scaled=(14, 42)).size == (14, 42)
    assert (TILE.fill, TILE.frames, TILE.before, TILE.after) == ((0, 0, 0), (0,), "", "")


def test_markers_are_counted_apart_from_tokens() -> None:
    tiles = (replace(TILE, before="<img>", after=","), TILE, replace(TILE, after="</img>"))
    marked = Plan((28, 28), tiles, (3, 1), None, 12)
    assert (marked.markers, marked.tokens) == (3, 12)
    assert (plan(2).markers, plan(2).fine, plan(2).newline, plan(2).parts) == (0, None, "", ())


def test_pictures_of_one_row_are_joined_in_their_order() -> None:
    first, second = replace(plan(1), overview=0), replace(plan(2), tokens=9)
    both = Plan.join([first, second])
    assert both.parts == (first, second)
    assert both.tiles == first.tiles + second.tiles
    assert both.tokens == 13
    assert both.overview is None
    assert Plan.join([both, first]).parts == (first, second, first)  # parts have none themselves
    assert Plan.join([first]) is first
    with pytest.raises(ValueError, match="no plans"):
        Plan.join([])
