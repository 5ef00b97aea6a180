"""Images and texts in turn, against embeddings joined by hand."""

from __future__ import annotations

import pytest
import torch

from qformer.connectors.interleave import interleave, put_in_front
from qformer.llm.base import CausalLM, LanguageModel, Seq2SeqLM
from qformer.types import Tiles
from tests.tiny import tiny_llm

BEGIN = {"opt": [2], "llama": [1], "gpt2": [], "t5": []}  # written out: what stands in front of every text


@pytest.mark.parametrize("kind", BEGIN)
def test_images_and_texts_alternate(kind: str) -> None:
    """Rows of different lengths, of images with different numbers of tokens, one of which is read in two rows."""
    llm: LanguageModel = (Seq2SeqLM if kind == "t5" else CausalLM)(*tiny_llm(kind))
    visual = torch.randn(3, 4, llm.width, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    rows: list[list[int | str]] = [[2, "a red bus", 1, "dogs", 0], [1], [1, "", 2]]
    prefix, valid = interleave(llm, visual, mask, rows)

    def text(words: str) -> torch.Tensor:
        ids = [*BEGIN[kind], *llm.tokenizer(words, add_special_tokens=False)["input_ids"], llm.end]
        return llm.model.get_input_embeddings()(torch.tensor(ids))

    images = [visual[0], visual[1, [1, 3]], visual[2, :1]]
    by_hand = [
        torch.cat([images[2], text("a red bus"), images[1], text("dogs"), images[0]]),
        images[1],
        torch.cat([images[1], text(""), images[2]]),
    ]
    assert valid.sum(dim=1).tolist() == [len(row) for row in by_hand]
    for row, ok, wanted in zip(prefix, valid, by_hand, strict=True):
        assert torch.equal(row[ok], wanted)
        assert ok[: len(wanted)].all()


def test_examples_are_planned_once_each() -> None:
    """Two questions of the first image, one of the second; an image that is an example thrice, of two questions."""
    tiles, bus, dog = (
        Tiles.from_pixels(torch.full((count, 3, 2, 2), shade)) for count, shade in ((2, 0), (1, 1), (1, 2))
    )
    shown = [[(bus, "what?", "what? a bus"), (dog, "", "a dog")], [(bus, "red?", "red? yes"), (bus, "what?", "again")]]
    images, asked, rows = put_in_front(tiles, [["where?", "why?"], ["who?"]], shown)
    assert [int(pixels.max()) for pixels in images.pixels] == [0, 0, 1, 2]
    assert asked == [["where?", "why?"], ["who?"], ["what?", "red?"], [""]]
    front: list[int | str] = [3, "what? a bus", 5, "a dog"]  # questions are counted through: 0 1, 2, 3 4, 5
    assert rows == [[*front, 0], [*front, 1], [4, "red? yes", 3, "again", 2]]
