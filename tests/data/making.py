"""Small data for tests: pictures that say which they are, tars of them, tars that are damaged."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from qformer.images import read_image

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.types import Sample


def photo(number: int = 0, width: int = 20, height: int = 16) -> Image.Image:
    """One colour, which is the number in base 6."""
    colour = tuple(40 * (number // 6**digit % 6) for digit in range(3))
    return Image.fromarray(np.full((height, width, 3), colour, dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def number_of(sample: Sample) -> int:
    """The number that the picture of a sample shows."""
    digits = read_image(sample.image)[:, 3, 3].div(40).round().to(torch.int64).tolist()
    return sum(digit * 6**place for place, digit in enumerate(digits))


def tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, **({"mode": "w"} | options)) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def shard(path: Path, numbers: range | list[int], **options: Any) -> str:
    """Samples 00017.png with 00017.txt."""
    members = []
    for number in numbers:
        members += [(f"{number:05d}.png", encoded(photo(number))), (f"{number:05d}.txt", f"picture {number}".encode())]
    return tar(path, members, **options)


def jsonl(path: Path, records: list[Any]) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def account(batches: Any, numbers: range) -> tuple[list[str], list[tuple[str, str]]]:
    """Of these batches: the keys that were used at their own place in the epoch, and (index, kind) of those skipped."""
    used, skipped = [], []
    for number in numbers:
        loaded = batches[number]
        bad = {record["position"]: record for record in loaded.skipped if "replacement" not in record}
        assert all(record["batch"] == number for record in loaded.skipped)
        skipped += [(record["index"], record["kind"]) for record in bad.values()]
        first = number * len(loaded.keys)
        used += [key for row, key in enumerate(loaded.keys) if first + row not in bad]
    return used, skipped
