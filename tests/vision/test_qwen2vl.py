"""Qwen2-VL's tower against transformers' own; its patches, places and frames; published weights under their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from qformer import vision
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from qformer.vision.qwen2vl import Qwen2VLViT, patchify, positions

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {"width": 32, "depth": 3, "heads": 4, "mlp_hidden": 64}


def make() -> Qwen2VLViT:
    encoder = vision.build("qwen2vl", **SIZES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(encoder, Qwen2VLViT)
    return encoder.eval()


def frames(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count + height))


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def theirs() -> Qwen2VLForConditionalGeneration:
    """A whole model of transformers, tiny, in which no parameter of the tower is neutral."""
    tower = {"embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 16}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    more = {"num_key_value_heads": 1, "vocab_size": 32, "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=tower, text_config=text | more)).eval()
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def row_by_row(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Of one frame, from the order of merged blocks."""
    order = positions([(1, rows, columns)])
    return tokens[(order[:, 0] * columns + order[:, 1]).argsort()]


@torch.no_grad()
def test_it_is_the_tower_of_transformers(tmp_path: Path) -> None:
    """Two clips and a picture of unequal sizes packed, by the released interface, from a folder of the whole model."""
    model = theirs()
    model.save_pretrained(tmp_path)
    encoder = vision.build("qwen2vl", **SIZES, weights=str(tmp_path))
    assert isinstance(encoder, Qwen2VLViT)
    pictures = [frames(1, 56, 84), frames(4, 28, 56), frames(3, 84, 28)]
    patches = torch.cat([patchify(normalized(picture)) for picture in pictures])
    grids = [(1, 4, 6), (2, 2, 4), (2, 6, 2)]
    expected = model.model.visual(patches, torch.tensor(grids)).last_hidden_state
    torch.testing.assert_close(encoder.encode_patches(patches, grids), expected, **CLOSE)
    # As an image encoder: the same tokens, row by row; here a tile of frames is given between two pictures.
    tiles = [pictures[0][0], pictures[1][:2], pictures[0][0].flip(-1)]
    rows = encoder.encode_all(tiles)
    torch.testing.assert_close(rows[0], row_by_row(expected[:24], 4, 6), **CLOSE)
    torch.testing.assert_close(rows[1], row_by_row(expected[24:32], 2, 4), **CLOSE)
    torch.testing.assert_close(encoder(pictures[0])[0], rows[0], **CLOSE)
    torch.testing.assert_close(encoder(pictures[1][None, :2])[0], rows[1], **CLOSE)


def test_patches_are_those_of_a_convolution_in_merged_order() -> None:
    encoder, clip = make(), normalized(frames(2, 56, 84))
    convolved = F.conv3d(clip.transpose(0, 1)[None], encoder.patch_embed.proj.weight, stride=(2, 14, 14))
    made = encoder.patch_embed(patchify(clip))
    torch.testing.assert_close(row_by_row(made, 4, 6), convolved[0, :, 0].flatten(1).T, **CLOSE)


def test_places_in_merged_order() -> None:
    first = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert positions([(1, 2, 4)]).tolist() == first
    assert positions([(2, 2, 2), (1, 4, 2)]).tolist() == 2 * first[:4] + first[:4] + [[2, 0], [2, 1], [3, 0], [3, 1]]
    assert positions([(1, 1, 3)], merge=1).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert positions([]).shape == (0, 2)


def test_the_last_frame_is_repeated() -> None:
    clip = frames(3, 28, 28)
    assert patchify(clip).equal(patchify(torch.cat([clip, clip[-1:]])))
    assert patchify(clip[:1]).equal(patchify(clip[:1].repeat(2, 1, 1, 1)))
    assert patchify(clip, temporal=1).shape == (3 * 4, 3 * 14 * 14)
    assert patchify(clip, patch=7, merge=4)[:, :49].shape == (2 * 16, 49)


@torch.no_grad()
def test_a_picture_is_a_clip_of_equal_frames() -> None:
    encoder, picture = make(), frames(1, 28, 56)
    twice = picture[:, None].repeat(1, 2, 1, 1, 1)  # (1, 2, 3, 28, 56)
    assert encoder(twice).equal(encoder(picture))
    both = encoder.encode_all([picture[0], twice[0]])
    torch.testing.assert_close(both[0], both[1], **CLOSE)
    clip = encoder.encode_patches(patchify(normalized(picture.repeat(6, 1, 1, 1))), [(3, 2, 4)]).view(3, 8, 32)
    torch.testing.assert_close(row_by_row(clip[2], 2, 4), encoder(picture)[0], **CLOSE)
    torch.testing.assert_close(clip[0], clip[2], **CLOSE)


