"""ClipViT against transformers' CLIPVisionModel with the same weights, its fp16 rule, what weight files may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from qformer import vision
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD, resize_positions
from qformer.vision.clip import ClipViT, clip_names

TINY: dict[str, Any] = {"image_size": 56, "patch_size": 14, "width": 32, "depth": 3, "heads": 4, "mlp_hidden": 72}
NARROW: dict[str, Any] = {"image_size": 28, "patch_size": 14, "width": 4, "heads": 2, "mlp_hidden": 6}
RENAMED = [
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1", "embeddings.patch_embedding"),
    ("ln_pre", "pre_layrnorm"),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1", ".layer_norm1"),
    (".ln_2", ".layer_norm2"),
    (".attn.out_proj", ".self_attn.out_proj"),
    (".mlp.c_fc", ".mlp.fc1"),
    (".mlp.c_proj", ".mlp.fc2"),
]


def noisy(**options: Any) -> ClipViT:
    """A tiny encoder, always the same; no bias is zero and no norm is one, so that leaving one of them out shows."""
    encoder = vision.build("clip", **{**TINY, **options})
    assert isinstance(encoder, ClipViT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise + name.endswith(("ln_1.weight", "ln_2.weight", "ln_pre.weight")))
    return encoder


def pixels(width: int, height: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def as_transformers(encoder: ClipViT) -> CLIPVisionModel:
    """The same weights there: queries, keys and values split; the final norm, which we do not have, stays as it is."""
    config = CLIPVisionConfig(
        hidden_size=TINY["width"],
        intermediate_size=TINY["mlp_hidden"],
        num_hidden_layers=TINY["depth"],
        num_attention_heads=TINY["heads"],
        image_size=TINY["image_size"],
        patch_size=TINY["patch_size"],
    )
    theirs = {}
    for ours, tensor in encoder.state_dict().items():
        name = ours
        for old, new in RENAMED:
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                theirs[name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
        else:
            theirs[name] = tensor
    model = CLIPVisionModel(config).eval()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    missing, unexpected = model.load_state_dict({f"{prefix}{n}": tensor for n, tensor in theirs.items()}, strict=False)
    assert {name.removeprefix(prefix) for name in missing} == {"post_layernorm.weight", "post_layernorm.bias"}
    assert not unexpected
    return model


@torch.no_grad()
def test_matches_transformers() -> None:
    encoder, image = noisy(precision="fp32"), pixels(56, 56)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = as_transformers(encoder)((image - mean) / std).last_hidden_state
    tokens = encoder(image)
    assert tokens.shape == (2, 1 + 16, 32)
    assert expected.std() > 0.5
    assert (tokens - expected).abs().max() < 1e-5


def test_names_are_those_of_the_release() -> None:
    assert {*clip_names(3)} == noisy().state_dict().keys()
    assert len(clip_names(23)) == 5 + 23 * 12


def resized(table: Tensor, rows: int, columns: int) -> Tensor:
    """Bicubic, corners aligned, as the original does for CLIP and for CLIP alone."""
    square = table[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], square.permute(0, 2, 3, 1).reshape(rows * columns, 32)])


@torch.no_grad()
def test_position_table_is_resized_to_the_image_size(tmp_path: Path) -> None:
    encoder = noisy(precision="fp32")
    path = str(tmp_path / "clip.pth")
    torch.save(encoder.state_dict(), path)
    loaded = vision.build("clip", **{**TINY, "image_size": 98}, precision="fp32", weights=path)
    expected = resized(encoder.positional_embedding, 7, 7)
    assert (loaded.positional_embedding - expected).abs().max() < 1e-6
    patches = encoder.positional_embedding[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    other = F.interpolate(patches, size=(7, 7), mode="bicubic", align_corners=False).flatten(2)[0].T
    assert (loaded.positional_embedding[1:] - other).abs().max() > 0.01


@torch.no_grad()
def test_other_tiles_resize_the_table_as_they_come() -> None:
    encoder = noisy(precision="fp32")
    table = encoder.positional_embedding
    assert (
        resize_positions(table[None], 1, (2, 6), encoder.align_corners)[0] - resized(table, 2, 6)
    ).abs().max() < 1e-6
    assert encoder(pixels(84, 28)).shape == (2, 1 + 2 * 6, 32)


def test_fp16_rule_tensor_by_tensor() -> None:
    """Linear and Conv layers in half; the joined queries, keys and values are no Linear and stay in single."""
    half = ("conv1", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    for name, tensor in noisy(precision="fp16").state_dict().items():
        layer = name.rpartition(".")[0]
        assert tensor.dtype == (torch.float16 if layer.endswith(half) else torch.float32), name
    assert {p.dtype for p in noisy(precision="fp32").parameters()} == {torch.float32}


@torch.no_grad()
def test_fp16_storage_changes_nothing_but_the_rounding_of_weights() -> None:
    half, single, image = noisy(precision="fp16"), noisy(precision="fp32"), pixels(56, 56)
    assert half(image).dtype == torch.float32
    assert 0 < (half(image) - single(image)).abs().max() < 0.02
    single.load_state_dict(half.state_dict())
    assert (half(image) - single(image)).abs().max() < 1e-5
    streams: list[torch.dtype] = []
    for block in half.transformer["resblocks"]:
        block.register_forward_hook(lambda _module, _inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half(image)
    assert streams == [torch.float32] * 3


def test_trainable_encoder_gives_every_parameter_a_gradient() -> None:
    encoder = noisy(precision="fp32")
    encoder(pixels(84, 56)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@torch.no_grad()
def test_the_released_file_loads_at_every_depth(tmp_path: Path, suffix: str) -> None:
    """It is in half throughout and has 24 blocks, the final norm and the projection."""
    whole = {name: tensor.half() for name, tensor in vision.build("clip", **NARROW, depth=24).state_dict().items()}
    end = {"ln_post.weight": torch.ones(4), "ln_post.bias": torch.zeros(4), "proj": torch.ones(4, 3)}
    state, path = whole | {name: tensor.half() for name, tensor in end.items()}, str(tmp_path / f"clip.{suffix}")
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    for depth in (21, 23, 24):
        loaded = vision.build("clip", **NARROW, depth=depth, weights=path)
        assert loaded.state_dict().keys() == {*clip_names(depth)}
        fresh = vision.build("clip", **NARROW, depth=depth)
        assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in fresh.named_parameters()}
        assert all(torch.equal(tensor.half(), whole[name]) for name, tensor in loaded.state_dict().items())
        assert loaded(pixels(28, 28)).isfinite().all()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "clip.pth")
    state = vision.build("clip", **NARROW, depth=25).state_dict()

    def refused(changed: dict[str, Tensor], message: str) -> None:
        torch.save(changed, path)
        with pytest.raises(UsageError, match=message):
            vision.build("clip", **NARROW, depth=23, weights=path)

    refused(state, r"missing nothing, left over transformer\.resblocks\.24\.\S+, .* and")
    state = vision.build("clip", **NARROW, depth=23).state_dict()
    refused(state | {"ln_post2.weight": torch.ones(4)}, r"left over ln_post2\.weight;")
    without = {name: tensor for name, tensor in state.items() if name != "transformer.resblocks.2.attn.in_proj_bias"}
    refused(without, r"missing transformer\.resblocks\.2\.attn\.in_proj_bias, left over nothing;")
    refused(state | {"conv1.weight": torch.ones(4, 3, 7, 7)}, r"conv1\.weight \[4, 3, 7, 7\] instead of")
    with pytest.raises(UsageError, match="width 32 does not divide into 5 heads"):
        vision.build("clip", **{**TINY, "heads": 5})
    with pytest.raises(UsageError, match="60x56 pixels does not divide into patches of 14"):
        noisy()(pixels(60, 56))
