"""A Q-Former that reads the question beside its queries: what it computes, what it shares, and from what it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qformer.model.assembly import build_vision_language
from qformer.model.connectors import QFormerConnector
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import Batch, Tiles, UsageError
from tests.model.test_vision_language import TwoTiles
from tests.workspace import config, make_workspace

SIZES = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "queries": 3}
ASKED = ["what colour is the bus?", "how many cats are there?"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("questions"))


def build(root: Path, llm: str = "opt", question: bool = True, **options: int) -> VisionLanguageModel:
    torch.manual_seed(0)
    settings = config(
        root,
        "stage2",
        llm={"path": str(root / llm)},
        vision={"name": "hf", "path": str(root / "vit")},
        text={"bert": str(root / "bert")},
        qformer=SIZES | options,
        **({"question": {"max_tokens": 12}} if question else {}),
    )
    model, _ = build_vision_language(settings)
    torch.nn.init.normal_(model.connector.projection.weight)
    return model.eval()


@pytest.fixture(scope="module")
def model(root: Path) -> VisionLanguageModel:
    return build(root)


def photos(model: VisionLanguageModel, root: Path, *numbers: int) -> Tiles:
    return model.frontend.tiles([root / "images" / f"{number}.png" for number in numbers])


def connector(model: VisionLanguageModel) -> QFormerConnector:
    assert isinstance(model.connector, QFormerConnector)
    assert model.connector.tokenizer is not None
    return model.connector


def test_the_prefix_is_what_matching_makes_of_the_queries(model: VisionLanguageModel, root: Path) -> None:
    bridge, tiles = connector(model), photos(model, root, 0, 5)
    tokens = bridge.tokenizer(ASKED, padding=True, return_tensors="pt")
    queries = bridge.qformer.match(
        model.frontend(tiles).padded()[0], None, tokens["input_ids"], tokens["attention_mask"].bool()
    )
    prefix, mask = model.prefix(tiles, ASKED)
    torch.testing.assert_close(prefix, bridge.projection(queries))
    assert mask.all()
    assert not torch.allclose(prefix, model.prefix(tiles, ASKED[::-1])[0], atol=0.01)


@pytest.mark.parametrize("layers", [1, 2])
def test_many_questions_share_the_image_and_equal_each_alone(root: Path, layers: int) -> None:
    """Of images with one tile and with two; encoder, keys and values run once."""
    model = build(root, layers=layers)
    model.frontend.strategy = TwoTiles()
    tiles, calls = photos(model, root, 0, 9), {"encoder": 0, "keys": 0}
    first = model.connector.qformer.layers[0].cross_attention
    model.frontend.encoder.register_forward_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1))
    first.key.register_forward_hook(lambda *_: calls.update(keys=calls["keys"] + 1))
    asked = [[*ASKED, "", "is it red?"], ["is it red?"]]
    prefix, mask = model.prefix(tiles, asked)
    assert calls == {"encoder": 2, "keys": 1}  # tiles of two sizes
    assert mask.sum(dim=1).tolist() == [3, 3, 3, 3, 6]
    for row, (image, question) in enumerate((i, q) for i, own in enumerate(asked) for q in own):
        alone, _ = model.prefix(tiles[image : image + 1], [question])
        torch.testing.assert_close(prefix[row][mask[row]], alone[0], **CLOSE)


def test_a_padded_question_token_changes_nothing(model: VisionLanguageModel, root: Path) -> None:
    tiles = photos(model, root, 0, 5)
    together, _ = model.prefix(tiles, ["is it red?", "what colour is the bus and how many cats are there on it"])
    alone, _ = model.prefix(tiles[:1], ["is it red?"])
    torch.testing.assert_close(together[:1], alone, **CLOSE)


def test_without_a_question_the_queries_are_alone(model: VisionLanguageModel, root: Path) -> None:
    """An empty question is none, also beside one that is not; captioning asks nothing."""
    tiles, bridge = photos(model, root, 0, 5), connector(model)
    queries = bridge.qformer.encode_image(model.frontend(tiles).padded()[0])
    expected = bridge.projection(queries)
    torch.testing.assert_close(model.prefix(tiles)[0], expected)
    torch.testing.assert_close(model.prefix(tiles, ["", ""])[0], expected)
    torch.testing.assert_close(model.prefix(tiles, ["", "is it red?"])[0][0], expected[0], **CLOSE)
    assert model.prefix(tiles, [[], []])[0].shape == (0, 3, model.llm.width)
    batch = Batch(tiles, ["a photo of a cat", "a dog"])
    expected_loss, _ = model.llm.loss(expected, torch.ones(2, 3, dtype=torch.bool), list(batch.text), max_tokens=32)
    count = model.count_targets(batch)
    assert model(batch)["loss"].item() == pytest.approx(expected_loss.item() / count, rel=1e-5)


def test_a_long_question_is_cut(model: VisionLanguageModel) -> None:
    tokens = connector(model).tokenize(["what colour is the bus " * 10, ""])
    assert tokens.ids.shape == (2, 12)
    assert tokens.mask.sum(dim=1).tolist() == [12, 0]
    ids = tokens.ids[0].tolist()
    assert (ids[0], ids[-1]) == (connector(model).tokenizer.cls_token_id, connector(model).tokenizer.sep_token_id)


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_every_trained_weight_gets_a_gradient_from_questions(root: Path, llm: str) -> None:
    model = build(root, llm).train()
    batch = Batch(photos(model, root, 0, 1), ["", ""], question=ASKED, answer=["red", "two"])
    model(batch)["loss"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("embeddings.words" in name for name in trained)
    assert any("layers.0.text_ffn" in name for name in trained)
    assert [name for name, p in model.named_parameters() if (p.grad is not None) != (name in trained)] == []


def test_the_drawn_answer_is_the_target(model: VisionLanguageModel, root: Path) -> None:
    tiles = photos(model, root, 0, 1)
    accepted = [["red", "blue"], ["two", "three"]]

    def loss(**answers: list) -> float:
        return model(Batch(tiles, ["", ""], question=ASKED, **answers))["loss"].item()

    assert loss(answers=accepted, answer=["blue", "two"]) == loss(answers=[["blue"], ["two"]])
    assert loss(answers=accepted) == loss(answers=accepted, answer=["red", "two"])
    assert loss(answers=accepted) != loss(answers=accepted, answer=["blue", "three"])


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_answers_use_each_question_s_own_prefix(root: Path, llm: str) -> None:
    model = build(root, llm)
    tiles = photos(model, root, 0, 1)
    asked = [[*ASKED, "is it red?"], ["is it red?"]]
    settings = {"num_beams": 1, "max_new_tokens": 4, "length_penalty": 1.0}
    answers = model.answer(tiles, asked, **settings)
    for image, own in enumerate(asked):
        for question, answer in zip(own, answers[image], strict=True):
            assert model.answer(tiles[image : image + 1], [question], **settings) == [answer]
    assert model.answer(tiles[:1], [[]]) == [[]]


def test_questions_longer_than_the_positions_are_refused(root: Path) -> None:
    with pytest.raises(UsageError, match=r"question.max_tokens is 41, more than the 40 positions"):
        build_vision_language(
            config(
                root,
                "stage2",
                vision={"name": "hf", "path": str(root / "vit")},
                text={"bert": str(root / "bert")},
                qformer=SIZES,
                question={"max_tokens": 41},
            )
        )


def test_without_the_key_nothing_reads_questions(root: Path) -> None:
    model = build(root, question=False)
    tiles = photos(model, root, 0, 1)
    assert not any("words" in name or "text_ffn" in name for name, _ in model.connector.named_parameters())
    prefix, mask = model.prefix(tiles, [ASKED, []])
    expected, _ = model.prefix(tiles[:1])
    torch.testing.assert_close(prefix, expected.expand(2, -1, -1))
    assert mask.all()