def test_frames_do_not_see_each_other() -> None:
    encoder, clip = make().freeze(), normalized(frames(4, 28, 56))
    before = encoder.encode_patches(patchify(clip), [(2, 2, 4)])
    assert not before.requires_grad
    clip[3] = 0
    after = encoder.encode_patches(patchify(clip), [(2, 2, 4)])
    torch.testing.assert_close(after[:8], before[:8], **CLOSE)
    assert (after[8:] - before[8:]).abs().amax(dim=1).min() > 1e-3  # all patches of the other one do


@torch.no_grad()
def test_where_a_patch_is_matters() -> None:
    """Rows are not columns, and both are relative: equal patches everywhere are told apart by nobody."""
    encoder = make()
    even = torch.full((1, 3, 56, 84), 0.3)
    assert (encoder(even)[0] - encoder(even)[0, :1]).abs().max() < 1e-5
    spot = even.clone()
    spot[..., :14, :14] = 1
    tokens = encoder(spot)[0].view(4, 6, 32)
    assert (tokens[0, 2] - tokens[2, 0]).abs().max() > 1e-4
    assert (tokens[0, 1] - tokens[0, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
@torch.no_grad()
def test_released_names_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    encoder = make()
    state = {f"{prefix}{name}": tensor.bfloat16() for name, tensor in encoder.state_dict().items()}
    state |= {f"{prefix}merger.ln_q.weight": torch.ones(32), f"{prefix}merger.mlp.0.weight": torch.ones(128, 128)}
    if prefix:
        state["lm_head.weight"] = torch.ones(4, 16)
    save_file(state, tmp_path / "tower.safetensors")
    loaded = vision.build("qwen2vl", **SIZES, weights=str(tmp_path / "tower.safetensors"), precision="bf16")
    assert loaded.patch_embed.proj.weight.dtype == torch.bfloat16
    assert loaded.blocks[0].norm1.weight.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert tensor.float().equal(encoder.state_dict()[name].bfloat16().float()), name
    assert (loaded(frames(1, 28, 56)) - encoder(frames(1, 28, 56))).abs().max() < 0.2


def test_names_and_size_are_the_published_ones() -> None:
    with torch.device("meta"):
        encoder = vision.build("qwen2vl")
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = {f"blocks.{i}.{layer}.{kind}" for i in range(32) for layer in layers for kind in ("weight", "bias")}
    assert encoder.state_dict().keys() == names | {"patch_embed.proj.weight"}
    assert encoder.patch_embed.proj.weight.shape == (1280, 3, 2, 14, 14)
    merger = 2 * 1280 + 5120 * 5120 + 5120  # without its last layer, which is as wide as the language model
    assert sum(p.numel() for p in encoder.parameters()) + merger + (5120 + 1) * 3584 == 675_759_104  # of the 7B model


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    encoder = make()
    with pytest.raises(UsageError, match=r"got 8 patches for grids of 4; give the grids of these patches"):
        encoder.encode_patches(torch.rand(8, 3 * 2 * 196), [(1, 2, 2)])
    with pytest.raises(UsageError, match="a grid of 3x2 patches does not divide into blocks of 2"):
        encoder.encode_patches(torch.rand(6, 3 * 2 * 196), [(1, 3, 2)])
    with pytest.raises(UsageError, match="1 frames of 42x28 pixels do not divide into blocks of 28"):
        patchify(frames(1, 28, 42))
    with pytest.raises(UsageError, match="0 frames of 28x28 pixels"):
        patchify(torch.rand(0, 3, 28, 28))
    with pytest.raises(UsageError, match="a tile of 3 frames was given to an image encoder that reads 2 frames at"):
        encoder(torch.rand(1, 3, 3, 28, 28))
    with pytest.raises(UsageError, match="a tile of 2 frames was given to an image encoder that reads one picture at"):
        vision.build("oryx", image_size=32, width=8, depth=1, heads=2).encode_all([torch.rand(2, 3, 32, 32)])
    with pytest.raises(UsageError, match="heads of 6, but rows and columns turn a quarter each"):
        vision.build("qwen2vl", width=24, heads=4)
    torch.save({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "text.pth")
    with pytest.raises(UsageError, match=r"text\.pth' holds 0 tensors named patch_embed\.proj\.weight"):
        vision.build("qwen2vl", **SIZES, weights=str(tmp_path / "text.pth"))
    with pytest.raises(UsageError, match="there is no file or folder"):
        vision.build("qwen2vl", **SIZES, weights=str(tmp_path / "gone.safetensors"))
    torch.save(encoder.state_dict(), tmp_path / "deep.pth")
    with pytest.raises(UsageError, match=r"missing nothing, left over blocks\.2\."):
        vision.build("qwen2vl", **SIZES | {"depth": 2}, weights=str(tmp_path / "deep.pth"))


def test_a_model_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"'Qwen/Qwen2-VL-none' cannot be downloaded from the hub .*; give a folder"):
        vision.build("qwen2vl", weights="Qwen/Qwen2-VL-none")
