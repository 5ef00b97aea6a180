"""Frozen language models, against the raw transformers models: what is read, what is predicted, what is generated."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, CLIPVisionConfig, GenerationConfig, T5EncoderModel

from qformer import losses
from qformer.llm.base import CausalLM, GenerateConfig, LanguageModel, Seq2SeqLM
from qformer.llm.loading import load_language_model as load
from qformer.llm.rows import pack
from qformer.model.vision_language import split_caption
from qformer.types import UsageError
from tests.tiny import LLM_KINDS, MORE_LLM_KINDS, save_tiny_llm, tiny_llm, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CAUSAL_KINDS = tuple(kind for kind in LLM_KINDS if "t5" not in kind)
BOS = {"opt": [2], "opt-projected": [2], "llama": [1]}  # of the others texts begin with nothing
SEQ2SEQ_KINDS = ("t5", "flan-t5", "ul2")
TEXTS = ["a cat", "two people riding a red bus", "dogs"]
PROMPTS = ["a photo of", "", "Question: what is on the old bus? Answer:"]
VALID = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()


def wrap(kind: str, **options: Any) -> LanguageModel:
    return (Seq2SeqLM if kind in SEQ2SEQ_KINDS else CausalLM)(*tiny_llm(kind), **options)


@pytest.fixture(params=LLM_KINDS)
def llm(request: pytest.FixtureRequest) -> LanguageModel:
    return wrap(request.param)


@pytest.fixture(params=CAUSAL_KINDS)
def causal(request: pytest.FixtureRequest) -> LanguageModel:
    return wrap(request.param)


def visual(llm: LanguageModel) -> Tensor:
    """Visual tokens of three images, valid where `VALID` says."""
    return torch.randn(3, 5, llm.width, generator=torch.Generator().manual_seed(7))


def image(llm: LanguageModel, columns: int = 5) -> tuple[Tensor, Tensor]:
    """Visual tokens of one image, all valid, and their mask."""
    return torch.randn(1, columns, llm.width, generator=torch.Generator().manual_seed(7)), torch.ones(1, columns).bool()


def plain_ids(llm: LanguageModel, text: str) -> list[int]:
    return llm.tokenizer(text, add_special_tokens=False)["input_ids"]


def embed(llm: LanguageModel, prefix: Tensor, ids: list[int]) -> Tensor:
    """One row [visual][ids]: float[1, M + T, L] from float[1, M, L]."""
    text = llm.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
    return torch.cat([prefix, text], dim=1)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_causal_loss_is_that_of_the_raw_model(kind: str, prompt: str) -> None:
    """[visual][BOS prompt text end] by hand; transformers' own shifted loss; BOS is a target only without a prompt."""
    llm = wrap(kind)
    (prefix, valid), text = image(llm), "a dog on the beach"
    end = plain_ids(llm, "\n") if "opt" in kind else [llm.tokenizer.eos_token_id]
    bos = BOS.get(kind, [])
    given = bos + plain_ids(llm, prompt) if prompt else []
    wanted = plain_ids(llm, f" {text}") + end if prompt else bos + plain_ids(llm, text) + end
    labels = torch.tensor([[-100] * (5 + len(given)) + wanted])
    raw = llm.model(inputs_embeds=embed(llm, prefix, given + wanted), labels=labels).loss

    total, count = llm.loss(prefix, valid, [text], [prompt])

    assert count == len(wanted)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total / count, raw, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["t5", "flan-t5"])
