"""`convert_checkpoint`: folders of transformers become any form and come back to the bit; and they still work there."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    GPTNeoXConfig,
)

import qformer
from qformer.checkpoints.convert import Form, convert_checkpoint
from qformer.checkpoints.hugging_face import check_family
from qformer.checkpoints.names import LM_HEAD
from qformer.checkpoints.parts import LoadOptions
from qformer.files.tensors import read_tensors
from qformer.llm.loading import language_model
from qformer.types import UsageError
from tests.their_blip2 import KINDS, PROMPTS, SIZES, TEXTS, both, fill, make
from tests.tiny_families import tiny_family

ALL = (*KINDS, "itr")


def convert(source: Path, target: Path, form: Form, **given: Any) -> Path:
    made = convert_checkpoint(str(source), target, form, LoadOptions(**given))
    assert not list(target.parent.glob("*.partial"))
    return made


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


def theirs(folder: Path, kind: str) -> Any:
    auto = Blip2ForImageTextRetrieval if kind == "itr" else Blip2ForConditionalGeneration
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def lavis_given(kind: str, ours: Path) -> dict[str, Any]:
    """What a file of LAVIS does not tell."""
    sizes = SIZES[kind]
    return {"heads": sizes["heads"], "vision_heads": sizes["heads"], "llm": str(ours / "llm")}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every kind: `KIND` of transformers, `KIND-qformer` and, of stage two, `KIND-lavis.pth` made from it."""
    root = tmp_path_factory.mktemp("space")
    for kind in ALL:
        make(kind, root / kind)
        convert(root / kind, root / f"{kind}-qformer", "qformer")
        if kind != "itr":
            convert(root / kind, root / f"{kind}-lavis.pth", "lavis")
    return root


