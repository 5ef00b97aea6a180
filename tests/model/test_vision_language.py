"""Stage two: what it computes equals the language model fed by hand, and inputs that do not fit are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qformer.llm.prompts import vqa_prompt
from qformer.model.assembly import build_vision_language
from qformer.model.vision_language import VisionLanguageModel
from qformer.resolution.base import ResolutionStrategy
from qformer.types import Batch, Plan, Tile, Tiles, UsageError
from tests.workspace import config, make_workspace


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("language"))


def _model(root: Path, llm: str = "opt") -> VisionLanguageModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "queries": 3}
    settings = config(
        root, "stage2", llm={"path": str(root / llm)}, vision={"name": "hf", "path": str(root / "vit")}, qformer=sizes
    )
    model, _ = build_vision_language(settings)
    torch.nn.init.normal_(model.connector.projection.weight)
    return model.eval()


def test_the_projection_starts_at_the_scale_that_is_asked(root: Path) -> None:
    def start(**options: float) -> torch.Tensor:
        torch.manual_seed(0)
        settings = config(
            root,
            "stage2",
            llm={"path": str(root / "opt"), **options},
            vision={"name": "hf", "path": str(root / "vit")},
            qformer={"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "queries": 3},
        )
        return build_vision_language(settings)[0].connector.projection.weight

    assert torch.equal(start(visual_scale=4), 4 * start())
    assert torch.equal(start(visual_scale=1), start())


@dataclass(frozen=True)
class TwoTiles(ResolutionStrategy):
    """The whole image, then for tall images also its upper half at another size."""

    def plan(self, width: int, height: int) -> Plan:
        whole = Tile(content=(28, 28), canvas=(28, 28), offset=(0, 0), box=(0, 0, 28, 28))
        half = Tile(content=(42, 28), canvas=(42, 28), offset=(0, 0), box=(0, 0, 42, 14))
        tiles = (whole, half) if height > 34 else (whole,)
        return Plan(image=(width, height), tiles=tiles, grid=(1, len(tiles)), overview=0, tokens=3 * len(tiles))


def _images(root: Path, *numbers: int) -> list[Path]:
    return [root / "images" / f"{number}.png" for number in numbers]


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_every_trained_weight_gets_a_gradient_and_no_other(root: Path, llm: str) -> None:
    model = _model(root, llm).train()
    assert not model.llm.training
    assert not model.frontend.encoder.training
    batch = Batch(model.frontend.tiles(_images(root, 0, 1)), ["a photo of a cat", "two people riding a red bus"])
    model(batch)["loss"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("connector.", "frontend.norm.")) for name in trained)
    without = [name for name, p in model.named_parameters() if (p.grad is not None) != (name in trained)]
    assert without == []


def test_loss_is_the_mean_over_the_tokens_of_the_batch(root: Path) -> None:
    """Not the mean of the means: a long caption weighs more than a short one."""
    model = _model(root)
    texts = ["cat", "a man is holding a small umbrella in the rain"]
    tiles = model.frontend.tiles(_images(root, 0, 1))
    sums, counts = zip(*(model.llm.loss(*model.prefix(tiles[i : i + 1]), [texts[i]]) for i in (0, 1)), strict=True)
    expected = sum(sums) / sum(counts)
    assert model(Batch(tiles, texts))["loss"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_images_change_the_answer_distribution(root: Path) -> None:
    model = _model(root)
    one, two = (model(Batch(model.frontend.tiles(_images(root, n)), ["a photo of a cat"]))["lm"] for n in (0, 5))
    assert one != two


def test_images_of_unequal_tiles_equal_each_alone(root: Path) -> None:
    model = _model(root)
    model.frontend.strategy = TwoTiles()
    tiles = model.frontend.tiles(_images(root, 0, 9, 3))
    prefix, mask = model.prefix(tiles)
    assert mask.sum(dim=1).tolist() == [3, 6, 3] == [model.count_tokens(plan) for plan in tiles.plans]
    for index, number in enumerate((0, 9, 3)):
        alone, _ = model.prefix(model.frontend.tiles(_images(root, number)))
        assert torch.allclose(prefix[index][mask[index]], alone[0], atol=1e-5)
    together = model.generate(tiles, "a photo of", max_new_tokens=5)
    by_one = [model.generate(tiles[i : i + 1], "a photo of", max_new_tokens=5)[0] for i in range(3)]
    assert together == by_one


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_many_questions_encode_the_image_once(root: Path, llm: str) -> None:
    model = _model(root, llm)
    tiles = model.frontend.tiles(_images(root, 0, 1))
    calls = []
    model.frontend.encoder.register_forward_hook(lambda *_: calls.append(1))
    asked = [["what is it?", "how many are there?", "what colour?"], ["is it red?"]]
    answers = model.answer(
        tiles, asked, context=["it rains", None], history=[[("who?", "a man")], []], max_new_tokens=4
    )
    assert calls == [1]
    prompt = vqa_prompt("how many are there?", "paper", model.llm.family, "it rains", [("who?", "a man")])
    preset = {"num_beams": 5, "max_new_tokens": 4, "min_new_tokens": 1, "length_penalty": -1.0}
    assert model.generate(tiles[:1], prompt, **preset) == [answers[0][1]]
    assert model.answer(tiles[:1], [[]]) == [[]]


def _by_hand(model: VisionLanguageModel, parts: list[torch.Tensor | str], steps: int) -> str:
    """Greedy answer of the raw language model to images (prefixes) and texts in turn, the last being the prompt."""
    llm = model.llm
    start = [2] if llm.family == "causal" else []
    rows = []
    for place, part in enumerate(parts):
        if isinstance(part, str):
            last = place == len(parts) - 1
            ids = [*start, *llm.tokenizer(part, add_special_tokens=False)["input_ids"]]
            ids += [] if last and llm.family == "causal" else [llm.end]
            part = llm.model.get_input_embeddings()(torch.tensor(ids))
        rows.append(part)
    row = torch.cat(rows)[None]
    new: list[int] = []
    while len(new) < steps and llm.end not in new:
        if llm.family == "causal":
            behind = llm.model.get_input_embeddings()(torch.tensor([new], dtype=torch.long))
            logits = llm.model(inputs_embeds=torch.cat([row, behind], dim=1)).logits
        else:
            logits = llm.model(inputs_embeds=row, decoder_input_ids=torch.tensor([[0, *new]])).logits
        new.append(int(logits[0, -1].argmax()))
    return llm.decode([new])[0]


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
@torch.no_grad()
def test_examples_stand_in_front_of_the_asked_image(root: Path, llm: str) -> None:
    """Rows of two, no and one example in one batch, each as embeddings joined by hand; images are encoded once."""
    model = _model(root, llm)
    alone = [model.frontend.tiles(_images(root, number)) for number in range(5)]
    prefixes = [model.prefix(tiles)[0][0] for tiles in alone]
    shots = [[(alone[3], "how many?", "two"), (alone[4], "who?", "a man")], [], [(alone[3], "where?", "on the beach")]]
    seen = []
    model.frontend.encoder.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    asked = ["what is it?", "is it red?", "what colour?"]
    options = {"num_beams": 1, "max_new_tokens": 6, "min_new_tokens": 0}
    answers = model.answer(Tiles.join(alone[:3]), asked, examples=shots, **options)
    assert seen == [5]
    word = "Answer:" if llm == "opt" else "Short answer:"
    for number, (own, question) in enumerate(zip(shots, asked, strict=True)):
        parts: list[torch.Tensor | str] = []
        for image, before, answer in own:
            parts += [prefixes[3 if image is alone[3] else 4], f"Question: {before} {word} {answer}"]
        parts += [prefixes[number], f"Question: {question} {word}"]
        assert _by_hand(model, parts, 6) == answers[number]
    texts = model.generate(alone[0], "a photo of", examples=[[(alone[1], "a photo of a cat")]], **options)
    assert texts == [_by_hand(model, [prefixes[1], "a photo of a cat", prefixes[0], "a photo of"], 6)]
    assert list(model.stream(alone[0], "a photo of", [[(alone[1], "a photo of a cat")]], **options)) != []


def test_examples_that_do_not_fit(root: Path) -> None:
    model = _model(root)
    one, two = model.frontend.tiles(_images(root, 0)), model.frontend.tiles(_images(root, 0, 1))
    with pytest.raises(UsageError, match="1 lists of examples for 2 images"):
        model.answer(two, ["a", "b"], examples=[[(one, "what?", "it")]])
    with pytest.raises(UsageError, match="holds 2 images"):
        model.answer(one, ["a"], examples=[[(two, "what?", "it")]])
    with pytest.raises(UsageError, match="fewer tiles, frames or examples"):
        model.answer(one, ["a"], examples=[[(one, "what?", "it")] * 12])


def test_what_exceeds_the_positions_is_cut_from_the_start(root: Path) -> None:
    """128 positions: 3 visual tokens, 4 new ones. Each row by itself, and the question whole."""
    model = _model(root)
    tiles = model.frontend.tiles(_images(root, 0, 1))
    read: list[list[str]] = []
    generate = model.llm.generate
    model.llm.generate = lambda prefix, mask, prompts, **options: (  # type: ignore[method-assign]
        read.append(prompts),
        generate(prefix, mask, prompts, **options),
    )[1]
    turns = [[("who?", "a man " * 60), ("what is on the old bus?", "two cats")], []]
    context = "it rains " * 100 + "today."
    with pytest.warns(UserWarning, match="characters from the start of the context and 1 of the oldest turns") as told:
        model.answer(tiles, ["is it red?", "why?"], [context, context], turns, max_new_tokens=4)
    assert len(told) == 1
    first, second = read[0]
    assert first == "Question: what is on the old bus? Answer: two cats. Question: is it red? Answer:"
    assert second.startswith(("it rains", "rains"))
    assert second.endswith("rains today. Question: why? Answer:")
    assert 116 < model.llm.count_tokens(second) <= 121
    with pytest.raises(UsageError, match="128 positions"):
        model.answer(tiles, ["is it red? " * 40, "why?"])
    seq2seq = _model(root, "flan-t5")  # has no positions: nothing is cut
    assert seq2seq.llm.room(3, 4) is None
    assert len(seq2seq.answer(tiles, ["is it red?", "why?"], context, max_new_tokens=2)) == 2


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_it_asks_itself(root: Path, llm: str) -> None:
    """A question by the prompt that the table has for it, cut at its mark, then the answer; images are encoded once."""
    model = _model(root, llm)
    tiles = model.frontend.tiles(_images(root, 0, 1))
    asked = model.generate(tiles, "It rains. Ask a question about the picture. Question:", max_new_tokens=8)
    calls = []
    model.frontend.encoder.register_forward_hook(lambda *_: calls.append(1))
    turns = model.self_ask(tiles, "It rains.", max_new_tokens=8)
    assert calls == [1]
    questions = [text.split("?")[0] + "?" if "?" in text else text for text in asked]
    assert [question for question, _ in turns] == questions
    assert [answer for _, answer in turns] == model.answer(tiles, questions, "It rains.")


def test_tasks_have_their_own_words_and_lengths(root: Path) -> None:
    model = _model(root)
    tiles = model.frontend.tiles(_images(root, 0))
    settings = {"num_beams": 5, "max_new_tokens": 12, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    expected = model.generate(tiles, "Write a story.", **settings)
    assert model.answer(tiles, ["Write a story."], task="writing", max_new_tokens=12) == expected
    with pytest.raises(UsageError, match="did you mean 'writing'"):
        model.answer(tiles, ["a"], task="writin")
    with pytest.raises(UsageError, match="num_return_sequences is for captions"):
        model.answer(tiles, ["a"], do_sample=True, num_return_sequences=2)


def test_only_one_image_is_streamed(root: Path) -> None:
    model = _model(root)
    tiles = model.frontend.tiles(_images(root, 0, 1))
    with pytest.raises(UsageError, match="2 images"):
        model.stream(tiles)
    with pytest.raises(UsageError, match="beams"):
        model.stream(tiles[:1], num_beams=5)
    assert "".join(model.stream(tiles[:1], max_new_tokens=6)) == model.generate(tiles, num_beams=1, max_new_tokens=6)[0]


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_an_answer_in_pieces_is_the_whole_one(root: Path, llm: str) -> None:
    """With context, earlier turns and a task's own decoding; one beam, as pieces need."""
    model = _model(root, llm)
    tiles = model.frontend.tiles(_images(root, 0, 1))
    turns = [("what?", "a cat")]
    for task, sizes in (("vqa", {}), ("dialogue", {"max_new_tokens": 7}), ("context", {"min_new_tokens": 3})):
        whole = model.answer(tiles[:1], ["where?"], "It rains.", [turns], task=task, num_beams=1, **sizes)
        pieces = list(model.stream_answer(tiles[:1], "where?", "It rains.", turns, task=task, **sizes))
        assert "".join(pieces) == whole[0]
    with pytest.raises(UsageError, match="2 images"):
        model.stream_answer(tiles, "where?")
    with pytest.raises(UsageError, match="beams"):
        model.stream_answer(tiles[:1], "where?", num_beams=5)


