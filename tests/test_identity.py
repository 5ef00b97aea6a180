"""Which records show the same picture: by the id, else by the file however it is spelled, else by the bytes."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

from qformer import identity
from qformer.data import sources
from qformer.data.loader import Batches
from qformer.losses import same_image
from qformer.resolution.fixed import Fixed
from qformer.schema import DataConfig
from qformer.types import BadSample, Sample
from tests.data.making import encoded, jsonl, photo, tar


def test_one_file_under_many_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "café.png").touch()
    (tmp_path / "other.png").symlink_to("real/café.png")
    monkeypatch.chdir(tmp_path / "real")
    one = identity.of_path(tmp_path / "real" / "café.png")
    spelled = [
        "café.png",
        "./café.png",
        "inner/../café.png",
        "../link/café.png",
        "../other.png",
        "../link/./inner/..//café.png",
    ]
    spelled += [unicodedata.normalize("NFD", name) for name in spelled]
    assert {identity.of_path(name) for name in spelled} == {one}
    assert identity.of_path("cafe.png") != one
    assert identity.of_path("none/../café.png") == one  # of no folder there is, so by the name alone
    assert identity.of_path("a\0b.png") == str(tmp_path / "real" / "a\0b.png")
    assert identity.of_path("inner/..") == identity.of_path(".") == str(tmp_path / "real")


def test_a_folder_behind_a_link_is_left_by_its_own_parent(tmp_path: Path) -> None:
    """As files are opened: `link/..` is above what the link points to, not above the link."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert identity.of_path(tmp_path / "link" / ".." / "x.png") == str(tmp_path / "a" / "x.png")


@pytest.mark.parametrize(
    ("given", "known"),
    [("7", "7"), (7, 7), (7.0, 7), (0, 0), *[(none, None) for none in ("", " ", 7.5, math.nan, math.inf, True, [7])]],
)
def test_ids(given: Any, known: Any) -> None:
    assert identity.plain_id(given) == known


def test_every_sample_knows_its_picture() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert Sample(b"x", "a").image_id == Sample(b"x", "b").image_id != Sample(b"y", "a").image_id
    assert Sample(pixels, "a").image_id == Sample(pixels.copy(), "b").image_id
    assert Sample(pixels, "a").image_id != Sample(pixels.reshape(2, 8, 3), "a").image_id
    assert Sample(pixels, "a").image_id == Sample(np.asfortranarray(pixels), "b").image_id
    assert Sample(Path("x"), "a", "the id").image_id == "the id"


