"""Streamed texts are those of `generate`, and end when nobody reads them any more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qformer.llm.base import CausalLM, LanguageModel, Seq2SeqLM
from qformer.llm.streaming import stream
from qformer.types import UsageError
from tests.tiny import tiny_llm


def language_model(kind: str) -> tuple[LanguageModel, torch.Tensor, torch.Tensor]:
    """A tiny model, and the visual tokens of one image."""
    llm = (Seq2SeqLM if kind == "t5" else CausalLM)(*tiny_llm(kind, seed=5))
    return llm, torch.randn(1, 3, llm.width, generator=torch.Generator().manual_seed(1)), torch.ones(1, 3).bool()


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_p": 0.95, "temperature": 2.0}], ids=["greedy", "drawn"]
)
def test_pieces_make_up_the_text(kind: str, options: dict[str, Any]) -> None:
    """Random models write broken characters and odd spaces, so that anything held back wrongly would show."""
    llm, prefix, mask = language_model(kind)
    for seed in range(3):
        options = options | {"max_new_tokens": 20, "min_new_tokens": 1 if seed else 20}
        torch.manual_seed(seed)
        pieces = list(stream(llm, prefix, mask, "a photo of", options))
        torch.manual_seed(seed)
        whole = llm.decode(llm.generate(prefix, mask, ["a photo of"], **{"num_beams": 1, **options}))
        assert "".join(pieces) == whole[0]
        assert len(pieces) > 1
        assert all(pieces)


def test_characters_of_several_tokens_come_whole() -> None:
    llm, prefix, mask = language_model("opt")
    ids = llm.tokenizer("a 字é 字!", add_special_tokens=False)["input_ids"]
    assert len(ids) > 8
    wanted = iter([*ids, llm.end])

    def push(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + torch.zeros(logits.shape[-1]).index_fill(0, torch.tensor(next(wanted)), 1e4)

    llm.model.get_output_embeddings().register_forward_hook(push)
    assert list(stream(llm, prefix, mask, "", {})) == ["a", " 字", "é", " 字", "!"]


def test_spaces_that_a_tokenizer_takes_back() -> None:
    llm, prefix, mask = language_model("t5")
    llm.tokenizer.clean_up_tokenization_spaces = True
    pieces = list(stream(llm, prefix, mask, "a photo of", {"max_new_tokens": 20, "min_new_tokens": 20}))
    options = {"num_beams": 1, "max_new_tokens": 20, "min_new_tokens": 20}
    assert "".join(pieces) == llm.decode(llm.generate(prefix, mask, ["a photo of"], **options))[0]


def test_it_ends_when_nobody_reads() -> None:
    llm, prefix, mask = language_model("opt")
    steps: list[int] = []
    llm.model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    pieces = stream(llm, prefix, mask, "", {"max_new_tokens": 120, "min_new_tokens": 120})
    next(pieces)
    pieces.close()  # as when a `for` loop is left
    done = len(steps)
    assert done < 120
    llm.decode(llm.generate(prefix, mask, [""], max_new_tokens=2))  # the model is free again
    assert len(steps) == done + 2


def test_what_goes_wrong_is_raised_where_the_pieces_are_read() -> None:
    llm, prefix, mask = language_model("opt")
    with pytest.raises(UsageError, match="128 positions"):
        next(stream(llm, prefix, mask, "", {"max_new_tokens": 200}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_beams": 3}, "beam search can change any word"),
        ({"num_return_sequences": 2, "do_sample": True}, "only one greedy or sampled text"),
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
    ],
)
def test_what_cannot_be_streamed(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        stream(*language_model("opt"), "", options)