@pytest.mark.filterwarnings("ignore:.*were left out")
def test_the_prompt_that_is_shown_is_the_one_that_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(root)
    tiles = model.frontend.tiles(_images(root, 0))
    read: list[list[str]] = []
    generate = model.llm.generate

    def watch(prefix: torch.Tensor, mask: torch.Tensor, prompts: list[str], **options: object) -> torch.Tensor:
        read.append(prompts)
        return generate(prefix, mask, prompts, **options)

    monkeypatch.setattr(model.llm, "generate", watch)
    for context in ("It rains.", " ".join(f"word{number}" for number in range(400))):
        model.answer(tiles, ["where?"], context, [[("what?", "a cat")]], max_new_tokens=2)
        shown = model.prompt_for(tiles.plans[0], "where?", context, [("what?", "a cat")], max_new_tokens=2)
        assert [shown] == read.pop()
        assert shown.endswith(vqa_prompt("where?"))
        assert ("word399" in shown, "word0 " in shown) == (context != "It rains.", False)


def test_what_does_not_fit_is_refused(root: Path) -> None:
    model = _model(root)
    tiles = model.frontend.tiles(_images(root, 0, 1))
    with pytest.raises(UsageError, match="3 prompts for 2 images"):
        model.generate(tiles, ["a", "b", "c"])
    with pytest.raises(UsageError, match="1 questions for 2 images"):
        model.answer(tiles, ["what?"])
    with pytest.raises(UsageError, match="did you mean 'num_beams'"):
        model.generate(tiles, "a", num_beam=3)


def test_held_out_split_of_seq2seq_is_fixed(root: Path) -> None:
    """In eval mode the prefix/suffix split does not move, so losses are comparable over time; in training it does."""
    model = _model(root, "flan-t5")
    batch = Batch(model.frontend.tiles(_images(root, 0)), ["a man is holding a small umbrella in the rain"])
    assert model(batch)["lm"] == model(batch)["lm"]
    model.train()
    assert len({model._prompts_and_targets(batch)[1][0] for _ in range(20)}) > 3
