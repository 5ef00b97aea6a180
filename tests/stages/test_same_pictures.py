"""Recall of training's validation, of `qformer eval` and of a count by hand: the same to the digit, whatever the form.

Eight pictures with two captions each, none beside its sister; one caption belongs to two pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch

import qformer
from qformer import stages
from qformer.data import sources
from qformer.data.held_out import held_out
from qformer.model.image_text import ImageTextModel
from qformer.stages.evaluate.retrieval import evaluate_retrieval
from qformer.stages.evaluate.settings import Settings
from qformer.stages.stage1 import Validation
from tests.data.making import jsonl, tar
from tests.tiny import CAPTIONS
from tests.workspace import config, make_workspace

COUNT, EQUAL = 8, "the same words"
TEXTS = [(CAPTIONS[n % 5] + f" {n}", EQUAL if n in (2, 5) else f"{n} cats") for n in range(COUNT)]
FORMS = ["a line each", "lists", "csv", "parquet", "coco", "webdataset"]
Recalls = dict[str, float]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1", data={"validation": None}, train={"steps": 2}))
    return root


@pytest.fixture(scope="module")
def by_hand(root: Path) -> dict[str, Recalls]:
    return {"": count(root, equal=True), "_original": count(root, equal=False)}


@torch.no_grad()
def count(root: Path, equal: bool) -> Recalls:
    """Every pair is scored by itself; a query is found at n if fewer than n wrong ones are at least as good."""
    model = qformer.load(root / "runs" / "stage1", "cpu")
    assert isinstance(model, ImageTextModel)
    pictures = [model.frontend.tiles([root / "images" / f"{number}.png"]) for number in range(COUNT)]
    texts = [(number, text) for number, own in enumerate(TEXTS) for text in own]
    scores: dict[str, dict[tuple[int, int], float]] = {"itc": {}, "reranked": {}}
    for number, tiles in enumerate(pictures):
        embeds = model.embed_images(tiles)[0][0]
        for place, (_, text) in enumerate(texts):
            cosine = float((embeds @ model.embed_texts([text])[0]).max())
            scores["itc"][number, place] = cosine
            scores["reranked"][number, place] = cosine + float(model.match_scores(tiles, [text])[0])
    true = {
        (i, t) for i in range(COUNT) for t, (own, text) in enumerate(texts) if own == i or (equal and text in TEXTS[i])
    }
    found: Recalls = {}
    for kind, table in scores.items():
        pairs = {
            "i2t": [[(i, t) for t in range(len(texts))] for i in range(COUNT)],
            "t2i": [[(i, t) for i in range(COUNT)] for t in range(len(texts))],
        }
        for way, queries in pairs.items():
            places = []
            for row in queries:
                best = max(table[pair] for pair in row if pair in true)
                places.append(1 + sum(table[pair] >= best for pair in row if pair not in true))
            found |= {f"{kind}_{way}_r{n}": sum(place <= n for place in places) / len(places) for n in (1, 5, 10)}
    return found


def write(form: str, root: Path, folder: Path) -> dict[str, Any]:
    """The options of a source of that form; the first captions of all pictures stand before the second ones."""
    rows = [(number, TEXTS[number][which]) for which in range(2) for number in range(COUNT)]
    images = [f"images/{'./' * place}{number}.png" for place, (number, _) in enumerate(rows)]
    data = [(root / "images" / f"{number}.png").read_bytes() for number, _ in rows]
    texts = [text for _, text in rows]
    if form == "a line each":
        records = [{"image": image, "caption": text} for image, text in zip(images, texts, strict=True)]
        return {"name": "jsonl", "path": jsonl(folder / "a.jsonl", records), "images": str(root)}
    if form == "lists":
        records = [{"image": images[number], "captions": list(own)} for number, own in enumerate(TEXTS)]
        return {"name": "jsonl", "path": jsonl(folder / "a.jsonl", records), "images": str(root)}
    if form == "csv":
        pandas.DataFrame({"image": images, "caption": texts}).to_csv(folder / "a.csv", index=False)
        return {"name": "datasets", "path": str(folder / "a.csv"), "images": str(root)}
    if form == "parquet":
        pandas.DataFrame({"image": data, "caption": texts}).to_parquet(folder / "a.parquet")
        return {"name": "datasets", "path": str(folder / "a.parquet")}
    if form == "coco":
        listed = [{"id": 40 + number, "file_name": f"images/{number}.png"} for number in range(COUNT)]
        said = [{"image_id": str(40 + number), "caption": text} for number, text in rows]
        (folder / "a.json").write_text(json.dumps({"images": listed, "annotations": said}))
        return {"name": "coco", "path": str(folder / "a.json"), "images": str(root)}
    members = [
        (f"{n}.{kind}", part) for n in range(len(rows)) for kind, part in (("png", data[n]), ("txt", texts[n].encode()))
    ]
    return {"name": "webdataset", "path": tar(folder / "a.tar", members), "cache": str(folder / "cache")}


@pytest.mark.parametrize("form", FORMS)
def test_three_counts_agree_to_the_digit(
    form: str, root: Path, by_hand: dict[str, Recalls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    options = write(form, root, tmp_path)
    words = [f"{key}={value}" for key, value in options.items()]
    evaluate_retrieval(
        Settings(str(root / "runs" / "stage1"), "retrieval", words, batch=3, output=tmp_path / "o.json", device="cpu")
    )
    written = json.loads((tmp_path / "o.json").read_text())
    assert (written["images"], written["texts"], written["equal_captions"]) == (COUNT, 2 * COUNT, 2)
    model = qformer.load(root / "runs" / "stage1", "cpu")
    assert isinstance(model, ImageTextModel)
    held = held_out(sources.build(**options), model.frontend.strategy, None, 4)
    measured = Validation(held, 128)(model, 0)
    assert measured["equal_captions"] == 2
    for ending, expected in by_hand.items():
        for name, share in expected.items():
            kind, _, key = name.partition("_")
            assert written[f"{kind}{ending}"][key] == measured[f"{kind}{ending}_{key}"] == share, name
    assert by_hand[""] != by_hand["_original"]
