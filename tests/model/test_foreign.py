"""`qformer.load` of LAVIS's files: they compute what the original computed, with what they leave out given."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, T5Config

import qformer
from qformer import vision
from qformer.checkpoints import lavis
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.files import releases
from qformer.files.tensors import read_tensors
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import UsageError
from qformer.vision.clip import ClipViT
from tests.golden.golden import Golden, bert_tokenizer, close, opt_tokenizer, read, same_ids, t5_tokenizer, tiles

STAGE2 = ("opt_a", "opt_b", "t5_a", "t5_b")
SHORTEST = {"min_new_tokens": 0}  # as the original counts


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"model": tensors}, path)
    return path


def given(golden: Golden, root: Path) -> dict[str, Any]:
    """What the files do not tell; the language model's folder has its configuration and tokenizer, and no weights."""
    about, folder = golden.about, root / "said"
    said: dict[str, Any] = {"heads": about["qformer"]["heads"], "vision_heads": about["vision"]["heads"]}
    if "llm" not in about:
        bert_tokenizer(about["variant"]).save_pretrained(folder)
        return said | {"tokenizer": str(folder)}
    if "word_embed_proj_dim" in about["llm"]:
        OPTConfig(**about["llm"]).save_pretrained(folder)
        opt_tokenizer(about["variant"]).save_pretrained(folder)
    else:
        T5Config(feed_forward_proj="gated-gelu", **about["llm"]).save_pretrained(folder)
        t5_tokenizer(about["variant"]).save_pretrained(folder)
    return said | {"llm": str(folder)}


def refused(expected: str, path: Any, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        qformer.load(path, device="cpu", **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["stage1_a", "stage1_b"])
def test_stage_one_computes_what_the_original_did(name: str, tmp_path: Path) -> None:
    golden = read(name)
    model = qformer.load(write(tmp_path / "stage1.pth", golden.weight), device="cpu", **given(golden, tmp_path))
    assert isinstance(model, ImageTextModel)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.frontend.encoder.parameters())
    assert model.frontend.strategy.size == golden.about["vision"]["image_size"]
    model.max_tokens = golden.about["max_tokens"]
    images, texts = tiles(golden), golden.about["texts"]
    close(model.embed_images(images)[0], golden.out["image_feats"])
    close(model.embed_texts(texts), golden.out["text_feats"])
    close(model.match_scores(images, texts), golden.out["itm_scores"].diagonal()[1])
    ids = model.caption(images, return_ids=True, beams=1)
    same_ids(ids, golden.out["caption_greedy"][:, 1:], model.tokenizer.sep_token_id)


@torch.no_grad()
@pytest.mark.parametrize("name", STAGE2)
def test_stage_two_computes_what_the_original_did(name: str, tmp_path: Path) -> None:
    golden = read(name)
    model = qformer.load(write(tmp_path / "stage2.pth", golden.weight), device="cpu", **given(golden, tmp_path))
    assert isinstance(model, VisionLanguageModel)
    close(model.prefix(tiles(golden))[0], golden.out["prefix"])
    for way, beams in (("greedy", 1), ("beam", 5)):
        options = {"num_beams": beams, "max_new_tokens": 12, "return_ids": True, **SHORTEST}
        ids = model.generate(tiles(golden), golden.about["prompt"], **options)
        same_ids(ids, golden.out[way][:, name.startswith("t5") :], model.llm.end)


@torch.no_grad()
def test_towers_that_a_file_leaves_out_are_given(tmp_path: Path) -> None:
    golden = read("opt_a")
    kept = {n: t for n, t in golden.weight.items() if not n.startswith(("visual_encoder.", "opt_model."))}
    path, said = write(tmp_path / "bare.pth", kept), given(golden, tmp_path)
    parts = lavis.from_lavis(golden.weight)
    torch.save(parts.vision | {"norm.weight": torch.ones(24)}, tmp_path / "eva.pth")
    llm = OPTForCausalLM(OPTConfig(**golden.about["llm"]))
    llm.load_state_dict(parts.llm)
    llm.save_pretrained(said["llm"])
    model = qformer.load(path, device="cpu", vision=str(tmp_path / "eva.pth"), **said)
    close(model.prefix(tiles(golden))[0], golden.out["prefix"])
    ids = model.generate(tiles(golden), "", return_ids=True, num_beams=1, max_new_tokens=12, **SHORTEST)
    same_ids(ids, golden.out["greedy"], model.llm.end)


def test_a_language_model_of_an_older_form_is_taken_along(tmp_path: Path) -> None:
    """On the hub OPT has no safetensors, and some of its names lack the `model.` in front."""
    golden = read("opt_a")
    whole, said = write(tmp_path / "whole.pth", golden.weight), given(golden, tmp_path)
    bare = {name: tensor for name, tensor in golden.weight.items() if not name.startswith("opt_model.")}
    held = {name.removeprefix("model."): tensor for name, tensor in lavis.from_lavis(golden.weight).llm.items()}
    torch.save(held, tmp_path / "said" / "pytorch_model.bin")
    known, made = (
        read_tensors(convert_checkpoint(str(source), tmp_path / target, "transformers", LoadOptions(**said)))
        for source, target in ((whole, "known"), (write(tmp_path / "bare.pth", bare), "made"))
    )
    assert known.keys() == made.keys()
    assert all(torch.equal(made[name], known[name]) for name in known)


