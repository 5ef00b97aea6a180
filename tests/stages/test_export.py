"""What we trained, converted: LAVIS's and transformers' forms give the same prefixes, texts and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    OPTForCausalLM,
)

import qformer
from qformer import stages, vision
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.convert import Form, convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import Choice
from qformer.files import pretrained
from qformer.files.tensors import read_tensors
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config
from qformer.types import Tiles, UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from tests.tiny import CAPTIONS, save_tiny_llm
from tests.workspace import SIZE, config, make_workspace

EVA = {"image_size": SIZE, "patch_size": 14, "width": 24, "depth": 2, "heads": 3, "mlp_hidden": 40}
LLMS = ("opt", "t5")
SHORT: dict[str, Any] = {"train": {"steps": 2}, "data": {"validation": None}}
#: Our LayerNorm behind the encoder has LAVIS's eps of 1e-5, transformers 1e-6 in all norms of its image encoder. On the
#: tokens of this EVA that changes a prefix by less than 1e-6; with the same eps nothing is left to be seen.
ATOL = 1e-5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an EVA, stage one on it, and stage two with both shipped language models."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    encoder = vision.build("eva", **EVA)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + name.endswith(("norm1.weight", "norm2.weight")))
    torch.save(encoder.state_dict(), root / "eva.pth")
    stages.train(on_eva(root, {"weights": str(root / "eva.pth")}))
    for llm in LLMS:
        stages.train(config(root, "stage2", run=str(root / "runs" / llm), llm={"path": f"mini:{llm}"}))
    return root


def on_eva(root: Path, options: dict[str, Any], **changes: Any) -> Config:
    """A run of stage one that sees with an EVA."""
    return config(root, "stage1", **changes).model_copy(update={"vision": Choice(name="eva", **EVA, **options)})


def convert(source: Path, target: Path, form: Form, **given: Any) -> Path:
    return convert_checkpoint(str(source), target, form, LoadOptions(**given))


def both(count: int = 2) -> tuple[Tiles, Tensor]:
    pixels = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return Tiles.from_pixels(pixels), (pixels - mean) / std


@pytest.mark.canary
@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
def test_stage_two_in_transformers(trained: Path, tmp_path: Path, llm: str) -> None:
    ours = qformer.load(trained / "runs" / llm, device="cpu")
    assert isinstance(ours, VisionLanguageModel)
    folder = convert(trained / "runs" / llm, tmp_path / "theirs", "transformers")
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tiles, image = both()
    expected = theirs.get_image_features(image).pooler_output
    assert (ours.prefix(tiles)[0] - expected).abs().max() < ATOL
    ours.frontend.norm.eps = 1e-6
    assert (ours.prefix(tiles)[0] - expected).abs().max() < ATOL / 10

    prompts = ["Question: what is red? Answer:", "a"]
    options = {"num_beams": 1, "max_new_tokens": 12}
    written = ours.generate(tiles, prompts, min_new_tokens=0, **options)
    assert ours.llm.decode(their_ids(theirs, folder, prompts, **options)) == written

    again = qformer.load(folder, device="cpu")
    assert torch.equal(again.prefix(tiles)[0], ours.prefix(tiles)[0])
    assert again.generate(tiles, prompts, min_new_tokens=0, **options) == written


@torch.no_grad()
def their_ids(theirs: Any, folder: Path, prompts: list[str], **options: Any) -> Tensor:
    """New tokens of transformers, by the processor and the settings of the folder."""
    is_causal = not theirs.config.text_config.is_encoder_decoder
    tokenizer = Blip2Processor.from_pretrained(folder).tokenizer
    tokenizer.padding_side = "left" if is_causal else "right"
    ids = tokenizer(prompts, padding=True, return_tensors="pt")
    if is_causal:  # an OPT or a Llama, which begin every text with their BOS
        assert (ids["input_ids"] == tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * len(prompts)
    places = torch.full((len(prompts), 3), theirs.config.image_token_index)
    given = {"input_ids": torch.cat([places, ids["input_ids"]], dim=1)}
    given["attention_mask"] = torch.cat([torch.ones_like(places), ids["attention_mask"]], dim=1)
    said = theirs.generate(pixel_values=both(len(prompts))[1], **given, do_sample=False, **options)
    return said[:, given["input_ids"].shape[1] if is_causal else 1 :]


def test_the_place_of_an_image_is_never_written(trained: Path, tmp_path: Path) -> None:
    """The shipped OPT has no row to spare for it; and here the logits of all its words are below zero."""
    path = pretrained.tower("mini:opt")
    model, tokenizer = OPTForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    words, norm = model.get_input_embeddings().weight.data, model.model.decoder.final_layer_norm
    words[:, 0], norm.weight.data[0], norm.bias.data[0] = 1, 0, -50
    model.save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    run = tmp_path / "run"
    stages.train(config(trained, "stage2", run=str(run), llm={"path": str(tmp_path / "opt")}, **SHORT))
    folder = convert(run, tmp_path / "theirs", "transformers")
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    place = theirs.config.image_token_index
    assert place == len(words) == len(tokenizer)
    assert theirs.get_input_embeddings().num_embeddings == place + 1
    ours, prompts, options = qformer.load(run, device="cpu"), ["a", "the red"], {"num_beams": 1, "max_new_tokens": 6}
    ids = their_ids(theirs, folder, prompts, **options)
    assert (ids < place).all()
    written = ours.generate(both()[0], prompts, min_new_tokens=0, **options)
    assert ours.llm.decode(ids) == written
    again = qformer.load(folder, device="cpu")
    assert again.generate(both()[0], prompts, min_new_tokens=0, **options) == written


@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
def test_stage_two_in_lavis(trained: Path, tmp_path: Path, llm: str) -> None:
    """A file without towers, as LAVIS writes where they are frozen."""
    run = trained / "runs" / llm
    ours, file = qformer.load(run, device="cpu"), convert(run, tmp_path / "theirs.pth", "lavis")
    names = read_tensors(file).keys()
    assert f"{llm}_proj.weight" in names
    assert not any(name.startswith(("visual_encoder.", "opt_model.", "t5_model.")) for name in names)
    given = {"heads": 2, "vision": str(trained / "eva.pth"), "vision_heads": 3, "llm": f"mini:{llm}"}
    model = qformer.load(file, device="cpu", **given)
    tiles, _ = both()
    assert torch.equal(model.prefix(tiles)[0], ours.prefix(tiles)[0])
    options = {"num_beams": 3, "max_new_tokens": 12}
    assert model.generate(tiles, "a photo of", **options) == ours.generate(tiles, "a photo of", **options)
    back = convert(file, tmp_path / "back", "transformers", **given)
    direct = convert(run, tmp_path / "direct", "transformers")
    first, second = read_tensors(back), read_tensors(direct)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name].to(tensor.dtype)), name


@torch.no_grad()
@pytest.mark.canary
def test_stage_one(trained: Path, tmp_path: Path) -> None:
    run = trained / "runs" / "stage1"
    ours, (tiles, image) = qformer.load(run, device="cpu"), both()
    file = convert(run, tmp_path / "theirs.pth", "lavis")
    given = {"heads": 2, "vision": str(trained / "eva.pth"), "vision_heads": 3, "tokenizer": str(trained / "bert")}
    model = qformer.load(file, device="cpu", **given)
    assert torch.equal(model.match_scores(tiles, CAPTIONS[:2]), ours.match_scores(tiles, CAPTIONS[:2]))
    assert model.caption(tiles) == ours.caption(tiles)
    assert torch.equal(model.temp, ours.temp)

    folder = convert(run, tmp_path / "theirs", "transformers")
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
    words = Blip2Processor.from_pretrained(folder).tokenizer(CAPTIONS[:2], padding=True, return_tensors="pt")
    ids = torch.cat([torch.full((2, 3), theirs.config.image_token_index), words["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), words["attention_mask"]], dim=1)
    for matching in (False, True):
        said = theirs(image, ids, mask, use_image_text_matching_head=matching).logits_per_image
        if matching:
            assert (ours.match_scores(tiles, CAPTIONS[:2]) - said[:, 1]).abs().max() < ATOL
        else:
            similarity = (ours.embed_images(tiles)[0] @ ours.embed_texts(CAPTIONS[:2]).T).amax(dim=1)
            assert (similarity - said).abs().max() < ATOL


def test_stage_two_starts_from_what_came_from_lavis(trained: Path, tmp_path: Path) -> None:
    """The released stage one is where most will begin."""
    file = convert(trained / "runs" / "stage1", tmp_path / "theirs.pth", "lavis")
    given = {"heads": 2, "vision": str(trained / "eva.pth"), "vision_heads": 3, "tokenizer": str(trained / "bert")}
    ours = convert(file, tmp_path / "ours", "qformer", **given)
    before, after = (checkpoint.read(path).tensors for path in (trained / "runs" / "stage1", ours))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run = tmp_path / "run"
    stages.train(config(trained, "stage2", run=str(run), init=str(ours), **SHORT))
    assert checkpoint.find(run).name == "step-0000002"


def test_an_encoder_that_was_trained_comes_along(trained: Path, tmp_path: Path) -> None:
    eva, run = {"weights": str(trained / "eva.pth"), "precision": "fp32"}, tmp_path / "run"
    stages.train(on_eva(trained, eva, run=str(run), freeze_vision=False, **SHORT))
    ours, (tiles, _) = qformer.load(run, device="cpu"), both()
    for form in ("qformer", "lavis", "transformers"):
        made = convert(run, tmp_path / form, form)
        given = {"heads": 2, "vision_heads": 3, "tokenizer": str(trained / "bert")} if form == "lavis" else {}
        model = qformer.load(made, device="cpu", **given)
        model.frontend.norm.eps = ours.frontend.norm.eps
        assert torch.equal(model.embed_images(tiles)[0], ours.embed_images(tiles)[0]), form


@torch.no_grad()
def test_transformers_has_a_place_for_other_language_models(trained: Path, tmp_path: Path) -> None:
    path, run = save_tiny_llm(tmp_path / "llama", "llama"), tmp_path / "run"
    with torch.enable_grad():
        stages.train(config(trained, "stage2", run=str(run), llm={"path": str(path)}, **SHORT))
    folder = convert(run, tmp_path / "theirs", "transformers")
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours, again, (tiles, image) = qformer.load(run, device="cpu"), qformer.load(folder, device="cpu"), both()
    assert (again.prefix(tiles)[0] - theirs.get_image_features(image).pooler_output).abs().max() < 1e-5
    options = {"num_beams": 1, "max_new_tokens": 8}
    assert again.generate(tiles, "a photo", **options) == ours.generate(tiles, "a photo", **options)
    with pytest.raises(UsageError, match="has an OPT or a T5, and this checkpoint another language model"):
        convert(run, tmp_path / "theirs.pth", "lavis")


@torch.no_grad()
def test_a_tokenizer_that_forgets_bos_is_taught_to_put_it(trained: Path, tmp_path: Path) -> None:
    path = save_tiny_llm(tmp_path / "opt", "opt")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(path)
    assert AutoTokenizer.from_pretrained(path)("a")["input_ids"][0] != tokenizer.bos_token_id
    with torch.enable_grad():
        stages.train(config(trained, "stage2", run=str(tmp_path / "run"), llm={"path": str(path)}, **SHORT))
    folder = convert(tmp_path / "run", tmp_path / "theirs", "transformers")
    ours: Any = qformer.load(tmp_path / "run", device="cpu")
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, (tiles, _) = ["a photo of", "two"], both()
    texts = ours.generate(tiles, prompts, num_beams=1, max_new_tokens=8)
    assert ours.llm.decode(their_ids(theirs, folder, prompts, max_new_tokens=8)) == texts


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_adapters_are_in_what_transformers_reads(trained: Path, tmp_path: Path, kind: str) -> None:
    """The same texts for a batch of prompts of unequal length; the tokenizer of a Llama has no token to pad with."""
    llm = {"path": str(save_tiny_llm(tmp_path / "llm", kind)), "lora": {"rank": 2, "alpha": 8}}
    chosen = config(trained, "stage2", run=str(tmp_path / "run"), llm=llm, **SHORT)
    with torch.enable_grad():
        stages.train(chosen)
    saved = checkpoint.read(tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in saved.tensors.items():
        if "lora_" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(saved.tensors, saved.path / checkpoint.WEIGHTS)
    checkpoint.write_meta(saved.path, saved.meta)
    ours: Any = qformer.load(tmp_path / "run", device="cpu")
    folder = convert(tmp_path / "run", tmp_path / "theirs", "transformers")
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, (tiles, _) = ["a photo of", "two"], both()
    texts = ours.generate(tiles, prompts, num_beams=1, max_new_tokens=8)
    assert ours.llm.decode(their_ids(theirs, folder, prompts, max_new_tokens=8)) == texts
    for part in ours.llm.model.modules():
        if hasattr(part, "lora_B"):
            part.lora_B["default"].weight.zero_()
    assert ours.generate(tiles, prompts, num_beams=1, max_new_tokens=8) != texts


def test_what_has_no_place_elsewhere_is_refused(trained: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    stages.train(config(trained, "stage1", run=str(hf), **SHORT))
    for form in ("lavis", "transformers"):
        with pytest.raises(UsageError, match="and this checkpoint with 'hf'"):
            convert(hf, tmp_path / form, form)
    run, llm = tmp_path / "projected", {"path": str(save_tiny_llm(tmp_path / "folder", "opt-projected"))}
    stages.train(config(trained, "stage2", run=str(run), llm=llm, **SHORT))
    with pytest.raises(UsageError, match=r"no place for a model of these sizes: language_projection\.bias, "):
        convert(run, tmp_path / "theirs", "transformers")
    stages.train(on_eva(trained, {"layers": [1, 2]}, run=str(tmp_path / "layers"), **SHORT))
    with pytest.raises(UsageError, match=r"reads several layers of its image encoder \(vision\.layers\)"):
        convert(tmp_path / "layers", tmp_path / "theirs", "lavis")
    stages.train(on_eva(trained, {}, run=str(tmp_path / "random"), **SHORT))
    with pytest.raises(UsageError, match="random"):
        convert(tmp_path / "random", tmp_path / "theirs", "transformers")
    assert not (tmp_path / "theirs").exists()
