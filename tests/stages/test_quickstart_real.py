"""`qformer quickstart --real` on invented photos, with mini towers for pre-trained ones: all of what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import Markup
from PIL import Image

from qformer.checkpoints import folder as checkpoint
from qformer.config import Choice
from qformer.data import sources
from qformer.evaluation.retrieval import Scores
from qformer.stages.quickstart.photos import BLIND, PART, blind, divide
from qformer.stages.quickstart.questions import Closed
from qformer.stages.quickstart.real_exam import Answers
from qformer.stages.quickstart.shown import query
from tests.commands import command, outcome

SUBJECTS = {
    "a brown dog": ["a brown dog sits on the grass", "the dog sits", "one brown dog in the grass", "a dog on grass"],
    "a man": ["a man stands in the street", "the man waits", "a man in a red shirt", "a man in a red shirt waits"],
}
TOWERS = [
    "stage1.vision.path=mini:vit",
    "stage1.resolution.size=120",
    "stage1.text.bert=mini:bert",
    "stage1.qformer.cross_attention_every=1",
    "stage1.loss.itm=1",
    "stage2.llm.path=mini:opt",
]
FEW = [
    f"{stage}.{key}" for stage in ("stage1", "stage2") for key in ("train.steps=2", "train.warmup=1", "data.batch=4")
]


def write_photos(folder: Path, split: bool = True) -> Path:
    """Write 32 pictures of two colors with captions, the last 12 of them held out."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(32):
        subject = list(SUBJECTS)[number % 2]
        Image.new("RGB", (60, 40), (200 - number, 90 + number, 40 * (number % 2))).save(folder / f"{number}.png")
        captions = [f"{subject} by pole {number}", *SUBJECTS[subject]]
        row = {"image": f"{number}.png", "captions": captions}
        rows.append(row | {"split": "train" if number < 20 else "dev"} if split else row)
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("real")
    photos = write_photos(folder / "photos")
    own = folder / "mine"
    own.mkdir()
    for number in range(3):
        Image.new("RGB", (50, 50), (0, 80 * number, 200)).save(own / f"{number}.png")
    (own / "broken.png").write_bytes(b"no picture")
    told = command(
        *("quickstart", "--real", "-o", folder / "out", "--data", f"path={photos}", "--photos", own, *TOWERS, *FEW)
    )
    return folder / "out", json.loads((folder / "out" / "results.json").read_text()), told


def test_results_have_the_promised_form(real: tuple[Path, dict[str, Any], str]) -> None:
    _, results, told = real
    assert list(results["retrieval"]) == ["linear", "itc", "reranked"]
    for recalls in results["retrieval"].values():
        assert set(recalls) == {f"{way}_r{n}" for way in ("i2t", "t2i") for n in (1, 5, 10)}
    phases = ["features", "stage one", "retrieval", "stage two", "captions", "questions", "blind twin", "own photos"]
    assert list(results["phases"]) == list(results["cpu_seconds"]) == phases
    assert 0 < sum(results["phases"].values()) <= results["seconds"]
    assert all(phase in told for phase in phases)
    vqa = results["vqa"]
    assert vqa["questions"] == sum(kind["count"] for kind in vqa["by_kind"].values()) > 0
    assert vqa["by_kind"]["yes/no"]["majority"] == 0.5
    low, high = vqa["interval"]
    assert low <= vqa["difference"] <= high
    assert vqa["difference"] == pytest.approx(vqa["accuracy"] - vqa["blind"])