def test_what_cannot_be_known_is_asked_for(tmp_path: Path) -> None:
    golden = read("opt_a")
    kept = {n: t for n, t in golden.weight.items() if not n.startswith("visual_encoder.")}
    path, said = write(tmp_path / "bare.pth", kept), given(golden, tmp_path)
    refused(f"'{path}' comes without its image encoder; give the encoder's file with vision", path, **said)
    whole = write(tmp_path / "whole.pth", golden.weight)
    refused("was made for a language model of width 24; say which one with llm", whole, heads=4, vision_heads=3)
    refused("patches of this image encoder are 14 pixels wide, not 16", whole, **said, patch_size=16)
    refused("width 24 does not divide into 5 heads", whole, **(said | {"vision_heads": 5}))
    refused("qformer.hidden_size 32 does not divide into 5 heads", whole, **(said | {"heads": 5}))
    refused("load.head is not an option of 'sizes': did you mean 'heads'?", whole, head=3)
    OPTConfig(**(golden.about["llm"] | {"ffn_dim": 37})).save_pretrained(said["llm"])
    refused("has another size: model.decoder.layers.0.fc1.", whole, **said)
    OPTConfig(**(golden.about["llm"] | {"num_hidden_layers": 3})).save_pretrained(said["llm"])
    refused("does not fit BLIP-2: missing model.decoder.layers.2.", whole, **said)


def test_the_release_brings_its_prompt(tmp_path: Path) -> None:
    golden = read("opt_b")
    for name, prompt in (("blip2_caption_opt2.7b.pth", "a photo of"), ("blip2_pretrained_opt2.7b.pth", "")):
        model = qformer.load(write(tmp_path / name, golden.weight), device="cpu", **given(golden, tmp_path))
        assert model.prompt == prompt


@torch.no_grad()
def test_clip_and_halves(tmp_path: Path) -> None:
    golden = read("opt_a")
    sizes = {"image_size": 28, "patch_size": 14, "width": 24, "depth": 2, "heads": 3, "mlp_hidden": 40}
    encoder = vision.build("clip", **sizes)
    tensors = {name: t for name, t in golden.weight.items() if not name.startswith("visual_encoder.")}
    tensors |= {f"visual_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    model = qformer.load(write(tmp_path / "clip.pth", tensors), device="cpu", **given(golden, tmp_path))
    loaded = model.frontend.encoder
    assert isinstance(loaded, ClipViT)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in encoder.named_parameters()}
    assert torch.equal(loaded(golden.given["pixels"]), encoder(golden.given["pixels"]))


def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Downloads fail and are counted; torch keeps its own in `tmp_path`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    asked: list[str] = []

    def fails(url: str, *_: Any, **__: Any) -> None:
        asked.append(url)
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    return asked


def test_releases_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = offline(monkeypatch, tmp_path)
    for name, release in releases.RELEASES.items():
        url, place = releases.SITE + release.file, tmp_path / "hub" / "checkpoints" / release.file
        refused(f"get {url} where there is a network and put it at {place}", name)
        assert asked.pop() == url
        assert not list(place.parent.iterdir())
    assert len({release.file for release in releases.RELEASES.values()}) == len(releases.RELEASES)


@torch.no_grad()
def test_a_release_that_was_put_there_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, golden = offline(monkeypatch, tmp_path), read("stage1_a")
    place = tmp_path / "hub" / "checkpoints" / "blip2_pretrained.pth"
    place.parent.mkdir(parents=True)
    write(place, golden.weight)
    model = qformer.load("blip2_pretrained", device="cpu", **given(golden, tmp_path))
    close(model.embed_images(tiles(golden))[0], golden.out["image_feats"])
    assert not asked


@pytest.mark.parametrize(("width", "name"), [(1408, "eva_vit_g"), (1024, "clip_vit_L")])
def test_the_usual_tower_is_known_by_its_width(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int, name: str
) -> None:
    """The release leaves frozen encoders out."""
    asked, golden = offline(monkeypatch, tmp_path), read("stage1_a")
    tensors = {key: tensor for key, tensor in golden.weight.items() if not key.startswith("visual_encoder.")}
    for key, tensor in tensors.items():
        if ".crossattention.self.key.weight" in key or ".crossattention.self.value.weight" in key:
            tensors[key] = torch.zeros(len(tensor), width)
        if key.startswith("ln_vision."):
            tensors[key] = torch.zeros(width)
    path = write(tmp_path / "blip2_pretrained.pth", tensors)
    refused(f"'{name}' cannot be downloaded", path, heads=4)
    assert asked == [f"{releases.SITE}{name}.pth"]
    opened = lavis.open_lavis(path, LoadOptions())
    assert opened.config.resolution.options == {"size": 224}
    assert opened.tokenizer == "bert-base-uncased"
