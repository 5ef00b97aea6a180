"""Every example of docs/data.md is accepted, and read where its files can be made here; every kind of bad is listed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from qformer import lookup
from qformer.canvases.pairs import Twins, write_pairs
from qformer.data import sources
from qformer.data.base import indices
from qformer.data.texts import usable_captions
from qformer.images import read_image
from qformer.schema import DataConfig
from qformer.types import BadSample
from tests.data.making import encoded, jsonl, photo, shard, tar

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", DOCUMENT, flags=re.DOTALL)
ELSEWHERE = ("hf:", "https:", "pipe:", "lmms-lab/", "pixparse/")


def choices() -> list[dict[str, Any]]:
    """Every source of the examples, those of mixtures as parts of them."""
    found = [yaml.safe_load(example) for example in EXAMPLES]
    return [choice for example in found for choice in example.values()]


def make_files() -> None:
    """What the examples name, small, in the working folder."""
    jsonl(Path("captions.jsonl"), [{"image": "photos/0.jpg", "captions": ["a", "b"], "split": "train"}])
    jsonl(Path("rows.jsonl"), [{"image": "0.jpg", "caption": "a"}])
    album = [{"image": f"album/{n}.jpg", "caption": f"thing{n} number{n}"} for n in range(240)]
    jsonl(Path("album.jsonl"), album)
    Path("receipts").mkdir()
    asked = [{"image": f"{n}.jpg", "question": "what?", "answers": ["a"]} for n in range(9)]
    jsonl(Path("receipts/annotations.jsonl"), asked)
    images = ["photos/0.jpg", "train2017/0.jpg", "val2017/0.jpg", "coco/val2014/0.jpg", "visual_genome/VG_100K_2/7.jpg"]
    images += [*(record["image"] for record in album), *(f"receipts/{record['image']}" for record in asked)]
    for image in images:
        Path(image).parent.mkdir(parents=True, exist_ok=True)
        Path(image).write_bytes(encoded(photo(1), "JPEG"))
    Path("photos/0.txt").write_text("a dog")
    Path("annotations").mkdir()
    coco = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    for split in ("train", "val"):
        Path(f"annotations/captions_{split}2017.json").write_text(json.dumps(coco))
        listed = [{"image": "val2014/0.jpg", "caption": "a" if split == "train" else ["a", "b"]}]
        Path(f"coco_karpathy_{split}.json").write_text(json.dumps(listed))
    image = {"filepath": "val2014", "filename": "0.jpg", "sentences": [{"raw": "a"}]}
    karpathy = {"images": [image | {"split": split} for split in ("restval", "val")]}
    Path("dataset_coco.json").write_text(json.dumps(karpathy))
    Path("region_descriptions.json").write_text(json.dumps([{"id": 7, "regions": [{"phrase": "a"}]}]))
    for image in ("train2014/COCO_train2014_000000000042.jpg", "gqa/n7.jpg", "train2017/000000000042.jpg"):
        Path(image).parent.mkdir(parents=True, exist_ok=True)
        Path(image).write_bytes(encoded(photo(1), "JPEG"))
    asked = {"question_id": 1, "image_id": 42, "question": "what?"}
    questions = {"data_subtype": "train2014", "questions": [asked]}
    Path("v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(questions))
    answers = {"annotations": [{"question_id": 1, "answers": [{"answer": "a"}]}]}
    Path("v2_mscoco_train2014_annotations.json").write_text(json.dumps(answers))
    gqa = {"1": {"imageId": "n7", "question": "what?", "answer": "a"}}
    Path("train_balanced_questions.json").write_text(json.dumps(gqa))
    choice = asked | {"choices": ["a", "b"], "correct_choice_idx": 0, "direct_answers": ["a"]}
    Path("aokvqa_v1p0_train.json").write_text(json.dumps([choice]))
    for folder, number in (("cc3m", 331), ("cc12m", 3), ("sbu", 0)):
        shard(Path(f"{folder}/{number:05d}.tar"), range(2))
    rooms = [("0.rgb.png", encoded(photo(1))), ("0.depth.png", encoded(photo(2))), ("0.txt", b"a")]
    tar(Path("rooms/0000.tar"), rooms)
    table = datasets.Dataset.from_dict({"image": [encoded(photo(1))], "text": ["a"]})
    write_pairs("pairs", Twins(), 1)
    Path("data").mkdir()
    table.to_parquet("data/train-0.parquet")
    asked = {f"Image_{n}": [encoded(photo(n))] for n in (0, 1)} | {f"Question_{n}": ["is it?"] for n in (0, 1)}
    asked |= {f"Image_{image}_Question_{question}": ["Yes"] for image in (0, 1) for question in (0, 1)}
    Path("naturalbench").mkdir()
    datasets.Dataset.from_dict(asked).to_parquet("naturalbench/train-0.parquet")
    datasets.DatasetDict(train=table).save_to_disk("saved_to_disk")


@pytest.mark.parametrize("choice", choices(), ids=lambda choice: str(choice.get("path", choice["name"])))
def test_examples(choice: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    make_files()
    data = DataConfig.model_validate({"train": choice})
    if str(choice.get("path", "")).startswith(ELSEWHERE):
        known = {field.name for field in dataclasses.fields(lookup.find(sources.SOURCES, choice["name"])) if field.init}
        assert set(data.train.options) <= known
        return
    source = sources.for_run(data.train, "run")
    assert any(_readable(source, place) for place in indices(source))  # the first one is enough: some are endless


def _readable(source: Any, place: Any) -> bool:
    try:
        sample = source[place]
        return bool(sample.answers or usable_captions(sample)) and read_image(sample.image).shape[0] == 3
    except BadSample:  # the shards of which only one is made here
        return False


def test_every_layout_has_an_example() -> None:
    named = {choice["name"] for choice in choices()}
    assert named == sources.SOURCES.keys() - sources.DRAWN
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in guide for name in sources.SOURCES)


def test_every_kind_of_bad_is_listed() -> None:
    kinds = set()
    others = {file for folder in ("commands", "retrieval") for file in (ROOT / "qformer" / folder).iterdir()}
    for file in sorted({*(ROOT / "qformer").rglob("*.py")} - others):
        text = file.read_text(encoding="utf-8")
        kinds |= set(re.findall(r'BadSample\(\s*"([^"]+)"', text)) | set(re.findall(r'\(BAD \+ "([^"]+)"', text))
    listed = {
        kind
        for row in re.findall(r"^\| (`.*?) \|", DOCUMENT, flags=re.MULTILINE)
        for kind in re.findall("`(.*?)`", row)
    }
    assert kinds | {"broken shard", "missing shard"} == listed
