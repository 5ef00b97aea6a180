"""Beam search against trying every text, and captions of stage one against the uncached decoder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from qformer.llm.base import Abilities, CausalLM, LanguageModel, Seq2SeqLM
from qformer.llm.decoding import beam_search
from qformer.llm.rows import join, pad
from qformer.model.assembly import build_image_text
from qformer.model.image_text import ImageTextModel
from qformer.types import UsageError
from tests.tiny import LLM_KINDS, tiny_llm
from tests.workspace import config, make_workspace

END, PAD, START = 3, 0, 1


def markov(seed: int, batch: int, vocabulary: int = 5) -> torch.Tensor:
    """Logits of the next token after each token, for each row: float[B, V, V]."""
    return 2 * torch.randn(batch, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))


def search(table: torch.Tensor, beams: int, **options: Any) -> list[list[int]]:
    def step(texts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        calls.append(rows)
        image = torch.arange(len(table)).repeat_interleave(len(texts) // len(table))
        return table[image, texts[:, -1]].log_softmax(dim=1)

    calls: list[torch.Tensor] = []
    start = torch.full((len(table), 1), START)
    settings = {"max_length": 6, "min_length": 0, **options}
    return beam_search(step, start, END, PAD, beams=beams, **settings).tolist()


def every_text(table: torch.Tensor, length: int, penalty: float) -> list[int]:
    """The best of all texts of at most `length` tokens in all."""
    log_probs = table.log_softmax(dim=1)
    best: tuple[float, list[int]] = (-torch.inf, [])
    for size in range(1, length):
        for text in itertools.product(range(len(table)), repeat=size):
            ended, body = text[-1] == END, text[:-1]
            if END in body or (not ended and size < length - 1):
                continue
            total = sum(log_probs[a, b].item() for a, b in itertools.pairwise((START, *text)))
            counted = 1 + size - ended  # the start counts, the end does not
            best = max(best, (total / counted**penalty, list(text)))
    return best[1]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_enough_beams_it_finds_the_best_of_all(penalty: float) -> None:
    tables = torch.cat([markov(seed, 1) for seed in range(8)])
    found = search(tables, beams=64, length_penalty=penalty, max_length=5)
    for table, row in zip(tables, found, strict=True):
        best = every_text(table, 5, penalty)
        assert row == best + [PAD] * (len(row) - len(best))


def test_one_beam_is_greedy() -> None:
    tables = markov(3, 4)
    for table, row in zip(tables, search(tables, beams=1), strict=True):
        token, text = START, []
        while token != END and len(text) < 5:
            token = int(table[token].argmax())
            text.append(token)
        assert row == text + [PAD] * (len(row) - len(text))


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_do_not_disturb_one_another(beams: int) -> None:
    tables = markov(7, 6)
    together = search(tables, beams)
    for number, row in enumerate(together):
        alone = search(tables[number : number + 1], beams)[0]
        assert row == alone + [PAD] * (len(row) - len(alone))


def test_no_text_ends_before_its_least_length() -> None:
    tables = markov(0, 3)
    tables[:, :, END] += 50
    assert search(tables, beams=2) == [[END]] * 3
    for row in search(tables, beams=2, min_length=4):
        assert row.index(END) == 3  # three tokens behind the start, then the end


def test_tokens_in_front_count_row_by_row() -> None:
    tables = torch.cat([markov(seed, 1) for seed in range(12)])
    unseen = torch.arange(12) * 3
    together = search(tables, beams=3, length_penalty=1.0, unseen=unseen)
    assert together != search(tables, beams=3, length_penalty=1.0)
    for number, row in enumerate(together):
        alone = search(tables[number : number + 1], beams=3, length_penalty=1.0, unseen=int(unseen[number]))[0]
        assert row == alone + [PAD] * (len(row) - len(alone))


def language_model(kind: str) -> tuple[LanguageModel, torch.Tensor, torch.Tensor, list[str]]:
    """A tiny model, prefixes of unequal lengths with their mask, and prompts of unequal lengths."""
    llm = (Seq2SeqLM if "t5" in kind else CausalLM)(*tiny_llm(kind, seed=5))
    prefix = torch.randn(4, 3, llm.width, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 0]]).bool()
    return llm, prefix, valid, ["a photo of", "", "two", "Question: what colour is the bus? Answer:"]


def written_by_transformers(
    llm: LanguageModel, inputs: Any, config: GenerationConfig, *changes: Any
) -> list[list[int]]:
    """New ids of each row up to its end, by the `generate` of transformers."""
    prefix, valid, prompts = inputs
    rows = llm.ended(prompts) if llm.family == "seq2seq" else llm._ids(prompts)
    side: Any = "right" if llm.family == "seq2seq" else "left"
    read = join(llm.model, prefix, valid, pad(rows, llm.end, prefix.device), side, 0)
    ids = llm.model.generate(**read, generation_config=config, logits_processor=LogitsProcessorList(changes))
    return bare(llm, ids[:, 1:] if llm.family == "seq2seq" else ids)


def bare(llm: LanguageModel, ids: torch.Tensor) -> list[list[int]]:
    """Ids of each row before its end."""
    return [row[: row.index(llm.end)] if llm.end in row else row for row in ids.tolist()]


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_where_lengths_do_not_count_it_is_the_search_of_transformers(kind: str) -> None:
    """With its cache, its positions and its least length: only how beams are compared is ours."""
    llm, *inputs = language_model(kind)
    options = {"num_beams": 4, "max_new_tokens": 7, "min_new_tokens": 2, "length_penalty": 0.0}
    ours = llm.generate(*inputs, repetition_penalty=1.3, **options)
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    assert bare(llm, ours) == written_by_transformers(llm, inputs, GenerationConfig(**options), penalty)


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_greedy_texts_are_those_of_transformers(kind: str) -> None:
    llm, *inputs = language_model(kind)
    options = {"num_beams": 1, "max_new_tokens": 7, "min_new_tokens": 2}
    ours = bare(llm, llm.generate(*inputs, **options))
    assert ours == written_by_transformers(llm, inputs, GenerationConfig(**options))
    if kind in ("opt", "t5"):  # without a cache, and row by row: the same
        llm.abilities = Abilities(caches=False, batches=False)
        assert bare(llm, llm.generate(*inputs, **options)) == ours
        beams = {**options, "num_beams": 3}
        whole = llm.generate(*inputs, **beams)
        llm.abilities = Abilities()
        assert torch.equal(whole, llm.generate(*inputs, **beams))


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_draws_belong_to_their_text(kind: str) -> None:
    """Several texts of each row, whatever is beside them, and whether there is a cache; beams play no part."""
    llm, prefix, valid, prompts = language_model(kind)
    numbers = torch.rand(4 * 3, 6, generator=torch.Generator().manual_seed(3)).tolist()
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "temperature": 2.0}
    together = llm.generate(prefix, valid, prompts, draws=numbers, **options)
    assert len({tuple(row) for row in bare(llm, together)}) > 6
    assert torch.equal(together, llm.generate(prefix, valid, prompts, draws=numbers, num_beams=2, **options))
    for abilities in (Abilities(), Abilities(caches=False), Abilities(batches=False)):
        llm.abilities = abilities
        for row in range(4):
            one = slice(row, row + 1)
            draws = numbers[3 * row : 3 * row + 3]
            alone = llm.generate(prefix[one], valid[one], prompts[one], draws=draws, **options)
            assert bare(llm, alone) == bare(llm, together)[3 * row : 3 * row + 3]
        assert torch.equal(llm.generate(prefix, valid, prompts, draws=numbers, **options), together)
    for abilities in (Abilities(), Abilities(batches=False)):
        llm.abilities = abilities
        for wrong in (numbers[1:], [*numbers, numbers[0]]):
            with pytest.raises(UsageError, match=f"each of 12 texts, but got {len(wrong)}"):
                llm.generate(prefix, valid, prompts, draws=wrong, **options)


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("penalty", [-1.0, 1.0])
def test_a_text_does_not_depend_on_the_prompts_beside_it(kind: str, penalty: float) -> None:
    llm, prefix, valid, prompts = language_model(kind)
    options = {"num_beams": 4, "max_new_tokens": 7, "length_penalty": penalty}
    together = llm.decode(llm.generate(prefix, valid, prompts, **options))
    for row in range(4):
        one = slice(row, row + 1)
        assert llm.decode(llm.generate(prefix[one], valid[one], prompts[one], **options)) == together[one]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTextModel, Path]:
    root = make_workspace(tmp_path_factory.mktemp("captions"))
    torch.manual_seed(0)
    built, _ = build_image_text(config(root, "stage1"))
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if name.startswith("qformer.") and weight.ndim > 1:
                weight.normal_(std=0.3)
    return built.eval(), root


@torch.no_grad()
def test_token_by_token_equals_the_whole_text(model: tuple[ImageTextModel, Path]) -> None:
    bridge, root = model
    image = bridge.encode_images(bridge.frontend.tiles([root / "images" / f"{i}.png" for i in range(3)]))
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    whole = bridge.qformer.decode(image, None, ids, torch.ones_like(ids, dtype=torch.bool))
    cache = bridge.qformer.start_text(image)
    for place in range(6):
        logits, cache = bridge.qformer.next_token(ids[:, place], cache)
        torch.testing.assert_close(logits, whole[:, place], atol=1e-5, rtol=1e-5)
        order = torch.tensor([2, 0, 1])
        cache, ids, whole = cache.select(order), ids[order], whole[order]


@torch.no_grad()
def test_captions_are_the_greedy_texts_of_the_decoder(model: tuple[ImageTextModel, Path]) -> None:
    bridge, root = model
    tiles = bridge.frontend.tiles([root / "images" / f"{i}.png" for i in range(3)])
    image, end = bridge.encode_images(tiles), bridge.tokenizer.sep_token_id
    texts = torch.full((3, 1), bridge.tokenizer.bos_token_id)
    for length in range(1, 12):
        logits = bridge.qformer.decode(image, None, texts, torch.ones_like(texts, dtype=torch.bool))[:, -1]
        if length < 4:
            logits[:, end] = -torch.inf
        texts = torch.cat([texts, logits.argmax(dim=1, keepdim=True)], dim=1)
    ids = bridge.caption(tiles, beams=1, max_length=12, min_length=4, return_ids=True)
    for row, whole in zip(ids.tolist(), texts[:, 1:].tolist(), strict=True):
        stop = whole.index(end) + 1 if end in whole else len(whole)
        assert row[:stop] == whole[:stop]
        assert not any(row[stop:])
    assert bridge.caption(tiles, beams=1, max_length=12, min_length=4) == bridge.tokenizer.batch_decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("options", [{"beams": 0}, {"max_length": 5}, {"max_length": 1, "min_length": 0}])
def test_lengths_that_cannot_be(model: tuple[ImageTextModel, Path], options: dict[str, int]) -> None:
    bridge, root = model
    with pytest.raises(UsageError, match="beams"):
        bridge.caption(bridge.frontend.tiles([root / "images" / "0.png"]), **options)


def test_longer_than_there_are_positions(model: tuple[ImageTextModel, Path]) -> None:
    bridge, root = model
    length = bridge.qformer.config.max_positions
    with pytest.raises(UsageError, match="positions"):
        bridge.caption(bridge.frontend.tiles([root / "images" / "0.png"]), max_length=length + 2, min_length=length + 2)