def test_both_stages_read_one_store_of_the_training_photos(real: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = real
    first, second = (checkpoint.read(folder / name).config for name in ("stage1", "stage2"))
    for config in (first, second):
        assert config.data.features is not None
        assert config.data.features.path == str(folder / "store")
        assert config.data.train.options["where"] == {"split": "train"}
        assert config.data.validation is not None
        assert config.data.validation.options["where"] == {"split": "dev"}
    assert json.loads((folder / "store" / "store.json").read_text())["made"]["data"]["samples"] == 20
    assert second.init == str(folder / "stage1")


def test_the_blind_twin_sees_gray_alone(real: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = real
    second, twin = (checkpoint.read(folder / name).config for name in ("stage2", "stage2-blind"))
    assert twin.data.train.name == BLIND
    assert twin.data.train.options["source"] == second.data.train.model_dump()
    assert twin.data.features is None
    assert twin.init == second.init
    assert twin.llm is not None
    assert second.llm is not None
    scale = {"visual_scale": second.llm.visual_scale}  # the twin's projection has no photos to be solved on
    assert twin.llm.model_copy(update=scale) == second.llm
    assert (second.start, twin.start) == ("warm", "paper")


def test_captions_answers_and_own_photos_are_kept(real: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, told = real
    captions, answers, own = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("captions", "answers", "photos")
    )
    assert len(captions) == 12
    assert len(answers) == results["vqa"]["questions"]
    keys = ("said", "blind", "calibrated", "answer")
    assert all({one[key] for key in keys} <= set(one["choices"]) for one in answers)
    right = sum(one["said"] == one["answer"] for one in answers) / len(answers)
    assert right == pytest.approx(results["vqa"]["accuracy"])
    assert [Path(one["image"]).name for one in own] == ["0.png", "1.png", "2.png"]
    searched = re.search(r"qformer search (\S+)\s+(\S+)", told)
    assert searched is not None
    hits = json.loads(command("search", *searched.groups(), "a dog", "--json"))
    assert {Path(hit["path"]).name for hit in hits} == {"0.png", "1.png", "2.png"}


def test_the_report_holds_everything_in_one_file(real: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, _ = real
    page = (folder / "report.html").read_text()
    assert "src='data:image/png;base64," in page
    assert not re.findall(r"(?:src|href)='(?!data:|#)", page)
    assert page.count("class=query") == 6
    assert page.count("<div class=card>") == 12 + min(results["vqa"]["questions"], 3) + 3
    for told in ("re-ranked by ITM", "calibrated", "difference (95 %)", "Your photos", "a brown dog"):
        assert told in page


def test_answers_are_compared_with_those_of_the_blind_twin() -> None:
    asked = [Closed(photo, "place", "where?", ("beach", "snow"), "beach") for photo in range(4)]
    seeing, blind = [[1.0, 2.0], [2.5, 2.0], [2.1, 2.0], [2.0, 1.0]], [[3.0, 2.0]] * 4
    answers = Answers(asked, seeing, blind)
    assert answers.said == ["beach", "snow", "snow", "snow"]
    assert answers.guessed == ["snow"] * 4
    assert answers.calibrated == ["beach", "beach", "beach", "beach"]  # where the last is a tie, the first
    measured = answers.measure()
    assert (measured["accuracy"], measured["blind"], measured["difference"]) == (0.25, 0, 0.25)
    assert measured["calibrated"] == {"accuracy": 1, "difference": 1, "interval": [0, 1]}  # of four photos
    assert measured["majority"] == measured["commonest"] == 1
    assert measured["by_kind"]["place"]["calibrated"] == 1
    assert Answers([], [], []).measure() == {}


def test_photos_without_a_split_are_divided_by_their_identity(tmp_path: Path) -> None:
    path = write_photos(tmp_path, split=False)
    train, held = (sources.for_run(choice) for choice in divide([f"path={path}"]))
    names = [{Path(str(source[n].image)).name for n in range(len(source))} for source in (train, held)]
    assert len(names[0]) + len(names[1]) == 32
    assert not names[0] & names[1]
    assert 2 <= len(names[1]) <= 12
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)))
    assert {
        Path(str(one.image)).name for one in map(sources.for_run(divide([str(path)])[1]).__getitem__, range(len(held)))
    } == names[1]


def test_other_sources_are_divided_by_their_option_or_their_records(tmp_path: Path) -> None:
    train, held = divide(["name=scenes", "count=9"])
    assert (train.options["split"], held.options["split"]) == ("train", "val")
    given = divide(["name=scenes", "count=60", "split=any"])
    assert [choice.name for choice in given] == [PART, PART]
    assert sum(len(sources.for_run(choice)) for choice in given) == 60


def test_a_bridge_that_was_not_trained_on_matching_shows_no_re_ranking() -> None:
    itc = torch.eye(3)
    scores = Scores(itc, itc, itc, itc.bool(), itc.bool())
    shown = [
        query(2, 2, scores, lambda image, kind: Markup(f"{image}{kind}"), reranked=reranked)
        for reranked in (False, True)
    ]
    assert [list(rows) for rows in shown] == [["ITC"], ["ITC", "re-ranked"]]
    assert shown[0]["ITC"][0] == "2found"


def test_a_gray_picture_hides_everything() -> None:
    hidden = sources.for_run(blind(Choice(name="scenes", **{"count": 4}), 20))
    seen = sources.build("scenes", count=4)
    assert hidden[3].captions == seen[3].captions
    assert hidden[3].image_id == seen[3].image_id
    assert hidden[3].image.shape == (20, 20, 3)
    assert len(set(hidden[3].image.flatten())) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "path=x.jsonl"], "add --real"),
        (["--photos", "."], "add --real"),
        (["--real", "--photos", "nowhere"], "no folder at 'nowhere'"),
        (["--real", "--data", "path=nowhere.jsonl"], "no file at 'nowhere.jsonl'"),
        (["--real"], "give captioned photos with --data"),
        (["--real", "stage3.train.steps=1"], "stage1"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path: Path, words: list[str], told: str) -> None:
    code, _, err = outcome("quickstart", "-o", tmp_path / "out", *words, *(TOWERS if "--real" in words else []))
    assert code == 2
    assert told in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_same_command_trains_nothing_again(real: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, _ = real
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/checkpoints/*/*.safetensors")}
    assert len(before) == 3
    inputs = ("--data", f"path={folder.parent / 'photos' / 'captions.jsonl'}", "--photos", folder.parent / "mine")
    about = json.loads((folder / "photos" / "gallery.json").read_text())
    (folder / "photos" / "gallery.json").write_text(json.dumps(about | {"fingerprint": "of another bridge"}))
    told = command("quickstart", "--real", "-o", folder, *inputs, *TOWERS, *FEW)
    assert "your photos cannot be searched" in told
    assert {file: file.stat().st_mtime_ns for file in before} == before
    again = json.loads((folder / "results.json").read_text())
    for key in ("retrieval", "captions", "vqa"):
        assert again[key] == results[key]
