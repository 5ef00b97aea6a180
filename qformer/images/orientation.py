"""How a photo is turned upright: the orientation that EXIF or XMP tells, read from their bytes, and what it does.

Pillow's reader of EXIF can be kept busy for hours by a crafted block (docs/security.md), so ours looks for one number.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Transpose

TAG = 274
HEADER = b"Exif\x00\x00"
#: Of each whole-number type of TIFF that the tag is met with: its bytes, and whether it has a sign.
TYPES = {1: (1, False), 3: (2, False), 4: (4, False), 6: (1, True), 8: (2, True), 9: (4, True)}
#: What each orientation but the first is undone by.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def of_blocks(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation (1 to 8) that an EXIF block tells, or else an XMP packet; 1, upright, where neither does."""
    told = _read_exif(exif)
    if told is None and (match := XMP.search(xmp)):
        told = int(match[1])
    return told if told is not None and 1 <= told <= 8 else 1


def of_info(info: dict[Any, Any]) -> int:
    """The orientation in the `info` of an image that Pillow has opened and loaded: PNG, WebP, AVIF."""
    exif, xmp = info.get("exif"), info.get("XML:com.adobe.xmp") or info.get("xmp")
    text = info.get("Raw profile type exif")  # a PNG of ImageMagick: three lines in front of hexadecimal digits
    if exif is None and isinstance(text, str):
        try:
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            exif = b""
    if isinstance(xmp, str):
        xmp = xmp.encode("utf-8", "replace")
    return of_blocks(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")


def _read_exif(exif: bytes) -> int | None:
    start = 0
    while exif.startswith(HEADER, start):
        start += len(HEADER)
    tiff = memoryview(exif)[start:]
    order: Any = {b"II": "little", b"MM": "big"}.get(bytes(tiff[:2]))
    if order is None:
        return None

    def number(place: int, size: int, signed: bool = False) -> int:
        return int.from_bytes(tiff[place : place + size], order, signed=signed)

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(tiff) - 11), 12):
        if number(entry, 2) == TAG and (kind := TYPES.get(number(entry + 2, 2))) and number(entry + 4, 4) == 1:
            return number(entry + 8, *kind)
    return None


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels uint8[h, w, 3] that are stored in an orientation, as they are meant to be seen."""
    if orientation not in TURNS:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(TURNS[orientation]))
