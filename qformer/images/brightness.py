"""Pictures of more than 8 bits: what white is in them, and their 8 bits; where nothing says it, they are refused.

A file of 16 bits may hold 12 of a camera or a scanner, unscaled: read as 16 it is black. So what leaves nearly all of
its range unused is refused, as are numbers of a range that no file tells: 32 bits, signs, fractions beyond 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

BITS, COLORS, LARGEST, KIND = 258, 262, 281, 339  # tags of TIFF
WHITE_IS_ZERO = 0
UNSIGNED = 1
USED = 16  # of this part of its range nothing is visible: 12 bits in 16
PNG_BITS = 24  # place in a PNG, behind its size
ADVICE = "scale it to 8 bits yourself"
UNTOLD = "of which nothing says what white is"


def grey(image: Image.Image) -> np.ndarray:
    """The grey of a picture of Pillow's modes I, I;16 and F, uint8[h, w].

    Raises:
        ValueError: its numbers do not say what white is, or use less than a sixteenth of their range.
    """
    values = np.asarray(image)
    white = _white_level(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN is neither
        raise ValueError(f"greys from {low:g} to {high:g}, {UNTOLD}; {ADVICE}")
    if 0 < high <= white / USED:
        raise ValueError(
            f"greys up to {high:g} where white is {white:g}: black, or of fewer bits than the file says; {ADVICE}"
        )
    scaled = np.rint(values * 255) if image.mode == "F" else values.astype(np.int64) * 256 // (white + 1)
    grey = scaled.astype(np.uint8)
    return 255 - grey if _tags(image).get(COLORS, 1) == WHITE_IS_ZERO else grey


def check_colors(image: Image.Image, data: bytes) -> None:
    """Refuse colors of 16 bits that were black; Pillow has made 8 of them, whatever they hold.

    Args:
        image: decoded. data: its file.

    Raises:
        ValueError: they use less than a sixteenth of their range.
    """
    if image.mode not in ("RGB", "RGBA", "CMYK") or not _has_16_bits(image, data):
        return
    highest = int(np.asarray(image)[..., : 4 if image.mode == "CMYK" else 3].max())
    if highest < 256 // USED:
        raise ValueError(f"16 bits a color, of which less than a sixteenth is used: black, or of fewer bits; {ADVICE}")


def _white_level(image: Image.Image) -> int:
    """The number that is white.

    Raises:
        ValueError: nothing says it.
    """
    tags = _tags(image)
    if image.mode == "F":
        return 1
    bits, kinds = tags.get(BITS, (16,))[0], tags.get(KIND, (UNSIGNED,))
    if bits > 16 or kinds[0] != UNSIGNED:
        raise ValueError(f"greys of {bits} bits{'' if kinds[0] == UNSIGNED else ' and a sign'}, {UNTOLD}; {ADVICE}")
    largest = tags.get(LARGEST, (0,))[0]
    return int(largest) if 255 <= largest < 2**bits and not largest & (largest + 1) else 2**bits - 1


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _has_16_bits(image: Image.Image, data: bytes) -> bool:
    """Whether a file has 16 bits a color and does not scale them itself, as PPM does."""
    if image.format == "PNG":
        return data[PNG_BITS] == 16
    return bool(_tags(image).get(BITS, (8,))[0] == 16)