def test_a_stamp_is_another_once_the_picture_is(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert identity.stamp(file) == identity.MISSING
    file.write_bytes(b"one")
    first, seen = identity.stamp(file), identity.look(file)
    assert seen is not None
    digest = identity.digest(b"one")
    os.utime(file, ns=(0, seen[1] + 1))
    assert identity.stamp(file) != first
    assert identity.is_same(file, *seen, digest)  # touched, or copied: its bytes are the same
    file.write_bytes(b"two")
    assert not identity.is_same(file, *seen, digest)
    file.write_bytes(b"more")
    assert not identity.is_same(file, *seen, identity.digest(b"more"))
    file.unlink()
    assert identity.is_same(file, *seen, digest)
    assert identity.stamp(b"one") == identity.stamp(b"one") != identity.stamp(b"two")


ROWS = [(0, "one"), (1, "two"), (0, "three"), (0, "four")]
SAME = [[a == b for b, _ in ROWS] for a, _ in ROWS]


def form(name: str, folder: Path) -> Any:
    """A source of `ROWS`: a record for each caption, of pictures 0 and 1."""
    for number in range(2):
        photo(number).save(folder / f"{number}.png")
    spelled = [f"{'./' * place}{number}.png" for place, (number, _) in enumerate(ROWS)]
    texts = [text for _, text in ROWS]
    data = [encoded(photo(number)) for number, _ in ROWS]
    if name == "jsonl":
        records = [{"image": image, "caption": text} for image, text in zip(spelled, texts, strict=True)]
        return sources.build("jsonl", path=jsonl(folder / "a.jsonl", records))
    if name == "jsonl by id":  # of copies under other names
        ids = ["7", 3, 7, 7]
        for place in range(4):
            photo(ROWS[place][0], width=20 + place).save(folder / f"copy{place}.png")
        records = [{"image": f"copy{n}.png", "caption": texts[n], "of": ids[n]} for n in range(4)]
        return sources.build("jsonl", path=jsonl(folder / "a.jsonl", records), id="of")
    if name == "csv":
        pandas.DataFrame({"image": spelled, "caption": texts}).to_csv(folder / "a.csv", index=False)
        return sources.build("datasets", path=str(folder / "a.csv"), images=str(folder))
    if name == "csv by id":  # a gap in the column makes its numbers 1.0, 2.0
        images = [f"{place}.png" for place in range(5)]
        table = pandas.DataFrame({"image": images, "caption": [*texts, "five"], "of": [1, 2, 1, 1, None]})
        table.to_csv(folder / "a.csv", index=False)
        return sources.build("datasets", path=str(folder / "a.csv"), images=str(folder), id="of")
    if name.startswith("parquet"):
        pandas.DataFrame({"image": data, "caption": texts}).to_parquet(folder / "a.parquet")
        options = {"streaming": True, "cache": str(folder / "cache")} if "streaming" in name else {}
        return sources.build("datasets", path=str(folder / "a.parquet"), **options)
    assert name == "webdataset"
    members = [
        (f"{n}.{kind}", value) for n in range(4) for kind, value in (("png", data[n]), ("txt", texts[n].encode()))
    ]
    return sources.build("webdataset", path=tar(folder / "a.tar", members), cache=str(folder / "cache"))


@pytest.mark.parametrize(
    "name", ["jsonl", "jsonl by id", "csv", "csv by id", "parquet", "parquet streaming", "webdataset"]
)
def test_rows_of_one_picture_are_never_each_others_negatives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    source = form(name, tmp_path)
    if name != "csv by id":
        data = DataConfig.model_validate({"train": {"name": "unused"}, "batch": 4})
        batch = Batches(source, Fixed(8), data, 0)[0].batch
        assert isinstance(batch.text, list)
        order = [[text for _, text in ROWS].index(text) for text in batch.text]
        assert sorted(order) == [0, 1, 2, 3]
        assert same_image(batch.image_id, 4).tolist() == [[SAME[a][b] for b in order] for a in order]
    ids = [source[index].image_id for index in list(getattr(source, "indices", lambda: range(4))())[:4]]
    assert same_image(ids, 4).tolist() == SAME


def test_coco_ids_are_texts_on_one_side_and_numbers_on_the_other(tmp_path: Path) -> None:
    for one, other in ((str, int), (int, str), (float, int)):
        listed = [{"id": one(number), "file_name": f"{number}.jpg"} for number in (42, 73)]
        said = [{"image_id": other(number), "caption": f"picture {number}"} for number in (73, 42, 99)]
        (tmp_path / "a.json").write_text(json.dumps({"images": listed, "annotations": said}))
        source = sources.build("coco", path=str(tmp_path / "a.json"), images=str(tmp_path))
        assert [source[n].captions for n in range(2)] == [["picture 42"], ["picture 73"]]
        assert len(source) == 3
        with pytest.raises(BadSample, match="image 99, which is no `id` of the file"):
            source[2]
    questions = [{"question_id": "1", "image_id": "42", "question": "what?"}]
    annotated = [{"question_id": 1, "image_id": 42, "answers": [{"answer": "a bus"}]}]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotated}))
    paths = {"path": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json"), "images": str(tmp_path)}
    sample = sources.build("vqa", **paths)[0]
    assert (sample.answers, Path(str(sample.image)).name) == (["a bus"], "000000000042.jpg")


def test_ids_of_one_file_are_equal_however_its_path_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", [{"image": f"{number}.png", "caption": "a kite", "photo": 3} for number in range(2)])
    jsonl(tmp_path / "b.jsonl", [{"image": "2.png", "caption": "a kite", "photo": 3}])
    parts = [{"name": "jsonl", "path": path, "id": "photo"} for path in ("a.jsonl", "./a.jsonl", "b.jsonl")]
    mixed = sources.build("mix", sources=parts)
    ids = [mixed[index].image_id for index in range(5)]
    assert len(set(ids[:4])) == 1  # and another file has its own numbers
    assert ids[4] not in ids[:4]
