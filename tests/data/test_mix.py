"""Mixtures: weights, prompts, the same batches with workers and after a resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

from qformer.config import Choice
from qformer.data import sources
from qformer.data.base import indices
from qformer.data.held_out import held_out
from qformer.data.loader import Batches, training_batches
from qformer.resolution.fixed import Fixed
from qformer.schema import DataConfig
from qformer.types import Sample, UsageError
from tests.data.making import encoded, jsonl, photo, shard


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Twelve pictures in each of a local tar, a tar behind a pipe, a parquet file and JSON lines; a few are bad."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    shard(tmp_path / "0.tar", range(12))
    shard(tmp_path / "1.tar", range(12, 24))
    images = [encoded(photo(number)) for number in range(24, 36)]
    images[3] = b"<html>"
    pandas.DataFrame({"image": images, "caption": [f"picture {n}" for n in range(24, 36)]}).to_parquet(
        tmp_path / "a.parquet"
    )
    records: list[Any] = []
    for number in range(36, 48):
        (tmp_path / f"{number}.png").write_bytes(encoded(photo(number)))
        records.append({"image": f"{number}.png", "captions": [f"picture {number}", f"the {number}", "!"]})
    records[5] = "{broken"
    return [
        {"name": "webdataset", "path": str(tmp_path / "0.tar"), "weight": 2, "prompt": " a photo of "},
        {"name": "webdataset", "path": f"pipe:cat {tmp_path}/1.tar"},
        {"name": "datasets", "path": str(tmp_path / "a.parquet"), "weight": 0.5},
        {"name": "jsonl", "path": jsonl(tmp_path / "a.jsonl", records), "weight": 0.5, "prompt": "this is"},
    ]


def batches(parts: Any, seed: int = 1, **options: Any) -> Batches:
    data = DataConfig.model_validate({"train": {"name": "mix", "sources": parts}, "batch": 4} | options)
    return Batches(sources.build("mix", sources=parts), Fixed(8), data, seed)


def content(loaded: Any) -> tuple[Any, ...]:
    pixels = [tile.numpy().tobytes() for tile in loaded.batch.tiles.pixels]
    return pixels, loaded.batch.text, loaded.batch.image_id, loaded.keys, loaded.skipped


def test_a_batch_is_a_function_of_seed_and_number(parts: Any) -> None:
    """The same with workers and without, from the start and resumed, in any order."""
    expected = [content(batches(parts)[number]) for number in range(20)]
    assert any(skipped for *_, skipped in expected)
    made = batches(parts)
    assert [content(made[number]) for number in reversed(range(20))] == expected[::-1]
    assert [content(loaded) for loaded in training_batches(batches(parts), 2, 0, 20)] == expected
    assert [content(loaded) for loaded in training_batches(batches(parts), 2, 13, 20)] == expected[13:]
    assert content(batches(parts, seed=2)[0]) != expected[0]


def test_weights_and_prompts(parts: Any) -> None:
    made = batches(parts, batch=100)
    texts = [text for number in range(10) for text in made[number].batch.text]
    prompted = [text for text in texts if text.startswith("a photo of picture ")]
    assert abs(len(prompted) / 1000 - 0.5) < 0.06
    plain = [text for text in texts if text.startswith("picture ")]
    assert {int(text.split()[-1]) for text in plain} == set(range(12, 36)) - {27}
    both = {text for text in texts if text.startswith("this is ")}
    assert both == {f"this is {word} {n}" for word in ("picture", "the") for n in range(36, 48) if n != 41}
    assert len(prompted) + len(plain) + sum(text.startswith("this is") for text in texts) == 1000


def test_validation_sees_every_source(parts: Any) -> None:
    held = held_out(sources.build("mix", sources=parts), Fixed(8), 8, 4)
    assert [captions[0].split()[-1] for captions in held.captions] == ["0", "12", "24", "36", "1", "13", "25", "37"]
    assert held.captions[0] == ["a photo of picture 0"]
    assert held.captions[3] == ["this is picture 36", "this is the 36"]
    everything = held_out(sources.build("mix", sources=parts), Fixed(8), None, 4)
    assert len(everything) == 46
    assert {record["kind"] for record in everything.skipped} == {"undecodable", "not json"}
    assert len(sources.build("mix", sources=parts)) == 48


@dataclass(frozen=True)
class Shelf:
    """A source of one's own: two images with these ids."""

    shelf: str
    ids: list[Any]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.zeros((8, 8, 3), np.uint8), f"{index}", self.ids[index], ["a"])


