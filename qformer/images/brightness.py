"""Conversion of images with more than 8 bits per channel to 8 bits, where the white level is known.

A file of 16 bits may hold 12 unscaled bits from a camera or a scanner, and would look black. So images that use less
than a sixteenth of their range are refused, as are images whose range is unknown: 32 bits, signed, or above 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

BITS, COLORS, LARGEST, KIND = 258, 262, 281, 339  # tags of TIFF
WHITE_IS_ZERO = 0
UNSIGNED = 1
USED = 16  # an image within 1/16 of its range looks black, such as 12 bits in 16
PNG_BITS = 24  # offset of the bit depth in a PNG, after its size
ADVICE = "scale it to 8 bits yourself"
UNTOLD = "with an unknown white level"


def to_gray(image: Image.Image) -> np.ndarray:
    """Convert a gray image in Pillow's modes I, I;16 or F to uint8[h, w].

    Raises:
        ValueError: the white level is unknown, or the values use less than a sixteenth of their range.
    """
    values = np.asarray(image)
    white = _white_level(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN is neither
        raise ValueError(f"grays from {low:g} to {high:g}, {UNTOLD}; {ADVICE}")
    if 0 < high <= white / USED:
        raise ValueError(
            f"grays up to {high:g} where white is {white:g}: black, or of fewer bits than the file says; {ADVICE}"
        )
    scaled = np.rint(values * 255) if image.mode == "F" else values.astype(np.int64) * 256 // (white + 1)
    gray = scaled.astype(np.uint8)
    return 255 - gray if _tags(image).get(COLORS, 1) == WHITE_IS_ZERO else gray


def check_colors(image: Image.Image, data: bytes) -> None:
    """Refuse 16-bit colors that look black; Pillow reduces them to 8 bits without a check.

    Args:
        image: the decoded image.
        data: its file.

    Raises:
        ValueError: the colors use less than a sixteenth of their range.
    """
    if image.mode not in ("RGB", "RGBA", "CMYK") or not _has_16_bits(image, data):
        return
    highest = int(np.asarray(image)[..., : 4 if image.mode == "CMYK" else 3].max())
    if highest < 256 // USED:
        raise ValueError(f"16 bits per color with less than a sixteenth used: black, or of fewer bits; {ADVICE}")


def _white_level(image: Image.Image) -> int:
    """Find the value of white.

    Raises:
        ValueError: it is unknown.
    """
    tags = _tags(image)
    if image.mode == "F":
        return 1
    bits, kinds = tags.get(BITS, (16,))[0], tags.get(KIND, (UNSIGNED,))
    if bits > 16 or kinds[0] != UNSIGNED:
        raise ValueError(f"grays of {bits} bits{'' if kinds[0] == UNSIGNED else ' and a sign'}, {UNTOLD}; {ADVICE}")
    largest = tags.get(LARGEST, (0,))[0]
    return int(largest) if 255 <= largest < 2**bits and not largest & (largest + 1) else 2**bits - 1


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _has_16_bits(image: Image.Image, data: bytes) -> bool:
    """Check if a file has 16 bits per color and no white level of its own, as PPM has."""
    if image.format == "PNG":
        return data[PNG_BITS] == 16
    return bool(_tags(image).get(BITS, (8,))[0] == 16)
