"""What users wrote with version 0.1.0 goes on loading, whatever becomes of the source tree: see tests/fixtures.

Each part gives the numbers and the texts that it gave when it was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.commands import command
from tests.fixtures import reading


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The numbers were recorded with one: sums over more may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((reading.HERE / "expected.json").read_text())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy of all old files."""
    return reading.copy(tmp_path)


def assert_near(found: Any, expected: Any, place: str = "") -> None:
    """Check that plain data are equal, numbers to within 1e-5."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_near(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_near(found[number], value, f"{place}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), place
    else:
        assert found == expected, place


def test_stage_one(files: Path, expected: dict[str, Any]) -> None:
    assert_near(reading.stage_one(files), expected["stage one"])


@pytest.mark.parametrize(("name", "asks"), [("stage2", False), ("t5", True)])
def test_stage_two(files: Path, expected: dict[str, Any], name: str, asks: bool) -> None:
    """An OPT that is shown the image, and a T5 behind a Q-Former that reads the question."""
    assert_near(reading.stage_two(files, name, asks), expected[name])


def test_a_gallery_is_searched_and_brought_up_to_date(files: Path, expected: dict[str, Any]) -> None:
    """Its pictures stand elsewhere by now: indexing again finds them and embeds only what is new."""
    assert_near(reading.searches(files), expected["searches"])
    again = ["index", files / "stage1", files / "data" / "captions.jsonl", "-o", files / "gallery"]
    assert "6 images (0 embedded now, 6 changed, 0 removed" in command(*again)
    assert_near(reading.searches(files), expected["searches"])
    hits = json.loads(command("search", files / "stage1", files / "gallery", "a cat", "--json"))
    assert {hit["path"] for hit in hits} == set(reading.pictures(files))
    assert not any(hit["fault"] for hit in hits)

    (files / "new").mkdir()
    Image.new("RGB", (30, 30), "white").save(files / "new" / "white.png")
    assert "7 images (1 embedded now" in command("index", files / "stage1", files / "new", "-o", files / "gallery")


def test_a_run_that_reads_stored_features_is_resumed(files: Path, expected: dict[str, Any]) -> None:
    """Nothing is stored again; losses, captions and the learning rate are those of the run that nobody interrupted."""
    shard = files / "store" / "shard-000000.safetensors"
    written = shard.stat().st_mtime_ns
    assert command("features", files / "stage2.yaml").split()[-1] == str(files / "store")
    assert_near(reading.resumed(files), expected["resumed"])
    assert shard.stat().st_mtime_ns == written
