"""Pages of print: questions joined with the lines of their pictures, print by its size after a strategy's resize."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qformer.data import sources
from qformer.evaluation.benchmarks import AskOptions, Item, choose, rows_by_column
from qformer.evaluation.tasks import OpenQuestion
from qformer.images import read_image
from qformer.metrics.documents import print_size
from qformer.mosaics.album import TENTHS, tenth
from qformer.resolution import build
from qformer.resolution.measures import height_scale
from qformer.suites.pages import Pages, print_height, printed
from qformer.types import Tiles, UsageError
from qformer.videos.rows import cut_row
from tests.data.making import encoded, jsonl, photo

LINES = [
    ("GRAND SHOP (KL) SDN. BHD.", 40.0),
    ("TOTAL 12.50", 20.0),
    ("12.50", 24.0),
    ("2, Jalan Besar,", 12.0),
    ("81620 Town", 9.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty receipts of 100 x 200 pixels in the form of those of SROIE, and a file of two questions about each."""
    made = tmp_path_factory.mktemp("receipts")
    pictures, questions = [], []
    for number in range(30):
        (made / f"{number}.png").write_bytes(encoded(photo(number, 100, 200)))
        boxes = [[5, 10, 90, 34], [5, 50, 90, 62]]
        lines = [f"SHOP {number}", f"TOTAL: {number}.50"]
        pictures.append({"image": f"{number}.png", "ocr_lines": lines, "ocr_boxes": boxes})
        for kind, answer in (("company", f"Shop {number}"), ("total", f"{number}.50")):
            asked = {"id": f"{number}-{kind}", "field": kind, "question": f"What is the {kind}?", "answers": [answer]}
            questions.append({"image": f"{number}.png"} | asked)
    jsonl(made / "annotations.jsonl", pictures)
    jsonl(made / "qa.jsonl", [*questions, "{broken"])
    return made


def test_questions_have_kinds_print_and_choices(folder: Path) -> None:
    source = sources.build("pages", path=str(folder), split="any")
    assert len(source) == 61
    samples = [source[index] for index in range(60)]
    assert Counter(sample.facts["question_type"] for sample in samples) == {"company": 30, "total": 30}
    for sample in samples:
        kind, choices = sample.facts["question_type"], sample.facts["choices"]
        assert sample.facts["print_height"] == (24 if kind == "company" else 12)
        assert sample.answers[0] in choices
        assert len({*choices}) == 4
        assert all(choice.startswith("Shop") == (kind == "company") for choice in choices), "of the same kind"
        assert "ocr_lines" not in sample.facts
    assert [source[index].facts for index in range(60)] == [sample.facts for sample in samples]
    places = Counter(sample.facts["choices"].index(sample.answers[0]) for sample in samples)
    assert len(places) == 4


def test_pictures_of_one_split_are_in_no_other(folder: Path) -> None:
    parts = [Pages(path=str(folder), split=split) for split in ("train", "val", "test")]
    names = [{part[index].image for index in range(len(part)) if part._places[index] < 60} for part in parts]
    assert all(names)
    assert len(set.union(*names)) == sum(map(len, names)) == 30


@pytest.mark.parametrize(
    ("answers", "height"),
    [
        (["12.50"], 24.0),  # printed twice: the larger is enough
        (["Grand Shop (KL) Sdn Bhd"], 40.0),  # without the punctuation
        (["2, JALAN BESAR, 81620 TOWN"], 9.0),  # two lines, both of which must be read
        (["17.99"], None),
        ([], None),
        (["..."], None),
    ],
)
def test_height_of_the_print_of_an_answer(answers: list[str], height: float | None) -> None:
    assert print_height(answers, LINES) == height


def test_boxes_beyond_all_numbers_say_no_height() -> None:
    sizes = {"size": [1, 10**400], "orig_size": [1, 3]}
    assert printed({"ocr_lines": ["a"], "ocr_boxes_raw": [[0, 0, 1, 1]], **sizes}) == []


