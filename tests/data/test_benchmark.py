"""The images of a benchmark: records of one image are one image, and what cannot be used costs itself alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformer.data import sources
from qformer.data.held_out import list_images, read_groups
from qformer.resolution.fixed import Fixed
from qformer.types import UsageError
from tests.data.making import encoded, jsonl, photo, shard, tar


def pictures(folder: Path, count: int) -> None:
    for number in range(count):
        photo(number).save(folder / f"{number}.png")


def test_records_of_one_image_are_one_image_with_all_captions(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    records = [
        {"image": "0.png", "caption": "A cat."},
        {"image": "1.png", "captions": ["a dog", "a dog"]},
        {"image": "0.png", "caption": "a grey cat"},
        {"image": "2.png", "caption": " "},
        "{",
        {"image": "2.png", "caption": "a bus"},
    ]
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", records))
    listed, skipped = list_images(source)
    assert [image.captions for image in listed] == [["a cat", "a grey cat"], ["a dog", "a dog"], ["a bus"]]
    assert [record["kind"] for record in skipped] == ["no caption", "not json"]
    first, _ = list_images(source, limit=1)
    assert [image.captions for image in first] == [["a cat"]]  # it ends where the second image begins


def test_samples_of_tars_are_known_by_their_bytes(tmp_path: Path) -> None:
    """Their names count from zero in every tar, and one image may have several."""
    files = [shard(tmp_path / f"{number}.tar", numbers) for number, numbers in enumerate([range(3), range(1, 4)])]
    tar(tmp_path / "2.tar", [("00001.png", encoded(photo(7))), ("00001.txt", b"another one of that name")])
    source = sources.build("webdataset", path=[*files, str(tmp_path / "2.tar")], cache=str(tmp_path / "cache"))
    listed, _ = list_images(source)
    texts = [[f"picture {number}"] * (1 + (number in (1, 2))) for number in range(4)]
    assert [image.captions for image in listed] == [*texts, ["another one of that name"]]


def test_groups_lose_what_cannot_be_read_and_keep_their_places(tmp_path: Path) -> None:
    pictures(tmp_path, 8)
    for number in (1, 4, 5):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    (tmp_path / "6.png").unlink()
    records = [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(8)]
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", records))
    listed, _ = list_images(source)
    groups = list(read_groups(source, listed, Fixed(size=14), [range(2), range(4, 6), range(6, 8)]))
    assert [group.numbers for group in groups] == [[0], [], [7]]
    assert [None if group.tiles is None else len(group.tiles) for group in groups] == [1, None, 1]
    assert [[record["kind"] for record in group.skipped] for group in groups] == [
        ["undecodable"],
        ["undecodable"] * 2,
        ["missing"],
    ]
    assert list(read_groups(source, listed, Fixed(size=14), [])) == []


def test_nothing_to_use(tmp_path: Path) -> None:
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", [{"image": "0.png", "caption": "..."}]))
    with pytest.raises(UsageError, match="none of the 1 records"):
        list_images(source)