@pytest.mark.parametrize("kind", ALL)
def test_through_qformer_and_back(space: Path, tmp_path: Path, kind: str) -> None:
    same(
        read_tensors(convert(space / f"{kind}-qformer", tmp_path / "back", "transformers")), read_tensors(space / kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_through_lavis_and_back(space: Path, tmp_path: Path, kind: str) -> None:
    given = lavis_given(kind, space / f"{kind}-qformer")
    back = convert(space / f"{kind}-lavis.pth", tmp_path / "back", "transformers", **given)
    same(read_tensors(back), read_tensors(space / kind))
    around = convert(space / f"{kind}-lavis.pth", tmp_path / "ours", "qformer", **given)
    for name in ("model.safetensors", "vision.safetensors", "llm"):
        same(read_tensors(around / name), read_tensors(space / f"{kind}-qformer" / name))
    again = convert(around, tmp_path / "again.pth", "lavis")
    same(read_tensors(again), read_tensors(space / f"{kind}-lavis.pth"))


@pytest.mark.parametrize("kind", ["opt", "itr"])
def test_from_shards(space: Path, tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    same(read_tensors(tmp_path / "sharded"), read_tensors(space / kind))
    back = convert(tmp_path / "sharded", tmp_path / "back", "transformers")
    same(read_tensors(back), read_tensors(space / kind))


@pytest.mark.parametrize("kind", ALL)
def test_halves_stay_halves(tmp_path: Path, kind: str) -> None:
    """Through each form, though ours loads the bridge in single."""
    make(kind, tmp_path / "half", dtype=torch.float16)
    half = read_tensors(tmp_path / "half")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    ours = convert(tmp_path / "half", tmp_path / "ours", "qformer")
    same(read_tensors(convert(ours, tmp_path / "back", "transformers")), half)
    if kind != "itr":
        lavis = convert(tmp_path / "half", tmp_path / "half.pth", "lavis")
        back = convert(lavis, tmp_path / "from-lavis", "transformers", **lavis_given(kind, ours))
        same(read_tensors(back), half)
    model = qformer.load(tmp_path / "half", device="cpu")
    again = qformer.load(ours, device="cpu")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
        if not name.startswith("frontend.encoder."):
            assert one.dtype == torch.float32, name


@torch.no_grad()
@pytest.mark.parametrize("form", ["qformer", "lavis"])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_computes_the_same_from_every_form(space: Path, kind: str, form: str) -> None:
    known = qformer.load(space / kind, device="cpu")
    if form == "lavis":
        given = lavis_given(kind, space / f"{kind}-qformer") | {"patch_size": SIZES[kind]["patch"]}
        model = qformer.load(space / f"{kind}-lavis.pth", device="cpu", **given)
        model.frontend.norm.eps = known.frontend.norm.eps  # LAVIS has 1e-5, transformers 1e-6: no tensor tells
        assert known.frontend.norm.eps == 1e-6
    else:
        model = qformer.load(space / f"{kind}-{form}", device="cpu")
    tiles, _ = both(kind)
    assert torch.equal(model.prefix(tiles)[0], known.prefix(tiles)[0])
    options = {"num_beams": 1, "max_new_tokens": 10, "return_ids": True}
    if kind == "flan-t5" and form == "lavis":
        known.llm = model.llm  # whose gated GELU is that of the original
    assert torch.equal(model.generate(tiles, PROMPTS, **options), known.generate(tiles, PROMPTS, **options))


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_transformers_computes_the_same_from_what_we_write(space: Path, tmp_path: Path, kind: str) -> None:
    folder = convert(space / f"{kind}-qformer", tmp_path / "back", "transformers")
    before, after = theirs(space / kind, kind), theirs(folder, kind)
    processor, (_, image) = Blip2Processor.from_pretrained(folder), both(kind)
    queries = SIZES[kind]["queries"]
    assert processor.num_query_tokens == queries
    assert after.config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>")
    side = SIZES[kind]["side"] * SIZES[kind]["patch"]
    pictures = [np.zeros((side, side, 3), np.uint8)] * 2
    assert processor.tokenizer.padding_side == ("left" if kind == "opt" else "right")
    given = processor(images=pictures, text=TEXTS if kind == "itr" else PROMPTS, padding=True, return_tensors="pt")
    assert (given["input_ids"][:, :queries] == after.config.image_token_index).all()
    given["pixel_values"] = image
    if kind != "itr":
        assert torch.equal(
            after.get_image_features(image).pooler_output, before.get_image_features(image).pooler_output
        )
        options = {"num_beams": 1, "max_new_tokens": 8}
        assert torch.equal(after.generate(**given, **options), before.generate(**given, **options))
        return
    bare = {name: given[name][:, queries:] for name in ("input_ids", "attention_mask")}  # theirs has no such places
    for head in (False, True):
        said = after(**given, use_image_text_matching_head=head)
        expected = before(pixel_values=image, **bare, use_image_text_matching_head=head)
        assert torch.equal(said.logits_per_image, expected.logits_per_image)


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral", "qwen3_moe"])
def test_language_models_whose_files_have_other_names_than_memory(tmp_path: Path, kind: str) -> None:
    """`embed_out` is the head of a GPT-NeoX in its files, and the experts of a Mixtral stand there one by one."""
    model = tiny_family(kind).model
    model.save_pretrained(tmp_path)
    stored = read_tensors(tmp_path)
    assert stored.keys() - model.state_dict().keys()
    same(dict(language_model(model.config, stored, "it").state_dict()), dict(model.state_dict()))
    with pytest.raises(UsageError, match="the language model in 'it' does not fit"):
        language_model(model.config, {name: stored[name] for name in list(stored)[1:]}, "it")


@torch.no_grad()
def test_an_exported_gpt_neox_is_loaded_again(space: Path, tmp_path: Path) -> None:
    """The OPT of a BLIP-2 replaced by a GPT-NeoX, through transformers' own folder, ours, and theirs again."""
    folder = tmp_path / "theirs"
    shutil.copytree(space / "opt", folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = theirs(folder, "opt").config
    words = config.text_config.vocab_size
    config.text_config = GPTNeoXConfig(
        vocab_size=words, max_position_embeddings=96, bos_token_id=2, eos_token_id=2, **sizes
    )
    model: Any = Blip2ForConditionalGeneration(config).eval()
    fill(model)
    model.save_pretrained(folder)
    assert "language_model.embed_out.weight" in read_tensors(folder)
    ours = qformer.load(folder, device="cpu")
    tiles, _ = both("opt")
    options = {"num_beams": 1, "max_new_tokens": 8, "return_ids": True}
    said = ours.generate(tiles, PROMPTS, **options)
    back = convert(convert(folder, tmp_path / "ours", "qformer"), tmp_path / "back", "transformers")
    same(read_tensors(back), read_tensors(folder))
    assert torch.equal(qformer.load(back, device="cpu").generate(tiles, PROMPTS, **options), said)


def test_language_models_that_their_blip2_would_halve_are_refused() -> None:
    for kind in ("bart", "mbart", "marian", "pegasus", "blenderbot"):
        with pytest.raises(UsageError, match=f"takes every {kind} for a model that only decodes"):
            check_family(AutoConfig.for_model(kind))
    with pytest.raises(UsageError, match="hidden_size, which the configuration of a t5gemma lacks"):
        check_family(AutoConfig.for_model("t5gemma"))
    for kind in ("t5", "opt", "gpt_neox"):
        check_family(AutoConfig.for_model(kind))


def photos() -> list[Image.Image]:
    """As people have them: of any shape, one grey, one that was stored as JPEG."""
    rng = np.random.default_rng(0)
    images = []
    for size in ((40, 60), (97, 31), (28, 28), (200, 150)):
        ramp = np.linspace(rng.integers(0, 255, 3), rng.integers(0, 255, 3), size[0])[:, None]
        pixels = np.broadcast_to(ramp, (*size, 3)) + rng.integers(-60, 60, (*size, 3))
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    jpeg = io.BytesIO()
    images[3].save(jpeg, "JPEG")
    return [images[0], images[1].convert("L"), images[2], Image.open(jpeg)]


def captions_of_theirs(folder: Path, kind: str, prompts: list[str], **options: Any) -> list[str]:
    """By their model and processor, as their documentation has it. OPT says its prompt again."""
    model, processor = theirs(folder, kind), AutoProcessor.from_pretrained(folder)
    images = [image.convert("RGB") for image in photos()]
    given = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    said = model.generate(**given, **options)
    new = said[:, given["input_ids"].shape[1] :] if kind == "opt" else said
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_captions_in_transformers(space: Path, tmp_path: Path, kind: str, beams: int) -> None:
    """From pictures on, in one batch of prompts of unequal length. Beams agree where no length is divided by.

    Pictures that are resized may differ by one of 255 levels, which their PIL and our PyTorch round differently.
    """
    folder = convert(space / f"{kind}-qformer", tmp_path / "back", "transformers")
    ours = qformer.load(space / f"{kind}-qformer", device="cpu")
    prompts = ["a photo of", "", PROMPTS[0], "two people riding a red bus"]
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 12, "min_new_tokens": 1}
    options |= {"length_penalty": 0.0} if beams > 1 else {}
    tiles = ours.frontend.tiles(photos())
    said = ours.generate(tiles, prompts, **options)
    assert len(set(said)) > 2
    shown = AutoProcessor.from_pretrained(folder)(images=[p.convert("RGB") for p in photos()], return_tensors="pt")
    encoder = ours.frontend.encoder
    seen = shown["pixel_values"] * encoder.std + encoder.mean
    assert (255 * seen - torch.stack(list(tiles.pixels)).float()).abs().max() < 1.01
    assert captions_of_theirs(folder, kind, prompts, **options) == said


@torch.no_grad()
def test_a_resolution_other_than_the_encoders_comes_along(space: Path, tmp_path: Path) -> None:
    """Their encoder takes one size; the table of positions is resized once and for all."""
    larger = tmp_path / "larger"
    shutil.copytree(space / "opt-qformer", larger)
    text = (larger / "config.yaml").read_text()
    assert "  size: 28" in text
    (larger / "config.yaml").write_text(text.replace("  size: 28", "  size: 56"))
    ours = qformer.load(larger, device="cpu")
    prompts = ["a photo of", "", PROMPTS[0], "dogs"]
    options = {"num_beams": 1, "max_new_tokens": 12, "min_new_tokens": 1}
    said = ours.generate(ours.frontend.tiles(photos()), prompts, **options)
    as_before = qformer.load(space / "opt-qformer", device="cpu")
    assert as_before.generate(as_before.frontend.tiles(photos()), prompts, **options) != said
    folder = convert(larger, tmp_path / "back", "transformers")
    assert captions_of_theirs(folder, "opt", prompts, **options) == said


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_ends_its_texts_where_we_do(space: Path, tmp_path: Path, kind: str) -> None:
    """With the settings that the folder brings: OPT's texts end with a newline, which its own configuration denies."""
    ours = qformer.load(space / f"{kind}-qformer", device="cpu")
    model = theirs(convert(space / f"{kind}-qformer", tmp_path / "back", "transformers"), kind)
    assert model.language_model.generation_config.eos_token_id == ours.llm.end


def test_the_processor_shows_transformers_what_ours_sees(space: Path, tmp_path: Path) -> None:
    folder = convert(space / "opt", tmp_path / "back", "transformers")
    picture = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    model = qformer.load(folder, device="cpu")
    encoder, tiles = model.frontend.encoder, model.frontend.tiles([picture])
    seen = (tiles.pixels[0].float() / 255 - encoder.mean) / encoder.std
    shown = Blip2Processor.from_pretrained(folder)(images=picture, return_tensors="pt")["pixel_values"][0]
    assert (seen - shown).abs().max() < 1e-6


def test_retrieval_has_no_place_in_lavis(space: Path, tmp_path: Path) -> None:
    missing = ", ".join(sorted(ours for ours, _, _ in LM_HEAD))
    for source in ("itr", "itr-qformer"):
        with pytest.raises(UsageError) as caught:
            convert(space / source, tmp_path / "itr.pth", "lavis")
        assert f"missing {missing}; left over nothing" in str(caught.value)
        assert not (tmp_path / "itr.pth").exists()
    ours = qformer.load(space / "itr-qformer", device="cpu")
    with pytest.raises(UsageError, match="no captioning head"):
        ours.caption(both("itr")[0])


@torch.no_grad()
def test_a_key_bias_learned_in_transformers_changes_nothing(tmp_path: Path) -> None:
    """It adds the same to all scores of a query, which the softmax drops; EVA has none."""
    model = make("opt", tmp_path / "opt")
    for layer in model.vision_model.encoder.layers:
        keys = layer.self_attn.qkv.bias.chunk(3)[1]
        keys.copy_(torch.randn(keys.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tmp_path / "opt")
    tiles, pixels = both("opt")
    expected = model.get_image_features(pixel_values=pixels).last_hidden_state
    ours = qformer.load(tmp_path / "opt", device="cpu").frontend(tiles).padded()[0]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    convert(tmp_path / "opt", tmp_path / "back", "transformers")
    again = theirs(tmp_path / "back", "opt").get_image_features(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(again, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ALL)
def test_the_tokenizer_comes_along(space: Path, tmp_path: Path, kind: str) -> None:
    folder = convert(space / f"{kind}-qformer", tmp_path / "back", "transformers")
    known, got = (AutoTokenizer.from_pretrained(path) for path in (space / kind, folder))
    assert got(TEXTS)["input_ids"] == known(TEXTS)["input_ids"]
