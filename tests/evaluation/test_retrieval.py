"""Retrieval metrics against hand-made scores, and the scoring against every pair scored by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch

from qformer import distributed, load, stages
from qformer.evaluation import retrieval
from qformer.model.assembly import build_image_text
from qformer.model.frontend import FrontEnd
from qformer.model.image_text import ImageTextModel
from tests.processes import together
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


def test_all_numbers_by_hand() -> None:
    """Two images, the first with two captions; each image and each text has two candidates at most."""
    itc = torch.tensor([[0.1, 0.2, 0.9], [0.3, 0.4, 0.2]])
    itm = torch.tensor([[0.0, 5.0, 1.0], [1.0, 1.05, 0.0]])
    of_image = torch.tensor([[False, True, True], [True, True, False]])
    of_text = torch.tensor([[False, True, True], [True, True, False]])
    scores = retrieval.Scores(itc, itm, itm.sigmoid().half(), of_image, of_text)
    captions = [["a", "b"], ["c"]]
    assert {
        kind: {way: found.tolist() for way, found in ways.items()}
        for kind, ways in (retrieval.rank_table(scores, captions).items())
    } == {
        "itc": {"i2t": [2, 3], "t2i": [2, 2, 2]},
        "itm": {"i2t": [1, 3], "t2i": [2, 1, 2]},  # text 0 is no candidate of its image, so it stands behind all
        "reranked": {"i2t": [1, 3], "t2i": [2, 1, 2]},
    }
    told = retrieval.full_table(retrieval.rank_table(scores, captions))["itm"]
    assert told["i2t_r1"] == 0.5
    assert told["t2i_r1"] == pytest.approx(1 / 3)
    assert told["i2t_r5"] == told["t2i_r10"] == 1.0
    assert told["i2t_mean_recall"] == pytest.approx(2.5 / 3)
    assert told["t2i_mean_recall"] == pytest.approx((2 + 1 / 3) / 3)
    assert told["mean_recall"] == pytest.approx((5 - 1 / 6) / 6)
    assert told["i2t_mean_rank"] == told["i2t_median_rank"] == 2.0
    assert told["t2i_mean_rank"] == pytest.approx(5 / 3)
    assert told["t2i_median_rank"] == 2.0


def test_equal_captions_of_several_images_are_found_as_eithers() -> None:
    """A perfect model of two red squares and a blue one: each text is as like the one red square as the other."""
    red, blue = [0.9, 0.9, 0.1], [0.2, 0.2, 0.8]
    captions = [["a red square"], ["a red square"], ["a blue square", "a blue square"]]
    itc = torch.tensor([[*row, row[2]] for row in (red, red, blue)])
    every = torch.ones_like(itc, dtype=torch.bool)
    scores = retrieval.Scores(itc, itc, itc, every, every)
    assert retrieval.count_equal(captions) == 2  # the blue square's are of one image
    assert retrieval.count_equal([["a"], ["b", "b"]]) == 0
    found, original = (retrieval.rank_table(scores, captions, equal)["reranked"] for equal in (True, False))
    assert {way: places.tolist() for way, places in found.items()} == {"i2t": [1, 1, 1], "t2i": [1, 1, 1, 1]}
    assert {way: places.tolist() for way, places in original.items()} == {"i2t": [2, 2, 1], "t2i": [2, 2, 1, 1]}
    wrong = retrieval.Scores(itc, itc, itc, every, every)
    wrong.itc = torch.tensor([[0.1, 0.1, 0.9, 0.9]] * 3)
    assert retrieval.rank_table(wrong, captions)["itc"]["i2t"].tolist() == [3, 3, 1]


def test_cosine_and_logit_may_disagree() -> None:
    """ITM alone and its sum with ITC are different orders."""
    every = torch.ones(1, 2, dtype=torch.bool)
    scores = retrieval.Scores(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 1.5]]), torch.zeros(1, 2), every, every)
    table = retrieval.rank_table(scores, [["right", "also"]])
    assert {kind: int(ways["i2t"][0]) for kind, ways in table.items()} == {"itc": 1, "itm": 1, "reranked": 1}
    truth = torch.tensor([[True, False]])
    assert [int(retrieval.ranks(each, truth)[0]) for each in (scores.itc, scores.itm, scores.image_to_text)] == [
        1,
        2,
        1,
    ]


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


TEXTS = [*CAPTIONS[:5], "cat", "a red bus in the rain at the old station", "", "a bus " * 5000]


def same(ours: retrieval.Scores, theirs: retrieval.Scores) -> bool:
    return all(torch.equal(getattr(ours, part.name), getattr(theirs, part.name)) for part in fields(ours))


def share(root: Path, sizes: list[int], keep: bool = False) -> retrieval.Scores:
    """Scores of groups of photos of these sizes, of which this process takes its share."""
    bridge = load(root / "runs" / "stage1", "cpu")
    assert isinstance(bridge, ImageTextModel)
    photos = iter(range(sum(sizes)))
    groups = [[root / "images" / f"{next(photos)}.png" for _ in range(size)] for size in sizes]
    with TemporaryFile() as file:
        images = retrieval.Images(bridge, file if keep else None)
        for group in groups[distributed.rank() :: distributed.world()]:
            images.add(bridge.frontend.tiles(group) if group else None)
        return images.score(TEXTS, k=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("trained"))
    stages.train(config(root, "stage1", train={"steps": 2}))
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes of `together`: sums over several threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_encoded_once_or_twice_is_the_same(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = FrontEnd.encode_tiles, []
    monkeypatch.setattr(FrontEnd, "encode_tiles", lambda self, tiles: seen.append(len(tiles)) or encode(self, tiles))
    kept = share(trained, [3, 0, 4, 1], keep=True)
    assert seen == [3, 4, 1]
    twice = share(trained, [3, 0, 4, 1])
    assert seen[3:] == [3, 4, 1, 3, 4, 1]
    assert same(kept, twice)
    assert kept.itm[kept.of_image].std() > 1e-3


LAYOUTS = [[3, 2, 0, 4, 1], [2], [0, 0, 1]]  # unequal groups, some without an image, fewer groups than processes


def share_all(root: Path, keep: bool) -> list[retrieval.Scores]:
    return [share(root, sizes, keep) for sizes in LAYOUTS]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.weekly
def test_three_processes_come_to_the_scores_of_one(trained: Path, tmp_path: Path) -> None:
    alone = share_all(trained, False)
    for found in together(tmp_path, 3, share_all, trained, True):
        assert all(map(same, found, alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: tuple[ImageTextModel, Path], dtype: torch.dtype) -> None:
    bridge, root = model
    groups = [bridge.frontend.tiles([root / "images" / f"{i}.png" for i in range(6)])]
    whole = retrieval.score(bridge, groups, TEXTS)
    with torch.autocast("cpu", dtype):
        half = retrieval.score(bridge, groups, TEXTS)
    size = whole.itm.abs().max().item()
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(half.itc, whole.itc, atol=tolerance, rtol=0)
    torch.testing.assert_close(half.itm, whole.itm, atol=tolerance * size, rtol=0)
    assert not torch.equal(half.itm, whole.itm)
    assert half.itc.unique().numel() > 40  # bf16 itself has no more numbers between 0.5 and 1 than 128
    assert torch.equal(half.match, torch.where(half.of_image, half.match, 0))
