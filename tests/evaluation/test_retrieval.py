"""Retrieval metrics against hand-made scores, and the scoring against every pair scored by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qformer.evaluation import retrieval
from qformer.model.image_text import ImageTextModel
from qformer.model.loading import build_image_text
from tests.tiny import CAPTIONS
from tests.workspace import config, make_workspace


def test_recalls_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.1, 0.2, 0.3]])
    truth = torch.eye(3, dtype=torch.bool)
    assert retrieval.recalls(scores, truth) == {1: pytest.approx(2 / 3), 5: 1.0, 10: 1.0}


def test_best_of_several_right_ones_counts() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.4]])
    assert retrieval.recalls(scores, torch.tensor([[True, True, False, False]]))[1] == 1.0


@pytest.mark.parametrize("value", [0.0, torch.nan, -100.0])
def test_a_model_that_says_nothing_finds_nothing(value: float) -> None:
    """Ties and NaN count against the model: a collapsed one must not look perfect."""
    scores = torch.full((30, 30), value)
    assert retrieval.recalls(scores, torch.eye(30, dtype=torch.bool))[10] == 0.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTextModel, Path]:
    root = make_workspace(tmp_path_factory.mktemp("retrieval"))
    torch.manual_seed(0)
    built, _ = build_image_text(config(root, "stage1"))
    torch.nn.init.normal_(built.itm_head.weight)
    return built.eval(), root


def test_scores_equal_every_pair_by_itself(model: tuple[ImageTextModel, Path]) -> None:
    bridge, root = model
    paths = [root / "images" / f"{i}.png" for i in range(5)]
    groups = [bridge.frontend.tiles(paths[:3]), bridge.frontend.tiles(paths[3:])]
    texts = [*CAPTIONS[:5], "cat", "a red bus in the rain at the old station"]
    found = retrieval.score(bridge, groups, texts, k=2)
    for i, path in enumerate(paths):
        tiles = bridge.frontend.tiles([path])
        for t, text in enumerate(texts):
            with torch.no_grad():
                cosine = (bridge.embed_images(tiles)[0][0] @ bridge.embed_texts([text])[0]).max()
                logit = bridge.match_scores(tiles, [text])[0]
            assert found.itc[i, t] == pytest.approx(cosine.item(), abs=1e-5)
            for scores in (found.image_to_text, found.text_to_image):
                if scores[i, t] != retrieval.NO_CANDIDATE:
                    assert scores[i, t] == pytest.approx((logit + cosine).item(), abs=1e-4)
    candidates = found.image_to_text != retrieval.NO_CANDIDATE
    assert candidates.sum(dim=1).tolist() == [2] * 5
    assert torch.equal(candidates, torch.zeros_like(candidates).scatter(1, found.itc.topk(2, dim=1).indices, True))
    assert (found.text_to_image != retrieval.NO_CANDIDATE).sum(dim=0).tolist() == [2] * 7


@pytest.mark.parametrize(("trained", "read"), [(32, 35), (38, 38)])
def test_texts_are_read_as_far_as_in_training(
    model: tuple[ImageTextModel, Path], monkeypatch: pytest.MonkeyPatch, trained: int, read: int
) -> None:
    """As the original, 35 tokens; but a model of longer texts must not lose their ends, where they may differ."""
    bridge, root = model
    monkeypatch.setattr(bridge, "max_tokens", trained)
    tiles = bridge.frontend.tiles([root / "images" / "0.png"])
    for words, is_read in ((read - 2, True), (read - 1, False)):  # beside them stand [CLS] and [SEP]
        texts = ["a " * (words - 1) + last for last in ("cat", "dog")]
        assert [len(ids) for ids in bridge.tokenizer(texts)["input_ids"]] == [words + 2] * 2
        first, second = retrieval.score(bridge, [tiles], texts, k=0).itc[0]
        assert (abs(first - second) > 1e-5) == is_read  # equal texts may differ in the last bit


def test_more_candidates_than_there_are(model: tuple[ImageTextModel, Path]) -> None:
    bridge, root = model
    tiles = bridge.frontend.tiles([root / "images" / "0.png", root / "images" / "1.png"])
    measured = retrieval.measure(bridge, [tiles], [CAPTIONS[:2], CAPTIONS[2:3]], k=128)
    assert measured.keys() == {"itc", "reranked"}
    assert measured["itc"]["t2i_r5"] == 1.0
    assert retrieval.measure(bridge, [tiles], [CAPTIONS[:2], CAPTIONS[2:3]], k=0).keys() == {"itc"}
