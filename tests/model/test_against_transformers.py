"""Folders of transformers' BLIP-2 loaded by us, held against transformers itself with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2Processor

import qformer
from qformer import losses
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import UsageError
from tests.their_blip2 import KINDS, PROMPTS, SIZES, TEXTS, both, make

if TYPE_CHECKING:
    from pathlib import Path

ATOL = 1e-5


@dataclass
class Pair:
    kind: str
    theirs: Any
    ours: VisionLanguageModel
    processor: Any

    def inputs(self, prompts: list[str]) -> dict[str, Tensor]:
        """Ids as transformers wants them: a place for each query in front, padding where the model's rows begin."""
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left" if self.kind == "opt" else "right"
        rows = tokenizer(prompts, padding=True, return_tensors="pt")
        places = torch.full((len(prompts), SIZES[self.kind]["queries"]), self.theirs.config.image_token_index)
        ids = torch.cat([places, rows["input_ids"]], dim=1)
        return {"input_ids": ids, "attention_mask": torch.cat([torch.ones_like(places), rows["attention_mask"]], dim=1)}

    @torch.no_grad()
    def their_text(self, prompts: list[str], **options: Any) -> list[list[int]]:
        inputs = self.inputs(prompts)
        options |= {"eos_token_id": self.ours.llm.end, "pad_token_id": self.ours.llm.end, "do_sample": False}
        ids = self.theirs.generate(pixel_values=both(self.kind)[1], **inputs, **options)
        front = inputs["input_ids"].shape[1] if self.kind == "opt" else 1
        return cut(ids[:, front:], self.ours.llm.end)


def cut(ids: Tensor, end: int) -> list[list[int]]:
    """Rows up to the one that ends a text; behind it stands padding, which differs."""
    return [row[: row.index(end)] if end in row else row for row in ids.tolist()]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param, folder)
    ours = qformer.load(folder, device="cpu")
    assert isinstance(ours, VisionLanguageModel)
    return Pair(request.param, theirs, ours, Blip2Processor.from_pretrained(folder))


def test_the_head_of_flan_t5_is_its_own(pair: Pair) -> None:
    model = pair.ours.llm.model
    tied = torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    assert tied == (pair.kind != "flan-t5")
    assert torch.equal(model.get_output_embeddings().weight, pair.theirs.language_model.lm_head.weight)


@torch.no_grad()
def test_prefix(pair: Pair) -> None:
    tiles, image = both(pair.kind)
    prefix, mask = pair.ours.prefix(tiles)
    theirs = pair.theirs.get_image_features(image).pooler_output
    assert prefix.shape == (2, SIZES[pair.kind]["queries"], pair.ours.llm.width)
    assert mask.all()
    assert theirs.abs().max() > 0.5
    assert (prefix - theirs).abs().max() < ATOL


@torch.no_grad()
def test_logits_of_a_prompt(pair: Pair) -> None:
    """Our prefix in front of the embedded prompt, given to the language model that we loaded."""
    tiles, image = both(pair.kind)
    inputs, queries = pair.inputs(PROMPTS), SIZES[pair.kind]["queries"]
    start = {} if pair.kind == "opt" else {"decoder_input_ids": torch.tensor([[0, 5, 9], [0, 7, 3]])}
    theirs = pair.theirs(pixel_values=image, **inputs, **start).logits
    model = pair.ours.llm.model
    words = model.get_input_embeddings()(inputs["input_ids"][:, queries:])
    embeds = torch.cat([pair.ours.prefix(tiles)[0], words], dim=1)
    ours = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **start).logits
    if pair.kind == "opt":
        seen = inputs["attention_mask"].bool()
        ours, theirs = ours[seen], theirs[seen]
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() < ATOL