@pytest.mark.parametrize("prompt", ["", "two people"])
def test_seq2seq_loss_is_that_of_the_raw_model(kind: str, prompt: str) -> None:
    """Encoder [visual][prompt </s>], decoder target [text </s>]."""
    llm = wrap(kind)
    prefix, valid = image(llm)
    labels = torch.tensor([[*plain_ids(llm, "riding a red bus"), 1]])
    raw = llm.model(inputs_embeds=embed(llm, prefix, [*plain_ids(llm, prompt), 1]), labels=labels).loss

    total, count = llm.loss(prefix, valid, ["riding a red bus"], [prompt])

    assert count == labels.numel()
    torch.testing.assert_close(total / count, raw, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", LLM_KINDS + MORE_LLM_KINDS)
def test_logits_are_those_of_the_raw_model(kind: str) -> None:
    """[visual][BOS prompt text end], joined by hand; an encoder-decoder reads the prompt and writes the text."""
    llm = wrap(kind)
    (prefix, valid), prompt, text = image(llm), "Question: what is it? Answer:", "a dog on the beach"
    if kind in SEQ2SEQ_KINDS:
        labels = torch.tensor([[*plain_ids(llm, text), llm.end]])
        raw = llm.model(inputs_embeds=embed(llm, prefix, [*plain_ids(llm, prompt), llm.end]), labels=labels).logits
    else:
        whole = [*BOS.get(kind, []), *plain_ids(llm, f"{prompt} {text}"), llm.end]
        raw = llm.model(inputs_embeds=embed(llm, prefix, whole)).logits[:, 4:-1]
    logits, targets = llm._predict(prefix, valid, [text], [prompt], max_tokens=64)
    assert logits.shape[:2] == targets.shape
    torch.testing.assert_close(logits, raw, atol=1e-5, rtol=0)


def test_padding_and_holes_change_no_loss(llm: LanguageModel) -> None:
    """A batch of unequal rows equals its rows alone without the invalid visual tokens, whatever stood in those."""
    prefix = visual(llm)
    total, count = llm.loss(prefix.masked_fill(~VALID[..., None], 1e4), VALID, TEXTS, PROMPTS)
    rows = zip(prefix, VALID, TEXTS, PROMPTS, strict=True)
    alone = [llm.loss(row[ok][None], ok[ok][None], [text], [prompt]) for row, ok, text, prompt in rows]
    torch.testing.assert_close(total, torch.stack([loss for loss, _ in alone]).sum(), atol=1e-4, rtol=0)
    assert count == sum(number for _, number in alone)


def test_every_valid_visual_token_matters_and_weights_stay_frozen(llm: LanguageModel) -> None:
    prefix = visual(llm).requires_grad_()
    llm.loss(prefix, VALID, TEXTS, PROMPTS)[0].backward()
    assert prefix.grad is not None
    assert torch.equal(prefix.grad.abs().sum(dim=2) > 0, VALID)
    assert all(weight.grad is None and not weight.requires_grad for weight in llm.parameters())


def test_prompts_are_not_targets(causal: LanguageModel) -> None:
    """With a prompt the text and its end are counted; without, BOS too; None is a batch of empty prompts."""
    one = image(causal)
    assert causal.loss(*one, ["dogs"], ["a photo of"])[1] == len(plain_ids(causal, " dogs")) + 1
    assert causal.loss(*one, ["dogs"], [""])[1] == len(plain_ids(causal, "dogs")) + 1 + len(causal.start)
    assert causal.loss(*one, ["dogs"]) == causal.loss(*one, ["dogs"], [""])
    assert causal.loss(visual(causal), VALID, [""] * 3, PROMPTS)[1] == 3 + len(causal.start)  # the ends, and a BOS


def test_a_token_across_prompt_and_text_is_a_target(causal: LanguageModel) -> None:
    """The prompt alone ends with a token for its space; in front of `a` that space belongs to the token ` a`."""
    one, prompt = image(causal), "a photo of"
    assert len(plain_ids(causal, f"{prompt} a")) == len(plain_ids(causal, f"{prompt} ")) == 4
    total, count = causal.loss(*one, ["a"], [f"{prompt} "])
    assert count == 2
    assert torch.equal(total, causal.loss(*one, ["a"], [prompt])[0])


def test_without_image_or_bos_the_first_token_is_no_target() -> None:
    llm = wrap("gpt2")
    assert llm.loss(image(llm)[0], torch.zeros(1, 5).bool(), ["dogs"])[1] == len(plain_ids(llm, "dogs"))


def test_texts_are_cut_at_max_tokens() -> None:
    """A decoder-only model loses the end of a long text, an encoder-decoder keeps `</s>` in both halves."""
    causal, seq2seq, long = wrap("opt"), wrap("t5"), "dogs " * 50
    assert causal.loss(*image(causal), [long])[1] == 32
    assert causal.loss(*image(causal), [long], max_tokens=7)[1] == 7
    kept = str(seq2seq.tokenizer.decode(plain_ids(seq2seq, long)[:4]))
    cut = seq2seq.loss(*image(seq2seq), [long], [long], max_tokens=5)
    assert cut[1] == 5
    assert cut == seq2seq.loss(*image(seq2seq), [kept], [kept])


def test_a_long_question_gives_way_to_its_answer(causal: LanguageModel) -> None:
    """Its first tokens go, down to half of the row; behind that the text is cut. BOS stays."""
    one, question, answer = image(causal), "a photo of the dogs on the beach", "dogs"
    asked, room = plain_ids(causal, question), 12
    new = [*plain_ids(causal, f" {answer}"), causal.end]
    assert len(causal.start) + len(asked) + len(new) > room
    rest = room - len(causal.start) - len(new)
    row, targets = causal._targets([answer], [question], room, torch.device("cpu"))
    assert row.ids.tolist() == [[*causal.start, *asked[-rest:], *new]]
    assert targets[0, -len(new) :].tolist() == new
    assert (targets[0, : -len(new)] == losses.IGNORE).all()
    assert causal.loss(*one, [answer], [question], room)[1] == len(new)
    assert causal.loss(*one, ["dogs " * 30], [question], room)[1] == room // 2


def test_only_target_positions_meet_the_vocabulary(causal: LanguageModel) -> None:
    seen: list[int] = []
    head = causal.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    _, count = causal.loss(*image(causal, columns=60), ["a dog"])
    assert seen == [count]


def test_it_runs_in_its_own_dtype_under_autocast(llm: LanguageModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = llm.loss(visual(llm), VALID, TEXTS)[0]
    assert torch.equal(inside, llm.loss(visual(llm), VALID, TEXTS)[0])


def test_a_16_bit_model_takes_a_float32_prefix() -> None:
    model, tokenizer = tiny_llm("opt")
    llm = CausalLM(model.to(torch.bfloat16), tokenizer)
    assert llm.loss(visual(llm), VALID, TEXTS)[0].dtype == torch.float32
    assert llm.generate(visual(llm), VALID, PROMPTS, max_new_tokens=2).shape[0] == 3


def greedy_by_hand(llm: LanguageModel, prefix: Tensor, prompt: str, steps: int) -> list[int]:
    """The likeliest token again and again, up to the end: one row, no padding, no cache."""
    ids, new = [*llm.start, *plain_ids(llm, prompt)], [0]
    while len(new) <= steps and (len(new) == 1 or new[-1] != llm.end):
        if isinstance(llm, Seq2SeqLM):
            row = embed(llm, prefix, [*ids, llm.end])
            out = llm.model(inputs_embeds=row, decoder_input_ids=torch.tensor([new]))
        else:
            out = llm.model(inputs_embeds=embed(llm, prefix, ids + new[1:]))
        new.append(int(out.logits[0, -1].argmax()))
    return new[1:]


@pytest.mark.parametrize("kind", LLM_KINDS + MORE_LLM_KINDS)
def test_greedy_generation_follows_the_raw_model(kind: str) -> None:
    """Batched, padded, cached generation equals the loop by hand, and gives new tokens only."""
    llm = wrap(kind)
    prefix = visual(llm)
    ids = llm.generate(prefix, VALID, PROMPTS, num_beams=1, max_new_tokens=6, min_new_tokens=0)
    for row, visible, ok, prompt in zip(ids.tolist(), prefix, VALID, PROMPTS, strict=True):
        by_hand = greedy_by_hand(llm, visible[ok][None], prompt, 6)
        assert row[: len(by_hand)] == by_hand


def test_beams_do_not_depend_on_the_batch(llm: LanguageModel) -> None:
    prefix = visual(llm)
    texts = llm.decode(llm.generate(prefix, VALID, PROMPTS, max_new_tokens=8))
    for row, ok, prompt, text in zip(prefix, VALID, PROMPTS, texts, strict=True):
        assert llm.decode(llm.generate(row[ok][None], ok[ok][None], [prompt], max_new_tokens=8)) == [text]


def decoder_layer(llm: LanguageModel) -> nn.Module:
    """The first layer that new tokens pass."""
    decoder = llm.model.decoder if isinstance(llm, Seq2SeqLM) else llm.model
    return next(module for module in decoder.modules() if type(module).__name__.endswith(("DecoderLayer", "Block")))


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_each_step_computes_one_token(kind: str, beams: int) -> None:
    """The prompt once for all its beams, then a token of each: keys and values of what came before are kept."""
    llm = wrap(kind)
    seen: list[tuple[int, ...]] = []
    decoder_layer(llm).register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    new = llm.generate(visual(llm), VALID, PROMPTS, num_beams=beams, max_new_tokens=7, min_new_tokens=7).shape[1]
    assert new == 7
    longest = max(int(ok.sum()) + len(llm.start) + len(plain_ids(llm, p)) for ok, p in zip(VALID, PROMPTS, strict=True))
    assert seen == [(3, 1 if kind == "t5" else longest), *[(3 * beams, 1)] * (new - 1)]


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_repetitions_are_counted_in_each_row_alone(kind: str, beams: int) -> None:
    """A row's padding is nothing to its own first tokens (transformers' own option takes them for it)."""
    llm = wrap(kind)
    prefix, options = visual(llm), {"num_beams": beams, "max_new_tokens": 8, "min_new_tokens": 8}
    options |= {"repetition_penalty": 3.0}
    together = llm.generate(prefix, VALID, PROMPTS, **options)
    assert not torch.equal(together, llm.generate(prefix, VALID, PROMPTS, **options | {"repetition_penalty": 1.0}))
    for row, ok, prompt, ids in zip(prefix, VALID, PROMPTS, together, strict=True):
        assert torch.equal(llm.generate(row[ok][None], ok[ok][None], [prompt], **options)[0], ids)


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_no_pair_of_tokens_comes_twice(kind: str, beams: int) -> None:
    llm = wrap(kind)
    options = {"num_beams": beams, "max_new_tokens": 20, "min_new_tokens": 20}

    def repeats(**more: int) -> bool:
        rows = llm.generate(visual(llm), VALID, PROMPTS, **options, **more).tolist()
        return any(len(set(itertools.pairwise(row))) < len(row) - 1 for row in rows)

    assert repeats()
    assert not repeats(no_repeat_ngram_size=2)


def test_length_limits_count_new_tokens(llm: LanguageModel) -> None:
    """The end is made the likeliest token: it comes at once, or as soon as the minimum allows."""
    push = torch.zeros(llm.model.config.vocab_size).index_fill(0, torch.tensor(llm.end), 1000.0)
    llm.model.get_output_embeddings().register_forward_hook(lambda _module, _args, logits: logits + push)
    for least in (1, 4):
        ids = llm.generate(visual(llm), VALID, PROMPTS, num_beams=1, min_new_tokens=least, max_new_tokens=9)
        assert (ids == llm.end).tolist() == [[False] * least + [True]] * 3
    assert llm.generate(visual(llm), VALID, PROMPTS, min_new_tokens=3, max_new_tokens=3).shape == (3, 3)


def test_long_prompts_are_read_to_their_end(llm: LanguageModel) -> None:
    prompt = "a cat " * 40 + "dogs"
    prefix, valid = image(llm, columns=2)
    ids = llm.generate(prefix, valid, [prompt], num_beams=1, max_new_tokens=3, min_new_tokens=0)
    assert ids[0].tolist() == greedy_by_hand(llm, prefix, prompt, 3)


def test_the_checkpoints_own_settings_are_not_inherited(llm: LanguageModel) -> None:
    expected = llm.generate(visual(llm), VALID, PROMPTS, max_new_tokens=5)
    llm.model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, num_return_sequences=2, no_repeat_ngram_size=1, forced_eos_token_id=5, top_k=3
    )
    again = (Seq2SeqLM if isinstance(llm, Seq2SeqLM) else CausalLM)(llm.model, llm.tokenizer)
    assert torch.equal(again.generate(visual(llm), VALID, PROMPTS, max_new_tokens=5), expected)


def test_sampling_draws_from_the_nucleus() -> None:
    llm = wrap("opt")
    inputs = (visual(llm), VALID, PROMPTS)
    torch.manual_seed(0)
    greedy = llm.generate(*inputs, num_beams=1, max_new_tokens=8)
    drawn = llm.generate(*inputs, num_beams=1, max_new_tokens=8, do_sample=True, top_p=1.0, temperature=3.0)
    narrow = llm.generate(*inputs, num_beams=1, max_new_tokens=8, do_sample=True, top_p=1e-6, temperature=3.0)
    assert not torch.equal(drawn, greedy)
    assert torch.equal(narrow, greedy)


def test_decoded_texts_are_bare() -> None:
    llm = wrap("opt")
    assert llm.tokenizer.decode([llm.end]) == "\n"
    assert llm.decode(torch.tensor([[*plain_ids(llm, " a cat"), llm.end, 1, 1]])) == ["a cat"]


def test_eval_mode_survives_training_of_the_parent_unless_dropout_is_wanted() -> None:
    for dropout in (False, True):
        llm = wrap("opt", dropout=dropout)
        parent = nn.ModuleList([llm]).train()
        assert (llm.loss(visual(llm), VALID, TEXTS)[0] != llm.loss(visual(llm), VALID, TEXTS)[0]) == dropout
        parent.eval()
        assert llm.loss(visual(llm), VALID, TEXTS)[0] == llm.loss(visual(llm), VALID, TEXTS)[0]


def test_the_gated_gelu_of_t5_is_erf() -> None:
    """The same weights in a transformers model that was configured for erf from the start; ReLU models stay ReLU."""
    llm = wrap("flan-t5")
    config = tiny_llm("flan-t5")[0].config
    config.dense_act_fn = "gelu"
    erf = type(llm.model)(config).eval()
    erf.lm_head.weight = nn.Parameter(torch.empty_like(erf.lm_head.weight))
    erf.load_state_dict(llm.model.state_dict())
    tanh = tiny_llm("flan-t5")[0]
    embeds, ids = visual(llm), torch.zeros(3, 4, dtype=torch.long)
    ours, wanted, original = (
        model(inputs_embeds=embeds, decoder_input_ids=ids).logits for model in (llm.model, erf, tanh)
    )
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert (ours - original).abs().max() > 1e-4
    assert not any(isinstance(module, nn.GELU) for module in wrap("t5").modules())


def test_opt_begins_with_bos_whatever_its_tokenizer_does() -> None:
    assert CausalLM(tiny_llm("opt")[0], tiny_tokenizer("gpt2")).start == [0]
    assert CausalLM(*tiny_llm("gpt2")).start == []


def test_a_tokenizer_without_end_is_refused() -> None:
    model, tokenizer = tiny_llm("llama")
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no token that ends a text"):
        CausalLM(model, tokenizer)


@pytest.mark.parametrize(("side", "expected"), [("right", [[1, 3, 4, 0, 2]]), ("left", [[0, 2, 1, 3, 4]])])
def test_pack(side: Any, expected: list[list[int]]) -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1]]).bool()
    embeds, packed, order = pack(torch.arange(10.0).view(1, 5, 2), mask, side)
    assert order.tolist() == expected
    assert embeds[0, :, 0].tolist() == [2.0 * column for column in expected[0]]
    assert packed.tolist() == [[bool(mask[0, column]) for column in expected[0]]]


