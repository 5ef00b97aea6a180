"""Stage two: what it computes equals the language model fed by hand, and inputs that do not fit are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qformer.model.loading import build_vision_language
from qformer.model.prompts import vqa_prompt
from qformer.model.vision_language import VisionLanguageModel
from qformer.resolution.base import ResolutionStrategy
from qformer.types import Batch, Plan, Tile, UsageError
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
