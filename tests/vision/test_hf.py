"""HFVisionEncoder against the hidden states of the transformers models it is made from, all tiny and from tmp_path."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qformer import vision
from qformer.types import UsageError
from qformer.vision.hf import HFVisionEncoder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# family: vision model class, its config class, options, tokens in front of the patches, pixel statistics
FAMILIES = {
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}, 1, CLIP),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0, HALF),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}, 1, IMAGENET),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}, 5, IMAGENET),
    "internvl": ("InternVLVisionModel", "InternVLVisionConfig", {}, 1, IMAGENET),
    "vit": ("ViTModel", "ViTConfig", {}, 1, HALF),
    "deit": ("DeiTModel", "DeiTConfig", {}, 2, IMAGENET),
}


def make(family):
    """A tiny model of the family in which no parameter has a neutral value, so that a norm left out shows."""
    model_class, config_class, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**SIZES, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_two_tower(family):
    if family == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=SIZES)
        return transformers.CLIPModel(config).eval()
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=SIZES)).eval()


def pixels(width, height):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(model, image, statistics):
    """The model's own answer, with all its hidden states, to pixels in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    resize = {} if model.config.model_type.startswith(("dinov2", "internvl")) else {"interpolate_pos_encoding": True}
    return model((image - mean) / std, output_hidden_states=True, **resize)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_saved_model_gives_its_own_hidden_states(family, tmp_path):
    *_, extra, statistics = FAMILIES[family]
    model = make(family)
    model.save_pretrained(tmp_path)
    images = [pixels(28, 28), pixels(42, 21)]
    outputs = [reference(model, image, statistics) for image in images]
    for layer in (-1, 3, -2, 1, 0):
        encoder = vision.build("hf", path=str(tmp_path), layer=layer)
        assert (encoder.extra, encoder.width, encoder.patch_size, encoder.image_size) == (extra, 32, 7, 28)
        for image, output, patches in zip(images, outputs, (16, 18), strict=True):
            expected = output.last_hidden_state if layer in (-1, 3) else output.hidden_states[layer]
            tokens = encoder(image)
            assert tokens.shape == (2, extra + patches, 32)
            assert (tokens - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [-1, -2])
def test_nothing_is_left_that_the_tokens_do_not_need(family, layer):
    encoder = HFVisionEncoder(make(family), layer)
    encoder(pixels(28, 35)).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_clip_and_internvit_leave_their_patch_tokens_without_a_norm():
    bare = []
    for family, (*_, statistics) in FAMILIES.items():
        stream = reference(make(family), pixels(28, 28), statistics).hidden_states[-1]
        if torch.allclose(HFVisionEncoder(make(family))(pixels(28, 28)), stream, atol=1e-5):
            bare.append(family)
    assert bare == ["clip", "internvl"]


@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_two_towers_lose_the_text_tower(family, tmp_path):
    model = make_two_tower(family)
    model.save_pretrained(tmp_path)
    encoder = vision.build("hf", path=str(tmp_path), layer=-2)
    expected = reference(model.vision_model, pixels(42, 28), FAMILIES[family][-1]).hidden_states[-2]
    assert (encoder(pixels(42, 28)) - expected).abs().max() < 1e-5
    assert not [name for name, _ in encoder.named_parameters() if "text" in name or "head" in name or "logit" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_pixel_statistics_of_the_family(family):
    encoder = HFVisionEncoder(make(family))
    mean, std = FAMILIES[family][-1]
    assert encoder.mean.flatten().tolist() == pytest.approx(mean)
    assert encoder.std.flatten().tolist() == pytest.approx(std)


@pytest.mark.parametrize(
    ("name", "content", "mean", "std"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, 0.2, 0.5),
        ("processor_config.json", {"image_processor": {"image_mean": [0, 0.7, 0], "image_std": [1, 0.9, 1]}}, 0.7, 0.9),
        ("preprocessor_config.json", {"do_normalize": False, "image_mean": [1, 1, 1], "image_std": [2, 2, 2]}, 0, 1),
        ("preprocessor_config.json", {"size": 224}, 0.4578275, 0.26130258),
    ],
)
def test_pixel_statistics_of_the_folder(tmp_path, name, content, mean, std):
    make("clip").save_pretrained(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    encoder = vision.build("hf", path=str(tmp_path))
    assert encoder.mean[1].item() == pytest.approx(mean)
    assert encoder.std[1].item() == pytest.approx(std)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@torch.no_grad()
def test_half_storage(tmp_path, precision, dtype):
    make("clip").save_pretrained(tmp_path)
    single = vision.build("hf", path=str(tmp_path))
    half = vision.build("hf", path=str(tmp_path), precision=precision)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {dtype}
    expected, tokens = single(pixels(28, 42)), half(pixels(28, 42))
    assert tokens.dtype == torch.float32
    assert 0 < (tokens - expected).abs().mean() < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half(pixels(28, 42)), tokens)
        assert 0 < (single(pixels(28, 42)) - expected).abs().mean() < 0.02


def test_frozen_survives_train_and_takes_no_gradient():
    encoder = HFVisionEncoder(make("vit")).freeze()
    torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(pixels(28, 28)).requires_grad


