"""Oryx-ViT against transformers' SigLIP with equal weights, and its table, which is resized bilinearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from qformer import vision
from qformer.types import UsageError
from qformer.vision.oryx import OryxViT

SIZES = {"image_size": 64, "patch_size": 16, "width": 32, "depth": 2, "heads": 4, "mlp_hidden": 48}
SIGLIP = (
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks", "encoder.layers"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.proj", "self_attn.out_proj"),
)


def make() -> OryxViT:
    encoder = vision.build("oryx", **SIZES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(encoder, OryxViT)
    return encoder.eval()


def pixels(width: int, height: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def siglip(encoder: OryxViT, table: Tensor, side: int) -> SiglipVisionModel:
    """SigLIP with the weights of `encoder` and a table for `side` x `side` patches."""
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16 * side,
        patch_size=16,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        vision_use_head=False,
    )
    state = {"embeddings.position_embedding.weight": table}
    for name, tensor in encoder.state_dict().items():
        for mine, name_there in SIGLIP:
            name = name.replace(mine, name_there)
        if ".attn.qkv" in name:
            for part, kind in zip(tensor.chunk(3), ("q", "k", "v"), strict=True):
                state[name.replace("attn.qkv", f"self_attn.{kind}_proj")] = part
        elif name != "pos_embed":
            state[name] = tensor
    model = SiglipVisionModel(config).eval()
    inner = getattr(model, "vision_model", model)
    missing, unexpected = inner.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("post_layernorm" in name or "position_ids" in name for name in missing)
    return model


@pytest.mark.parametrize("side", [4, 6, 3])
@torch.no_grad()
def test_it_is_siglip_with_a_bilinear_table(side: int) -> None:
    """Before SigLIP's final norm; pixels from -1 to 1; transformers is given the resized table."""
    encoder = make()
    square = encoder.pos_embed.view(1, 4, 4, 32).permute(0, 3, 1, 2)
    table = F.interpolate(square, size=(side, side), mode="bilinear", align_corners=False).flatten(2)[0].T
    model = siglip(encoder, table, side)
    image = pixels(16 * side, 16 * side)
    expected = model(2 * image - 1, output_hidden_states=True).hidden_states[-1]
    assert (encoder(image) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_wide_pictures_by_hand() -> None:
    """Halfway between two columns of the table a token has their mean."""
    encoder = make()
    columns = torch.arange(4.0).repeat(4)[:, None].expand(16, 32)
    encoder.pos_embed.copy_(columns[None])
    blank = encoder.embed(torch.zeros(1, 3, 32, 128))[0] - encoder.patch_embed.proj.bias
    torch.testing.assert_close(blank[:8, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


@torch.no_grad()
def test_released_names_under_any_prefix(tmp_path: Path) -> None:
    encoder = make()
    state = {f"vision_tower.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {"vision_tower.norm.weight": torch.ones(32), "vision_tower.attn_pool.latent": torch.ones(1, 1, 32)}
    state |= {"lm_head.weight": torch.ones(3, 3)}
    torch.save(state, tmp_path / "oryx.pth")
    loaded = vision.build("oryx", **SIZES, weights=str(tmp_path / "oryx.pth"))
    assert loaded(pixels(96, 32)).equal(encoder(pixels(96, 32)))
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    names = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names |= {f"blocks.{i}.{layer}.{kind}" for i in range(2) for layer in layers for kind in ("weight", "bias")}
    assert loaded.state_dict().keys() == names


@torch.no_grad()
def test_a_smaller_table_is_enlarged_once_as_it_was_made(tmp_path: Path) -> None:
    """SigLIP's own, bicubically, to that of `image_size`; tiles read that one bilinearly."""
    encoder = make()
    torch.save(encoder.state_dict(), tmp_path / "small.pth")
    large = vision.build("oryx", **SIZES | {"image_size": 128}, weights=str(tmp_path / "small.pth"))
    square = encoder.pos_embed.view(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(8, 8), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(large.pos_embed, expected)


def test_published_size() -> None:
    with torch.device("meta"):
        encoder = vision.build("oryx")
    assert encoder.pos_embed.shape == (1, 128 * 128, 1152)
    assert encoder(torch.empty(1, 3, 32, 48, device="meta")).shape == (1, 6, 1152)
    block = 4 * 1152 + 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 1152 + 4304
    assert sum(p.numel() for p in encoder.parameters()) == 27 * block + (3 * 256 + 1 + 128 * 128) * 1152


def test_sides_that_are_no_patches_are_refused() -> None:
    with pytest.raises(UsageError, match="40x32 pixels does not divide into patches of 16"):
        make()(pixels(40, 32))
