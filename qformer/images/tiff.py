"""TIFF files whose strips or tiles are JPEGs: Pillow reads their tags, `qformer.images.jpeg` their pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from qformer.images.jpeg import decode, parse_piece
from qformer.images.orientation import upright

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH, HEIGHT, COLORS, ORIENTATION, PLANES = 256, 257, 262, 274, 284
STRIPS, ROWS, STRIP_BYTES = 273, 278, 279
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 322, 323, 324, 325
TABLES = 347
#: Supported color spaces: (number of channels, the transform of Adobe's segment that announces it to a JPEG decoder).
READ: dict[int, tuple[int, int | None]] = {0: (1, None), 1: (1, None), 2: (3, 0), 5: (4, 0), 6: (3, 1)}


def holds_jpeg(opened: Image.Image) -> bool:
    """Check if an image that Pillow has opened but not loaded is a TIFF of JPEGs, of the current or the old kind."""
    return opened.format == "TIFF" and opened.info.get("compression") in ("jpeg", "tiff_jpeg")


def read_rgb(opened: Any, data: bytes) -> np.ndarray:
    """Decode an image to upright RGB, uint8[h, w, 3].

    Args:
        opened: the image, opened but not loaded by Pillow, for its tags.
        data: the file.

    Raises:
        ValueError: the file is damaged, has JPEGs of the old kind, or an unsupported color space.
    """
    tags = opened.tag_v2
    colors = tags.get(COLORS, 0)
    channels, adobe = READ.get(colors, (0, None))
    apart = channels > 1 and tags.get(PLANES, 1) != 1  # each channel is a JPEG of its own
    if opened.info["compression"] != "jpeg" or not channels or apart:
        raise ValueError("a TIFF of JPEGs of a kind that is not supported; save it with another compression")
    width, height = tags[WIDTH], tags[HEIGHT]
    whole = np.empty((height, width, channels), np.uint8)
    for left, top, size, piece in _pieces(tags, data, width, height):
        jpeg = parse_piece(tags.get(TABLES, b""), piece, adobe)
        space = whole[top : top + size[1], left : left + size[0]]
        if jpeg.channels != channels or jpeg.width != size[0] or not space.shape[0] <= jpeg.height <= size[1]:
            raise ValueError("a TIFF whose JPEGs have another size than its tags say")
        if Image.MAX_IMAGE_PIXELS and jpeg.width * jpeg.height > 2 * Image.MAX_IMAGE_PIXELS:  # larger than the image
            raise ValueError(f"a TIFF with a piece of {jpeg.width} x {jpeg.height} pixels, which are too many")
        space[:] = decode(jpeg)[: space.shape[0], : space.shape[1]]
    if colors == 0:  # 0 is white
        whole = 255 - whole
    if channels == 4:
        whole = np.asarray(Image.frombytes("CMYK", (width, height), whole.tobytes()).convert("RGB"))
    return upright(np.broadcast_to(whole, (height, width, 3)), tags.get(ORIENTATION, 1))


def _pieces(tags: Any, data: bytes, width: int, height: int) -> Iterator[tuple[int, int, tuple[int, int], bytes]]:
    """Yield left, top, (width, height) and bytes of each strip or tile."""
    if TILES in tags:
        size, places, lengths = (tags[TILE_WIDTH], tags[TILE_HEIGHT]), tags[TILES], tags[TILE_BYTES]
    else:
        size, places, lengths = (width, min(tags.get(ROWS, height), height)), tags[STRIPS], tags[STRIP_BYTES]
    columns, rows = -(-width // size[0]), -(-height // size[1])
    if not len(places) == len(lengths) == columns * rows:
        raise ValueError(f"a TIFF of {len(places)} pieces where {columns * rows} are needed")
    for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
        piece = data[place : place + length]
        if len(piece) < length:
            raise ValueError("a TIFF that ends too early")
        yield number % columns * size[0], number // columns * size[1], size, piece