@torch.no_grad()
def test_loss_of_a_text_behind_a_prompt(pair: Pair) -> None:
    """The public way to the same logits: the sum of the cross-entropies of the words of the text."""
    tiles, image = both(pair.kind)
    llm, prompts = pair.ours.llm, [f"{prompt} " for prompt in PROMPTS]
    total, count = llm.loss(*pair.ours.prefix(tiles), TEXTS, prompts, max_tokens=90)
    words = [pair.processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [llm.end] for text in TEXTS]
    theirs, targets = torch.tensor(0.0), 0
    for row, (prompt, text) in enumerate(zip(prompts, TEXTS, strict=True)):
        if pair.kind == "opt":
            inputs = pair.inputs([prompt + text])
            ids = torch.cat([inputs["input_ids"], torch.tensor([[llm.end]])], dim=1)
            logits = pair.theirs(pixel_values=image[row : row + 1], input_ids=ids).logits[0, :-1]
            known = len(pair.processor.tokenizer(prompt.rstrip())["input_ids"]) + SIZES["opt"]["queries"]
            logits, labels = logits[known - 1 :], ids[0, known:]
        else:
            labels = torch.tensor(words[row])
            start = torch.cat([torch.tensor([0]), labels[:-1]])[None]
            inputs = pair.inputs([prompt])
            logits = pair.theirs(pixel_values=image[row : row + 1], decoder_input_ids=start, **inputs).logits[0]
        theirs += F.cross_entropy(logits, labels, reduction="sum")
        targets += len(labels)
    assert count == targets
    assert total.item() == pytest.approx(theirs.item(), abs=1e-4)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:] * 2])
def test_greedy_text(pair: Pair, prompts: list[str]) -> None:
    options = {"num_beams": 1, "max_new_tokens": 12}
    ids = pair.ours.generate(both(pair.kind)[0], prompts, return_ids=True, min_new_tokens=0, **options)
    written = cut(ids, pair.ours.llm.end)
    assert written == pair.their_text(prompts, **options)
    assert written[0] != written[1]


def test_text_of_three_beams(pair: Pair) -> None:
    """Without a length penalty: ours counts the prompt, too, as the original does (see qformer.llm.decoding)."""
    options = {"num_beams": 3, "max_new_tokens": 8, "length_penalty": 0.0}
    ids = pair.ours.generate(both(pair.kind)[0], PROMPTS, return_ids=True, min_new_tokens=0, **options)
    assert cut(ids, pair.ours.llm.end) == pair.their_text(PROMPTS, **options)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ImageTextModel, Path]:
    folder = tmp_path_factory.mktemp("itr")
    theirs = make("itr", folder)
    ours = qformer.load(folder, device="cpu")
    assert isinstance(ours, ImageTextModel)
    return theirs, ours, folder


@torch.no_grad()
def test_similarity_and_matching(retrieval: tuple[Any, ImageTextModel, Path]) -> None:
    theirs, ours, _ = retrieval
    tiles, image = both("itr", 3)
    texts = [*TEXTS, "two cats and a dog"]
    tokens = ours.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    said = theirs(pixel_values=image, use_image_text_matching_head=False, **tokens)
    rows, valid = ours.embed_images(tiles)
    words = ours.embed_texts(texts)
    assert valid.all()
    assert (rows - said.image_embeds).abs().max() < ATOL
    assert (words - said.text_embeds).abs().max() < ATOL
    assert (losses.similarity(rows, words).T - said.logits_per_image).abs().max() < ATOL
    assert said.logits_per_image.std() > 0.01
    said = theirs(pixel_values=image, use_image_text_matching_head=True, **tokens).logits_per_image
    assert (ours.match_scores(tiles, texts) - said[:, 1]).abs().max() < ATOL
    assert said[:, 1].std() > 0.01


def test_what_transformers_does_not_hold_is_not_made_up(retrieval: tuple[Any, ImageTextModel, Path]) -> None:
    _, ours, _ = retrieval
    assert not any("lm_head" in name for name in ours.state_dict())
    with pytest.raises(UsageError, match=r"has no captioning head.* transformers, which cannot store one"):
        ours.caption(both("itr")[0])