@torch.no_grad()
def test_the_rest_of_a_picture_stays_unread_where_the_model_leaves_it():
    """SigLIP at 384 has 27 x 27 patches of 14; so has our tile of 384, and a table of 27 x 27 is not resized."""
    config = transformers.SiglipVisionConfig(**{**SIZES, "image_size": 384, "patch_size": 14})
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(config).eval()
    image = pixels(384, 384)
    expected = model((image - 0.5) / 0.5).last_hidden_state
    encoder = HFVisionEncoder(model)
    assert (encoder.image_size, encoder.grid(384, 384), encoder.grid(400, 30)) == (378, (27, 27), (2, 28))
    assert (encoder(image) - expected).abs().max() < 1e-5
    rows = encoder.encode_all([image[0], image[0, :, :30, :60], image[1]])
    assert [len(row) for row in rows] == [27 * 27, 2 * 4, 27 * 27]
    assert (rows[2] - expected[1]).abs().max() < 1e-5
    assert rows[1].equal(encoder(image[:1, :, :28, :56])[0])
    assert not HFVisionEncoder(make("siglip")).floors
    with pytest.raises(UsageError, match="30x28 pixels does not divide into patches of 7"):
        HFVisionEncoder(make("siglip"))(pixels(30, 28))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(1, -1), (0, 2, 1)])
@torch.no_grad()
def test_hidden_states_of_several_layers(family, layers, tmp_path):
    """The last one first, which is after the norm where the model's own tokens are."""
    model = make(family)
    model.save_pretrained(tmp_path)
    image = pixels(42, 21)
    output = reference(model, image, FAMILIES[family][-1])
    expected = [output.hidden_states[level] for level in sorted((layer % 4 for layer in layers), reverse=True)]
    if -1 in layers:
        expected[0] = output.last_hidden_state
    encoder = vision.build("hf", path=str(tmp_path), layers=layers)
    assert encoder.width == 32 * len(layers)
    assert (encoder(image) - torch.cat(expected, dim=-1)).abs().max() < 1e-5


def test_one_layer_or_several(tmp_path):
    make("vit").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"vision\.layer is -2 and vision\.layers is \[1, 2\]; give one of the two"):
        vision.build("hf", path=str(tmp_path), layer=-2, layers=[1, 2])
    with pytest.raises(UsageError, match="layer 5 does not exist in a model of 3 blocks"):
        vision.build("hf", path=str(tmp_path), layers=[1, 5])


def test_image_size_is_rounded_down_to_whole_patches():
    config = transformers.SiglipVisionConfig(**{**SIZES, "image_size": 30})
    assert HFVisionEncoder(transformers.SiglipVisionModel(config)).image_size == 28


def test_layer_that_does_not_exist():
    with pytest.raises(UsageError, match="layer 4 does not exist in a model of 3 blocks; use -4 to 3"):
        HFVisionEncoder(make("vit"), layer=4)
    with pytest.raises(UsageError, match="layer -5 does not exist"):
        HFVisionEncoder(make("vit"), layer=-5)


def test_models_that_are_no_row_of_patch_tokens(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'bert' model is no vision transformer"):
        vision.build("hf", path=str(tmp_path))
    sizes = {"image_size": 28, "patch_size": 7, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    swin = transformers.SwinModel(transformers.SwinConfig(**sizes))
    with pytest.raises(UsageError, match="mean and std of a 'swin' model are not known"):
        HFVisionEncoder(swin)
    with pytest.raises(UsageError, match=r"'swin' model gave \[4, 16\] numbers for 4x4 patches and 0 extra"):
        HFVisionEncoder(swin, mean=HALF[0], std=HALF[1])(pixels(28, 28))


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UsageError, match=r"can be loaded from .*, which is neither a folder nor readable from the hub"):
        vision.build("hf", path=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="no image encoder can be loaded from the folder"):
        vision.build("hf", path=str(tmp_path))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(UsageError, match="no image encoder can be loaded from the folder"):
        vision.build("hf", path=str(tmp_path))
    make("vit").config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"can be loaded from .*no file named model\.safetensors"):
        vision.build("hf", path=str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("{ not json")
    with pytest.raises(UsageError, match=r"preprocessor_config\.json' is not valid JSON"):
        vision.build("hf", path=str(tmp_path))


def test_hub_id_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="'openai/clip-vit-none', which is neither a folder nor readable from the hub"):
        vision.build("hf", path="openai/clip-vit-none")


def test_missing_weights_are_refused_unless_they_are_not_used(tmp_path):
    make_two_tower("siglip").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)

    def save_without(part):
        save_file({name: tensor for name, tensor in tensors.items() if part not in name}, file, {"format": "pt"})

    save_without("vision_model.head.")
    vision.build("hf", path=str(tmp_path))
    save_without("vision_model.encoder.layers.2.")
    vision.build("hf", path=str(tmp_path), layer=-2)
    with pytest.raises(UsageError, match=r"lacks weights, encoder\.layers\.2\.\S+ for one"):
        vision.build("hf", path=str(tmp_path))


def test_path_is_required():
    with pytest.raises(UsageError, match=r"vision\.path is required"):
        vision.build("hf")
