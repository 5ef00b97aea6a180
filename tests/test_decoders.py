"""Who decodes a JPEG, through every way in: never Pillow, whose decoder has overflowed (docs/security.md)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from qformer import images
from qformer.data import sources
from qformer.data.loader import Batches
from qformer.demo import limits
from qformer.images import read_head, read_image
from qformer.resolution.fixed import Fixed
from qformer.retrieval.search import Retriever
from qformer.schema import DataConfig
from qformer.stages.capfilt import files as filtered
from tests.data.making import encoded, jsonl, tar
from tests.retrieval.photos import gallery, index, model_of_tiles

TURNED = Image.Exif()
TURNED[274] = 6


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 48))


def made() -> dict[str, bytes]:
    """JPEGs of each kind, by the names that their files have."""
    return {
        "plain.jpg": encoded(picture(0), "JPEG"),
        "progressive.JPEG": encoded(picture(1), "JPEG", progressive=True),
        "gray.jfif": encoded(picture(2).convert("L"), "JPEG"),
        "ink.jpg": encoded(picture(3).convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(picture(4), "JPEG", exif=TURNED),
        "several.jpg": encoded(picture(5), "MPO", save_all=True, append_images=[picture(6)]),
        "within.tif": encoded(picture(7), "TIFF", compression="jpeg"),
        "other.png": encoded(picture(8), "JPEG"),  # whatever its name
    }


@pytest.fixture(scope="module")
def jpegs() -> dict[str, bytes]:
    return made()


@pytest.fixture
def folder(jpegs: dict[str, bytes], tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name, data in jpegs.items():
        (tmp_path / "photos" / name).write_bytes(data)
        (tmp_path / "photos" / name).with_suffix(".txt").write_text(f"a photo called {name}\n")
    return tmp_path / "photos"


def test_pillow_would_be_caught(jpegs: dict[str, bytes], by_pillow: list[str]) -> None:
    Image.open(io.BytesIO(jpegs["plain.jpg"]))
    assert by_pillow == ["head"]
    for name, way in (("plain.jpg", "pixels"), ("several.jpg", "pixels"), ("within.tif", "pixels in TIFF")):
        by_pillow.clear()
        Image.open(io.BytesIO(jpegs[name])).load()
        assert by_pillow[-1] == way, name


def test_bytes_and_paths(jpegs: dict[str, bytes], folder: Path, by_pillow: list[str]) -> None:
    for name, data in jpegs.items():
        assert torch.equal(read_image(data), read_image(folder / name))
        read_head(data)
    assert by_pillow == []


@pytest.mark.parametrize("name", ["folder", "jsonl", "webdataset", "datasets", "streamed"])
def test_sources_of_data(
    name: str, jpegs: dict[str, bytes], folder: Path, by_pillow: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "hub")
    made: Any
    if name == "folder":
        made = sources.build("folder", path=str(folder))
    elif name == "jsonl":
        records = [{"image": f"photos/{name}", "caption": "a photo"} for name in jpegs]
        made = sources.build("jsonl", path=jsonl(folder.parent / "all.jsonl", records))
    elif name == "webdataset":
        members = [(f"{n}.{Path(name).suffix[1:].lower()}", data) for n, (name, data) in enumerate(jpegs.items())]
        texts = [(f"{n}.txt", b"a photo") for n in range(len(jpegs))]
        path = tar(folder.parent / "all.tar", sorted(members + texts))
        made = sources.build("webdataset", path=path, cache=str(folder.parent / "cache"))
    else:
        rows = {
            "image": [{"bytes": data, "path": None} for data in jpegs.values()],
            "caption": ["a photo"] * len(jpegs),
        }
        kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder.parent / "all.parquet")
        cache = {"streaming": True, "cache": str(folder.parent / "cache")} if name == "streamed" else {}
        made = sources.build("datasets", path=str(folder.parent / "all.parquet"), **cache)
    data = DataConfig.model_validate({"train": {"name": "unused"}, "batch": len(jpegs)})
    loaded = Batches(made, Fixed(16), data, 0)[0]
    assert not loaded.skipped
    assert len(loaded.batch.tiles.pixels) == len(jpegs)
    assert by_pillow == []


def test_a_gallery(folder: Path, by_pillow: list[str]) -> None:
    model = model_of_tiles()
    opened = gallery(folder.parent / "gallery", model)
    tally = index(opened, model, path=folder)
    assert not tally.skipped
    for known in opened.store.known():
        Retriever(folder.parent / "gallery", model, "tiny").open_image(known.id)
    assert by_pillow == []


def test_what_capfilt_writes(jpegs: dict[str, bytes], by_pillow: list[str]) -> None:
    for name, data in jpegs.items():
        assert filtered._encoded(data) == (data, "tif" if name == "within.tif" else "jpg")
    assert by_pillow == []


def test_what_a_visitor_sends(jpegs: dict[str, bytes], folder: Path, by_pillow: list[str]) -> None:
    for name in jpegs.keys() - {"within.tif"}:
        assert limits.check_picture(folder / name) == jpegs[name]
        limits.open_picture(folder / name)
    assert by_pillow == []


def test_only_formats_that_are_meant_are_open_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, formats: asked.append(formats) or real(*given, formats=formats))
    read_image(encoded(picture(0), "PNG"))
    assert asked == [[name for name in images.FORMATS if name != "JPEG"]]
