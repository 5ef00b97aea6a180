"""Orientation of a photo, read from the bytes of EXIF or XMP, and rotation to upright.

A crafted EXIF block can keep Pillow's reader busy for hours (docs/security.md); this reader looks for one number.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Transpose

TAG = 274
HEADER = b"Exif\x00\x00"
#: Integer types of TIFF that occur for the tag: (number of bytes, True if signed).
TYPES = {1: (1, False), 3: (2, False), 4: (4, False), 6: (1, True), 8: (2, True), 9: (4, True)}
#: Transposition that undoes each orientation but the first.
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
    """Read the orientation (1 to 8) from an EXIF block, or else from an XMP packet; 1, upright, if neither has one."""
    value = _read_exif(exif)
    if value is None and (match := XMP.search(xmp)):
        value = int(match[1])
    return value if value is not None and 1 <= value <= 8 else 1


def of_info(info: dict[Any, Any]) -> int:
    """Read the orientation from the `info` of an image that Pillow has loaded: PNG, WebP, AVIF."""
    exif, xmp = info.get("exif"), info.get("XML:com.adobe.xmp") or info.get("xmp")
    text = info.get("Raw profile type exif")  # a PNG by ImageMagick: three lines, then hexadecimal digits
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
    """Turn pixels uint8[h, w, 3] in an orientation upright."""
    if orientation not in TURNS:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(TURNS[orientation]))