def test_split_caption() -> None:
    words = ["two", "people", "riding", "a", "red", "bus"]
    cuts = [split_caption(" ".join(words), place / 100) for place in range(100)]
    expected = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, 6)]
    assert [cuts.count(cut) for cut in expected] == [20] * 5
    assert split_caption(" ".join(words), math.nextafter(1, 0)) == expected[-1]
    assert (split_caption("bus", 0.5), split_caption("", 0.5)) == (("", "bus"), ("", ""))


def test_the_defaults_are_those_of_the_paper() -> None:
    assert GenerateConfig() == GenerateConfig(5, 30, 1, 0.9, False, 1.0, 1.0, 1.0)


def test_an_unknown_option_names_the_nearest() -> None:
    llm = wrap("opt")
    with pytest.raises(UsageError, match="'num_beams'"):
        llm.generate(visual(llm), VALID, PROMPTS, num_beam=3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"min_new_tokens": 31},
        {"top_p": 0.0},
        {"temperature": 0.0},
        {"max_new_tokens": "x"},
        {"length_penalty": "nan"},
        {"length_penalty": "-inf"},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        GenerateConfig.of(options)


def test_a_row_beyond_the_positions_is_refused(causal: LanguageModel) -> None:
    with pytest.raises(UsageError, match="128 positions"):
        causal.loss(*image(causal, columns=110), ["dogs " * 40])
    with pytest.raises(UsageError, match="128 positions"):
        causal.generate(*image(causal, columns=110), [""], max_new_tokens=20)


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_a_saved_model_comes_back(tmp_path: Path, kind: str) -> None:
    llm, loaded = wrap(kind), load(save_tiny_llm(tmp_path, kind))
    assert (type(loaded), loaded.start, loaded.end) == (type(llm), llm.start, llm.end)
    assert torch.equal(loaded.loss(visual(llm), VALID, TEXTS)[0], llm.loss(visual(llm), VALID, TEXTS)[0])


