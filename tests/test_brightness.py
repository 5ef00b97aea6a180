"""Pictures of more than 8 bits: scaled by what white is, or refused; never black without a word."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qformer.images import read_image
from qformer.types import BadSample

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def encoded(values: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def png(values: np.ndarray, colors: int) -> bytes:
    """A PNG of 16 bits, which Pillow writes of greys alone. colors: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, colors, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, bits: int, colors: int = 1, **tags: int) -> bytes:
    """A grey TIFF of one strip; values as they stand in it. tags: `t281=1023`."""
    data = values.tobytes()
    entries = {256: values.shape[-1], 257: values.shape[0], 258: bits, 259: 1, 262: colors, 273: 8, 277: 1, 278: 8}
    if bits == 12:
        entries[256] = 8
    entries |= {279: len(data)} | {int(name[1:]): value for name, value in tags.items()}
    written = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(entries)) + written + struct.pack("<I", 0)


def packed12(values: np.ndarray) -> np.ndarray:
    """Two values in three bytes, as a TIFF of 12 bits has them."""
    pairs = values.reshape(-1, 2).astype(np.uint16)
    parts = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
    return np.stack(parts, axis=1).astype(np.uint8).reshape(len(values), -1)


SIXTEEN, TWELVE = (RAMP * 65535).astype(np.uint16), (RAMP * 4095).astype(np.uint16)
PGM = b"P5\n8 8\n4095\n" + TWELVE.astype(">u2").tobytes()
PFM = b"Pf\n8 8\n-1.0\n" + np.flipud(RAMP).astype("<f4").tobytes()
READ: dict[str, tuple[Any, np.ndarray]] = {
    "png": (png(SIXTEEN, 0), SIXTEEN >> 8),
    "tiff": (tiff(SIXTEEN, 16), SIXTEEN >> 8),
    "where 0 is white": (tiff(SIXTEEN, 16, colors=0), 255 - (SIXTEEN >> 8)),
    "12 bits that the file tells": (tiff(packed12(TWELVE), 12), TWELVE >> 4),
    "10 bits by the largest value": (tiff(TWELVE >> 2, 16, t281=1023), TWELVE >> 4),
    "8 bits by the largest value": (tiff(TWELVE >> 4, 16, t281=255), TWELVE >> 4),
    "pgm of 12 bits": (PGM, (np.rint(TWELVE / 4095 * 65535)).astype(int) >> 8),
    "fractions": (encoded(RAMP.astype(np.float32), "TIFF"), np.rint(RAMP * 255)),
    "pfm": (PFM, np.rint(RAMP * 255)),
    "opened before": (Image.open(io.BytesIO(png(SIXTEEN, 0))), SIXTEEN >> 8),
    "black": (png(SIXTEEN * 0, 0), SIXTEEN * 0),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "12 bits in 16, png": (png(TWELVE, 0), "grays up to 4095 where white is 65535"),
    "12 bits in 16, tiff": (tiff(TWELVE, 16), "grays up to 4095 where white is 65535"),
    "12 bits in 16, colors": (png(np.stack([TWELVE] * 3, axis=2), 2), "less than a sixteenth"),
    "12 bits in 16, alpha": (png(np.stack([TWELVE, 65535 - TWELVE * 0], axis=2), 4), "less than a sixteenth"),
    "8 bits in 16": (png(TWELVE >> 4, 0), "grays up to 255"),
    "32 bits": (encoded((RAMP * 255).astype(np.int32), "TIFF"), "grays of 32 bits and a sign"),
    "a sign": (tiff((RAMP * 4095).astype(np.int16), 16, t339=2), "grays of 16 bits and a sign"),
    "fractions beyond 1": (encoded((RAMP * 255).astype(np.float32), "TIFF"), "grays from 0 to 255"),
    "no numbers": (encoded(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "TIFF"), "grays from nan"),
    "an image in memory": (Image.fromarray((RAMP * 1e6).astype(np.int32)), "grays from 0 to 1e+06"),
    "an array": (SIXTEEN, r"an array uint16\[8, 8\] is not uint8"),
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str) -> None:
    image, expected = READ[name]
    assert torch.equal(read_image(image), torch.from_numpy(expected.astype(np.uint8)).expand(3, 8, 8))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    image, expected = REFUSED[name]
    with pytest.raises(BadSample, match=expected.replace("+", r"\+")) as caught:
        read_image(image)
    assert caught.value.kind == "undecodable"


def test_colors_of_16_bits() -> None:
    colors = np.stack([SIXTEEN, SIXTEEN.T, 65535 - SIXTEEN], axis=2)
    assert torch.equal(read_image(png(colors, 2)), torch.from_numpy((colors >> 8).astype(np.uint8)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.rand(3, 4, 5) * 255, "outside 0 to 1"),
        (torch.rand(3, 4, 5) - 0.5, "outside 0 to 1"),
        (torch.full((3, 4, 5), float("nan")), "outside 0 to 1"),
        (torch.rand(4, 5, 3), r"a tensor float32\[4, 5, 3\] is not uint8\[3, h, w\]"),
        (torch.zeros(4, 6, 5, dtype=torch.uint8), "is not uint8"),
        (torch.zeros(3, 6, 5, dtype=torch.bool), "a tensor bool"),
        (torch.zeros(3, 6, 5, dtype=torch.int64), "a tensor int64"),
        (torch.zeros(6, 5, dtype=torch.uint8), "is not uint8"),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), "is not uint8"),
        (torch.zeros(1, 3, 6, 5), "is not uint8"),
    ],
)
def test_tensors_are_refused_like_arrays(tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(BadSample, match=said) as caught:
        read_image(tensor)
    assert caught.value.kind == "undecodable"


def test_tensors_that_are_images() -> None:
    for tensor in (torch.rand(3, 4, 5), torch.rand(3, 4, 5).half(), torch.zeros(3, 4, 5, dtype=torch.uint8)):
        assert read_image(tensor) is tensor
