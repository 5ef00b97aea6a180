"""The linear map of the frozen towers: its features, what a run tells of it, and its row in `qformer eval`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from qformer import load, stages
from qformer.alignment import align
from qformer.data import sources
from qformer.data.features import FeatureStore
from qformer.evaluation import linear, retrieval
from qformer.model.image_text import ImageTextModel
from qformer.progress import console
from qformer.schema import Config
from qformer.stages.linear import FILE, of_checkpoint
from qformer.types import BadSample, Sample, UsageError
from tests.tiny import CAPTIONS
from tests.workspace import PHOTOS, config, make_workspace

Run = Callable[..., tuple[int, str, str]]
TRAIN = 2 * PHOTOS // 3


def stored(root: Path, name: str = "stage1", **changes: Any) -> Config:
    """A run with dropout that reads a store of its photos, not cropped."""
    data = {"features": str(root / "store"), "crop": [1, 1], "flip": 0}
    return config(root, "stage1", run=str(root / "runs" / name), data=data | changes, qformer={"dropout": 0.1})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("linear"))
    with console.capture() as said:
        stages.train(stored(root))
    (root / "said").write_text(said.get())
    return root


@pytest.fixture
def model(root: Path) -> ImageTextModel:
    model = load(root / "runs" / "stage1", "cpu")
    assert isinstance(model, ImageTextModel)
    return model


def sentence_features(root: Path, texts: list[str]) -> torch.Tensor:
    """What transformers makes of the texts, one by one."""
    bert, tokenizer = BertModel.from_pretrained(root / "bert").eval(), AutoTokenizer.from_pretrained(root / "bert")
    with torch.no_grad():
        return torch.cat([bert(**tokenizer(text, return_tensors="pt"))[0].mean(1) for text in texts])


def test_sentences_are_the_mean_of_what_the_text_tower_gives(root: Path, model: ImageTextModel) -> None:
    texts = ["a cat on the mat in the rain", *CAPTIONS, "a", *CAPTIONS[:2]]
    before = torch.get_rng_state()
    tower = linear.SentenceTower.read(model, str(root / "bert"))
    assert torch.equal(torch.get_rng_state(), before)  # training goes on as without it
    torch.testing.assert_close(tower(texts), sentence_features(root, texts), atol=1e-5, rtol=1e-5)


def test_the_map_is_solved_on_pooled_photos_and_mean_captions(root: Path, model: ImageTextModel) -> None:
    """Against features made by hand, pictures encoded again; and its recalls against their definition."""
    source = sources.build("jsonl", path=str(root / "captions.jsonl"), where={"split": "train"})
    store = FeatureStore.read_manifest(root / "store")
    solved = linear.solve(linear.SentenceTower.read(model, str(root / "bert")), store, source, width=8)
    assert (solved.photos, solved.texts) == (TRAIN, 2 * TRAIN)
    samples = [source[number] for number in range(TRAIN)]
    with torch.no_grad():
        tokens = torch.stack(model.frontend.encode_tiles(model.frontend.tiles([one.image for one in samples])).rows)
    images = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    texts = sentence_features(root, [text for one in samples for text in one.captions])
    expected = align(images, texts.view(TRAIN, 2, -1).mean(1), width=8).similarity(images, texts)
    similarity = solved.alignment.similarity(images, texts)
    torch.testing.assert_close(similarity, expected, atol=0.02, rtol=0)  # stored tokens are fp16
    captions = [[f"{text} {place}" for text in one.captions] for place, one in enumerate(samples)]
    measured = solved.measure(images, captions)
    assert measured.keys() == {"linear"}
    scores = solved.alignment.similarity(images, solved.sentences([text for own in captions for text in own]))
    assert (
        measured["linear"]["t2i_r1"] == (scores.argmax(0) == torch.arange(TRAIN).repeat_interleave(2)).double().mean()
    )
    assert measured["linear"]["i2t_r1"] == (scores.argmax(1) // 2 == torch.arange(TRAIN)).double().mean()
    assert measured["linear"]["i2t_r10"] > measured["linear"]["i2t_r1"] > 1 / TRAIN


def test_photos_are_spread_over_the_source_and_bad_ones_left_out(root: Path, model: ImageTextModel) -> None:
    source = sources.build("jsonl", path=str(root / "captions.jsonl"), where={"split": "train"})
    tower = linear.SentenceTower.read(model, str(root / "bert"))
    seen: list[int] = []

    class Some:
        def __getitem__(self, number: int) -> Any:
            seen.append(number)
            sample = source[number]
            sample.captions = [] if number == 2 else sample.captions
            return sample

    solved = linear.solve(tower, FeatureStore.read_manifest(root / "store"), Some(), width=8, photos=4)  # type: ignore[arg-type]
    assert seen == [0, 2, 4, 6]
    assert (solved.photos, solved.texts) == (3, 6)


def test_a_run_tells_it_once_and_keeps_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is the same as without; a second start reads the file; another validation set is measured again."""
    said = " ".join((root / "said").read_text().split())
    kept = json.loads((root / "runs" / "stage1" / FILE).read_text())
    assert (kept["photos"], kept["texts"]) == (TRAIN, 2 * TRAIN)
    percent = [f"{100 * kept['linear'][name]:.1f}" for name in ("i2t_r1", "t2i_r1", "i2t_r10", "t2i_r10")]
    told = (
        f"a linear map of the frozen towers, solved on {TRAIN} training photos, reaches R@1 {percent[0]} / "
        f"{percent[1]} and R@10 {percent[2]} / {percent[3]} on the {PHOTOS - TRAIN} held-out ones"
    )
    assert said.count(told) == 1
    assert said.index(told) < said.index("step 4: ")
    monkeypatch.setattr("qformer.stages.linear.solve", lambda *given, **options: pytest.fail("solved again"))
    with console.capture() as again:
        stages.train(stored(root))
    assert told in " ".join(again.get().split())
    monkeypatch.setattr("qformer.stages.linear.announce", lambda *given, **options: None)
    stages.train(stored(root, "without"))
    metrics = [
        [{**json.loads(line), "images_per_second": 0} for line in (root / "runs" / run / "metrics.jsonl").open()]
        for run in ("stage1", "without")
    ]
    assert metrics[0] == metrics[1]
    monkeypatch.undo()
    (root / "runs" / "without" / FILE).write_text(json.dumps(kept | {"made": {}}))
    with console.capture() as anew:
        stages.train(stored(root, "without"))
    assert told in " ".join(anew.get().split())
    assert json.loads((root / "runs" / "without" / FILE).read_text()) == kept