def test_numbers_of_two_sources_name_different_images() -> None:
    """Image 1 of COCO is not image 1 of Visual Genome; a path, or bytes, are the same image wherever they come from."""

    def shelf(name: str, *ids: Any, **options: Any) -> dict[str, Any]:
        return {"name": "tests.data.test_mix:Shelf", "shelf": name, "ids": list(ids), **options}

    inner = {"name": "mix", "sources": [shelf("c", 1, "coco/1.jpg")]}
    again = {"name": "mix", "sources": [shelf("d", 1)]}
    parts = [shelf("a", 1, "coco/1.jpg", None, "1"), shelf("b", 1, "coco/1.jpg", None), inner, again]
    source = sources.build("mix", sources=parts)
    found = [source[number].image_id for number in range(len(source))]
    assert sorted(map(str, found)) == sorted(str(source[index].image_id) for index in indices(source))
    a, b, c, d = found[:4], found[4:7], found[7:9], found[9:]
    assert a[1] == b[1] == c[1] == "coco/1.jpg"
    assert a[2] == b[2]  # without an id: the same pixels
    assert len({a[0], b[0], c[0], d[0], a[2], a[3]}) == 6
    with_prompt = sources.build("mix", sources=[shelf("a", 1, prompt="of"), shelf("a", 1, weight=2)])
    assert with_prompt[0].image_id == with_prompt[1].image_id  # the same source twice


def test_a_prompt_of_a_single_source(parts: Any) -> None:
    source = sources.build(**{key: value for key, value in parts[3].items() if key != "weight"})
    assert held_out(source, Fixed(8), 1, 1).captions == [["this is picture 36", "this is the 36"]]
    assert len(source) == 12


def test_what_sources_keep_stands_beside_the_run(parts: Any, tmp_path: Path) -> None:
    choice = Choice.model_validate({"name": "mix", "sources": parts})
    source = sources.for_run(choice, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert sum(1 for _ in source.indices()) == 48  # type: ignore[attr-defined]
    kept = sorted(file.suffix for file in (tmp_path / "run" / "shards").iterdir() if file.suffix in (".npy", ".tar"))
    assert kept == [".npy", ".npy", ".tar"]
    elsewhere = Choice.model_validate({"name": "mix", "sources": parts, "cache": str(tmp_path / "elsewhere")})
    list(sources.for_run(elsewhere, str(tmp_path / "run2")).indices())  # type: ignore[attr-defined]
    assert (tmp_path / "elsewhere").is_dir()
    assert not (tmp_path / "run2").exists()


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], "data.sources is empty"),
        ([{"path": "x"}], "data.sources.0.name is required"),
        ([{"name": "scenes"}, {"name": "scnes"}], "unknown data.sources.1 'scnes': did you mean 'scenes'?"),
        ([{"name": "scenes", "siez": 3}], "data.sources.0.siez is not an option of 'scenes': did you mean 'size'?"),
        ([{"name": "scenes", "weight": 0}], "data.sources.0.weight is 0; give a positive number"),
        ([{"name": "scenes", "weight": "much"}], "data.sources.0.weight is 'much'"),
        ([{"name": "scenes", "weight": True}], "data.sources.0.weight is True"),
        ([{"name": "scenes", "weight": float("nan")}], "data.sources.0.weight is nan"),
        ([{"name": "scenes", "prompt": 3}], "data.sources.0.prompt is 3; give the text"),
        ([{"name": "jsonl", "path": "none.jsonl"}], "no file at 'none.jsonl'"),
        ([{"name": "scenes", "count": 0}], "is empty"),
        (["scenes"], "data.sources.0: input should be a valid dictionary"),
    ],
)
def test_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Any, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        sources.build("mix", sources=entries)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
