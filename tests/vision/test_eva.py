"""EvaViT against transformers' Blip2VisionModel with the same weights, its fp16 rule, what weight files may hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Blip2VisionConfig, Blip2VisionModel

from qformer import vision
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD

TINY = {"image_size": 56, "patch_size": 14, "width": 32, "depth": 3, "heads": 4, "mlp_hidden": 64}
HALF_LAYERS = ("patch_embed.proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def noisy(**options):
    """A tiny encoder, always the same; no bias is zero and no norm is one, so that leaving one of them out shows."""
    encoder = vision.build("eva", **{**TINY, **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise + name.endswith(("norm1.weight", "norm2.weight")))
    return encoder


def pixels(width, height, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def normalised(image):
    return (image - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def as_blip2(encoder):
    """Blip2VisionModel with the weights of `encoder`; its post_layernorm, which we do not have, stays as it is."""
    config = Blip2VisionConfig(
        hidden_size=TINY["width"],
        intermediate_size=TINY["mlp_hidden"],
        num_hidden_layers=TINY["depth"],
        num_attention_heads=TINY["heads"],
        image_size=TINY["image_size"],
        patch_size=TINY["patch_size"],
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    ours, theirs = encoder.state_dict(), {}
    for name, tensor in ours.items():
        if name.endswith((".q_bias", ".v_bias")):
            continue
        for old, new in [
            ("cls_token", "embeddings.class_embedding"),
            ("pos_embed", "embeddings.position_embedding"),
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("blocks.", "encoder.layers."),
            (".norm", ".layer_norm"),
            (".attn.proj", ".self_attn.projection"),
            (".attn.qkv", ".self_attn.qkv"),
        ]:
            name = name.replace(old, new)
        theirs[name] = tensor
    for i in range(TINY["depth"]):
        query, value = ours[f"blocks.{i}.attn.q_bias"], ours[f"blocks.{i}.attn.v_bias"]
        theirs[f"encoder.layers.{i}.self_attn.qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])
    model = Blip2VisionModel(config).eval()
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert set(missing) == {"post_layernorm.weight", "post_layernorm.bias"}
    assert not unexpected
    return model


@pytest.mark.parametrize(("width", "height"), [(56, 56), (84, 56), (28, 70)])
@torch.no_grad()
def test_matches_transformers(width, height):
    encoder = noisy(precision="fp32")
    image = pixels(width, height)
    expected = as_blip2(encoder)(normalised(image), interpolate_pos_encoding=True, output_hidden_states=True)
    tokens = encoder(image)
    assert tokens.shape == (2, 1 + (width // 14) * (height // 14), 32)
    assert (tokens - expected.hidden_states[-1]).abs().max() < 1e-5


def test_names_are_those_of_lavis():
    layers = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
    block = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    block |= {"attn.qkv.weight", "attn.q_bias", "attn.v_bias"}
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= {f"blocks.{i}.{name}" for i in range(2) for name in block}
    assert vision.build("eva", **{**TINY, "depth": 2}).state_dict().keys() == names


def test_vit_g_on_the_meta_device_has_the_published_size():
    with torch.device("meta"):
        encoder = vision.build("eva")
    width, hidden = 1408, 6144
    block = 4 * width + 3 * width * width + 2 * width + width * width + width + 2 * width * hidden + hidden + width
    total = (3 * 14 * 14 + 1) * width + width + 257 * width + 39 * block
    assert sum(p.numel() for p in encoder.parameters()) == total
    # what BLIP-2's stage one with this encoder has in all, less what it trains
    assert total == 1_172_599_998 - 186_705_470
    assert encoder(torch.empty(2, 3, 224, 364, device="meta")).shape == (2, 1 + 16 * 26, 1408)


def test_fp16_rule_tensor_by_tensor():
    for name, tensor in vision.build("eva", **TINY, precision="fp16").state_dict().items():
        layer = name.rpartition(".")[0]
        assert tensor.dtype == (torch.float16 if layer.endswith(HALF_LAYERS) else torch.float32), name
    assert {p.dtype for p in vision.build("eva", **TINY, precision="fp32").parameters()} == {torch.float32}


@torch.no_grad()
def test_fp16_storage_changes_nothing_but_the_rounding_of_weights():
    half, single = noisy(precision="fp16"), noisy(precision="fp32")
    image = pixels(56, 56)
    assert half(image).dtype == torch.float32
    assert 0 < (half(image) - single(image)).abs().max() < 0.01
    single.load_state_dict(half.state_dict())
    assert (half(image) - single(image)).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@torch.no_grad()
def test_autocast_keeps_the_residual_stream_in_single(precision, dtype, tolerance):
    encoder = noisy(precision=precision)
    streams = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", dtype=dtype):
        tokens = encoder(pixels(56, 56))
    assert streams == [torch.float32] * 3
    assert 0 < (tokens - encoder(pixels(56, 56))).abs().max() < tolerance


def test_frozen_survives_train_and_takes_no_gradient():
    encoder = noisy().freeze()
    parent = torch.nn.ModuleList([encoder]).train()
    assert parent.training
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(pixels(56, 56).requires_grad_()).requires_grad


def test_trainable_encoder_gives_every_parameter_a_gradient():
    encoder = vision.build("eva", **TINY, precision="fp32")
    encoder(pixels(84, 56)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@torch.no_grad()
def test_random_weights():
    encoder = vision.build("eva", **{**TINY, "width": 256}, precision="fp32")
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            number = int(name.split(".")[1]) + 1
            assert parameter.std() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.05), name
        else:
            assert parameter.std() == pytest.approx(0.02, rel=0.25), name


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@torch.no_grad()
def test_weights_are_read_from_a_file(tmp_path, suffix, precision):
    original = noisy(precision="fp16")
    # the released file is in half throughout; norms, CLS and positions must come back to single
    state = {name: tensor.half() for name, tensor in original.state_dict().items()}
    original.load_state_dict(state)
    path = str(tmp_path / f"eva.{suffix}")
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    loaded = vision.build("eva", **TINY, precision=precision, weights=path)
    fresh = vision.build("eva", **TINY, precision=precision)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in fresh.named_parameters()}
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert torch.equal(loaded(pixels(56, 70)), original(pixels(56, 70)))


@torch.no_grad()
def test_position_table_is_resized_to_the_image_size(tmp_path):
    state = noisy(precision="fp32").state_dict()
    torch.save(state, tmp_path / "eva.pth")
    encoder = vision.build("eva", **{**TINY, "image_size": 98}, precision="fp32", weights=str(tmp_path / "eva.pth"))
    table = state["pos_embed"]
    square = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(7, 7), mode="bicubic", align_corners=False, antialias=False)
    expected = torch.cat([table[:, :1], square.permute(0, 2, 3, 1).reshape(1, 49, 32)], dim=1)
    assert torch.allclose(encoder.pos_embed, expected, atol=1e-6)


def test_released_leftovers_are_dropped_but_only_those(tmp_path):
    sizes = {"image_size": 28, "patch_size": 14, "width": 4, "heads": 2, "mlp_hidden": 8}
    state = vision.build("eva", **sizes, depth=40).state_dict()
    state |= {"norm.weight": torch.ones(4), "norm.bias": torch.zeros(4), "head.weight": torch.ones(9, 4)}
    path = str(tmp_path / "eva.pth")
    torch.save(state, path)
    assert len(vision.build("eva", **sizes, depth=39, weights=path).blocks) == 39
    assert len(vision.build("eva", **sizes, depth=40, weights=path).blocks) == 40
    with pytest.raises(UsageError, match=r"missing nothing, left over blocks\.38\.\S+, .* and 6 more"):
        vision.build("eva", **sizes, depth=38, weights=path)


def test_unknown_missing_and_misshapen_weights_are_listed(tmp_path):
    path = str(tmp_path / "eva.pth")
    state = noisy().state_dict()

    def refused(changed, message):
        torch.save(changed, path)
        with pytest.raises(UsageError, match=message):
            vision.build("eva", **TINY, weights=path)

    refused({**state, "blocks.0.attn.k_bias": torch.ones(32)}, r"missing nothing, left over blocks\.0\.attn\.k_bias;")
    without = {name: tensor for name, tensor in state.items() if name not in ("cls_token", "blocks.2.norm1.bias")}
    refused(without, r"missing blocks\.2\.norm1\.bias, cls_token, left over nothing;")
    refused({**state, "cls_token": torch.ones(1, 1, 31)}, r"cls_token \[1, 1, 31\] instead of \[1, 1, 32\];")
    refused({**state, "pos_embed": torch.ones(1, 16, 32)}, r"pos_embed \[1, 16, 32\] instead of \[1, 17, 32\];")
    refused({"epoch": 3, "ema": state, "raw": state}, r"ema.*raw")
    torch.save({"epoch": 3, "net": state}, path)  # the only one there
    loaded = vision.build("eva", **TINY, weights=path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["eva.pth", "eva.safetensors"])
def test_missing_and_damaged_files(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UsageError, match="there is no file or folder"):
        vision.build("eva", **TINY, weights=str(path))
    path.write_text("<html>404 Not Found</html>")
    with pytest.raises(UsageError, match="is not a checkpoint, is damaged, or holds code"):
        vision.build("eva", **TINY, weights=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width 32 does not divide into 5 heads"),
        ({"image_size": 60}, "image_size 60 does not divide into patches of 14"),
        ({"precision": "fp8"}, "'fp16' or 'fp32'"),
        ({"wdith": 32}, "did you mean 'width'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UsageError, match=message):
        vision.build("eva", **{**TINY, **options})


def test_tile_that_is_no_multiple_of_the_patch():
    with pytest.raises(UsageError, match="60x56 pixels does not divide into patches of 14"):
        noisy()(pixels(60, 56))
