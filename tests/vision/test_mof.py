"""Mixtures of features against their arithmetic, and what they must not change: order, stores, frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTModel

from qformer import vision
from qformer.connectors.mlp import MLP
from qformer.model.frontend import FrontEnd
from qformer.resolution.base import cut_all
from qformer.resolution.fixed import Fixed
from qformer.types import UsageError
from qformer.vision.base import VisionEncoder
from qformer.vision.mof import MofConfig, MofEncoder, align, interleave, mix

EXACT = {"atol": 0.0, "rtol": 0.0}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Flat(VisionEncoder):
    """Tokens that are the normalized means of patches, times a number, with `extra` tokens of that number in front."""

    def __init__(self, width: int, patch: int, extra: int, factor: float, mean: float = 0.0) -> None:
        super().__init__(
            width=width, patch_size=patch, image_size=2 * patch, extra=extra, mean=(mean,) * 3, std=(1.0,) * 3
        )
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def encode(self, pixels: Tensor) -> Tensor:
        means = F.avg_pool2d(pixels.mean(dim=1, keepdim=True), self.patch_size).flatten(1)[..., None]  # (N, S, 1)
        front = torch.ones(len(pixels), self.extra, 1)
        return self.factor * torch.cat([front, means], dim=1).expand(-1, -1, self.width)


def picture(seed: int = 0, side: int = 4) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_the_weight_of_a_sum_is_that_of_the_first() -> None:
    first, second = torch.full((1, 2, 3), 4.0), torch.full((1, 2, 3), 8.0)
    torch.testing.assert_close(mix(first, second, 0.25), torch.full((1, 2, 3), 7.0), **EXACT)
    for alpha, whole in ((1, first), (0, second)):
        torch.testing.assert_close(mix(first, second, alpha), whole, **EXACT)


def test_tokens_alternate_and_the_narrower_ones_end_in_zeros() -> None:
    made = interleave(torch.ones(1, 2, 1), 2 * torch.ones(1, 2, 3))
    assert made.tolist() == [[[1, 0, 0], [2, 2, 2], [1, 0, 0], [2, 2, 2]]]
    made = interleave(torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]), torch.tensor([[[2.0], [4.0]]]))
    assert made.tolist() == [[[1, 1], [2, 0], [3, 3], [4, 0]]]


def test_another_grid_is_interpolated_row_by_row() -> None:
    ramp = torch.arange(6.0).view(1, 6, 1)  # 2 rows of 3
    assert align(ramp, (2, 3), (2, 3)) is ramp
    made = align(ramp, (2, 3), (4, 3)).view(4, 3)
    # Centers of four rows over two lie at -0.25, 0.25, 0.75 and 1.25 of them; beyond the edge the edge counts.
    assert made.tolist() == [[0, 1, 2], [0.75, 1.75, 2.75], [2.25, 3.25, 4.25], [3, 4, 5]]
    with pytest.raises(UsageError, match="5 tokens are no grid of 2 x 3"):
        align(ramp[:, :5], (2, 3), (4, 3))


def test_a_grid_without_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="grid of 0 x 2 tokens is wanted"):
        align(torch.zeros(1, 4, 3), (2, 2), (0, 2))


def test_each_encoder_normalizes_by_itself_and_loses_its_front_tokens() -> None:
    first, second = Flat(3, 2, extra=1, factor=1.0, mean=0.5), Flat(3, 2, extra=2, factor=10.0)
    pixels = picture()
    means = F.avg_pool2d(pixels.mean(dim=1, keepdim=True), 2).flatten(1)  # (N, 4)
    made = MofEncoder(first, second)(pixels)
    assert made.shape == (2, 8, 3)
    torch.testing.assert_close(made[:, ::2, 0], means - 0.5, **CLOSE)
    torch.testing.assert_close(made[:, 1::2, 0], 10 * means, **CLOSE)
    added = MofEncoder(first, second, "additive", 0.75)(pixels)
    torch.testing.assert_close(added[:, :, 1], 0.75 * (means - 0.5) + 0.25 * 10 * means, **CLOSE)


def test_the_grid_is_that_of_the_first() -> None:
    mixture = MofEncoder(Flat(2, 2, 0, 1.0), Flat(2, 4, 1, 1.0))
    assert (mixture.extra, mixture.patch_size, mixture.image_size, mixture.per_patch) == (0, 2, 4, 2)
    pixels = picture(side=8)
    made = mixture(pixels)
    coarse = F.avg_pool2d(pixels.mean(dim=1, keepdim=True), 4)  # (N, 1, 2, 2)
    wanted = F.interpolate(coarse, size=(4, 4), mode="bilinear", align_corners=False).flatten(1)
    torch.testing.assert_close(made[:, 1::2, 0], wanted, **CLOSE)
    with pytest.raises(UsageError, match="a tile of 6x6 pixels does not divide into patches of 4"):
        mixture(picture(side=6))


def test_unequal_tiles_are_those_one_by_one() -> None:
    mixture = MofEncoder(Flat(2, 2, 1, 1.0), Flat(3, 2, 0, 2.0))
    tiles = [torch.rand(3, h, w) for h, w in ((4, 4), (2, 6), (4, 4), (6, 2))]
    for row, tile in zip(mixture.encode_all(tiles), tiles, strict=True):
        torch.testing.assert_close(row, mixture(tile[None])[0], **CLOSE)


def test_no_weight_moves_and_none_is_added() -> None:
    mixture = MofEncoder(Flat(2, 2, 1, 1.0), Flat(2, 2, 0, 2.0))
    assert [name for name, _ in mixture.named_parameters()] == ["first.factor", "second.factor"]
    frozen = mixture.freeze()
    assert frozen.first.frozen
    assert frozen.second.frozen
    assert not frozen(picture()).requires_grad
    assert not any(tile.requires_grad for tile in frozen.encode_all(list(picture())))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "additive"}, "adds tokens of one width, but these encoders have 2 and 3"),
        ({"mode": "both"}, "a mixture of features is interleaved or additive"),
        ({"alpha": 1.5}, "alpha is 1.5; the weight of the first encoder is from 0 to 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MofEncoder(Flat(2, 2, 0, 1.0), Flat(3, 2, 0, 1.0), **options)


def test_a_mixture_of_mixtures_is_refused() -> None:
    inner = MofEncoder(Flat(2, 2, 0, 1.0), Flat(2, 2, 0, 1.0))
    with pytest.raises(UsageError, match="one token a patch, and MofEncoder has 2"):
        MofEncoder(inner, Flat(2, 2, 0, 1.0))


def save_vit(folder: Path, seed: int, width: int, patch: int = 4) -> Path:
    torch.manual_seed(seed)
    sizes = ViTConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=patch,
    )
    ViTModel(sizes, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    """The options of a mixture of two tiny ViT folders of unequal width."""
    folders = [save_vit(tmp_path / f"vit{width}", width, width) for width in (8, 12)]
    return {
        place: {"name": "hf", "path": str(folder)} for place, folder in zip(("first", "second"), folders, strict=True)
    }


def test_a_section_builds_both_encoders(parts: dict[str, Any]) -> None:
    mixture = vision.build("mof", **parts)
    pixels = picture(side=8)
    alone = [vision.build(**parts[place])(pixels)[:, 1:] for place in ("first", "second")]
    made = mixture(pixels)
    torch.testing.assert_close(made[:, ::2, :8], alone[0], **CLOSE)
    torch.testing.assert_close(made[:, 1::2], alone[1], **CLOSE)
    assert not made[:, ::2, 8:].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"second": None}, "vision.second"),
        ({"second": {"path": "x"}}, "vision.second is {'path': 'x'}; give the name of an image encoder"),
        ({"second": {"name": "mof"}}, "vision.second is {'name': 'mof'}"),
        ({"second": {"name": "hff", "path": "x"}}, "unknown vision.second 'hff': did you mean 'hf'"),
        ({"second": {"name": "hf", "pth": "x"}}, "vision.second.pth is not an option of 'hf': did you mean 'path'"),
        ({"alpha": 2}, "vision.alpha"),
    ],
)
def test_a_faulty_section_is_told_by_its_place(parts: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        vision.build("mof", **(parts | change))
    assert said in str(refused.value)


def test_one_encoder_alone_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"vision\.second is \{\}; give the name of an image encoder"):
        MofConfig(parts["first"])
    with pytest.raises(UsageError, match=r"vision\.second"):
        vision.build("mof", first=parts["first"])
    for second in ({}, None):
        with pytest.raises(UsageError, match=r"vision\.second is"):
            MofConfig(first=parts["first"], second=second)
    with pytest.raises(UsageError, match="needs two image encoders, and one of these is None"):
        MofEncoder(Flat(2, 2, 0, 1.0), None)


def test_each_encoder_has_its_own_adapter() -> None:
    mixture = MofEncoder(Flat(2, 2, 1, 1.0), Flat(2, 2, 0, 2.0))
    connector = MLP(2, 5, adapters=2, patch=2)
    assert connector.per_patch == mixture.per_patch
    frontend = FrontEnd.for_qformer(mixture, Fixed(4))
    assert {name.split(".")[0] for name, _ in frontend.named_parameters()} == {"encoder", "norm", "norm_second"}
    with torch.no_grad():
        frontend.norm_second.weight.mul_(3)  # type: ignore[union-attr]
    tiles = cut_all([torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 200, dtype=torch.uint8)], Fixed(4))
    seen, plain = frontend(tiles).packed, frontend.encode_tiles(tiles).packed
    torch.testing.assert_close(seen[::2], F.layer_norm(plain[::2], (2,)), **CLOSE)
    torch.testing.assert_close(seen[1::2], 3 * F.layer_norm(plain[1::2], (2,)), **CLOSE)
    pixels = torch.stack(tiles.pixels)
    torch.testing.assert_close(frontend.encode(pixels).flatten(0, 1), seen, **CLOSE)


def test_other_encoders_have_one_norm() -> None:
    frontend = FrontEnd.for_qformer(Flat(2, 2, 1, 1.0), Fixed(4))
    assert frontend.norm_second is None
    assert "norm_second.weight" not in frontend.state_dict()
