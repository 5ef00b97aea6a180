"""Every kind of bad sample: made here, then used where it can be mended, else skipped under its kind. Never an end."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from qformer.data import sources
from qformer.data.loader import Batches
from qformer.images import read_image
from qformer.resolution.fixed import Fixed
from qformer.schema import DataConfig
from tests.data.making import account, encoded, jsonl, photo, tar
from tests.tiny import tiny_tokenizer

GOOD = encoded(photo(1, 30, 20), "JPEG")
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 100,000 x 100,000 pixels."""
    data = bytearray(encoded(photo()))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def rotated() -> bytes:
    tags = Image.Exif()
    tags[0x112] = 6
    return encoded(photo(1, 30, 20), "JPEG", exif=tags)


def frames(kind: str) -> bytes:
    return encoded(photo(1, 30, 20), kind, save_all=True, append_images=[photo(2, 30, 20), photo(3, 30, 20)])


SIXTEEN = Image.fromarray(np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16))
#: The bytes of an image, and (height, width) where it can be used, or the kind under which it is skipped.
IMAGES: dict[str, tuple[bytes, Any]] = {
    "good": (GOOD, (20, 30)),
    "truncated": (GOOD[: len(GOOD) // 2], "undecodable"),
    "zero bytes": (b"", "undecodable"),
    "another extension": (encoded(photo(1, 30, 20), "BMP"), (20, 30)),
    "cmyk": (encoded(photo(1, 30, 20).convert("CMYK"), "JPEG"), (20, 30)),
    "16 bits": (encoded(SIXTEEN), (20, 30)),
    "palette": (encoded(photo(1, 30, 20).quantize(8)), (20, 30)),
    "alpha": (encoded(photo(1, 30, 20).convert("RGBA")), (20, 30)),
    "grey and alpha": (encoded(photo(1, 30, 20).convert("LA")), (20, 30)),
    "animated gif": (frames("GIF"), (20, 30)),
    "animated webp": (frames("WEBP"), (20, 30)),
    "animated png": (frames("PNG"), (20, 30)),
    "rotated": (rotated(), (30, 20)),
    "one pixel": (encoded(photo(1, 1, 1)), (1, 1)),
    "a line": (encoded(photo(1, 30_000, 1)), (1, 30_000)),
    "a column": (encoded(photo(1, 1, 30_000)), (30_000, 1)),
    "bomb": (bomb(), "undecodable"),
    "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "undecodable"),
    "svg": (SVG, "undecodable"),
    "bilevel": (encoded(photo(1, 30, 20).convert("1")), (20, 30)),
    "broken profile, jpeg": (encoded(photo(1, 30, 20), "JPEG", icc_profile=b"no profile" * 30), (20, 30)),
    "broken profile, png": (encoded(photo(1, 30, 20), "PNG", icc_profile=b"\0"), (20, 30)),
    "noise": (np.random.default_rng(0).bytes(3000), "undecodable"),
    "a tar": (bytes(10_240), "undecodable"),
}

#: What a record has for captions, and how many words are left of it, or the kind.
CAPTIONS: dict[str, tuple[Any, Any]] = {
    "good": ("a dog", 2),
    "several": (["a dog"] * 3, 2),
    "empty": ("", "no caption"),
    "spaces": (" \n\t ", "no caption"),
    "punctuation": ("?!... -- ,;", "no caption"),
    "emoji": ("\U0001f600\U0001f600", "no caption"),
    "10,000 words": ("word " * 10_000, 50),
    "one word of 100,000 letters": ("a" * 100_000, 1),
    "nan": (float("nan"), "no caption"),
    "number": (7, "no caption"),
    "true": (True, "no caption"),
    "none": (None, "no caption"),
    "object": ({"raw": "a dog", "sentid": 1}, 2),
    "another object": ({"words": "a dog"}, "no caption"),
    "list of lists": ([["a dog"]], "no caption"),
    "empty list": ([], "no caption"),
    "list with one text": (["", None, 3, ["x"], "a dog"], 2),
    "zero byte": ("a\0dog", "not utf-8"),
    "lost characters": ("caf\ufffd", "not utf-8"),
    "one of which characters were lost": (["caf\ufffd", "a dog"], 2),
    "half a surrogate": ("a \ud800 dog", 3),
    "other script": ("一只狗", 1),
    "right to left": ("\u202eכלב", 1),
}


def batches(source: Any, **options: Any) -> Batches:
    data = DataConfig.model_validate({"train": {"name": "unused"}, "batch": 4} | options)
    return Batches(source, Fixed(8), data, 0)


def epoch(source: Any) -> tuple[list[str], dict[str, str]]:
    """Keys that were used, and (index -> kind) of what was skipped, over one epoch; each sample once."""
    size = len(source)
    used, skipped = account(batches(source, batch=1), range(size))
    assert len(used) + len(skipped) == size
    assert len({*used, *(index for index, _ in skipped)}) == size
    return used, dict(skipped)


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    data, expected = IMAGES[name]
    if isinstance(expected, tuple):
        assert read_image(data).shape == (3, *expected)


def as_jsonl(folder: Path) -> Any:
    for number, (data, _) in enumerate(IMAGES.values()):
        (folder / f"{number}.jpg").write_bytes(data)
    records = [{"image": f"{number}.jpg", "caption": "a dog"} for number in range(len(IMAGES))]
    return sources.build("jsonl", path=jsonl(folder / "a.jsonl", records))


def as_folder(folder: Path) -> Any:
    as_jsonl(folder)
    for number in range(len(IMAGES)):
        (folder / f"{number}.txt").write_text("a dog")
    return sources.build("folder", path=str(folder))


def as_coco(folder: Path) -> Any:
    as_jsonl(folder)
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(len(IMAGES))]
    annotations = [{"image_id": number, "caption": "a dog"} for number in range(len(IMAGES))]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return sources.build("coco", path=str(folder / "a.json"), images=str(folder))


def as_tar(folder: Path) -> Any:
    members = []
    for number, (data, _) in enumerate(IMAGES.values()):
        members += [(f"{number}.jpg", data), (f"{number}.txt", b"a dog")]
    return sources.build("webdataset", path=tar(folder / "a.tar", members))


def as_parquet(folder: Path, streaming: bool = False) -> Any:
    pandas.DataFrame({"image": [data for data, _ in IMAGES.values()], "caption": "a dog"}).to_parquet(
        folder / "a.parquet"
    )
    return sources.build("datasets", path=str(folder / "a.parquet"), streaming=streaming)


def as_stream(folder: Path) -> Any:
    return as_parquet(folder, True)


@pytest.mark.parametrize("layout", [as_jsonl, as_folder, as_coco, as_tar, as_parquet, as_stream])
@pytest.mark.filterwarnings("ignore")
def test_images_of_every_layout(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    source = layout(tmp_path)
    used, skipped = epoch(source)
    places = list(source.indices()) if hasattr(source, "indices") else range(len(source))
    order = (
        sorted(range(len(IMAGES)), key=lambda number: f"{number}.jpg") if layout is as_folder else range(len(IMAGES))
    )
    names = [list(IMAGES)[number] for number in order]
    kinds = {name: skipped.get(str(place)) for name, place in zip(names, places, strict=True)}
    expected = {name: kind if isinstance(kind, str) else None for name, (_, kind) in IMAGES.items()}
    if layout in (as_parquet, as_stream):  # nothing in the cell is no image at all
        expected["zero bytes"] = kinds["zero bytes"]
        assert kinds["zero bytes"] in ("no image", "undecodable")
    assert kinds == expected
    assert len(used) == sum(kind is None for kind in expected.values())


@pytest.mark.parametrize("layout", ["jsonl", "webdataset"])
def test_captions(layout: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    values = [value for value, _ in CAPTIONS.values()]
    if layout == "jsonl":
        records = [{"image": "a.jpg", "caption": value} for value in values]
        source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", records))
    else:
        members = []
        for number, value in enumerate(values):
            members += [(f"{number}.jpg", GOOD), (f"{number}.json", json.dumps({"caption": value}).encode())]
        source = sources.build("webdataset", path=tar(tmp_path / "a.tar", members))
    _, skipped = epoch(source)
    tokenizer = tiny_tokenizer("bert")
    made = batches(source, batch=1)
    words = {}
    for number in range(len(source)):
        loaded = made[number]
        if not loaded.skipped:
            text: Any = loaded.batch.text
            assert len(tokenizer(text)["input_ids"][0]) > 2  # it takes whatever is left
            words[loaded.keys[0]] = len(text[0].split(" "))
    indices = [str(place) for place in (source.indices() if layout == "webdataset" else range(len(source)))]
    for (name, (_, expected)), index, key in zip(
        CAPTIONS.items(), indices, [_key(source, layout, i) for i in range(len(source))], strict=True
    ):
        assert words.get(key, skipped.get(index)) == expected, name


def _key(source: Any, layout: str, number: int) -> str:
    return f"{source.path}:{number + 1}" if layout == "jsonl" else f"{source.path}/{number}"


def test_records_and_files(tmp_path: Path) -> None:
    """Lines that are no records, files that are none, and one that vanishes between listing and reading."""
    (tmp_path / "good.jpg").write_bytes(GOOD)
    (tmp_path / "gone.jpg").write_bytes(GOOD)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "none")
    (tmp_path / "locked.jpg").write_bytes(GOOD)
    (tmp_path / "locked.jpg").chmod(0)
    locked = None if os.access(tmp_path / "locked.jpg", os.R_OK) else "unreadable"  # some users may read anything

    def record(image: Any) -> dict[str, Any]:
        return {"image": image, "caption": "a dog"}

    lines: list[tuple[Any, str | None]] = [
        *[(record("good.jpg"), None), (record("good.jpg"), None), (record("locked.jpg"), locked)],
        *[(record("none.jpg"), "missing"), (record("gone.jpg"), "missing"), (record("dangling.jpg"), "missing")],
        *[(record("good.jpg/x"), "missing"), (record("a\0b"), "missing"), (record(""), "no image")],
        *[(record("folder.jpg"), "unreadable"), (record("loop.jpg"), "unreadable"), (record("x" * 999), "unreadable")],
        *[(record(None), "no image"), (record(3), "no image"), (record([3, "good.jpg"]), "no image")],
        *[({"caption": "a dog"}, "no image"), ({"image": "good.jpg"}, "no caption")],
        *[("[1, 2]", "no image"), ('"text"', "no image"), ("null", "no image"), ("{broken", "not json")],
        ('{"image": "good.jpg", "caption": "a dog"', "not json"),
        ("[" * 100_000, "not json"),
        *[(record("good.jpg") | {"question": "what?", "caption": None}, "no answer")],
        *[(record("good.jpg") | {"question": "wh\ufffdt?", "answer": "a"}, "not utf-8")],
    ]
    path = Path(jsonl(tmp_path / "a.jsonl", [line for line, _ in lines]))
    path.write_bytes(path.read_bytes() + b'{"image": "good.jpg", "caption": "caf\xe9"}\n')
    source = sources.build("jsonl", path=str(path))
    (tmp_path / "gone.jpg").unlink()
    _, skipped = epoch(source)
    found = [skipped.get(str(number)) for number in range(len(source))]
    assert found == [*(kind for _, kind in lines), "not utf-8"]
    assert source[0].image_id == source[1].image_id  # the same image twice is never its own negative


def test_a_folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loops, links to another folder, folders that are called like an image or its text, a file that vanishes."""
    for name in ("good", "gone", "text"):
        (tmp_path / f"{name}.jpg").write_bytes(GOOD)
        (tmp_path / f"{name}.txt").write_text("a dog")
    (tmp_path / "text.txt").unlink()
    (tmp_path / "text.txt").mkdir()
    (tmp_path / "alone.jpg").write_bytes(GOOD)
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.txt").write_text("a dog")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "loop.txt").write_text("a dog")
    other = tmp_path_factory.mktemp("other")
    (other / "far.jpg").write_bytes(GOOD)
    (other / "far.txt").write_text("a dog")
    for link in ("link", "twice"):
        (tmp_path / link).symlink_to(other)
    source = sources.build("folder", path=str(tmp_path))
    (tmp_path / "gone.jpg").unlink()
    _, skipped = epoch(source)
    kinds = {file.name: skipped.get(str(number)) for number, file in enumerate(source._files)}
    assert kinds == {
        "alone.jpg": "no caption",
        "far.jpg": None,
        "folder.jpg": "unreadable",
        "gone.jpg": "missing",
        "good.jpg": None,
        "loop.jpg": "unreadable",
        "text.jpg": "no caption",
    }
