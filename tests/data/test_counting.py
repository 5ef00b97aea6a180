"""Samples are counted where that is quick; nothing is fetched, converted or written for it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from qformer.data import counting
from tests.data.making import encoded, jsonl, photo, shard


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("subprocess.run", refuse)


def test_sources_that_are_here(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", [{"image": "0.png", "caption": "a"}] * 3)
    assert counting.count("jsonl", {"path": lines, "prompt": "a photo of"}) == (3, [])
    (tmp_path / "0.png").write_bytes(encoded(photo(0)))
    assert counting.count("folder", {"path": str(tmp_path)}) == (1, [])
    coco = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert counting.count("coco", {"path": str(tmp_path / "coco.json"), "images": str(tmp_path)}) == (1, [])
    mixed = [{"name": "jsonl", "path": lines, "weight": 2, "prompt": "a"}, {"name": "folder", "path": str(tmp_path)}]
    assert counting.count("mix", {"sources": mixed}) == (4, [])


def test_tars_that_are_here(tmp_path: Path) -> None:
    for number in range(9):
        shard(tmp_path / f"{number}.tar", range(number + 1))
    before = sorted(tmp_path.iterdir())
    assert counting.count("webdataset", {"path": str(tmp_path / "{0..2}.tar"), "cache": str(tmp_path / "c")}) == (6, [])
    count, notes = counting.count("webdataset", {"path": str(tmp_path / "*.tar")})
    assert count == 36  # 1, 3, 5 and 7 samples, times 9 / 4
    assert notes == ["data.train: extrapolated from 4 of 9 shards"]
    assert sorted(tmp_path.iterdir()) == before


def test_data_sets_that_are_here(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    columns = {"image": [encoded(photo(0))] * 5, "caption": ["a"] * 5}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert counting.count("datasets", {"path": str(tmp_path / "*.parquet"), "streaming": True}) == (5, [])
    Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    assert counting.count("datasets", {"path": str(tmp_path / "saved")}) == (5, [])
    assert counting.count("datasets", {"path": str(tmp_path / "a.parquet"), "split": "train[:2]"})[0] is None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("jsonl", {"path": "no.jsonl"}, "no file at 'no.jsonl'"),
        ("webdataset", {"path": "https://example.org/{00..99}.tar"}, "would have to be fetched"),
        ("webdataset", {"path": ["s3://bucket/*.tar"]}, "would have to be fetched"),
        ("webdataset", {"path": "pipe:cat a.tar"}, "would have to be fetched"),
        ("webdataset", {"path": "no/{00..99}.tar"}, "no shard at"),
        ("datasets", {"path": "somebody/photos", "streaming": True}, "would have to be fetched or converted"),
        ("datasets", {"path": "hf://datasets/a/*.parquet"}, "would have to be fetched or converted"),
        ("coco", {"path": "no.json", "images": "no"}, "no file at 'no.json'"),
        ("karpathy", {"path": "no.json", "images": "no"}, "no file at 'no.json'"),
        ("visual_genome", {"path": "no.json", "images": "no"}, "no file at 'no.json'"),
        (
            "mix",
            {"sources": [{"name": "jsonl", "path": "no.jsonl"}]},
            "data.train.sources.0 is not counted: data: no file",
        ),
        ("mix", {"sources": ["jsonl"]}, "is 'jsonl'; give a source"),
        ("mine:Source", {}, "'mine:Source' is a custom class"),
    ],
)
def test_what_is_not_here_is_not_counted(name: str, options: dict[str, Any], said: str) -> None:
    count, notes = counting.count(name, options)
    assert count is None
    assert len(notes) == 1
    assert said in notes[0]
    assert notes[0].startswith("data.train")