def test_a_run_in_which_nothing_can_be_solved_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of questions without captions; it is tried again at the next start."""
    (root / "runs" / "stage1" / FILE).rename(root / FILE)

    def none(sample: Sample) -> list[str]:
        raise BadSample("no caption", sample.key)

    monkeypatch.setattr(linear, "usable_captions", none)
    with console.capture() as said:
        stages.train(stored(root))
    assert f"0 of {TRAIN} training samples have a stored image and a caption" in " ".join(said.get().split())
    assert not (root / "runs" / "stage1" / FILE).exists()
    (root / FILE).rename(root / "runs" / "stage1" / FILE)


def test_eval_prints_its_row(root: Path, run: Run, tmp_path: Path) -> None:
    """For the checkpoint, wherever it stands; with the numbers that the run told of the same photos."""
    shutil.copytree(root / "runs" / "stage1", tmp_path / "moved")
    words = ["--bench", "retrieval", "--data", f"path={root / 'captions.jsonl'}", "--data", "where={split: dev}"]
    code, out, err = run("eval", str(tmp_path / "moved"), *words, "-k", "2", "-o", "a.json")
    assert code == 0, err
    assert out.count("linear map ") >= 2
    said = " ".join(out.split())
    assert f"solved on {TRAIN} training photos with {2 * TRAIN} captions" in said
    result = json.loads(Path("a.json").read_text())
    told = json.loads((root / "runs" / "stage1" / FILE).read_text())
    assert result["linear"] == pytest.approx(told["linear"])
    assert retrieval.CUTOFFS == (1, 5, 10)


def test_eval_says_why_there_is_no_row(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence below the table, and no error."""
    space = make_workspace(tmp_path / "space")
    stages.train(stored(space))

    def reason() -> str:
        code, out, err = run(
            "eval", str(space / "runs" / "stage1"), "--bench", "retrieval", "--data", f"path={captions}", "-k", "0"
        )
        assert code == 0, err
        row, _, reason = out.partition("No linear map of the frozen towers stands beside these numbers: ")
        assert ("linear map " in row) == (not reason)
        return " ".join(reason.split())

    captions = space / "captions.jsonl"
    assert not reason()
    lines = captions.read_text().splitlines()
    captions.write_text("\n".join(lines[1:]))
    assert f"data.samples was {TRAIN}, is {TRAIN - 1}" in reason()
    captions.write_text("\n".join(lines))
    (space / "store" / "shard-000000.safetensors").unlink()
    assert "1 of 1 shards" in reason()
    shutil.rmtree(space / "store")
    assert "is not here" in reason()
    without = config(space, "stage1")
    monkeypatch.setattr("qformer.stages.linear.checkpoint.read_config", lambda *given: without)
    assert "train with data.features" in reason()


def test_checkpoints_of_others_have_no_training_photos(model: ImageTextModel) -> None:
    with pytest.raises(UsageError, match="is not a run of ours"):
        of_checkpoint("Salesforce/blip2-itm-vit-g", model)
