"""COCO, Karpathy's splits, BLIP's lists and Visual Genome: one sample per image, whatever the records look like."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qformer.data import sources
from qformer.types import BadSample, UsageError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def build(name: str, images: Path, values: Any, **options: Any) -> Any:
    path = images.parent / "annotations.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return sources.build(name, path=str(path), images=str(images), **options)


def everything(source: Any) -> list[Any]:
    """Of each sample the file and its captions, or the kind of bad."""
    found: list[Any] = []
    for place in range(len(source)):
        try:
            sample = source[place]
            assert sample.image_id == sample.key == str(sample.image)
            found.append((str(sample.image.relative_to(source.images)), sample.captions))
        except BadSample as bad:
            found.append(bad.kind)
    return found


def test_coco(images: Path) -> None:
    values = {
        "info": {},
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 4, "file_name": "4.jpg"}, {"id": 5, "file_name": "5.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 4, "caption": "a dog"},
            {"id": 2, "image_id": 9, "caption": "a cat"},
            {"id": 3, "image_id": 4, "caption": "two dogs"},
        ],
    }
    expected = [("9.jpg", ["a cat"]), ("4.jpg", ["a dog", "two dogs"]), ("5.jpg", [])]
    assert everything(build("coco", images, values)) == expected


def test_bad_records_of_coco_are_counted_one_by_one(images: Path) -> None:
    records = [
        *[{"id": 1, "file_name": "1.jpg"}, {"id": 1, "file_name": "other.jpg"}, {"id": 2}, {"file_name": "3.jpg"}],
        *["text", {"id": 5, "file_name": 5}, {"id": [6], "file_name": "6.jpg"}],
    ]
    annotations = [
        *[{"image_id": 1, "caption": 3}, {"image_id": 1, "caption": [["a"]]}, {"image_id": 1, "caption": math.nan}],
        *[{"image_id": 1, "caption": "a dog"}, {"image_id": 77, "caption": "lost"}, {"image_id": 77, "caption": "too"}],
        *[{"caption": "of nothing"}, 5, {"image_id": {}, "caption": "x"}],
    ]
    found = everything(build("coco", images, {"images": records, "annotations": annotations}))
    assert found == [("1.jpg", ["a dog"]), "duplicate id", *["no image"] * 5, "no image", "no image"]


def test_a_split_is_obeyed_or_refused(images: Path) -> None:
    listed = [{"image": "a.jpg", "caption": "a kite"}, {"image": "b.jpg", "caption": "a bus"}]
    with pytest.raises(UsageError, match=r"is a list, which is one split; leave data\.split out"):
        build("karpathy", images, listed, split="val")
    marked = [listed[0] | {"split": "val"}, listed[1] | {"split": "train"}]
    source = build("karpathy", images, marked, split="val")
    assert (len(source), source[0].captions) == (1, ["a kite"])
    image = {"filename": "a.jpg", "split": "test", "sentences": []}
    with pytest.raises(UsageError, match="has no split 'validation'; it has test"):
        build("karpathy", images, {"images": [image]}, split="validation")


def test_ids_of_coco_are_equal_as_text_and_as_numbers(images: Path) -> None:
    """And where none is equal the file is refused with one of each, rather than every image told to have no caption."""
    listed = [{"id": 1, "file_name": "a.jpg"}, {"id": "2", "file_name": "b.jpg"}]
    captions = [{"image_id": "1", "caption": "a kite"}, {"image_id": 2, "caption": "a bus"}]
    source = build("coco", images, {"images": listed, "annotations": captions})
    assert [source[n].captions for n in range(len(source))] == [["a kite"], ["a bus"]]
    assert [source[n].facts["image_id"] for n in range(2)] == [1, "2"]
    with pytest.raises(
        UsageError, match=r"no `image_id` of the annotations of '.*', such as 'a\.jpg', is the `id`.*'1'"
    ):
        build("coco", images, {"images": listed, "annotations": [{"image_id": "a.jpg", "caption": "a kite"}]})


def test_karpathy(images: Path) -> None:
    def record(name: str, split: str, *raw: Any) -> dict[str, Any]:
        return {"filename": name, "filepath": "val", "split": split, "sentences": [{"raw": text} for text in raw]}

    values = {
        "images": [
            *[record("1.jpg", "train", "a", "b"), record("2.jpg", "restval", "c"), record("3.jpg", "test", "d")],
            *[record("4.jpg", "train", 5, None), {"split": "train"}, {"filename": "6.jpg", "split": "train"}, 7],
        ]
    }
    train = [("val/1.jpg", ["a", "b"]), ("val/2.jpg", ["c"]), ("val/4.jpg", []), "no image", ("6.jpg", []), "no image"]
    assert everything(build("karpathy", images, values)) == train
    assert everything(build("karpathy", images, values, split="test")) == [("val/3.jpg", ["d"]), "no image"]
    with pytest.raises(UsageError, match="has no split 'val'; it has restval, train"):
        build("karpathy", images, {"images": values["images"][:2]}, split="val")


@pytest.mark.parametrize("ids", [("coco_1", "coco_2"), (1, 2), (1, "coco_2")], ids=str)
def test_lists_of_blip(ids: tuple[Any, Any], images: Path) -> None:
    """coco_karpathy_train.json has a row per caption, _val and _test a row per image; ids are of any kind."""
    train = [
        {"image": "a/1.jpg", "caption": "one", "image_id": ids[0]},
        {"image": "a/2.jpg", "caption": "two", "image_id": ids[1]},
        {"image": "a/1.jpg", "caption": "three", "image_id": ids[0]},
        {"caption": "no image"},
    ]
    found = everything(build("karpathy", images, train))
    assert found == [("a/1.jpg", ["one", "three"]), ("a/2.jpg", ["two"]), "no image"]
    val = [{"image": "1.jpg", "caption": ["one", "two", 3]}]
    assert everything(build("karpathy", images, val)) == [("1.jpg", ["one", "two"])]


def test_visual_genome(images: Path) -> None:
    for name in ("VG_100K/1.jpg", "VG_100K_2/2.jpg", "3.jpg"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).touch()
    values = [
        {"id": 1, "regions": [{"phrase": "a red door"}, {"phrase": "a window"}]},
        {"id": 2, "regions": [{"phrase": None}, {"phrase": "grass"}, "no region"]},
        *[{"id": 3, "regions": []}, {"id": 4, "regions": "none"}, {"regions": [{"phrase": "of nothing"}]}, None],
    ]
    assert everything(build("visual_genome", images, values)) == [
        *[("VG_100K/1.jpg", ["a red door", "a window"]), ("VG_100K_2/2.jpg", ["grass"]), ("3.jpg", [])],
        *[("VG_100K/4.jpg", []), "no image", "no image"],
    ]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("coco", [], "expected an object with lists `images` and `annotations`"),
        ("coco", {"images": []}, "expected an object with lists"),
        ("coco", {"images": [], "annotations": []}, "has no matching image"),
        ("karpathy", {"images": 3}, "expected an object with a list `images`"),
        ("karpathy", 3, "expected an object with a list `images`"),
        ("visual_genome", {}, "expected a list of objects"),
        ("coco", '{"image": "1.jpg"}\n{"image": "2.jpg"}\n', "is not JSON"),
        ("coco", "[" * 100_000, "is not JSON"),
    ],
)
def test_refused_at_once(images: Path, name: str, values: Any, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(name, images, values)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(images: Path) -> None:
    with pytest.raises(UsageError, match="no file at"):
        sources.build("coco", path=str(images / "none.json"), images=str(images))
    (images / "a.json").write_text("[]")
    with pytest.raises(UsageError, match="no folder at"):
        sources.build("coco", path=str(images / "a.json"), images=str(images / "none"))
    with pytest.raises(UsageError, match=r"data\.images is required"):
        sources.build("coco", path=str(images / "a.json"))
