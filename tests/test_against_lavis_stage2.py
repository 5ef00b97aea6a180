"""Stage two held against the original: LAVIS 1.0.2's own tensors, from tests/golden (see make_golden.py there)."""

from __future__ import annotations

import pytest
import torch

from qformer.llm.prompts import vqa_preset, vqa_prompt
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import Batch
from tests.golden.golden import GRADIENTS, Golden, close, gradients, read, same_ids, tiles, vision_language

Pair = tuple[Golden, VisionLanguageModel]
# The original's shortest length counts the tokens in front, so that a text may be empty.
SHORTEST = {"min_new_tokens": 0}


def _pair(name: str) -> Pair:
    golden = read(name)
    return golden, vision_language(golden)


@pytest.fixture(scope="module", params=["opt_a", "opt_b"])
def opt(request: pytest.FixtureRequest) -> Pair:
    return _pair(request.param)


@pytest.fixture(scope="module", params=["t5_a", "t5_b"])
def t5(request: pytest.FixtureRequest) -> Pair:
    return _pair(request.param)


class Outputs:
    """Collects what modules return while it is open."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.seen: list[torch.Tensor] = []
        self.hooks = [m.register_forward_hook(lambda _m, _i, out: self.seen.append(out[0])) for m in modules]

    def __enter__(self) -> list[torch.Tensor]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def gradients_are_equal(model: VisionLanguageModel, golden: Golden) -> None:
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = gradients(golden)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(ours[name], gradient, GRADIENTS)


def test_opt_loss_hidden_states_and_gradients(opt: Pair) -> None:
    """With a prompt its tokens are no targets; without one the first token, BOS, is."""
    golden, model = opt
    model.zero_grad()
    with Outputs(model.llm.model.model.decoder) as hidden:
        out = model(Batch(tiles(golden), golden.about["texts"]))
    out["loss"].backward()
    close(out["loss"], golden.out["loss"])
    close(model.prefix(tiles(golden))[0], golden.out["prefix"])
    visible = torch.cat([torch.ones(golden.out["prefix"].shape[:2]), golden.given["mask"]], dim=1).bool()
    close(hidden[0][visible], golden.out["hidden"][visible])
    gradients_are_equal(model, golden)


def test_opt_texts_become_the_same_ids(opt: Pair) -> None:
    golden, model = opt
    texts = [f"{model.prompt} {text}".strip() for text in golden.about["texts"]]
    for row, ids, mask in zip(model.llm._ids(texts), golden.given["ids"], golden.given["mask"], strict=True):
        assert [*row, model.llm.end][: model.max_tokens] == ids[mask.bool()].tolist()


WAYS = {"greedy": {"num_beams": 1}, "beam": {"num_beams": 5}, "beam_flat": {"num_beams": 5, "length_penalty": 0.0}}


@pytest.mark.parametrize("name", WAYS)
def test_opt_writes_the_same(opt: Pair, name: str) -> None:
    golden, model = opt
    ids = model.generate(tiles(golden), return_ids=True, max_new_tokens=12, **WAYS[name], **SHORTEST)
    same_ids(ids, golden.out[name], model.llm.end)


@pytest.mark.parametrize(("name", "preset"), [("answer", "lavis"), ("answer_paper", "paper")])
def test_opt_answers_the_same(opt: Pair, name: str, preset: str) -> None:
    """By the beams and length penalties of the two presets; release 1.0.2 has no templates for OPT."""
    golden, model = opt
    options = vqa_preset(preset, "causal").generate | {"max_new_tokens": 6} | SHORTEST
    ids = model.generate(tiles(golden), golden.about["question"], return_ids=True, **options)
    same_ids(ids, golden.out[name], model.llm.end)


def test_t5_loss_hidden_states_and_gradients(t5: Pair) -> None:
    """The original is given both halves of a caption; the model's own `forward` draws where to cut it."""
    golden, model = t5
    model.zero_grad()
    with Outputs(model.llm.model.encoder, model.llm.model.decoder) as hidden:
        prefix, mask = model.prefix(tiles(golden))
        total, count = model.llm.loss(prefix, mask, golden.about["target"], golden.about["read"], model.max_tokens)
    (total / count).backward()
    close(prefix, golden.out["prefix"])
    close(total / count, golden.out["loss"])
    read = torch.cat([torch.ones(golden.out["prefix"].shape[:2]), golden.given["read_mask"]], dim=1).bool()
    written = golden.given["target_mask"].bool()
    close(hidden[0][read], golden.out["encoder"][read])
    close(hidden[1][written], golden.out["decoder"][written])
    gradients_are_equal(model, golden)


def test_t5_texts_become_the_same_ids(t5: Pair) -> None:
    golden, model = t5
    for name in ("read", "target"):
        rows = model.llm.ended(golden.about[name], model.max_tokens)
        theirs = zip(golden.given[f"{name}_ids"], golden.given[f"{name}_mask"], strict=True)
        assert rows == [ids[mask.bool()].tolist() for ids, mask in theirs]


@pytest.mark.parametrize("name", WAYS)
def test_t5_writes_the_same(t5: Pair, name: str) -> None:
    golden, model = t5
    ids = model.generate(tiles(golden), return_ids=True, max_new_tokens=12, **WAYS[name], **SHORTEST)
    same_ids(ids, golden.out[name][:, 1:], model.llm.end)


@pytest.mark.parametrize("preset", ["paper", "lavis"])
def test_t5_answers_the_same(t5: Pair, preset: str) -> None:
    golden, model = t5
    questions = golden.about["questions"]
    answers = model.answer(tiles(golden), questions, preset=preset, **SHORTEST)
    assert answers == model.llm.decode(golden.out["answer"])
    prompts = [vqa_prompt(question, preset, "seq2seq") for question in questions]
    options = vqa_preset(preset, "seq2seq").generate | SHORTEST
    ids = model.generate(tiles(golden), prompts, return_ids=True, **options)
    same_ids(ids, golden.out["answer"][:, 1:], model.llm.end)