def test_dtypes(tmp_path: Path) -> None:
    """float32 on the CPU; elsewhere as stored if that has 16 bits, else bfloat16. The meta device stands for a GPU."""

    def loaded(**options: Any) -> torch.dtype:
        return load(tmp_path, **options).model.dtype

    save_tiny_llm(tmp_path, "t5")
    assert loaded() == loaded(dtype=None) == torch.float32
    assert loaded(device="meta") == torch.bfloat16
    model, tokenizer = tiny_llm("opt")
    model.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert loaded() == torch.float32
    assert loaded(dtype=None) == loaded(device="meta") == torch.float16
    assert loaded(dtype=torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder"])
def test_what_cannot_be_found_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=f"'{name}', which is neither a folder nor readable from the hub"):
        load(name)


def an_empty_folder(_: Path) -> str:
    return "no language model can be loaded from the folder"


def an_image_encoder(folder: Path) -> str:
    CLIPVisionConfig().save_pretrained(folder)
    return "no language model can be loaded from the folder"


def a_bert(folder: Path) -> str:
    BertConfig().save_pretrained(folder)
    return "bert model, an encoder that cannot generate"


def half_a_t5(folder: Path) -> str:
    """Its encoder alone: transformers would draw the decoder at random."""
    T5EncoderModel(tiny_llm("t5")[0].config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text()) | {"is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps(saved))
    return "the weights in .* lack 28 tensors"


def a_model_without_tokenizer(folder: Path) -> str:
    tiny_llm("t5")[0].save_pretrained(folder)
    return "a language model but no tokenizer"


@pytest.mark.parametrize(
    "make", [an_empty_folder, an_image_encoder, a_bert, half_a_t5, a_model_without_tokenizer], ids=lambda f: f.__name__
)
def test_what_is_no_language_model_is_refused(tmp_path: Path, make: Callable[[Path], str]) -> None:
    with pytest.raises(UsageError, match=make(tmp_path)):
        load(tmp_path)
