"""Captioners and rankers: texts that depend on their own numbers alone, similarities that are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BlipForConditionalGeneration, TopPLogitsWarper

from qformer import load, stages
from qformer.evaluation import retrieval
from qformer.llm.decoding import GenerateConfig, nucleus
from qformer.retrieval.embedders import load_embedder
from qformer.stages.capfilt.models import NEW_TOKENS, load_captioner
from qformer.types import UsageError
from tests.tiny_clip import save_tiny_blip, save_tiny_clip, save_tiny_siglip
from tests.workspace import config, make_workspace

COUNT = 3
TEXTS = [["a cat", "a dog on the beach"], ["two people riding a red bus"], ["the old train " * 12, "a", "rain"]]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, checkpoints of both stages, and the models of transformers."""
    root = make_workspace(tmp_path_factory.mktemp("space") / "it")
    stages.train(config(root, "stage1", run=str(root / "one")))
    for run, llm in (("two", "opt"), ("two-t5", "flan-t5")):
        stages.train(config(root, "stage2", run=str(root / run), init=str(root / "one"), llm={"path": str(root / llm)}))
    save_tiny_clip(root / "clip")
    save_tiny_siglip(root / "siglip")
    save_tiny_blip(root / "blip")
    return root


def images(sizes: tuple[tuple[int, int], ...] = ((40, 30), (30, 50), (28, 28))) -> list[torch.Tensor]:
    """uint8[3, h, w] of these widths and heights."""
    rng = np.random.default_rng(5)
    return [torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8)) for w, h in sizes]


def draws(rows: int) -> list[list[float]]:
    return np.random.default_rng(6).random((rows, NEW_TOKENS)).tolist()


@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.5, 2.0), (1.0, 0.7), (1e-6, 1.0)])
def test_nucleus_draws_by_the_probabilities_that_transformers_leaves(top_p: float, temperature: float) -> None:
    logits = 2 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    steps = 20_000
    even = (torch.arange(steps) + 0.5) / steps  # every draw, equally often
    kept = TopPLogitsWarper(top_p)(None, logits / temperature).softmax(dim=1)
    for row, expected in zip(logits, kept, strict=True):
        found = nucleus(row.expand(steps, -1), even, top_p, temperature).bincount(minlength=50) / steps
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
        assert kept.isfinite().all()
    least = kept.masked_fill(kept == 0, 2.0).argmin(dim=1)
    assert torch.equal(nucleus(logits, torch.ones(4), top_p, temperature), least)  # as far as rounding may go
    assert torch.equal(nucleus(logits, torch.zeros(4), top_p, temperature), logits.argmax(dim=1))


@pytest.mark.parametrize("kind", ["one", "two", "two-t5", "blip"])
def test_a_caption_depends_on_its_image_and_its_numbers_alone(space: Path, kind: str) -> None:
    captioner, photos, numbers = load_captioner(str(space / kind), "cpu"), images(), draws(3 * COUNT)
    together = captioner(photos, numbers)
    assert len(together) == 3 * COUNT
    assert len(set(together)) > COUNT
    torch.manual_seed(99)
    alone = []
    for number, photo in enumerate(photos):
        for row in numbers[number * COUNT : (number + 1) * COUNT]:
            alone += captioner([photo], [row])
    assert alone == together
    assert captioner(photos, draws(4 * 3 * COUNT)[-3 * COUNT :]) != together


def test_stage_one_samples_greedily_where_nothing_else_is_left(space: Path) -> None:
    model = load(space / "one", "cpu")
    tiles = model.frontend.tiles(images())
    greedy = model.caption(tiles, beams=1, min_length=7)
    assert model.sample_captions(tiles, torch.rand(3, 29), top_p=1e-6, min_length=7) == greedy


def test_stage_two_sees_the_prompt(space: Path) -> None:
    usual, other = (load_captioner(str(space / "two"), "cpu", prompt)(images(), draws(6)) for prompt in (None, "two"))
    assert usual != other