def test_boxes_of_the_unscaled_picture_are_scaled() -> None:
    facts: dict[str, Any] = {"ocr_lines": ["a"], "ocr_boxes_raw": [[0, 10, 5, 30]]}
    assert printed(facts | {"size": [50, 100], "orig_size": [100, 200]}) == [("a", 10.0)]
    for broken in ({}, {"size": [5, 5], "orig_size": [0, 0]}, {"size": 3, "orig_size": 4}):
        assert printed(facts | broken) == []
    assert printed({"ocr_lines": ["a", "b"], "ocr_boxes": [[0, 0, 1, 1]]}) == []


@pytest.mark.parametrize(
    ("strategy", "size", "scale"),
    [
        ({"name": "fixed", "size": 50}, (100, 200), 0.25),
        ({"name": "pad_square", "size": 56, "patch": 14}, (100, 200), 0.28),
        ({"name": "qwen2vl", "max_tokens": 64}, (448, 896), 0.34375),  # 11 rows of 28 px
        ({"name": "internvl", "size": 112, "max_tiles": 2}, (112, 224), 1.0),  # of the tiles, not of the thumbnail
    ],
)
def test_scale_of_a_strategy(strategy: dict[str, Any], size: tuple[int, int], scale: float) -> None:
    assert height_scale(build(**strategy).plan(*size)) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("height", "name"), [(0, "00-04 px"), (7.9, "06-08 px"), (8, "08-12 px"), (90, "24 px or more")]
)
def test_sizes_of_print(height: float, name: str) -> None:
    assert print_size(height) == name


@pytest.mark.parametrize(("bench", "score"), [("docvqa", "ANLS"), ("chartqa", "relaxed accuracy")])
def test_scores_are_told_by_size_of_print_and_kind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bench: str, score: str
) -> None:
    """Company names are right, totals are not; half the height of the picture is half the height of its print."""
    monkeypatch.setattr(
        OpenQuestion,
        "predict",
        lambda self, model, tiles, items, ask: [
            {"said": item.accepted[0] if "company" in item.question else "?"} for group in items for item in group
        ],
    )
    measured_by, source, strategy = choose(bench), Pages(path=str(folder), split="any"), build("fixed", size=100)
    images, skipped = measured_by.items(source)
    assert (len(skipped), len(images)) == (1, 30)
    groups = [image.items for image in images]
    rows = [cut_row([read_image(source[image.image.index].image)], strategy) for image in images]
    records = measured_by.predict(None, Tiles.join(rows), groups, AskOptions())
    items: list[Item] = [item for group in groups for item in group]
    measured = measured_by.score(items, records, None, lemmas=False)
    assert measured.groups["print"]["06-08 px"] == {"count": 30, score: 0.0}
    assert measured.groups["print"]["12-16 px"] == {"count": 30, score: 1.0}
    assert measured.groups["question_type"]["company"][score] == 1
    assert "print: 06-08 px" in measured.intervals


def test_kinds_of_plain_rows_are_told_apart() -> None:
    """A column `kind` needs no option."""
    items = [Item(str(number), number, facts={"kind": kind}) for number, kind in enumerate("aab")]
    assert rows_by_column(items, None) == {"kind": {"a": [0, 1], "b": [2]}}


def test_folders_without_pages_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no 'annotations.jsonl' in"):
        sources.build("pages", path=str(tmp_path))
    jsonl(tmp_path / "annotations.jsonl", [{"image": "0.png", "question": "what?", "answers": ["a"]}])
    empty = next(split for split in ("val", "test") if tenth(str(tmp_path / "0.png")) not in TENTHS[split])
    with pytest.raises(UsageError, match=r"no picture of .* is in the split"):
        sources.build("pages", path=str(tmp_path), split=empty)
    assert len(sources.build("pages", path=str(tmp_path), split="any")) == 1