@pytest.mark.parametrize("prompt", [None, "a dog on"])
def test_blip_goes_on_from_its_prompt_token_by_token(space: Path, prompt: str | None) -> None:
    model = BlipForConditionalGeneration.from_pretrained(space / "blip").eval()
    processor = AutoProcessor.from_pretrained(space / "blip")
    photos, numbers = images(), draws(3)
    inputs = processor([to_pil(photo) for photo in photos], ["a picture of" if prompt is None else prompt] * 3)
    ids = torch.tensor(inputs["input_ids"])[:, :-1]
    ids[:, 0], end, front = processor.tokenizer.bos_token_id, processor.tokenizer.sep_token_id, ids.shape[1]
    seen = model.vision_model(torch.tensor(np.array(inputs["pixel_values"])))[0]
    for step in range(NEW_TOKENS):
        logits = model.text_decoder(ids, encoder_hidden_states=seen).logits[:, -1].detach()
        if step == 0:
            logits[:, end] = -torch.inf  # at least one token
        ids = torch.cat([ids, nucleus(logits, torch.tensor(numbers)[:, step])[:, None]], dim=1)
    rows = [row[front:].tolist() for row in ids]
    expected = [row[: row.index(end)] if end in row else row for row in rows]
    said = load_captioner(str(space / "blip"), "cpu", prompt)(photos, numbers)
    assert said == [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in expected]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_similarity_is_that_of_transformers(space: Path, kind: str) -> None:
    """Cosines: what the model itself divides by its temperature, for texts that are cut, too."""
    ranker, photos = load_embedder(str(space / kind), "cpu"), images()
    found = ranker(photos, TEXTS)
    model, processor = (auto.from_pretrained(space / kind) for auto in (AutoModel, AutoProcessor))
    flat = [text for own in TEXTS for text in own]
    options: dict[str, Any] = {"padding": True} if kind == "clip" else {"padding": "max_length"}
    inputs = processor([to_pil(photo) for photo in photos], flat, truncation=True, return_tensors="pt", **options)
    if kind == "siglip":
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits_per_image  # (3, texts)
    cosines = (logits - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()
    of = [number for number, own in enumerate(TEXTS) for _ in own]
    expected = cosines[of, range(len(flat))]
    torch.testing.assert_close(torch.tensor([score for own in found for score in own]), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01
    assert ranker.too_long(flat) == 1


def test_stage_one_ranks_as_in_retrieval(space: Path) -> None:
    model, photos = load(space / "one", "cpu"), images()
    flat = [text for own in TEXTS for text in own]
    with torch.no_grad():
        itc = retrieval.score(model, [model.frontend.tiles(photos)], flat, 0).itc
    of = [number for number, own in enumerate(TEXTS) for _ in own]
    found = torch.tensor([score for own in load_embedder(str(space / "one"), "cpu")(photos, TEXTS) for score in own])
    torch.testing.assert_close(found, itc[of, range(len(flat))], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "one"])
def test_images_of_any_shape_are_ranked(space: Path, kind: str) -> None:
    odd = images(((1, 1), (3, 5), (3000, 1), (2, 2500)))
    scores = load_embedder(str(space / kind), "cpu")(odd, [["a cat"], [], ["a dog", "rain"], ["a bus"]])
    assert list(map(len, scores)) == [1, 0, 2, 1]
    assert np.isfinite([score for own in scores for score in own]).all()


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_what_cannot_caption_or_rank_is_said(space: Path, tmp_path: Path) -> None:
    for path, expected in (("clip", "holds a clip model; a captioner is"), ("none", "no checkpoint at")):
        with pytest.raises(UsageError, match=expected):
            load_captioner(str(space / path), "cpu")
    with pytest.raises(UsageError, match="captions without a prompt"):
        load_captioner(str(space / "one"), "cpu", prompt="a")
    for path, expected in (("two", "of stage two; a ranker"), ("vit", "holds a vit model"), ("bert", "holds a bert")):
        with pytest.raises(UsageError, match=expected):
            load_embedder(str(space / path), "cpu")
    model = BlipForConditionalGeneration.from_pretrained(space / "blip")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "crossattention" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(UsageError, match="lacks weights"):
        load_captioner(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    "options",
    [{"num_return_sequences": 2}, {"draws": draws(1)}, {"do_sample": True, "draws": [[0.5]]}],
)
def test_sampling_options_that_contradict_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"num_return_sequences must be|draws must be"):
        GenerateConfig(**options)
